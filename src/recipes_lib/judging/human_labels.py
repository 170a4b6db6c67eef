"""Pairs with human labels, and how far a judge agrees with them.

Formats: PandaLM's test set (three annotators per pair, the majority counts; without one the label
is a tie) and LLMBar (one objective label per pair).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import refuse_pipe
from recipes_lib.eval_log import Sample
from recipes_lib.judging.judge import Item
from recipes_lib.judging.store import text_hash
from recipes_lib.statistics.agreement import accuracy, cohens_kappa
from recipes_lib.statistics.intervals import mean_interval, rate_bounds

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
            pairs.append(_llmbar(row) if "label" in row else _pandalm(row))
        except (KeyError, TypeError) as fault:
            raise DataError(
                f"row {number} is neither PandaLM nor LLMBar: {fault}", file=path
            ) from None
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
                raise DataError(
                    f"a pair has two labels: {item.instruction[:60]!r}",
                    "remove one of the rows",
                    file=path,
                )
            pairs[item.question_id] = item, label
    return pairs


def load_labels(paths: Sequence[str | Path]) -> dict[str, str]:
    """Return the label of each pair's id; see `pairs_by_id`."""
    return {name: label for name, (_, label) in pairs_by_id(paths).items()}


def _item(instruction: str, first: str, second: str, source: str) -> Item:
    """A pair whose id is a hash of its texts."""
    return Item(
        f"{source}:{text_hash(chr(0).join((instruction, first, second)))[:16]}",
        instruction,
        first,
        second,
    )


def _llmbar(row: Mapping[str, Any]) -> tuple[Item, str]:
    """One LLMBar row."""
    return _item(row["input"], row["output_1"], row["output_2"], "llmbar"), {1: "win", 2: "loss"}[
        row["label"]
    ]


def _pandalm(row: Mapping[str, Any]) -> tuple[Item, str]:
    """One PandaLM row: the label that at least two of three annotators gave."""
    instruction = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    label, votes = Counter(_LABELS[row[f"annotator{number}"]] for number in (1, 2, 3)).most_common(
        1
    )[0]
    # one response of the published file is the JSON value false instead of a text
    return _item(
        instruction, str(row["response1"]), str(row["response2"]), "pandalm"
    ), label if votes > 1 else "tie"


def agreement(outcomes: Sequence[Sample], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return how far a judge's outcomes agree with labels.

    `outcome_accuracy` compares win/loss/tie of both orders together; `kappa` is chance-corrected.
    `verdict_accuracy` looks at single verdicts on pairs that people decided, where chance is one
    half whatever the judge's position bias, because each pair is seen in both orders; its interval
    is clustered by pair and answers "above chance".
    """
    labelled = [(item, labels[item.id]) for item in outcomes if item.id in labels]
    resolved = [(item, label) for item, label in labelled if item.resolved]
    said, truth = [item.outcome for item, _ in resolved], [label for _, label in resolved]
    right = sum(outcome == label for outcome, label in zip(said, truth, strict=True))
    meaning = {"win": ("A", "B"), "loss": ("B", "A")}
    verdicts = [
        sum(map(str.__eq__, item.verdicts, meaning[label])) / 2
        for item, label in resolved
        if label != "tie" and not item.by_rule
    ]
    interval = mean_interval(verdicts)
    return {
        "n": len(labelled),
        "unresolved": len(labelled) - len(resolved),
        "outcome_accuracy": accuracy(said, truth).to_dict(),
        "outcome_accuracy_bounds": rate_bounds(
            right, len(labelled), len(labelled) - len(resolved)
        ).to_dict(),
        "kappa": cohens_kappa(said, truth).to_dict(),
        "verdict_accuracy": interval.to_dict(),
        "above_chance": None if interval.low is None else interval.low > 0.5,
    }
