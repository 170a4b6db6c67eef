"""`recipes study run`: train what is not trained, evaluate what is not evaluated, write the report.

Nothing is done twice, so the same command continues. A failing arm stops its own evaluations only.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from recipes_lib.config.upstream import check_packages
from recipes_lib.core.errors import (
    DataError,
    EnvironmentFault,
    ExitCode,
    RecipeError,
    RecipeErrors,
    RecipesError,
    one_line,
    print_error,
)
from recipes_lib.core.files import write_text
from recipes_lib.core.lock import LOCK_NOTE, describe_holder, is_held, run_lock
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.data.splits import check_rows
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.recipe import HELD_OUT, check_allowed
from recipes_lib.plan.cards import devices_here
from recipes_lib.study.config import BASE_ARM, Arm, Study
from recipes_lib.study.runs import (
    Evaluation,
    StudyRun,
    base_recipe,
    base_run,
    evaluations,
    has_diverged,
    is_evaluated,
    is_trained,
    losses_text,
    move_aside,
    runs_left,
    settings_changed,
    study_folder,
    study_trainings,
    study_tunings,
    with_choices,
)

RECIPES = [sys.executable, "-m", "recipes_lib.cli"]
_COPY = "# a copy of "


@dataclass
class StudyRunner:
    """Does what of a study is not done yet.

    Args:
        jobs: trainings at the same time; several divide the GPUs, one for each of their processes.
        flags: options handed to `recipes train` (`--trust-remote-code`).
        train: False to evaluate only what is trained already, in a cluster's job.
        debug: show the tracebacks of failing evaluations.
        failed: exit code and reason, by run, result or arm.
    """

    study: Study
    say: Callable[[str], None]
    jobs: int = 1
    flags: Sequence[str] = ()
    train: bool = True
    debug: bool = False
    failed: dict[str, tuple[int, str]] = field(default_factory=dict)
    _stopped: ExitCode | None = None
    _training: bool = False
    _signals: list[int] = field(default_factory=list)  # not handed on yet
    _running: list[tuple[StudyRun, subprocess.Popen[bytes], list[str]]] = field(
        default_factory=list
    )

    def run(self) -> ExitCode:
        """Do everything; return 0, 1 (failures), 6 (judgments missing), or 75 or 130 (stopped)."""
        self.study = with_choices(self.study)
        check_allowed(self.study.evals, "--trust-remote-code" in self.flags)
        with study_lock(self.study):
            refuse_unmet(self.study, fetch=True)
            _claim_folder(self.study)
            before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
            try:
                self._steps()
            except KeyboardInterrupt:
                self.say("stopped; the same command continues")
                return self._stopped or ExitCode.INTERRUPTED
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                for _, process, _ in self._running:  # after an error, say of a full disk: nobody
                    process.terminate()  # would look after them
                for _, process, _ in self._running:
                    process.wait()
        for name, (code, why) in self.failed.items():
            self.say(f"failed: {name} (exit code {code}): {why}")
        if {code for code, _ in self.failed.values()} == {ExitCode.EVALUATION_INCOMPLETE}:
            return ExitCode.EVALUATION_INCOMPLETE
        return ExitCode.FAILED if self.failed else ExitCode.DONE

    def _on_signal(self, number: int, frame: object) -> None:
        """Note a signal that is handed on to the trainings; where none runs, all ends here."""
        self._stopped = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.PREEMPTED
        if not self._training:
            raise KeyboardInterrupt
        self._signals.append(number)

    def _steps(self) -> None:
        """Tune arms, train every arm and seed, evaluate what is trained, write the report."""
        tried = study_tunings(self.study)
        self._train([training for training in tried if not has_diverged(training)])
        for training in filter(has_diverged, tried):
            self.failed.pop(training.run, None)  # its value cannot be chosen: no failure
        self.study = with_choices(self.study)
        for arm in self.study.arms:
            if arm.tuning and arm.tuning.losses:
                self.say(f"{arm.name}: {losses_text(arm)}")
                if arm.tuning.chosen is None:
                    self.failed[arm.name] = (int(ExitCode.NUMERICS), losses_text(arm))
        ready = [
            training
            for training in study_trainings(self.study)
            if training.arm.tuning is None or training.arm.tuning.chosen is not None
        ]
        self._train(ready)
        if trained := {training.run for training in ready if is_trained(training)}:
            from recipes_lib.study.report import report_study  # scipy

            self._evaluate(trained)
            self.say("\nstatistics and report ...")
            try:
                report_study(self.study)
            except RecipesError as error:
                self._note(["the report"], error)

    def _note(self, names: Sequence[str], error: Exception) -> None:
        """Note that something failed; the rest goes on."""
        if self.debug and not isinstance(error, RecipesError):
            raise error
        code = error.exit_code if isinstance(error, RecipesError) else ExitCode.FAILED
        self.failed |= dict.fromkeys(names, (int(code), one_line(error)))

    # ---- Trainings ----

    def _train(self, trainings: Sequence[StudyRun]) -> None:
        """Train what is not trained; a KeyboardInterrupt follows where somebody asked to stop."""
        waiting = [training for training in trainings if not is_trained(training)]
        if not self.train:
            for training in waiting:
                changed = settings_changed(training)[:3]
                why = f"was trained with other settings ({', '.join(changed)})"
                self.failed[training.run] = (1, why if changed else "is not trained")
            return
        devices = devices_here() if self.jobs > 1 else []
        held_before: set[str] = set()
        self._training = True
        while (waiting and self._stopped is None) or self._running:
            # start what there is room for, in order: a large one is not kept waiting by small ones
            for training in list(waiting) if self._stopped is None else ():
                taken = [device for _, _, own in self._running for device in own]
                free = [device for device in devices if device not in taken]
                launch = training.arm.launch
                wanted = 0 if launch.config.use_cpu else min(launch.per_machine, len(devices))
                folder = training.directory.path
                if is_held(folder):
                    if training.run not in held_before:
                        holder = describe_holder(folder / LOCK_NOTE)
                        self.say(f"{training.run} is being trained{holder}: waiting for it")
                    held_before.add(training.run)
                elif len(self._running) < self.jobs and wanted <= len(free):
                    waiting.remove(training)
                    self._start(training, free[:wanted])
                else:
                    break
            time.sleep(0.2)
            # hand signals on, and note what has ended
            while self._signals:
                number = self._signals.pop(0)
                for _, process, _ in self._running:
                    process.send_signal(number)
            for entry in [entry for entry in self._running if entry[1].poll() is not None]:
                self._running.remove(entry)
                training, code = entry[0], entry[1].returncode
                if code == ExitCode.ENVIRONMENT and is_held(training.directory.path):
                    waiting.append(training)  # one that a killed runner had started was first
                else:
                    self._ended(training, code)
        self._training = False
        if self._stopped is not None:
            raise KeyboardInterrupt

    def _start(self, training: StudyRun, devices: list[str]) -> None:
        """Start a training that nobody finished meanwhile; move a run of other settings away."""
        run, name = training.directory, training.run
        if is_trained(training):
            self.say(f"{name}: trained before")
            return
        changed = settings_changed(training)
        if training.state.get("state") == "finished" and not changed:
            changed = ["its weights are gone"]
        if changed:
            place, what = move_aside(run), ", ".join(changed[:3])
            self.say(f"{name} had other settings ({what}): moved to {place}")
        recipe = study_folder(self.study) / "recipes" / f"{name}.yaml"
        training.recipe.write(recipe)
        words = ["train", shown_path(recipe), *self.flags]
        shown, environment, log = shlex.join(["recipes", *words]), dict(os.environ), None
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            shown = f"CUDA_VISIBLE_DEVICES={','.join(devices)} {shown}"
        if self.jobs > 1:
            log = recipe.with_suffix(".log").open("ab")
            shown += f"   # output: {shown_path(recipe.with_suffix('.log'))}"
        self.say(f"\n$ {shown}")
        process = subprocess.Popen(
            [*RECIPES, *words],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that a terminal's Ctrl-C does not reach it twice
        )
        if log:
            log.close()
        self._running.append((training, process, devices))

    def _ended(self, training: StudyRun, code: int) -> None:
        """Note how a training ended."""
        state = training.state
        if code == ExitCode.DONE and state.get("state") == "finished":
            self.say(f"{training.run}: trained")
        elif code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED) or self._stopped is not None:
            self._stopped = self._stopped or ExitCode(code)
        else:
            error = (state.get("error") or f"the training ended with exit code {code}").splitlines()
            self.failed[training.run] = (max(code, int(ExitCode.FAILED)), error[0])
            self.say(f"{training.run}: failed (exit code {code}); the other trainings go on")

    # ---- Evaluations ----

    def _evaluate(self, trained: set[str]) -> None:
        """Evaluate what is trained and has no result; each base and judge is loaded once."""
        study = self.study
        if study.file.include_base and not base_run(study):
            from recipes_lib.evals.models import common_base  # torch

            try:
                common_base([base_recipe(study)]).record()
            except RecipesError as error:
                self._note(["the base"], error)
        usable = {*trained, base_run(study)}
        unusable = {BASE_ARM, *(training.run for training in study_trainings(study))} - usable
        groups: dict[tuple[str, str, bool], list[Evaluation]] = {}
        for result in evaluations(study):
            if result.run in usable and result.against not in unusable:
                key = result.recipe.name, result.against, result.head_to_head
                groups.setdefault(key, []).append(result)
        unfinished = [group for group in groups.values() if not all(map(is_evaluated, group))]
        if not unfinished:
            return
        from recipes_lib.evals.run import EvalTask, evaluate_tasks  # torch

        tasks = {}
        for group in unfinished:
            recipe = group[0].recipe
            # In a judged eval everybody takes part again, so that the judge's audit is that of one
            # go; what is stored is not asked again. The base's held-out rows are those of the arms.
            if not recipe.is_judged and recipe.suite.name != "heldout_loss":
                group = [result for result in group if not is_evaluated(result)]
            if group[0].head_to_head:  # the judge was probed with these answers already
                metrics = recipe.metrics.model_copy(update={"probe_pairs": 0})
                recipe = recipe.model_copy(update={"metrics": metrics})
            against = (group[0].against or None) if recipe.is_judged else None
            tasks[EvalTask(recipe, tuple(result.run for result in group), against)] = group
        total = sum(map(len, groups.values()))
        self.say(f"\nevaluating: {sum(map(len, tasks.values()))} of {total} results")

        def on_error(task: EvalTask, run: str, error: Exception) -> None:
            results = [result for result in tasks[task] if run in ("", result.run)]
            self._note([result.title for result in results], error)

        remote_code = "--trust-remote-code" in self.flags
        evaluate_tasks(list(tasks), remote_code=remote_code, on_error=on_error)


# ---- Before the first training ----


def refuse_unmet(study: Study, fetch: bool = False) -> None:
    """Refuse a study whose evaluations would mean nothing later; only `fetch` asks the Hub."""
    names = {training.arm.name.partition("--tune-")[0] for training in runs_left(study)}
    arms = [arm for arm in study.arms if arm.name in names]
    for arm in arms:
        check_packages(arm.recipe)
    errors, warnings = unmet(study, arms, fetch)
    for warning in warnings:
        print_error(warning)
    if of_data := [error for error in errors if isinstance(error, DataError)]:
        raise of_data[0]
    if errors:
        raise RecipeErrors([error for error in errors if isinstance(error, RecipeError)])


def unmet(
    study: Study, arms: Sequence[Arm], fetch: bool = False
) -> tuple[list[RecipesError], list[RecipeError]]:
    """Return errors and warnings: rows unreadable, with an eval's questions, or not held out."""
    errors, warnings = list[RecipesError](), list[RecipeError]()
    if not study.evals:
        what = "warning: the study names no evals, so nothing will be compared"
        warnings.append(study.document.error(("evals",), what))
    is_new = not (study_folder(study) / "study.yaml").exists()
    for kept in runs_root().glob("*/study.yaml") if is_new else ():
        first, _, text = kept.read_text(encoding="utf-8").partition("\n")
        if text == study.document.text and not Path(first.removeprefix(_COPY)).exists():
            what = f"warning: {shown_path(kept.parent)} has this study's runs, under another name"
            hint = f"to continue them, call this file {kept.parent.name}.yaml again"
            warnings.append(RecipeError(what, hint, file=shown_path(study.path)))
    for number, recipe in enumerate(study.evals):
        split = str(recipe.data.questions)
        held_out = recipe.suite.name == "heldout_loss" and split in HELD_OUT
        without = [arm.name for arm in arms if not getattr(arm.recipe.data.split, split, True)]
        if held_out and without:
            what = f"{recipe.name}: no {split} rows are held out in {', '.join(without)}"
            hint = f"set data.split.{split} in the recipe, or name a file of rows in the eval"
            errors.append(study.document.error(("evals", number), what, hint))
    by_data: dict[str, list[Arm]] = {}
    for arm in arms:
        by_data.setdefault(str(arm.recipe.data), []).append(arm)
    evals = [recipe for recipe in study.evals if recipe.suite.name != "lm_eval"]
    for same in by_data.values():
        trained, rows = same[0].recipe, f"rows of {', '.join(arm.name for arm in same)}"
        errors += check_rows(trained)
        for name, leaks in search_recipe(trained, evals, fetch).items():
            if leaks.found:
                error = leak_error(name, leaks, trained, rows)
                (errors if leaks.is_error else warnings).append(error)
    return errors, warnings


# ---- The folder of a study ----


@contextmanager
def study_lock(study: Study) -> Iterator[None]:
    """Hold a study for this process; a requeued Slurm job waits for its earlier try."""
    folder = study_folder(study)
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(folder))
        except EnvironmentFault:
            if not is_held(folder):
                raise
            what = f"study '{study.name}' is being run{describe_holder(folder / LOCK_NOTE)}"
            watch = f"look at it: recipes study status {shown_path(study.path)}"
            raise EnvironmentFault(what, watch) from None
        yield


def _claim_folder(study: Study) -> None:
    """Keep a copy of the study in its folder; refuse one that holds another study of its name."""
    kept, file = study_folder(study) / "study.yaml", shown_path(study.path)
    first = kept.read_text(encoding="utf-8").partition("\n")[0] if kept.is_file() else ""
    other = Path(first.removeprefix(_COPY))
    if first and other.is_file() and other != study.path.resolve():
        what = f"{shown_path(kept.parent)} belongs to another study: {shown_path(other)}"
        raise RecipeError(what, "rename one of the two files", file=file)
    write_text(kept, f"{_COPY}{study.path.resolve()}\n{study.document.text}")
