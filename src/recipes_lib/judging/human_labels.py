"""Pairs with human labels, and how far a judge agrees with them.

Formats: PandaLM's test set (three annotators per pair, the majority counts; without one the label
is a tie) and LLMBar (one objective label per pair).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row, refuse_pipe
from recipes_lib.eval_log import Sample
from recipes_lib.judging.judge import Item
from recipes_lib.judging.store import text_hash
from recipes_lib.statistics.intervals import accuracy, cohens_kappa, mean_interval, rate_bounds

_LABELS = {0: "tie", 1: "win", 2: "loss"}


def load_labelled_pairs(path: str | Path) -> list[tuple[Item, str]]:
    """Read labelled pairs; the label is the outcome of the first response: win, loss or tie.

    Ids are hashes of the texts, so that the same pair has the same id wherever it was judged.

    Raises:
        DataError: if the file is neither of the two formats, with the row.
    """
    path = Path(path)
    refuse_pipe(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise DataError(f"cannot be read: {fault.strerror}", file=path) from None
    except (ValueError, RecursionError):
        raise DataError("not JSON", file=path) from None
    if not isinstance(rows, list) or not rows:
        raise DataError("labelled pairs are a JSON array with at least one row", file=path)
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            pairs.append(_pair(row))
        except (KeyError, TypeError) as fault:
            what = f"row {number} is neither PandaLM nor LLMBar: {fault}"
            raise DataError(what, file=path) from None
    return pairs


def pairs_by_id(paths: Sequence[str | Path]) -> dict[str, tuple[Item, str]]:
    """Return the labelled pairs of all files by id; the same pair in two files is one.

    Raises:
        DataError: a pair has two different labels, or as `load_labelled_pairs` does.
    """
    pairs: dict[str, tuple[Item, str]] = {}
    for path in paths:
        for item, label in load_labelled_pairs(path):
            if pairs.get(item.question_id, (item, label))[1] != label:
                what = f"a pair has two labels: {item.instruction[:60]!r}"
                raise DataError(what, "remove one of the rows", file=path)
            pairs[item.question_id] = item, label
    return pairs


def load_labels(paths: Sequence[str | Path]) -> dict[str, str]:
    """Return the label of each pair's id; see `pairs_by_id`."""
    return {name: label for name, (_, label) in pairs_by_id(paths).items()}


def _pair(row: Row) -> tuple[Item, str]:
    """An LLMBar row, or a PandaLM row with the label that at least two of three annotators gave;
    its id is a hash of its texts.
    """
    if "label" in row:
        source, label = "llmbar", {1: "win", 2: "loss"}[row["label"]]
        texts = row["input"], row["output_1"], row["output_2"]
    else:
        asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        votes = Counter(_LABELS[row[f"annotator{number}"]] for number in (1, 2, 3))
        label, most = votes.most_common(1)[0]
        source, label = "pandalm", label if most > 1 else "tie"
        # one response of the published file is the JSON value false instead of a text
        texts = asked, str(row["response1"]), str(row["response2"])
    return Item(f"{source}:{text_hash(chr(0).join(texts))[:16]}", *texts), label


def agreement(outcomes: Sequence[Sample], labels: Mapping[str, str]) -> Row:
    """Return how far a judge's outcomes agree with labels.

    `outcome_accuracy` compares win/loss/tie of both orders together; `kappa` takes chance off.
    `verdict_accuracy` is of single verdicts on pairs that people decided: because each pair is seen
    in both orders, chance is one half whatever the position bias. Its interval, clustered by pair,
    answers "above chance".
    """
    labelled = [item for item in outcomes if item.id in labels]
    resolved = [item for item in labelled if item.resolved]
    said, truth = [item.outcome for item in resolved], [labels[item.id] for item in resolved]
    right = sum(map(str.__eq__, said, truth))
    meaning = {"win": ("A", "B"), "loss": ("B", "A")}
    verdicts = [
        sum(map(str.__eq__, item.verdicts, meaning[label])) / 2
        for item, label in zip(resolved, truth, strict=True)
        if label != "tie" and not item.by_rule
    ]
    interval, unresolved = mean_interval(verdicts), len(labelled) - len(resolved)
    return {
        "n": len(labelled),
        "unresolved": unresolved,
        "outcome_accuracy": accuracy(said, truth).to_dict(),
        "outcome_accuracy_bounds": rate_bounds(right, len(labelled), unresolved).to_dict(),
        "kappa": cohens_kappa(said, truth).to_dict(),
        "verdict_accuracy": interval.to_dict(),
        "above_chance": None if interval.low is None else interval.low > 0.5,
    }
