"""The script of a job, run without Slurm: clean shell, true exit codes, no value read as shell."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib.jobs.jobs import Job, Task
from recipes_lib.slurm.profile import load_profile
from recipes_lib.slurm.script import directives, script_of

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def test_shellcheck_finds_nothing_in_our_scripts_and_in_those_of_jobs(
    profile_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes
) -> None:
    """SC2016: what stands in single quotes, a node expands."""
    odd = tmp_path / "it's $HOME"
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(odd / "runs"))
    profile = profile_file(sbatch={"comment": r"back\\slash"}, setup=["true"])
    words = ["quickstart/lora-r8", "--accelerate", "ddp_cpu", "--nodes", 2, "--gpus", 2]
    words += ["train.per_device_train_batch_size=2", "run.notes=it's $HOME", "run.tags=[--wrap=x]"]
    assert recipes("launch", *words, "--profile", profile, "--prepare")[0] == 0
    scripts = sorted((odd / "runs").glob("*/slurm/*.sbatch"))
    assert len(scripts) == 5
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "shellcheck is missing: apt-get install shellcheck"
        pytest.skip("shellcheck is not installed")
    for command in (["-x", "--exclude=SC2016", *scripts], sorted(LAUNCH.glob("*.sh"))):
        done = subprocess.run(["shellcheck", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def job(tmp_path: Path, profile_file, monkeypatch: pytest.MonkeyPatch):
    """Runs the script of a stage of one command."""
    monkeypatch.chdir(tmp_path)

    def run(
        stage: str, *words: str, setup: str = "true", label: str = "", **environment: str
    ) -> tuple[int, str]:
        profile = load_profile(str(profile_file(setup=[setup])))
        single = Job(label or stage, stage, (Task((), words),), uses_gpus=False)
        script = tmp_path / f"{stage}.sbatch"
        script.write_text(script_of(single, tmp_path, profile))
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment, command = {**plain, **environment}, ["bash", str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def in_slurm(stand_in):
    """Puts srun and scontrol in place, and returns the variables of a job on one node."""

    def variables(answers: str = "*) exit 1 ;;", **more: str) -> dict[str, str]:
        stand_in("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
        stand_in("scontrol", f'case "$*" in "show host"*) echo localhost ;; {answers} esac')
        node = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
        return {"SLURM_JOB_ID": "7", **node, **more}

    return variables


def test_slurm_reads_a_directive_as_it_was_meant(profile_file) -> None:
    """Quotes as in bash, but a backslash takes the next character as it is, within quotes too."""
    sbatch = {"comment": "back\\slash", "licenses": "$(touch oops)&b"}
    profile = load_profile(str(profile_file(sbatch=sbatch)))
    job = Job("report", "report", (Task(("true",), ()),), uses_gpus=False)
    lines = directives(job, Path("/a b/it's #1"), profile)
    assert all(line.startswith("#SBATCH ") for line in lines)
    words = [shlex.split(line.removeprefix("#SBATCH ").replace("\\\\", "\\")) for line in lines]
    assert ["--comment=back\\slash"] in words and ["--licenses=$(touch oops)&b"] in words
    assert ["--output=/a b/it's #1/report.log"] in words
    assert ["--signal=B:USR2@300"] in words and ["--requeue"] in words


def test_ranks_meet_at_a_port_of_nobody_else_on_as_many_nodes_as_the_script_is_written_for(
    job, in_slurm, tmp_path: Path
) -> None:
    """Issue: ports up to 39,999 reached into the range from 32,768 that Linux hands out."""
    for number in ("1", "19999", "4294967"):
        code, said = job("eval", "printenv", "PORT", **{**in_slurm(), "SLURM_JOB_ID": number})
        port = int(next(line for line in said.splitlines() if line.isdigit()))
        assert code == 0 and 10_000 <= port < 32_768, port
    code, said = job("train", "touch", "ran", **{**in_slurm(), "SLURM_NNODES": "2"})
    assert code == 2 and "written for 1 node(s), but Slurm gave 2" in said
    assert not (tmp_path / "ran").exists()


def test_a_command_is_no_line_of_shell_and_the_sites_environment_reaches_it_or_is_exit_5(
    job, tmp_path: Path
) -> None:
    odd = ("$(touch oops)", "a  b", "'; touch oops", "--foo", "*", "a\nb\\n", "$HEAD")
    code, said = job("eval", "printf", "%s|", *odd)
    assert code == 0 and "|".join(odd) in said and not (tmp_path / "oops").exists()
    assert (tmp_path / "eval.exit_code").read_text() == "0\n"
    for stage in ("eval", "train"):  # an eval's or an accelerate config's file may have any name
        label = f"{stage}-my own (2)"
        job(stage, "true", label=label)
        assert (tmp_path / f"{label}.exit_code").is_file()
    assert "yes" in job("eval", "printenv", "FROM_SITE", setup="export FROM_SITE=yes")[1]
    code, said = job("eval", "touch", "ran", setup="module load nothing")
    script = (tmp_path / "eval.sbatch").read_text()
    number = script.splitlines().index("module load nothing || environment_failed") + 1
    assert code == 5 and f"setup failed: line {number} of {tmp_path}/eval.sbatch" in said
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "eval.exit_code").read_text() == "5\n"
    elsewhere = script.replace(f"FOLDER={tmp_path}", f"FOLDER={tmp_path}/elsewhere/slurm")
    done = subprocess.run(["bash", "-c", elsewhere], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert f"this node cannot see {tmp_path}/elsewhere/slurm" in done.stderr


def test_the_code_of_a_training_is_the_one_it_left_and_none_is_a_failure(job) -> None:
    """Where it ended well and left no word, a save may have been cut."""
    leave = 'echo {} > "$RECIPES_EXIT_CODE_FILE"; exit {}'
    node_1 = 'echo 3 > "${RECIPES_EXIT_CODE_FILE%0}1"; '
    cases = [
        (leave.format(3, 0), 3, "exit code 3"),
        (leave.format(0, 0), 0, "exit code 0"),
        ("true", 1, "exit code 1"),
        ("kill -9 $$", 137, "exit code 137"),
        (leave.format(75, 0), 75, "launch it again to continue"),
        (node_1 + leave.format(75, 0), 3, "exit code 3"),
    ]
    wrong = []
    for script, expected, words in cases:
        code, said = job("train", "bash", "-c", script)
        if code != expected or words not in said or "late" in said:
            wrong.append((script, code, said))
    assert not wrong


# bash cannot trap a signal that was ignored when it started; python can, as the training does
STOPS = """
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path(os.environ["RECIPES_EXIT_CODE_FILE"]).write_text("75")
    sys.exit(75)
"""


def test_a_training_that_saved_is_queued_again_after_usr2_and_never_after_term(
    job, tmp_path: Path, in_slurm
) -> None:
    """USR2 is sent until the training listens. TERM means that Slurm ends the job: a preemption
    queues it again by itself, after scancel it must stay away.
    """
    # how often Slurm has queued it again, preemptions included; how often it asked for that itself
    cases = [("USR2", 0, 0, True), ("USR2", 30, 19, True), ("USR2", 30, 20, False)]
    for by, restarts, own_requeues, queued_again in (*cases, ("TERM", 0, 0, False)):
        (tmp_path / "train.requeues").write_text(f"{own_requeues}\n")
        shown = f'"show job"*) echo "JobId=7 Requeue=1 Restarts={restarts} B=1" ;; *) exit 1 ;;'
        listen = "signal.signal(signal.SIGUSR2, save)"
        stop = f"os.kill(os.getppid(), signal.SIG{by}); time.sleep(1)"
        program = f"{STOPS}{stop}\n{listen}\ntime.sleep({30 if by == 'USR2' else 0})\nsave()\n"
        (tmp_path / "stop.py").write_text(program)
        variables = in_slurm(shown, SLURM_RESTART_COUNT=str(restarts))
        code, said = job("train", "python3", "stop.py", **variables)
        assert code == 75 and ("saved; requeueing" in said) is queued_again, said
        calls = tmp_path / "bin" / "scontrol.calls"
        assert ("requeue" in calls.read_text().splitlines()) is queued_again
        calls.unlink()
        if queued_again:
            assert (tmp_path / "train.requeues").read_text() == f"{own_requeues + 1}\n"


def test_a_task_of_an_array_asks_slurm_about_itself_alone(job, in_slurm, tmp_path: Path) -> None:
    """The last task bears the number of the array, by which Slurm shows every task: its exit code
    was lost, and a requeue took all.
    """
    one, both = "echo 'JobId=7 Restarts=0 B=1'", "printf 'JobId=%s Restarts=0 B=1\\n' 8 7"
    answers = f'"show job 7_1 "*) {one} ;; "show job"*) {both} ;; *) exit 1 ;;'
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert job("eval", "true", **in_slurm())[0] == 0  # no answer says nothing of a later try
    code, said = job("eval", "true", **in_slurm(answers, **array))
    assert code == 0 and "taken over" not in said, said
    assert (tmp_path / "eval.1.exit_code").read_text() == "0\n"


def test_processes_of_a_job_are_told_its_name_and_how_often_it_was_queued_again(
    job, in_slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By no variable of Slurm's: a second scheduler says it the same way."""
    shown = '"show job"*) echo "JobId=7 Restarts=2 B=1" ;; *) exit 1 ;;'
    variables = in_slurm(shown, SLURM_RESTART_COUNT="2")
    monkeypatch.setenv("RECIPES_JOB", "of the job that submitted this one")
    code, said = job("eval", "printenv", "RECIPES_JOB", "RECIPES_JOB_RESTARTS", **variables)
    assert code == 0 and "\nSlurm job 7\n2\n" in said, said
    announce = "from recipes_lib.cli import announce_slurm_job; announce_slurm_job(); import os; "
    words = [sys.executable, "-c", f"{announce}print(os.environ['RECIPES_JOB'])"]
    done = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout == "Slurm job 7\n", done.stderr
