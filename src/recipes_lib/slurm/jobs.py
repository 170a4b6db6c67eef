"""Which Slurm jobs a recipe or a study becomes, and which of them waits for which.

A job is one stage of a run (train, an evaluation, the report) or, in a study, one stage of several
equal arms (an array). Its commands are argument lists: no shell reads a value of a recipe.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes_lib.compare.design import Study, load_study, study_file
from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.handed import FILES_FILE, Files, recording
from recipes_lib.config.launch import Launch, plan_launch_of
from recipes_lib.config.recipe import RECIPE_FILE, Recipe, load_recipe
from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.project import project_root, recipe_path, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.eval_recipe import EvalRecipe, load_eval
from recipes_lib.planning.cards import card_named
from recipes_lib.planning.plan import plan_launched
from recipes_lib.slurm.prefetching import judge_model
from recipes_lib.slurm.profile import STAGES, EnvironmentSection, SiteProfile
from recipes_lib.study.needs import refuse_unmet
from recipes_lib.study.runs import StudyRun, is_trained, missing_of, study_trainings
from recipes_lib.suites.leaks import refuse_leaks_of

DEFAULT_EVALS = ("alpaca_eval.yaml", "mt_bench.yaml", "lm_eval.yaml")
TRAIN_MODULE, CLI_MODULE = ("-m", "recipes_lib.train"), ("-m", "recipes_lib.cli")


@dataclass(frozen=True)
class JobSize:
    """How large a job is: machines, processes on each, and whether each process needs a GPU."""

    nodes: int = 1
    processes: int = 1
    uses_gpus: bool = True
    distributed_type: str = "NO"

    @property
    def gpus(self) -> int:
        """GPUs to ask for on each machine."""
        return self.processes if self.uses_gpus else 0


@dataclass(frozen=True)
class Task:
    """One command, and one that must succeed after it.

    Args:
        launcher: what starts it: Python, a container, accelerate.
        args: what is started.
        what: its name for people: an arm, an eval.
    """

    launcher: tuple[str, ...]
    args: tuple[str, ...]
    check: tuple[str, ...] = ()
    what: str = ""


@dataclass(frozen=True)
class Job:
    """One submission.

    `label` names its files and is unique in the chain; `stage` is the profile's key (train, eval,
    report). More than one task makes an array. `after` holds labels (`train`, or `train.2` for one
    task of an array) that must have succeeded, `after_any` those that must have ended.
    """

    label: str
    stage: str
    tasks: tuple[Task, ...]
    shape: JobSize = field(default_factory=JobSize)
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    throttle: int | None = None
    seconds: int | None = None

    @property
    def is_array(self) -> bool:
        """Whether the job has several tasks."""
        return len(self.tasks) > 1


def task_labels(job: str, num_tasks: int) -> list[str]:
    """Return the file names of a job's tasks: its label, with a number each in an array."""
    return [f"{job}.{index}" for index in range(num_tasks)] if num_tasks > 1 else [job]


@dataclass
class HandedOver:
    """What the jobs of a chain are handed, so that later edits change nothing of what was
    submitted: each training its resolved recipe and a copy of its accelerate config, the others
    every file that they read, in one file.

    Args:
        folder: where it is written.
    """

    folder: Path
    files: Files
    recipes: dict[str, Recipe] = field(default_factory=dict)
    configs: dict[Path, str] = field(default_factory=dict)

    def add_texts(self, recipes: Iterable[Recipe], evals: Iterable[EvalRecipe]) -> None:
        """Add the chat templates of recipes, and the prompts and rubrics of judges."""
        self.files.add_texts(*(Path(one.data.chat_template or "") for one in recipes))
        for judge in (one.judge for one in evals if one.judge):
            self.files.add_texts(*judge.texts().values())

    def training(
        self, file: str, recipe: Recipe, launch: Launch, python: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Hand a recipe to a training; return what starts it on each machine, and its script.

        Args:
            file: name of the file for the recipe.
            python: the words that start Python.
        """
        self.recipes[file] = recipe
        script = (*TRAIN_MODULE, shown_path(self.folder / file))
        if launch.world_size == 1:
            return python, script
        path = launch.config.path
        same = sum(one.name == path.name for one in self.configs if one != path)
        name = self.configs.setdefault(path, f"{same or ''}{path.name}")
        words = (*python, "-m", "accelerate.commands.launch")
        words += ("--config_file", shown_path(self.folder / name))
        words += ("--num_processes", str(launch.world_size))
        several = launch.machines > 1 or launch.config.num_machines > 1
        return (*words, *(("--num_machines", str(launch.machines)) if several else ())), script

    def write(self) -> None:
        """Write it all."""
        for file, recipe in self.recipes.items():
            recipe.write(self.folder / file)
        for path, name in self.configs.items():
            shutil.copyfile(path, self.folder / name)
        self.files.write(self.folder / FILES_FILE)


@dataclass(frozen=True)
class JobPlan:
    """Everything a submission needs: its folder, the jobs in order, what they are handed, the
    models they load, what to warn of.

    Args:
        evals: eval recipes that the target does not name itself, for the words of `recipes
            prefetch`.
    """

    jobs: tuple[Job, ...]
    handed: HandedOver
    models: tuple[ModelSection, ...]
    warnings: tuple[str, ...]
    evals: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder of the submission."""
        return self.handed.folder

    @property
    def name(self) -> str:
        """The run or study that the jobs belong to."""
        return self.path.parent.name


def jobs_folder(name: str) -> Path:
    """Return the folder of what is launched under the name of a run or study.

    Raises:
        RecipeError: its path holds a line break, which no #SBATCH line can.
    """
    folder = runs_root().resolve() / name / "slurm"
    if "\n" in str(folder):
        raise RecipeError(
            f"a folder whose name holds a line break cannot be launched from: {str(folder)!r}"
        )
    return folder


def plan_target(
    target: str,
    overrides: Sequence[str],
    profile: SiteProfile | None,
    args: argparse.Namespace,
    flags: Sequence[str],
) -> JobPlan:
    """Return the jobs of a recipe or a study.

    Args:
        args: the options of `recipes launch`.
        flags: options of the training script.

    Raises:
        RecipeErrors: what is wrong with the recipe, the study, the launch or the stages.
    """
    with recording() as files:
        stages = _read_stages(args.stages)
        if recipe_path(target).is_dir():
            raise RecipeError(
                "is a folder; launch one recipe or study of it",
                "all recipes: recipes ls",
                file=target,
            )
        if path := study_file(target):
            if args.evals:
                raise RecipeError("--evals is for recipes: a study names its evals itself")
            own = {key: getattr(args, key) for key in ("accelerate", "gpus", "nodes")}
            words = [f"{key}={value}" for key, value in own.items() if value is not None]
            study = load_study(path, [*overrides, *words])
            if any(arm.tuning for arm in study.arms):
                what = (
                    f"study '{study.name}' tunes its arms: what they train is known only after that"
                )
                raise RecipeError(
                    what,
                    f"run it in one job: recipes study run {shown_path(path)} --jobs N",
                    file=shown_path(path),
                )
            limit = args.throttle or (profile.values.max_concurrent_arms if profile else None)
            return _StudyPlanner(study, profile, flags, files).plan(stages, limit)
        if args.prepare and args.stages is None and profile is None:
            stages = ("train",)  # what somebody submits by hand comes first
        recipe = load_recipe(target, overrides)
        launch = plan_launch_of(recipe, args.accelerate, args.gpus, args.nodes)
        accumulation_steps(recipe, launch.world_size)
        _check_gpus(launch, profile)
        evals = _evals_of(recipe, args.evals) if "eval" in stages else []
        return _plan_recipe(recipe, launch, profile, stages, evals, flags, files)


def _read_stages(text: str | None) -> tuple[str, ...]:
    """Return the stages of `--stages train,eval`, in their order."""
    if text is None:
        return STAGES
    asked = [word for word in text.split(",") if word]
    unknown = [word for word in asked if word not in STAGES]
    if unknown or not asked:
        raise RecipeError(
            f"--stages: {f'no stage {unknown[0]!r}' if unknown else 'no stage is named'}",
            f"stages: {', '.join(STAGES)}",
        )
    return tuple(stage for stage in STAGES if stage in asked)


def _evals_of(recipe: Recipe, paths: Sequence[str] | None) -> list[EvalRecipe]:
    """Return the evals named, else the small ones for a quickstart recipe and the three of evals/
    for others.
    """
    folder = project_root() / "evals"
    if recipe.path.resolve().parent.name == "quickstart":
        folder /= "quickstart"
    return [
        load_eval(path) for path in paths or [shown_path(folder / name) for name in DEFAULT_EVALS]
    ]


def _check_gpus(launch: Launch, profile: SiteProfile | None) -> None:
    """Refuse a launch that needs GPUs on a cluster that has none; the message names CPU twins."""
    if profile is not None and profile.values.gres is None and not launch.config.use_cpu:
        raise profile.error(
            "gres",
            f"this cluster has no GPUs (gres is null), and {launch.config.path.stem} needs them",
            "take a CPU config: --accelerate cpu, or ddp_cpu or fsdp_cpu for several processes",
        )


def planned_seconds(recipe: Recipe, launch: Launch, profile: SiteProfile | None) -> int | None:
    """Return the time limit that a plan gives for the site's card; None where no card is named or
    nothing is known of the model.
    """
    card = profile.values.gpu if profile else None
    if card is None or launch.config.use_cpu:
        return None
    try:
        return plan_launched(recipe, launch, card_named(card)).walltime
    except RecipesError:
        return None


# ---- What recipes and studies have in common ----


def _python(profile: SiteProfile | None) -> tuple[str, ...]:
    """Return the words that start Python inside a job: the container's or environment's `python`,
    else the one that submits.
    """
    environment = profile.values.environment if profile else EnvironmentSection()
    own = environment == EnvironmentSection()
    return (*environment.container, sys.executable if own else "python")


def _size(launch: Launch) -> JobSize:
    gpus, kind = not launch.config.use_cpu, launch.distributed_type
    return JobSize(launch.machines, launch.per_machine, gpus, kind)


def _with_judge(evals: Sequence[EvalRecipe], profile: SiteProfile | None) -> tuple[str, ...]:
    """Return the words before a command that asks the judges of some evals, where the job has to
    start one: vLLM lives in an environment of its own, and on a compute node nobody started it. It
    starts when it is asked, so the GPU is free for it.
    """
    files = [one.judge for one in evals if one.judge and one.judge.judge.served_here]
    served = {file.judge.model: file.judge for file in files}
    if not served or profile is None or profile.values.vllm is None:
        return ()
    if len(served) > 1:
        raise RecipeError(
            f"one job would have to serve two judges: {', '.join(served)}",
            "give the evals one judge, or judge in the job: judge.engine",
        )
    ((model, judge),) = served.items()
    script = str(project_root() / "launch" / "with_judge.sh")
    words = ["bash", script, model, "--max-model-len", str(judge.max_context_tokens)]
    words += ["--revision", judge.revision] if judge.revision else []
    return (*words, "--")


def _judges_nobody_starts(evals: Sequence[EvalRecipe], profile: SiteProfile | None) -> list[str]:
    """Return a warning for each judge that is expected on the compute node and that no job will
    start.
    """
    vllm = profile.values.vllm if profile else None
    if profile is None or (vllm and shutil.which(Path(vllm).expanduser())):
        return []
    names: dict[str, list[str]] = {}
    for recipe in evals:
        if recipe.judge and recipe.judge.judge.served_here:
            names.setdefault(str(recipe.judge.judge.base_url), []).append(recipe.name)
    remedy = "set vllm in the profile, or let the job judge by itself (judge.engine: transformers)"
    if vllm:
        remedy = f"there is no {vllm} here (python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm)"
    return [
        f"no job starts the judge that {' and '.join(found)}"
        f" {'expects' if len(found) == 1 else 'expect'} at {url}: {remedy}"
        for url, found in names.items()
    ]


def _of_later_stages(words: Sequence[str]) -> list[str]:
    """Return the flags of a training that the later stages take too: they also load the model."""
    return [word for word in words if word == "--trust-remote-code"]


# ---- A recipe ----


def _plan_recipe(
    recipe: Recipe,
    launch: Launch,
    profile: SiteProfile | None,
    stages: Sequence[str],
    evals: Sequence[EvalRecipe],
    flags: Sequence[str],
    files: Files,
) -> JobPlan:
    """Return the jobs of a recipe: training, then each evaluation, then the report.

    Raises:
        RecipeError: stages without training, of a run that is not finished, or a report of one that
            was not evaluated.
    """
    run, python, allowed = RunDirectory(recipe.name), _python(profile), _of_later_stages(flags)
    handed = HandedOver(jobs_folder(recipe.name), files)
    handed.add_texts([recipe], evals)
    jobs: list[Job] = []
    warnings = _judges_nobody_starts(evals, profile)
    if "train" in stages:
        refuse_leaks_of(recipe, evals)
        launcher, script = handed.training(RECIPE_FILE, recipe, launch, python)
        check = (*python, *CLI_MODULE, "verify", recipe.name, *allowed)
        task = Task(launcher, (*script, *flags), check, recipe.name)
        seconds = planned_seconds(recipe, launch, profile)
        jobs.append(Job("train", "train", (task,), _size(launch), seconds=seconds))
    else:
        state = run.read_state()["state"] if run.exists() else "not there"
        if state != "finished":
            raise RecipeError(
                f"run '{recipe.name}' is {state}, so there is nothing to evaluate",
                "add the stage: --stages train,eval,report",
            )
    trained = tuple(job.label for job in jobs)
    for one in evals:
        command = (*CLI_MODULE, "eval", shown_path(one.path), recipe.name, *allowed)
        task = Task((*_with_judge([one], profile), *python), command, what=one.name)
        small = JobSize(uses_gpus=not launch.config.use_cpu)
        jobs.append(Job(f"eval-{one.name}", "eval", (task,), small, trained))
    if "report" in stages:
        page = shown_path(run.path / "report.html")
        task = Task(python, (*CLI_MODULE, "compare", recipe.name, "--html", page), what="report")
        last = tuple(job.label for job in jobs if job.stage == "eval") or trained
        jobs.append(Job("report", "report", (task,), JobSize(uses_gpus=False), last))
        if not ("eval" in stages or any(run.path.glob("evals/*/result*.json"))):
            if "train" not in stages:
                raise RecipeError(
                    f"run '{recipe.name}' has no evaluation to report",
                    "add the stage: --stages eval,report",
                )
            warnings.append(
                "no evaluation comes before the report, so it will end with exit code 2: --stages"
                " train,eval,report"
            )
    models = (recipe.model, *(judge for one in evals for judge in judge_model(one)))
    shown = tuple(shown_path(one.path) for one in evals)
    return JobPlan(tuple(jobs), handed, models, tuple(warnings), shown)


# ---- A study ----


class _StudyPlanner:
    """The jobs of a study: arms that are equally large train as one array, then one job runs the
    study, which evaluates what is trained and writes the report. What is trained already is left
    out.
    """

    def __init__(
        self, study: Study, profile: SiteProfile | None, flags: Sequence[str], files: Files
    ) -> None:
        self.study, self.profile, self.flags = study, profile, flags
        self.python = _python(profile)
        self.handed = HandedOver(jobs_folder(study.name), files)
        self.handed.add_texts((arm.recipe for arm in study.arms if arm.recipe), study.evals)
        launches = [arm.launch for arm in study.arms if arm.trained]
        for launch in launches:
            _check_gpus(launch, profile)
        self.uses_gpus = not all(launch.config.use_cpu for launch in launches)

    def plan(self, stages: Sequence[str], throttle: int | None) -> JobPlan:
        """Return the jobs.

        Args:
            throttle: arms that train at the same time; None is no limit.

        Raises:
            RecipeError: nothing is left to do, or the stages need a training that is not done.
        """
        study = self.study
        refuse_unmet(study)
        left = [one for one in study_trainings(study) if not is_trained(study, one)]
        if left and "train" not in stages:
            what = f"{left[0].run} is not trained"
            raise RecipeError(what, "add the stage: --stages train,eval")
        jobs = self._trainings(left, throttle)
        if {"eval", "report"} & set(stages) and missing_of(study):
            words = (
                *CLI_MODULE,
                "study",
                "run",
                shown_path(study.path),
                "--no-train",
                *study.words,
            )
            words += tuple(_of_later_stages(self.flags))
            launcher = (*_with_judge(study.evals, self.profile), *self.python)
            size = JobSize(uses_gpus=self.uses_gpus)
            trained = tuple(job.label for job in jobs)
            task = Task(launcher, words, what="study run")
            # also where an arm failed: the others are evaluated
            jobs.append(Job("eval", "eval", (task,), size, after_any=trained))
        if not jobs:
            what = f"study '{study.name}': everything is done"
            raise RecipeError(what, f"look at it: recipes study report {shown_path(study.path)}")
        models = [arm.recipe.model for arm in study.arms if arm.trained and arm.recipe]
        models += [judge for one in study.evals for judge in judge_model(one)]
        warnings = tuple(_judges_nobody_starts(study.evals, self.profile))
        return JobPlan(tuple(jobs), self.handed, tuple(models), warnings)

    def _trainings(self, left: Sequence[StudyRun], throttle: int | None) -> list[Job]:
        """Return the trainings: one job for the arms and seeds of one size, an array where there
        are several.
        """
        groups: dict[tuple[JobSize, str], list[StudyRun]] = {}
        for one in left:
            launch = one.arm.launch
            groups.setdefault((_size(launch), launch.config.path.stem), []).append(one)
        jobs: list[Job] = []
        for (size, config), group in groups.items():
            label = f"train-{config}-{size.nodes}x{size.processes}" if len(groups) > 1 else "train"
            # groups one after another, or together they would exceed the limit
            before = (jobs[-1].label,) if jobs and throttle else ()
            tasks = tuple(map(self._training, group))
            jobs.append(Job(label, "train", tasks, size, (), before, throttle))
        return jobs

    def _training(self, one: StudyRun) -> Task:
        recipe = one.recipe(self.study)
        launcher, script = self.handed.training(
            f"{one.run}.json", recipe, one.arm.launch, self.python
        )
        return Task(launcher, (*script, *self.flags), what=recipe.name)
