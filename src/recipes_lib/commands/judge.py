"""`recipes judge audit`: the scorecard of a judge, from stored judgments or from pairs that people
labelled.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from recipes_lib.commands import at_least
from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import DataError, ExitCode, RecipeError
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="audit")
    what = "scorecard of the judge behind stored judgments, or of a judge on labelled pairs"
    add = actions.add_parser("audit", help=what, allow_abbrev=False).add_argument
    judgments = "a judgments.jsonl; without it the judge is asked about --labels"
    add("judgments", nargs="?", metavar="JUDGMENTS", help=judgments)
    add("--judge", metavar="JUDGE.yaml", help="judge file: who is asked, and the thresholds")
    labels = "pairs that people labelled: instruction, answer, opponent_answer, label"
    add("--labels", metavar="FILE", help=labels)
    limit = "ask about N labelled pairs; a larger N later keeps what was judged"
    add("--limit", type=at_least(1), metavar="N", help=limit)
    probes = "pairs for the two probes, 4 judgments each (default 10)"
    add("--probe-pairs", type=at_least(0), default=10, metavar="N", help=probes)
    add("--json", action="store_true", help="print the scorecard as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the scorecard of stored judgments, or of a judge that is asked."""
    from recipes_lib.evals.audit import (
        audit_banner,
        audit_on_labels,
        audit_stored,
        scorecard_lines,
    )

    _check(args)
    kept = None
    if args.judgments:
        card = audit_stored(Path(args.judgments), args.judge)
    else:
        quiet_libraries()
        labels = Path(args.labels)
        card, kept = audit_on_labels(args.judge, labels, args.limit, args.probe_pairs)
    if args.json:
        return print_json(asdict(card))
    if banner := audit_banner(card):
        say(f"! {banner}\n")
    say("\n".join(scorecard_lines(card)))
    if kept is None:
        next_step(f"recipes judge audit {args.judgments} --json")
    else:
        say(f"kept in {shown_path(kept)}")
        next_step(f"recipes judge audit --judge {args.judge} --labels {args.labels} --json")
    return int(ExitCode.DONE)


def _check(args: argparse.Namespace) -> None:
    """Refuse words that do not belong together."""
    if not args.judgments:
        if args.judge and args.labels:
            return
        raise RecipeError(
            "recipes judge audit: nothing to audit",
            "stored judgments: recipes judge audit runs/RUN/evals/EVAL/judgments.jsonl",
            "a judge on labelled pairs: recipes judge audit --judge evals/judges/quickstart.yaml"
            " --labels FILE --limit 50",
        )
    if not Path(args.judgments).is_file():
        raise DataError(
            "no such file of judgments",
            "to ask a judge instead: recipes judge audit --judge JUDGE.yaml --labels FILE",
            file=args.judgments,
        )
    if args.limit or args.labels:
        option = "--limit" if args.limit else "--labels"
        what = f"{option} is for asking a judge; JUDGMENTS are audited as they are"
        raise RecipeError(what, f"leave JUDGMENTS or {option} out")
