"""More than four arms in one answer: who is beaten, and by whom."""

import numpy as np
import pytest
from tests.analysis.simulated import answers, arms_with

from recipes_lib.analysis.aims import Aims
from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.lines import conclusion_lines


def test_many_arms_are_one_answer_and_their_pairs_stay_in_the_table() -> None:
    rates = [0.8, 0.78, 0.5, 0.79, 0.3]
    tables = answers(rates, 4, 300, 0.0, np.random.default_rng(1))
    conclusion = conclude(arms_with(tables), Aims("pass_rate"))
    ranking = conclusion.ranking
    assert set(ranking.unbeaten) == {"arm0", "arm1", "arm3"}
    assert list(ranking.beaten) == ["arm2", "arm4"] and len(ranking.beaten["arm4"]) == 4
    (answer,) = conclusion.answer
    assert answer.startswith("3 of 5 arms are not shown to be worse than any in pass rate: arm")
    assert "Shown to be worse: arm2 (than arm" in answer and "arm4 (than" in answer
    assert "selected: no place in it is tested" in answer and "no verdict" not in answer
    lines = conclusion_lines(conclusion)
    assert lines[0] == answer and "arm4 against arm0" in lines
    assert conclusion.to_dict()["ranking"]["pairs"] == 10


def test_four_arms_are_answered_pair_by_pair_and_equal_ones_are_not_ordered() -> None:
    rng = np.random.default_rng(2)
    few = conclude(arms_with(answers([0.5] * 4, 3, 100, 0.0, rng)), Aims("pass_rate"))
    assert few.ranking is None and len(few.answer) == 6
    many = conclude(arms_with(answers([0.5] * 6, 3, 100, 0.0, rng)), Aims("pass_rate"))
    assert many.answer[0] == "None of 6 arms is shown to be worse than another in pass rate."


def test_many_arms_of_which_one_was_trained_once_say_so_whatever_their_order() -> None:
    tables = answers([0.8, 0.78, 0.5, 0.79, 0.3], 4, 300, 0.0, np.random.default_rng(1))
    said = "Not every arm has two trainings: another seed may differ."
    assert said not in conclude(arms_with(tables), Aims("pass_rate")).answer[0]
    for arm in tables:
        (answer,) = conclude(arms_with(tables | {arm: tables[arm][:1]}), Aims("pass_rate")).answer
        assert "Shown to be worse: arm2" in answer and answer.endswith(said), arm


def test_a_lower_loss_is_the_better_one_and_pairs_without_a_verdict_are_counted() -> None:
    tables = answers([0.2, 0.8, 0.8, 0.8, 0.8], 5, 200, 0.0, np.random.default_rng(3))
    arms = arms_with(tables)
    for _, run in arms.runs:
        run.evals[0].metrics[0].__dict__["higher_is_better"] = False
    for run in arms["arm4"].runs:  # the weights of another arm, under its own name
        run.evals[0].answers.__dict__["fingerprint"] = run.name.replace("arm4", "arm3")
    conclusion = conclude(arms, Aims("pass_rate"))
    assert conclusion.ranking.unbeaten == ("arm0",) and conclusion.ranking.without_verdict == 1
    assert "Without a verdict: 1 of 10 pairs." in conclusion.answer[0]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("arms", "studies"), [(4, 1000), (8, 400), (16, 150)])
def test_of_arms_that_are_alike_one_is_called_worse_in_at_most_a_twentieth(arms, studies) -> None:
    rng = np.random.default_rng(arms)
    false = 0
    for _ in range(studies):
        tables = answers([0.5] * arms, 3, 200, 0.02, rng)
        claims = conclude(arms_with(tables), Aims("pass_rate")).primary_claims.values()
        false += any(claim.verdict in ("better", "worse") for claim in claims)
    error = (0.05 * 0.95 / studies) ** 0.5
    assert false / studies <= 0.05 + 2 * error, (arms, false / studies)
