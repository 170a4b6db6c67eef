"""The audit of a judge on pairs that people labelled, before it judges anything: both orders and
the degenerate probes, kept and resumed.

Everything goes to runs/judge--<judge>/<labels>/: judgments.jsonl, judge_audit.json, judge_audit.md.
Results of the same judge carry the banner of an audit that it failed here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from recipes_lib.core.atomic_files import write_json, write_text
from recipes_lib.core.project import runs_root
from recipes_lib.eval_log import OtherMode, Scorecard
from recipes_lib.generation.judges import opened
from recipes_lib.judging.audit import audit, scorecard_markdown
from recipes_lib.judging.human_labels import pairs_by_id
from recipes_lib.judging.judge import Item
from recipes_lib.judging.judge_file import JudgeFile
from recipes_lib.judging.store import JudgmentStore, Row
from recipes_lib.statistics.intervals import wilson
from recipes_lib.suites.judged import ask_probes, judge_all, judge_facts

CARD = "judge_audit.json"


def audit_on_labels(
    file: JudgeFile,
    labels: Sequence[str | Path],
    limit: int | None = None,
    probe_pairs: int = 10,
    folder: Path | None = None,
    mode_pairs: int = 0,
) -> Scorecard:
    """Judge labelled pairs in both orders, and return the scorecard.

    Args:
        file: the judge.
        labels: files of human labels (PandaLM or LLMBar), taken together.
        limit: how many pairs; None for all. They are drawn by the hashes of their texts, so a
            larger limit keeps the judged ones.
        probe_pairs: pairs from which the degenerate probes are made, 12 judgments each.
        folder: where judgments and scorecard go; None for runs/judge--<judge>/<labels>.
        mode_pairs: pairs that the judge is asked about in its other verdict mode too, to see how
            far the two agree.

    Returns:
        The scorecard of `judging.audit`, with `labels` {files, pairs, of}, `judge_facts` and
        `folder`.

    Raises:
        DataError: a file is in neither format, or the same pair has two labels.
        EvaluationIncomplete: judgments are missing; the same command continues.
    """
    pairs = pairs_by_id(labels)
    chosen = dict(sorted(pairs.items())[:limit])
    items = [item for item, _ in chosen.values()]
    folder = folder or runs_root() / f"judge--{_name(file.path.stem)}" / _labels_name(labels)
    store = JudgmentStore(folder / "judgments.jsonl")
    with opened(file) as judge:
        rows = judge_all(
            items, judge, judge.plan("relative"), store, f"on {len(items)} labelled pairs"
        )
        probes = ask_probes(items, judge, store, probe_pairs)
        card = audit(
            [*rows, *probes],
            file.thresholds,
            {name: label for name, (_, label) in chosen.items()},
            file.judge.weak,
        )
        facts = dataclasses.asdict(judge_facts(judge))
    subset = (
        None
        if len(chosen) == len(pairs)
        else f"subset, {len(chosen)} of {len(pairs)} labelled pairs"
    )
    names = [_file_name(Path(path)) for path in labels]
    card["labels"] = {
        "files": names,
        "pairs": len(chosen),
        "of": len(pairs),
        "subset": subset,
    }
    card["judge_facts"], card["folder"] = facts, str(folder)
    card["modes"] = _other_mode(file, items[:mode_pairs], rows, folder) if mode_pairs else None
    write_json(folder / CARD, card)
    write_text(folder / "judge_audit.md", scorecard_markdown(card))
    return card


def _other_mode(
    file: JudgeFile, items: Sequence[Item], rows: Sequence[Row], folder: Path
) -> OtherMode:
    """The share of verdicts that are the same in the other verdict mode, among those that are
    verdicts in both.
    """
    mode: Literal["generate", "logits"] = "generate" if file.judge.mode == "logits" else "logits"
    other = dataclasses.replace(file, judge=dataclasses.replace(file.judge, mode=mode))
    store = JudgmentStore(folder / f"judgments.{mode}.jsonl")
    with opened(other) as judge:
        again = judge_all(items, judge, judge.plan("relative"), store, f"in mode {mode}")
    first = {(row["question_id"], row["order"]): row for row in rows}
    pairs = [
        (first[row["question_id"], row["order"]], row) for row in again if row["source"] != "rule"
    ]
    both = [
        one["value"] == two["value"] for one, two in pairs if one["status"] == two["status"] == "ok"
    ]
    return {"other": mode, "asked": len(pairs), "agreement": wilson(sum(both), len(both)).to_dict()}


def _labels_name(labels: Sequence[str | Path]) -> str:
    """A folder name for files of labels: their stems; a file called dataset.json is called after
    its folder.
    """
    paths = [Path(path) for path in labels]
    return "+".join(
        _name(path.resolve().parent.name if path.stem == "dataset" else path.stem) for path in paths
    )[:80]


def _file_name(path: Path) -> str:
    """A file as the scorecard names it; LLMBar's are all called dataset.json, so their folder goes
    with them.
    """
    return f"{path.resolve().parent.name}/{path.name}" if path.stem == "dataset" else path.name


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "labels"
