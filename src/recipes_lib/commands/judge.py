"""`recipes judge audit`: the scorecard of a judge.

The audit of stored judgments needs no model. `audit --judge J --labels F` asks the
judge about pairs that people labelled.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core import atomic_files
from recipes_lib.core.errors import DataError, ExitCode, RecipeError
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.terminal import next_step, say, say_json
from recipes_lib.judging.judge_file import Thresholds, load_judge_file
from recipes_lib.judging.store import stored_rows

if TYPE_CHECKING:
    from recipes_lib.eval_log import Scorecard


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="audit")
    what = "scorecard of the judge behind stored judgments"
    add = actions.add_parser("audit", help=what, allow_abbrev=False).add_argument
    judgments = "a judgments.jsonl; without it the judge is asked about --labels"
    add("judgments", nargs="?", metavar="JUDGMENTS", help=judgments)
    add("--judge", metavar="JUDGE.yaml", help="judge file: who is asked, and the thresholds")
    labels = "pairs with human labels: PandaLM or LLMBar JSON"
    add("--labels", nargs="+", metavar="FILE", help=labels)
    limit = "ask about N labelled pairs; a larger N later keeps what was judged"
    add("--limit", type=int, metavar="N", help=limit)
    probes = "pairs for the degenerate probes, 12 judgments each (default 10)"
    add("--probe-pairs", type=int, default=10, metavar="N", help=probes)
    modes = "ask about N pairs in the judge's other verdict mode too"
    add("--both-modes", type=int, default=0, metavar="N", help=modes)
    output = (
        "where judge_audit.md and judge_audit.json go (and the judgments, when the judge is asked)"
    )
    add("--output", metavar="DIR", help=output)
    as_json = "print the scorecard as JSON (schema/judge_audit.schema.json)"
    add("--json", action="store_true", help=as_json)


def run(args: argparse.Namespace) -> int:
    """Print the scorecard of stored judgments, or of a judge that is asked."""
    from recipes_lib.judging.audit import scorecard_markdown

    for name, least in (("limit", 1), ("probe_pairs", 0), ("both_modes", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise RecipeError(
                f"recipes judge audit: --{name.replace('_', '-')} must be {least} or more"
            )
    card = _stored_card(args) if args.judgments else _asked_card(args)
    if args.json:
        return say_json(card)
    say(scorecard_markdown(card))
    words, more = str(args.judgments), "--json"
    if not args.judgments:
        say(f"kept in {card['folder']}")
        words = shlex.join(["--judge", args.judge, "--labels", *args.labels])
        more = f"--limit {2 * card['labels']['pairs']}" if card["labels"]["subset"] else more
    next_step(f"recipes judge audit {words} {more}")
    return int(ExitCode.DONE)


def _stored_card(args: argparse.Namespace) -> Scorecard:
    from recipes_lib.judging.audit import audit, scorecard_markdown
    from recipes_lib.judging.human_labels import load_labels

    if not Path(args.judgments).is_file():
        raise DataError(
            "no such file of judgments",
            "to ask a judge instead: recipes judge audit --judge JUDGE.yaml --labels FILE",
            file=args.judgments,
        )
    if args.limit or args.both_modes:
        option = "--limit" if args.limit else "--both-modes"
        raise RecipeError(
            f"{option} is for asking a judge; JUDGMENTS are audited as they are",
            f"leave JUDGMENTS or {option} out",
        )
    try:
        rows = stored_rows(args.judgments)
    except DataError as error:
        if error.line == 1:  # not one line of ours before it
            raise DataError(
                "these are not judgments of this project",
                "a file of alpaca_eval: recipes compare FILE FILE",
                file=args.judgments,
            ) from None
        raise
    judge = load_judge_file(args.judge) if args.judge else None
    labels = load_labels(args.labels) if args.labels else None
    thresholds, weak = (judge.thresholds, judge.judge.weak) if judge else (Thresholds(), None)
    card = audit(rows, thresholds, labels, weak, results=Path(args.judgments).parent)
    if args.output:
        atomic_files.write_json(Path(args.output) / "judge_audit.json", card)
        atomic_files.write_text(Path(args.output) / "judge_audit.md", scorecard_markdown(card))
    return card


def _asked_card(args: argparse.Namespace) -> Scorecard:
    """The scorecard of a judge on labelled pairs."""
    from recipes_lib.suites.judge_audit import audit_on_labels

    if not (args.judge and args.labels):
        raise RecipeError(
            "recipes judge audit: nothing to audit",
            "stored judgments: recipes judge audit runs/RUN/evals/EVAL/judgments.jsonl",
            "a judge on labelled pairs: recipes judge audit --judge evals/judges/quickstart.yaml"
            " --labels FILE --limit 50",
        )
    file, output = load_judge_file(args.judge), Path(args.output) if args.output else None
    quiet_libraries()
    return audit_on_labels(file, args.labels, args.limit, args.probe_pairs, output, args.both_modes)
