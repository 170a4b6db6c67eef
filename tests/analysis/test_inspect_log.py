"""Logs that Inspect AI wrote (inspect_logs/make_logs.py) are read to its own last digit.

small, large, failed, errors and limited are of 0.3.120, epochs.eval (Zstandard) and large.json of
0.3.285.
"""

import importlib.util
import json
import math
import statistics
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tests.analysis.made_up import compared, read_one

from recipes_lib.analysis.readers import inspect_log, read_results
from recipes_lib.core.errors import DataError
from recipes_lib.evals.log import Metric

LOGS = Path(__file__).parent / "inspect_logs"
PLAIN = ("small.eval", "large.eval", "errors.eval", "limited.eval", "large.json")
READS_ZSTANDARD = sys.version_info >= (3, 14) or importlib.util.find_spec("zipfile_zstd")
needs_zstandard = pytest.mark.skipif(not READS_ZSTANDARD, reason="the extra inspect")


def changed(file: Path, how: Any, name: str = "large.json") -> Path:
    """Write a .json log with a change of its content."""
    content = json.loads((LOGS / name).read_text())
    how(content)
    file.write_text(json.dumps(content))
    return file


def question_means(metric: Metric) -> list[float]:
    values = defaultdict(list)
    for sample in metric.samples:
        if sample.value is not None:
            values[sample.id].append(sample.value)
    return [statistics.fmean(numbers) for numbers in values.values()]


@pytest.mark.parametrize("name", [*PLAIN, pytest.param("epochs.eval", marks=needs_zstandard)])
def test_means_and_standard_errors_are_those_of_inspect(name: str) -> None:
    content = inspect_log.content_of(LOGS / name)
    metrics = {metric.metric: metric for metric in read_one(LOGS / name).metrics}
    seen = set()
    for result in content["results"]["scores"]:
        if result.get("reducer") not in (None, "mean"):
            continue
        part = result["name"]
        metric = metrics[part if part in metrics else f"{result['scorer']}/{part}"]
        seen.add(metric.metric)
        means = question_means(metric)
        values = {key: each["value"] for key, each in result["metrics"].items()}
        mean = values.get("accuracy", values.get("mean"))
        assert metric.value == pytest.approx(mean, rel=1e-12) and metric.samples
        if len(means) > 1 and "stderr" in values:
            error = statistics.stdev(means) / len(means) ** 0.5
            assert error == pytest.approx(values["stderr"], rel=1e-12)
    assert seen == metrics.keys() == {"match", "partly", "both/right", "both/length"}


def test_two_logs_are_compared_question_by_question() -> None:
    conclusion = compared(LOGS / "small.eval", LOGS / "large.eval")
    match, partly, right, length = conclusion.claims
    assert match.row.arms == ("sums-large", "sums-small") and match.row.n == 6
    assert match.sentence.startswith("No difference shown between sums-large and sums-small in ")
    samples = next(read_one(LOGS / "small.eval").metrics).samples
    assert {sample.value for sample in samples} == {0, 1}
    assert partly.verdict == "not shown"
    for claim in (right, length):  # of a mean Inspect records no direction
        assert "whether higher or lower is better" in claim.row.why_not
    codes = {finding.code for finding in conclusion.findings}
    assert codes == {"not-recorded", "repeated-questions"}


@needs_zstandard
def test_epochs_are_answers_to_one_question() -> None:
    run = read_one(LOGS / "epochs.eval")
    samples = next(run.metrics).samples
    assert len(samples) == 6 and len({sample.id for sample in samples}) == 3
    assert {sample.turn for sample in samples} == {1, 2}
    assert any("the epochs' max" in line for line in run.unread)


def test_what_was_not_answered_is_open_and_named() -> None:
    failed = read_one(LOGS / "failed.eval")
    assert [sample.value for sample in next(failed.metrics).samples] == [1.0, None]
    (line,) = failed.unread
    assert line == "failed.eval: 1 sample ended with an error"
    errors = read_one(LOGS / "errors.eval")
    assert errors.evals[0].subset == "2 of 4 samples" and "error" in errors.unread[0]
    limited = compared(LOGS / "limited.eval")
    assert "chosen-questions" in {finding.code for finding in limited.findings}
    assert "were ended by a limit" in read_one(LOGS / "limited.eval").unread[0]


def test_a_log_that_was_not_finished_has_its_missing_samples(tmp_path: Path) -> None:
    file = tmp_path / "cut.eval"
    with zipfile.ZipFile(LOGS / "small.eval") as whole, zipfile.ZipFile(file, "w") as cut:
        for name in whole.namelist():
            if name == "_journal/start.json" or name.startswith("samples/q1"):
                cut.writestr(name, whole.read(name))
    run = read_one(file)
    metric = next(run.metrics)
    assert len(metric.samples) == 6 and metric.n == 1
    assert run.unread == ("cut.eval: 5 samples are missing, its status is None",)


def test_how_inspect_asked_is_compared(tmp_path: Path) -> None:
    first = LOGS / "large.json"
    other = changed(tmp_path / "x.json", lambda log: log["eval"].update(model="sums/other"))
    conclusion = compared(first, other)
    codes = {finding.code for finding in conclusion.findings}
    assert not codes & {"protocol-differs", "evaluated-differently"}
    asked = {
        "task version": lambda spec: spec.update(task_version=3),
        "task arguments": lambda spec: spec.update(task_args={"n": 9}),
        "gen_kwargs": lambda spec: spec.update(model_generate_config={"temperature": 1.0}),
        "limits": lambda spec: spec["config"].update(message_limit=3),
        "scorers": lambda spec: spec["scorers"][0].update(options={"location": "end"}),
        "dataset": lambda spec: spec["dataset"].update(name="products"),
    }
    computed = {
        "inspect_ai": lambda spec: spec.update(packages={"inspect_ai": "0.2"}),
        "backend": lambda spec: spec.update(model="vllm/large"),
        "model arguments": lambda spec: spec.update(model_args={"device": "cpu"}),
        "code": lambda spec: spec.update(revision={"commit": "abc"}),
    }
    base = changed(tmp_path / "b.json", lambda log: log["eval"].update(revision={"commit": "def"}))
    for name, change in (asked | computed).items():
        file = changed(tmp_path / "x.json", lambda content: change(content["eval"]))  # noqa: B023
        code = "protocol-differs" if name in asked else "evaluated-differently"
        (finding,) = [each for each in compared(base, file).findings if each.code == code]
        assert name in finding.title and (finding.severity == "error") == (name in asked)


def test_a_model_that_grades_itself_is_another_grader_in_each_arm(tmp_path: Path) -> None:
    files = []
    for name in "ab":
        spec = {"model": f"sums/{name}", "scorers": [{"name": "model_graded_qa"}]}
        file = tmp_path / f"{name}.json"
        files.append(changed(file, lambda log: log["eval"].update(spec)))  # noqa: B023
    assert any("grader" in finding.title for finding in compared(*files).findings)


def test_a_score_that_inspect_counts_in_another_way_is_shown_and_not_tested(tmp_path: Path) -> None:
    def other_value(content: Any) -> None:
        content["results"]["scores"][0]["metrics"]["accuracy"]["value"] = 0.9

    metric = next(read_one(changed(tmp_path / "x.json", other_value)).metrics)
    assert metric.value == 0.9 and not metric.samples


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e308])
def test_a_score_that_no_mean_can_have_is_open(tmp_path: Path, value: float) -> None:
    def other_score(content: Any) -> None:
        content["results"] = None
        for score in content["samples"][0]["scores"].values():
            score["value"] = value

    metric = next(read_one(changed(tmp_path / "x.json", other_score)).metrics)
    assert [sample.value for sample in metric.samples].count(None) == 1


def test_a_log_without_samples_or_with_damage_is_refused_in_a_line(tmp_path: Path) -> None:
    file = changed(tmp_path / "x.json", lambda content: content.update(samples=None))
    with pytest.raises(DataError, match="holds no samples"):
        read_results(file)
    file = changed(tmp_path / "x.json", lambda content: content["eval"].pop("task"))
    with pytest.raises(DataError, match=r"x\.json: is damaged: KeyError"):
        read_results(file)
    cut = tmp_path / "cut.eval"
    cut.write_bytes((LOGS / "small.eval").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut\.eval: is damaged: .*zip file"):
        read_results(cut)
    flipped = bytearray((LOGS / "small.eval").read_bytes())
    flipped[3000] ^= 255
    cut.write_bytes(flipped)
    with pytest.raises(DataError, match="is damaged"):
        read_results(cut)
    assert inspect_log.matches(LOGS / "large.json") and not inspect_log.matches(tmp_path)
