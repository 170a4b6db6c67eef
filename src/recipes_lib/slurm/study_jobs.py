"""The jobs of a study: arms that are equally large train as one array, each answers and is
benchmarked once its adapter passed its check, then one judge judges them all (its audit is about
all of them), then the report. What is fresh already is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recipes_lib.compare.design import Study
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import shown_path
from recipes_lib.slurm.folder import LaunchFolder
from recipes_lib.slurm.jobs import Job, JobSize, Task, launcher_of
from recipes_lib.slurm.judge_server import judges_nobody_starts, with_judge
from recipes_lib.slurm.prefetching import judge_model
from recipes_lib.slurm.profile import SiteProfile
from recipes_lib.slurm.recipe_jobs import (
    CLI_MODULE,
    TRAIN_MODULE,
    JobPlan,
    python_in_job,
    shape_of,
)
from recipes_lib.slurm.snapshot import Snapshot
from recipes_lib.study.arms import arm_run, train_words
from recipes_lib.study.graph import Graph, Step
from recipes_lib.study.steps import build_graph

TRAINING, ANSWERING = ("train", "check"), ("answers", "lm_eval")
JUDGING, REPORT = ("judgments", "comparison"), ("statistics", "report")


def plan_study_jobs(
    study: Study,
    folder: LaunchFolder,
    profile: SiteProfile | None,
    *,
    stages: Sequence[str],
    flags: Sequence[str] = (),
    throttle: int | None = None,
    seconds: dict[str, int] | None = None,
) -> JobPlan:
    """Return the jobs of a study.

    Args:
        flags: options of the training script.
        throttle: arms that train at the same time; None is no limit.
        seconds: time limit of each arm's training, from its plan.

    Raises:
        RecipeError: nothing is left to do, or a stage needs one that was neither asked for nor
            done.
    """
    planner = _Planner(study, folder, profile, flags, seconds or {})
    jobs: list[Job] = []
    if "train" in stages:
        jobs += planner.trainings(throttle)
    if "eval" in stages:
        jobs += planner.evaluations()
    if "report" in stages:
        jobs += planner.rest("report", "report", REPORT, uses_gpus=False)
    if not jobs:
        what = f"study '{study.name}': every step of {', '.join(stages)} is fresh"
        raise RecipeError(what, f"look at it: recipes study status {shown_path(study.path)}")
    planner.check_order()
    models = [arm.recipe.model for arm in study.arms if arm.trained and arm.recipe]
    models += [judge for one in study.evals for judge in judge_model(one)]
    warnings = judges_nobody_starts(study.evals if "eval" in stages else (), profile)
    return JobPlan(
        study.name, tuple(jobs), folder, planner.snapshot, tuple(models), tuple(warnings)
    )


class _Planner:
    """Builds the jobs; knows which job does which step."""

    def __init__(
        self,
        study: Study,
        folder: LaunchFolder,
        profile: SiteProfile | None,
        flags: Sequence[str],
        seconds: dict[str, int],
    ) -> None:
        self.study, self.profile, self.flags, self.seconds = study, profile, flags, seconds
        self.python = python_in_job(profile)
        self.snapshot = Snapshot(folder.path / "snapshot")
        self.snapshot.add_study(study)
        self.launches = {arm.name: arm.launch for arm in study.arms if arm.trained}
        for launch in self.launches.values():
            self.snapshot.add_file(launch.config.path)
        self.uses_gpus = not all(launch.config.use_cpu for launch in self.launches.values())
        self.graph: Graph = build_graph(study)
        self.state = self.graph.survey()
        self.owner: dict[str, str] = {}

    def trainings(self, throttle: int | None) -> list[Job]:
        """Return the trainings with their checks: one job for the arms and seeds of one size, an
        array where there are several.
        """
        groups: dict[tuple[JobSize, str], list[Step]] = {}
        for step in self._open(("train",), also=("check",)):
            launch = self.launches[step.arm]
            groups.setdefault((shape_of(launch), launch.config.path.stem), []).append(step)
        jobs: list[Job] = []
        for (shape, config), steps in groups.items():
            label = (
                "train" if len(groups) == 1 else f"train-{config}-{shape.nodes}x{shape.processes}"
            )
            planned = [self.seconds.get(step.arm) for step in steps]
            seconds = None if None in planned else max(filter(None, planned))
            before = (
                (jobs[-1].label,) if jobs and throttle else ()
            )  # groups one after another, or together they would exceed the limit
            job = Job(
                label,
                "train",
                tuple(map(self._training, steps)),
                shape,
                (),
                before,
                throttle,
                seconds,
            )
            for step, task_label in zip(steps, job.task_labels(), strict=True):
                self.owner |= dict.fromkeys(self._names(step, TRAINING), task_label)
            jobs.append(job)
        return jobs

    def _training(self, step: Step) -> Task:
        """Return the training of one arm and seed; it succeeded when its adapter check passed."""
        arm, launch = self.study.arm(step.arm), self.launches[step.arm]
        assert arm.recipe is not None and step.seed is not None
        launcher = launcher_of(
            self.python, launch.config, self.snapshot.shown(launch.config.path), shape_of(launch)
        )
        script = (
            *TRAIN_MODULE,
            self.snapshot.shown(arm.recipe.path),
            *train_words(self.study, arm, step.seed)[1:],
            *self.flags,
        )
        check = (*self.python, *self._study_command(self._names(step, TRAINING)))
        return Task(launcher, script, check, arm_run(self.study, arm, step.seed))

    def evaluations(self) -> list[Job]:
        """Return a job for what one arm and seed, or the base, is asked, and one for all
        judgments.
        """
        words: dict[str, list[str]] = {}
        for step in self._open(ANSWERING):
            words.setdefault(step.name.removeprefix(f"{step.kind}.{step.eval}."), []).append(
                step.name
            )
        jobs = [
            self._steps_job(f"eval-{word}", "eval", names, self.uses_gpus)
            for word, names in words.items()
        ]
        served = with_judge(self.study.evals, self.profile, alone=True)
        return [*jobs, *self.rest("eval-judge", "eval", JUDGING, self.uses_gpus, served)]

    def rest(
        self,
        label: str,
        stage: str,
        kinds: Iterable[str],
        uses_gpus: bool,
        before: Sequence[str] = (),
    ) -> list[Job]:
        """Return one job for all steps of some kinds that are not fresh."""
        names = [step.name for step in self._open(kinds)]
        return [self._steps_job(label, stage, names, uses_gpus, before)] if names else []

    def _steps_job(
        self,
        label: str,
        stage: str,
        names: Sequence[str],
        uses_gpus: bool,
        before: Sequence[str] = (),
    ) -> Job:
        self.owner |= dict.fromkeys(names, label)
        task = Task((*before, *self.python), self._study_command(names), what=label)
        return Job(label, stage, (task,), JobSize(uses_gpus=uses_gpus), self._above(names))

    def _above(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the labels of the jobs that do what these steps need."""
        steps = [self.graph.steps[name] for name in names]
        needed = dict.fromkeys(above for step in steps for above in step.upstream)
        mine = {self.owner[name] for name in names}
        return tuple(
            dict.fromkeys(
                self.owner[name]
                for name in needed
                if name in self.owner and self.owner[name] not in mine
            )
        )

    def check_order(self) -> None:
        """Refuse jobs whose steps need steps that are neither fresh nor part of the chain.

        Raises:
            RecipeError: naming the first of them.
        """
        for name in self.owner:
            step = self.graph.steps[name]
            missing = [
                above
                for above in step.upstream
                if above not in self.owner and not self.state[above].fresh
            ]
            if missing:
                raise RecipeError(
                    f"{name} needs {missing[0]}, which is not done",
                    "add its stage: --stages train,eval,report",
                )

    def _study_command(self, steps: Sequence[str]) -> tuple[str, ...]:
        allowed = [
            flag for flag in self.flags if flag == "--trust-remote-code"
        ]  # later steps load the models too
        words = (
            "study",
            "run",
            self.snapshot.shown(self.study.path),
            *self.study.words,
            *allowed,
            "--only",
            *steps,
        )
        return (*CLI_MODULE, *words)

    def _open(self, kinds: Iterable[str], also: Iterable[str] = ()) -> list[Step]:
        """Return the steps of some kinds that are to be done, or whose fellow steps (a training's
        check) are.
        """
        steps = self.graph.of_kind(*kinds)
        return [
            step
            for step in steps
            if not all(self.state[name].fresh for name in self._names(step, (step.kind, *also)))
        ]

    def _names(self, step: Step, kinds: Iterable[str]) -> list[str]:
        """Return the names of a step and its fellows: `train.r8`, `check.r8`."""
        word = step.name.removeprefix(f"{step.kind}.")
        return [
            name
            for name in (step.name, *(f"{kind}.{word}" for kind in kinds if kind != step.kind))
            if name in self.graph.steps
        ]
