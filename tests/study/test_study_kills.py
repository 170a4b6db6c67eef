"""A study killed with SIGKILL at ten random moments ends with the report of one that was left
alone; nothing is done twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from recipes_lib.study.ledger import ledger_of, looked
from recipes_lib.study.steps import build_graph
from tests.study.study_files import write_tiny_study

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.design import load_study
from recipes_lib.compare.measurements import Measurements, read_measurements
from recipes_lib.compare.relabelling import relabelled
from recipes_lib.compare.validity import check_validity
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report
from recipes_lib.study.conclusion import measured_runs, of_study

KILLS = 10
SEED = 20
LIMIT_S = 600
# What a report shows of when and how fast: an attempt's own times, and the answers that it gave
# itself.
TIMES = {"seconds", "tokens_per_second", "peak_memory_gib", "generated_now"}
# What speed is tested from: a resumed training has other steps with a time.
SPEED = {"step_seconds", "step_tokens", "others_cpu", "other_gpu_processes"}


def start(study: Path, root: Path) -> subprocess.Popen[str]:
    # Without git: a commit that somebody makes meanwhile is provenance, and a finding.
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GIT_DIR": os.devnull}
    environment = {**os.environ, "RECIPES_RUNS_ROOT": str(root), **quiet}
    command = [sys.executable, "-m", "recipes_lib.cli", "study", "run", str(study)]
    log = (root.parent / "study.log").open("a", encoding="utf-8")
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


def run_to_the_end(study: Path, root: Path) -> float:
    started = time.monotonic()
    process = start(study, root)
    try:
        assert process.wait(timeout=LIMIT_S) == 0, (root.parent / "study.log").read_text(
            encoding="utf-8"
        )[-3000:]
    finally:
        process.kill()
    return time.monotonic() - started


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_times(value: Any) -> Any:
    """A record with every time in it made the same; what was not measured at all stays away."""
    if isinstance(value, dict):
        return {
            key: 1.0 if key in TIMES and item is not None else without_times(item)
            for key, item in value.items()
        }
    return [without_times(item) for item in value] if isinstance(value, list | tuple) else value


def timeless(measurements: Measurements) -> Measurements:
    """What was measured, without times: of results those of answering are left out, because an
    attempt that only judged has none.
    """

    def run(one: Any) -> Any:
        evals = []
        for result in one.evals:
            answers = dataclasses.replace(result.answers, generated_now=None)
            evals.append(dataclasses.replace(result, answers=answers))
        curves = tuple(
            without_times({key: item for key, item in line.items() if key not in SPEED})
            for line in one.curves
        )
        state = {
            **without_times(one.state),
            "resumed": [],
        }  # a report says whose seconds those of a resumed training are
        return dataclasses.replace(one, state=state, curves=curves, evals=tuple(evals))

    arms = {
        name: dataclasses.replace(arm, runs=tuple(map(run, arm.runs)))
        for name, arm in measurements.arms.items()
    }
    return dataclasses.replace(measurements, arms=arms)


def report_bytes(study: Path, root: Path, place: Path) -> dict[str, bytes]:
    """The comparison and every file of the report of what a runs folder holds, times aside; those
    that lie there are compared with their own files first.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_RUNS_ROOT", str(root))
        loaded = load_study(study)
        graph = build_graph(loaded)
        assert all(state.fresh for state in graph.survey().values())
        measurements = of_study(read_measurements(measured_runs(loaded, graph)), loaded, graph)
        told = {}
        for name, measured in (("as-it-is", measurements), ("timeless", timeless(measurements))):
            findings = check_validity(loaded, measured)
            make = partial(compare_arms, measured, findings, loaded, relabel=relabelled)
            comparison = make()
            if name == "as-it-is":
                ledger = ledger_of(loaded, graph, measured, "test")
                comparison = looked(ledger, lambda weigh, make=make: make(weigh=weigh))
                assert comparison.looks and comparison.looks.number == 1, "a kill is no look"
            write_report(place / name, gather(loaded.name, measured, comparison, loaded))
            told[name] = comparison.to_dict()
        recorded = graph.read("statistics", "done.json")
    assert recorded is not None and recorded["output"] == digest_of(told["as-it-is"])
    assert tree(place / "as-it-is") == tree(root / "tiny" / "report")
    made = json.dumps(told["timeless"], default=str).encode()
    return {**tree(place / "timeless"), "comparison": made}


def findings_of(study: Path, root: Path, place: Path) -> dict[str, Any]:
    """What a study found: the comparison and the report to the byte, times aside, every other
    step's result, and every stored answer and judgment.
    """
    steps = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))["output"]
        for file in sorted(root.glob("tiny/steps/*/done.json"))
        if file.parent.name != "statistics"
    }
    stores = {}
    for file in sorted(
        [*root.glob("*/evals/*/generations.jsonl"), *root.glob("*/evals/*/judgments*.jsonl")]
    ):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        by_key = {row["key"]: without_rounding(row) for row in rows}
        assert len(rows) == len(by_key), f"{file} holds an item twice"
        stores[str(file.relative_to(root))] = by_key
    return {"report": report_bytes(study, root, place), "steps": steps, "stores": stores}


def without_rounding(value: Any) -> Any:
    """A row whose numbers have six digits: what a batch holds moves probabilities by the
    last ones.
    """
    if isinstance(value, dict):
        return {key: without_rounding(item) for key, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def done_steps(root: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in root.glob("tiny/steps/*/done.json")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_killed_at_ten_moments_ends_like_one_left_alone(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    root = tmp_path / "runs"
    seconds = run_to_the_end(study, root)
    expected = findings_of(study, root, tmp_path / "report")
    assert len(expected["steps"]) == 23
    moments, killed, ended = random.Random(SEED), 0, 0
    while killed < KILLS:
        root.rename(tmp_path / f"runs-{ended}")
        done: dict[str, bytes] = {}
        while killed < KILLS:
            process, started = start(study, root), time.monotonic()
            try:
                process.wait(timeout=moments.uniform(0.05, 0.6) * seconds)
                assert process.returncode == 0
                seconds = min(
                    seconds, time.monotonic() - started + 1
                )  # the machine became faster: kill sooner
                break
            except subprocess.TimeoutExpired:
                killed += 1
                # Alone, so that its children have to notice; or with the whole group, which leaves
                # a training behind.
                process.kill() if killed % 2 else os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            before, done = done, done_steps(root)
            assert before.items() <= done.items(), "a step was done twice"
        run_to_the_end(study, root)
        assert done.items() <= done_steps(root).items(), "a step was done twice"
        ended += 1
        found = findings_of(study, root, tmp_path / f"report-{ended}")
        for what in expected:
            for name, value in expected[what].items():
                assert found[what].get(name) == value, f"{what}: {name} differs"
        assert found == expected
    assert ended


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_run_finds_everything_fresh_and_a_changed_question_asks_only_for_the_answers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    root = tmp_path / "runs"
    run_to_the_end(study, root)
    weights = {file: file.stat().st_mtime_ns for file in root.glob("*/adapter/*.safetensors")}
    before = {path: path.read_bytes() for path in root.rglob("*.jsonl")}
    assert run_to_the_end(study, root) < 5
    assert {path: path.read_bytes() for path in root.rglob("*.jsonl")} == before
    questions = tmp_path / "study" / "questions.json"
    rows = json.loads(questions.read_text(encoding="utf-8"))
    rows[0]["instruction"] += " Please."
    questions.write_text(json.dumps(rows), encoding="utf-8")
    run_to_the_end(study, root)
    assert {
        file: file.stat().st_mtime_ns for file in root.glob("*/adapter/*.safetensors")
    } == weights
    grown = {
        path.parent.name
        for path, text in before.items()
        if path.name == "generations.jsonl" and path.read_bytes() != text
    }
    assert grown == {"study--alpaca_eval"}
    log = (tmp_path / "study.log").read_text(encoding="utf-8")
    assert "answers.study--alpaca_eval.r4 is done again: questions changed" in log
