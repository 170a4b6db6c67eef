"""`recipes study plan`, `status` and `run`: what of a study is done, and doing the rest. Imports no
torch before it evaluates.
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
from itertools import combinations
from pathlib import Path
from queue import Queue

from recipes_lib.analysis.differences import arm_differences
from recipes_lib.analysis.runs import ArmRuns
from recipes_lib.analysis.text import question_text, sentence_list
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.files import Row
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, describe_holder, is_held, run_lock
from recipes_lib.core.terminal import count, say
from recipes_lib.data.reading import check_rows
from recipes_lib.evals.answers import check_questions
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
    all_trainings,
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
        title = f"{self.recipe.name} of {self.run}"
        return f"{title} against {self.against}" if self.against else title


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
    runs: dict[str, dict[int, str]] = {}  # of each arm, by seed
    if study.file.include_base:
        runs[BASE_ARM] = {-1: base}
    for training in study_trainings(study):
        runs.setdefault(training.arm.name, {})[training.seed] = training.run
    results: dict[tuple[str, str, str], Evaluation] = {}
    for recipe in study.evals:
        opponent = recipe.opponent(None) or REFERENCE
        against = {REFERENCE: "", BASE_ARM: base}.get(opponent, opponent)
        pairs: list[tuple[str, str]] = []
        for by_seed in runs.values():
            pairs += [(run, against) for run in by_seed.values()]
        if recipe.suite.name == "alpaca_eval":
            baseline = runs[study.baseline]
            for by_seed in runs.values():
                for seed, rival in baseline.items():
                    if seed in by_seed:
                        pairs.append((by_seed[seed], rival))
                    elif not baseline.keys() & by_seed.keys():
                        # no seed in common, as with the base: every run meets every other
                        pairs += [(run, rival) for run in by_seed.values()]
        for run, rival in pairs:
            if run != rival:
                results.setdefault((recipe.name, run, rival), Evaluation(recipe, run, rival))
    return list(results.values())


def is_evaluated(result: Evaluation) -> bool:
    """Whether the result is there, of the weights, questions and judge that the study has now."""
    recipe = result.recipe
    with suppress(RecipesError, OSError):  # a model that is not here
        model = known_by(result.run, recipe)
        opponent = known_by(result.against, recipe) if result.against else None
        judge = Judge(recipe.judge, fetch=False).fingerprint if recipe.judge else None
        return is_current(result.file, recipe.settings_key(), model, opponent, judge)
    return False


# ---- What is done, and what the rest takes ----


def progress_of(study: Study) -> dict[str, str]:
    """Return the state of each training and result: done, missing, or what its run.json says."""
    states = {f"training {training.run}": _state_of(training) for training in all_trainings(study)}
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
    if is_trained(training):
        return "done"
    folder = RunDirectory(training.run).path
    if is_held(folder):
        return f"running{describe_holder(folder)}"
    reasons = what_changed(training) + _error_lines(training.state)
    return ": ".join([training.state.get("state", "missing"), *reasons[:1]])


def _error_lines(state: Row) -> list[str]:
    return str(state.get("error") or "").splitlines()


def plan_lines(study: Study) -> Iterator[str]:
    """Yield what a study takes, in at most 15 lines."""
    from recipes_lib.stats import planned_effect  # scipy

    trainings = all_trainings(study)
    left = [training.run for training in trainings if not is_trained(training)]
    yield question_text(study.file.question)
    yield f"trainings: {len(left)} of {len(trainings)} to do  {sentence_list(left, 3)}".rstrip()
    answers: dict[tuple[str, str], int] = {}
    judgments = 0  # the judge's probes come on top
    for result in evaluations(study):
        suite = result.recipe.suite.name
        is_new = (result.recipe.name, result.run) not in answers
        number = answer_count(result.recipe)
        answers[result.recipe.name, result.run] = number
        if suite == "alpaca_eval":
            judgments += 2 * number  # each pair in both orders
        elif suite == "mt_bench" and is_new:
            judgments += number
    yield f"answers: {sum(answers.values()):,}"
    yield f"judge requests: {judgments:,}"
    undeclared: dict[str, None] = {}
    for pair in combinations([ArmRuns(arm.name, ()) for arm in study.arms], 2):
        for difference in arm_differences(*pair, study.design):
            if difference.level == "confound":
                undeclared[difference.what] = None
    if undeclared:
        yield f"differences that no factor declares: {sentence_list([*undeclared], 4)}"

    # the difference on the primary metric that 80% of such studies find, where it is known
    primary = str(study.aims.primary)
    seeds = min(len(arm.seeds) for arm in study.arms)
    measuring = [recipe for recipe in study.evals if full_name(recipe, primary)]
    questions = question_count(measuring[0]) if measuring else 0
    pairs = math.comb(len(study.arms) + study.file.include_base, 2)
    # the primary metric's comparisons have four fifths of the level
    least = planned_effect(primary, questions, seeds, pairs / 0.8) if pairs else None
    if least:
        effect = f"{100 * least:.1f} points" if least < 1 else "no difference, however large,"
        sizes = f"{count(questions, 'question')}, {count(seeds, 'seed')} per arm, assumed spread"
        yield f"80% of such studies would find {effect} of {primary} ({sizes})"


# ---- What forbids it ----


def refuse_unmet(study: Study, fetch: bool = False) -> None:
    """Refuse a study if its evaluations would fail later; only `fetch` asks the Hub."""
    arms = study.arms if is_untrained(study) else ()
    raise_all(list(unmet(study, arms, fetch)))


def is_untrained(study: Study) -> bool:
    """Whether there is anything left to train."""
    return not all(map(is_trained, all_trainings(study)))


def missing_needs_of(study: Study) -> list[RecipesError]:
    """Return what the trainings that are left, and the judges after them, need and do not have."""
    if not is_untrained(study):
        return []
    return missing_needs([arm.recipe for arm in study.arms], study.evals, Host())


def raise_all(errors: Sequence[RecipesError]) -> None:
    """Raise the first error and print the others; do nothing where there is none."""
    for error in errors[1:]:
        print_error(error)
    if errors:
        raise errors[0]


def unmet(study: Study, arms: Sequence[Arm], fetch: bool = False) -> Iterator[RecipesError]:
    """Yield errors: rows unreadable, with an eval's questions, or not held out."""
    runs = {BASE_ARM, REFERENCE, *(training.run for training in study_trainings(study))}
    for number, recipe in enumerate(study.evals):
        check_questions(recipe)
        rival = recipe.opponent(None) or BASE_ARM
        if rival not in runs and not (runs_root() / rival / "run.json").is_file():
            yield recipe.document.error("metrics.against", f"there is no run '{rival}'")
        split = str(recipe.data.questions)
        without = [arm.name for arm in arms if not getattr(arm.recipe.data.split, split, True)]
        if without:
            what = f"no {split} rows are held out in {', '.join(without)}: set data.split.{split}"
            yield study.document.error(("evals", number), f"{recipe.name}: {what}")
    by_data = {str(arm.recipe.data): arm.recipe for arm in arms}
    for trained in by_data.values():
        yield from check_rows(trained)
        for name, leaks in search_recipe(trained, study.evals, fetch).items():
            if leaks.is_error:
                yield leak_error(name, leaks, trained)


# ---- Doing it ----


@contextmanager
def _heeding(stop_file: Path) -> Iterator[None]:
    """Make a SIGTERM of this process of a file that asks it to stop, until the block ends."""
    ended = threading.Event()
    main_thread = threading.get_ident()

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
                raise_all(missing_needs_of(self.study))
            try:
                with handling(self._on_signal), _heeding(stop_file):
                    self._steps()
            except KeyboardInterrupt:
                say("stopped; the same command continues")
                return self._stopped[0] if self._stopped else ExitCode.INTERRUPTED
        for name, (code, why) in self.failed.items():
            say(f"failed: {name} (exit code {code}): {why}")
        codes = {code for code, _ in self.failed.values()}
        if codes == {ExitCode.EVALUATION_INCOMPLETE}:
            return ExitCode.EVALUATION_INCOMPLETE
        return ExitCode.FAILED if codes else ExitCode.DONE

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
        trained = {training.run for training in ready if is_trained(training)}
        if trained:
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
                code = int(ExitCode.FAILED)
                why = "is not trained as the study says"
                state = training.state
                reasons = _error_lines(state)
                if state.get("state") == "failed" and reasons and not what_changed(training):
                    code = int(state.get("exit_code") or code)
                    why = reasons[0]
                self.failed[training.run] = code, why
            return
        devices = devices_here() if self.jobs > 1 else []
        share = len(devices) // self.jobs
        if devices and not share:
            raise RecipeError(f"--jobs {self.jobs}: only {count(len(devices), 'GPU')} here")
        shares = Queue[list[str]]()
        for job in range(self.jobs):
            shares.put(devices[job * share : (job + 1) * share])
        self._training = True
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(self._train_one, run, shares) for run in waiting]
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # say of a full disk: nobody would look after the others
                self._on_signal(signal.SIGTERM, None)
                raise
        self._training = False
        if self._stopped:
            raise KeyboardInterrupt

    def _train_one(self, training: StudyRun, shares: Queue[list[str]]) -> None:
        """Train on a share of the GPUs; a run that another process trains is waited for."""
        name = training.run
        folder = RunDirectory(name).path
        if is_held(folder):
            say(f"{name} is being trained{describe_holder(folder)}: waiting for it")
        while is_held(folder) and not self._stopped:
            time.sleep(_POLL_S)
        if self._stopped or is_trained(training):
            return
        changed = ", ".join(what_changed(training)[:3])
        if changed:
            aside = runs_root() / REPLACED / f"{name}--{time.time_ns()}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)
            say(f"{name} had different settings ({changed}): moved to {shown_path(aside)}")
        recipe = study_folder(self.study) / "recipes" / f"{name}.yaml"
        training.recipe.write(recipe)
        arguments = ["train", shown_path(recipe), *self.flags]
        command = shlex.join(["recipes", *arguments])
        output = None
        if self.jobs > 1:
            log = recipe.with_suffix(".log")
            command += f"   # output: {shown_path(log)}"
            output = log.open("ab")
        say(f"\n$ {command}")
        last_update = training.state.get("updated")
        devices = shares.get()
        environment = dict(os.environ)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        process = subprocess.Popen(
            [*RECIPES, *arguments],
            stdout=output,
            stderr=output,
            env=environment,
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
            if state.get("updated") != last_update:
                why = next(iter(_error_lines(state)), why)
            self.failed[name] = max(code, int(ExitCode.FAILED)), why

    def _evaluate(self, trained: set[str]) -> None:
        """Evaluate what is trained and has no result; each base and judge is loaded once."""
        study = self.study
        needed = evaluations(study)
        if any(BASE_ARM in (result.run, result.against) for result in needed):
            try:
                common_base([base_recipe(study)]).record()
                needed = evaluations(study)
            except RecipesError as error:
                self._fail(["the base"], error)
        unusable = {BASE_ARM, *(training.run for training in study_trainings(study))} - trained
        needed = [result for result in needed if not unusable & {result.run, result.against}]
        if all(map(is_evaluated, needed)):
            return
        lock_design(study)
        from recipes_lib.evals.run import EvalTask, evaluate_tasks  # torch

        groups: dict[tuple[str, str], list[Evaluation]] = {}
        for result in needed:
            groups.setdefault((result.recipe.name, result.against), []).append(result)
        tasks: dict[EvalTask, list[Evaluation]] = {}
        for (_, against), group in groups.items():
            runs = tuple(result.run for result in group)
            tasks[EvalTask(group[0].recipe, runs, against or None)] = group

        def on_error(task: EvalTask, run: str, error: Exception) -> None:
            results = [result for result in tasks[task] if run in ("", result.run)]
            self._fail([result.title for result in results if not is_evaluated(result)], error)

        evaluate_tasks(
            list(tasks), remote_code="--trust-remote-code" in self.flags, on_error=on_error
        )
