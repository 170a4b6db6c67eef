"""Which Slurm jobs a recipe or a study becomes, and which of them waits for which.

    a recipe   train -> an evaluation each -> report
    a study    arrays of `recipes train`, one for each size of launch -> `recipes study run`

Every job runs a command that can be run again. Its words are argument lists: no shell reads a value
of a recipe. A training gets its recipe resolved, as it was when it was launched.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.launch import Launch, plan_launch_of
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.project import project_root, recipe_path, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.leaks import refuse_leaks_of
from recipes_lib.evals.recipe import EvalRecipe, load_eval
from recipes_lib.plan.cards import card_named
from recipes_lib.slurm.prefetching import judge_model
from recipes_lib.slurm.profile import STAGES, Profile, SiteProfile
from recipes_lib.study.config import Study, load_study, study_file
from recipes_lib.study.needs import refuse_unmet
from recipes_lib.study.runs import is_trained, missing_of, study_trainings

DEFAULT_EVALS = ("alpaca_eval.yaml", "mt_bench.yaml", "lm_eval.yaml")
_CLI = ("-m", "recipes_lib.cli")


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
    """One command: what starts it (Python, a container, accelerate), and what is started; `what` is
    its name for people: an arm, an eval.
    """

    launcher: tuple[str, ...]
    args: tuple[str, ...]
    what: str = ""


@dataclass(frozen=True)
class Job:
    """One submission.

    `label` names its files and is unique in the chain; `stage` is the profile's key. More than one
    task makes an array. `after` holds labels that must have succeeded, `after_any` those that must
    have ended.
    """

    label: str
    stage: str
    tasks: tuple[Task, ...]
    size: JobSize
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    throttle: int | None = None

    @property
    def is_array(self) -> bool:
        """Whether the job has several tasks."""
        return len(self.tasks) > 1

    @property
    def task_labels(self) -> list[str]:
        """The file names of its tasks: its label, with a number each in an array."""
        return (
            [f"{self.label}.{n}" for n in range(len(self.tasks))] if self.is_array else [self.label]
        )


@dataclass(frozen=True)
class JobPlan:
    """Everything a submission needs.

    Args:
        folder: where scripts, logs and exit codes will lie.
        jobs: in order.
        recipes: what each training is handed, by file name.
        models: what the jobs load.
        warnings: what to say before.
        evals: eval recipes that the target does not name itself, for `recipes prefetch`.
    """

    folder: Path
    jobs: tuple[Job, ...]
    recipes: dict[str, Recipe]
    models: tuple[ModelSection, ...]
    warnings: tuple[str, ...]
    evals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run or study that the jobs belong to."""
        return self.folder.parent.name


@dataclass(frozen=True)
class LaunchRequest:
    """What the command line of `recipes launch` says beside the target; None is the default."""

    overrides: Sequence[str] = ()
    accelerate: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    stages: str | None = None
    evals: Sequence[str] = ()
    flags: Sequence[str] = ()


def jobs_folder(name: str) -> Path:
    """Return the folder of what is launched under the name of a run or study.

    Raises:
        RecipeError: its path holds a line break, which no #SBATCH line can.
    """
    folder = runs_root().resolve() / name / "slurm"
    if "\n" in str(folder):
        what = f"a folder whose name holds a line break cannot be launched from: {str(folder)!r}"
        raise RecipeError(what)
    return folder


def plan_target(target: str, profile: SiteProfile, asked: LaunchRequest) -> JobPlan:
    """Return the jobs of a recipe or a study.

    Raises:
        RecipeErrors: what is wrong with the recipe, the study, the launch or the stages.
    """
    stages = _stages_of(asked.stages)
    if recipe_path(target).is_dir():
        what = "is a folder; launch one recipe or study of it"
        raise RecipeError(what, "all recipes: recipes ls", file=target)
    path = study_file(target)
    if path is None:
        return _plan_recipe(load_recipe(target, asked.overrides), profile, stages, asked)
    if asked.evals:
        raise RecipeError("--evals is for recipes: a study names its evals itself")
    own = {key: getattr(asked, key) for key in ("accelerate", "gpus", "nodes")}
    words = [f"{key}={value}" for key, value in own.items() if value is not None]
    return _plan_study(load_study(path, [*asked.overrides, *words]), profile, stages, asked.flags)


def _stages_of(text: str | None) -> tuple[str, ...]:
    """Return the stages of `--stages train,eval`, in their order."""
    words = STAGES if text is None else tuple(word for word in text.split(",") if word)
    unknown = [word for word in words if word not in STAGES]
    if unknown or not words:
        what = f"--stages: {f'no stage {unknown[0]!r}' if unknown else 'no stage is named'}"
        raise RecipeError(what, f"stages: {', '.join(STAGES)}")
    return tuple(stage for stage in STAGES if stage in words)


# ---- A recipe ----


def _plan_recipe(
    recipe: Recipe, profile: SiteProfile, stages: Sequence[str], asked: LaunchRequest
) -> JobPlan:
    """Return the jobs of a recipe.

    Raises:
        RecipeError: stages without training, of a run that is not finished.
    """
    launch = plan_launch_of(recipe, asked.accelerate, asked.gpus, asked.nodes)
    accumulation_steps(recipe, launch.world_size)
    _refuse_gpus(launch, profile)
    evals = _evals_of(recipe, asked.evals) if "eval" in stages else []
    folder, run, python = (
        jobs_folder(recipe.name),
        RunDirectory(recipe.name),
        _python(profile.values),
    )
    allowed = _allowed(asked.flags)
    warnings = _judges_nobody_starts(evals, profile.values)
    jobs, recipes = list[Job](), dict[str, Recipe]()
    if "train" in stages:
        refuse_leaks_of(recipe, evals)
        recipes["resolved.yaml"] = recipe
        task = _training(folder / "resolved.yaml", recipe, launch, python, asked.flags)
        jobs.append(Job("train", "train", (task,), _size(launch)))
        warnings += _estimate(recipe, launch, profile)
    elif not run.exists() or run.read_state()["state"] != "finished":
        state = run.read_state()["state"] if run.exists() else "not there"
        what = f"run '{recipe.name}' is {state}, so there is nothing to evaluate"
        raise RecipeError(what, "add the stage: --stages train,eval,report")
    trained = tuple(job.label for job in jobs)
    for one in evals:
        command = (*_CLI, "eval", shown_path(one.path), recipe.name, *allowed)
        task = Task((*_with_judge([one], profile.values), *python), command, one.name)
        size = JobSize(uses_gpus=not launch.config.use_cpu)
        jobs.append(Job(f"eval-{one.name}", "eval", (task,), size, trained))
    if "report" in stages and (evals or any(run.path.glob("evals/*/result*.json"))):
        page = shown_path(run.path / "report.html")
        task = Task(python, (*_CLI, "compare", recipe.name, "--html", page), "report")
        last = tuple(job.label for job in jobs if job.stage == "eval") or trained
        jobs.append(Job("report", "report", (task,), JobSize(uses_gpus=False), last))
    models = (recipe.model, *(judge for one in evals for judge in judge_model(one)))
    shown = tuple(shown_path(one.path) for one in evals)
    return JobPlan(folder, tuple(jobs), recipes, models, tuple(warnings), shown)


def _evals_of(recipe: Recipe, paths: Sequence[str]) -> list[EvalRecipe]:
    """Return the evals named, else the small ones for a quickstart recipe and the three of evals/
    for others.
    """
    folder = project_root() / "evals"
    if recipe.path.resolve().parent.name == "quickstart":
        folder /= "quickstart"
    names = paths or [shown_path(folder / name) for name in DEFAULT_EVALS]
    return [load_eval(path) for path in names]


# ---- A study ----


def _plan_study(
    study: Study, profile: SiteProfile, stages: Sequence[str], flags: Sequence[str]
) -> JobPlan:
    """Return the jobs of a study: what is trained already is left out, and the last job evaluates
    what is trained, also where an arm failed.

    Raises:
        RecipeError: nothing is left to do, or the study tunes its arms.
    """
    if any(arm.tuning for arm in study.arms):
        what = f"study '{study.name}' tunes its arms: what they train is known only after that"
        hint = f"run it in one job: recipes study run {shown_path(study.path)} --jobs N"
        raise RecipeError(what, hint, file=shown_path(study.path))
    refuse_unmet(study, ask_judges=False)
    folder, python = jobs_folder(study.name), _python(profile.values)
    left = [one for one in study_trainings(study) if not is_trained(study, one)]
    if left and "train" not in stages:
        raise RecipeError(f"{left[0].run} is not trained", "add the stage: --stages train,eval")
    groups: dict[tuple[JobSize, str], list[Task]] = {}
    recipes, warnings = dict[str, Recipe](), list[str]()
    for one in left:
        launch = one.arm.launch
        _refuse_gpus(launch, profile)
        file = f"{one.run}.yaml"
        recipes[file] = one.recipe(study)
        task = _training(folder / file, recipes[file], launch, python, flags)
        groups.setdefault((_size(launch), launch.config.path.stem), []).append(task)
        if len(recipes) == 1:
            warnings += _estimate(recipes[file], launch, profile)
    jobs, limit = list[Job](), profile.values.max_concurrent_arms
    for (size, config), tasks in groups.items():
        label = f"train-{config}-{size.nodes}x{size.processes}" if len(groups) > 1 else "train"
        # groups one after another, or together they would exceed the limit
        before = (jobs[-1].label,) if jobs and limit else ()
        jobs.append(Job(label, "train", tuple(tasks), size, (), before, limit))
    if {"eval", "report"} & set(stages) and missing_of(study):
        words = (*_CLI, "study", "run", shown_path(study.path), *study.words, "--no-train")
        launcher = (*_with_judge(study.evals, profile.values), *python)
        task = Task(launcher, (*words, *_allowed(flags)), "study run")
        uses_gpus = not all(arm.launch.config.use_cpu for arm in study.arms)
        trained = tuple(job.label for job in jobs)
        jobs.append(Job("eval", "eval", (task,), JobSize(uses_gpus=uses_gpus), after_any=trained))
    if not jobs:
        what = f"study '{study.name}': everything is done"
        raise RecipeError(what, f"look at it: recipes study report {shown_path(study.path)}")
    models = [arm.recipe.model for arm in study.arms]
    models += [judge for one in study.evals for judge in judge_model(one)]
    warnings += _judges_nobody_starts(study.evals, profile.values)
    return JobPlan(folder, tuple(jobs), recipes, tuple(models), tuple(warnings))


# ---- What they have in common ----


def _training(
    file: Path, recipe: Recipe, launch: Launch, python: tuple[str, ...], flags: Sequence[str]
) -> Task:
    """Return the training of a recipe that is written to `file`."""
    script = ("-m", "recipes_lib.train", shown_path(file), *flags)
    if launch.world_size == 1:
        return Task(python, script, recipe.name)
    words = (*python, "-m", "accelerate.commands.launch")
    words += ("--config_file", str(launch.config.path.resolve()))
    words += ("--num_processes", str(launch.world_size))
    if launch.machines > 1 or launch.config.num_machines > 1:
        words += ("--num_machines", str(launch.machines))
    return Task(words, script, recipe.name)


def _python(profile: Profile) -> tuple[str, ...]:
    """Return the words that start Python inside a job: the container's or the environment's, else
    the one that submits.
    """
    own = not (profile.setup or profile.prefix or profile.srun)
    return (*profile.prefix, sys.executable if own else "python")


def _size(launch: Launch) -> JobSize:
    gpus, kind = not launch.config.use_cpu, launch.distributed_type
    return JobSize(launch.machines, launch.per_machine, gpus, kind)


def _refuse_gpus(launch: Launch, profile: SiteProfile) -> None:
    """Refuse a launch that needs GPUs on a cluster that has none."""
    if not profile.values.has_gpus and not launch.config.use_cpu:
        what = f"this profile asks for no GPUs, and {launch.config.path.stem} needs them"
        hint = "add gres: gpu:{gpus}, or take --accelerate cpu, ddp_cpu or fsdp_cpu"
        raise profile.error("sbatch", what, hint)


def _estimate(recipe: Recipe, launch: Launch, profile: SiteProfile) -> list[str]:
    """Return what a training is estimated to take, to stand beside the profile's time limit, which
    it never changes; nothing where nothing is known.
    """
    if launch.config.use_cpu:
        return []
    from recipes_lib.plan.plan import plan_of  # imports torch

    try:
        seconds = plan_of(recipe, launch, card_named("h100-80gb")).seconds
    except RecipesError:
        return []
    if seconds is None:
        return []
    flags = {**profile.values.sbatch, **profile.values.stages.get("train", {})}
    limit = f"; the time limit is {flags['time']}" if flags.get("time") else ""
    return [f"note: a training takes about {seconds / 60:.0f} min on an H100 (estimated){limit}"]


def _allowed(flags: Sequence[str]) -> list[str]:
    """Return the flags of a training that evaluations take too: they also load the model."""
    return [flag for flag in flags if flag == "--trust-remote-code"]


def _with_judge(evals: Sequence[EvalRecipe], profile: Profile) -> tuple[str, ...]:
    """Return the words before a command that asks judges which the job has to start: vLLM lives in
    an environment of its own, and on a compute node nobody started it.
    """
    files = [one.judge for one in evals if one.judge and one.judge.judge.served_here]
    served = {file.judge.model: file.judge for file in files}
    if not served or profile.vllm is None:
        return ()
    if len(served) > 1:
        what = f"one job would have to serve two judges: {', '.join(served)}"
        raise RecipeError(what, "give the evals one judge, or judge in the job: judge.engine")
    ((model, judge),) = served.items()
    words = ["bash", str(project_root() / "launch" / "with_judge.sh"), model]
    words += ["--max-model-len", str(judge.max_context_tokens)]
    words += ["--revision", judge.revision] if judge.revision else []
    return (*words, "--")


def _judges_nobody_starts(evals: Sequence[EvalRecipe], profile: Profile) -> list[str]:
    """Return a warning for each judge that is expected on the compute node and that no job will
    start.
    """
    if profile.vllm and shutil.which(Path(profile.vllm).expanduser()):
        return []
    addresses = {
        str(one.judge.judge.base_url): one.name
        for one in evals
        if one.judge and one.judge.judge.served_here
    }
    remedy = "set vllm in the profile, or let the job judge by itself (judge.engine: transformers)"
    if profile.vllm:
        remedy = f"there is no {profile.vllm} here"
    return [
        f"warning: no job starts the judge that {name} expects at {address}: {remedy}"
        for address, name in addresses.items()
    ]
