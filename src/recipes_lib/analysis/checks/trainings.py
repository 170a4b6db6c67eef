"""Trainings: what differs and no factor declares, other bases, leaked questions, choices that make
a result look better than it is, and what is not finished.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.differences import arm_differences, base_weights
from recipes_lib.analysis.findings import Finding, metric_names
from recipes_lib.analysis.runs import ArmRuns, Arms, run_place
from recipes_lib.analysis.text import sentence_list
from recipes_lib.evals.leaks import is_searched
from recipes_lib.evals.log import EvalLog

MANY_ARMS = 5
_UNFINISHED = ("failed", "stopped", "running", "created")
_MOST_NAMES = 4  # of differences in a title; the evidence has all
_MOST_LEAKS = 5  # lines of evidence


def check_differences(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield what differs between two trained arms and no factor declares."""
    for first, second in itertools.combinations(arms, 2):
        differences = arm_differences(first, second, design)
        confounds = [difference for difference in differences if difference.level == "confound"]
        if not confounds:
            continue
        both = f"{first.name} and {second.name}"
        names = [difference.what for difference in confounds if not difference.is_unknown]
        not_recorded = [difference.what for difference in confounds if difference.is_unknown]
        title = f"{both} differ in {sentence_list(names, _MOST_NAMES)}"
        no_record = f"have no record of their {sentence_list(not_recorded, _MOST_NAMES)}"
        if not_recorded and names:
            title += f" (and {no_record})"
        elif not_recorded:
            title = f"{both} {no_record}"
        evidence = tuple(difference.text for difference in confounds)
        finding = partial(Finding, evidence=evidence, arms=(first.name, second.name))
        if design is None:
            remedy = "a study declares what is meant to differ, so that a cause can be named"
            yield finding("differences", "note", title, remedy=remedy)
        else:
            title = f"{title}, which no factor declares"
            remedy = "give both the same values, or declare them under factors"
            yield finding("undeclared-difference", "confound", title, remedy=remedy)


def check_base(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms that were trained on other weights than their base was evaluated with."""
    weights = {}
    for arm in arms:
        weights[arm.name] = {base_weights(run) for run in arm.runs} - {""}
    for base, arm in itertools.permutations(arms, 2):
        evaluated = weights[base.name]
        trained_on = weights[arm.name]
        is_pair = base.is_base and not arm.is_base
        if is_pair and evaluated and trained_on and evaluated != trained_on:
            other = min(trained_on - evaluated or trained_on)
            pair = (arm.name, base.name)
            title = f"{arm.name} was trained on different weights than {base.name}"
            evidence = (f"{base.name}: {min(evaluated)}, {arm.name}: {other}",)
            remedy = "evaluate its base"
            yield Finding("other-base", "error", title, evidence=evidence, remedy=remedy, arms=pair)


def check_leaks(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms that were trained on questions of an evaluation, or were not searched."""
    not_searched: dict[str, list[str]] = defaultdict(list)
    for arm in _trained(arms):
        if all(run.foreign for run in arm.runs):
            continue  # another program's training: nobody has its rows
        # runs of one arm saw the same rows, so the first result of each evaluation says it
        first_logs = {log.eval: log for log in reversed(arm.logs)}
        for log in first_logs.values():
            if not log.metrics or not is_searched(log.suite, _question_source(log)):
                continue
            if log.leaks is None or log.leaks.why:
                not_searched[log.eval].append(arm.name)
            elif log.leaks.found:
                yield Finding(
                    code="leaked-questions",
                    severity="error" if log.leaks.is_error else "warning",
                    title=f"{arm.name}: {log.leaks.summary(log.eval)}",
                    evidence=(*log.leaks.lines(_MOST_LEAKS), run_place(log.file)),
                    remedy="train without these rows, or use other questions",
                    arms=(arm.name,),
                    metrics=metric_names(other for other in arm.logs if other.eval == log.eval),
                )
    for name, names in not_searched.items():
        title = f"Rows of {sentence_list(names)} were not searched for questions of {name}"
        # two arms here would touch only the row between them
        touched = tuple(names) if len(names) == 1 else ()
        yield Finding("leaks-not-searched", "warning", title, arms=touched)


def check_selection(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield choices made on compared rows or at the edge of a grid, and the best of many arms."""
    trained = _trained(arms)
    tuned = design.tuned if design else {}
    if len(trained) >= MANY_ARMS:
        title = f"The best of {len(trained)} arms looks better than it is"
        remedy = "train the best one again with new seeds"
        yield Finding("best-of-many", "warning", title, remedy=remedy)
    on_validation = metric_names(
        log for _, log in arms.logs if _question_source(log) == "validation"
    )
    for arm in arms:
        grid = tuned.get(arm.name)
        finding = partial(Finding, arms=(arm.name,))
        if grid and grid.edge:
            values = ", ".join(map(str, grid.values))
            title = f"{arm.name} is best at the {grid.edge} {grid.key} that was tried"
            evidence = (f"{grid.key}: {grid.chosen} of {values}",)
            remedy = "the best may lie beyond it: extend the grid of every arm there"
            yield finding("tuned-at-edge", "confound", title, evidence=evidence, remedy=remedy)
        sections = [run.resolved.get("train") or {} for run in arm.runs]
        keeps_best = any(section.get("load_best_model_at_end") for section in sections)
        if (grid or keeps_best) and on_validation:
            title = f"The validation rows chose the weights of {arm.name}"
            remedy = "a loss on them is biased low: compare on data.questions: test"
            yield finding(
                "chosen-on-validation", "warning", title, remedy=remedy, metrics=on_validation
            )


def check_equal_choices(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms that were tuned over other values or trained with other, maybe the best, seeds."""
    tuned = design.tuned if design else {}
    grids = {name: (grid.key, grid.values) for name, grid in tuned.items()}
    for first, second in itertools.combinations(_trained(arms), 2):
        pair = (first.name, second.name)
        both = " and ".join(pair)
        if grids.get(first.name) != grids.get(second.name):
            title = f"{both} were not tuned over the same values"
            remedy = "set tune for the study, not for an arm"
            yield Finding("tuned-differently", "confound", title, remedy=remedy, arms=pair)
        seeds = sorted({run.seed for run in first.runs if run.seed is not None})
        other_seeds = sorted({run.seed for run in second.runs if run.seed is not None})
        if seeds and other_seeds and seeds != other_seeds:
            yield Finding(
                code="different-seeds",
                severity="confound" if design else "note",
                title=f"{both} were trained with different seeds",
                evidence=(
                    f"{first.name}: {sentence_list([*map(str, seeds)])}",
                    f"{second.name}: {sentence_list([*map(str, other_seeds)])}",
                ),
                remedy="give both the same seeds",
                arms=pair,
            )


def check_presence(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield trainings and evaluations that are not finished, and results that were not read."""
    for arm in arms:
        for run in arm.runs:
            finding = partial(Finding, evidence=(run_place(run.folder),), arms=(arm.name,))
            state = run.state.get("state")
            if state in _UNFINISHED and run.evals:
                title = f"{run.name} is {state}, not finished, and was evaluated"
                remedy = "finish it, and evaluate again"
                yield finding("not-finished", "error", title, remedy=remedy)
            if run.unfinished:
                title = f"{arm.name} has no result of {sentence_list(run.unfinished)}"
                remedy = "the same recipes eval command finishes it and asks nothing twice"
                yield finding("unfinished-evaluation", "warning", title, remedy=remedy)
            if run.unread:
                more = f", and {len(run.unread) - 1} more" if len(run.unread) > 1 else ""
                title = f"Not in this comparison, of {arm.name}: {run.unread[0]}{more}"
                remedy = "choosing among results after a look makes chance look like an effect"
                yield finding("not-read", "warning", title, evidence=run.unread, remedy=remedy)


def check_partners(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield results that one of several arms has alone, so they are compared with nothing."""
    labels: dict[str, dict[object, str]] = {}  # by arm
    for arm in arms:
        labels[arm.name] = {}
        for metric in itertools.chain.from_iterable(run.metrics for run in arm.runs):
            if arms.opponent(metric.opponent) not in arms.by_name:  # else a row of these two
                labels[arm.name][metric.key] = metric.label
    owners = Counter(itertools.chain.from_iterable(labels.values()))
    for name, of_arm in labels.items():
        lone = [label for key, label in of_arm.items() if owners[key] == 1]
        if lone and design is None and len(labels) > 1:
            title = f"{name} alone has {sentence_list(lone, 3)}, which is compared with nothing"
            yield Finding("no-partner", "warning", title, evidence=tuple(lone), arms=(name,))


def _trained(arms: Arms) -> list[ArmRuns]:
    return [arm for arm in arms if not arm.is_base]


def _question_source(log: EvalLog) -> str | None:
    return (log.recipe.get("data") or {}).get("questions")
