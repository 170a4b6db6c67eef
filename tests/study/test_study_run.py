"""`recipes study run` with stand-ins for trainings: what is trained again, what fails alone."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.study.stand_in import COMMAND

from recipes_lib.cli import main
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import run as running
from recipes_lib.study.config import load_study
from recipes_lib.study.lock import design_values
from recipes_lib.study.run import StudyRunner
from recipes_lib.study.trainings import (
    REPLACED,
    is_trained,
    study_trainings,
    validation_loss,
    with_choices,
)

Run = Callable[..., tuple[int, list[str]]]
RATES = {"0.001": 2.5, "0.01": 2.0, "0.1": 2.2}
STOPPED = "stopped; the same command continues"


@pytest.fixture
def study(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a study of two arms, of which nothing is evaluated."""
    monkeypatch.setattr(running, "RECIPES", COMMAND)
    monkeypatch.setattr(running.progress, "evaluations", lambda study: [])
    file = study_folder / "tiny.yaml"
    file.write_text(f"{file.read_text()}include_base: false\n")
    return file


@pytest.fixture
def run(study: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the study as its file is now; return the code and what was said."""

    def ran(**options: object) -> tuple[int, list[str]]:
        code = StudyRunner(load_study(study), str, **options).run()  # type: ignore[arg-type]
        return code, capsys.readouterr().out.splitlines()

    return ran


def trained(study: Path) -> list[str]:
    trainings = study_trainings(load_study(study))
    return [training.run for training in trainings if is_trained(training)]


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    file.write_text(text.replace(old, new))
    assert file.read_text() != text


def commands(said: list[str]) -> list[str]:
    return [line for line in said if " recipes train" in line]


def test_a_failing_arm_stops_no_other_and_the_same_command_trains_it_and_then_nothing(
    study: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    code, said = run()
    assert (code, trained(study), len(commands(said))) == (ExitCode.FAILED, ["tiny--r8"], 2)
    assert "failed: tiny--r4 (exit code 1): no memory" in said
    # a job that only evaluates tells the training's own error too, and so does what is missing
    code, said = run(train=False)
    assert code == ExitCode.FAILED and "failed: tiny--r4 (exit code 1): no memory" in said
    assert running.progress.missing_of(load_study(study)) == [
        "training tiny--r4 (failed: no memory)"
    ]
    # one that is refused before it has the run leaves the error of the attempt before
    monkeypatch.setenv("REFUSED", "r4")
    code, said = run()
    assert "failed: tiny--r4 (exit code 2): the training ended with exit code 2" in said
    monkeypatch.delenv("REFUSED")
    monkeypatch.setenv("CODE", "75")
    code, said = run()
    assert (code, trained(study), said[-1]) == (75, ["tiny--r8"], STOPPED)
    monkeypatch.delenv("FAIL")
    code, said = run()
    assert (code, trained(study), len(commands(said))) == (0, ["tiny--r4", "tiny--r8"], 1)
    code, said = run()
    assert (code, commands(said)) == (0, [])


def test_a_run_of_other_settings_or_other_data_is_moved_away_and_trained_again(study, run):
    run()
    adapter = RunDirectory("tiny--r4").path / "adapter"
    kept = RunDirectory("tiny--r4").root / REPLACED
    launch = "{recipe: r4.yaml, accelerate: ddp_cpu, gpus: 2, overrides: [run.global_batch_size=8]}"
    (study.parent / "moved").mkdir()
    shutil.copy(study.with_name("rows.jsonl"), study.parent / "moved")
    changes = [
        ("r4.yaml", "rows.jsonl", "moved/rows.jsonl", []),
        ("r4.yaml", "moved/rows.jsonl", "rows.jsonl", []),
        ("r4.yaml", "1.0e-2", "2.0e-2", ["tiny--r4"]),
        ("rows.jsonl", "the", "The", ["tiny--r4", "tiny--r8"]),
        ("r4.yaml", "save_steps: 2", "save_steps: 3", []),
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
    names = sorted(path.name.rpartition("--")[0] for path in kept.iterdir())
    assert names == 3 * ["tiny--r4"] + ["tiny--r8"]
    change(study.with_name("r4.yaml"), "2.0e-2", "1.0e-2")  # a job that only evaluates says so
    code, said = run(train=False)
    assert code == ExitCode.FAILED and commands(said) == []
    assert "failed: tiny--r4 (exit code 1): is not trained" in "".join(said)
    change(study.with_name("r4.yaml"), "1.0e-2", "2.0e-2")
    shutil.rmtree(adapter)
    assert trained(study) == ["tiny--r8"]
    assert (run()[0], trained(study)) == (0, ["tiny--r4", "tiny--r8"])


def test_trainings_at_the_same_time_never_share_a_gpu(study, run, tmp_path, monkeypatch):
    small = "overrides: [train.per_device_train_batch_size=1]"
    change(study, "seeds: [42]", f"seeds: [42, 43]\n{small}")
    change(study, "r4: r4.yaml", "r4: {recipe: r4.yaml, accelerate: single_gpu, gpus: 1}")
    change(study, "r8: r8.yaml", "r8: {recipe: r8.yaml, accelerate: ddp, gpus: 2}")
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-b,7,8,9")
    with pytest.raises(RecipeError, match="only 5 GPUs"):  # before anything starts
        run(jobs=6)
    assert not list(RunDirectory("tiny").root.glob("tiny--*"))
    assert run(jobs=2)[0] == 0
    notes = [json.loads(file.read_text()) for file in seen.glob("*.json")]
    assert len(notes) == 4 and not any(shared for _, shared in notes)
    assert {devices for devices, _ in notes} == {"5,GPU-b", "7,8"}
    logs = RunDirectory("tiny").path / "recipes"
    assert (logs / "tiny--r4.log").read_text() == "training tiny--r4\n"


HOLD = (
    "import sys, time; from pathlib import Path\n"
    "from recipes_lib.core.run_directory import run_lock\n"
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
    # a batch job that was queued again waits for its earlier try
    monkeypatch.setenv("RECIPES_JOB", "Slurm job 7")
    other = holding(RunDirectory("tiny").path, 1.5)
    monkeypatch.setenv("RECIPES_JOB_RESTARTS", "1")
    assert run()[0] == 0 and other.wait() == 0


RUN = (
    "from recipes_lib.study import run; from tests.study.stand_in import COMMAND\n"
    "run.RECIPES, run.evaluations = COMMAND, lambda study: []\n"
    "from recipes_lib.cli import main\nimport sys\n"
    "sys.exit(main(['study', 'run', sys.argv[1]]))"
)


def test_a_signal_is_handed_on_and_ends_the_study_with_its_code(study, monkeypatch):
    monkeypatch.setenv("TRAIN_SECONDS", "60")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        words = [sys.executable, "-c", RUN, str(study)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while "training tiny--r4" not in process.stdout.readline():
            pass
        process.send_signal(number)
        said = process.stdout.read()
        assert process.wait() == code and STOPPED in said, said


EVALUATING = (
    "import time; from recipes_lib.study.run import StudyRunner\n"
    "def evaluate(self, study, trained): print('evaluating', flush=True); time.sleep(60)\n"
    f"StudyRunner._evaluate = evaluate\n{RUN}"
)


def test_a_stop_file_in_its_folder_ends_a_study_that_trains_and_one_that_evaluates(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: `touch runs/STUDY/STOP` stood in the message of a study in use; nothing read it."""
    stop_file = RunDirectory("tiny").path / "STOP"
    stop_file.parent.mkdir(parents=True)
    stop_file.touch()  # it asked a process that is over
    for script, begun, seconds in ((RUN, "training", "60"), (EVALUATING, "evaluating", "0")):
        monkeypatch.setenv("TRAIN_SECONDS", seconds)
        words = [sys.executable, "-c", script, str(study)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and not line.startswith(begun):
            line = process.stdout.readline()
        stop_file.touch()
        said = process.stdout.read()
        assert process.wait() == ExitCode.PREEMPTED and STOPPED in said, said
        assert not stop_file.exists()


def test_on_a_full_disk_the_trainings_that_run_are_asked_to_stop_and_waited_for(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue: they went on without anybody, and held their GPUs."""
    monkeypatch.setenv("TRAIN_SECONDS", "60")
    folder = RunDirectory("tiny").path / "recipes"
    (folder / "tiny--r8.yaml").mkdir(parents=True)  # it cannot be written
    assert main(["study", "run", str(study), "--jobs", "2"]) == ExitCode.ENVIRONMENT
    assert "tiny--r8.yaml" in capsys.readouterr().err.splitlines()[-2]
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline")]
    assert (folder / "tiny--r4.yaml").is_file() and str(folder).encode() not in b"".join(commands)


# ---- Tuning: each arm tries its grid, and its seeds are trained anew at the best value ----


@pytest.fixture
def tuned(study: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of that study, whose arms try three learning rates; `LOSSES` decides."""
    monkeypatch.setenv("LOSSES", json.dumps(RATES))
    change(study, "seeds: [42]", "seeds: [42]\ntune: {train.learning_rate: [0.001, 0.01, 0.1]}")
    return study


@pytest.fixture
def run_tuned(tuned: Path, run: Run) -> Callable[..., tuple[list[str], str]]:
    """Run that study; return the trainings with their learning rates, and what was said."""

    def ran(wanted: int = ExitCode.DONE) -> tuple[list[str], str]:
        code, said = run()
        assert code == wanted, said
        files = [Path(shlex.split(line)[-1]) for line in said if "$ recipes train" in line]
        recipes = [load_recipe(path) for path in files]
        trained = [f"{each.name} {each.train['learning_rate']}" for each in recipes]
        return trained, "\n".join(said)

    return ran


def test_each_arm_tries_its_grid_and_is_trained_anew_at_the_best_value(
    tuned, run_tuned, monkeypatch
):
    def tries(*rates: str) -> list[str]:
        tried = [(arm, rate) for arm in ("r4", "r8") for rate in rates]
        return [f"tiny--{arm}--tune-{rate}--seed1042 {rate}" for arm, rate in tried]

    assert run_tuned()[0] == [*tries(*RATES), "tiny--r4 0.01", "tiny--r8 0.01"]
    study = with_choices(load_study(tuned))
    assert {arm.recipe.train["learning_rate"] for arm in study.arms} == {0.01}
    # what tuning chose is a result, so the lock holds the grid alone
    assert design_values(study)["arms"] == design_values(load_study(tuned))["arms"]
    assert {arm.tuning.losses for arm in study.arms if arm.tuning} == {tuple(RATES.values())}
    assert run_tuned()[0] == []
    monkeypatch.setenv("LOSSES", json.dumps({"2.0": 1.0}))
    change(tuned, "0.1]", "0.1, 2.0]")  # a wider grid tries what is new
    trained, said = run_tuned()
    assert trained == [*tries("2.0"), "tiny--r4 2.0", "tiny--r8 2.0"]
    assert "train.learning_rate 0.01 -> 2.0): moved to" in said


def test_of_equal_losses_the_first_value_wins_and_one_that_diverged_cannot(
    tuned, run_tuned, monkeypatch
):
    change(tuned, "  r8: r8.yaml\n", "")
    monkeypatch.setenv("LOSSES", json.dumps({"0.001": 2.0, "0.01": 2.0, "0.1": None}))
    assert run_tuned()[0][-1] == "tiny--r4 0.001"
    assert run_tuned()[0] == []
    shutil.rmtree(RunDirectory("tiny").root)
    monkeypatch.setenv("LOSSES", json.dumps(dict.fromkeys(RATES)))
    trained, said = run_tuned(ExitCode.FAILED)
    assert len(trained) == 3 and "failed: r4 (exit code 1): train.learning_rate diverged" in said


def test_a_try_that_failed_or_was_stopped_holds_its_arm_back(run_tuned, monkeypatch):
    monkeypatch.setenv("FAIL", "r4--tune-0.1--seed1042")
    trained, said = run_tuned(ExitCode.FAILED)
    assert trained[-1] == "tiny--r8 0.01" and "tiny--r4 0.01" not in trained
    assert "failed: r4 (exit code 1): train.learning_rate is not tuned yet" in said
    monkeypatch.setenv("CODE", "75")
    run_tuned(ExitCode.PREEMPTED)
    monkeypatch.delenv("FAIL")
    assert run_tuned()[0] == ["tiny--r4--tune-0.1--seed1042 0.1", "tiny--r4 0.01"]


def test_the_loss_that_counts_is_that_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    kept = RunDirectory("kept", tmp_path)
    kept.path.mkdir()
    lines = ({"step": step, "eval_loss": loss} for step, loss in ((1, 2.5), (2, 1.5), (3, 2.0)))
    kept.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    last = {"last_validation_loss": 2.0}
    for summary, loss in ((last, 2.0), ({**last, "best_step": 2}, 1.5), ({}, None)):
        kept.write_state("finished", summary=summary)
        assert validation_loss(kept) == loss
