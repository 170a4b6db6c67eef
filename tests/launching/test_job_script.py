"""launch/job.sbatch and its kin without Slurm: clean shell, true exit codes, nothing that is said comes from a value."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib import cli

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = [LAUNCH / "job.sbatch", *sorted(LAUNCH.glob("*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "shellcheck is missing: apt-get install shellcheck"
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_job_script_is_commented_and_knows_no_site() -> None:
    text = (LAUNCH / "job.sbatch").read_text()
    lines = text.splitlines()
    assert sum("#" in line for line in lines) >= 15
    sbatch = [line for line in lines if line.startswith("#SBATCH")]
    assert not any(word in line for line in sbatch for word in ("partition", "gres", "account", "time="))


@pytest.fixture
def job(tmp_path: Path):
    """Runs the script on a stage of a folder."""
    (tmp_path / "env.sh").write_text("export FROM_SITE=yes\n")
    (tmp_path / "log").touch()

    def run(stage: str, *words: str, check: tuple[str, ...] = (), processes: str = "1 NO", **environment: str) -> tuple[int, str]:
        (tmp_path / f"{stage}.args").write_text("".join(f"{word}\n" for word in words))
        (tmp_path / f"{stage}.processes").write_text(f"{processes}\n")
        if check:
            (tmp_path / f"{stage}.check.args").write_text("".join(f"{word}\n" for word in check))
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        argv = ["bash", str(LAUNCH / "job.sbatch"), str(tmp_path), stage]
        done = subprocess.run(argv, env={**plain, **environment}, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_node_that_does_not_see_the_folder_of_the_runs_is_exit_5(tmp_path: Path) -> None:
    argv = ["bash", str(LAUNCH / "job.sbatch"), str(tmp_path / "elsewhere" / "mine" / "slurm"), "train"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and "this node does not see" in done.stderr


def test_a_command_is_an_argument_list_not_a_line_of_shell(job, tmp_path: Path) -> None:
    code, said = job("eval", "printf", "%s|", "$(touch oops)", "a  b", "'; touch oops", "--foo", "*", "@HEAD@:@NODES@:@NODE_RANK@")
    assert code == 0 and "$(touch oops)|a  b|'; touch oops|--foo|*|127.0.0.1:1:0|" in said
    assert not (tmp_path / "oops").exists()
    assert (tmp_path / "eval.exit_code").read_text() == "0\n"


def test_the_sites_environment_reaches_the_command_and_a_failing_one_is_exit_5(job, tmp_path: Path) -> None:
    assert "yes" in job("eval", "printenv", "FROM_SITE")[1]
    (tmp_path / "env.sh").write_text("module load nothing || return 5\n")
    code, said = job("eval", "true")
    assert code == 5 and "the site's environment failed" in said
    assert (tmp_path / "eval.exit_code").read_text() == "5\n"


def test_the_code_of_a_training_is_the_one_it_left_and_none_is_a_failure(job) -> None:
    leave = 'echo {} > "$RECIPES_EXIT_CODE_FILE"; exit {}'
    assert job("train", "bash", "-c", leave.format(3, 0))[0] == 3
    assert job("train", "bash", "-c", leave.format(0, 0))[0] == 0
    assert job("train", "true")[0] == 1  # it ended well and left no word: a save may have been cut
    assert job("train", "bash", "-c", "kill -9 $$")[0] == 137


def test_a_training_whose_check_fails_has_failed(job) -> None:
    leave = ("bash", "-c", 'echo 0 > "$RECIPES_EXIT_CODE_FILE"')
    assert job("train", *leave, check=("true",))[0] == 0
    assert job("train", *leave, check=("bash", "-c", "exit 1"))[0] == 1
    assert job("train", "bash", "-c", 'echo 3 > "$RECIPES_EXIT_CODE_FILE"', check=("true",))[0] == 3


def test_the_first_failing_rank_is_named_first(job) -> None:
    script = """
    echo "rank 1: late" > "$RECIPES_RANK_ERRORS/200-rank1.txt"; echo "rank 3: out of memory" > "$RECIPES_RANK_ERRORS/100-rank3.txt"; exit 1
    """.strip()
    code, said = job("train", "bash", "-c", script)
    assert code == 1 and "first error: rank 3: out of memory" in said and "late" not in said


def test_a_stopped_training_without_slurm_says_that_it_can_be_continued(job) -> None:
    code, said = job("train", "bash", "-c", 'echo 75 > "$RECIPES_EXIT_CODE_FILE"')
    assert code == 75 and "launch it again to continue" in said


def test_usr2_asks_a_training_until_it_listens(job, tmp_path: Path) -> None:
    # bash cannot trap a signal that was ignored when it started; python can, as the training does
    python = (
        "import os, signal, time, pathlib, sys\n"
        "os.kill(os.getppid(), signal.SIGUSR2)\n"
        "time.sleep(1)\n"
        "def save(*_):\n    pathlib.Path(os.environ['RECIPES_EXIT_CODE_FILE']).write_text('75'); sys.exit(0)\n"
        "signal.signal(signal.SIGUSR2, save)\n"
        "time.sleep(30)\n"
    )
    (tmp_path / "stop.py").write_text(python)
    code, said = job("train", "python3", "stop.py")
    assert code == 75 and "USR2" in said


@pytest.mark.parametrize(("by", "queued_again"), [("USR2", True), ("TERM", False)])
def test_a_training_that_saved_is_queued_again_after_usr2_and_never_after_term(job, tmp_path: Path, stand_in, by, queued_again) -> None:
    """TERM means that Slurm ends the job: a preemption queues it again by itself, after scancel it must stay away."""
    stand_in("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    answers = 'case "$*" in "show host"*) echo localhost ;; "show job"*) echo "JobId=7 Requeue=1 Restarts=0 B=1" ;; *) exit 1 ;; esac'
    calls = stand_in("scontrol", answers)
    (tmp_path / "stop.py").write_text(
        "import os, signal, time, pathlib, sys\n"
        "def save(*_):\n    pathlib.Path(os.environ['RECIPES_EXIT_CODE_FILE']).write_text('75'); sys.exit(75)\n"
        "signal.signal(signal.SIGUSR2, save)\n"
        f"os.kill(os.getppid(), signal.SIG{by})\n"
        f"time.sleep(30 if {by!r} == 'USR2' else 1); save()\n"
    )
    code, said = job("train", "python3", "stop.py", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1")
    assert code == 75 and ("saved; back into the queue" in said) is queued_again, said
    assert ("requeue" in calls.read_text().splitlines()) is queued_again


@pytest.mark.parametrize(
    ("processes", "given", "threads"),
    [
        ("1 NO", {"SLURM_CPUS_PER_TASK": "8"}, "8"),
        ("8 MULTI_GPU", {"SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8"}, "8"),
        ("2 MULTI_GPU", {"SLURM_CPUS_PER_TASK": "1"}, "1"),
        ("2 MULTI_GPU", {"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "3"}, "3"),
        ("1 NO", {}, "1"),
    ],
)
def test_each_process_takes_its_share_of_the_tasks_cores(job, stand_in, monkeypatch, processes: str, given, threads: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stand_in("scontrol", "echo localhost")
    stand_in("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    code, said = job("eval", "printenv", "OMP_NUM_THREADS", processes=processes, SLURM_JOB_ID="5", SLURM_JOB_NODELIST="localhost", **given)
    assert code == 0 and f"\n{threads}\n" in said, said


def test_without_slurm_the_number_of_threads_is_not_touched(job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert job("eval", "printenv", "OMP_NUM_THREADS")[0] == 1


@pytest.mark.parametrize("script", ["local.sh", "sandbox.sh", "vllm_server.sh"])
def test_a_script_says_how_it_is_used(script: str) -> None:
    done = subprocess.run([LAUNCH / script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and not done.stderr


def test_a_job_out_of_an_old_submission_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(["bash", LAUNCH / "job.sbatch", tmp_path, "train"], capture_output=True, text=True)
    assert done.returncode == 2 and "train.args" in done.stderr


@pytest.mark.parametrize(("second", "code", "ran"), [("exit 0", 0, ["first", "second", "third"]), ("exit 6", 6, ["first", "second"])])
def test_local_runs_the_stages_in_order_and_stops_at_the_first_that_fails(stand_in, tmp_path: Path, second: str, code: int, ran) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "env.sh").write_text("")
    (folder / "order").write_text("eval-a\neval-b\nreport\n")
    for label, name, ends in (("eval-a", "first", "exit 0"), ("eval-b", "second", second), ("report", "third", "exit 0")):
        (folder / f"{label}.processes").write_text("1 NO\n")
        (folder / f"{label}.args").write_text(f"bash\n-c\necho {name} >> {folder}/ran; {ends}\n")
    calls = stand_in("recipes", f"echo {folder}")
    done = subprocess.run(["bash", LAUNCH / "local.sh", "r.yaml", "run.notes=$(x)"], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert (folder / "ran").read_text().split() == ran
    assert calls.read_text().splitlines() == ["launch", "r.yaml", "run.notes=$(x)", "--stages", "train,eval,report", "--prepare", "---"]
    assert "exit code 0" in (folder / "eval-a.log").read_text()


@pytest.mark.parametrize("words", [["--stages", "train"], ["--stages=train"]], ids=" ".join)
def test_local_keeps_the_stages_that_were_asked_for(stand_in, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "order").touch()
    calls = stand_in("recipes", f"echo {tmp_path}")
    subprocess.run(["bash", LAUNCH / "local.sh", "r.yaml", *words], check=True, timeout=60)
    assert calls.read_text().splitlines() == ["launch", "r.yaml", *words, "--prepare", "---"]


def test_the_report_of_one_run_is_written(tiny_recipe: Path, tmp_path: Path, capsys) -> None:
    import synthetic_runs

    run = synthetic_runs.write_run(tmp_path / "runs", "tiny")
    synthetic_runs.write_lm_eval(run, skill=0.3)
    assert cli.main(["launch", str(tiny_recipe), "--stages", "report", "--prepare"]) == 0
    words = ["bash", str(LAUNCH / "job.sbatch"), capsys.readouterr().out.strip(), "report"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "report: " in done.stdout, done.stdout + done.stderr
    assert (run / "report.html").read_text().startswith("<!doctype html>")
