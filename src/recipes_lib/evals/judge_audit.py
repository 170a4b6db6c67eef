"""The audit of a judge by itself: on stored judgments, or on pairs that people labelled."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from recipes_lib.core.project import runs_root
from recipes_lib.evals.audit import audit, probe_items
from recipes_lib.evals.judge import Item
from recipes_lib.evals.judged import ask_all
from recipes_lib.evals.judges import opened
from recipes_lib.evals.log import Scorecard
from recipes_lib.evals.questions import read_labels
from recipes_lib.evals.recipe import load_judge_file
from recipes_lib.evals.store import Store, stored_rows, text_hash


def audit_stored(judgments: Path, judge: str | None) -> Scorecard:
    """Return the scorecard of the judge behind stored judgments.

    Args:
        judgments: a judgments.jsonl.
        judge: a judge file, for its thresholds.
    """
    thresholds = load_judge_file(judge).thresholds if judge else None
    return audit(stored_rows(judgments), thresholds)


def audit_on_labels(
    judge: str, labels: Path, limit: int | None, probe_pairs: int
) -> tuple[Scorecard, Path]:
    """Judge labelled pairs in both orders, and return the scorecard and where the judgments are
    kept: runs/judge--<judge>/<labels>/, which resumes.

    Args:
        judge: a judge file.
        labels: a file of labelled pairs.
        limit: how many pairs; they are drawn by hash, so a larger limit keeps the judged ones.
        probe_pairs: pairs for the probes, 4 judgments each.

    Raises:
        EvaluationIncomplete: judgments are missing; the same command continues.
    """
    file, outcomes = load_judge_file(judge), read_labels(labels)
    ids = {text_hash("\0".join(texts))[:16]: texts for texts in outcomes}
    chosen = dict(sorted(ids.items())[:limit])
    items = [Item(name, *texts) for name, texts in chosen.items()]
    names = [re.sub(r"[^\w.-]+", "-", path.stem) for path in (file.path, labels)]
    store = Store(runs_root() / f"judge--{names[0]}" / names[1] / "judgments.jsonl")
    with opened(file) as opened_judge:
        plan = opened_judge.plan("relative")
        name = f"on {len(items)} labelled pairs"
        rows = ask_all(items, opened_judge, plan, store, name)
        probes = list(probe_items(items, probe_pairs))
        rows += ask_all(probes, opened_judge, replace(plan, rules=False), store, "probes")
    known = {name: outcomes[texts] for name, texts in chosen.items()}
    return audit(rows, file.thresholds, known), store.path
