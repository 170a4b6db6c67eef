"""`recipes study run`: does what of a study is not done. Imports no torch before it evaluates."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, describe_holder, is_held, run_lock
from recipes_lib.core.terminal import count, say
from recipes_lib.evals.models import common_base
from recipes_lib.evals.recipe import check_allowed
from recipes_lib.plan.cards import devices_here
from recipes_lib.study import progress
from recipes_lib.study.config import BASE_ARM, Study
from recipes_lib.study.lock import current_part, lock_design
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

RECIPES = [sys.executable, "-m", "recipes_lib.cli"]
_POLL_S = 0.2  # how soon a STOP file, or the end of another process's training, is seen


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
            progress.refuse_unmet(self.study, fetch=True)
            if self.train:
                progress.raise_all(progress.missing_needs_of(current_part(self.study)))
            try:
                with handling(self._on_signal), _heeding(stop_file):
                    self._steps()
            except KeyboardInterrupt:
                say("stopped; the same command continues")
                return self._stopped[0] if self._stopped else ExitCode.INTERRUPTED
        for name, (code, why) in self.failed.items():
            say(f"failed: {name} (exit code {code}): {why}")
        codes = {code for code, _ in self.failed.values()}
        if not codes:
            return ExitCode.DONE
        if codes == {ExitCode.EVALUATION_INCOMPLETE}:
            return ExitCode.EVALUATION_INCOMPLETE
        return ExitCode.FAILED

    def _on_signal(self, number: int, frame: object) -> None:
        """Hand a signal on to the trainings, which save; where none runs, all ends here."""
        is_typed = number == signal.SIGINT
        self._stopped.append(ExitCode.INTERRUPTED if is_typed else ExitCode.PREEMPTED)
        for process in list(self._running):  # other threads add to it
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
                self._fail(arm.name, RecipesError(f"{arm.tuning.key} {why}"))
        for look in self.study.looks or (None,):
            part = self.study.at(look)
            if not self.train and self._only_awaits_trainings(part):
                return
            self._take(part)
            # the report noted what the look showed; one with failures cannot be taken
            if self.failed or current_part(self.study).aims.look == look:
                return

    def _only_awaits_trainings(self, part: Study) -> bool:
        """Whether a later look has none of its own trainings yet, which other jobs will make."""
        look = part.aims.look
        if look is None or look.number == 1:
            return False
        before = set(part.arms[0].seeds[: self.study.looks[look.number - 2].seeds])
        added = [training for training in study_trainings(part) if training.seed not in before]
        return not any(map(is_trained, added))

    def _take(self, part: Study) -> None:
        """Train and evaluate the study, or what it has at a look, and write the report."""
        trainings = study_trainings(part)
        ready = [training for training in trainings if training.arm.name not in self.failed]
        self._train(ready)
        trained = {training.run for training in ready if is_trained(training)}
        if trained:
            self._evaluate(part, trained)
            try:
                self.report(self.study)
            except RecipesError as error:
                self._fail("the report", error)

    def _fail(self, name: str, error: Exception) -> None:
        """Note that something failed; the rest goes on."""
        code = error.exit_code if isinstance(error, RecipesError) else ExitCode.FAILED
        why = str(error).partition("\n")[0] or type(error).__name__
        self.failed[name] = int(code), why

    def _train(self, trainings: Sequence[StudyRun]) -> None:
        """Train what is not trained; raise KeyboardInterrupt if a stop was requested."""
        waiting = [training for training in trainings if not is_trained(training)]
        if not self.train:
            for training in waiting:
                code = int(ExitCode.FAILED)
                why = "is not trained as the study says"
                state = training.state
                reasons = training.error_lines
                if state.get("state") == "failed" and reasons and not what_changed(training):
                    code = int(state.get("exit_code") or code)
                    why = reasons[0]
                self.failed[training.run] = code, why
            return
        devices: list[str] = []  # none: each training takes what it finds
        if self.jobs > 1:
            devices = devices_here()
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
        arguments = ["train", shown_path(recipe)] + list(self.flags)
        command = shlex.join(["recipes"] + arguments)
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
            RECIPES + arguments,
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
            # an attempt that was refused leaves run.json as the one before wrote it
            if training.state.get("updated") != last_update and training.error_lines:
                why = training.error_lines[0]
            self.failed[name] = max(code, int(ExitCode.FAILED)), why

    def _evaluate(self, study: Study, trained: set[str]) -> None:
        """Evaluate what is trained and has no result; each base and judge is loaded once."""
        needed = progress.evaluations(study)
        if any(BASE_ARM in (result.run, result.against) for result in needed):
            # it was never evaluated: with a record of its own it gets the name of a run
            try:
                common_base([progress.base_recipe(study)]).record()
                needed = progress.evaluations(study)
            except RecipesError as error:
                self._fail("the base", error)
        unusable = {training.run for training in study_trainings(study)} - trained
        unusable.add(BASE_ARM)
        needed = [result for result in needed if unusable.isdisjoint([result.run, result.against])]
        if all(map(progress.is_evaluated, needed)):
            return
        lock_design(self.study)
        from recipes_lib.evals.run import EvalTask, evaluate_tasks  # torch

        groups: dict[tuple[str, str], list[progress.Evaluation]] = {}
        for result in needed:
            groups.setdefault((result.recipe.name, result.against), []).append(result)
        tasks: dict[EvalTask, list[progress.Evaluation]] = {}
        for (_, against), group in groups.items():
            runs = tuple(result.run for result in group)
            tasks[EvalTask(group[0].recipe, runs, against or None)] = group

        def on_error(task: EvalTask, run: str, error: Exception) -> None:
            """Note every result that a failure cost: of one run, or of the whole task."""
            for result in tasks[task]:
                if run in ("", result.run) and not progress.is_evaluated(result):
                    self._fail(result.title, error)

        remote_code = "--trust-remote-code" in self.flags
        evaluate_tasks(list(tasks), remote_code=remote_code, on_error=on_error)
