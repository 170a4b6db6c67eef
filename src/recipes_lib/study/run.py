"""`recipes study plan`, `status` and `run`: what a study consists of, what is done, and doing the
rest. Imports no torch before it evaluates.

A training is done when its run is finished with the settings and data that the study has now; an
evaluation when its result is of what would be evaluated now.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from queue import Queue

from recipes_lib.analysis.differences import arm_differences
from recipes_lib.analysis.runs import ArmRuns
from recipes_lib.analysis.text import question_text, sentence_list
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, describe_holder, is_held, run_lock
from recipes_lib.core.terminal import count, say
from recipes_lib.data.reading import check_rows
from recipes_lib.evals.answering import check_questions
from recipes_lib.evals.judge import Judge
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.log import REFERENCE, is_current, log_file
from recipes_lib.evals.models import common_base, evaluated_bases, known_by
from recipes_lib.evals.questions import answer_count, question_count
from recipes_lib.evals.recipe import EvalRecipe, check_allowed
from recipes_lib.plan.cards import devices_here
from recipes_lib.study.config import BASE_ARM, Arm, Study, full_name
from recipes_lib.study.lock import lock_design
from recipes_lib.study.needs import Host, missing_needs
from recipes_lib.study.trainings import (
    REPLACED,
    StudyRun,
    is_trained,
    study_folder,
    study_trainings,
    study_tunings,
    what_changed,
    with_choices,
)
from recipes_lib.training.stopping import handling
from recipes_lib.weights.load import base_fingerprint

RECIPES = [sys.executable, "-m", "recipes_lib.cli"]
_POLL_S = 0.2  # how soon a STOP file, or the end of another process's training, is seen


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
    """Return every result asked for; in AlpacaEval each arm meets the baseline too, by seed."""
    base = base_run(study)
    runs: dict[str, dict[int, str]] = {BASE_ARM: {-1: base}} if study.file.include_base else {}
    for training in study_trainings(study):
        runs.setdefault(training.arm.name, {})[training.seed] = training.run
    results: dict[tuple[str, str, str], Evaluation] = {}
    for recipe in study.evals:
        opponent = recipe.opponent(None)
        named = {None: "", REFERENCE: "", BASE_ARM: base}.get(opponent, opponent or "")
        needed = [(recipe, run, named) for arm in runs.values() for run in arm.values()]
        if recipe.suite.name == "alpaca_eval":
            baseline = runs[study.baseline]
            needed += [
                (recipe, run, other)
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
    recipe = result.recipe
    with suppress(RecipesError, OSError):  # a model that is not here
        sides = [known_by(run, recipe) if run else None for run in (result.run, result.against)]
        judge = Judge(recipe.judge, fetch=False).fingerprint if recipe.judge else None
        return is_current(result.file, recipe.settings_key(), *sides, judge)
    return False


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
    """Return every training and result that is not done, those that failed first and with why."""
    failed: list[str] = []
    missing: list[str] = []
    for name, state in progress_of(study).items():
        if state.startswith("failed"):
            failed.append(f"{name} ({state})")
        elif state != "done":
            missing.append(name)
    return [*failed, *missing]


def _state_of(training: StudyRun) -> str:
    state, folder = training.state, RunDirectory(training.run).path
    if is_trained(training):
        return "done"
    if is_held(folder):
        return f"running{describe_holder(folder)}"
    why = [*what_changed(training), *str(state.get("error") or "").splitlines()]
    return ": ".join([state.get("state", "missing"), *why[:1]])


def _why_untrained(training: StudyRun) -> tuple[int, str]:
    """Return the exit code and the reason of a training that is not done and is not tried now."""
    state = training.state
    if state.get("state") == "failed" and state.get("error") and not what_changed(training):
        code = state.get("exit_code") or ExitCode.FAILED
        return int(code), state["error"].splitlines()[0]
    return int(ExitCode.FAILED), "is not trained as the study says"


def plan_lines(study: Study) -> Iterator[str]:
    """Yield what a study takes, in at most 15 lines."""
    trainings = (*study_tunings(study), *study_trainings(study))
    left = [training.run for training in trainings if not is_trained(training)]
    results = evaluations(study)
    asked = {(result.recipe.name, result.run): result.recipe for result in results}.values()
    # pairs in both orders, and grades; the judge's probes come on top
    judged = [result.recipe for result in results if result.recipe.suite.name == "alpaca_eval"] * 2
    judged += [recipe for recipe in asked if recipe.suite.name == "mt_bench"]
    yield question_text(study.file.question)
    yield f"trainings: {len(left)} of {len(trainings)} to do  {sentence_list(left, 3)}".rstrip()
    yield f"answers: {sum(map(answer_count, asked)):,}"
    yield f"judge requests: {sum(map(answer_count, judged)):,}"
    pairs, design = combinations([ArmRuns(arm.name, ()) for arm in study.arms], 2), study.design
    differing = [each for pair in pairs for each in arm_differences(*pair, design)]
    if undeclared := dict.fromkeys(each.what for each in differing if each.level == "confound"):
        yield f"differences that no factor declares: {sentence_list([*undeclared], 4)}"
    yield from _power_line(study)


def _power_line(study: Study) -> Iterator[str]:
    """Yield the difference on the primary metric that 80% of such studies find, where known."""
    from recipes_lib.stats import planned_effect  # scipy

    primary, seeds = str(study.aims.primary), min(len(arm.seeds) for arm in study.arms)
    questions = next((question_count(each) for each in study.evals if full_name(each, primary)), 0)
    pairs = math.comb(len(study.arms) + study.file.include_base, 2)
    # the primary metric's comparisons have four fifths of the level
    if pairs and (least := planned_effect(primary, questions, seeds, pairs / 0.8)):
        effect = f"{100 * least:.1f} points" if least < 1 else "no difference, however large,"
        sizes = f"{count(questions, 'question')}, {count(seeds, 'seed')} per arm, assumed spread"
        yield f"80% of such studies would find {effect} of {primary} ({sizes})"


# ---- What forbids it ----


def refuse_unmet(study: Study, fetch: bool = False) -> None:
    """Refuse a study if its evaluations would fail later; only `fetch` asks the Hub."""
    raise_all([*unmet(study, study.arms if is_untrained(study) else (), fetch)])


def refuse_missing_needs(study: Study) -> None:
    """Refuse a study whose first training would begin without what it and its judges need."""
    if is_untrained(study):
        recipes = [arm.recipe for arm in study.arms]
        raise_all(missing_needs(recipes, study.evals, Host()))


def is_untrained(study: Study) -> bool:
    """Whether there is anything left to train."""
    trainings = (*study_tunings(study), *study_trainings(study))
    return not all(is_trained(training) for training in trainings)


def raise_all(errors: Sequence[RecipesError]) -> None:
    """Raise the first error and print the others; do nothing where there is none."""
    for error in errors[1:]:
        print_error(error)
    if errors:
        raise errors[0]


def unmet(study: Study, arms: Sequence[Arm], fetch: bool = False) -> Iterator[RecipesError]:
    """Yield errors: rows unreadable, with an eval's questions, or not held out."""
    known = {BASE_ARM, REFERENCE, *(training.run for training in study_trainings(study))}
    for number, recipe in enumerate(study.evals):
        check_questions(recipe)
        rival = recipe.opponent(None) or BASE_ARM
        if rival not in known and not (runs_root() / rival / "run.json").is_file():
            yield recipe.document.error("metrics.against", f"there is no run '{rival}'")
        split = str(recipe.data.questions)
        if without := [arm.name for arm in arms if not getattr(arm.recipe.data.split, split, True)]:
            what = f"no {split} rows are held out in {', '.join(without)}: set data.split.{split}"
            yield study.document.error(("evals", number), f"{recipe.name}: {what}")
    for trained in {str(arm.recipe.data): arm.recipe for arm in arms}.values():
        yield from check_rows(trained)
        for name, leaks in search_recipe(trained, study.evals, fetch).items():
            if leaks.is_error:
                yield leak_error(name, leaks, trained)


# ---- Doing it ----


@contextmanager
def _heeding(stop_file: Path) -> Iterator[None]:
    """Make a SIGTERM of this process of a file that asks it to stop, until the block ends."""
    ended = threading.Event()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def watch() -> None:
        while not ended.wait(_POLL_S):
            if stop_file.exists():
                # to the thread that waits: a signal for the process may reach another
                signal.pthread_kill(main_thread, signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        stop_file.unlink(missing_ok=True)


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
        stop_file = study_folder(self.study) / "STOP"
        with run_lock(study_folder(self.study)):
            stop_file.unlink(missing_ok=True)  # it asked a process that is over
            refuse_unmet(self.study, fetch=True)
            if self.train:
                refuse_missing_needs(self.study)
            try:
                with handling(self._on_signal), _heeding(stop_file):
                    self._steps()
            except KeyboardInterrupt:
                say("stopped; the same command continues")
                return [*self._stopped, ExitCode.INTERRUPTED][0]
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
        self._train(study_tunings(self.study))
        self.study = with_choices(self.study)
        for arm in self.study.arms:
            if arm.tuning and arm.tuning.chosen is None:
                why = "diverged at every value" if arm.tuning.losses else "is not tuned yet"
                self._fail([arm.name], RecipesError(f"{arm.tuning.key} {why}"))
        trainings = study_trainings(self.study)
        ready = [training for training in trainings if training.arm.name not in self.failed]
        self._train(ready)
        if trained := {training.run for training in ready if is_trained(training)}:
            self._evaluate(trained)
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
        """Train what is not trained; raise KeyboardInterrupt if a stop was requested."""
        waiting = [training for training in trainings if not is_trained(training)]
        if not self.train:
            for training in waiting:
                self.failed[training.run] = _why_untrained(training)
            return
        devices = devices_here() if self.jobs > 1 else []
        share, shares = len(devices) // self.jobs, Queue[list[str]]()
        if devices and not share:
            raise RecipeError(f"--jobs {self.jobs}: only {count(len(devices), 'GPU')} here")
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
        name, folder = training.run, RunDirectory(training.run).path
        if is_held(folder):
            say(f"{name} is being trained{describe_holder(folder)}: waiting for it")
        while is_held(folder) and not self._stopped:
            time.sleep(_POLL_S)
        if self._stopped or is_trained(training):
            return
        if changed := ", ".join(what_changed(training)[:3]):
            place = runs_root() / REPLACED / f"{name}--{time.time_ns()}"
            place.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(place)
            say(f"{name} had different settings ({changed}): moved to {shown_path(place)}")
        recipe = study_folder(self.study) / "recipes" / f"{name}.yaml"
        training.recipe.write(recipe)
        words, log = ["train", shown_path(recipe), *self.flags], recipe.with_suffix(".log")
        note = f"   # output: {shown_path(log)}" * (self.jobs > 1)
        say(f"\n$ {shlex.join(['recipes', *words])}{note}")
        output = log.open("ab") if self.jobs > 1 else None
        last_update = training.state.get("updated")
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
        elif not self._stopped and not is_trained(training):
            why = f"the training ended with exit code {code}"
            state = training.state
            # an attempt that was refused leaves run.json as the one before wrote it
            if state.get("error") and state.get("updated") != last_update:
                why = state["error"].splitlines()[0]
            self.failed[name] = max(code, int(ExitCode.FAILED)), why

    def _evaluate(self, trained: set[str]) -> None:
        """Evaluate what is trained and has no result; each base and judge is loaded once."""
        study, needed = self.study, evaluations(self.study)
        if any(BASE_ARM in (result.run, result.against) for result in needed):
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
        lock_design(study)
        from recipes_lib.evals.run import EvalTask, evaluate_tasks  # torch

        tasks = {
            EvalTask(group[0].recipe, tuple(result.run for result in group), against or None): group
            for (_, against), group in groups.items()
        }

        def on_error(task: EvalTask, run: str, error: Exception) -> None:
            results = [result for result in tasks[task] if run in ("", result.run)]
            self._fail([each.title for each in results if not is_evaluated(each)], error)

        evaluate_tasks([*tasks], remote_code="--trust-remote-code" in self.flags, on_error=on_error)
