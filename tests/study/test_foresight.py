"""`recipes study plan` says what difference the primary question can find."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from recipes_lib.compare.design import load_study
from recipes_lib.core.atomic_files import write_json
from recipes_lib.statistics.unresolved import compare
from recipes_lib.study.arms import study_folder as folder_of
from recipes_lib.study.foresight import Foresight, foresee

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study_power

EVAL = "study--alpaca_eval"


def foreseen(folder: Path, questions: int, *words: str) -> Foresight:
    found = foresee(load_study(folder / "tiny.yaml", words), {EVAL: questions})
    assert found is not None and found.found is not None
    return found


def test_the_plan_names_size_level_difference_assumption_and_what_finds_half(
    study_folder: Path,
) -> None:
    said = "\n".join(foreseen(study_folder, 805, "seeds=[1, 2, 3]").lines())
    assert said == (
        f"primary question: {EVAL}/win_rate (805 questions, 3 seeds per arm; p <= 0.013 for the"
        " first of 3 comparisons)\n"
        "  finds 12.9 points in 80% of studies: assumed: 30% ties, trainings of one recipe that"
        " differ by 1.0 points (SD)\n"
        "  finds 7.7 points between arms that are all found to differ from the base\n"
        "  half of the first, 6.5 points, would need 5 seeds per arm"
    )


def test_half_of_it_is_found_with_what_the_plan_says(study_folder: Path) -> None:
    one = foreseen(study_folder, 805)
    assert one.half_seeds is None and one.half_questions
    more = foreseen(study_folder, one.half_questions)
    assert more.found == pytest.approx(one.found / 2, rel=0.01)
    three = foreseen(study_folder, 805, "seeds=[1, 2, 3]")
    seeds = foreseen(study_folder, 805, f"seeds={list(range(three.half_seeds))}")
    fewer = foreseen(study_folder, 805, f"seeds={list(range(three.half_seeds - 1))}")
    assert seeds.found <= three.found / 2 < fewer.found


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_difference_of_a_plan_is_found_in_four_of_five_studies(
    study_folder: Path, seeds: int
) -> None:
    one = foreseen(study_folder, 805, f"seeds={list(range(seeds))}")
    rng = np.random.default_rng(seeds)
    hits = 0
    for _ in range(400):
        own = rng.random(805)
        apart = 0.01 * 2**0.5 if seeds > 1 else 0.0  # one training each: nothing to average over
        values = [
            study_power.outcomes(rng, own, 0.5 + one.found + rng.normal(0, apart))
            for _ in range(seeds)
        ]
        tested = compare(np.stack(values), np.full((1, 805), 0.5))
        hits += tested.p is not None and tested.p <= one.level
    assert 0.73 <= hits / 400 <= 0.88


def test_an_earlier_result_tells_the_spread(study_folder: Path) -> None:
    file = study_folder / "tiny.yaml"
    study = load_study(file)
    spread = {"questions": 0.0004, "freedom": None, "seeds": 0.0, "seed_freedom": None}
    tested = {"spread": spread, "questions": 40, "seeds": 1}
    row = {"primary": True, "metric": study.aims.primary, "tested": tested}
    write_json(folder_of(study) / "comparison.json", {"rows": [row]})
    found = foresee(study, {})
    assert found is not None and found.questions == 40
    assert found.spread == "spread as this study measured it"
    more = foresee(load_study(file, ["seeds=[1, 2]"]), {})
    assert more is not None and "assumed: " in more.spread


def test_the_gain_of_several_answers_per_question_is_the_one_of_simulated_studies(
    study_folder: Path,
) -> None:
    file = study_folder / "alpaca_eval.yaml"
    file.write_text(file.read_text().replace("{max_new", "{temperature: 1, samples: 4, max_new"))
    one = foreseen(study_folder, 805)
    (line,) = (line for line in one.lines() if "answers per question" in line)
    assert line.startswith("  that is with 4 answers per question, which cost 4 times the answers")
    assert line.endswith("assumed: half of a question's variance is new in each answer")
    assert one.one_answer is not None and 0.75 < one.found / one.one_answer < 0.95
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        own = np.tile(rng.random(805), 4)
        again = rng.random(len(own)) > 0.5**0.5  # two answers share half of their variance
        drawn = np.where(again, rng.random(len(own)), own) - (0.35 + one.found)
        values = np.where(drawn < 0, 1.0, np.where(drawn < 0.3, 0.5, 0.0))[None]
        tested = compare(values, np.full_like(values, 0.5), np.tile(np.arange(805), 4))
        hits += tested.p is not None and tested.p <= one.level
    assert 0.73 <= hits / 300 <= 0.88


def test_earlier_results_tell_how_much_of_a_question_is_new_in_each_answer(
    study_folder: Path,
) -> None:
    file = study_folder / "alpaca_eval.yaml"
    file.write_text(file.read_text().replace("{max_new", "{temperature: 1, samples: 4, max_new"))
    study = load_study(study_folder / "tiny.yaml")
    spread = {"questions": 0.0004, "freedom": None, "draws": 2, "drawn": 0.0001}
    tested = {"spread": spread, "questions": 40, "seeds": 1}
    row = {"primary": True, "metric": study.aims.primary, "tested": tested}
    write_json(folder_of(study) / "comparison.json", {"rows": [row]})
    found = foresee(study, {})
    assert found is not None and found.found and found.one_answer
    # 0.0003 of the question's own, 0.0002 new in one answer
    assert found.found / found.one_answer == pytest.approx((0.00035 / 0.0005) ** 0.5)
    assert found.drawn == "40% of a question's variance was new in each answer here"


def test_what_is_not_known_is_said(study_folder: Path) -> None:
    study = load_study(study_folder / "tiny.yaml")
    evals = [
        dataclasses.replace(one, data=dataclasses.replace(one.data, questions="x/y:z.json"))
        for one in study.evals
    ]
    unknown = foresee(dataclasses.replace(study, evals=tuple(evals)), {})
    assert unknown is not None and unknown.found is None
    assert "is not known: how many questions there are" in unknown.lines()[1]
