"""Pairs that people labelled.

Formats, a file of rows each: PandaLM's test set (three annotators per pair, the majority counts;
without one the label is a tie), LLMBar (one objective label per pair), and one's own labels under
the names that a suite's samples.jsonl has:

    {"instruction": "...", "answer": "...", "opponent_answer": "...", "label": "win"}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row
from recipes_lib.data.files import read_file
from recipes_lib.eval_log import SCORE
from recipes_lib.judging.judge import Item
from recipes_lib.judging.store import text_hash

_PANDALM: dict[str | int, str] = {0: "tie", 1: "win", 2: "loss"}
_LLMBAR: dict[str | int, str] = {1: "win", 2: "loss"}
_OWN: dict[str | int, str] = {name: name for name in SCORE}
PairTexts: TypeAlias = tuple[str, str, str]


def load_labelled_pairs(path: str | Path) -> list[tuple[Item, str]]:
    """Read labelled pairs; the label is the outcome of the first response: win, loss or tie.

    Ids are hashes of the texts, so that the same pair has the same id wherever it was judged.

    Raises:
        DataError: a row is in none of the formats, or has another label; or there is none.
    """
    return [(item, label) for _, item, label in _labelled(Path(path))]


def _labelled(path: Path) -> Iterator[tuple[int | None, Item, str]]:
    """Yield line, pair and label of each row."""
    table = read_file(path)
    if not table.rows:
        raise DataError("0 labelled pairs", file=table.file)
    for line, row in table.numbered_rows:
        try:
            yield line, *_pair(row)
        except (KeyError, TypeError):
            what = "not a labelled pair: instruction, answer, opponent_answer and label"
            hint = "PandaLM's and LLMBar's rows are read too"
            raise DataError(what, hint, file=table.file, line=line) from None
        except ValueError as fault:
            raise DataError(str(fault), file=table.file, line=line) from None


def _labelled_once(paths: Sequence[Path]) -> Iterator[tuple[Path, int | None, Item, str]]:
    """Yield file, line, pair and label of each row; a pair has one label, in either order of its
    answers.
    """
    known: dict[PairTexts, tuple[float, str]] = {}
    for path in paths:
        for line, item, label in _labelled(path):
            for texts, value in _both_orders(item, label).items():
                before, where = known.setdefault(texts, (value, f"{path}:{line}"))
                if before != value:
                    what = f"a pair has two labels, here and in {where}: {item.instruction[:60]!r}"
                    raise DataError(what, "remove one of the rows", file=path, line=line)
            yield path, line, item, label


def pairs_by_id(paths: Sequence[str | Path]) -> dict[str, tuple[Item, str]]:
    """Return the labelled pairs of all files by id; the same pair in two files is one.

    Raises:
        DataError: a pair has two different labels, or as `load_labelled_pairs` does.
    """
    rows = _labelled_once([Path(path) for path in paths])
    return {item.question_id: (item, label) for _, _, item, label in rows}


def load_labels(paths: Sequence[str | Path]) -> dict[str, str]:
    """Return the label of each pair's id; see `pairs_by_id`."""
    return {name: label for name, (_, label) in pairs_by_id(paths).items()}


def labels_by_texts(path: Path, asked: Container[str]) -> dict[PairTexts, float]:
    """Return what people said of each labelled pair, by instruction, answer and opponent's answer:
    1, 0.5 or 0, in both orders of the answers.

    Args:
        asked: every instruction that there is, without white space at its ends.

    Raises:
        DataError: a pair's instruction is none of these, or as `pairs_by_id` does.
    """
    found: dict[PairTexts, float] = {}
    for _, line, item, label in _labelled_once([path]):
        if item.instruction.strip() not in asked:
            what = f"no question of this eval has the instruction {item.instruction[:60]!r}"
            raise DataError(what, "remove the row, or correct it", file=path, line=line)
        found |= _both_orders(item, label)
    return found


def texts_of(*texts: str | None) -> PairTexts:
    """Return the texts of a pair as labels know them: white space at the ends is no difference."""
    asked, first, second = ((text or "").strip() for text in texts)
    return asked, first, second


def _both_orders(item: Item, label: str) -> dict[PairTexts, float]:
    """What a label says of both orders of a pair; that of two equal answers says nothing."""
    asked, first, second = texts_of(item.instruction, item.answer, item.opponent)
    value = SCORE[label] if first != second else SCORE["tie"]
    return {(asked, second, first): 1 - value, (asked, first, second): value}


def _pair(row: Row) -> tuple[Item, str]:
    """A row's pair, its id a hash of its texts, and its label: in PandaLM the one that at least two
    of three annotators gave.
    """
    if "opponent_answer" in row:
        source, label = "own", _verdict(row, "label", _OWN)
        texts = row["instruction"], row["answer"], row["opponent_answer"]
    elif "label" in row:
        source, label = "llmbar", _verdict(row, "label", _LLMBAR)
        texts = row["input"], row["output_1"], row["output_2"]
    else:
        asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        votes = Counter(_verdict(row, f"annotator{number}", _PANDALM) for number in (1, 2, 3))
        label, most = votes.most_common(1)[0]
        source, label = "pandalm", label if most > 1 else "tie"
        # one response of the published file is the JSON value false instead of a text
        texts = asked, str(row["response1"]), str(row["response2"])
    return Item(f"{source}:{text_hash(chr(0).join(texts))[:16]}", *texts), label


def _verdict(row: Row, key: str, verdicts: Mapping[str | int, str]) -> str:
    """What a row's label means."""
    value = row[key]
    if type(value) not in (str, int) or value not in verdicts:
        raise ValueError(f"{key} is {value!r}, not {', '.join(map(str, verdicts))}")
    return verdicts[value]
