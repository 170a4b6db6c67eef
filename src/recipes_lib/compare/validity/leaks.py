"""Arms that were trained on what they were asked: what every result says about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from recipes_lib.compare.findings import Finding, found
from recipes_lib.compare.validity.case import Case, evals_of, metrics_of, run_place
from recipes_lib.compare.wording import sentence_list
from recipes_lib.data.rows import NUM_LISTED
from recipes_lib.eval_log import EvalLog
from recipes_lib.suites.leaks import is_searched


def check_leaks(case: Case) -> Iterator[Finding]:
    """Yield the arms that were trained on questions or answers of an evaluation, and those of which
    nobody knows.
    """
    unknown: dict[str, list[EvalLog]] = defaultdict(list)  # by arm and reason
    for name, arm in case.trained.items():
        leaked: dict[str, Finding] = {}  # the runs and comparisons of an arm say the same
        for log in arm.logs:
            questions = log.recipe.get("data", {}).get("questions")
            if not log.measures or not is_searched(log.suite, questions):
                continue
            leaks, metrics = log.leaks, metrics_of(one for one in arm.logs if one.eval == log.eval)
            if leaks is None or leaks.why:
                why = (leaks.why if leaks else "") or "its result does not say it"
                unknown[f"{name}: {why}"].append(log)
            elif leaks.found:
                leaked[log.eval] = found(
                    "leaked-questions" if leaks.is_error else "leaked-questions/few",
                    [*leaks.lines(NUM_LISTED), run_place(log.file)],
                    (name,),
                    metrics,
                    what=leaks.summary(log.eval),
                )
        yield from leaked.values()
    if unknown:
        logs = [log for some in unknown.values() for log in some]
        evidence = [f"{whose} ({sentence_list(evals_of(some))})" for whose, some in unknown.items()]
        evals = sentence_list(evals_of(logs))
        yield found("leaks-not-measured", evidence, (), metrics_of(logs), eval=evals)
