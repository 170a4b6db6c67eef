"""`recipes study run`: do every step that is not fresh, in order, on this machine. Run it again
after any interruption.

One runner per study; what a killed one left is continued. A failing arm stops only what depends on
it.
"""

from __future__ import annotations

import dataclasses
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from recipes_lib.compare.design import Study
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import (
    EnvironmentFault,
    ExitCode,
    RecipeError,
    RecipesError,
)
from recipes_lib.core.faults import is_disk_full
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_lock import LockHeld, describe_holder, run_lock
from recipes_lib.study.arms import study_folder
from recipes_lib.study.graph import FOLLOWS, Failure, Freshness, Graph, Step
from recipes_lib.study.leaks import refuse_leaks
from recipes_lib.study.steps import build_graph
from recipes_lib.study.trainings import Trainings
from recipes_lib.study.tuning import choose, with_choices

Say = Callable[[str], None]
# Step -> why it failed.
StepErrors = dict[str, Failure]
_COPY = "# a copy of "


def run_study(
    study: Study,
    say: Say,
    jobs: int = 1,
    only: Sequence[str] = (),
    debug: bool = False,
    flags: Sequence[str] = (),
) -> int:
    """Do what is to be done and return the exit code: 0, 1 when a step failed, 6 when only
    judgments are missing, 75 and 130 when stopped.

    Args:
        study: the study.
        say: prints a line.
        jobs: trainings at the same time.
        only: step names or their beginnings (`train`, `judgments.alpaca_eval`); the others are left
            as they are.
        debug: show tracebacks of failing steps.
        flags: options handed to `recipes train` (`--no-plan`, `--trust-remote-code`).

    Raises:
        EnvironmentFault: another process runs this study, or the disk is full.
        RecipeErrors: an arm would be trained on rows that hold
            questions of its evals.
        RecipeError: `only` names no step, or the folder is another study's.
    """
    study = with_choices(study)
    graph = build_graph(study)
    with ExitStack() as locks:
        if not only:  # else jobs of a cluster may do other steps at the same time
            locks.enter_context(study_lock(study))
        for step in graph.wanted(only):
            locks.enter_context(run_lock(graph.folder / step.name))
        _check_folder(study)
        words = f"# run with: {shlex.join(study.words)}\n" if study.words else ""
        copy = f"{_COPY}{study.path.resolve()}\n{words}{study.text}"
        write_text(study_folder(study) / "study.yaml", copy)
        todo = graph.todo(only)
        if not todo:
            return int(ExitCode.DONE)
        say(f"study '{study.name}': {len(todo)} of {len(graph.wanted(only))} steps to do")
        _say_stale(todo, graph.survey(), say)
        refuse_leaks(study, todo, fetch=True)
        failed: StepErrors = {}
        stopped = None

        def train(kind: str) -> int | None:
            """Do the trainings of a kind; return the exit code where somebody asked to stop."""
            graph = build_graph(study)
            trainings = Trainings(study, graph, jobs, say, flags)
            trainings.run(_ready(kind, graph, only))
            failed.update(trainings.failed)
            return trainings.stopped

        try:
            with _terminated():
                stopped = train("tune")
                if stopped is None:
                    graph = build_graph(study)
                    failed |= choose(study, graph, _ready("choose", graph, only), say)
                    study = with_choices(study)
                    stopped = train("train")
                if stopped is None and (not failed or _anything_trained(study)):
                    failed |= _evaluate(study, only, say, debug, "--trust-remote-code" in flags)
                    failed |= _conclude(study, only, say)
        except KeyboardInterrupt:
            stopped = ExitCode.INTERRUPTED
        except _Terminated:
            stopped = ExitCode.PREEMPTED
        except Exception as error:
            if not is_disk_full(error):
                raise
            what = f"the disk is full: {getattr(error, 'strerror', None) or error}"
            raise EnvironmentFault(
                what, "free some space; the same command continues", file=shown_path(runs_root())
            ) from None
        if stopped is not None:
            say("stopped; the same command continues")
            return int(stopped)
        failed |= _left_over(study, only, failed)
    if not failed:
        return int(ExitCode.DONE)
    say(f"\n{len(failed)} step{'s' * (len(failed) != 1)} failed:")
    for name, one in failed.items():
        say(f"  {name} (exit code {one.exit_code}): {one.error.splitlines()[0]}")
    codes = {one.exit_code for one in failed.values()}
    only_missing = codes == {ExitCode.EVALUATION_INCOMPLETE}
    return int(ExitCode.EVALUATION_INCOMPLETE if only_missing else ExitCode.FAILED)


def _ready(kind: str, graph: Graph, only: Sequence[str]) -> list[Step]:
    """The steps of a kind that are to do and can be done now."""
    known = graph.survey()
    todo = [step for step in graph.todo(only) if step.kind == kind]
    return [step for step in todo if all(known[name].fresh for name in step.upstream)]


def _say_stale(todo: Sequence[Step], state: Mapping[str, Freshness], say: Say) -> None:
    """Say what is done again and why; of steps that only follow another one, their number."""
    following = 0
    for step in todo:
        if state[step.name].state != "stale":
            continue
        own = tuple(why for why in state[step.name].reasons if not why.endswith(FOLLOWS))
        if own:
            why = dataclasses.replace(state[step.name], reasons=own).why
            say(f"{step.name} is done again: {why}")
        following += not own
    if following:
        say(f"{following} step{'s follow' if following > 1 else ' follows'} from that")


class _Terminated(BaseException):
    """SIGTERM arrived: what was answered and judged is stored."""


@contextmanager
def _terminated() -> Iterator[None]:
    """Turn SIGTERM into an exception until the block ends; trainings, which checkpoint, have a
    handler of their own.
    """

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _left_over(study: Study, only: Sequence[str], failed: StepErrors) -> StepErrors:
    """Return the steps that could not be done: those asked for by name because others come first,
    and any that nothing explains.
    """
    if failed and not only:
        return {}
    graph = build_graph(study)
    state = graph.survey()
    return {
        step.name: Failure(state[step.name].why or "was not done", int(ExitCode.FAILED))
        for step in graph.todo(only)
        if step.name not in failed
    }


@contextmanager
def study_lock(study: Study) -> Iterator[None]:
    """Hold a study for this process.

    Raises:
        EnvironmentFault: another process runs it; host, process and time are named.
    """
    folder = study_folder(study)
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(folder))
        except LockHeld:
            what = f"study '{study.name}' is being run{describe_holder(folder / 'lock.json')}"
            watch = f"watch it: recipes study status {shown_path(study.path)} --watch"
            raise EnvironmentFault(what, watch) from None
        yield


def _check_folder(study: Study) -> None:
    """Refuse a study whose folder is a run, or holds another study of the same name; both would
    undo each other's steps.
    """
    kept = study_folder(study) / "study.yaml"
    folder = shown_path(kept.parent)
    if kept.with_name("run.json").is_file():
        what = f"{folder} is a run, and the study '{study.name}' would lie in the same folder"
        raise RecipeError(what, "rename the study's file", file=study.path)
    if study.path.resolve().is_relative_to(kept.parent.resolve()):
        what = f"is a copy in {folder}, made by an earlier release for its jobs"
        raise RecipeError(
            what, "run the study that it is a copy of, or launch it again", file=study.path
        )
    first = kept.read_text(encoding="utf-8").partition("\n")[0] if kept.is_file() else ""
    other = Path(first.removeprefix(_COPY))
    if first.startswith(_COPY) and other.is_file() and other != study.path.resolve():
        what = f"{folder} belongs to another study of this name: {shown_path(other)}"
        hint = "rename one of the two files; runs are named after their study"
        raise RecipeError(what, hint, file=study.path)


def _anything_trained(study: Study) -> bool:
    """Whether there is an arm to evaluate."""
    graph = build_graph(study)
    trained = {step.name for step in graph.of_kind("train")}
    return not trained <= {step.name for step in graph.todo()}


def _evaluate(
    study: Study, only: Sequence[str], say: Say, debug: bool, remote_code: bool
) -> StepErrors:
    """Evaluate what is trained; return the failures."""
    from recipes_lib.study.evaluation import EVALUATION_STEPS, Evaluation, record_base_run

    def todo(graph: Graph) -> list[Step]:
        return [step for step in graph.todo(only) if step.kind in EVALUATION_STEPS]

    graph = build_graph(study)
    if not todo(graph):
        return {}
    say("\nevaluating: each base and each judge is loaded once")
    try:
        record_base_run(study)
    except RecipesError as error:
        failures = [graph.fail(step, error) for step in todo(graph)]
        return {"evaluation": failures[0]}
    graph = build_graph(study)  # the base's run has its name now
    return Evaluation(study, graph, todo(graph), say, debug, remote_code).run().found


def _conclude(study: Study, only: Sequence[str], say: Say) -> StepErrors:
    """Write the report, also of what there is where something failed."""
    from recipes_lib.study.conclusion import conclude

    graph = build_graph(study)
    if not any(step.kind in ("statistics", "report") for step in graph.todo(only)):
        return {}
    say("\nstatistics and report ...")
    try:
        conclusion = conclude(study, graph, "study run")
    except RecipesError as error:
        return {"statistics": graph.fail(graph.steps["statistics"], error)}
    if not conclusion.complete:
        say("the report holds what there is; steps are missing (below)")
    return {}
