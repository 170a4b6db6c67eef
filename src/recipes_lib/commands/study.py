"""`recipes study plan|run|status|report STUDY`; only `run` and `report` import what is heavy."""

from collections.abc import Sequence
from typing import Annotated

from recipes_lib.commands import Json, flag_words
from recipes_lib.core.environment import require_extra
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import aligned, next_step, print_json, say
from recipes_lib.study import progress
from recipes_lib.study.config import Study, load_study
from recipes_lib.study.lock import current_part, shown_looks
from recipes_lib.study.run import StudyRunner
from recipes_lib.study.trainings import study_folder, study_trainings, with_choices

# section.key=value words override a value in every arm's recipe; key=value words the study's own
_StudyWord = Annotated[str, "study file or name in recipes/studies/, then overrides: seeds=[1,2]"]


def run_study_plan(study: _StudyWord, overrides: Sequence[str]) -> int:
    """Show what is left to do and what it takes; change nothing."""
    loaded = with_choices(load_study(study, overrides))
    progress.refuse_unmet(loaded)
    for note in progress.nothing_to_compare(loaded):
        print_error(note)
    for need in progress.missing_needs_of(current_part(loaded)):
        print_error(f"warning: {need}")
    say(*progress.plan_lines(loaded))
    return _next("run", loaded)


def run_study_run(
    study: _StudyWord,
    overrides: Sequence[str],
    *,
    jobs: Annotated[int, "number of parallel trainings, each on its own GPUs (default 1)"] = 1,
    no_train: Annotated[bool, "do not train: evaluate what is trained, and report"] = False,
    trust_remote_code: Annotated[bool, "allow a model's own code, if the recipe asks"] = False,
) -> int:
    """Train, evaluate and report what is not done yet; run it again to continue."""
    from recipes_lib.study.report import report_study

    loaded = with_choices(load_study(study, overrides))
    flags = flag_words(trust_remote_code=trust_remote_code)
    require_extra("train")
    code = StudyRunner(loaded, report_study, jobs, flags, not no_train).run()
    if code not in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        folder = study_folder(loaded)
        comparison = object_or_none(folder / "comparison.json") or {}
        say()
        say(*comparison.get("answer", []), is_result=True)
        page = folder / "report" / "report.html"
        if page.is_file():
            say(f"report: {shown_path(page)}")
    _next("run" if code else "report", loaded)
    return code


def run_study_status(
    study: _StudyWord,
    overrides: Sequence[str],
    *,
    look: Annotated[int | None, "for a job: exit 0 if it goes on after this look, 1 if not"] = None,
    json: Json = False,
) -> int:
    """Show every training and result that is not done."""
    loaded = with_choices(load_study(study, overrides))
    if look is not None:
        return _goes_on(loaded, look)
    part = current_part(loaded)
    states = progress.progress_of(part)
    if json:
        return print_json({"study": loaded.name, "states": states})
    remaining = [(name, state) for name, state in states.items() if state != "done"]
    done = f"{len(states) - len(remaining)} of {len(states)} trainings and results done"
    if part.aims.look:
        done += f" of {part.aims.look.place}"
    say(done)
    if not remaining:
        return _next("report", loaded)
    say(*aligned(remaining))
    return _next("run", loaded)


def run_study_report(
    study: _StudyWord,
    overrides: Sequence[str],
    *,
    gate: Annotated[bool, "for CI: exit 1 if an arm is worse, 6 if results are missing"] = False,
    json: Json = False,
) -> int:
    """Write the report of what was measured; train and evaluate nothing."""
    from recipes_lib.analysis.lines import conclusion_lines
    from recipes_lib.study.report import gate_study, report_study

    loaded = with_choices(load_study(study, overrides))
    if gate:
        code, lines = gate_study(loaded)
        if json:
            print_json({"exit_code": int(code), "lines": lines})
        else:
            say(*lines)
        return code
    with run_lock(study_folder(loaded)):
        conclusion, missing = report_study(loaded)
    if json:
        return print_json(conclusion.to_dict())
    say(*conclusion_lines(conclusion), is_result=bool(conclusion.claims))
    say(f"\nreport: {shown_path(study_folder(loaded) / 'report' / 'report.html')}")
    if missing:
        return _next("run", loaded)
    first = study_trainings(loaded)[0].run
    return next_step("export", first, "--to", f"{first}-export")


def _goes_on(study: Study, number: int) -> int:
    """Say whether more seeds are to be trained after a look, for the jobs that wait for that."""
    record = shown_looks(study).get(number)
    if record is None:
        say(f"look {number} is not complete")
        return ExitCode.EVALUATION_INCOMPLETE
    say(f"the study {'ends at' if record['stops'] else 'goes on after'} look {number}")
    return ExitCode.FAILED if record["stops"] else ExitCode.DONE


def _next(action: str, study: Study) -> int:
    """Name the next command, with the words of this one."""
    return next_step("study", action, study.document.file, *study.overrides)
