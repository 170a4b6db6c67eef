"""The sample browser holds what there is to read, and thins it only where it is too much."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
from recipes_lib.eval_log import EvalLog, JudgeFacts, Measure, Sample
from recipes_lib.report import samples as browser

GRADED = tuple(
    Sample(
        str(n), value=4.0, outcome="graded", verdicts=("4",), answer="text", raws=("[RESULT] 4",)
    )
    for n in range(10)
)
LOSSES = tuple(Sample(str(n), value=2.0, outcome="graded") for n in range(1000))


def shown(**evals: tuple[Sample, ...]) -> browser.SampleSet:
    """The samples of one arm with these evaluations."""
    logs = []
    for name, samples in evals.items():
        file = Path("runs") / "r" / "evals" / name / "result.json"
        measure = Measure(name, name, "value", "value", samples, file)
        judge = JudgeFacts() if name in ("alpaca_eval", "mt_bench") else None
        log = EvalLog(eval=name, suite=name, file=file, judge=judge, measures=(measure,))
        logs.append(log)
    run = RunMeasurements("r", Path("runs/r"), {}, {}, {}, {}, (), tuple(logs))
    return browser.collect_samples(Measurements({"r": ArmMeasurements("r", (run,))}))


def test_rows_without_a_text_take_no_room_from_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "MAX_SAMPLES", 10)
    found = shown(mt_bench=GRADED, heldout_loss=LOSSES)
    assert len(found.samples) == found.total == 10
    assert len(shown(mt_bench=GRADED, alpaca_eval=GRADED).samples) == 10


def test_a_verdict_whose_answer_is_gone_is_shown() -> None:
    found = shown(mt_bench=(Sample("1", outcome="graded", value=4.0, raws=("[RESULT] 4",)),))
    assert len(found.samples) == 1


def test_grades_by_rule_are_not_called_checks() -> None:
    empty = Sample("0", value=1.0, outcome="graded", answer="", by_rule=True, raws=("by rule",))
    for suite, how in (("mt_bench", "graded"), ("checks", "checked by rules")):
        (group,) = shown(**{suite: (empty, *GRADED)}).groups
        assert group["title"] == f"{suite}: r, {how}"
