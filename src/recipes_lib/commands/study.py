"""`recipes study plan|run|status|report STUDY`; only `run` and `report` import what is heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from recipes_lib.commands import Gpu, Json, flag_words
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import count, next_step, print_json, say
from recipes_lib.study.config import Study, load_study
from recipes_lib.study.run import StudyRunner, refuse_unmet, study_lock
from recipes_lib.study.runs import study_folder, study_trainings, with_choices
from recipes_lib.study.status import status_lines, status_rows, study_plan_lines, study_plan_object

# section.key=value words override a value in every arm's recipe; key=value words the study's own
_StudyWord = Annotated[str, "a study file, or the name of one in recipes/studies/; seeds=[1,2]"]


def run_study_plan(
    study: _StudyWord, overrides: Sequence[str], *, gpu: Gpu = None, json: Json = False
) -> int:
    """What is to be done and what it takes; nothing is touched."""
    loaded = with_choices(load_study(study, overrides))
    refuse_unmet(loaded)
    if json:
        return print_json(study_plan_object(loaded, gpu))
    say("\n".join(study_plan_lines(loaded, gpu)))
    return _next("run", loaded)


def run_study_run(
    study: _StudyWord,
    overrides: Sequence[str],
    debug: bool,
    *,
    jobs: Annotated[int, "trainings at the same time, each on its own GPUs (default 1)"] = 1,
    no_train: Annotated[bool, "train nothing: evaluate what is trained, and report"] = False,
    trust_remote_code: Annotated[bool, "allow a model's own code, if the recipe asks"] = False,
) -> int:
    """Train, evaluate and report what is not done yet; the same command continues."""
    loaded = with_choices(load_study(study, overrides))
    flags = flag_words(trust_remote_code=trust_remote_code)
    code = StudyRunner(loaded, say, jobs, flags, not no_train, debug).run()
    if code not in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        folder = study_folder(loaded)
        answer = (object_or_none(folder / "comparison.json") or {}).get("answer", [])
        say("\n".join(["", *answer]))
        if (page := folder / "report" / "report.html").is_file():
            say(f"report: {shown_path(page)}")
    _next("run" if code else "report", loaded)
    return code


def run_study_status(study: _StudyWord, overrides: Sequence[str], *, json: Json = False) -> int:
    """Every training and result that is not done."""
    loaded = with_choices(load_study(study, overrides))
    rows = status_rows(loaded)
    if json:
        return print_json({"study": loaded.name, "rows": rows})
    say("\n".join(status_lines(rows)))
    return _next("report" if all(row["state"] == "done" for row in rows) else "run", loaded)


def run_study_report(
    study: _StudyWord,
    overrides: Sequence[str],
    *,
    gate: Annotated[bool, "for CI: exit 1 if an arm is worse, 6 if results are missing"] = False,
    json: Json = False,
) -> int:
    """The report of what was measured, without training or evaluating anything."""
    from recipes_lib.analysis.summary import conclusion_lines
    from recipes_lib.study.report import report_study

    loaded = with_choices(load_study(study, overrides))
    if gate:
        return _gate(loaded, json)
    with study_lock(loaded):
        conclusion, missing = report_study(loaded)
    if json:
        return print_json(conclusion.to_dict())
    say("\n".join(conclusion_lines(conclusion)))
    say(f"\nreport: {shown_path(study_folder(loaded) / 'report' / 'report.html')}")
    if missing:
        return _next("run", loaded)
    first = study_trainings(loaded)[0].run
    return next_step("recipes", "export", first, "--to", f"{first}-export")


def _next(action: str, study: Study) -> int:
    """Name the next command, with the words of this one; return the code of what is done."""
    return next_step("recipes", "study", action, shown_path(study.path), *study.words)


def _gate(study: Study, json: bool) -> int:
    from recipes_lib.study.report import gate

    answer = gate(study)
    if json:
        print_json(answer.to_dict())
        return answer.code
    failed = [*answer.worse, *(f"not shown: {sentence}" for sentence in answer.not_shown)]
    for line in (*(f"missing: {result}" for result in answer.missing), *failed):
        say(line)
    if answer.missing:
        say(f"not decided: {count(len(answer.missing), 'result')} missing")
        _next("run", study)
    elif failed:
        say(f"failed: {count(len(failed), 'comparison')} of {answer.comparisons} above")
    else:
        margins = f" and within {', '.join(answer.margins)}" if answer.margins else ""
        say(f"passed: no arm is shown to be worse than {study.baseline}{margins}")
    return answer.code
