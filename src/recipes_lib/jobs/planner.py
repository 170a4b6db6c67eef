"""The jobs of a recipe or a study, and their order.

    a recipe   train -> an evaluation each -> report
    a study    trainings, those of one launch together -> `recipes study run`
    with looks the same for each look, and between two of them a job that fails if the study ends

Every task is a command that can be run again, as an argument list: no shell reads a value of a
recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.recipe import Recipe, check_launch, load_recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.leaks import refuse_leaks_of
from recipes_lib.evals.recipe import EvalRecipe, check_allowed, load_eval
from recipes_lib.jobs.jobs import STAGES, Job, Plan, Site, Task
from recipes_lib.study.config import Study, load_study, study_file
from recipes_lib.study.lock import shown_looks
from recipes_lib.study.progress import missing_of, refuse_unmet
from recipes_lib.study.trainings import StudyRun, is_trained, study_trainings

_DEFAULT_EVALS = ("evals/alpaca_eval.yaml", "evals/mt_bench.yaml", "evals/lm_eval.yaml")
_TRUST = "--trust-remote-code"


@dataclass(kw_only=True)
class Planner:
    """Makes the jobs of a recipe or a study from what `recipes launch` was told."""

    site: Site
    overrides: Sequence[str] = ()
    accelerate: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    stages: str | None = None  # words of `--stages`, separated by commas; None for all
    evals: Sequence[str] = ()  # files of eval recipes; none for the three of evals/
    flags: Sequence[str] = ()  # options that are handed on to the commands of the jobs

    def plan(self, target: str) -> Plan:
        """Return the jobs of a recipe or a study, or raise everything that is wrong with it."""
        stages = STAGES if self.stages is None else tuple(self.stages.split(","))
        for stage in stages:
            if stage not in STAGES:
                hint = f"stages: {', '.join(STAGES)}"
                raise RecipeError(f"--stages: no stage {stage!r}", hint)
        study = study_file(target)
        if study is None:
            plan = self._plan_recipe(target, stages)
        else:
            plan = self._plan_study(study, stages)
        plan.warnings.extend(self.site.doubts(plan.jobs))
        return plan

    def _empty_plan(self, name: str) -> Plan:
        return Plan(name, runs_root().resolve() / name / self.site.scheduler)

    def _plan_recipe(self, target: str, stages: Sequence[str]) -> Plan:
        recipe = load_recipe(target, self.overrides)
        launch = plan_launch(recipe.launch, self.accelerate, self.gpus, self.nodes)
        check_launch(recipe, launch)
        plan = self._empty_plan(recipe.name)
        run = RunDirectory(recipe.name)
        if "eval" in stages:
            names = self.evals or [shown_path(project_root() / name) for name in _DEFAULT_EVALS]
            plan.evals = [load_eval(name) for name in names]

        if "train" in stages:
            refuse_leaks_of(recipe, plan.evals)
            plan.recipes["resolved.yaml"] = recipe
            plan.jobs.append(self._training_job(plan, "train", plan.recipes, launch))
        elif not run.exists() or run.read_state()["state"] != "finished":
            what = f"run '{recipe.name}' is not finished, so there is nothing to evaluate"
            raise RecipeError(what, "add the stage: --stages train,eval,report")
        trained = tuple(job.label for job in plan.jobs)

        for evaluation in plan.evals:
            words = [evaluation.document.file, recipe.name]
            job = Job(
                label=f"eval-{evaluation.name}",
                stage="eval",
                tasks=(self._command(plan, "eval", words, evaluation.name, [evaluation]),),
                uses_gpus=not launch.config.use_cpu,
                after=trained,
            )
            plan.jobs.append(job)

        has_results = plan.evals or any(run.path.glob("evals/*/result*.json"))
        if "report" in stages and has_results:
            words = [recipe.name, "--html", shown_path(run.path / "report.html")]
            evaluated = tuple(job.label for job in plan.jobs if job.stage == "eval")
            job = Job(
                label="report",
                stage="report",
                tasks=(self._command(plan, "compare", words, "report"),),
                uses_gpus=False,
                after=evaluated or trained,
            )
            plan.jobs.append(job)
        return plan

    def _plan_study(self, path: Path, stages: Sequence[str]) -> Plan:
        """Return the jobs that train what is not trained, and one that evaluates and reports."""
        if self.evals:
            raise RecipeError("--evals is for recipes: a study names its evals itself")
        overrides = list(self.overrides)
        for key in ("accelerate", "gpus", "nodes"):
            value = getattr(self, key)
            if value is not None:
                overrides.append(f"{key}={value}")
        study = load_study(path, overrides)
        file = study.document.file
        if any(arm.tuning for arm in study.arms):
            what = f"study '{study.name}' tunes its arms: what they train is known only afterwards"
            raise RecipeError(what, f"run it in one job: recipes study run {file}", file=file)
        refuse_unmet(study)
        plan = self._empty_plan(study.name)
        if study.looks:
            self._add_looks(plan, study, stages)
        elif "train" in stages:
            self._add_trainings(plan, study_trainings(study), "train")
        evaluates = "eval" in stages or "report" in stages
        if evaluates and not study.looks and missing_of(study):
            self._add_evaluation(plan, study, "eval", plan.jobs, after=())
        if not plan.jobs:
            what = f"study '{study.name}': everything is done"
            raise RecipeError(what, f"look at it: recipes study report {file}")
        return plan

    def _add_looks(self, plan: Plan, study: Study, stages: Sequence[str]) -> None:
        """Add a chain: the trainings of a look, its evaluations, and a decision, whose success
        starts the next look. Where the study ends, the scheduler drops what waits for that.
        """
        shown = shown_looks(study)
        evaluates = "eval" in stages or "report" in stages
        before: tuple[str, ...] = ()
        for look in study.looks:
            record = shown.get(look.number)
            if record and record["stops"]:
                return
            if record:
                continue
            first = len(plan.jobs)
            if "train" in stages:
                trainings = study_trainings(study.at(look))
                self._add_trainings(plan, trainings, f"train-look{look.number}", before)
            if not evaluates:
                return
            label = f"eval-look{look.number}"
            self._add_evaluation(plan, study, label, plan.jobs[first:], before)
            if look.is_last or "train" not in stages:
                break
            words = ["status", study.document.file, *study.overrides, "--look", str(look.number)]
            decision = Job(
                label=f"look{look.number}",
                stage="report",
                tasks=(self._command(plan, "study", words, "go on?"),),
                uses_gpus=False,
                after=(label,),
            )
            plan.jobs.append(decision)
            before = (decision.label,)

    def _add_evaluation(
        self, plan: Plan, study: Study, label: str, trainings: Sequence[Job], after: tuple[str, ...]
    ) -> None:
        """Add the job that evaluates and reports what is trained by then."""
        words = ["run", study.document.file, *study.overrides, "--no-train"]
        job = Job(
            label=label,
            stage="eval",
            tasks=(self._command(plan, "study", words, "study run", study.evals),),
            uses_gpus=not all(arm.launch.config.use_cpu for arm in study.arms),
            after=after,
            # arms that failed must not keep the others from being evaluated
            after_any=tuple(training.label for training in trainings),
        )
        plan.jobs.append(job)
        plan.evals = list(study.evals)

    def _add_trainings(
        self, plan: Plan, trainings: Sequence[StudyRun], name: str, after: tuple[str, ...] = ()
    ) -> None:
        """Add the jobs that train what is not planned yet: a job's tasks share one launch."""
        by_launch: dict[object, list[StudyRun]] = {}
        for training in trainings:
            if f"{training.run}.yaml" not in plan.recipes and not is_trained(training):
                launch = training.arm.launch
                size = (launch.config.path, launch.machines, launch.per_machine)
                by_launch.setdefault(size, []).append(training)
        groups: list[list[StudyRun]] = []
        for alike in by_launch.values():
            step = self.site.largest_array or len(alike)
            starts = range(0, len(alike), step)
            groups += [alike[start : start + step] for start in starts]
        for number, group in enumerate(groups, 1):
            # one after another: together they would exceed the limit
            before: tuple[str, ...] = ()
            if self.site.max_concurrent_arms and plan.jobs:
                before = (plan.jobs[-1].label,)
            label = f"{name}-{number}" if len(groups) > 1 else name
            recipes = {f"{training.run}.yaml": training.recipe for training in group}
            plan.recipes.update(recipes)
            launch = group[0].arm.launch
            job = self._training_job(plan, label, recipes, launch, before)
            plan.jobs.append(replace(job, after=after))

    def _training_job(
        self,
        plan: Plan,
        label: str,
        recipes: Mapping[str, Recipe],
        launch: Launch,
        before: tuple[str, ...] = (),
    ) -> Job:
        """Return the job that trains recipes, by their file's name; refused without its GPUs."""
        uses_gpus = not launch.config.use_cpu
        if uses_gpus and not self.site.has_gpus:
            what = f"this profile requests no GPUs, but {launch.config.path.stem} needs them"
            hint = "add gres: gpu:{gpus}, or use --accelerate cpu, ddp_cpu or fsdp_cpu"
            raise self.site.error(what, hint)
        launcher = list(self.site.python)
        if launch.world_size > 1:
            launcher += ["-m", "accelerate.commands.launch"]
            launcher += ["--config_file", str(launch.config.path.resolve())]
            launcher += ["--num_processes", str(launch.world_size)]
            launcher += ["--num_machines", str(launch.machines)]
        tasks = []
        for file, recipe in recipes.items():
            path = shown_path(plan.folder / file)
            args = ("-m", "recipes_lib.train", path, *self.flags)
            tasks.append(Task(tuple(launcher), args, recipe.name))
        return Job(
            label=label,
            stage="train",
            tasks=tuple(tasks),
            uses_gpus=uses_gpus,
            nodes=launch.machines,
            processes=launch.per_machine,
            after_any=before,
            throttle=self.site.max_concurrent_arms,
        )

    def _command(
        self,
        plan: Plan,
        verb: str,
        words: Sequence[str],
        title: str,
        evals: Sequence[EvalRecipe] = (),
    ) -> Task:
        """Return a `recipes` command, and before it what starts the judge that its evals expect."""
        launcher: list[str] = []
        judges = [item.judge for item in evals if item.judge and item.judge.served_here]
        names = {f"{judge.model} {judge.revision or ''}".strip() for judge in judges}
        if judges and self.site.vllm is None:
            missing = "no job starts the judge that is expected at 127.0.0.1"
            plan.warnings.append(f"warning: {missing}: set vllm in the profile")
        elif len(names) > 1:
            what = f"one job would have to serve two judges: {', '.join(sorted(names))}"
            raise RecipeError(what, "give the evals one judge, or judge in the job: judge.engine")
        elif judges:
            script = project_root() / "launch" / "with_judge.sh"
            length = max(judge.max_context_tokens for judge in judges)
            launcher += ["bash", str(script), judges[0].model, "--max-model-len", str(length)]
            if judges[0].revision:
                launcher += ["--revision", judges[0].revision]
            launcher.append("--")
        launcher += self.site.python
        is_trusted = _TRUST in self.flags and bool(evals)
        check_allowed(evals, is_trusted)
        args = ["-m", "recipes_lib.cli", verb, *words]
        if is_trusted:
            args.append(_TRUST)
        return Task(tuple(launcher), tuple(args), title)
