"""What became of jobs: Slurm's JSON in both of its forms, sacct, and the files a job leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes_lib import cli
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.slurm import watching
from recipes_lib.slurm.submission import LaunchFolder, all_launches
from recipes_lib.slurm.watching import states_of

NUMBER = {"set": True, "infinite": False}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchFolder:
    """A launch with a training of two arms and a report."""
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    made = LaunchFolder(tmp_path / "runs" / "study" / "slurm")
    made.path.mkdir(parents=True)
    rows = [
        {"label": "train", "stage": "train", "id": "7", "tasks": ["study--r8", "study--r32"]},
        {"label": "report", "stage": "report", "id": "9", "tasks": ["report"]},
    ]
    made.jobs_file.write_text(json.dumps({"format_version": 1, "profile": "here", "jobs": rows}))
    return made


def modern(state: str, task: int | None = None, **more: object) -> dict[str, object]:
    number = (
        {**NUMBER, "number": task}
        if task is not None
        else {"set": False, "infinite": False, "number": 0}
    )
    code = {"return_code": {**NUMBER, "number": 3 if state == "FAILED" else 0}}
    array = {**NUMBER, "number": 7 if task is not None else 0}
    record = {
        "job_state": [state],
        "array_job_id": array,
        "array_task_id": number,
        "nodes": "node1",
        "restart_cnt": 1,
        "exit_code": code,
    }
    return {**record, **more}


def test_scontrol_is_asked_first(folder: LaunchFolder, stand_in) -> None:
    jobs = {
        "7": [modern("RUNNING", 0), modern("FAILED", 1)],
        "9": [modern("PENDING", None, state_reason="Dependency")],
    }
    cases = "\n".join(
        f"  {job}) echo '{json.dumps({'jobs': records})}' ;;" for job, records in jobs.items()
    )
    stand_in("scontrol", f'case "$3" in\n{cases}\nesac')
    asked = stand_in("sacct", "exit 1")
    folder.log("train.1").touch()
    first, second, report = states_of(folder)
    assert (first.label, first.state, first.tries, first.explanation()) == (
        "train.0",
        "RUNNING",
        2,
        "on node1",
    )
    assert (second.state, second.exit_code, second.explanation()) == ("FAILED", 3, "exit code 3")
    assert report.explanation() == "waits for an earlier stage" and report.active
    assert not asked.exists()


def test_the_jobs_own_exit_code_wins_and_only_a_cancelled_follower_blames_an_earlier_stage(
    folder: LaunchFolder, stand_in
) -> None:
    """Slurm reports the code of the batch script's last command; the job writes that of the
    training.
    """
    jobs = {
        "7": [modern("FAILED", 0), modern("CANCELLED", 1)],
        "9": [modern("CANCELLED", None, state_reason="DependencyNeverSatisfied")],
    }
    cases = "\n".join(
        f"  {job}) echo '{json.dumps({'jobs': records})}' ;;" for job, records in jobs.items()
    )
    stand_in("scontrol", f'case "$3" in\n{cases}\nesac')
    for label in ("train.0", "train.1"):
        folder.log(label).touch()
    (folder.path / "train.0.exit_code").write_text("75")
    first, second, report = states_of(folder)
    assert (first.exit_code, first.explanation()) == (75, "exit code 75")
    assert second.explanation() == "" and report.explanation() == "an earlier stage did not succeed"


def test_the_json_of_older_versions_is_read_too(folder: LaunchFolder, stand_in) -> None:
    old = {
        "job_state": "COMPLETED",
        "array_job_id": 7,
        "array_task_id": 1,
        "nodes": "n",
        "restart_cnt": 0,
        "exit_code": 0,
    }
    stand_in(
        "scontrol",
        "echo"
        f" '{json.dumps({'jobs': [old, {**old, 'array_task_id': 0, 'job_state': 'TIMEOUT', 'exit_code': 256}]})}'",  # noqa: E501
    )
    states = states_of(folder)
    assert [state.state for state in states[:2]] == ["TIMEOUT", "COMPLETED"]
    assert states[0].exit_code == 1


def test_array_tasks_that_have_not_started_are_pending(folder: LaunchFolder, stand_in) -> None:
    waiting = modern("PENDING", None, state_reason="JobArrayTaskLimit") | {
        "array_job_id": {**NUMBER, "number": 7}
    }
    stand_in("scontrol", f"echo '{json.dumps({'jobs': [modern('RUNNING', 0), waiting]})}'")
    assert [state.state for state in states_of(folder)[:2]] == ["RUNNING", "PENDING"]


def test_sacct_answers_where_slurm_has_forgotten(folder: LaunchFolder, stand_in) -> None:
    stand_in("scontrol", "echo '{\"jobs\": []}'")
    stand_in(
        "sacct",
        'printf "7_0|CANCELLED by'
        ' 1000|0:15|node1\\n7_1|PREEMPTED|0:0|node2\\n7_1|COMPLETED|0:0|node2\\n9|FAILED|2:0|node3\\n"',  # noqa: E501
    )
    first, second, report = states_of(folder)
    assert (first.state, first.source) == ("CANCELLED", "sacct")
    assert (second.state, second.tries, second.succeeded) == ("COMPLETED", 2, True)
    assert (report.state, report.exit_code) == ("FAILED", 2)


def test_the_jobs_files_are_the_last_source(folder: LaunchFolder, stand_in) -> None:
    stand_in("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    stand_in("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    (folder.path / "train.0.exit_code").write_text("0\n")
    (folder.path / "train.1.exit_code").write_text("3\n")
    assert [(state.state, state.exit_code) for state in states_of(folder)] == [
        ("done", 0),
        ("failed", 3),
        ("unknown", None),
    ]


def test_status_shows_the_first_error_and_the_next_step(
    folder: LaunchFolder, stand_in, capsys
) -> None:
    stand_in(
        "scontrol", f"echo '{json.dumps({'jobs': [modern('FAILED', 0), modern('COMPLETED', 1)]})}'"
    )
    (folder.path / "train.0.errors").mkdir()
    (folder.path / "train.0.errors" / "200-rank0.txt").write_text(
        "rank 0 on node1: connection closed by peer\n"
    )
    (folder.path / "train.0.errors" / "100-rank3.txt").write_text(
        "rank 3 on node2: out of GPU memory\n"
    )
    folder.log("train.0").touch()
    assert cli.main(["launch", "status"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train.0: rank 3 on node2: out of GPU memory" in said and "closed by peer" not in said
    assert "train.0 (study--r8) failed" in said
    assert "next: recipes launch logs study --stage" in said


def test_a_failure_that_left_no_log_comes_with_the_likely_reason(
    folder: LaunchFolder, stand_in, capsys
) -> None:
    stand_in(
        "scontrol", f"echo '{json.dumps({'jobs': [modern('FAILED', 0), modern('FAILED', 1)]})}'"
    )
    folder.log("train.1").touch()
    assert cli.main(["launch", "status"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"exit code 3; left no log: does its node see {folder.path}? (directories.runs of the"
        " profile)" in said
    )
    assert said.count("left no log") == 1


def test_logs_show_the_first_error_before_the_log(folder: LaunchFolder, capsys) -> None:
    (folder.path / "train.0.errors").mkdir()
    (folder.path / "train.0.errors" / "100-rank3.txt").write_text(
        "rank 3 on node2: out of GPU memory\n"
    )
    folder.log("train.0").write_text("".join(f"line {number}\n" for number in range(100)))
    folder.log("report").write_text("\x1b[31mred\n")
    assert cli.main(["launch", "logs", "study", "--stage", "train", "--lines", "2"]) == 0
    said = capsys.readouterr().out
    assert (
        said.index("first error: rank 3") < said.index("line 98")
        and "line 97" not in said
        and "red" not in said
    )
    assert cli.main(["launch", "logs", "study"]) == 0
    assert "\\x1b[31mred" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["status", "cancel", "logs"])
def test_what_was_never_launched_is_named_with_what_was(
    folder: LaunchFolder, capsys, action: str
) -> None:
    assert cli.main(["launch", action, "stduy"]) == 2
    said = capsys.readouterr().err
    assert "nothing was launched as 'stduy'" in said and "launched: study" in said


def test_cancel_names_only_jobs_that_are_not_over(folder: LaunchFolder, stand_in, capsys) -> None:
    records = {"7": [modern("COMPLETED", 0), modern("COMPLETED", 1)], "9": [modern("RUNNING")]}
    cases = "\n".join(
        f"  {job}) echo '{json.dumps({'jobs': found})}' ;;" for job, found in records.items()
    )
    stand_in("scontrol", f'case "$3" in\n{cases}\nesac')
    calls = stand_in("scancel", "")
    assert cli.main(["launch", "cancel", "study"]) == 0
    assert calls.read_text().splitlines() == ["9", "---"]
    assert [one.name for one in all_launches()] == ["study"]


# what scontrol shows of a controller that is down, and exits 0
DOWN = """echo '{"jobs": [], "errors": []}'"""


def test_a_controller_that_does_not_answer_ends_no_wait(
    folder: LaunchFolder, stand_in, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = json.dumps(
        {"jobs": [modern("COMPLETED", 0), modern("COMPLETED", 1), modern("COMPLETED")]}
    )
    stand_in("sacct", "exit 1")
    stand_in("scontrol", DOWN, ping="DOWN")
    polls = []

    def comes_back(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 2:
            stand_in("scontrol", f"echo '{over}'")

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=comes_back))
    assert watching.wait(folder) == 0
    said = capsys.readouterr().out
    assert "train.0: unknown - Slurm gives no answer" in said and "every job succeeded" in said
    assert len(polls) == 2


def test_what_slurm_does_not_answer_is_neither_cancelled_nor_launched_again(
    folder: LaunchFolder, stand_in, capsys
) -> None:
    asked = stand_in("scontrol", DOWN, ping="DOWN")
    stand_in("sacct", "exit 1")
    cancelled = stand_in("scancel", "")
    assert cli.main(["launch", "cancel", "study"]) == 5
    said = capsys.readouterr()
    assert (
        "Slurm gives no answer" in said.err
        and "nothing was queued" not in said.out
        and not cancelled.exists()
    )
    with pytest.raises(EnvironmentFault, match="may still be queued"):
        watching.refuse_if_active(folder)
    folder.log("train.0").write_text("it runs\n")
    assert not asked.exists()  # scontrol would wait 18 s for each job
    assert cli.main(["launch", "status", "study"]) == 0
    said = capsys.readouterr().out
    assert said.count("Slurm gives no answer") == 3 and "next: recipes launch status study" in said


def test_the_next_step_is_one_that_works(folder: LaunchFolder, stand_in, capsys) -> None:
    stand_in("sacct", "exit 1")
    stand_in("scontrol", """echo '{"jobs": []}'""")
    assert cli.main(["launch", "status", "study"]) == 0
    said = capsys.readouterr().out
    assert said.count("Slurm has forgotten it, and it left no exit code: cancelled or killed") == 3
    assert "next: recipes launch RECIPE|STUDY --profile P" in said  # no job left a log to look at
    folder.log("train.1").write_text("killed\n")
    assert cli.main(["launch", "status", "study"]) == 0
    assert "next: recipes launch logs study --stage train.1" in capsys.readouterr().out


def test_a_cancelling_that_fails_is_said(folder: LaunchFolder, stand_in, capsys) -> None:
    stand_in("scontrol", f"echo '{json.dumps({'jobs': [modern('RUNNING', 0)]})}'")
    stand_in(
        "scancel",
        "echo 'scancel: error: Kill job error on job id 7: Unable to contact slurm controller' >&2;"
        " exit 1",
    )
    assert cli.main(["launch", "cancel", "study"]) == 5
    said = capsys.readouterr()
    assert "Slurm cannot be reached" in said.err and "cancelled" not in said.out
