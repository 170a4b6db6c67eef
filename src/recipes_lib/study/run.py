"""`recipes study run`: train what is not trained, evaluate what is not evaluated, write the report.

Every step can be run again: a run that is trained, an answer that was given and a judgment that was
stored are not asked for again, so the same command continues after any interruption. A failing arm
stops nothing but its own evaluations.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from recipes_lib.core.errors import (
    EnvironmentFault,
    ExitCode,
    RecipeError,
    RecipesError,
    is_disk_full,
)
from recipes_lib.core.files import write_json, write_text
from recipes_lib.core.lock import LockHeld, describe_holder, run_lock
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.arms import base_arm, base_record, study_folder
from recipes_lib.study.config import BASE_ARM, Study
from recipes_lib.study.needs import refuse_unmet
from recipes_lib.study.pool import Failure, Pool
from recipes_lib.study.runs import (
    Evaluation,
    StudyRun,
    base_asked,
    base_run,
    evaluations,
    has_diverged,
    is_evaluated,
    is_trained,
    note_data,
    study_trainings,
    study_tunings,
)
from recipes_lib.study.tune import choose, with_choices

Say = Callable[[str], None]
_COPY = "# a copy of "


def run_study(
    study: Study,
    say: Say,
    jobs: int = 1,
    flags: Sequence[str] = (),
    train: bool = True,
    debug: bool = False,
) -> int:
    """Do what is not done yet and return the exit code: 0, 1 when something failed, 6 when only
    judgments are missing, 75 and 130 when stopped.

    In order: the trainings that tune arms, the choice of their values, the trainings of all arms
    and seeds, every evaluation of what is trained, the report.

    Args:
        study: the study.
        say: prints a line.
        jobs: trainings at the same time, each with GPUs of its own.
        flags: options handed to `recipes train` (`--trust-remote-code`).
        train: False to train nothing and evaluate what is trained, in a cluster's job.
        debug: show the tracebacks of failing evaluations.

    Raises:
        EnvironmentFault: another process runs this study, or the disk is full.
        RecipeErrors: an evaluation would fail, or mean nothing, after the trainings.
        RecipeError: the folder is another study's.
    """
    study = with_choices(study)
    with study_lock(study):
        _check_folder(study)
        refuse_unmet(study, fetch=True)
        words = f"# run with: {shlex.join(study.words)}\n" if study.words else ""
        copy = f"{_COPY}{study.path.resolve()}\n{words}{study.text}"
        write_text(study_folder(study) / "study.yaml", copy)
        try:
            with _terminated():
                failed, stopped = _train_and_evaluate(study, say, jobs, flags, train, debug)
        except KeyboardInterrupt:
            failed, stopped = {}, int(ExitCode.INTERRUPTED)
        except _Terminated:
            failed, stopped = {}, int(ExitCode.PREEMPTED)
        except Exception as error:
            if not is_disk_full(error):
                raise
            what = f"the disk is full: {getattr(error, 'strerror', None) or error}"
            raise EnvironmentFault(
                what, "free some space; the same command continues", file=shown_path(runs_root())
            ) from None
    if stopped is not None:
        say("stopped; the same command continues")
        return stopped
    for name, failure in failed.items():
        say(f"failed: {name} (exit code {failure.exit_code}): {failure.error.splitlines()[0]}")
    codes = {failure.exit_code for failure in failed.values()}
    if codes == {ExitCode.EVALUATION_INCOMPLETE}:
        return int(ExitCode.EVALUATION_INCOMPLETE)
    return int(ExitCode.FAILED if failed else ExitCode.DONE)


def _train_and_evaluate(
    study: Study, say: Say, jobs: int, flags: Sequence[str], train: bool, debug: bool
) -> tuple[dict[str, Failure], int | None]:
    """Return the failures, and the exit code where somebody asked to stop."""
    failed: dict[str, Failure] = {}

    def train_all(runs: Sequence[StudyRun]) -> int | None:
        todo = [one for one in runs if not is_trained(study, one)]
        if not train:
            failed.update({one.run: Failure("is not trained") for one in todo})
            return None
        pool = Pool(study, jobs, say, flags)
        pool.run(todo)
        failed.update(pool.failed)
        return pool.stopped

    # tune
    tried = study_tunings(study)
    stopped = train_all([one for one in tried if not has_diverged(study, one)])
    if stopped is not None:
        return failed, stopped
    for one in tried:
        if has_diverged(study, one):  # its value cannot be chosen, and that is no failure
            failed.pop(one.run, None)
    failed |= choose(study, say)
    study = with_choices(study)
    # train
    ready = [
        one
        for one in study_trainings(study)
        if not one.arm.tuning or one.arm.tuning.chosen is not None
    ]
    for one in ready:
        if is_trained(study, one):
            note_data(study, one)  # of what a cluster's job trained nobody noted the data
    stopped = train_all(ready)
    if stopped is not None:
        return failed, stopped
    # evaluate
    trained = {one.run for one in ready if is_trained(study, one)}
    if trained:
        failed |= _evaluate(study, trained, say, flags, debug)
        failed |= _report(study, say)
    return failed, None


# ---- Evaluations ----


def _evaluate(
    study: Study, trained: set[str], say: Say, flags: Sequence[str], debug: bool
) -> dict[str, Failure]:
    """Evaluate what is trained and has no result yet: each base and each judge is loaded once.
    Return the failures.
    """
    from recipes_lib.evals.run import EvalTask, evaluate_tasks

    remote_code = "--trust-remote-code" in flags
    failed: dict[str, Failure] = {}

    def note(names: Sequence[str], error: Exception) -> None:
        if debug and not isinstance(error, RecipesError):
            raise error
        known = isinstance(error, RecipesError)
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        text = lines[0] if known else f"{type(error).__name__}: {lines[0]}"
        code = int(error.exit_code) if isinstance(error, RecipesError) else int(ExitCode.FAILED)
        failed.update(dict.fromkeys(names, Failure(text, code)))

    try:
        _record_base(study)
    except RecipesError as error:
        note(["the base"], error)
    base = base_run(study)
    there = {*trained, base} - {""}
    wanted = [
        one
        for one in evaluations(study)
        if one.run in there and (one.against in there or not _of_study(study, one.against))
    ]
    todo = [one for one in wanted if not is_evaluated(study, one)]
    if not todo:
        return failed
    for run in sorted({one.run for one in wanted} & trained):
        failed |= _unusable(run, remote_code)
    wanted = [one for one in wanted if not {one.run, one.against} & failed.keys()]
    todo = [one for one in todo if one in wanted]
    say(f"\nevaluating: {len(todo)} of {len(wanted)} results to do")
    asked = {}
    for group in _together(wanted, todo):
        first = group[0]
        recipe = _without_probes(first.recipe) if first.head_to_head else first.recipe
        against = (first.against or None) if first.recipe.is_judged else None
        asked[EvalTask(recipe, tuple(one.run for one in group), against)] = group

    def on_error(task: EvalTask, run: str, error: Exception) -> None:
        note([one.title for one in asked[task] if run in ("", one.run)], error)

    evaluate_tasks(list(asked), remote_code=remote_code, on_error=on_error)
    return failed


def _of_study(study: Study, run: str) -> bool:
    """Whether an opponent is one of the study's own: its runs, or the base."""
    return run == BASE_ARM or run in {one.run for one in study_trainings(study)}


def _together(
    wanted: Sequence[Evaluation], todo: Sequence[Evaluation]
) -> Iterator[list[Evaluation]]:
    """Yield the results that one suite makes: those of one eval and one opponent.

    In a judged eval everybody takes part again, also whose result is there: the judge's audit is
    then what it would have been in one go, wherever an earlier attempt ended, and what is stored is
    not asked again. The base's held-out rows are those of the arms.
    """
    groups: dict[tuple[str, str, bool], list[Evaluation]] = {}
    for one in wanted:
        groups.setdefault((one.recipe.name, one.against, one.head_to_head), []).append(one)
    for group in groups.values():
        left = [one for one in group if one in todo]
        if left:
            judged = group[0].recipe.is_judged
            shared = judged or group[0].recipe.suite.name == "heldout_loss"
            yield [
                one for one in group if one in left or judged or (shared and one.arm == BASE_ARM)
            ]


def _without_probes(recipe: EvalRecipe) -> EvalRecipe:
    """The eval for a head-to-head comparison: its judge was probed with the answers already."""
    return replace(recipe, metrics=recipe.metrics.model_copy(update={"probe_pairs": 0}))


def _unusable(run: str, remote_code: bool) -> dict[str, Failure]:
    """Return why a trained run cannot be evaluated, its weights damaged say; empty where it can."""
    from recipes_lib.weights.runs import check_weights, finished_run

    try:
        check_weights(finished_run(RunDirectory(run), remote_code))
    except RecipesError as error:
        return {run: Failure(str(error).splitlines()[0], int(error.exit_code))}
    return {}


def _record_base(study: Study) -> None:
    """Find out under which name the base's results are kept, and note it; no weights are loaded."""
    from recipes_lib.evals.models import common_base

    arm = base_arm(study) if study.include_base else None
    if arm is None or arm.recipe is None or base_run(study):
        return
    base = common_base([arm.recipe])
    base.record()
    known = {"run": base.name, "model": arm.recipe.model.name_or_path}
    write_json(base_record(study), {**known, "asked": base_asked(study)})


def _report(study: Study, say: Say) -> dict[str, Failure]:
    """Write the report, also of what there is where something failed."""
    from recipes_lib.study.conclusion import report_study

    say("\nstatistics and report ...")
    try:
        report_study(study)
    except RecipesError as error:
        return {"the report": Failure(str(error).splitlines()[0], int(error.exit_code))}
    return {}


# ---- One runner at a time ----


class _Terminated(BaseException):
    """SIGTERM arrived: what was answered and judged is stored."""


@contextmanager
def _terminated() -> Iterator[None]:
    """Turn SIGTERM into an exception until the block ends; trainings, which write a checkpoint,
    have a handler of their own.
    """

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def study_lock(study: Study) -> Iterator[None]:
    """Hold a study for this process.

    Raises:
        EnvironmentFault: another process runs it; host, process and time are named.
    """
    folder = study_folder(study)
    with ExitStack() as held:
        try:
            held.enter_context(run_lock(folder))
        except LockHeld:
            what = f"study '{study.name}' is being run{describe_holder(folder / 'lock.json')}"
            watch = f"look at it: recipes study status {shown_path(study.path)}"
            raise EnvironmentFault(what, watch) from None
        yield


def _check_folder(study: Study) -> None:
    """Refuse a study whose folder is a run, or holds another study of the same name."""
    kept = study_folder(study) / "study.yaml"
    folder = shown_path(kept.parent)
    if kept.with_name("run.json").is_file():
        what = f"{folder} is a run, and the study '{study.name}' would lie in the same folder"
        raise RecipeError(what, "rename the study's file", file=study.path)
    first = kept.read_text(encoding="utf-8").partition("\n")[0] if kept.is_file() else ""
    other = Path(first.removeprefix(_COPY))
    if first.startswith(_COPY) and other.is_file() and other != study.path.resolve():
        what = f"{folder} belongs to another study of this name: {shown_path(other)}"
        hint = "rename one of the two files; runs are named after their study"
        raise RecipeError(what, hint, file=study.path)
