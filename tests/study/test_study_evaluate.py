"""All evaluations of a study in one process: what is loaded, asked again, and fails alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tests.conftest import build_tiny_model
from tests.evals.faulty_server import FaultyServer
from tests.study.study_files import PROJECT, TOO_LONG, write_tiny_study
from transformers import AutoModelForCausalLM as Auto

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import read_object
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.log import read_eval_logs
from recipes_lib.study.config import load_study
from recipes_lib.study.progress import missing_of
from recipes_lib.study.report import report_study
from recipes_lib.study.run import StudyRunner
from recipes_lib.train import main as train

pytestmark = pytest.mark.slow


@pytest.fixture
def trained(make_run: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny study, its two arms trained by somebody else."""
    make_run("tiny--r4", 1, "chat"), make_run("tiny--r8", 2, "chat")
    return write_tiny_study(tmp_path / "study", tiny_model_dir)


def run(file: Path, code: int = ExitCode.DONE) -> list[str]:
    runner = StudyRunner(load_study(file), report_study, train=False)
    assert runner.run() == code, runner.failed
    return list(runner.failed)


def rows_of(kind: str) -> dict[str, int]:
    """Lines of every store of a kind."""
    root = RunDirectory("x").root
    return {
        str(file.relative_to(root)): len(file.read_text().splitlines())
        for file in root.glob(f"*/evals/*/{kind}.jsonl")
    }


def test_one_base_serves_both_adapters_and_a_damaged_arm_takes_no_other_along(
    trained: Path,
) -> None:
    with patch.object(Auto, "from_pretrained", wraps=Auto.from_pretrained) as load:
        run(trained)
        assert load.call_count == 2  # the base, then the judge
        assert missing_of(load_study(trained)) == []
        rows = []
        for file in RunDirectory("x").root.glob("*/evals/*/judgments*.jsonl"):
            rows += map(json.loads, file.read_text().splitlines())
        probes = [row for row in rows if row.get("probe")]
        assert (len(rows) - len(probes), len(probes)) == (48 + 32 + 24, 8)  # as the plan says
        asked = rows_of("generations"), rows_of("judgments")
        run(trained)
        assert load.call_count == 2
    assert (rows_of("generations"), rows_of("judgments")) == asked
    file = RunDirectory("tiny--r4").path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for names in (run(trained, ExitCode.FAILED), missing_of(load_study(trained))):
        assert names and all("tiny--r4" in name for name in names), names
    assert (RunDirectory("tiny").path / "report" / "report.html").is_file()


def test_no_result_of_other_weights_judge_or_thresholds_is_current(trained, make_run, tmp_path):
    """Of a server too, which is asked for a run by the run's name."""
    trained.write_text(trained.read_text().replace(", mt_bench.yaml, lm_eval.yaml", ""))
    eval, judge = trained.with_name("alpaca_eval.yaml"), trained.with_name("judge.yaml")
    model = Path(load_study(trained).evals[0].judge.model)
    judge.write_text(judge.read_text().replace(str(model), str(tmp_path / "judge")))
    shutil.copytree(model, tmp_path / "judge")
    with FaultyServer() as server:
        server.as_asked = True
        served = f"max_new_tokens: 12, engine: openai, base_url: {server.url}"
        eval.write_text(eval.read_text().replace("max_new_tokens: 12", served))
        run(trained)
        names = {body["model"] for body in server.bodies}
        assert names == {"tiny--r4", "tiny--r8", str(model)} and len(server.bodies) == 24
        make_run("tiny--r4", 3, "chat")
        missing = missing_of(load_study(trained))
        assert missing and all("of tiny--r4" in name for name in missing), missing
        run(trained)
        assert len(server.bodies) == 32
    build_tiny_model(tmp_path / "judge", seed=5)
    for _ in range(2):
        assert len(missing_of(load_study(trained))) == 5
        run(trained)
        eval.write_text(f"{eval.read_text()}thresholds: {{unparsed_max: 0.9}}\n")
    (log, *_), _ = read_eval_logs(RunDirectory("tiny--r4").path)
    assert log.audit.checks[1].needs == "<= 0.9"


def test_an_eval_against_another_run_is_part_of_the_comparison(trained, make_run):
    make_run("sparring", 3, "chat")
    eval = trained.with_name("alpaca_eval.yaml")
    text = eval.read_text()
    eval.write_text(text.replace("probe_pairs: 1", "probe_pairs: 1, against: sparring"))
    trained.write_text(trained.read_text().replace(", mt_bench.yaml, lm_eval.yaml", ""))
    run(trained)
    comparison = json.loads((RunDirectory("tiny").path / "comparison.json").read_text())
    assert any("sparring" in json.dumps(row) for row in comparison["rows"]), comparison["rows"]


def test_a_result_says_what_the_training_rows_hold_and_no_claim_is_made_about_that_arm(
    tiny_recipe: Path, tmp_path: Path, recipes: Callable[..., tuple[int, str, str]]
) -> None:
    rows = (PROJECT / "recipes/quickstart/data/instructions.jsonl").read_text().splitlines()[:40]
    leaked = json.dumps({"instruction": TOO_LONG, "context": "", "response": "So."})
    for name, more in {"clean": [], "dirty": [leaked]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows, *more, ""]))
        words = [f"data.source={tmp_path}/{name}.jsonl", "data.split.method=none"]
        words += ["train.eval_strategy='no'", "train.max_steps=1", f"run.name={name}"]
        assert train([str(tiny_recipe), *words]) == 0
    prompts = [TOO_LONG, *(f"What comes after {number}?" for number in range(7))]
    checks = ({"prompt": text, "check": "regex", "expected": ""} for text in prompts)
    (tmp_path / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checks))
    suite = "suite: {name: checks}\ndata: {questions: checks.jsonl}\n"
    (tmp_path / "own.yaml").write_text(f"{suite}generation: {{max_new_tokens: 4}}\n")
    (tmp_path / "clean.jsonl").unlink()
    code, out, err = recipes("eval", tmp_path / "own.yaml", "clean", "dirty")
    assert code == 0 and "! dirty: 1 of 8 questions of" in out, err
    result = tmp_path / f"runs/dirty/evals/{tmp_path.name}--own/result.json"
    assert read_object(result)["leaks"]["found"][0]["place"].endswith("dirty.jsonl:41")
    out = recipes("compare", "clean", "dirty")[1]
    assert "error: dirty: 1 of 8 questions of" in out and "No verdict about dirty" in out, out
    assert "warning: Rows of clean were not searched" in out


KILLS = 10


def start(study: Path, root: Path) -> subprocess.Popen[str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GIT_DIR": os.devnull}
    environment = {**os.environ, "RECIPES_RUNS_ROOT": str(root), **quiet}
    command = [sys.executable, "-m", "recipes_lib.cli", "study", "run", str(study)]
    log = (root.parent / "study.log").open("a")
    how: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True}
    return subprocess.Popen(command, env=environment, text=True, **how)


def run_to_the_end(study: Path, root: Path) -> float:
    started, process = time.monotonic(), start(study, root)
    try:
        assert process.wait(timeout=600) == 0, (root.parent / "study.log").read_text()[-3000:]
    finally:
        process.kill()
    return time.monotonic() - started


def loaded(text: str) -> Any:
    """JSON whose numbers have six digits: what a batch holds moves the last ones."""
    return json.loads(text, parse_float=lambda digits: round(float(digits), 6))


def findings(root: Path) -> dict[str, Any]:
    """What a study found: its weights, its answers and judgments, every number and sentence."""
    found = {str(f.relative_to(root)): f.read_bytes() for f in root.glob("*/adapter/*.saf*")}
    for kind in ("generations", "judgments"):
        for file in root.glob(f"*/evals/*/{kind}*.jsonl"):
            rows = [loaded(line) for line in file.read_text().splitlines()]
            found[str(file.relative_to(root))] = by_key = {row["key"]: row for row in rows}
            assert len(rows) == len(by_key), f"{file} holds an item twice"
    comparison = loaded((root / "tiny" / "comparison.json").read_text())
    return found | {name: comparison[name] for name in ("scores", "rows", "answer")}


def weights(root: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in root.glob("*/adapter/*.safetensors")}


@pytest.mark.timeout(1800)
def test_a_study_killed_at_ten_moments_ends_like_one_left_alone(tiny_model_dir, tmp_path):
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    root = tmp_path / "runs"
    seconds = run_to_the_end(study, root)
    expected = findings(root)
    moments, killed, ended = random.Random(20), 0, 0
    while killed < KILLS:
        root.rename(tmp_path / f"runs-{ended}")
        while killed < KILLS:
            process, started = start(study, root), time.monotonic()
            try:
                process.wait(timeout=moments.uniform(0.05, 0.6) * seconds)
                assert process.returncode == 0
                seconds = min(seconds, time.monotonic() - started + 1)  # faster now: kill sooner
                break
            except subprocess.TimeoutExpired:
                killed += 1
                # alone, so that its children have to notice, or with its whole group
                process.kill() if killed % 2 else os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        done = weights(root)
        run_to_the_end(study, root)
        assert done.items() <= weights(root).items(), "a finished run was trained again"
        ended += 1
        found = findings(root)
        for what, value in expected.items():
            assert found[what] == value, f"{what} differs"
    assert ended
