"""`recipes judge audit`: the scorecard of a judge, from stored judgments or from labelled pairs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import DataError, ExitCode, RecipeError
from recipes_lib.core.files import Row, rows_from_the_end
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import print_json, say


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
    from recipes_lib.evals import audit

    if judgments is not None:
        if limit or labels:
            raise RecipeError("--limit and --labels are for asking a judge: leave JUDGMENTS out")
        if not {"key", "judge"} <= next(rows_from_the_end(judgments), Row()).keys():
            hint = "an evaluation writes runs/RUN/evals/EVAL/judgments.jsonl"
            what = "is not a file of judgments" if judgments.exists() else "no such file"
            raise DataError(what, hint, file=judgments)
        card = audit.audit_stored(judgments, judge)
    elif judge and labels:
        quiet_libraries()
        card, kept = audit.audit_on_labels(judge, labels, limit, probe_pairs)
    else:
        raise RecipeError(
            "recipes judge audit: nothing to audit",
            "stored judgments: recipes judge audit runs/RUN/evals/EVAL/judgments.jsonl",
            "a judge on labelled pairs: recipes judge audit --judge evals/judges/quickstart.yaml"
            " --labels FILE --limit 50",
        )
    if json:
        return print_json(asdict(card))
    if banner := audit.audit_banner(card):
        say(f"! {banner}\n")
    say("\n".join(audit.scorecard_lines(card)))
    if judgments is None:
        say(f"kept in {shown_path(kept)}")
    return ExitCode.DONE


ACTIONS = {"audit": _audit}
