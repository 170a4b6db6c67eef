"""`recipes study run`: what is trained again and what is not, arms that fail alone, one runner at a
time. Trainings are stand-ins, and nothing is evaluated here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.study.stand_in import COMMAND

from recipes_lib.cli import main
from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import report
from recipes_lib.study import run as running
from recipes_lib.study.config import load_study
from recipes_lib.study.run import StudyRunner
from recipes_lib.study.runs import REPLACED, is_trained, study_trainings

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def study(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a study of two arms without evals."""
    monkeypatch.setattr(running, "train_command", lambda words: [*COMMAND, *words])
    monkeypatch.setattr(report, "report_study", lambda study: None)
    file = study_folder / "tiny.yaml"
    text = file.read_text().partition("evals:")[0]
    file.write_text(f"{text}include_base: false\n")
    return file


@pytest.fixture
def run(study: Path) -> Run:
    """Run the study as its file is now; return the code and what was said."""

    def ran(**options: object) -> tuple[int, list[str]]:
        said: list[str] = []
        return StudyRunner(load_study(study), said.append, **options).run(), said  # type: ignore[arg-type]

    return ran


def trained(study: Path) -> list[str]:
    trainings = study_trainings(load_study(study))
    return [training.run for training in trainings if is_trained(training)]


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def commands(said: list[str]) -> list[str]:
    return [line for line in said if " recipes train" in line]


def test_every_arm_is_trained_once_and_a_second_run_trains_nothing(study: Path, run: Run) -> None:
    code, said = run()
    assert (code, trained(study), len(commands(said))) == (0, ["tiny--r4", "tiny--r8"], 2)
    code, said = run()
    assert (code, commands(said)) == (0, [])


def test_a_failing_arm_stops_no_other_and_is_trained_again_by_the_same_command(
    study: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    code, said = run()
    assert (code, trained(study)) == (ExitCode.FAILED, ["tiny--r8"])
    assert "failed: tiny--r4 (exit code 1): no memory" in said
    monkeypatch.delenv("FAIL")
    assert (run()[0], trained(study)) == (0, ["tiny--r4", "tiny--r8"])


def test_a_run_of_other_settings_or_other_data_is_moved_away_and_trained_again(
    study: Path, run: Run
) -> None:
    run()
    adapter = RunDirectory("tiny--r4").path / "adapter"
    kept = RunDirectory("tiny--r4").root / REPLACED
    launch = "{recipe: r4.yaml, accelerate: ddp_cpu, gpus: 2, overrides: [run.global_batch_size=8]}"
    changes = [
        ("r4.yaml", "1.0e-2", "2.0e-2", ["tiny--r4"]),
        ("rows.jsonl", "the", "The", ["tiny--r4", "tiny--r8"]),
        ("r4.yaml", "  max_length: 192\n", "  max_length: 192\n  logging_first_step: true\n", []),
        ("tiny.yaml", "r4: r4.yaml", f"r4: {launch}", ["tiny--r4"]),
    ]
    wrong = []
    for name, old, new, again in changes:
        before = (adapter / "adapter_model.safetensors").read_bytes()
        change(study.with_name(name), old, new)
        code, said = run()
        moved = [line.split()[0] for line in said if "moved to" in line]
        if (code, moved, len(commands(said))) != (0, again, len(again)):
            wrong.append((name, new, said))
        copies = [file.read_bytes() for file in kept.glob("tiny--r4*/adapter/*.safetensors")]
        if "tiny--r4" in again and before not in copies:
            wrong.append((name, new, "the run before was lost"))
    assert not wrong
    names = ["tiny--r4", "tiny--r4--2", "tiny--r4--3", "tiny--r8"]
    assert sorted(path.name for path in kept.iterdir()) == names
    shutil.rmtree(adapter)
    assert trained(study) == ["tiny--r8"]
    assert (run()[0], trained(study)) == (0, ["tiny--r4", "tiny--r8"])


def test_a_stopped_training_ends_the_study_with_its_code_and_is_no_failure(
    study: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    monkeypatch.setenv("CODE", "75")
    code, said = run()
    assert (code, trained(study), said[-1]) == (75, [], "stopped; the same command continues")


def test_trainings_at_the_same_time_never_share_a_gpu(
    study: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(
        study, "seeds: [42]", "seeds: [42, 43]\noverrides: [train.per_device_train_batch_size=1]"
    )
    change(study, "r4: r4.yaml", "r4: {recipe: r4.yaml, accelerate: single_gpu, gpus: 1}")
    change(study, "r8: r8.yaml", "r8: {recipe: r8.yaml, accelerate: ddp, gpus: 2}")
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-b,7")
    run(jobs=3)
    notes = {file.stem: json.loads(file.read_text()) for file in seen.glob("*.json")}
    assert {name: len(devices.split(",")) for name, (devices, _) in notes.items()} == {
        "tiny--r4": 1,
        "tiny--r4--seed43": 1,
        "tiny--r8": 2,
        "tiny--r8--seed43": 2,
    }
    assert not any(shared for _, shared in notes.values())
    logs = RunDirectory("tiny").path / "recipes"
    assert (logs / "tiny--r4.log").read_text() == "training tiny--r4\n"


HOLD = (
    "import sys, time; from pathlib import Path; from recipes_lib.core.lock import run_lock\n"
    "with run_lock(Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(float(sys.argv[2]))\n"
)


def holding(folder: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_a_second_runner_is_refused_and_a_training_of_another_process_is_waited_for(
    study: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = holding(RunDirectory("tiny").path, 60)
    with pytest.raises(EnvironmentFault, match=f"process {other.pid}"):
        run()
    assert main(["study", "status", str(study)]) == ExitCode.DONE
    other.kill()
    other.wait()
    other = holding(RunDirectory("tiny--r4").path, 1.5)
    code, said = run()
    assert code == 0 and other.wait() == 0
    assert any(f"tiny--r4 is being trained by process {other.pid}" in line for line in said)
    # a Slurm job that was queued again waits for its earlier try
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    other = holding(RunDirectory("tiny").path, 1.5)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run()[0] == 0 and other.wait() == 0


def in_a_process(study: Path, **environment: str) -> subprocess.Popen[str]:
    program = (
        "from recipes_lib.study import run; from tests.study.stand_in import COMMAND\n"
        "run.train_command = lambda words: [*COMMAND, *words]\n"
        "from recipes_lib.cli import main\nimport sys\n"
        "sys.exit(main(['study', 'run', sys.argv[1]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(study)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "training tiny--r4" not in process.stdout.readline():
        pass
    return process


def test_a_signal_is_handed_on_and_ends_the_study_with_its_code(study: Path, run: Run) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        process = in_a_process(study, TRAIN_SECONDS="60")
        process.send_signal(number)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait() == code and "the same command continues" in said, said


def test_two_studies_of_one_name_are_refused(study: Path, run: Run, tmp_path: Path) -> None:
    run()
    shutil.copytree(study.parent, tmp_path / "copy")
    other = load_study(tmp_path / "copy" / "tiny.yaml")
    with pytest.raises(RecipeError, match="belongs to another study"):
        StudyRunner(other, lambda line: None).run()
    study.unlink()  # moved, not copied
    assert StudyRunner(other, lambda line: None).run() == 0


def test_a_recipe_edited_while_its_job_waits_is_trained_as_launched_and_not_evaluated(
    study: Path, run: Run
) -> None:
    code, said = run(train=False)
    assert code == ExitCode.FAILED and commands(said) == []
    assert "failed: tiny--r4 (exit code 1): is not trained" in said
    assert main(["launch", str(study), "--profile", "local-sandbox", "--prepare"]) == ExitCode.DONE
    change(study.with_name("r4.yaml"), "1.0e-2", "2.0e-2")
    for name in ("tiny--r4", "tiny--r8"):
        handed = RunDirectory("tiny").path / "slurm" / f"{name}.yaml"
        subprocess.run([*COMMAND, "train", str(handed)], check=True)
    assert trained(study) == ["tiny--r8"]
    code, said = run(train=False)
    assert code == ExitCode.FAILED
    (failed,) = (line for line in said if line.startswith("failed: "))
    assert "tiny--r4" in failed and "train.learning_rate 0.01 -> 0.02" in failed
