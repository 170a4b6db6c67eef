"""The script of a job, run without Slurm: clean shell, true exit codes, and no value is ever read
as shell.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.study.study_files import write_tiny_study

from recipes_lib import cli
from recipes_lib.slurm.jobs import Job, JobSize, Task
from recipes_lib.slurm.profile import load_profile
from recipes_lib.slurm.submission import directives, script_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def shellcheck(*words: str | Path) -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "shellcheck is missing: apt-get install shellcheck"
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck(script)


def test_shellcheck_finds_nothing_in_the_scripts_of_jobs(
    profile_file, tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    """A training on several nodes, evaluations with a judge, an array of arms; SC2016: what stands
    in single quotes, a node expands.
    """
    odd = tmp_path / "it's $HOME"
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(odd / "runs"))
    profile = profile_file(
        "environment: {modules: [cuda, 'a b'], conda: ml, srun: ['--container-image=x y']}",
        "vllm: /opt/my vllm",
        "gres: null",
    )
    several = [
        "--accelerate",
        "ddp_cpu",
        "--nodes",
        "2",
        "--gpus",
        "2",
        "--evals",
        str(LAUNCH.parent / "evals" / "mt_bench.yaml"),
    ]
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    for words in (
        [
            "quickstart/lora-r8",
            *several,
            "run.notes=it's $HOME `x`",
            "run.tags=[--wrap=x]",
            "train.per_device_train_batch_size=2",
        ],
        [str(study)],
    ):
        assert (
            cli.main(
                [
                    "launch",
                    *words,
                    "--profile",
                    str(profile),
                    "--prepare",
                    "--stages",
                    "train,eval,report",
                ]
            )
            == 0
        )
    scripts = sorted((odd / "runs").glob("*/slurm/*.sbatch"))
    assert [script.stem for script in scripts if script.stem.startswith("train")] == [
        "train",
        "train",
    ] and len(scripts) == 9
    shellcheck("-x", "--exclude=SC2016", *scripts)


@pytest.fixture
def job(tmp_path: Path, profile_file):
    """Runs the script of a stage of one command."""

    def run(
        stage: str,
        *words: str,
        check: tuple[str, ...] = (),
        processes: int = 1,
        setup: str = "true",
        **environment: str,
    ) -> tuple[int, str]:
        profile = load_profile(str(profile_file(f"environment: {{setup: [{setup!r}]}}")))
        shape = JobSize(
            processes=processes,
            uses_gpus=False,
            distributed_type="MULTI_GPU" if processes > 1 else "NO",
        )
        script = script_of(Job(stage, stage, (Task((), words, check),), shape), tmp_path, profile)
        (tmp_path / f"{stage}.sbatch").write_text(script)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        argv = ["bash", str(tmp_path / f"{stage}.sbatch")]
        done = subprocess.run(
            argv,
            env={**plain, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        return done.returncode, done.stdout + done.stderr

    monkeypatched = pytest.MonkeyPatch()
    monkeypatched.chdir(tmp_path)
    yield run
    monkeypatched.undo()


def test_the_script_of_a_training_is_what_one_would_write(
    tmp_path: Path, profile_file, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", "/scratch/runs")
    monkeypatch.setenv("RECIPES_CACHE", "/scratch/cache")
    monkeypatch.chdir("/")
    launcher = (
        "python",
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "fsdp.yaml",
        "--num_processes",
        "16",
        "--num_machines",
        "2",
    )
    task = Task(
        launcher,
        ("-m", "recipes_lib.train", "mine.yaml", "run.notes=it's"),
        ("python", "-m", "recipes_lib.cli", "verify", "mine"),
    )
    job = Job("train", "train", (task,), JobSize(2, 8, True, "FSDP"))
    profile = load_profile(str(profile_file("extra_sbatch: ['--constraint=a&b']")))
    text = script_of(job, Path("/scratch/runs/mine/slurm"), profile).replace(str(LAUNCH), "LAUNCH")
    golden = Path(__file__).parent / "golden" / "train.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_slurm_reads_a_directive_as_it_was_meant(profile_file) -> None:
    """Quotes as in bash, but a backslash takes the next character as it is, within quotes too."""
    profile = load_profile(str(profile_file(r"extra_sbatch: ['--comment=back\slash']")))
    task = Task(("true",), ())
    lines = directives(Job("report", "report", (task,)), Path("/a b/it's #1"), profile)
    assert all(line.startswith("#SBATCH ") for line in lines)
    words = [shlex.split(line.removeprefix("#SBATCH ").replace("\\\\", "\\")) for line in lines]
    assert words[2][-1:] == [r"--comment=back\slash"]
    assert words[-1] == ["--output=/a b/it's #1/report.log"]


def test_a_node_that_does_not_see_the_folder_of_the_runs_is_exit_5(job, tmp_path: Path) -> None:
    assert job("eval", "true")[0] == 0
    text = (
        (tmp_path / "eval.sbatch")
        .read_text()
        .replace(f"FOLDER={tmp_path}", f"FOLDER={tmp_path}/elsewhere/slurm")
    )
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 5 and f"this node does not see {tmp_path}/elsewhere/slurm" in done.stderr
    )


def test_a_command_is_an_argument_list_not_a_line_of_shell(job, tmp_path: Path) -> None:
    code, said = job(
        "eval",
        "printf",
        "%s|",
        "$(touch oops)",
        "a  b",
        "'; touch oops",
        "--foo",
        "*",
        "a\nb\\n",
        "$HEAD",
    )
    assert code == 0 and "$(touch oops)|a  b|'; touch oops|--foo|*|a\nb\\n|$HEAD|" in said
    assert not (tmp_path / "oops").exists()
    assert (tmp_path / "eval.exit_code").read_text() == "0\n"


def test_the_sites_environment_reaches_the_command_and_a_failing_one_is_exit_5(
    job, tmp_path: Path
) -> None:
    assert "yes" in job("eval", "printenv", "FROM_SITE", setup="export FROM_SITE=yes")[1]
    code, said = job("eval", "touch", "ran", setup="module load nothing")
    number = (tmp_path / "eval.sbatch").read_text().splitlines().index(
        "module load nothing || environment_failed"
    ) + 1
    assert (
        code == 5
        and f"the site's environment failed: line {number} of {tmp_path}/eval.sbatch" in said
    )
    assert not (tmp_path / "ran").exists()
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
    """.strip()  # noqa: E501
    code, said = job("train", "bash", "-c", script)
    assert code == 1 and "first error: rank 3: out of memory" in said and "late" not in said


def test_a_stopped_training_without_slurm_says_that_it_can_be_continued(job) -> None:
    code, said = job("train", "bash", "-c", 'echo 75 > "$RECIPES_EXIT_CODE_FILE"')
    assert code == 75 and "launch it again to continue" in said


def test_usr2_asks_a_training_until_it_listens(job, tmp_path: Path) -> None:
    # bash cannot trap a signal that was ignored when it started; python can, as the training does
    python = (
        "import os, signal, time, pathlib, sys\nos.kill(os.getppid(),"
        " signal.SIGUSR2)\ntime.sleep(1)\ndef save(*_):\n   "
        " pathlib.Path(os.environ['RECIPES_EXIT_CODE_FILE']).write_text('75');"
        " sys.exit(0)\nsignal.signal(signal.SIGUSR2, save)\ntime.sleep(30)\n"
    )
    (tmp_path / "stop.py").write_text(python)
    code, said = job("train", "python3", "stop.py")
    assert code == 75 and "USR2" in said


@pytest.mark.parametrize(("by", "queued_again"), [("USR2", True), ("TERM", False)])
def test_a_training_that_saved_is_queued_again_after_usr2_and_never_after_term(
    job, tmp_path: Path, stand_in, by, queued_again
) -> None:
    """TERM means that Slurm ends the job: a preemption queues it again by itself, after scancel it
    must stay away.
    """
    stand_in("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    answers = (
        'case "$*" in "show host"*) echo localhost ;; "show job"*) echo "JobId=7 Requeue=1'
        ' Restarts=0 B=1" ;; *) exit 1 ;; esac'
    )
    calls = stand_in("scontrol", answers)
    (tmp_path / "stop.py").write_text(
        "import os, signal, time, pathlib, sys\ndef save(*_):\n   "
        " pathlib.Path(os.environ['RECIPES_EXIT_CODE_FILE']).write_text('75');"
        " sys.exit(75)\nsignal.signal(signal.SIGUSR2, save)\nos.kill(os.getppid(),"
        f" signal.SIG{by})\ntime.sleep(30 if {by!r} == 'USR2' else 1); save()\n"
    )
    code, said = job(
        "train",
        "python3",
        "stop.py",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="localhost",
        SLURM_NNODES="1",
    )
    assert code == 75 and ("saved; back into the queue" in said) is queued_again, said
    assert ("requeue" in calls.read_text().splitlines()) is queued_again


def test_a_task_of_an_array_asks_slurm_about_itself_alone(job, stand_in, tmp_path: Path) -> None:
    """The last task bears the number of the array, by which Slurm shows every task: its exit code
    was lost, and a requeue took all.
    """
    stand_in("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    one, both = "echo 'JobId=7 Restarts=0 B=1'", "printf 'JobId=%s Restarts=0 B=1\\n' 8 7"
    stand_in(
        "scontrol",
        f'case "$*" in "show host"*) echo localhost ;; "show job 7_1 "*) {one} ;; "show job"*)'
        f" {both} ;; *) exit 1 ;; esac",
    )
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    code, said = job("eval", "true", SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1", **array)
    assert code == 0 and "taken over" not in said, said
    assert (tmp_path / "eval.1.exit_code").read_text() == "0\n"


def test_a_controller_that_does_not_answer_says_nothing_of_a_later_try(
    job, stand_in, tmp_path: Path
) -> None:
    stand_in("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    stand_in("scontrol", 'case "$*" in "show host"*) echo localhost ;; *) exit 1 ;; esac')
    assert (
        job("eval", "true", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1")[0]
        == 0
    )
    assert (tmp_path / "eval.exit_code").read_text() == "0\n"


@pytest.mark.parametrize(
    ("processes", "given", "threads"),
    [
        (1, {"SLURM_CPUS_PER_TASK": "8"}, "8"),
        (8, {"SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8"}, "8"),
        (2, {"SLURM_CPUS_PER_TASK": "1"}, "1"),
        (2, {"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "3"}, "3"),
        (1, {}, "1"),
    ],
)
def test_each_process_takes_its_share_of_the_tasks_cores(
    job, stand_in, monkeypatch, processes: int, given, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stand_in("scontrol", "echo localhost")
    stand_in("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    code, said = job(
        "eval",
        "printenv",
        "OMP_NUM_THREADS",
        processes=processes,
        SLURM_JOB_ID="5",
        SLURM_JOB_NODELIST="localhost",
        **given,
    )
    assert code == 0 and f"\n{threads}\n" in said, said


def test_without_slurm_the_number_of_threads_is_not_touched(
    job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert job("eval", "printenv", "OMP_NUM_THREADS")[0] == 1


@pytest.mark.parametrize("script", ["local.sh", "sandbox.sh", "vllm_server.sh"])
def test_a_script_says_how_it_is_used(script: str) -> None:
    done = subprocess.run([LAUNCH / script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and not done.stderr


def test_a_script_refuses_another_number_of_nodes_than_it_is_written_for(
    job, stand_in, tmp_path: Path
) -> None:
    stand_in("scontrol", "echo localhost")
    code, said = job(
        "train", "touch", "ran", SLURM_JOB_ID="5", SLURM_JOB_NODELIST="localhost", SLURM_NNODES="2"
    )
    assert (
        code == 2
        and "written for 1 node(s) and Slurm gave 2" in said
        and not (tmp_path / "ran").exists()
    )


@pytest.mark.parametrize(
    ("second", "code", "ran"), [("exit 0", 0, ["0", "1", "2"]), ("exit 6", 6, ["0", "1"])]
)
def test_local_runs_the_tasks_in_order_and_stops_at_the_first_that_fails(
    stand_in, tmp_path: Path, second: str, code: int, ran
) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "order").write_text("arms 0\narms 1\nreport\n")
    (folder / "arms.sbatch").write_text(
        f"echo $SLURM_ARRAY_TASK_ID >> {folder}/ran\n[ $SLURM_ARRAY_TASK_ID = 0 ] && echo was first"
        f" && exit 0\n{second}\n"
    )
    (folder / "report.sbatch").write_text(f"echo 2 >> {folder}/ran; echo task:$SLURM_ARRAY_TASK_ID")
    calls = stand_in("recipes", f"echo {folder}")
    done = subprocess.run(
        ["bash", LAUNCH / "local.sh", "r.yaml", "run.notes=$(x)"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert (folder / "ran").read_text().split() == ran
    assert calls.read_text().splitlines() == [
        "launch",
        "r.yaml",
        "run.notes=$(x)",
        "--stages",
        "train,eval,report",
        "--prepare",
        "---",
    ]
    assert "was first" in (folder / "arms.0.log").read_text()


@pytest.mark.parametrize("words", [["--stages", "train"], ["--stages=train"]], ids=" ".join)
def test_local_keeps_the_stages_that_were_asked_for(
    stand_in, tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "order").touch()
    calls = stand_in("recipes", f"echo {tmp_path}")
    subprocess.run(["bash", LAUNCH / "local.sh", "r.yaml", *words], check=True, timeout=60)
    assert calls.read_text().splitlines() == ["launch", "r.yaml", *words, "--prepare", "---"]


def test_the_report_of_one_run_is_written(tiny_recipe: Path, tmp_path: Path, capsys) -> None:
    import synthetic_runs

    run = synthetic_runs.write_run(tmp_path / "runs", "tiny")
    synthetic_runs.write_lm_eval(run, skill=0.3)
    assert cli.main(["launch", str(tiny_recipe), "--stages", "report", "--prepare"]) == 0
    words = ["bash", f"{capsys.readouterr().out.strip()}/report.sbatch"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "report: " in done.stdout, done.stdout + done.stderr
    assert (run / "report.html").read_text().startswith("<!doctype html>")
