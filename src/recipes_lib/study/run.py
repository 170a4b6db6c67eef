"""`recipes study plan`, `status` and `run`: what a study consists of, what is done, and doing the
rest. Imports no torch before it evaluates.

A training is done when its run is finished with the settings and data that the study has now; an
evaluation when its result carries the key of what would be evaluated now. Nothing is done twice, so
the same command continues. A failing arm stops its own evaluations only.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from queue import Queue

from recipes_lib.analysis.text import difference_text, question_text, sentence_list
from recipes_lib.config.launch import LaunchSection
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.files import Row, read_rows
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, describe_holder, is_held, run_lock
from recipes_lib.core.terminal import count, say
from recipes_lib.data.rows import check_rows, source_hashes
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.log import REFERENCE, is_current, log_file
from recipes_lib.evals.models import evaluated_bases, model_key
from recipes_lib.evals.questions import local_questions
from recipes_lib.evals.recipe import HELD_OUT, EvalRecipe, check_allowed
from recipes_lib.plan.cards import devices_here
from recipes_lib.study.config import BASE_ARM, Arm, Study, full_name
from recipes_lib.training.resume_guard import differences, recipe_differences
from recipes_lib.weights.load import base_fingerprint
from recipes_lib.weights.runs import finished_run

RECIPES = [sys.executable, "-m", "recipes_lib.cli"]
REPLACED = ".replaced"
# Questions of sets whose files may not be here yet.
_QUESTION_SETS = {"tatsu-lab/alpaca_eval": 805, "package": 80}
# Assumed of a metric: the variance of two arms' difference on one question, half of which is new in
# each training, and the standard deviation of a training's mean over seeds.
SPREADS = {"win_rate": (0.175, 0.01), "pass_rate": (0.25, 0.01), "grade": (1.44, 0.05)}


@dataclass(frozen=True)
class StudyRun:
    """One training of a study: an arm, or one value of its grid, with one seed."""

    study: str
    arm: Arm
    seed: int

    @property
    def run(self) -> str:
        """The name of its run; an added seed changes no other's, and so trains nothing again."""
        own = self.seed == self.arm.own_seed
        return f"{self.study}--{self.arm.name}" + ("" if own else f"--seed{self.seed}")

    @property
    def directory(self) -> RunDirectory:
        """Its run."""
        return RunDirectory(self.run)

    @property
    def state(self) -> Row:
        """What run.json says; empty where there is no run."""
        return self.directory.read_state() if self.directory.exists() else {}

    @cached_property
    def recipe(self) -> Recipe:
        """What it is trained with: the arm's recipe with name, seed and launch."""
        recipe, launch = self.arm.recipe, self.arm.launch
        path = launch.config.path
        shipped = path.parent == project_root() / "accelerate_configs"
        section = LaunchSection(
            accelerate=path.stem if shipped else str(path.resolve()),
            gpus=launch.per_machine,
            nodes=launch.machines,
        )
        run = recipe.run.model_copy(update={"name": self.run})
        train = {**recipe.train, "seed": self.seed}
        return replace(recipe, name=self.run, run=run, train=train, launch=section)


def study_folder(study: Study) -> Path:
    """Return runs/<study>, where logs, records and the report lie."""
    return runs_root() / study.name


# ---- Trainings ----


def study_trainings(study: Study) -> list[StudyRun]:
    """Return the runs of all arms and seeds, in order."""
    return [StudyRun(study.name, arm, seed) for arm in study.arms for seed in arm.seeds]


def study_tunings(study: Study) -> list[StudyRun]:
    """Return the trainings that choose the values of arms which have none yet."""
    return [
        StudyRun(study.name, value, value.seeds[0])
        for arm in study.arms
        for value in (arm.candidates if arm.tuning and arm.tuning.chosen is None else ())
    ]


def with_choices(study: Study) -> Study:
    """Return the study with a value for each tuned arm whose grid is trained."""
    arms = list(study.arms)
    for place, arm in enumerate(arms):
        tried = [StudyRun(study.name, value, value.seeds[0]) for value in arm.candidates]
        if tried and all(is_trained(run) or has_diverged(run) for run in tried):
            losses = [validation_loss(run.directory) if is_trained(run) else None for run in tried]
            arms[place] = arm.tuned(losses)
    return replace(study, arms=tuple(arms))


def validation_loss(run: RunDirectory) -> float | None:
    """Return the validation loss of the weights that were kept: of the best step, or the end."""
    summary = run.read_state().get("summary") or {}
    loss, best = summary.get("last_validation_loss"), summary.get("best_step")
    for row in read_rows(run.metrics) if best is not None else ():
        if row.get("step") == best and "eval_loss" in row:
            loss = row["eval_loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else None


def is_trained(training: StudyRun) -> bool:
    """Whether a run is finished, with its weights, the study's settings and its data."""
    return training.state.get("state") == "finished" and not what_changed(training)


def has_diverged(training: StudyRun) -> bool:
    """Whether a training of these settings ended because its loss was not finite."""
    state = training.state
    diverged = state.get("state") == "failed" and state.get("exit_code") == ExitCode.NUMERICS
    return diverged and not what_changed(training)


def what_changed(training: StudyRun) -> list[str]:
    """Return what of a run is not as the study has it now, a phrase for each."""
    state, launch, phrases = training.state, training.arm.launch, list[str]()
    if guard := state.get("guard"):
        changed = recipe_differences(training.recipe, guard)
        phrases += [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]
        world, kind = guard["launch.world_size"], str(guard["launch.distribution"])
        if world != launch.world_size or ("FSDP" in kind) != ("FSDP" in launch.distributed_type):
            now = f"{launch.distributed_type} x {launch.world_size}"
            phrases.append(f"launch {kind} x {world} -> {now}")
    if before := state.get("data_files"):
        with suppress(RecipesError):  # data that is not there, or damaged, is the training's error
            data_files = source_hashes(training.recipe.data)
            phrases += [f"{name} changed" for name in differences(before, data_files)]
    weights = training.directory.weights(training.recipe.lora is None)
    if state.get("state") == "finished" and not any(weights.glob("*.safetensors")):
        phrases.append("its weights are gone")
    return phrases


# ---- Evaluations ----


@dataclass(frozen=True)
class Evaluation:
    """One result: a run's answers to an eval, judged against those of another run where named."""

    recipe: EvalRecipe
    run: str
    against: str = ""

    @property
    def file(self) -> Path:
        """Its result.json."""
        return log_file(runs_root() / self.run, self.recipe.name, self.against or None)

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"{self.recipe.name} of {self.run}" + f" against {self.against}" * bool(self.against)


def base_recipe(study: Study) -> Recipe:
    """Return the recipe that says how the base is asked: the first without quantization, if any."""
    recipes = [arm.recipe for arm in study.arms]
    return next((recipe for recipe in recipes if recipe.base_format is None), recipes[0])


def base_run(study: Study) -> str:
    """Return the run of the base model; `base` before it was first evaluated."""
    recipe = base_recipe(study)
    bases = evaluated_bases(recipe.to_dict(), runs_root(), base_fingerprint(recipe))
    return bases[-1].name if bases else BASE_ARM


def evaluations(study: Study) -> list[Evaluation]:
    """Return every result that the study asks for. In AlpacaEval each arm meets the baseline head
    to head too, by seed where both have it.
    """
    base = base_run(study)
    runs: dict[str, dict[int, str]] = {BASE_ARM: {-1: base}} if study.file.include_base else {}
    for training in study_trainings(study):
        runs.setdefault(training.arm.name, {})[training.seed] = training.run
    results: dict[tuple[str, str, str], Evaluation] = {}
    for recipe in study.evals:
        opponent = recipe.opponent(None) if recipe.is_judged else None
        named = {None: "", REFERENCE: "", BASE_ARM: base}.get(opponent, opponent or "")
        needed = [(recipe, run, named) for arm in runs.values() for run in arm.values()]
        if recipe.suite.name == "alpaca_eval":
            metrics = recipe.metrics.model_copy(update={"probe_pairs": 0})  # probed before
            unprobed = recipe.model_copy(update={"metrics": metrics})
            baseline = runs[study.baseline]
            needed += [
                (unprobed, run, other)
                for arm in runs.values()
                for (seed, other), (own, run) in product(baseline.items(), arm.items())
                if seed == own or not baseline.keys() & arm.keys()
            ]
        for each, run, other in needed:
            if run != other:
                results.setdefault((each.name, run, other), Evaluation(each, run, other))
    return list(results.values())


def is_evaluated(result: Evaluation) -> bool:
    """Whether the result is there, of the weights, questions and judge that the study has now."""
    with suppress(RecipesError, OSError):  # a model that is not here
        model, opponent = (_model_key(run) if run else None for run in (result.run, result.against))
        if result.recipe.generation.engine == "openai":
            model = opponent = None  # what a server answers with is known by its name
        return is_current(result.file, result.recipe.settings_key(), model, opponent)
    return False


def _model_key(run: str) -> str:
    directory = RunDirectory(run)
    if fingerprint := directory.read_state().get("fingerprint"):  # a model without a run
        return str(fingerprint)
    trained = finished_run(directory, remote_code=True)
    return model_key(trained.recipe, trained.weights)


# ---- What is done, and what the rest takes ----


def progress_of(study: Study) -> dict[str, str]:
    """Return the state of each training and result: done, missing, or what its run.json says."""
    trainings = (*study_tunings(study), *study_trainings(study))
    states = {f"training {training.run}": _state_of(training) for training in trainings}
    for result in evaluations(study):
        trained = states.get(f"training {result.run}", "done") == "done"
        states[result.title] = "done" if trained and is_evaluated(result) else "missing"
    return states


def missing_of(study: Study) -> list[str]:
    """Return every training and result that is not done."""
    return [name for name, state in progress_of(study).items() if state != "done"]


def _state_of(training: StudyRun) -> str:
    state, folder = training.state, training.directory.path
    if is_trained(training) or ("--tune-" in training.run and has_diverged(training)):
        return "done"
    if is_held(folder):
        return f"running{describe_holder(folder)}"
    why = [*what_changed(training), *str(state.get("error") or "").splitlines()]
    return ": ".join([state.get("state", "missing"), *why[:1]])


def plan_lines(study: Study) -> Iterator[str]:
    """Yield what a study takes, in at most 15 lines."""
    trainings = (*study_tunings(study), *study_trainings(study))
    left = [training.run for training in trainings if not is_trained(training)]
    results = evaluations(study)
    asked = {(result.recipe.name, result.run): result.recipe for result in results}.values()
    # pairs in both orders, and grades; the judge's probes come on top
    judged = [result.recipe for result in results if result.recipe.suite.name == "alpaca_eval"] * 2
    judged += [each for each in asked if each.suite.name == "mt_bench" or each.metrics.absolute]
    base = " and their base" * study.file.include_base
    yield question_text(study.file.question)
    yield f"{count(len(study.arms), 'arm')}{base}, {count(len(study.evals), 'eval')}"
    yield f"trainings: {len(left)} of {len(trainings)} to do  {sentence_list(left, 3)}".rstrip()
    yield f"answers: {sum(map(_answers, asked)):,}"
    yield f"judge requests: {sum(map(_answers, judged)):,}"
    if undeclared := study.undeclared:
        yield f"differences that no factor declares: {sentence_list(undeclared, 4)}"
    yield from _power_line(study)


def _answers(recipe: EvalRecipe) -> int:
    """How many answers a model writes; each question of MT-Bench has two turns."""
    turns = 2 if recipe.suite.name == "mt_bench" else 1
    return turns * _questions(recipe)


def _questions(recipe: EvalRecipe) -> int:
    """How many questions an eval has, where that is known; 0 where it asks none itself."""
    if recipe.suite.name in ("lm_eval", "heldout_loss"):
        return 0
    with suppress(RecipesError):  # files that cannot be used are the evaluation's error
        if chosen := local_questions(recipe):
            return len(chosen.questions)
    known = _QUESTION_SETS.get(str(recipe.data.questions).partition(":")[0], 0)
    return min(known, recipe.data.max_questions or known)


def _power_line(study: Study) -> Iterator[str]:
    """Yield the difference on the primary metric that 80% of such studies find, where known."""
    primary = str(study.aims.primary)
    kind, seeds = primary.rpartition("/")[2], min(len(arm.seeds) for arm in study.arms)
    questions = next((_questions(each) for each in study.evals if full_name(each, primary)), 0)
    pairs = math.comb(len(study.arms) + study.file.include_base, 2)
    if kind in SPREADS and questions and pairs:
        # the primary metric's comparisons have four fifths of the level
        least = smallest(*SPREADS[kind], questions, seeds, pairs / 0.8)
        effect = difference_text(least, "grade" if kind == "grade" else "share", signed=False)
        effect = effect if kind == "grade" or least < 1 else "no difference"
        sizes = f"{count(questions, 'question')}, {count(seeds, 'seed')} per arm, assumed spread"
        yield f"finds {effect} of {primary} ({sizes})"


def smallest(
    variance: float, spread: float, questions: int, seeds: int, comparisons: float = 1
) -> float:
    """Return the smallest true difference that 80% of studies with such `SPREADS` find."""
    from recipes_lib.stats import ALPHA, detectable  # scipy

    errors = [detectable(max(1, n - 1), ALPHA / comparisons) ** 2 for n in (questions, seeds)]
    own, new = variance / 2 / questions, variance / 2 / questions / seeds
    over_seeds = (2 * spread**2 / seeds + new) * (seeds > 1)
    return math.sqrt(max(errors[0] * own + errors[1] * over_seeds, errors[0] * (own + new)))


# ---- What forbids it ----


def refuse_unmet(study: Study, fetch: bool = False) -> None:
    """Refuse a study whose evaluations would mean nothing later; only `fetch` asks the Hub."""
    trainings = (*study_tunings(study), *study_trainings(study))
    arms = () if all(map(is_trained, trainings)) else study.arms
    errors, warnings = unmet(study, arms, fetch)
    for each in (*warnings, *errors[1:]):
        print_error(each)
    if errors:
        raise errors[0]


def unmet(
    study: Study, arms: Sequence[Arm], fetch: bool = False
) -> tuple[list[RecipesError], list[RecipeError]]:
    """Return errors and warnings: rows unreadable, with an eval's questions, or not held out."""
    errors, warnings = list[RecipesError](), list[RecipeError]()
    if not study.evals:
        what = "warning: the study names no evals, so nothing will be compared"
        warnings.append(study.document.error(("evals",), what))
    for number, recipe in enumerate(study.evals):
        split = str(recipe.data.questions)
        without = [arm.name for arm in arms if not getattr(arm.recipe.data.split, split, True)]
        if recipe.suite.name == "heldout_loss" and split in HELD_OUT and without:
            what = f"no {split} rows are held out in {', '.join(without)}: set data.split.{split}"
            errors.append(study.document.error(("evals", number), f"{recipe.name}: {what}"))
    searched = [recipe for recipe in study.evals if recipe.suite.name != "lm_eval"]
    for trained in {str(arm.recipe.data): arm.recipe for arm in arms}.values():
        errors += check_rows(trained)
        for name, leaks in search_recipe(trained, searched, fetch).items():
            if leaks.found:
                (errors if leaks.is_error else warnings).append(leak_error(name, leaks, trained))
    return errors, warnings


# ---- Doing it ----


@dataclass
class StudyRunner:
    """Does what of a study is not done yet."""

    study: Study
    report: Callable[[Study], object]  # what writes the report, at the end
    jobs: int = 1  # trainings at the same time; several divide the GPUs into equal shares
    flags: Sequence[str] = ()  # options handed to `recipes train` (`--trust-remote-code`)
    train: bool = True  # False to evaluate only what is trained already, in a cluster's job
    failed: dict[str, tuple[int, str]] = field(default_factory=dict)  # by run, result or arm
    _stopped: list[ExitCode] = field(default_factory=list)  # why, first reason first
    _training: bool = False
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self) -> ExitCode:
        """Do everything; return 0, 1 (failures), 6 (judgments missing), or 75 or 130 (stopped)."""
        check_allowed(self.study.evals, "--trust-remote-code" in self.flags)
        with run_lock(study_folder(self.study)):
            refuse_unmet(self.study, fetch=True)
            before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
            try:
                self._steps()
            except KeyboardInterrupt:
                say("stopped; the same command continues")
                return [*self._stopped, ExitCode.INTERRUPTED][0]
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        for name, (code, why) in self.failed.items():
            say(f"failed: {name} (exit code {code}): {why}")
        codes = {code for code, _ in self.failed.values()}
        only_judgments = codes == {ExitCode.EVALUATION_INCOMPLETE}
        return ExitCode.EVALUATION_INCOMPLETE if only_judgments else ExitCode(bool(codes))

    def _on_signal(self, number: int, frame: object) -> None:
        """Hand a signal on to the trainings, which save; where none runs, all ends here."""
        is_typed = number == signal.SIGINT
        self._stopped.append(ExitCode.INTERRUPTED if is_typed else ExitCode.PREEMPTED)
        for process in list(self._running):
            process.send_signal(number)
        if not self._training:
            raise KeyboardInterrupt

    def _steps(self) -> None:
        """Tune arms, train every arm and seed, evaluate what is trained, write the report."""
        tried = study_tunings(self.study)
        self._train([training for training in tried if not has_diverged(training)])
        for training in filter(has_diverged, tried):
            self.failed.pop(training.run, None)  # its value cannot be chosen: no failure
        self.study = with_choices(self.study)
        for arm in self.study.arms:
            if arm.tuning and arm.tuning.chosen is None:
                diverged = "diverged at every value" if arm.tuning.losses else "is not tuned yet"
                self._fail([arm.name], RecipesError(f"{arm.tuning.key} {diverged}"))
            elif arm.tuning:
                say(f"{arm.name}: {arm.tuning.key} {arm.tuning.chosen} is the best")
        trainings = study_trainings(self.study)
        ready = [training for training in trainings if training.arm.name not in self.failed]
        self._train(ready)
        if trained := {training.run for training in ready if is_trained(training)}:
            self._evaluate(trained)
            say("\nstatistics and report ...")
            try:
                self.report(self.study)
            except RecipesError as error:
                self._fail(["the report"], error)

    def _fail(self, names: Sequence[str], error: Exception) -> None:
        """Note that something failed; the rest goes on."""
        code = error.exit_code if isinstance(error, RecipesError) else ExitCode.FAILED
        why = str(error).partition("\n")[0] or type(error).__name__
        self.failed |= dict.fromkeys(names, (int(code), why))

    def _train(self, trainings: Sequence[StudyRun]) -> None:
        """Train what is not trained; a KeyboardInterrupt follows where somebody asked to stop."""
        waiting = [training for training in trainings if not is_trained(training)]
        if not self.train:
            error = RecipesError("is not trained with the settings that the study has now")
            self._fail([training.run for training in waiting], error)
            return
        devices = devices_here() if self.jobs > 1 else []
        share, shares = len(devices) // self.jobs, Queue[list[str]]()
        for training in waiting if devices else ():
            launch = training.arm.launch
            if launch.per_machine > share and not launch.config.use_cpu:
                what = f"arm '{training.arm.name}' needs {count(launch.per_machine, 'GPU')}"
                raise RecipeError(what, f"--jobs {self.jobs} gives it {share} of {len(devices)}")
        for job in range(self.jobs):
            shares.put(devices[job * share : (job + 1) * share])
        self._training = True
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for ended in as_completed(pool.submit(self._train_one, t, shares) for t in waiting):
                    ended.result()
            except BaseException:  # say of a full disk: nobody would look after the others
                self._on_signal(signal.SIGTERM, None)
                raise
        self._training = False
        if self._stopped:
            raise KeyboardInterrupt

    def _train_one(self, training: StudyRun, shares: Queue[list[str]]) -> None:
        """Train on a share of the GPUs; a run that another process trains is waited for."""
        name, folder = training.run, training.directory.path
        if is_held(folder):
            say(f"{name} is being trained{describe_holder(folder)}: waiting for it")
        while is_held(folder) and not self._stopped:
            time.sleep(0.2)
        if self._stopped or is_trained(training):
            return
        if changed := ", ".join(what_changed(training)[:3]):
            place = runs_root() / REPLACED / f"{name}--{time.time_ns()}"
            place.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(place)
            say(f"{name} had other settings ({changed}): moved to {shown_path(place)}")
        recipe = study_folder(self.study) / "recipes" / f"{name}.yaml"
        training.recipe.write(recipe)
        words, log = ["train", shown_path(recipe), *self.flags], recipe.with_suffix(".log")
        note = f"   # output: {shown_path(log)}" * (self.jobs > 1)
        say(f"\n$ {shlex.join(['recipes', *words])}{note}")
        output = log.open("ab") if self.jobs > 1 else None
        devices = shares.get()
        process = subprocess.Popen(
            [*RECIPES, *words],
            stdout=output,
            stderr=output,
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
            start_new_session=True,  # so that a terminal's Ctrl-C does not reach it twice
        )
        self._running.append(process)
        if self._stopped:  # since this training was chosen
            process.terminate()
        code = process.wait()
        self._running.remove(process)
        shares.put(devices)
        if code == ExitCode.ENVIRONMENT and is_held(folder):
            self._train_one(training, shares)  # one that a killed runner had started was first
        elif code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
            self._stopped.append(ExitCode(code))
        elif code == ExitCode.DONE and training.state.get("state") == "finished":
            say(f"{name}: trained")
        elif not self._stopped:
            why = training.state.get("error") or f"the training ended with exit code {code}"
            self.failed[name] = max(code, int(ExitCode.FAILED)), why.splitlines()[0]
            say(f"{name}: failed (exit code {code}); the other trainings go on")

    def _evaluate(self, trained: set[str]) -> None:
        """Evaluate what is trained and has no result; each base and judge is loaded once."""
        study, needed = self.study, evaluations(self.study)
        if any(BASE_ARM in (result.run, result.against) for result in needed):
            from recipes_lib.evals.models import common_base  # torch

            try:
                common_base([base_recipe(study)]).record()
                needed = evaluations(study)
            except RecipesError as error:
                self._fail(["the base"], error)
        unusable = {BASE_ARM, *(training.run for training in study_trainings(study))} - trained
        groups: dict[tuple[str, str], list[Evaluation]] = {}
        for result in needed:
            if not unusable & {result.run, result.against}:
                groups.setdefault((result.recipe.name, result.against), []).append(result)
        if all(is_evaluated(result) for group in groups.values() for result in group):
            return
        from recipes_lib.evals.run import EvalTask, evaluate_tasks  # torch

        tasks = {
            EvalTask(group[0].recipe, tuple(result.run for result in group), against or None): group
            for (_, against), group in groups.items()
        }
        say("\nevaluating ...")

        def on_error(task: EvalTask, run: str, error: Exception) -> None:
            results = [result for result in tasks[task] if run in ("", result.run)]
            self._fail([each.title for each in results if not is_evaluated(each)], error)

        remote_code = "--trust-remote-code" in self.flags
        evaluate_tasks(list(tasks), remote_code=remote_code, on_error=on_error)
