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
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import (
    EnvironmentFault,
    ExitCode,
    RecipeError,
    RecipeErrors,
    RecipesError,
)
from recipes_lib.core.faults import is_disk_full
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.run_lock import LockHeld, describe_holder, run_lock
from recipes_lib.study.arms import study_folder
from recipes_lib.study.graph import FOLLOWS, Freshness, Graph, Step
from recipes_lib.study.steps import build_graph
from recipes_lib.study.trainings import Trainings

Say = Callable[[str], None]


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
        RecipeErrors: imported runs are not there.
        RecipeError: `only` names no step, or the folder is another study's.
    """
    with _locks(study, only):
        check_imported(study)
        _check_folder(study)
        write_text(study_folder(study) / "study.yaml", _as_run(study))
        graph = build_graph(study)
        wanted = wanted_steps(graph, only)
        state = graph.survey()
        if all(state[step.name].fresh for step in wanted):
            return int(ExitCode.DONE)
        say(
            f"study '{study.name}': {sum(not state[step.name].fresh for step in wanted)} of"
            f" {len(wanted)} steps to do"
        )
        _say_stale(wanted, state, say)
        try:
            with _terminated():
                failed, stopped = _train(study, graph, wanted, jobs, flags, say)
                if stopped is None and (not failed or _anything_trained(study)):
                    failed |= _evaluate(study, only, say, debug, "--trust-remote-code" in flags)
                    failed |= _conclude(study, only, say)
        except KeyboardInterrupt:
            stopped = int(ExitCode.INTERRUPTED)
        except _Terminated:
            stopped = int(ExitCode.PREEMPTED)
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
        failed |= _left_over(study, only, failed)
    return _end(failed, say)


def _say_stale(wanted: Sequence[Step], state: Mapping[str, Freshness], say: Say) -> None:
    """Say what is done again and why; of steps that only follow another one, their number."""
    stale = [step.name for step in wanted if state[step.name].state == "stale"]
    own = {
        name: [why for why in state[name].reasons if not why.endswith(FOLLOWS)] for name in stale
    }
    for name in (name for name in stale if own[name]):
        say(
            f"{name} is done again:"
            f" {dataclasses.replace(state[name], reasons=tuple(own[name])).why}"
        )
    if following := sum(not reasons for reasons in own.values()):
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


@contextmanager
def _locks(study: Study, only: Sequence[str]) -> Iterator[None]:
    """Hold the study and its steps; with `only` those steps alone, so that jobs of a cluster can do
    different ones at the same time.
    """
    with ExitStack() as stack:
        if not only:
            stack.enter_context(study_lock(study))
        graph = build_graph(study)
        for step in wanted_steps(graph, only):
            stack.enter_context(run_lock(graph.folder / step.name))
        yield


def _left_over(
    study: Study, only: Sequence[str], failed: dict[str, tuple[str, int]]
) -> dict[str, tuple[str, int]]:
    """Return the steps that could not be done: those asked for by name because others come first,
    and any that nothing explains.
    """
    graph = build_graph(study)
    state = graph.survey()
    left = [
        step
        for step in wanted_steps(graph, only)
        if not state[step.name].fresh and step.name not in failed
    ]
    explained = set() if only else {step.name for step in left if failed}
    return {
        step.name: (state[step.name].why or "was not done", int(ExitCode.FAILED))
        for step in left
        if step.name not in explained
    }


@contextmanager
def study_lock(study: Study) -> Iterator[None]:
    """Hold a study for this process.

    Raises:
        EnvironmentFault: another process runs it; host, process and time are named.
    """
    folder = study_folder(study)
    lock = run_lock(folder)
    try:
        lock.__enter__()
    except LockHeld:
        what = f"study '{study.name}' is being run{describe_holder(folder / 'lock.json')}"
        raise EnvironmentFault(
            what, f"watch it: recipes study status {shown_path(study.path)} --watch"
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def check_imported(study: Study) -> None:
    """Refuse a study that names imported runs which are not there.

    Raises:
        RecipeErrors: one for each, placed where the run is named.
    """
    errors = []
    for arm in study.arms:
        if arm.imported and not RunDirectory(arm.imported).exists():
            origin = study.origins.get(("arms", arm.name, "imported"))
            what = (
                f"arm '{arm.name}' stands for run '{arm.imported}', which is not in {runs_root()}"
            )
            hint = f"make it from the foreign files: recipes import FILE... --as {arm.imported}"
            errors.append(
                RecipeError(
                    what,
                    hint,
                    file=origin.file if origin else study.path,
                    line=origin.line if origin else None,
                )
            )
    if errors:
        raise RecipeErrors(errors)


_COPY = "# a copy of "


def _as_run(study: Study) -> str:
    """The study's file, with its place and the words of the command line on top."""
    words = f"# run with: {shlex.join(study.words)}\n" if study.words else ""
    return f"{_COPY}{written_at(study)}\n{words}{study.path.read_text(encoding='utf-8-sig')}"


def written_at(study: Study) -> Path:
    """Return where the user wrote the study: a job of a cluster runs a copy of it, beside a note of
    the folder it was copied from.
    """
    path, copies = study.path.resolve(), study_folder(study).resolve() / "slurm" / "snapshot"
    note = copies.with_suffix(".origin")
    return (
        Path(note.read_text(encoding="utf-8").strip()) / path.relative_to(copies)
        if path.is_relative_to(copies) and note.is_file()
        else path
    )


def _check_folder(study: Study) -> None:
    """Refuse a study whose folder is a run, or holds another study of the same name; both would
    undo each other's steps.

    Raises:
        RecipeError: naming the run, or the other file.
    """
    kept = study_folder(study) / "study.yaml"
    if kept.with_name("run.json").is_file():
        what = (
            f"{shown_path(kept.parent)} is a run, and the study '{study.name}' would lie in the"
            " same folder"
        )
        raise RecipeError(what, "rename the study's file", file=study.path)
    first = kept.read_text(encoding="utf-8").partition("\n")[0] if kept.is_file() else ""
    other = Path(first.removeprefix(_COPY))
    if first.startswith(_COPY) and other.is_file() and other != written_at(study):
        what = (
            f"{shown_path(kept.parent)} belongs to another study of this name: {shown_path(other)}"
        )
        raise RecipeError(
            what, "rename one of the two files; runs are named after their study", file=study.path
        )


def _anything_trained(study: Study) -> bool:
    """Whether there is an arm to evaluate."""
    graph = build_graph(study)
    state = graph.survey()
    return any(arm.imported for arm in study.arms) or any(
        state[step.name].fresh for step in graph.of_kind("train")
    )


def wanted_steps(graph: Graph, only: Sequence[str]) -> list[Step]:
    """Return the steps that were asked for.

    Raises:
        RecipeError: a word fits no step.
    """
    for word in only:
        if not any(_fits(step, [word]) for step in graph):
            raise RecipeError(
                f"--only {word}: no such step",
                *did_you_mean(word, list(graph.steps)),
                "all steps: recipes study plan",
            )
    return [step for step in graph if _fits(step, only)]


def _fits(step: Step, only: Sequence[str]) -> bool:
    return not only or any(step.name == word or step.name.startswith(f"{word}.") for word in only)


def _train(
    study: Study, graph: Graph, wanted: Sequence[Step], jobs: int, flags: Sequence[str], say: Say
) -> tuple[dict[str, tuple[str, int]], int | None]:
    """Train what is not trained; return the failures, and an exit code where somebody asked to
    stop.
    """
    state = graph.survey()
    todo = [step for step in wanted if step.kind == "train" and not state[step.name].fresh]
    trainings = Trainings(study, graph, jobs, say, flags)
    trainings.run(todo)
    return trainings.failed, trainings.stopped


def _evaluate(
    study: Study, only: Sequence[str], say: Say, debug: bool, remote_code: bool = False
) -> dict[str, tuple[str, int]]:
    """Evaluate what is trained; return the failures."""
    from recipes_lib.study.evaluation import EVALUATION_STEPS, Evaluation, record_base_run

    def todo(graph: Graph) -> list[Step]:
        state = graph.survey()
        return [
            step
            for step in wanted_steps(graph, only)
            if step.kind in EVALUATION_STEPS and not state[step.name].fresh
        ]

    graph = build_graph(study)
    if not todo(graph):
        return {}
    say("\nevaluating: each base and each judge is loaded once")
    try:
        record_base_run(study)
    except RecipesError as error:
        for step in todo(graph):
            graph.fail(step, str(error), int(error.exit_code))
        return {"evaluation": (str(error), int(error.exit_code))}
    graph = build_graph(study)
    return Evaluation(study, graph, todo(graph), say, debug, remote_code).run().found


def _conclude(study: Study, only: Sequence[str], say: Say) -> dict[str, tuple[str, int]]:
    """Write the report, also of what there is where something failed."""
    from recipes_lib.study.conclusion import conclude

    graph = build_graph(study)
    state = graph.survey()
    wanted = [step for step in wanted_steps(graph, only) if step.kind in ("statistics", "report")]
    if all(state[step.name].fresh for step in wanted):
        return {}
    say("\nstatistics and report ...")
    try:
        conclusion = conclude(study, graph)
    except RecipesError as error:
        graph.fail(graph.steps["statistics"], str(error), int(error.exit_code))
        return {"statistics": (str(error), int(error.exit_code))}
    if not conclusion.complete:
        say("the report holds what there is; steps are missing (below)")
    return {}


def _end(failed: dict[str, tuple[str, int]], say: Say) -> int:
    """Say what failed, and return the exit code."""
    if not failed:
        return int(ExitCode.DONE)
    say(f"\n{len(failed)} step{'s' * (len(failed) != 1)} failed:")
    for name, (error, code) in failed.items():
        say(f"  {name} (exit code {code}): {error.splitlines()[0]}")
    only_missing = all(code == ExitCode.EVALUATION_INCOMPLETE for _, code in failed.values())
    return int(ExitCode.EVALUATION_INCOMPLETE if only_missing else ExitCode.FAILED)
