"""What a file of another program is, told by its content, and its rows with their lines.

Files: the original study's CSV, JSON and JSONL, FastChat's model_answer and judgments,
alpaca_eval's model_outputs.json and annotations.json, lm_eval's results and samples,
trainer_state.json or a list of its log lines, PEFT's adapter_config.json.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row, refuse_pipe
from recipes_lib.core.project import shown_path

ForeignRows = list[tuple[int | None, Row]]
KNOWN = (
    "known: the original study's CSV and JSONL, FastChat's model_answer and gpt-4_single or"
    " gpt-4_pair JSONL,",
    "alpaca_eval's model_outputs.json and annotations.json, lm_eval's results JSON and"
    " samples_*.jsonl, trainer_state.json",
)
CSV_COLUMNS = (
    "instruction",
    "your_answer (A)",
    "baseline_answer (B)",
    "score (A vs B)",
    "preference",
    "feedback",
)
_SAMPLES = re.compile(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT[\d.:-]+)?\.jsonl\Z")
_LOG_KEYS = {"loss", "eval_loss", "train_runtime", "train_loss"}
_FORMATS = (
    ("fastchat-answers", {"question_id", "choices"}),
    ("fastchat-pair", {"g1_winner", "g2_winner", "model_1", "model_2"}),
    ("fastchat-single", {"judgment", "score", "turn", "model"}),
    ("original-mt-bench-jsonl", {"raw", "turn", "question_id"}),
    ("alpaca-eval-annotations", {"preference", "output_1", "output_2", "instruction"}),
)
_LABELS = "recipes judge audit --judge JUDGE.yaml --labels FILE"
# What else a file may be, by its fields, and who reads it.
_OTHER_KINDS = (
    ({"key", "kind", "order"}, "judgments of this project", "recipes judge audit FILE"),
    ({"instruction", "output"}, "answers", "recipes eval EVAL FILE judges them"),
    ({"choices", "model_id", "question_id"}, "answers", "recipes eval EVAL FILE judges them"),
    ({"annotator1", "response1"}, "pairs that people labelled", _LABELS),
    ({"label", "output_1", "output_2"}, "pairs that people labelled", _LABELS),
    ({"results"}, "results of lm_eval", "recipes import FILE --as RUN"),
    ({"loss", "step"}, "a training log", "recipes import FILE --as RUN"),
)


@dataclass(frozen=True)
class Foreign:
    """One file as read: its objects with their lines; an unknown `format` is None."""

    path: Path
    format: str | None
    sha256: str
    size: int
    rows: ForeignRows = field(repr=False)

    @property
    def task(self) -> str:
        """The task of lm-eval's samples, which only the file's name tells."""
        match = _SAMPLES.match(self.path.name)
        return match.group(1) if match else ""

    def error(self, what: str, *hints: str, line: int | None = None) -> DataError:
        """Return an error about this file."""
        return DataError(what, *hints, file=shown_path(self.path), line=line)

    def unknown(self, wanted: str, *known: str) -> DataError:
        """Return the error for a file that is not `wanted`: what its fields say it is."""
        fields = set(self.rows[0][1])
        for needed, what, use in _OTHER_KINDS:
            if needed <= fields:
                verb = "this is" if what.startswith("a ") else "these are"
                use = use.replace("FILE", str(self.path))
                return self.error(f"not {wanted}: {verb} {what}", use, *known)
        shown = f"fields here: {', '.join(sorted(fields))[:300]}"
        return self.error(f"not {wanted}", shown, *known)


def read_files(names: Sequence[str | Path]) -> list[Foreign]:
    """Return all files, each of a known format.

    Raises:
        DataError: a file cannot be read, is damaged or unknown, or it (or a copy) is named twice.
    """
    files: dict[str, Foreign] = {}
    for name in names:
        file = read_foreign(name, *KNOWN)
        if not file.rows and file.format is None:
            raise file.error("holds no rows" if file.size else "is empty")
        if file.format is None:
            raise file.unknown("a known foreign file", *KNOWN)
        if twin := files.get(file.sha256):
            same = twin.path.resolve() == file.path.resolve()
            what = "named twice" if same else f"{shown_path(twin.path)}, byte for byte"
            raise file.error(f"is {what}", "one file is one result: name it once")
        files[file.sha256] = file
    return list(files.values())


def read_foreign(name: str | Path, *known: str) -> Foreign:
    """Return one file as read.

    Args:
        known: hint that lists the formats, where other content stands in it.

    Raises:
        DataError: it cannot be read, or is damaged (with the line).
    """
    path = Path(name)
    shown = shown_path(path)
    if path.is_dir():
        raise DataError("is a folder", f"name its files: {shown.rstrip('/')}/*", file=shown)
    refuse_pipe(path, shown)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as fault:
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
        raise DataError(f"cannot be read: {fault.strerror}", *near, file=shown) from None
    except UnicodeDecodeError as fault:
        line = data[: fault.start].count(b"\n") + 1
        raise DataError(f"not UTF-8: byte {fault.start}", *known, file=shown, line=line) from None
    form, rows = None, []
    if text.strip() and path.suffix.lower() == ".csv":
        form, rows = "original-alpaca-eval-csv", _csv_rows(text, shown)
    elif text.strip():
        rows, single = _json_rows(text, path, shown, known)
        form = (_object_format(rows[0][1]) if single else None) or _rows_format(rows)
    return Foreign(path, form, hashlib.sha256(data).hexdigest(), len(data), rows)


def _csv_rows(text: str, shown: str) -> ForeignRows:
    """The rows of the original study's CSV, which must not end inside a quoted text."""
    csv.field_size_limit(10_000_000)
    reader = csv.DictReader(io.StringIO(text.replace("\0", "")), strict=True)
    columns = reader.fieldnames or ()
    if missing := [name for name in CSV_COLUMNS if name not in columns]:
        what = f"not the original study's detailed_results.csv: no column {missing[0]!r}"
        raise DataError(what, f"columns: {', '.join(columns)}", file=shown, line=1)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as fault:
        what = f"not CSV after line {reader.line_num}: {fault}"
        raise DataError(what, "is the file whole?", file=shown) from None


def _json_rows(text: str, path: Path, shown: str, known: Sequence[str]) -> tuple[ForeignRows, bool]:
    """The objects of a JSON array or of JSON lines, or one object and True."""
    values: list[tuple[int | None, Any]] = []
    line: int | None = None
    hints: Sequence[str] = ()
    try:
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as fault:
            if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
                line = fault.lineno
                raise
            for line, part in enumerate(text.split("\n"), 1):
                hints = known if line == 1 else ()
                if part.strip():
                    values.append((line, json.loads(part)))
        else:
            if isinstance(whole, dict):
                return [(1, whole)], True
            values = [(None, row) for row in whole] if isinstance(whole, list) else [(1, whole)]
    except RecursionError:
        raise DataError("nested too deeply", file=shown, line=line) from None
    except json.JSONDecodeError as fault:
        raise DataError(f"not JSON: {fault.msg}", *hints, file=shown, line=line) from None
    for line, row in values:
        if not isinstance(row, dict):
            what = f"holds {type(row).__name__} where an object is expected"
            raise DataError(what, *known, file=shown, line=line)
    return values, False


def _object_format(row: Row) -> str | None:
    results = row.get("results")
    if isinstance(row.get("log_history"), list):
        return "trainer-state"
    if isinstance(results, dict) and all(isinstance(value, dict) for value in results.values()):
        return "lm-eval-results"
    if "peft_type" in row:
        return "adapter-config"
    summary = {"win_rate_vs_baseline", "total_comparisons"} <= row.keys()
    return "original-summary" if summary else None


def _rows_format(rows: ForeignRows) -> str | None:
    fields = rows[0][1].keys() if rows else set()
    if {"instruction", "output"} <= fields and "preference" not in fields:
        return "alpaca-eval-outputs"
    if "doc_id" in fields and fields & {"resps", "filtered_resps", "doc"}:
        return "lm-eval-samples"
    if fields & _LOG_KEYS and "question_id" not in fields:
        return "trainer-log"
    return next((name for name, needed in _FORMATS if needed <= fields), None)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number; a bool is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
