"""What stands in a run's files is what is compared: current rows only, torn lines left out, foreign
items read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recipes_lib.compare.measurements import read_measurements, read_run
from recipes_lib.core.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import synthetic_runs


@pytest.fixture
def run(tmp_path):
    folder = synthetic_runs.write_run(tmp_path, "r8", seed=43)
    synthetic_runs.write_alpaca_eval(folder, 30, unparsed=0.1)
    synthetic_runs.write_mt_bench(folder, 10, missing=(2,))
    synthetic_runs.write_lm_eval(folder, 20)
    return folder


def test_every_measure_has_its_items(run):
    measured = read_run(run)
    names = {measure.name: measure for measure in measured.measures()}
    assert set(names) == {"alpaca_eval/win_rate", "mt_bench/grade", "lm_eval/arc_easy/acc"}
    assert [len(measure.samples) for measure in names.values()] == [30, 20, 20]
    unresolved = [item for item in names["alpaca_eval/win_rate"].samples if item.value is None]
    assert unresolved and all("unparsed" in item.verdicts for item in unresolved)


def test_a_result_of_other_judgments_is_refused(run):
    file = run / "evals" / "mt_bench" / "items.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(DataError, match="its mean is over 19 grades, the stored ones are 17"):
        read_run(run)


def test_an_evaluation_without_result_is_unfinished(run):
    (run / "evals" / "mt_bench" / "result.json").unlink()
    measured = read_run(run)
    assert measured.unfinished == ("mt_bench",)
    assert {measure.suite for measure in measured.measures()} == {"alpaca_eval", "lm_eval"}


def test_a_damaged_line_costs_a_curve_that_line_alone(run, capsys):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 41, "lo')
    assert read_run(run).curves[-1]["step"] == 40
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\nnonsense\n{"step": 2}\n')
    assert [line["step"] for line in read_run(run).curves] == [1, 2] and read_run(run).curves[0][
        "loss"
    ] is None
    assert (
        f"{run / 'metrics.jsonl'}:2: this line is damaged and left out" in capsys.readouterr().err
    )


def test_a_damaged_item_is_named_by_its_line(run):
    file = run / "evals" / "mt_bench" / "items.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff" + lines[2]
    file.write_bytes(b"".join(lines))
    with pytest.raises(DataError) as caught:
        read_run(run)
    assert (caught.value.file, caught.value.line) == (file, 3)


def test_an_opponent_is_called_by_its_arm(run, tmp_path):
    other = synthetic_runs.write_run(tmp_path, "r32")
    synthetic_runs.write_alpaca_eval(other, 30, against="r8")
    measurements = read_measurements(
        {"small": [run], "large": [other], "gone": [tmp_path / "nowhere"]}
    )
    assert (
        measurements.opponent_name("r8") == "small"
        and measurements.opponent_name("reference") == "reference"
    )
    assert measurements.arms["gone"].runs == ()
