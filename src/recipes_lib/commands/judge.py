"""`recipes judge audit`: the scorecard of a judge, from stored judgments or from pairs that people
labelled.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json, say


def _audit(
    judgments: Annotated[Path | None, "a judgments.jsonl; without it --judge is asked"] = None,
    *,
    judge: Annotated[str | None, "judge file: who is asked, and the thresholds"] = None,
    labels: Annotated[Path | None, "rows: instruction, answer, opponent_answer, label"] = None,
    limit: Annotated[int | None, "ask about N pairs; a larger N later asks about the rest"] = None,
    probe_pairs: Annotated[int, "pairs for the two probes, 4 judgments each", 0] = 10,
    json: Annotated[bool, "print the scorecard as JSON"] = False,
) -> int:
    """The scorecard of the judge behind stored judgments, or of a judge on labelled pairs."""
    from recipes_lib.evals.audit import (
        audit_banner,
        audit_on_labels,
        audit_stored,
        scorecard_lines,
    )

    if judgments is not None:
        if limit or labels:
            raise RecipeError("--limit and --labels are for asking a judge: leave JUDGMENTS out")
        if not judgments.is_file() or not judgments.stat().st_size:
            hint = "an evaluation writes runs/RUN/evals/EVAL/judgments.jsonl"
            raise DataError("no file with judgments", hint, file=judgments)
        card = audit_stored(judgments, judge)
        asked: list[str | Path] = [judgments]
    elif judge and labels:
        quiet_libraries()
        card, kept = audit_on_labels(judge, labels, limit, probe_pairs)
        asked = ["--judge", judge, "--labels", labels]
    else:
        raise RecipeError(
            "recipes judge audit: nothing to audit",
            "stored judgments: recipes judge audit runs/RUN/evals/EVAL/judgments.jsonl",
            "a judge on labelled pairs: recipes judge audit --judge evals/judges/quickstart.yaml"
            " --labels FILE --limit 50",
        )
    if json:
        return print_json(asdict(card))
    if banner := audit_banner(card):
        say(f"! {banner}\n")
    say("\n".join(scorecard_lines(card)))
    if judgments is None:
        say(f"kept in {shown_path(kept)}")
    return next_step("recipes", "judge", "audit", *asked, "--json")


ACTIONS = {"audit": _audit}
