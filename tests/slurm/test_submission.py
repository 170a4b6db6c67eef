"""Submitting without Slurm: programs that stand in for sbatch, scancel and scontrol."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recipes_lib import cli
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError
from recipes_lib.slurm.submission import LaunchFolder, all_launches

PROJECT = Path(__file__).resolve().parents[2]
REFUSE_SECOND = """
if [[ "$*" == */report.sbatch ]]; then
  echo "sbatch: error: invalid partition specified: cpu" >&2
  echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
  exit 1
fi
echo "17;cluster-a"
"""


@pytest.fixture
def launched(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile_file):
    """Calls `recipes launch` on the tiny recipe in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    profile = profile_file()

    def call(*words: str) -> int:
        return cli.main(
            ["launch", "tiny.yaml", "--profile", str(profile), "--accelerate", "single_gpu", *words]
        )

    return call


def test_a_chain_waits_stage_by_stage_and_the_ids_are_noted(
    launched, stand_in, tmp_path: Path, capsys
) -> None:
    calls = stand_in(
        "sbatch", 'n=$(grep -c -- "^---" "$(dirname "$0")/sbatch.calls"); echo "$((100 + n));here"'
    )
    assert launched("--stages", "train,report") == 0
    said = capsys.readouterr().out
    assert "train: job 101" in said and "report: job 102, after train" in said
    words = calls.read_text().splitlines()
    assert "--dependency=afterok:101" in words and "--kill-on-invalid-dep=yes" in words
    assert words[1] == str(tmp_path / "runs" / "tiny" / "slurm" / "train.sbatch")
    noted = json.loads((tmp_path / "runs" / "tiny" / "slurm" / "jobs.json").read_text())
    assert [(job["label"], job["id"]) for job in noted["jobs"]] == [
        ("train", "101"),
        ("report", "102"),
    ]


def test_the_errors_of_an_earlier_submission_are_not_those_of_this_one(
    launched, stand_in, tmp_path: Path, capsys
) -> None:
    stand_in("sbatch", "echo 5")
    stand_in("scontrol", """echo '{"jobs": [{"job_id": 5, "job_state": ["CANCELLED"]}]}'""")
    errors = tmp_path / "runs" / "tiny" / "slurm" / "train.errors"
    errors.mkdir(parents=True)
    (errors / "100-rank0.txt").write_text("out of GPU memory\n")
    assert launched("--stages", "train") == 0
    assert cli.main(["launch", "status", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "cancelled" in said and "out of GPU memory" not in said


def test_a_refused_later_stage_cancels_the_earlier_ones_and_names_the_profiles_line(
    launched, stand_in, tmp_path: Path, capsys
) -> None:
    stand_in("sbatch", REFUSE_SECOND)
    cancelled = stand_in("scancel", "")
    stand_in("sinfo", "echo gpu; echo gpu-long")
    assert launched("--stages", "train,report") == 2
    said = capsys.readouterr().err
    assert (
        "site.yaml:2: Slurm refuses the stage report: invalid partition specified: cpu; partition"
        " is cpu" in said
    )
    assert (
        "partitions here: gpu, gpu-long" in said
        and "nothing is queued: train had been accepted" in said
    )
    assert cancelled.read_text().splitlines() == ["17", "---"]
    assert not (tmp_path / "runs" / "tiny" / "slurm" / "jobs.json").exists()


def test_jobs_that_could_not_be_cancelled_again_are_said_and_kept(
    launched, stand_in, tmp_path: Path, capsys
) -> None:
    stand_in("sbatch", REFUSE_SECOND)
    stand_in("scancel", "echo 'scancel: error: Unable to contact slurm controller' >&2; exit 1")
    stand_in("sinfo", "echo gpu")
    assert launched("--stages", "train,report") == 2
    said = capsys.readouterr().err
    assert (
        "nothing is queued" not in said
        and "still queued: train" in said
        and "recipes launch cancel tiny" in said
    )
    (folder,) = all_launches()
    assert [job.label for job in folder.read_jobs()] == ["train"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            "sbatch: error: Unable to contact slurm controller (connect failure)",
            5,
            ["Slurm cannot be reached", "sinfo"],
        ),
        (
            (
                "sbatch: error: Batch job submission failed: Invalid account or account/partition"
                " combination specified"
            ),
            2,
            ["account is None"],
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid qos specification",
            2,
            ["qos is None"],
        ),
        (
            (
                "sbatch: error: Batch job submission failed: Requested time limit is invalid"
                " (missing or exceeds some limit)"
            ),
            2,
            ["site.yaml:"],
        ),
        (
            "sbatch: error: Invalid generic resource (gres) specification",
            2,
            ["gres is gpu:h100:{gpus}"],
        ),
        ("sbatch: error: something nobody foresaw", 2, ["something nobody foresaw"]),
        ("", 2, ["no reason given"]),
    ],
)
def test_every_refusal_is_one_line_with_a_remedy(
    launched, stand_in, capsys, error: str, code: int, words: list[str]
) -> None:
    stand_in("sbatch", f"echo '{error}' >&2; exit 1")
    stand_in("scancel", "")
    assert launched("--stages", "train") == code
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said


def test_without_slurm_the_message_says_what_to_do(
    launched, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert launched("--stages", "train") == 5
    said = capsys.readouterr().err
    assert (
        "sbatch is not on this machine" in said
        and "launch/local.sh" in said
        and "--dry-run" in said
    )


def test_a_controller_that_hangs_is_given_up_after_90_seconds(
    launched, stand_in, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    stand_in("sbatch", "sleep 600")
    run = subprocess.run

    def hurried(
        argv: list[str], timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        seconds = timeout if argv[0] != "sbatch" or timeout is None else timeout / 100
        return run(argv, timeout=seconds, **options)

    monkeypatch.setattr(subprocess, "run", hurried)
    assert launched("--stages", "train") == 5
    assert "sbatch gave no answer in 90 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "handed_on"), [("7", ["SLURM_CONF"]), (None, ["SLURM_CONF", "SLURM_TIME_FORMAT"])]
)
def test_within_a_job_only_what_tells_the_site_reaches_sbatch_and_elsewhere_every_setting(
    launched,
    stand_in,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    job: str | None,
    handed_on: list[str],
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_TIME_FORMAT": "relative",
        "SLURM_JOB_ID": job,
    }.items():
        if value:
            monkeypatch.setenv(name, value)
    stand_in("sbatch", f"compgen -e SLURM_ | sort > {tmp_path}/seen; echo 5")
    assert launched("--stages", "train") == 0
    assert (tmp_path / "seen").read_text().split() == handed_on


def test_values_that_look_like_flags_or_commands_reach_no_shell(
    launched, stand_in, tmp_path: Path
) -> None:
    calls = stand_in("sbatch", "echo 5")
    assert (
        launched(
            "--stages",
            "train",
            "run.notes=$(touch oops); `touch oops`",
            "run.tags=[--wrap=x, '; rm -rf y']",
        )
        == 0
    )
    folder = tmp_path / "runs" / "tiny" / "slurm"
    run = Recipe.read(folder / "recipe.json").run
    assert run.notes == "$(touch oops); `touch oops`"
    assert run.tags == ["--wrap=x", "; rm -rf y"]
    for text in ((folder / "train.sbatch").read_text(), calls.read_text()):
        assert "oops" not in text and "--wrap" not in text
    assert not (tmp_path / "oops").exists()


def test_what_a_script_asks_for_is_not_overruled_by_the_shell_that_submits(
    launched, stand_in, monkeypatch, tmp_path: Path
) -> None:
    for name in ("PARTITION", "TIMELIMIT", "MEM_PER_NODE", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "shell")
    stand_in("sbatch", f"env >> {tmp_path}/seen; echo 5")
    for words in ([], ["--test-only"]):
        (tmp_path / "seen").unlink(missing_ok=True)
        assert launched("--stages", "train", *words) == 0
        seen = [
            line
            for line in (tmp_path / "seen").read_text().splitlines()
            if line.startswith("SBATCH_")
        ]
        assert seen == ["SBATCH_ACCOUNT=shell"]  # the profile names none


def test_a_folder_with_a_line_break_in_its_name_is_refused(
    launched, stand_in, monkeypatch, capsys, tmp_path: Path
) -> None:
    calls = stand_in("sbatch", "echo 5")
    monkeypatch.setenv("RECIPES_RUNS_ROOT", f"{tmp_path}/a\ntouch oops")
    assert launched("--stages", "train") == 2
    assert "line break" in capsys.readouterr().err and not calls.exists()


def test_a_launch_that_is_queued_already_is_refused(launched, stand_in, capsys) -> None:
    stand_in("sbatch", "echo 5")
    stand_in(
        "scontrol",
        """echo '{"jobs": [{"job_id": 5, "job_state": ["PENDING"], "state_reason": "Priority"}]}'""",  # noqa: E501
    )
    assert launched("--stages", "train") == 0
    assert launched("--stages", "train") == 2
    said = capsys.readouterr().err
    assert (
        "'tiny' is launched already: train is pending (job 5)" in said
        and "recipes launch cancel tiny" in said
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stages", "trian"], ["no stage 'trian'", "stages: train, eval, report"]),
        (["--stages", ","], ["no stage is named"]),
        (["--stages", "eval"], ["is not there, so there is nothing to evaluate"]),
        (["--gpus", "0"], ["expected a whole number >= 1"]),
        (["--gpus", "3", "--accelerate", "ddp"], ["cannot be made of micro-batches"]),
        (["--accelerate", "dpd"], ["did you mean ddp?"]),
        (["another.yaml"], ["'another.yaml' is neither an option nor section.key=value"]),
        (["train.learning_rte=1"], ["did you mean train.learning_rate?"]),
        (
            ["--partition=x"],
            ["--partition is no option of recipes launch", "site.yaml", "extra_sbatch"],
        ),
    ],
)
def test_a_wrong_launch_says_what_is_wrong(
    launched, capsys, words: list[str], told: list[str]
) -> None:
    assert launched(*words) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in told), said


def test_a_report_without_an_evaluation_is_refused_or_said_before(
    launched, tmp_path: Path, capsys
) -> None:
    assert launched("--stages", "train,report", "--dry-run") == 0
    assert "warning: no evaluation comes before the report" in capsys.readouterr().out
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "run.json").write_text(
        json.dumps({"format_version": 1, "name": "tiny", "state": "finished"})
    )
    assert launched("--stages", "report", "--dry-run") == 2
    assert "run 'tiny' has no evaluation to report" in capsys.readouterr().err
    (run / "evals" / "alpaca_eval").mkdir(parents=True)
    (run / "evals" / "alpaca_eval" / "result.json").write_text("{}")
    assert launched("--stages", "report", "--dry-run") == 0
    assert launched("--stages", "train,report", "--dry-run") == 0
    assert "warning: no evaluation" not in capsys.readouterr().out


def test_a_folder_is_no_study_of_that_name(capsys) -> None:
    assert cli.main(["launch", "recipes/quickstart", "--profile", "example", "--dry-run"]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_profile_is_asked_for_by_name(tiny_recipe: Path, capsys) -> None:
    assert cli.main(["launch", str(tiny_recipe)]) == 2
    assert "--profile is missing" in capsys.readouterr().err


def test_the_time_of_a_training_is_the_plans_where_that_is_shorter(
    profile_file, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    words = ["launch", "llama2-7b-dolly/qlora-r8", "--stages", "train", "--dry-run", "--profile"]
    assert cli.main([*words, str(profile_file('time: "3-00:00:00"', "gpu: h100-80gb"))]) == 0
    assert "--time=3-00:00:00" not in capsys.readouterr().out
    assert (
        cli.main(
            [*words, str(profile_file('time: "00:10:00"', "gpu: h100-80gb", "signal_lead_s: 60"))]
        )
        == 0
    )
    assert "--time=00:10:00" in capsys.readouterr().out
    assert (
        cli.main(
            [
                *words,
                str(profile_file('time: "3-00:00:00"', "gpu: h100-80gb", "signal_lead_s: 86400")),
            ]
        )
        == 0
    )
    assert (
        "--time=2-00:00:00" in capsys.readouterr().out
    )  # asked to save halfway, as in a profile, and not before it has begun


def test_the_lines_of_a_dry_run_can_be_pasted_into_bash(
    launched, stand_in, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = ["--stages", "train,report", "run.notes=it's $HOME"]
    monkeypatch.setattr("sys.argv", ["recipes", "launch", "tiny.yaml", *words, "--dry-run"])
    assert launched(*words, "--dry-run") == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if not line.startswith("#")]
    assert lines[0].endswith(" --prepare") and "--dry-run" not in lines[0] and len(lines) == 3
    calls = stand_in(
        "sbatch", 'n=$(grep -c -- "^---" "$(dirname "$0")/sbatch.calls"); echo "$((100 + n))"'
    )
    assert launched(*words, "--prepare") == 0 and all_launches() == []
    printed = f"recipes() {{ :; }}\n{printed}"  # the scripts are written already
    subprocess.run(["bash", "-euc", printed], check=True, timeout=60)
    pasted = calls.read_text()
    calls.unlink()
    (folder,) = all_launches()
    assert [(job.label, job.id) for job in folder.read_jobs()] == [
        ("train", "101"),
        ("report", "102"),
    ]
    folder.jobs_file.unlink()  # as if nothing were queued
    assert launched(*words) == 0
    assert pasted == calls.read_text() and "--dependency=afterok:101" in pasted


def test_prepare_with_a_profile_writes_every_stage_that_was_asked_for(
    launched, tmp_path: Path, capsys
) -> None:
    assert (
        launched(
            "--prepare", "--evals", str(PROJECT / "evals/quickstart/lm_eval.yaml"), "run.notes=mine"
        )
        == 0
    )
    folder = Path(capsys.readouterr().out.strip())
    # an override behind --evals is none of the evals
    assert Recipe.read(folder / "recipe.json").run.notes == "mine"
    assert (folder / "order").read_text().split() == ["train", "eval-quickstart--lm_eval", "report"]
    assert all("conda activate ml ||" in script.read_text() for script in folder.glob("*.sbatch"))


def test_a_judge_that_is_expected_on_the_machine_is_started_by_the_job(
    profile_file, stand_in, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    words = ["launch", "llama2-7b-dolly/qlora-r8", "--dry-run", "--profile"]
    assert cli.main([*words, str(profile_file())]) == 0
    said = capsys.readouterr().out
    assert (
        "warning: no job starts the judge that alpaca_eval and mt_bench expect at"
        " http://127.0.0.1:8000/v1: set vllm" in said
    )
    assert "with_judge.sh" not in said
    assert cli.main([*words, str(profile_file("vllm: ~/vllm/bin/vllm"))]) == 0
    assert "there is no ~/vllm/bin/vllm here" in capsys.readouterr().out
    vllm = profile_file(f"vllm: {stand_in('vllm', '').with_suffix('')}")
    assert cli.main([*words, str(vllm)]) == 0
    said = re.sub(r" \\\n# *", " ", capsys.readouterr().out)
    served = [
        line
        for line in said.splitlines()
        if "with_judge.sh prometheus-eval/prometheus-7b-v2.0" in line
    ]
    assert len(served) == 2 and "no job starts" not in said
    assert all("--max-model-len 4096 -- python -m recipes_lib.cli eval" in line for line in served)
    study = ["launch", "recipes/studies/lora-rank.yaml", "--dry-run", "--profile", str(vllm)]
    assert cli.main(study) == 0
    served = [
        line
        for line in re.sub(r" \\\n# *", " ", capsys.readouterr().out).splitlines()
        if "with_judge.sh" in line
    ]
    assert len(served) == 1 and "judgments.alpaca_eval" in served[0]


def test_damaged_notes_of_one_submission_are_named_and_hide_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    for name, content in (
        ("good", b'{"jobs": [{"label": "train", "id": "7"}]}'),
        ("torn", b'{"jobs": [{"la'),
        ("bytes", b"\xff"),
    ):
        folder = tmp_path / "runs" / name / "slurm"
        folder.mkdir(parents=True)
        (folder / "jobs.json").write_bytes(content)
    assert [folder.name for folder in all_launches()] == ["good"]
    said = capsys.readouterr().err
    assert (
        said.count("left out") == 2
        and "torn/slurm/jobs.json" in said
        and "bytes/slurm/jobs.json" in said
    )
    with pytest.raises(DataError, match="is damaged"):
        LaunchFolder(tmp_path / "runs" / "torn" / "slurm").read_jobs()
