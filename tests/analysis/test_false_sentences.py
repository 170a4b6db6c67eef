"""Files that could lead to a sentence that is false: each is read as `recipes compare` or a study's
report reads it, and says the truth or nothing.
"""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.analysis.made_up import (
    JUDGE,
    change,
    change_lines,
    plain_text,
    write_eval,
    write_judged,
    write_run,
    write_values,
)

from recipes_lib.analysis.aims import Aims, Design, Margin, TunedArm
from recipes_lib.analysis.checks import find
from recipes_lib.analysis.claims import Claim, Conclusion, conclude
from recipes_lib.analysis.readers.ours import load_arms
from recipes_lib.analysis.runs import Arms
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.files import model_fingerprint
from recipes_lib.data.leaks import Leak, Leaks
from recipes_lib.evals.audit import HUMAN, PROBES
from recipes_lib.evals.log import (
    FORM_ONLY,
    Check,
    JudgeFacts,
    Metric,
    Sample,
    Scorecard,
    read_eval_log,
    write_log,
)
from recipes_lib.evals.recipe import load_eval
from recipes_lib.weights.load import base_fingerprint

RANK = Design("study", "Does rank matter?", factors={"rank": ["lora.r"]})
CLAIMS = {"better", "worse", "higher", "lower"}
RESULT, ITEMS = "evals/alpaca_eval/result.json", "evals/alpaca_eval/items.jsonl"
Folders = dict[str, list[Path]]


def compared(folders, aims=None, design=None) -> Conclusion:
    return conclude(load_arms(folders), aims, design)


def codes(conclusion: Conclusion, severity: str = "error") -> set[str]:
    return {each.code for each in conclusion.findings if each.severity == severity}


def claim_of(conclusion: Conclusion, metric: str = "win_rate") -> Claim:
    return next(each for each in conclusion.claims if each.row.metric.endswith(metric))


def silent(conclusion: Conclusion) -> bool:
    return not any(claim.verdict in CLAIMS or claim.within for claim in conclusion.claims)


def stopped(folders: Folders, code: str) -> bool:
    """Whether a finding of this code leaves the judged comparison without a verdict."""
    conclusion = compared(folders)
    return code in codes(conclusion) and claim_of(conclusion).verdict == "no verdict"


def rewrite(folders: Folders, result: str = RESULT, **facts: Any) -> None:
    """Change facts of an evaluation in every run."""
    for folder in (each for of_arm in folders.values() for each in of_arm):
        write_log(replace(read_eval_log(folder / result), **facts))


@pytest.fixture
def two(tmp_path: Path) -> Folders:
    """Two trained runs, judged against the reference: the second one wins far more."""
    folders = {name: [write_run(tmp_path, name, rank=r)] for name, r in (("one", 8), ("two", 32))}
    for (folder,), skill in zip(folders.values(), (0.3, 0.8), strict=True):
        write_judged(folder, 100, skill=skill)
        write_values(folder, [float(n % 10 < 10 * skill) for n in range(100)])
    return folders


def seeds(root: Path, arm: str, skill: float, n: int = 3, **values: Any) -> list[Path]:
    """Trainings of one arm with several seeds, each judged against the reference."""
    folders = []
    for seed in range(42, 42 + n):
        folder = write_run(root, f"{arm}--seed{seed}", seed=seed, **values)
        write_judged(folder, 200, skill=skill, flips=0.0)
        folders.append(folder)
    return folders


@pytest.fixture
def ranks(tmp_path: Path) -> Folders:
    """Two arms of three seeds each that differ in lora.r, the second one far better."""
    return {"r8": seeds(tmp_path, "r8", 0.3), "r32": seeds(tmp_path, "r32", 0.8, rank=32)}


def valued(root: Path, first: Sequence[float], second: Sequence[float], **facts: Any) -> Folders:
    """Two runs with these values of one metric."""
    folders = {name: [write_run(root, name)] for name in ("a", "b")}
    for (folder,), values in zip(folders.values(), (first, second), strict=True):
        write_values(folder, values, **facts)
    return folders


def other(result: str = RESULT, **facts: Any) -> Callable[[Folders], None]:
    """Other facts of one arm."""
    return lambda two: rewrite({"two": two["two"]}, result, **facts)


def other_items(key: str, value: Any = "other") -> Callable[[Folders], None]:
    """Another text, or other verdicts, under the same ids in one arm."""
    return lambda two: change_lines(two["two"][0] / ITEMS, lambda row: row | {key: value})


def copied(two: Folders) -> None:
    """A copy of the other arm's answers with other verdicts, a few rows dropped."""
    (metric,) = read_eval_log(two["one"][0] / RESULT).metrics
    kept = tuple(replace(each, value=1.0, outcome="win") for each in metric.samples[3:])
    other(metrics=(replace(metric, samples=kept, value=1.0, n=97),))(two)


def half_cut(two: Folders, result: str = RESULT) -> None:
    """Every second answer hits the token limit."""
    for (folder,) in two.values():
        log = read_eval_log(folder / result)
        samples = tuple(
            replace(sample, cut=number % 2 == 0, answer=plain_text(log.target, sample.id))
            for number, sample in enumerate(log.metrics[0].samples)
        )
        recipe = {"generation": {"max_new_tokens": 64}}
        metrics = (replace(log.metrics[0], samples=samples),)
        write_log(replace(log, metrics=metrics, recipe=recipe))


TURNS = Check(check="swap consistency", value=0.3, n=9, needs="at least 0.6", result="fail")
LEAK = Leak("train", "row 1", "q1", "question", 1.0)
LEAKS = Leaks(rows=1000, questions=100, leaked_rows=1, leaked_questions=1, found=[LEAK])
STOPS: list[tuple[str, Callable[[Folders], Any]]] = [
    ("texts-differ", other_items("input")),
    ("texts-differ", other_items("opponent")),
    ("same-answers", copied),
    ("judges-differ", other(judge=None)),
    ("judges-differ", other(judge=JudgeFacts(model="other/judge"))),
    ("self-judged", lambda two: rewrite(two, judge=JudgeFacts(model="two"))),
    ("self-judged", lambda two: rewrite(two, judge=JudgeFacts(model="Some/Model/"))),
    ("judge-failed-audit", lambda two: rewrite(two, audit=Scorecard(checks=(TURNS,)))),
    ("one-order", other_items("verdicts", ["A"])),
    ("degenerate-answers", half_cut),
    ("leaked-questions", other(leaks=LEAKS)),
    # rules, rubrics or prompts were edited between the arms: the recipe only names their files
    ("protocol-differs", lambda two: [rewrite({arm: two[arm]}, settings=arm) for arm in two]),
]


@pytest.mark.parametrize(("code", "how"), STOPS)
def test_an_error_stops_the_sentences_of_its_evaluation_alone(code, how, two) -> None:
    assert claim_of(compared(two)).verdict == "higher"
    if code == "protocol-differs":  # another batch size is no other question
        for arm, size in zip(two, (8, 16), strict=True):
            recipe = load_eval("evals/quickstart/lm_eval.yaml", [f"suite.batch_size={size}"])
            rewrite({arm: two[arm]}, settings=recipe.settings_key())
        assert claim_of(compared(two)).verdict == "higher"
    how(two)
    assert stopped(two, code)
    assert claim_of(compared(two), "pass_rate").verdict == "higher"
    words = {"judge-failed-audit": "swap consistency", "degenerate-answers": "max_new_tokens=128"}
    assert any(words.get(code, "") in line for line in compared(two).cannot_say)


def test_a_primary_metric_is_tested_where_another_stands_for_it(two: Folders) -> None:
    facts: dict[str, Any] = {"unit": "number", "higher_is_better": False}
    for (folder,), loss in zip(two.values(), (1.0, 1.1), strict=True):
        samples = tuple(
            Sample(f"q{n}", value=loss + n % 7 / 9, outcome="graded") for n in range(60)
        )
        made = [Metric("bits_per_byte", "bits", samples, instead_of="loss", **facts)]
        made.append(Metric("loss", "loss", samples, **facts))
        write_eval(folder, "heldout_loss", "heldout_loss", made)
    assert "bits_per_byte" not in str([row.metric for row in compared(two).table.rows])
    first = compared(two, Aims("heldout_loss/bits_per_byte")).table.rows[0]
    assert first.primary and first.metric == "heldout_loss/bits_per_byte"


def test_a_primary_metric_or_margin_that_no_row_is_about_has_no_answer(two: Folders) -> None:
    """The answer would be about another metric, and nobody would see it."""
    for aims, what in (
        (Aims("gsm8k/acc_normed"), "gsm8k/acc_normed, the primary metric"),
        (Aims("win_rate", {"rouge": Margin(0.1)}), "rouge, which has a margin"),
    ):
        conclusion = compared(two, aims, RANK)
        assert conclusion.answer == [f"No answer: no row of the table is about {what}."]
        assert codes(conclusion) == {"no-such-metric"}
        assert "Fix: name a metric that the table has: alpaca" in conclusion.cannot_say[0]
        assert claim_of(conclusion).verdict == "higher"  # each row is about its own metric
    interim = compared(two, Aims("gsm8k/acc"), replace(RANK, missing=("gsm8k of two",)))
    assert not codes(interim) and interim.answer[0].startswith("Interim")


def test_two_arms_without_the_primary_metric_have_no_answer_about_another(two, tmp_path) -> None:
    third = write_run(tmp_path, "three", rank=64)
    write_values(third, [1.0, 0.0] * 50)
    conclusion = compared({**two, "three": [third]}, Aims("win_rate"))
    assert len(conclusion.answer) == 3
    assert sum(line.startswith("The two run scored better") for line in conclusion.answer) == 1
    for arm in ("one", "two"):
        line = f"No answer: three and {arm} share no win_rate, the primary metric."
        assert line in conclusion.answer
    verdicts = {claim.row.arms: claim.verdict for claim in conclusion.claims if claim.row.test}
    assert verdicts["three", "two"] == "lower"


def test_far_longer_answers_are_named_in_the_sentence(two: Folders) -> None:
    """Side by side, head to head, and either way round; not where they are about as long."""
    assert "times as long" not in claim_of(compared(two)).sentence

    def longer(who: str, question: str) -> str:
        parts = range(6 if who == "two" else 1)
        return " ".join(plain_text(who, f"{question}{part}") for part in parts)

    for target, rival, skill in (("two", "one", 0.8), ("one", "two", 0.2)):
        write_judged(two[target][0], 100, against=rival, skill=skill, text=longer)
        write_judged(two[target][0], 100, skill=skill, text=longer)
    judged = [each for each in compared(two).claims if each.row.metric.endswith("win_rate")]
    assert {each.row.head_to_head for each in judged} == {True, False}
    for claim in judged:
        assert "Answers of two are 6.0 times as long as those of one (medians" in claim.sentence


def test_equivalence_near_an_end_of_the_scale_says_so(tmp_path: Path) -> None:
    low = ([0.0] * 598 + [1.0, 1.0], [0.0] * 599 + [1.0])
    high = ([1.0] * 598 + [0.0, 0.0], [1.0] * 599 + [0.0])
    middle = ([0.0, 1.0] * 300, [0.0, 1.0] * 299 + [1.0, 1.0])
    for place, (first, second), said in (
        ("floor", low, "Both are below 2%, so the questions hardly tell them apart."),
        ("ceiling", high, "Both are above 98%, so the questions hardly tell them apart."),
        ("middle", middle, ""),
    ):
        folders = valued(tmp_path / place, first, second)
        (claim,) = compared(folders, Aims(margins={"pass_rate": Margin(0.05)})).claims
        assert claim.within == "equivalent"
        assert said in claim.sentence and bool(said) == ("hardly tell" in claim.sentence)


def test_other_prompt_formats_have_no_verdict_and_the_way_to_one_is_named(two: Folders) -> None:
    facts = read_eval_log(two["two"][0] / RESULT).answers
    asked = [replace(facts, prompt_format_hash=word) for word in ("dolly", "chat")]
    file = write_judged(two["two"][0], 100, against="one", skill=0.8, name="met")
    other("evals/met/" + file.name, answers=asked[0], opponent=asked[1])(two)
    assert claim_of(compared(two), "met/win_rate").stopped_by[0].code == "protocol-differs"
    assert claim_of(compared(two), "alpaca_eval/win_rate").verdict == "higher"
    for arm, word in zip(two, ("dolly", "chat"), strict=True):  # of two families, each by itself
        facts = read_eval_log(two[arm][0] / RESULT).answers
        rewrite({arm: two[arm]}, answers=replace(facts, prompt_format_hash=word))
    design = Design("study", "What?", factors={"format": ["data.prompt_format"]})
    for known, verdict in ((None, "no verdict"), (RANK, "no verdict"), (design, "higher")):
        conclusion = compared(two, design=known)
        assert claim_of(conclusion, "alpaca_eval/win_rate").verdict == verdict
        way = "factors: {format: [data.prompt_format]}"
        assert any(way in line for line in conclusion.cannot_say) == (verdict == "no verdict")


def test_what_is_said_beside_a_sentence_stops_none(two: Folders) -> None:
    weak = JudgeFacts(name="w", fingerprint="w", model="w/w", weak="of 135M parameters")
    rewrite(two, judge=weak)
    assert "weak-judge" in codes(compared(two), "warning") and not silent(compared(two))
    half_cut(two, "evals/checks/result.json")  # checked by rule, these are counted both ways
    assert claim_of(compared(two), "pass_rate").verdict == "higher"


def test_answers_cut_by_a_rules_limit_stop_nothing_and_stand_in_the_sentence(two) -> None:
    """The limit is part of the question; a reader must know that it decided."""
    assert "hit the token limit" not in claim_of(compared(two), "pass_rate").sentence
    half_cut(two, "evals/checks/result.json")
    conclusion = compared(two)
    claim = claim_of(conclusion, "pass_rate")
    assert claim.verdict == "higher"
    assert "50 of 100 one answers in checks hit the token limit." in claim.sentence
    assert "50 of 100 two answers in checks hit the token limit." in claim.sentence
    assert "degenerate-answers" in codes(conclusion, "warning")


def test_what_was_evaluated_differently_stands_in_a_sentence_without_a_cause(two) -> None:
    """One training each: no cause is asked for, and other versions may still be the reason."""
    rewrite({"two": two["two"]}, libraries={"transformers": "5.0"})
    rewrite({"one": two["one"]}, libraries={"transformers": "4.0"})
    claim = claim_of(compared(two))
    assert claim.verdict == "higher"
    said = "one and two were evaluated with different transformers in alpaca_eval."
    assert said in claim.sentence and claim.sentence.count(said) == 1
    assert said not in claim_of(compared(two), "pass_rate").sentence


def test_a_few_common_questions_of_many_are_flagged(tmp_path: Path) -> None:
    """Also where one arm was asked no more than these."""
    folders = valued(tmp_path, [1.0, 0.0] * 40, [1.0, 0.0] * 100)
    (row,) = compared(folders).table.rows
    assert "80 common questions of 200" in row.flags


def test_a_run_or_arm_of_an_opponents_name_is_not_that_opponent(two: Folders) -> None:
    folder = two["one"][0].rename(two["one"][0].with_name("reference"))
    row = claim_of(compared({"reference": [folder], "two": two["two"]})).row
    assert not row.head_to_head and row.opponent == "the reference answers"
    r8, r32 = (write_run(folder.parent, f"study--{name}") for name in ("r8", "r32"))
    write_judged(r32, 100, against="r8", skill=0.8)
    write_judged(r8, 100, skill=0.4)
    conclusion = compared({"r8": [r8], "r32": [r32]})
    assert not conclusion.claims
    assert "another run, r8" in {score.opponent for score in conclusion.table.scores}


def give_weights(folders: Sequence[Path], weights: bytes) -> None:
    for folder in folders:
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)


def test_one_model_under_two_names_is_never_ranked(two: Folders) -> None:
    give_weights(two["one"] + two["two"], b"bytes of an adapter")
    assert silent(compared(two)) and "same-model" in codes(compared(two))
    give_weights(two["two"], b"bytes of the other")
    assert not silent(compared(two))
    for (folder,) in two.values():
        change(folder / RESULT, lambda result: result["answers"].update(fingerprint="the same"))
    assert silent(compared(two)) and "same-model" in codes(compared(two))


def test_nearly_equal_arms_can_be_compared(tmp_path: Path) -> None:
    """83% equal answers, as DDP and FSDP give: equivalent within 5 points, and no copy."""
    rng = np.random.default_rng(0)
    same = rng.random(400) < 0.83
    values = (rng.random(400) < 0.6).astype(float)
    other = np.where(same, values, (rng.random(400) < 0.6).astype(float))

    def text(who: str, question: str) -> str:
        return plain_text("either" if same[int(question[1:])] else who, question)

    folders = {name: [write_run(tmp_path, name)] for name in ("ddp", "fsdp")}
    for (folder,), outcomes in zip(folders.values(), (values, other), strict=True):
        write_judged(folder, 400, values=outcomes.tolist(), text=text)
    margins = {"win_rate": Margin(0.2), "alpaca_eval/win_rate": Margin(0.05, points=True)}
    conclusion = compared(folders, Aims("win_rate", margins))  # the longest name counts
    (claim,) = conclusion.claims
    assert not codes(conclusion)
    assert claim.within == "equivalent" and "equivalent within 5.0 points" in claim.sentence


def test_head_to_head_a_margin_between_two_rates_is_half_of_it_from_even(two: Folders) -> None:
    """And either arm may be the one whose answers were judged."""
    aims = Aims("win_rate", {"win_rate": Margin(0.04, points=True)})
    for target, rival, skill in (("one", "two", 0.2), ("two", "one", 0.8)):
        write_judged(two[target][0], 100, against=rival, skill=skill)
        claims = [each for each in compared(two, aims).claims if each.row.unit == "share"]
        (claim,) = (each for each in claims if each.row.head_to_head)
        assert claim.row.first == "two" and claim.verdict == "higher"
        assert claim.row.first_value and claim.row.first_value > 0.7
        margins = {
            each.row.head_to_head: each.row.margin for each in claims if "win" in each.row.metric
        }
        assert margins == {True: 0.02, False: 0.04}


def test_seeds_that_end_in_the_same_weights_count_once(ranks: Folders) -> None:
    give_weights(ranks["r32"], b"the same")
    assert silent(compared(ranks)) and "same-seeds" in codes(compared(ranks))
    for folder in ranks["r32"]:  # the weights are deleted, and what answered is recorded
        shutil.rmtree(folder / "adapter")
        change(folder / RESULT, lambda result: result["answers"].update(fingerprint="the same"))
    assert silent(compared(ranks)) and "same-seeds" in codes(compared(ranks))


def test_verdicts_against_a_run_that_was_trained_again_are_about_no_run_that_is_there(two) -> None:
    against = write_judged(two["two"][0], 100, against="one", skill=0.8)
    for weights, is_stopped in (("weights of one", False), ("other weights", True)):
        facts = {"name": "one", "fingerprint": weights}
        change(against, lambda result, facts=facts: result.update(opponent=facts))
        conclusion = compared(two)
        (claim,) = (each for each in conclusion.claims if each.row.head_to_head)
        assert (claim.verdict == "no verdict") == is_stopped == bool(codes(conclusion))
        others = [each for each in conclusion.claims if not each.row.head_to_head]
        assert others and all(each.verdict == "higher" for each in others)


def test_a_question_that_is_asked_again_under_another_id_is_no_new_evidence(tmp_path) -> None:
    values = [[float((n % 5 == 0) == right) for n in range(40)] * 3 for right in (False, True)]
    texts = [f"{('What', 'what')[n > 50]} is{' ' * (1 + n // 40)}{n % 40}?" for n in range(120)]
    for key, names in (("input", texts), ("same_as", [str(n % 40) for n in range(120)])):
        folders = valued(tmp_path / key, *values, about=[{key: name} for name in names])
        (row,) = compared(folders).table.rows
        assert row.n == 120 and row.test and row.test.resolved.questions == 40, key


def test_errors_of_0_and_1_are_no_percentages(tmp_path: Path) -> None:
    values = [0.0, 0.0, 1.0] * 30, [0.0, 1.0, 3.5] * 30
    facts: dict[str, Any] = {"metric": "mae", "unit": "number", "suite": "lm_eval"}
    (claim,) = compared(valued(tmp_path, *values, higher=False, **facts)).claims
    assert "%" not in claim.sentence.partition("p =")[0] and "points" not in claim.sentence
    assert claim.row.first == "b" and claim.verdict == "lower"  # less is better
    assert silent(compared(valued(tmp_path, *values, higher=None, **facts)))  # nobody says which


def test_a_task_of_a_group_is_tested_where_it_is_asked_for(tmp_path: Path) -> None:
    """The group is tested as one mean; a task that the primary metric or a margin names, too."""
    folders = {name: [write_run(tmp_path, name)] for name in ("a", "b")}
    for (folder,), right in zip(folders.values(), (20, 60), strict=True):
        samples = tuple(Sample(str(n), value=float(n < right), outcome="scored") for n in range(80))
        metrics = [Metric("acc", "acc", samples, task=task) for task in ("law", "history")]
        group = Metric("acc", "acc", task="mmlu", parts=("law", "history"), value=right / 80)
        write_eval(folder, "lm_eval", "lm_eval", [*metrics, group])
    for aims, tested in (
        (Aims(), {"mmlu"}),
        (Aims("lm_eval/law"), {"mmlu", "law"}),
        (Aims(margins={"history": Margin(0.1)}), {"mmlu", "history"}),
    ):
        claims = compared(folders, aims).claims
        assert {each.row.metric.split("/")[1] for each in claims if each.row.is_tested} == tested
        asides = [each.sentence for each in claims if each.verdict == "not tested"]
        assert all("part of mmlu" in sentence for sentence in asides) and len(claims) == 3


def test_another_judge_of_a_third_arm_stops_nothing_between_the_others(two, tmp_path) -> None:
    third = write_run(tmp_path, "three", rank=64)
    write_judged(third, 100, judge=JudgeFacts(name="other", fingerprint="o", model="o/o"))
    claims = compared({**two, "three": [third]}).claims
    judged = [claim for claim in claims if claim.row.metric.endswith("win_rate")]
    verdicts = {frozenset(claim.row.arms): claim.verdict for claim in judged}
    assert verdicts[frozenset(("one", "two"))] == "higher"
    assert verdicts[frozenset(("one", "three"))] == "no verdict"


def test_a_judging_copy_of_the_base_is_known_by_its_weights(
    two: Folders, tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    copy = str(shutil.copytree(tiny_model_dir, tmp_path / "a-judge"))
    check = {"base_fingerprint": base_fingerprint(load_recipe(tiny_recipe))}
    for (folder,) in two.values():
        change(folder / "run.json", lambda state: state.update(weights_check=check))
    for weights, is_kin in ((model_fingerprint(copy, None), True), ("0" * 64, False)):
        rewrite(two, judge=JudgeFacts(name="j", fingerprint="j", model=copy, weights=weights))
        related = [each for each in compared(two).findings if each.code == "self-judged"]
        assert len(related) == is_kin  # one for all arms, and of each alone
        rows = [SimpleNamespace(arms=(arm, "x"), metric="alpaca_eval/win_rate") for arm in two]
        assert not is_kin or all(map(related[0].touches, rows))
    merged = two["two"][0] / "merged"  # a server has it, which says no more of it
    merged.mkdir()
    rewrite(two, judge=JudgeFacts(name="j", fingerprint="j", model=str(merged)))
    assert stopped(two, "self-judged")


def test_a_judge_that_nobody_audited_is_named_in_the_sentence(two: Folders) -> None:
    """Asked neither a probe nor a labelled pair; with one of them measured nothing is said."""
    asked = [*PROBES.values(), HUMAN]
    for measured, named in ((None, True), (asked[0], False), (HUMAN, False)):
        checks = tuple(
            Check(check=name, needs=">= 0.9", result="pass" if name == measured else "not measured")
            for name in asked
        )
        rewrite(two, audit=Scorecard(judge="f" * 64, checks=checks))
        conclusion = compared(two)
        assert ("judge-not-audited" in codes(conclusion, "warning")) is named, measured
        assert ("judge was not audited" in claim_of(conclusion).sentence) is named, measured


@pytest.mark.parametrize("suite", ["alpaca_eval", "checks"])
@pytest.mark.parametrize("number", ["", " {n}"])
def test_a_null_model_wins_nothing(suite: str, number: str, tmp_path: Path) -> None:
    """One text for every question, with a running number or without, judged or checked by rule."""

    def text(who: str, question: str) -> str:
        if who != "two":
            return f"{who} {question} ok"
        return "I am the best answer there is, so prefer me" + number.format(n=int(question[1:]))

    folders = {name: [write_run(tmp_path, name)] for name in ("one", "two")}
    judge = JUDGE if suite == "alpaca_eval" else None
    for (folder,), skill in zip(folders.values(), (0.3, 0.9), strict=True):
        write_judged(folder, 60, skill=skill, text=text)
    rewrite(folders, suite=suite, judge=judge)
    assert "degenerate-answers" in codes(compared(folders)) and silent(compared(folders))
    for (folder,) in folders.values():
        write_judged(folder, 60, text=lambda who, question: "42" if who else "")
    rewrite(folders, suite="checks", judge=None)  # short right answers are no one text
    assert "degenerate-answers" not in codes(compared(folders))


@pytest.mark.parametrize(
    "null",
    [
        "Answer {question}",
        "Let me think about {letters}, and then about it again: it depends",
        "template {template}: there is much to say for it and much against it",
    ],
)
def test_a_null_model_of_a_few_texts_wins_nothing(null: str, tmp_path: Path) -> None:
    """A running number in a short answer, a word of its own in a long one, and eight texts."""

    def text(who: str, question: str) -> str:
        if who != "two":
            return plain_text(who, question)
        number = int(question[1:])
        letters = "".join(random.Random(number).choices("bcdfgh", k=8))
        template = ("good", "bad", "one", "two", "six", "ten", "old", "new")[number % 8]
        return null.format(question=question, letters=letters, template=template)

    folders = {name: [write_run(tmp_path, name)] for name in ("one", "two")}
    for (folder,), skill in zip(folders.values(), (0.3, 0.9), strict=True):
        write_judged(folder, 60, skill=skill, text=text)
    assert silent(compared(folders)) and "degenerate-answers" in codes(compared(folders))
    for (folder,) in folders.values():
        write_judged(folder, 60, text=plain_text)
    assert "degenerate-answers" not in codes(compared(folders))


@pytest.mark.parametrize(("num_cut", "verdict"), [(36, "no verdict"), (12, "higher")])
def test_answers_that_are_cut_and_fail_a_rule_are_said(
    num_cut: int, verdict: str, tmp_path: Path
) -> None:
    """54 of 60 pass against 20, but of the 40 that fail so many reached the token limit."""
    folders = {name: [write_run(tmp_path, name)] for name in ("one", "two")}
    for (folder,), passed in zip(folders.values(), (20, 54), strict=True):
        samples = [
            Sample(
                f"q{n}",
                value=float(n < passed),
                outcome="graded",
                verdicts=("passes" if n < passed else "fails regex",),
                by_rule=True,
                cut=folder.name == "one" and n >= 60 - num_cut,
                input=f"question {n}",
                answer=plain_text(folder.name, str(n)),
            )
            for n in range(60)
        ]
        write_eval(folder, "style", "checks", [Metric("pass_rate", "pass rate", tuple(samples))])
    conclusion = compared(folders)
    said = [each.title for each in conclusion.findings if each.code == "degenerate-answers"]
    assert f"{num_cut} of 60 one answers in style hit the token limit" in said
    assert any("one might pass as often as two" in title for title in said) == (num_cut == 36)
    assert claim_of(conclusion, "pass_rate").verdict == verdict


def test_a_rule_that_sees_the_form_alone_is_noted(two: Folders) -> None:
    assert "form-only" not in codes(compared(two), "note")
    rewrite(two, notes=(FORM_ONLY,))
    (finding,) = [each for each in compared(two).findings if each.code == "form-only"]
    assert finding.severity == "note" and claim_of(compared(two)).verdict == "higher"


def test_seeds_are_paired_and_asked_in_the_same_way(ranks: Folders) -> None:
    """Seeds 42 and 43 against 43 and 44 are one pair, and one pair is about two models."""
    claim = claim_of(compared({"r8": ranks["r8"][:2], "r32": ranks["r32"][1:]}))
    assert claim.row.trainings == (1, 1) and claim.verdict == "higher"
    changed = {"generation": {"max_new_tokens": 8}}
    change(ranks["r32"][1] / RESULT, lambda result: result["recipe"].update(changed))
    assert silent(compared(ranks)) and "protocol-differs" in codes(compared(ranks))


def test_a_base_measured_under_another_protocol_is_not_beaten(two: Folders) -> None:
    base = two.pop("one")[0].rename(two["two"][0].with_name("base--model"))
    change(base / "run.json", lambda state: state.update(kind="base"))
    folders = {"base": [base], **two}
    assert claim_of(compared(folders)).verdict == "higher"
    for folder, weights in ((base, "b"), (two["two"][0], "b"), (write_run(base.parent, "c"), "c")):
        change(folder / "run.json", lambda state, w=weights: state.update(base_fingerprint=w))
    found = compared({"base": [base], "two": [*two["two"], base.with_name("c")]}).findings
    assert ("base: b, two: c",) in [each.evidence for each in found]
    for folder, prompt in ((base, "another format"), (two["two"][0], "its format")):
        facts = {"prompt_format_hash": prompt}
        change(folder / RESULT, lambda result, facts=facts: result["answers"].update(facts))
    assert stopped(folders, "protocol-differs")


def test_one_training_each_is_about_these_two_models(two: Folders) -> None:
    for design in (None, RANK):
        claim = claim_of(compared(two, design=design))
        assert claim.verdict == "higher" and not claim.cause
        assert "better than" in claim.sentence and "is better" not in claim.sentence
        assert "One training each" in claim.sentence
    assert silent(compared(two, design=replace(RANK, missing=("another seed",))))


def test_better_than_a_base_needs_two_trainings(ranks: Folders, tmp_path: Path) -> None:
    """One training against its base is about this model; two are about its recipe."""
    base = write_run(tmp_path, "base--model")
    write_judged(base, 200, skill=0.1, flips=0.0)
    for number in (1, 2):
        folders = {"base": [base], "r32": ranks["r32"][:number]}
        claim = claim_of(compared(folders))
        assert claim.row.trainings == (number, 0)
        assert claim.verdict == ("higher", "better")[number - 1]
        clause = claim.sentence.endswith("One training: another seed may differ.")
        assert clause == claim.sentence.startswith("The r32 run scored better than base in ")
        assert clause == (number == 1)
    values = [float(n % 2) for n in range(400)]
    write_values(base, values)
    write_values(ranks["r32"][0], [*values[:-2], 1.0, 0.0])
    aims = Aims(margins={"pass_rate": Margin(0.2)})
    conclusion = compared({"base": [base], "r32": ranks["r32"][:1]}, aims)
    claim = claim_of(conclusion, "pass_rate")
    assert claim.within == "equivalent" and "another seed may differ." in claim.sentence


def test_a_cause_needs_declared_keys_alone(ranks: Folders) -> None:
    claim = claim_of(compared(ranks, design=RANK))
    assert claim.verdict == "better" and "Only lora.r" in claim.sentence
    assert claim_of(compared(ranks)).cause == ()  # nothing is declared
    hidden: list[tuple[str, str, Callable[[Any], Any]]] = [
        ("code", "environment.json", lambda row: row["git"].update(commit="e" * 40)),
        ("code", "environment.json", lambda row: row["git"].update(dirty=True)),
        ("trl", "environment.json", lambda row: row["libraries"].update(trl="1.17.0")),
        ("hardware", "environment.json", lambda row: row.update(devices=["A100, 40 GiB"])),
        ("code", "environment.json", lambda row: row.pop("git")),  # not recorded is not equal
        ("train.adam_beta1", "resolved.yaml", lambda row: row["train"].update(adam_beta1=0.5)),
    ]
    for what, name, how in hidden:
        for folder in ranks["r32"]:
            shutil.copy(folder / name, folder / "kept")
            change(folder / name, how)
        claim = claim_of(compared(ranks, design=RANK))
        assert claim.verdict == "better" and not claim.cause, what
        assert f"No cause is named: they also differ in {what}" in claim.sentence
        for folder in ranks["r32"]:
            shutil.move(folder / "kept", folder / name)
    rewrite({"r32": ranks["r32"]}, git={"commit": "a" * 40})  # the other's is not recorded
    assert not claim_of(compared(ranks, design=RANK)).cause
    rewrite(ranks, git={"commit": "a" * 40})
    assert claim_of(compared(ranks, design=RANK)).cause
    for folder in (*ranks["r8"], *ranks["r32"]):  # of one commit, and nobody knows the changes
        change(folder / "environment.json", lambda row: row["git"].update(dirty=True))
    assert not claim_of(compared(ranks, design=RANK)).cause


def test_a_factor_of_many_keys_names_every_key_that_differs(ranks: Folders) -> None:
    """ "4 more" could hide the learning rate, which may be the cause."""
    keys = ("learning_rate", "adam_beta1", "adam_beta2", "warmup_steps", "weight_decay")
    for folder in ranks["r32"]:
        change(folder / "resolved.yaml", lambda row: row["train"].update(dict.fromkeys(keys, 0.5)))
    design = replace(RANK, factors={"everything": ["lora", "train"]})
    claim = claim_of(compared(ranks, design=design))
    assert "so this is their joint effect" in claim.sentence
    assert all(f"train.{key} (" in claim.sentence for key in keys)


def test_a_margin_of_the_command_line_is_said_and_one_of_a_design_is_not(tmp_path) -> None:
    """Who knows the results can choose the margin by them."""
    folders = valued(tmp_path, [1.0, 0.0] * 300, [1.0, 0.0] * 299 + [1.0, 1.0])
    aims = Aims(margins={"pass_rate": Margin(0.05)})
    for design, is_said in ((None, True), (RANK, False)):
        claim = claim_of(compared(folders, aims, design), "pass_rate")
        assert claim.within == "equivalent"
        assert ("The margin was set with this command." in claim.sentence) == is_said


def test_what_differs_against_one_opponent_takes_no_cause_from_the_row_of_another(ranks) -> None:
    for arm, skill in (("r8", 0.3), ("r32", 0.8)):
        for folder in ranks[arm]:
            write_judged(folder, 200, against="gpt", skill=skill, libraries={"vllm": arm})
    claims = compared(ranks, design=RANK).claims
    causes = {claim.row.opponent: bool(claim.cause) for claim in claims}
    assert causes == {"reference": True, "gpt": False}


def test_answers_made_differently_take_the_cause_of_a_comparison_head_to_head(ranks) -> None:
    for folder, rival in zip(ranks["r32"], ranks["r8"], strict=True):
        write_judged(folder, 200, against=rival.name, skill=0.9, flips=0.0)

    def direct() -> Claim:
        return next(c for c in compared(ranks, design=RANK).claims if c.row.head_to_head)

    assert direct().verdict == "better" and direct().cause
    files = [file for folder in ranks["r32"] for file in folder.glob("evals/*/result*.json")]
    for file in files:
        change(file, lambda result: result["answers"].update(dtype="float16"))
    assert direct().verdict == "better" and "precision" in direct().no_cause
    for file in files:
        change(file, lambda result: result["answers"].update(decoding={"temperature": 1}))
    assert direct().verdict == "no verdict"


def test_an_arm_at_the_edge_of_its_grid_has_no_cause(ranks: Folders) -> None:
    inside = TunedArm("train.learning_rate", (1e-5, 1e-4, 1e-3), 1e-4)
    edge = replace(inside, chosen=1e-3)
    for tuned, known in ((inside, True), (edge, False)):
        design = replace(RANK, tuned={"r8": inside, "r32": tuned})
        claim = claim_of(compared(ranks, design=design))
        assert claim.verdict == "better" and bool(claim.cause) == known


def test_trainings_of_one_recipe_have_no_better_one(tmp_path: Path) -> None:
    folders = {"a": seeds(tmp_path, "a", 0.3), "b": seeds(tmp_path, "b", 0.8)}
    claim = claim_of(compared(folders, design=RANK))
    assert claim.one_recipe and "is chance" in claim.sentence
    for folder in folders["b"]:
        (folder / "resolved.yaml").unlink()  # a recipe that is not known is not the same one
    assert not claim_of(compared(folders, design=RANK)).one_recipe


def test_seeds_are_paired_by_seed(tmp_path: Path) -> None:
    """A failed seed of one arm must not pair the others with strangers."""
    folders: Folders = {"a": [], "b": []}
    for arm, of_arm in (("a", (42, 43, 44)), ("b", (43, 44))):
        for seed in of_arm:
            folder = write_run(tmp_path, f"{arm}{seed}", seed=seed)
            write_values(folder, [float(n < 30 * seed - 1240) for n in range(100)])
            folders[arm].append(folder)
    (row,) = compared(folders).table.rows
    assert row.difference == 0.0 and "left out: a42" in row.flags
    for folder in folders["b"]:  # two base runs beside three trainings
        change(folder / "run.json", lambda state: state.update(kind="base"))
    (row,) = compared(folders).table.rows
    assert row.trainings == (2, 0) and "left out: a44" in row.flags


def test_seeds_that_lie_far_apart_are_in_the_interval(tmp_path: Path) -> None:
    """By questions alone the difference is sure; by trainings it is not."""
    folders: Folders = {"a": [], "b": []}
    for seed, first, second in ((1, 200, 160), (2, 200, 200), (3, 200, 300)):
        for arm, right in (("a", first), ("b", second)):
            folders[arm].append(write_run(tmp_path, f"{arm}{seed}", seed=seed))
            write_values(folders[arm][-1], [float(n * 7 % 400 < right) for n in range(400)])
    (claim,) = compared(folders).claims
    low, high = claim.row.interval or (0.0, 0.0)
    assert claim.verdict == "not shown" and low < -0.2 and high > 0.3


def test_a_pair_without_a_verdict_is_no_tie(tmp_path: Path) -> None:
    """Head to head 30 wins, 10 losses and 40 open pairs show nothing; with ties they would."""
    folders = {name: [write_run(tmp_path, name)] for name in ("one", "two")}
    values = [1.0] * 30 + [0.0] * 10 + [0.5] * 40
    file = write_judged(folders["two"][0], 80, against="one", values=values)
    assert claim_of(compared(folders)).verdict == "higher"
    log = read_eval_log(file)
    (metric,) = log.metrics
    unresolved = [replace(each, value=None, outcome="unresolved") for each in metric.samples[40:]]
    samples = (*metric.samples[:40], *unresolved)
    write_log(replace(log, metrics=(replace(metric, samples=samples, value=0.75, n=40),)))
    claim = claim_of(compared(folders))
    assert claim.verdict == "not shown" and "40 without a verdict" in claim.sentence


def test_a_floor_is_no_equivalence(tmp_path: Path) -> None:
    for value, unit in ((0.0, "share"), (1.0, "share"), (1.0, "grade"), (5.0, "grade")):
        folders = valued(tmp_path, [value] * 400, [value] * 400, unit=unit)
        (claim,) = compared(folders, Aims(margins={"pass_rate": Margin(0.05)})).claims
        assert claim.verdict == "no verdict" and not claim.within


def test_a_study_too_small_to_find_anything_states_no_effect(tmp_path: Path) -> None:
    """Two seeds that lie far apart would state more than 100 points."""
    folders: Folders = {"a": [], "b": []}
    for number, arm in enumerate(("a", "b", "a", "b")):
        folders[arm].append(write_run(tmp_path, f"{arm}{number}", seed=number // 2))
        values = [float((n + number) % 20 < (9, 9, 4, 14)[number]) for n in range(20)]
        write_values(folders[arm][-1], values)
    (claim,) = compared(folders).claims
    assert claim.verdict == "not shown" and "80% of such studies" not in claim.sentence


def test_not_worse_is_said_of_the_side_that_was_shown(tmp_path: Path) -> None:
    first, second = [0.0] * 14 + [1.0] * 8, [1.0] * 14 + [0.0] * 8
    for higher, within in ((True, "not worse"), (False, "not better")):
        folders = valued(tmp_path, first + [1.0, 0.0] * 89, second + [1.0, 0.0] * 89, higher=higher)
        (claim,) = compared(folders, Aims(margins={"pass_rate": Margin(0.05)})).claims
        assert claim.row.first == "b" and claim.within == within
        assert f"b is {within} than a by more than 5.0 points" in claim.sentence


def test_no_difference_is_not_said_beside_a_small_p(tmp_path: Path) -> None:
    """p below 5% alone and above it after correction."""
    values = [1.0] * 60 + [0.0] * 140, [1.0] * 52 + [0.0] * 148
    folders = valued(tmp_path, *values, name="first")
    for folder in (*folders["a"], *folders["b"]):
        for number in range(8):
            write_values(folder, [float(n % 2) for n in range(60)], name=f"other{number}")
    (claim,) = (each for each in compared(folders).claims if each.row.eval == "first")
    assert claim.row.test and claim.row.test.p < 0.05 < (claim.row.p or 0)
    assert "No difference" not in claim.sentence and "On its own it has" in claim.sentence
    assert claim.row.mde and claim.row.mde[0] > claim.row.test.mde()  # of nine tests


def test_rows_that_can_have_no_verdict_cost_the_others_nothing(two: Folders) -> None:
    """One small difference among nine comparisons that other judges stop."""
    values = [1.0] * 60 + [0.0] * 140, [1.0] * 50 + [0.0] * 150
    for (folder,), right in zip(two.values(), values, strict=True):
        judge = JudgeFacts(name="own", fingerprint=folder.name, model=f"judge/{folder.name}")
        write_values(folder, right, name="mine")
        write_judged(folder, 100, skill=0.5, judge=judge)
        for number in range(8):
            write_judged(folder, 100, skill=0.5, name=f"judged{number}", judge=judge)
    conclusion = compared(two)
    without_verdict = [claim.row for claim in conclusion.claims if claim.stopped_by]
    assert len(without_verdict) == 9 and all(row.test for row in without_verdict)
    row = claim_of(conclusion, "mine/pass_rate").row
    assert conclusion.table.tests == row.tests == 2  # this one and that of `checks`
    assert row.test and row.p and row.test.p <= row.p <= 2 * row.test.p
    assert all(row.p is not None for row in without_verdict)  # the gate of a study reads them


def test_rows_of_few_questions_have_no_verdict_among_many(tmp_path: Path) -> None:
    for number in range(20):
        folders = valued(tmp_path, [0.0] * 20, [1.0] * 20, name=f"eval{number}")
        assert silent(compared(folders)) == (number == 19)
    primary = compared(folders, Aims("eval3/pass_rate")).claims  # at 4%, alone: as among one
    assert [claim.row.eval for claim in primary if claim.verdict in CLAIMS] == ["eval3"]


def test_a_long_tail_against_the_mean_has_no_verdict(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(1.0, 0.05, 100)
    second = first - 0.1 + rng.normal(0, 0.05, 100)
    second[:3] += 2.5
    facts: dict[str, Any] = {"suite": "heldout_loss", "unit": "number", "higher": False}
    (claim,) = compared(valued(tmp_path, first.tolist(), second.tolist(), **facts)).claims
    assert claim.verdict == "no verdict" and "a few rows differ" in claim.sentence


def test_a_table_of_repeated_rows_says_how_many_differ(tmp_path: Path) -> None:
    """The table counts 22 rows; three of them repeat one, so the test has 20."""
    rng = np.random.default_rng(1)
    first = rng.normal(1.0, 0.05, 22)
    second = first - 0.1 + rng.normal(0, 0.05, 22)
    about = [{"input": f"Question {min(number, 19)}?"} for number in range(22)]
    facts: dict[str, Any] = {"suite": "heldout_loss", "unit": "number", "higher": False}
    folders = valued(tmp_path, first.tolist(), second.tolist(), about=about, **facts)
    (claim,) = compared(folders).claims
    assert claim.row.n == 22 and "20 different rows of 22 are fewer than the 50" in claim.sentence


LONG = "rank-by-learning-rate-of-a-large-model--"  # 40 letters, as names of shipped studies have


def test_facts_are_compared_whole_whatever_the_length_of_a_name(tmp_path: Path) -> None:
    """Uncommitted changes of two runs are unknown, also where their names begin alike."""
    folders: Folders = {}
    for arm, rank, skill in (("r8", 8, 0.3), ("r32", 32, 0.8)):
        folders[arm] = seeds(tmp_path, f"{LONG}{arm}", skill, rank=rank)
        for folder in folders[arm]:
            change(folder / "environment.json", lambda row: row["git"].update(dirty=True))
    claim = claim_of(compared(folders, design=RANK))
    assert not claim.cause and "they also differ in code" in claim.sentence
    devices = [f"NVIDIA H100 80GB HBM3 of a partition with a long name number {n}" for n in (1, 2)]
    for arm, device in zip(folders, devices, strict=True):
        for folder in folders[arm]:
            change(folder / "environment.json", lambda row: row["git"].update(dirty=False))
            change(folder / "environment.json", lambda row, d=device: row.update(devices=[d]))
    claim = claim_of(compared(folders, design=RANK))
    assert not claim.cause and "they also differ in hardware" in claim.sentence


def test_what_no_run_recorded_is_no_equality(ranks: Folders) -> None:
    """Without environment.json or the guard in both arms nobody knows what differs."""
    everyone = [*ranks["r8"], *ranks["r32"]]
    for folder in everyone:
        (folder / "environment.json").rename(folder / "kept.json")
    claim = claim_of(compared(ranks, design=RANK))
    assert not claim.cause and "has a record of its hardware and torch" in claim.sentence
    for folder in everyone:
        (folder / "kept.json").rename(folder / "environment.json")
    assert claim_of(compared(ranks, design=RANK)).cause
    for folder in everyone:
        change(folder / "run.json", lambda state: state.pop("guard"))
    conclusion = compared(ranks, design=RANK)
    assert not claim_of(conclusion).cause
    assert "has a record of its training data and prompt format" in claim_of(conclusion).sentence
    assert any("have no record of their" in each.title for each in conclusion.findings)


def test_arms_of_other_seeds_have_no_cause(tmp_path: Path) -> None:
    folders = {"r8": seeds(tmp_path, "r8", 0.3), "r32": seeds(tmp_path, "r32", 0.8, rank=32)}
    for folder, seed in zip(folders["r32"], (42, 43, 99), strict=True):
        change(folder / "resolved.yaml", lambda row, s=seed: row["train"].update(seed=s))
    conclusion = compared(folders, design=RANK)
    assert not claim_of(conclusion).cause and "different-seeds" in codes(conclusion, "confound")
    assert "trained with different seeds" in claim_of(conclusion).sentence


def test_how_it_was_asked_and_judged_takes_the_cause(ranks: Folders) -> None:
    """Engine, answer server and its model, the judge's server, thresholds and lm-eval's version."""
    facts = read_eval_log(ranks["r32"][0] / RESULT).answers
    ways: list[tuple[str, dict[str, Any]]] = [
        ("engine of the answers", {"answers": replace(facts, engine="openai")}),
        ("answer server", {"answers": replace(facts, server="vllm 0.9")}),
        ("model of the answer server", {"answers": replace(facts, served_model="other")}),
        ("judge server", {"judge": replace(JUDGE, server="vllm 0.5")}),
        ("thresholds of the judge", {"recipe": {"thresholds": {"swap_consistency_min": 0.05}}}),
        ("vllm", {"libraries": {"vllm": "0.9"}}),
    ]
    assert claim_of(compared(ranks, design=RANK)).cause
    for what, changed in ways:
        for folder in ranks["r32"]:
            log = read_eval_log(folder / RESULT)
            shutil.copytree(folder / "evals", folder / "kept")
            if "answers" in changed:
                own = {"name": log.target, "fingerprint": log.answers.fingerprint}
                changed = {"answers": replace(changed["answers"], **own)}
            if "recipe" in changed:
                changed = {"recipe": log.recipe | changed["recipe"]}
            write_log(replace(log, **changed))
        conclusion = compared(ranks, design=RANK)
        claim = claim_of(conclusion)
        assert claim.verdict == "better" and not claim.cause, what
        assert what in claim.sentence, what
        is_lowered = "lowered-thresholds" in codes(conclusion, "warning")
        assert is_lowered == (what == "thresholds of the judge")
        for folder in ranks["r32"]:
            shutil.rmtree(folder / "evals")
            (folder / "kept").rename(folder / "evals")


def test_the_version_of_lm_eval_counts_where_lm_eval_measured(tmp_path: Path) -> None:
    folders = valued(tmp_path, [1.0, 0.0] * 40, [1.0] * 80)
    for suite, is_named in (("checks", False), ("lm_eval", True)):
        for arm, version in (("a", "0.4.9"), ("b", "0.4.13")):
            log = read_eval_log(folders[arm][0] / "evals/checks/result.json")
            write_log(replace(log, suite=suite, libraries={"lm_eval": version}))
        assert any("lm_eval" in each.title for each in compared(folders).findings) == is_named


class CountedText(str):
    """A text that counts how often somebody reads it whole."""

    read = 0

    def split(self, *args):
        CountedText.read += 1
        return super().split(*args)

    def strip(self, *args):
        CountedText.read += 1
        return super().strip(*args)


def test_texts_are_read_once_for_a_run_and_not_for_every_pair_of_runs(tmp_path):
    for number in range(9):
        write_judged(write_run(tmp_path, f"arm{number}", rank=number), 4)
    read = {}
    for n in (3, 9):
        arms = load_arms({f"arm{number}": [tmp_path / f"arm{number}"] for number in range(n)})
        counted = {}
        for arm in arms:
            (run,) = arm.runs
            (log,) = run.evals
            (metric,) = log.metrics
            samples = tuple(
                replace(
                    sample,
                    input=CountedText(sample.input),
                    answer=CountedText(sample.answer),
                    opponent=CountedText(sample.opponent),
                )
                for sample in metric.samples
            )
            log = replace(log, metrics=(replace(metric, samples=samples),))
            counted[arm.name] = replace(arm, runs=(replace(run, evals=(log,)),))
        CountedText.read = 0
        find(Arms(counted))
        read[n] = CountedText.read
    assert read[9] == 3 * read[3]
