"""`recipes judge audit`: the scorecard of a judge, from stored judgments or from pairs that people
labelled.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.errors import DataError, ExitCode, RecipeError
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.terminal import at_least, next_step, say, say_json

if TYPE_CHECKING:
    from recipes_lib.evals.log import Scorecard


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
    from recipes_lib.evals.audit import audit_banner, scorecard_lines

    card = _stored_card(args) if args.judgments else _asked_card(args)
    if args.json:
        return say_json(asdict(card))
    if banner := audit_banner(card):
        say(f"! {banner}\n")
    say("\n".join(scorecard_lines(card)))
    if args.judgments:
        next_step(f"recipes judge audit {args.judgments} --json")
    else:
        next_step(f"recipes judge audit --judge {args.judge} --labels {args.labels} --json")
    return int(ExitCode.DONE)


def _stored_card(args: argparse.Namespace) -> Scorecard:
    from recipes_lib.evals.audit import audit
    from recipes_lib.evals.recipe import load_judge_file
    from recipes_lib.evals.store import stored_rows

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
    judge = load_judge_file(args.judge) if args.judge else None
    return audit(stored_rows(args.judgments), judge.thresholds if judge else None)


def _asked_card(args: argparse.Namespace) -> Scorecard:
    """The scorecard of a judge on labelled pairs, kept and resumed in runs/judge--<judge>/."""
    from recipes_lib.evals.audit import audit, probe_items
    from recipes_lib.evals.judge import Item
    from recipes_lib.evals.judged import ask_all
    from recipes_lib.evals.judges import opened
    from recipes_lib.evals.questions import read_labels
    from recipes_lib.evals.recipe import load_judge_file
    from recipes_lib.evals.store import Store, text_hash

    if not (args.judge and args.labels):
        raise RecipeError(
            "recipes judge audit: nothing to audit",
            "stored judgments: recipes judge audit runs/RUN/evals/EVAL/judgments.jsonl",
            "a judge on labelled pairs: recipes judge audit --judge evals/judges/quickstart.yaml"
            " --labels FILE --limit 50",
        )
    quiet_libraries()
    file, labels = load_judge_file(args.judge), read_labels(Path(args.labels))
    ids = {text_hash("\0".join(texts))[:16]: texts for texts in labels}
    chosen = dict(sorted(ids.items())[: args.limit])  # by hash: a larger limit keeps these
    items = [Item(name, *texts) for name, texts in chosen.items()]
    names = [re.sub(r"[^\w.-]+", "-", path.stem) for path in (file.path, Path(args.labels))]
    store = Store(runs_root() / f"judge--{names[0]}" / names[1] / "judgments.jsonl")
    with opened(file) as judge:
        plan = judge.plan("relative")
        rows = ask_all(items, judge, plan, store, f"on {len(items)} labelled pairs")
        probes = list(probe_items(items, args.probe_pairs))
        rows += ask_all(probes, judge, replace(plan, rules=False), store, "probes")
    if not args.json:
        say(f"kept in {shown_path(store.path)}")
    outcomes = {name: labels[texts] for name, texts in chosen.items()}
    return audit(rows, file.thresholds, outcomes)
