"""A result is read only as far as the samples beside it add up to its numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.core.errors import DataError
from recipes_lib.eval_files import log_file, read_evals, write_log
from recipes_lib.eval_log import EvalLog, JudgeFacts, Measure, Sample

VALUES = {"win": 1.0, "loss": 0.0, "tie": 0.5, "unresolved": None}
COMPARED = tuple(Sample(str(n), value=VALUES[one], outcome=one) for n, one in enumerate(VALUES))
GRADED = tuple(Sample(str(n), value=float(n), outcome="graded") for n in range(1, 5))
COUNTS = {"win": 1, "loss": 1, "tie": 1, "unresolved": 1}
# suite, metric, samples, the reported number and n, and the suite's own numbers
KINDS: dict[str, tuple[str, str, tuple[Sample, ...], float, int, dict[str, Any]]] = {
    "counts differ": ("alpaca_eval", "win_rate", COMPARED, 0.5, 4, {"pairs": COUNTS}),
    "mean is over 4 grades": ("mt_bench", "grade", GRADED, 2.5, 4, {}),
    "acc: its n is 4": ("lm_eval", "acc", GRADED, 2.5, 4, {}),
    "passes: its n is 4": ("checks", "pass_rate", GRADED, 2.5, 4, {"pass_rate": {"n": 4}}),
    "loss: its n is 4": ("heldout_loss", "loss", GRADED, 2.5, 4, {"rows": {"n": 4}}),
}


def written(run: Path, kind: str) -> Path:
    """Write a result of one kind; return the file of its samples."""
    suite, metric, samples, reported, n, numbers = KINDS[kind]
    file = log_file(run, suite, None)
    label = kind.partition(":")[0]
    measure = Measure(
        suite, suite, metric, label, samples, file, task=label, reported=reported, reported_n=n
    )
    judge = JudgeFacts(name="j") if suite in ("alpaca_eval", "mt_bench") else None
    log = EvalLog(
        suite=suite, eval=suite, judge=judge, numbers=numbers, measures=(measure,), file=file
    )
    write_log(log)
    return file.with_name("items.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_are_missing_or_stand_twice_are_noticed(kind: str, tmp_path: Path) -> None:
    items = written(tmp_path, kind)
    lines = items.read_text().splitlines(keepends=True)
    (log,), _ = read_evals(tmp_path)
    assert log.measures[0].samples == KINDS[kind][2]
    for changed in (lines[1:], [*lines, lines[0]]):
        items.write_text("".join(changed))
        with pytest.raises(DataError, match=f"{re.escape(kind)}|some stand twice"):
            read_evals(tmp_path)


def test_a_grade_that_was_changed_is_noticed(tmp_path: Path) -> None:
    items = written(tmp_path, "mean is over 4 grades")
    items.write_text(items.read_text().replace('"value": 4.0', '"value": 5.0'))
    with pytest.raises(DataError, match="its mean is over 4 grades, the stored ones are 4"):
        read_evals(tmp_path)


def test_a_result_of_an_earlier_version_says_to_evaluate_again(tmp_path: Path) -> None:
    file = written(tmp_path, "counts differ").with_name("result.json")
    result = json.loads(file.read_text())
    del result["measures"]
    file.write_text(json.dumps(result))
    with pytest.raises(DataError, match="is of an earlier version") as told:
        read_evals(tmp_path)
    assert told.value.file == file and "evaluate the run again" in told.value.hints[0]
