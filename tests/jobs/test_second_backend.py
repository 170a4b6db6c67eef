"""A second scheduler needs nothing but a site and a backend: a toy one, which runs tasks at once as
processes of this machine, fits without a change in `jobs`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.study.study_files import write_tiny_study

from recipes_lib.commands.cluster import cancel, show_status
from recipes_lib.core.errors import RecipeError
from recipes_lib.jobs import records
from recipes_lib.jobs.jobs import Backend, Job, Plan, Site
from recipes_lib.jobs.planner import Planner
from recipes_lib.jobs.records import TaskState
from recipes_lib.study.needs import Host

PROJECT = Path(__file__).resolve().parents[2]


@dataclass
class Here:
    """This machine as a site."""

    scheduler: str = "toy"
    python: tuple[str, ...] = (sys.executable, "-m", "tests.jobs.toy_python")
    vllm: str | None = None
    max_concurrent_arms: int | None = None
    has_gpus: bool = False
    largest_array: int | None = 2
    host: Host = field(default_factory=Host)

    def error(self, what: str, *hints: str) -> RecipeError:
        return RecipeError(what, *hints)

    def doubts(self, jobs: Sequence[Job]) -> Iterator[str]:
        yield f"warning: {len(jobs)} jobs on one machine"


@dataclass
class AtOnce:
    """Runs each job when it is submitted, so that those it waits for have ended."""

    scheduler: str = "toy"
    cancelled: list[str] = field(default_factory=list)

    def prepare(self, plan: Plan) -> None:
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.write_recipes()
        records.write_jobs(plan, {})

    def preview(self, plan: Plan) -> Iterator[str]:
        for job in plan.jobs:
            yield f"{job.label}: {len(job.tasks)}"

    def submit(self, plan: Plan) -> dict[str, str]:
        self.prepare(plan)
        ids: dict[str, str] = {}
        failed: set[str] = set()
        for number, job in enumerate(plan.jobs, 1):
            ids[job.label] = str(number)
            if failed.intersection(job.after) or not self._run(job, plan.folder):
                failed.add(job.label)
        records.write_jobs(plan, ids)
        return ids

    def _run(self, job: Job, folder: Path) -> bool:
        codes = []
        for number, task in enumerate(job.tasks):
            label = f"{job.label}.{number}" if len(job.tasks) > 1 else job.label
            code = subprocess.run([*task.launcher, *task.args]).returncode
            (folder / f"{label}.exit_code").write_text(f"{code}\n")
            codes.append(code)
        return not any(codes)

    def states(self, folder: Path) -> list[TaskState]:
        tasks = records.submitted_tasks(folder)
        for task in tasks:
            records.read_end(folder, task)
        records.cancel_what_cannot_start(tasks)
        return tasks

    def cancel(self, job_ids: Sequence[str]) -> None:
        self.cancelled.extend(job_ids)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), *sys.path]))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    (tmp_path / "no-model").mkdir()
    return write_tiny_study(tmp_path / "study", tmp_path / "no-model")


def test_a_study_runs_under_a_second_scheduler_and_its_failures_are_told(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    site: Site = Here()
    backend: Backend = AtOnce()
    plan = Planner(site=site, overrides=["seeds=[1, 2]"]).plan(str(study))
    assert plan.warnings[-1] == "warning: 3 jobs on one machine"
    assert list(backend.preview(plan)) == ["train-1: 2", "train-2: 2", "eval: 1"]
    monkeypatch.setenv("FAIL", "r8--seed1")
    monkeypatch.setenv("CODE", "3")
    assert backend.submit(plan) == {"train-1": "1", "train-2": "2", "eval": "3"}
    assert (tmp_path / "log").read_text().split()[:4] == ["-m", "recipes_lib.cli", "study", "run"]
    capsys.readouterr()
    show_status(backend, [], as_json=True)
    tasks = json.loads(capsys.readouterr().out)["tiny"]
    rows = {task["label"]: task for task in tasks}
    states = {label: row["state"] for label, row in rows.items()}
    failed = {"train-2.0": "failed"}
    done = dict.fromkeys(("train-1.0", "train-1.1", "train-2.1", "eval"), "done")
    assert states == {**done, **failed}
    assert rows["train-2.0"]["job"] == "2_0" and rows["train-2.0"]["error"] == "no memory"
    cancel(backend, ["tiny"])
    assert "cancelled nothing" in capsys.readouterr().out


@pytest.mark.parametrize("ends", [False, True])
def test_a_study_with_looks_is_one_chain_and_ends_where_a_decision_fails(
    study: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setenv("LOOK_CODE", str(int(ends)))
    backend = AtOnce()
    plan = Planner(site=Here(), overrides=["seeds=[1, 2, 3]", "looks=[2, 3]"]).plan(str(study))
    waits = {job.label: (job.after, job.after_any) for job in plan.jobs}
    assert waits == {
        "train-look1-1": ((), ()),
        "train-look1-2": ((), ()),
        "eval-look1": ((), ("train-look1-1", "train-look1-2")),
        "look1": (("eval-look1",), ()),
        "train-look2": (("look1",), ()),
        "eval-look2": (("look1",), ("train-look2",)),
    }
    trained = [task.title for job in plan.jobs for task in job.tasks if job.stage == "train"]
    assert len(trained) == 6 and all("seed3" in run for run in trained[4:])
    backend.submit(plan)
    rows = {task.label: task for task in backend.states(plan.folder)}
    states = {label: row.state for label, row in rows.items()}
    if not ends:
        assert set(states.values()) == {"done"}
        return
    assert states["look1"] == "stopped" and "the study ends" in rows["look1"].reason
    assert states["train-look2.0"] == states["eval-look2"] == "cancelled"
    assert rows["eval-look2"].reason == "look1: stopped"


def test_a_failed_training_of_a_recipe_keeps_what_waits_for_it_from_starting(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    backend = AtOnce()
    evals = [str(PROJECT / "evals/quickstart/house_style.yaml")]
    plan = Planner(site=Here(), evals=evals).plan(str(study.with_name("r4.yaml")))
    backend.submit(plan)
    states = {task.label: task.state for task in backend.states(plan.folder)}
    skipped = dict.fromkeys(("eval-quickstart--house_style", "report"), "cancelled")
    assert states == {"train": "failed", **skipped}
    assert not (tmp_path / "log").exists()
