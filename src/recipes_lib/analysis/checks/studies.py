"""What is known of runs that are compared outside of their study: its own conclusion, and how many
more runs lie beside them that could have been compared instead.
"""

import glob
import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.findings import Finding
from recipes_lib.analysis.runs import DESIGN_LOCKS, Arms, Run
from recipes_lib.analysis.text import sentence_list
from recipes_lib.core.files import object_or_none

# How the first line of a report without verdicts begins.
_WITHOUT_VERDICTS = ("Exploratory", "Interim")


def check_studies(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield studies of compared runs that have no verdict themselves, or no report yet."""
    if design is not None:
        return
    arms_of: dict[Path, list[str]] = defaultdict(list)  # by the folder of a study
    for arm, run in arms.runs:
        for study in run.state.get(DESIGN_LOCKS, {}):
            arms_of[run.folder.parent / study].append(arm)
    for folder, names in arms_of.items():
        of_study = tuple(dict.fromkeys(names))
        runs = f"runs of the study {folder.name} ({sentence_list(of_study)})"
        conclusion = object_or_none(folder / "comparison.json") or {}
        reasons = conclusion.get("cannot_say")
        if not isinstance(reasons, list):
            title = f"These are {runs}, which has no report that can be read"
            yield Finding("study-says", "warning", title, remedy="see what its design allows")
            continue
        reason = next(iter(reasons), "")
        if str(reason).startswith(_WITHOUT_VERDICTS):
            yield Finding(
                code="study-says",
                severity="error",
                title=f"These are {runs}, which says: {str(reason).rstrip('.')}",
                evidence=(f"{folder.name}/comparison.json",),
                arms=of_study,
                of_any=True,
            )


def check_choice(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield how many trained runs beside the compared ones have the same evaluation."""
    if design is not None:
        return
    compared: dict[tuple[Path, str], dict[str, str]] = defaultdict(dict)  # the arm of each run
    for arm, run in arms.runs:
        if run.foreign or run.is_base:
            continue
        for log in run.evals:
            compared[run.folder.parent, log.eval][run.name] = arm
    for (root, eval), arm_of in compared.items():
        results = root.glob(f"*/evals/{glob.escape(eval)}/result.json")
        total = sum(not _is_base(result.parents[2]) for result in results)
        pairs = sum(first != second for first, second in combinations(arm_of.values(), 2))
        if pairs and len(arm_of) < total:
            title = (
                f"{len(arm_of)} of {total} runs here that have {eval} are compared: {pairs} of"
                f" {math.comb(total, 2)} pairs"
            )
            remedy = "the best of many pairs looks better than it is: a study tests all together"
            yield Finding("one-of-many", "warning", title, remedy=remedy)


def _is_base(folder: Path) -> bool:
    state = object_or_none(folder / "run.json") or {}
    return Run(name=folder.name, folder=folder, state=state).is_base
