"""What a foreign file is, told by its content: judgments, answers, lm-eval results and samples,
training logs, an adapter's config.

Files: the original study's CSV, JSON and JSONL, FastChat's model_answer and judgments,
alpaca_eval's model_outputs.json and annotations.json, lm_eval's results and samples,
trainer_state.json or a list of its log lines, PEFT's adapter_config.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.config.suggestions import near_names
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row, refuse_pipe
from recipes_lib.core.project import shown_path
from recipes_lib.judging.replay_readers import ForeignFile, NotJudgments, read_foreign

KNOWN = (
    (
        "known: the original study's CSV and JSONL, FastChat's model_answer and gpt-4_single or"
        " gpt-4_pair JSONL,"
    ),
    (
        "alpaca_eval's model_outputs.json and annotations.json, lm_eval's results JSON and"
        " samples_*.jsonl, trainer_state.json"
    ),
)
_SAMPLES = re.compile(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT[\d.:-]+)?\.jsonl\Z")
_LOG_KEYS = {"loss", "eval_loss", "train_runtime", "train_loss"}


@dataclass(frozen=True)
class Foreign:
    """One file as read. `rows` are its objects with their lines, `judgments` is set for judgments
    alone.
    """

    path: Path
    format: str
    sha256: str
    size: int
    rows: list[tuple[int | None, Row]] = field(default_factory=list, repr=False)
    judgments: ForeignFile | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """Judgments, answers, samples or log lines."""
        return len(self.judgments.records) if self.judgments else len(self.rows)

    @property
    def task(self) -> str:
        """The task of a file of lm-eval samples, which only its name tells."""
        match = _SAMPLES.match(self.path.name)
        return match.group(1) if match else ""

    def error(self, what: str, *hints: str, line: int | None = None) -> DataError:
        """Return an error about this file."""
        return DataError(what, *hints, file=shown_path(self.path), line=line)


def read_files(names: Sequence[str | Path]) -> list[Foreign]:
    """Return all files, each recognised.

    Raises:
        DataError: a file cannot be read, is damaged, unknown, or named twice (itself, or a copy of
            it).
    """
    files: list[Foreign] = []
    for name in names:
        file = recognise(Path(name))
        twin = next((known for known in files if known.sha256 == file.sha256), None)
        if twin is not None:
            same = (
                "is named twice"
                if twin.path.resolve() == file.path.resolve()
                else f"is {shown_path(twin.path)}, byte for byte"
            )
            raise file.error(f"{same}", "one file is one result: name it once")
        files.append(file)
    return files


def recognise(path: Path) -> Foreign:
    """Return one file as read.

    Raises:
        DataError: it cannot be read, is damaged (with the line), or is of no known format.
    """
    data, text = _text_of(path)
    digest, size = hashlib.sha256(data).hexdigest(), len(data)
    if path.suffix.lower() != ".csv":
        rows, single = _rows(text, path)
        form = _object_format(rows[0][1]) if single else _rows_format(rows[0][1])
        if form:
            return Foreign(path, form, digest, size, rows)
    try:
        judgments = read_foreign(path)
    except NotJudgments as error:
        what = error.what.replace("a known format of judgments", "a known foreign file")
        hints = [hint for hint in error.hints if not hint.startswith("known:")]
        raise DataError(what, *hints, *KNOWN, file=shown_path(path)) from None
    return Foreign(path, judgments.format, digest, size, judgments=judgments)


def _text_of(path: Path) -> tuple[bytes, str]:
    """The bytes and the text of a file."""
    shown = shown_path(path)
    if path.is_dir():
        raise DataError("is a folder", f"name its files: {shown.rstrip('/')}/*", file=shown)
    refuse_pipe(path, shown)
    try:
        data = path.read_bytes()
    except OSError as fault:
        near = (
            near_names(path.name, [other.name for other in path.parent.glob("*")])
            if path.parent.is_dir()
            else []
        )
        raise DataError(
            f"cannot be read: {fault.strerror}",
            *(f"did you mean {name}?" for name in near[:1]),
            file=shown,
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = data[: fault.start].count(b"\n") + 1
        raise DataError(f"not UTF-8: byte {fault.start}", *KNOWN, file=shown, line=line) from None
    if not text.strip():
        raise DataError("is empty", file=shown)
    return data, text


def _rows(text: str, path: Path) -> tuple[list[tuple[int | None, Row]], bool]:
    """The objects of a file with their lines, and whether the file is one object."""
    shown = shown_path(path)
    try:
        whole = json.loads(text)
    except RecursionError:
        raise DataError("nested too deeply", file=shown) from None
    except json.JSONDecodeError as fault:
        if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
            raise DataError(f"not JSON: {fault.msg}", file=shown, line=fault.lineno) from None
        whole = None
    if isinstance(whole, dict):
        return [(1, whole)], True
    rows: list[tuple[int | None, Any]] = (
        [(None, row) for row in whole] if isinstance(whole, list) else _lines(text, shown)
    )
    if not rows:
        raise DataError("holds no rows", file=shown)
    for line, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"holds {type(row).__name__} where an object is expected",
                *KNOWN,
                file=shown,
                line=line,
            )
    return rows, False


def _lines(text: str, shown: str) -> list[tuple[int | None, Any]]:
    """The values of JSON lines."""
    rows: list[tuple[int | None, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (json.JSONDecodeError, RecursionError) as fault:
                reason = (
                    fault.msg if isinstance(fault, json.JSONDecodeError) else "nested too deeply"
                )
                raise DataError(
                    f"not JSON: {reason}", *(KNOWN if number == 1 else ()), file=shown, line=number
                ) from None
    return rows


def _object_format(row: Row) -> str | None:
    """The format of a file that is one object."""
    if isinstance(row.get("log_history"), list):
        return "trainer-state"
    if isinstance(row.get("results"), dict) and all(
        isinstance(value, dict) for value in row["results"].values()
    ):
        return "lm-eval-results"
    if "peft_type" in row:
        return "adapter-config"
    if {"win_rate_vs_baseline", "total_comparisons"} <= row.keys():
        return "original-summary"
    return _rows_format(row)


def _rows_format(row: Row) -> str | None:
    """The format of rows, judgments left to `read_foreign`."""
    if {"question_id", "choices"} <= row.keys():
        return "fastchat-answers"
    if {"instruction", "output"} <= row.keys() and "preference" not in row:
        return "alpaca-eval-outputs"
    if "doc_id" in row and row.keys() & {"resps", "filtered_resps", "doc"}:
        return "lm-eval-samples"
    if row.keys() & _LOG_KEYS and "question_id" not in row:
        return "trainer-log"
    return None
