"""The Slurm jobs of a recipe or a study, their order, and their scripts.

    a recipe   train -> an evaluation each -> report
    a study    arrays of `recipes train`, one for each launch -> `recipes study run`

Every job runs a command that can be run again, as an argument list: no shell reads a value of a
recipe. What all scripts share (signals, requeues, exit codes) is in launch/job.sh.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes_lib.config.launch import Launch, check_launch, plan_launch
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import cache_root, project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.leaks import refuse_leaks_of
from recipes_lib.evals.recipe import EvalRecipe, check_allowed, load_eval
from recipes_lib.slurm.profile import STAGES, Profile
from recipes_lib.study.config import load_study, study_file
from recipes_lib.study.run import missing_of, refuse_unmet
from recipes_lib.study.trainings import StudyRun, is_trained, study_trainings

# Flags that say which nodes of a partition are wanted, or by which right.
_OF_A_PARTITION = ("constraint", "nodelist", "exclude", "qos", "reservation")
_DEFAULT_EVALS = ("evals/alpaca_eval.yaml", "evals/mt_bench.yaml", "evals/lm_eval.yaml")
# What only a node of several knows; bash puts it in there. On one node the launcher finds a port.
_MEETING = (
    ' --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT"'
    " --rdzv_backend static --same_network"
)


@dataclass(frozen=True)
class Task:
    """One command: what starts it (Python, accelerate), what is started, its name for people."""

    launcher: tuple[str, ...]
    args: tuple[str, ...]
    what: str = ""


@dataclass(frozen=True)
class Job:
    """One submission; its label is unique in the chain, and names its files."""

    label: str
    stage: str  # of the profile
    tasks: tuple[Task, ...]  # several make an array
    uses_gpus: bool = True  # one for each process
    nodes: int = 1
    processes: int = 1  # on each node
    after: tuple[str, ...] = ()  # labels of jobs that must have succeeded
    after_any: tuple[str, ...] = ()  # labels of jobs that must have ended
    throttle: int | None = None  # tasks that run at the same time


@dataclass
class JobPlan:
    """What the submission of a run or a study needs."""

    name: str
    jobs: list[Job] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)  # of the trainings, by file name
    evals: list[EvalRecipe] = field(default_factory=list)  # that its jobs run
    warnings: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where scripts, logs and exit codes will lie."""
        return runs_root().resolve() / self.name / "slurm"


@dataclass
class Planner:
    """Makes the jobs of a recipe or a study from what `recipes launch` was told."""

    profile: Profile
    overrides: Sequence[str] = ()
    accelerate: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    named_stages: str | None = None  # None for all
    evals: Sequence[str] = ()  # words; none for the three of evals/
    flags: Sequence[str] = ()  # that are handed on to the commands of the jobs
    largest_array: Callable[[], int | None] = lambda: None  # tasks that the scheduler takes in one

    def plan(self, target: str) -> JobPlan:
        """Return the jobs of a recipe or a study, or raise everything that is wrong with it."""
        named = self.named_stages
        self.stages: Sequence[str] = STAGES if named is None else named.split(",")
        if wrong := [word for word in self.stages if word not in STAGES]:
            raise RecipeError(f"--stages: no stage {wrong[0]!r}", f"stages: {', '.join(STAGES)}")
        # the container's or the environment's Python, else the one that submits
        own = not (self.profile.setup or self.profile.prefix)
        self.python = (*self.profile.prefix, sys.executable if own else "python")
        path = study_file(target)
        plan = self._study(path) if path else self._recipe(target)
        plan.warnings.extend(self._doubtful_flags(plan.jobs))
        return plan

    def _doubtful_flags(self, jobs: Sequence[Job]) -> Iterator[str]:
        """Yield a warning for flags that Slurm may take, and that are hardly meant."""
        sbatch = self.profile.sbatch
        if self.profile.flags("train", 1, 1) != self.profile.flags("train", 0, 1):
            for job in jobs:
                partition = self.profile.flag(job.stage, "partition")
                if job.stage != "report" and not job.uses_gpus and partition:
                    what = f"{job.label} asks for no GPU and goes to partition {partition}"
                    hint = f"if that is for GPU jobs, set stages.{job.stage}.partition"
                    yield f"warning: {what}: {hint}"
        for stage in dict.fromkeys(job.stage for job in jobs):
            flags = self.profile.stage_flags(stage)
            if flags.get("partition", sbatch.get("partition")) == sbatch.get("partition"):
                continue
            inherited = [name for name in _OF_A_PARTITION if sbatch.get(name)]
            for name in inherited:
                if name not in flags:
                    what = (
                        f"stage {stage} has its own partition, but sbatch.{name} ({sbatch[name]})"
                    )
                    yield f"warning: {what}: if that is not meant, set stages.{stage}.{name}: null"

    def _recipe(self, target: str) -> JobPlan:
        recipe = load_recipe(target, self.overrides)
        launch = plan_launch(recipe.launch, self.accelerate, self.gpus, self.nodes)
        check_launch(recipe, launch)
        names = self.evals or [shown_path(project_root() / name) for name in _DEFAULT_EVALS]
        evals = [load_eval(name) for name in names if "eval" in self.stages]
        plan, run = JobPlan(recipe.name, evals=evals), RunDirectory(recipe.name)
        if "train" in self.stages:
            refuse_leaks_of(recipe, evals)
            plan.jobs.append(self._train_job(plan, "train", {"resolved.yaml": recipe}, launch))
        elif not run.exists() or run.read_state()["state"] != "finished":
            what = f"run '{recipe.name}' is not finished, so there is nothing to evaluate"
            raise RecipeError(what, "add the stage: --stages train,eval,report")
        trained = tuple(job.label for job in plan.jobs)
        for suite in evals:
            words = [suite.document.file, recipe.name]
            task = self._command(plan, "eval", words, suite.name, [suite])
            gpus = not launch.config.use_cpu
            plan.jobs.append(Job(f"eval-{suite.name}", "eval", (task,), gpus, after=trained))
        if "report" in self.stages and (evals or any(run.path.glob("evals/*/result*.json"))):
            words = [recipe.name, "--html", shown_path(run.path / "report.html")]
            task = self._command(plan, "compare", words, "report")
            last = tuple(job.label for job in plan.jobs if job.stage == "eval") or trained
            plan.jobs.append(Job("report", "report", (task,), uses_gpus=False, after=last))
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
            what = f"study '{study.name}' tunes its arms: what they train is known only afterwards"
            raise RecipeError(what, f"run it in one job: recipes study run {file}", file=file)
        refuse_unmet(study)
        plan, groups = JobPlan(study.name), dict[object, list[StudyRun]]()
        left = [training for training in study_trainings(study) if not is_trained(training)]
        for training in left if "train" in self.stages else ():
            launch = training.arm.launch
            key = launch.config.path, launch.machines, launch.per_machine
            groups.setdefault(key, []).append(training)
        size = self.largest_array() or len(left)
        arrays: list[list[StudyRun]] = []
        for group in groups.values():
            starts = range(0, len(group), size)
            arrays.extend(group[start : start + size] for start in starts)
        for number, trainings in enumerate(arrays, 1):
            recipes = {f"{training.run}.yaml": training.recipe for training in trainings}
            # one after another: together they would exceed the limit
            before = plan.jobs[-1:] if self.profile.max_concurrent_arms else []
            label = f"train-{number}" if len(arrays) > 1 else "train"
            launch = trainings[0].arm.launch
            plan.jobs.append(self._train_job(plan, label, recipes, launch, before))
        if {"eval", "report"} & {*self.stages} and missing_of(study):
            gpus = not all(arm.launch.config.use_cpu for arm in study.arms)
            words = ["run", file, *study.words, "--no-train"]
            task = self._command(plan, "study", words, "study run", study.evals)
            ended = tuple(job.label for job in plan.jobs)
            plan.jobs.append(Job("eval", "eval", (task,), gpus, after_any=ended))
            plan.evals.extend(study.evals)
        if not plan.jobs:
            what = f"study '{study.name}': everything is done"
            raise RecipeError(what, f"look at it: recipes study report {file}")
        return plan

    def _train_job(
        self,
        plan: JobPlan,
        label: str,
        recipes: Mapping[str, Recipe],
        launch: Launch,
        before: Sequence[Job] = (),
    ) -> Job:
        """Return the job that trains recipes, by their file's name; refused without its GPUs."""
        gpus, limit = not launch.config.use_cpu, self.profile.max_concurrent_arms
        if gpus and self.profile.flags("train", 1, 1) == self.profile.flags("train", 0, 1):
            what = f"this profile requests no GPUs, but {launch.config.path.stem} needs them"
            hint = "add gres: gpu:{gpus}, or use --accelerate cpu, ddp_cpu or fsdp_cpu"
            raise self.profile.error(what, hint)
        plan.recipes |= recipes
        launcher = self.python
        if launch.world_size > 1:
            launcher += ("-m", "accelerate.commands.launch")
            launcher += ("--config_file", str(launch.config.path.resolve()))
            launcher += ("--num_processes", str(launch.world_size))
            launcher += ("--num_machines", str(launch.machines))
        tasks = []
        for file, recipe in recipes.items():
            script = ("-m", "recipes_lib.train", shown_path(plan.folder / file), *self.flags)
            tasks.append(Task(launcher, script, recipe.name))
        size, after_any = (launch.machines, launch.per_machine), tuple(job.label for job in before)
        return Job(label, "train", tuple(tasks), gpus, *size, after_any=after_any, throttle=limit)

    def _command(
        self,
        plan: JobPlan,
        verb: str,
        words: Sequence[str],
        what: str,
        evals: Sequence[EvalRecipe] = (),
    ) -> Task:
        """Return a `recipes` command, and before it what starts the judge that its evals expect."""
        launcher, program = self.python, self.profile.vllm
        judges = [each.judge for each in evals if each.judge and each.judge.served_here]
        names = sorted({f"{judge.model} {judge.revision or ''}".strip() for judge in judges})
        if judges and not program:
            missing = "no job starts the judge that is expected at 127.0.0.1"
            plan.warnings.append(f"warning: {missing}: set vllm in the profile")
        elif len(names) > 1:
            hint = "give the evals one judge, or judge in the job: judge.engine"
            raise RecipeError(f"one job would have to serve two judges: {', '.join(names)}", hint)
        elif judges:
            script = str(project_root() / "launch" / "with_judge.sh")
            revision = ("--revision", judges[0].revision) if judges[0].revision else ()
            length = str(max(judge.max_context_tokens for judge in judges))
            launcher = ("bash", script, judges[0].model, "--max-model-len", length, *revision, "--")
            launcher += self.python
        trust = [flag for flag in self.flags if flag == "--trust-remote-code" and evals]
        check_allowed(evals, bool(trust))
        return Task(launcher, ("-m", "recipes_lib.cli", verb, *words, *trust), what)


# ---- The script of a job ----


def script_of(job: Job, folder: Path, profile: Profile) -> str:
    """Return the script of a job; it will lie in `folder`, beside its log and its exit code."""
    variables = {
        "RECIPES_RUNS_ROOT": str(runs_root().resolve()),
        "RECIPES_CACHE": str(cache_root().resolve()),
        **({"HF_HUB_OFFLINE": "1"} if profile.offline else {}),
        **({"VLLM": str(Path(profile.vllm).expanduser())} if profile.vllm else {}),
        **profile.variables(),
    }
    shared = project_root() / "launch" / "job.sh"
    lines = [
        "#!/bin/bash",
        f"# {folder.parent.name}: {job.label}, written by `recipes launch`",
        *directives(job, folder, profile),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 5",
        f"FOLDER={shlex.quote(str(folder))} JOB={shlex.quote(job.label)}",
        f"NODES={job.nodes} PROCESSES={job.processes} MAX_REQUEUES={profile.max_requeues}",
        f"source {shlex.quote(str(shared))} || exit 5   # signals, requeues, exit codes",
        "",
        *(f"export {name}={_quoted(value)}" for name, value in variables.items()),
        '[ -z "$TMPDIR" ] || mkdir -p "$TMPDIR" || environment_failed',
        *(f"{line} || environment_failed" for line in profile.setup),
        "",
        *job_commands(job),
        "finish",
    ]
    return "\n".join(lines) + "\n"


def directives(job: Job, folder: Path, profile: Profile) -> list[str]:
    """Return the #SBATCH lines. Slurm reads quotes as bash does, but escapes within them too."""
    log = str(folder / job.label).replace("%", "%%")
    array = []
    if len(job.tasks) > 1:
        limit = f"%{job.throttle}" if job.throttle else ""
        array, log = [f"--array=0-{len(job.tasks) - 1}{limit}"], f"{log}.%a"
    words = [
        f"--job-name={folder.parent.name}.{job.label}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *profile.flags(job.stage, job.processes if job.uses_gpus else 0, job.processes),
        f"--signal=B:USR2@{profile.signal_lead_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}.log",
        *array,
    ]
    return [f"#SBATCH {shlex.quote(word)}".replace("\\", "\\\\") for word in words]


def job_commands(job: Job) -> list[str]:
    """Return the lines of a script that do the work."""
    lines = []
    for task in job.tasks:
        if job.stage == "train":
            # A node ignores USR2 until its training listens, and leaves its exit code in a file:
            # launchers lose it.
            on_node = (
                'trap "" USR2; export RECIPES_EXIT_CODE_FILE="$REPORT.${SLURM_NODEID:-0}"; '
                f'exec {shlex.join(task.launcher)}{_MEETING if job.nodes > 1 else ""} "$@"'
            )
            words = shlex.join(("bash", "-c", on_node, job.label, *task.args))
        else:
            words = shlex.join((*task.launcher, *task.args))
        lines.append(f"run srun {words}")
    if len(lines) == 1:
        return lines
    cases = [f"{n}) {line} ;;   # {job.tasks[n].what}" for n, line in enumerate(lines)]
    return ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]


def _quoted(value: str) -> str:
    """Quote for bash; `{job}` becomes the job's id."""
    parts = [shlex.quote(part) if part else "" for part in value.split("{job}")]
    return '"${SLURM_JOB_ID:-$$}"'.join(parts) or "''"
