"""Which Slurm jobs a recipe or a study becomes, and which of them waits for which.

    a recipe   train -> an evaluation each -> report
    a study    arrays of `recipes train`, one for each launch -> `recipes study run`

Every job runs a command that can be run again. Its words are argument lists: no shell reads a value
of a recipe. A training gets its recipe resolved, as it was when it was launched.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from recipes_lib.config.launch import Launch, accumulation_steps, plan_launch_of
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import shown_duration
from recipes_lib.evals.leaks import refuse_leaks_of
from recipes_lib.evals.recipe import EvalRecipe, JudgeSection, check_allowed, load_eval
from recipes_lib.slurm.prefetching import judge_weights
from recipes_lib.slurm.profile import STAGES, SiteProfile
from recipes_lib.study.config import load_study, study_file
from recipes_lib.study.run import StudyRun, is_trained, missing_of, refuse_unmet, study_trainings

_DEFAULT_EVALS = ("alpaca_eval.yaml", "mt_bench.yaml", "lm_eval.yaml")


@dataclass(frozen=True)
class Task:
    """One command: what starts it (Python, accelerate), what is started, its name for people."""

    launcher: tuple[str, ...]
    args: tuple[str, ...]
    what: str = ""


@dataclass(frozen=True)
class Job:
    """One submission.

    Args:
        label: names its files; unique in the chain.
        stage: the profile's key.
        tasks: more than one make an array.
        launch: how each task is started; None for one process.
        uses_gpus: whether each process needs a GPU.
        after: labels of jobs that must have succeeded.
        after_any: labels of jobs that must have ended.
        throttle: tasks that run at the same time.
    """

    label: str
    stage: str
    tasks: tuple[Task, ...]
    launch: Launch | None = None
    uses_gpus: bool = True
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    throttle: int | None = None

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.launch.machines if self.launch else 1

    @property
    def processes(self) -> int:
        """Processes on each machine."""
        return self.launch.per_machine if self.launch else 1

    @property
    def gpus(self) -> int:
        """GPUs to ask for on each machine."""
        return self.processes if self.uses_gpus else 0


@dataclass
class JobPlan:
    """Everything a submission needs.

    Args:
        name: the run or study that the jobs belong to.
        recipes: what each training is handed, by file name.
        models: what the jobs load.
        warnings: what to say before.
        evals: eval recipes that the target does not name itself, for `recipes prefetch`.
    """

    name: str
    jobs: list[Job] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    models: list[ModelSection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    evals: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where scripts, logs and exit codes will lie."""
        return jobs_folder(self.name)


def jobs_folder(name: str) -> Path:
    """Return the folder of what is launched under the name of a run or study."""
    return runs_root().resolve() / name / "slurm"


@dataclass
class Planner:
    """Makes the jobs of a recipe or a study from what `recipes launch` was told.

    Args:
        named_stages: words of --stages; None for all.
        evals: words of --evals; none for the three of evals/.
        flags: options that are handed on to the commands of the jobs.
    """

    site: SiteProfile
    overrides: Sequence[str] = ()
    accelerate: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    named_stages: str | None = None
    evals: Sequence[str] = ()
    flags: Sequence[str] = ()

    def plan(self, target: str) -> JobPlan:
        """Return the jobs of a recipe or a study.

        Raises:
            RecipeErrors: what is wrong with the recipe, the study, the launch or the stages.
        """
        self.profile = self.site.values
        named = self.named_stages
        self.stages: Sequence[str] = STAGES if named is None else named.split(",")
        if wrong := [word for word in self.stages if word not in STAGES]:
            raise RecipeError(f"--stages: no stage {wrong[0]!r}", f"stages: {', '.join(STAGES)}")
        # the container's or the environment's Python, else the one that submits
        own = not (self.profile.setup or self.profile.prefix or self.profile.srun)
        self.python = (*self.profile.prefix, sys.executable if own else "python")
        path = study_file(target)
        return self._study(path) if path else self._recipe(target)

    def _recipe(self, target: str) -> JobPlan:
        recipe = load_recipe(target, self.overrides)
        launch = plan_launch_of(recipe, self.accelerate, self.gpus, self.nodes)
        accumulation_steps(recipe, launch.world_size)
        folder = project_root() / "evals"
        if recipe.path.resolve().parent.name == "quickstart":
            folder /= "quickstart"
        names = self.evals or [shown_path(folder / name) for name in _DEFAULT_EVALS]
        evals = [load_eval(name) for name in names if "eval" in self.stages]
        plan, run = JobPlan(recipe.name), RunDirectory(recipe.name)
        if "train" in self.stages:
            refuse_leaks_of(recipe, evals)
            plan.recipes["resolved.yaml"] = recipe
            task = self._training(plan.folder / "resolved.yaml", recipe, launch)
            plan.jobs.append(Job("train", "train", (task,), launch, self._uses_gpus(launch)))
            plan.warnings += self._estimate(recipe, launch)
        elif not run.exists() or run.read_state()["state"] != "finished":
            what = f"run '{recipe.name}' is not finished, so there is nothing to evaluate"
            raise RecipeError(what, "add the stage: --stages train,eval,report")
        before = tuple(job.label for job in plan.jobs)
        for suite in evals:
            task = self._command("eval", [suite.document.file, recipe.name], suite.name, [suite])
            gpus = not launch.config.use_cpu
            job = Job(f"eval-{suite.name}", "eval", (task,), uses_gpus=gpus, after=before)
            plan.jobs.append(job)
        if "report" in self.stages and (evals or any(run.path.glob("evals/*/result*.json"))):
            words = [recipe.name, "--html", shown_path(run.path / "report.html")]
            task = self._command("compare", words, "report")
            last = tuple(job.label for job in plan.jobs if job.stage == "eval") or before
            plan.jobs.append(Job("report", "report", (task,), uses_gpus=False, after=last))
        plan.evals = [suite.document.file for suite in evals]
        plan.models = [recipe.model, *judge_weights(evals)]
        plan.warnings += self._judges_nobody_starts(evals)
        return plan

    def _study(self, path: Path) -> JobPlan:
        """Return the jobs that train what is not trained, and one that evaluates and reports."""
        file = shown_path(path)
        if self.evals:
            raise RecipeError("--evals is for recipes: a study names its evals itself")
        own = {"accelerate": self.accelerate, "gpus": self.gpus, "nodes": self.nodes}
        words = [f"{key}={value}" for key, value in own.items() if value is not None]
        study = load_study(path, [*self.overrides, *words])
        if any(arm.tuning for arm in study.arms):
            what = f"study '{study.name}' tunes its arms: what they train is known only after that"
            raise RecipeError(what, f"run it in one job: recipes study run {file}", file=file)
        refuse_unmet(study)
        plan, limit = JobPlan(study.name), self.profile.max_concurrent_arms
        left = [training for training in study_trainings(study) if not is_trained(training)]
        if left and "train" not in self.stages:
            raise RecipeError(f"{left[0].run} is not trained", "add the stage: --stages train,eval")
        groups: dict[str, list[StudyRun]] = {}
        for training in left:
            launch = training.arm.launch
            name = f"train-{launch.config.path.stem}-{launch.machines}x{launch.per_machine}"
            groups.setdefault(name, []).append(training)
        for name, trainings in groups.items():
            launch, tasks = trainings[0].arm.launch, []
            for training in trainings:
                handed = f"{training.run}.yaml"
                plan.recipes[handed] = training.recipe
                tasks.append(self._training(plan.folder / handed, training.recipe, launch))
            # groups one after another, or together they would exceed the limit
            before = (plan.jobs[-1].label,) if plan.jobs and limit else ()
            label, gpus = name if len(groups) > 1 else "train", self._uses_gpus(launch)
            plan.jobs.append(Job(label, "train", tuple(tasks), launch, gpus, (), before, limit))
            plan.warnings += self._estimate(trainings[0].recipe, launch)
        if {"eval", "report"} & {*self.stages} and missing_of(study):
            gpus = not all(arm.launch.config.use_cpu for arm in study.arms)
            words = ["run", file, *study.words, "--no-train"]
            task = self._command("study", words, "study run", study.evals)
            trained = tuple(job.label for job in plan.jobs)
            plan.jobs.append(Job("eval", "eval", (task,), None, gpus, (), trained))
        if not plan.jobs:
            what = f"study '{study.name}': everything is done"
            raise RecipeError(what, f"look at it: recipes study report {file}")
        plan.models = [*(arm.recipe.model for arm in study.arms), *judge_weights(study.evals)]
        plan.warnings += self._judges_nobody_starts(study.evals)
        return plan

    # ---- Jobs and their commands ----

    def _training(self, file: Path, recipe: Recipe, launch: Launch) -> Task:
        """Return the training of a recipe that is written to `file`."""
        script = ("-m", "recipes_lib.train", shown_path(file), *self.flags)
        if launch.world_size == 1:
            return Task(self.python, script, recipe.name)
        words = (*self.python, "-m", "accelerate.commands.launch")
        words += ("--config_file", str(launch.config.path.resolve()))
        words += ("--num_processes", str(launch.world_size))
        if launch.machines > 1 or launch.config.num_machines > 1:
            words += ("--num_machines", str(launch.machines))
        return Task(words, script, recipe.name)

    def _uses_gpus(self, launch: Launch) -> bool:
        """Whether a training needs GPUs; refused on a cluster that has none."""
        if launch.config.use_cpu or self.profile.has_gpus:
            return not launch.config.use_cpu
        what = f"this profile asks for no GPUs, and {launch.config.path.stem} needs them"
        hint = "add gres: gpu:{gpus}, or take --accelerate cpu, ddp_cpu or fsdp_cpu"
        raise self.site.document.error("sbatch", what, hint)

    def _command(
        self, verb: str, words: Sequence[str], what: str, evals: Sequence[EvalRecipe] = ()
    ) -> Task:
        """Return a `recipes` command, and before it what starts the judge that its evals expect."""
        launcher, judges = self.python, served_judges(evals)
        if judges and self.profile.vllm:
            judge, names = judges[0], sorted({judge.model for judge in judges})
            if len(names) > 1:
                what = f"one job would have to serve two judges: {', '.join(names)}"
                hint = "give the evals one judge, or judge in the job: judge.engine"
                raise RecipeError(what, hint)
            script = str(project_root() / "launch" / "with_judge.sh")
            revision = ("--revision", judge.revision) if judge.revision else ()
            length = ("--max-model-len", str(judge.max_context_tokens))
            launcher = ("bash", script, judge.model, *length, *revision, "--", *self.python)
        trust = [flag for flag in self.flags if flag == "--trust-remote-code" and evals]
        check_allowed(evals, bool(trust))
        return Task(launcher, ("-m", "recipes_lib.cli", verb, *words, *trust), what)

    # ---- What is said before ----

    def _estimate(self, recipe: Recipe, launch: Launch) -> list[str]:
        """Return what a training on GPUs is estimated to take; it never changes the time limit."""
        if launch.config.use_cpu:
            return []
        from recipes_lib.plan.plan import card_for, plan_of  # torch

        limit = {**self.profile.sbatch, **self.profile.stages.get("train", {})}.get("time")
        with suppress(RecipesError):
            plan = plan_of(recipe, launch, card_for(launch, None))
            if plan.seconds is not None:
                about = f"about {shown_duration(plan.seconds)} on {plan.card.name} (estimated)"
                return [f"note: {recipe.name} takes {about}; the job's limit is {limit}"]
        return []

    def _judges_nobody_starts(self, evals: Sequence[EvalRecipe]) -> list[str]:
        """Return a warning where a judge is expected on the compute node and no job starts it."""
        program = self.profile.vllm
        if not served_judges(evals) or (program and shutil.which(Path(program).expanduser())):
            return []
        what = "warning: no job starts the judge that is expected at 127.0.0.1"
        remedy = f"there is no {program} here" if program else "set vllm in the profile"
        return [f"{what}: {remedy}, or let the job judge by itself (judge.engine: transformers)"]


def served_judges(evals: Sequence[EvalRecipe]) -> list[JudgeSection]:
    """Return the judges that answer at this machine's own address."""
    return [recipe.judge for recipe in evals if recipe.judge and recipe.judge.served_here]
