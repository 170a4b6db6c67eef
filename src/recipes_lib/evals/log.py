"""The evaluation log: what one evaluation of one model says, and how it lies on disk.

    runs/<run>/evals/<eval>/result.json    who answered, who judged, and every metric
                            items.jsonl    one `Sample` a line: what the metrics are means of
                            earlier/<key>/ the same two files of other settings

The declarations are the schema of both files. `Store` keeps answers and judgments as they arrive.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.files import (
    Row,
    object_or_none,
    parsed_line,
    read_object,
    read_rows,
    sync,
    write_bytes,
    write_json,
)
from recipes_lib.data.leaks import Leaks
from recipes_lib.evals.faults import FORM_ONLY, answer_faults

ORDERS = ("AB", "BA")
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}
UNRESOLVED = "unresolved"
# of pairs; of grades, losses and checks; of lm-eval's items
OUTCOMES = (*SCORE, UNRESOLVED, "graded", "right", "wrong", "scored")
REFERENCE = "reference"  # the opponent that is the questions' own reference answers
NOT_RECORDED = "not recorded"  # a fact that the files of another program could say and do not
RESULT_VERSION = 2
Unit: TypeAlias = Literal["share", "grade", "number"]
_HASH = re.compile("[0-9a-f]{64}")
_AGAIN = "evaluate the run again: its answers and judgments are kept, nothing is asked twice"


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a metric; those of one `id` (turns of a question) are not independent."""

    id: str
    turn: int = 1
    category: str = "all"
    value: float | None = None  # 1, 0.5 or 0 for a pair; a grade; a score; None: no verdict
    outcome: str = UNRESOLVED
    verdicts: tuple[str, ...] = ()  # in order AB and BA, or a grade; else why there is none
    by_rule: bool = False
    cut: bool = False  # the answer reached the token limit
    prompt: str = ""  # hash of the whole prompt, where another program recorded it
    same_as: str = ""  # id of the first sample with the same text, where no `input` shows it
    input: str | None = field(default=None, repr=False)
    answer: str | None = field(default=None, repr=False)
    opponent: str | None = field(default=None, repr=False)
    raws: tuple[str | None, ...] = field(default=(), repr=False)  # the texts behind the verdicts

    @property
    def key(self) -> tuple[str, int]:
        """What pairs this sample with the same one of another model."""
        return self.id, self.turn

    @property
    def flip(self) -> bool:
        """Whether the judge named the same place in both orders, so that its verdict turned."""
        return not self.by_rule and self.verdicts in (("A", "A"), ("B", "B"))


@dataclass(frozen=True)
class Metric:
    """One metric of one evaluation with its 95% interval over questions. Without samples (a
    perplexity of lm-eval) it is shown and never tested.
    """

    metric: str
    label: str
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    task: str = ""
    opponent: str | None = None
    unit: Unit = "share"
    higher_is_better: bool | None = True  # None: the files do not say it, so nothing is ranked
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0  # samples with a value
    asked: int = 0  # questions that another program counted: of some its files may have no row
    instead_of: str = ""  # the metric that is compared in its place, where two models share that
    parts: tuple[str, ...] = ()  # of a group of lm-eval: the tasks and groups below it
    num_fewshot: int | None = None
    version: str | None = None  # of the task
    eval: str = ""
    suite: str = ""
    file: Path = Path()

    @property
    def key(self) -> tuple[str, str, str]:
        """What the same metric of another model has too; the opponent may be that other model."""
        return self.eval, self.task, self.metric

    @property
    def name(self) -> str:
        """The key as one word: `alpaca_eval/win_rate`, `lm_eval/arc_easy/acc_norm`."""
        return "/".join(part for part in self.key if part)


@dataclass(frozen=True, kw_only=True)
class AnswerFacts:
    """Who answered and how: `models` are the names of the weights, `fingerprint` their hash."""

    name: str = ""
    models: tuple[str, ...] = ()
    fingerprint: str = ""
    prompt_format: str | None = None
    prompt_format_hash: str | None = None
    decoding: dict[str, Any] | None = None
    dtype: str | None = None
    quantized: bool | None = None
    engine: str | None = None  # which program computed them: "transformers", "openai"
    server: str | None = None  # its version, where a server answered
    served_model: str | None = None  # the name in its replies, where it alone knows the weights


@dataclass(frozen=True, kw_only=True)
class JudgeFacts:
    """Who judged."""

    name: str = ""
    fingerprint: str = ""
    model: str = ""
    mode: str | None = None
    engine: str | None = None  # which program it ran in: "transformers", "openai"
    address: str | None = None  # of its server, as the recipe names it
    server: str | None = None  # its version
    weak: str | None = None  # why its numbers mean little
    weights: str | None = None  # their hash, where they are here


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number of a judge's audit."""

    check: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    needs: str = ""
    result: Literal["pass", "fail", "not measured"] = "not measured"


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """The audit of a judge: counts of what it was asked, and its checks."""

    judge: str = ""  # its fingerprint
    judgments: int = 0
    cut: int = 0
    checks: tuple[Check, ...] = ()

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that the judge failed."""
        return tuple(check for check in self.checks if check.result == "fail")

    @property
    def not_measured(self) -> tuple[Check, ...]:
        """The checks that a judge must pass and that nothing measured."""
        unknown = [check for check in self.checks if check.result == "not measured"]
        return tuple(check for check in unknown if check.needs)


@dataclass(frozen=True, kw_only=True)
class EvalLog:
    """One evaluation of one model. `key` is the hash of all that decides the result, `settings` of
    what the eval recipe and its files decide.
    """

    suite: str
    eval: str
    target: str = ""
    against: str | None = None  # for a suite with an opponent
    key: str = ""
    settings: str = ""
    n: int = 0
    subset: str | None = None
    banners: tuple[str, ...] = ()  # must be read before the numbers, heaviest first
    notes: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    answers: AnswerFacts = field(default_factory=AnswerFacts)
    opponent: AnswerFacts | None = None
    judge: JudgeFacts | None = None
    audit: Scorecard | None = None
    leaks: Leaks | None = None  # None: nobody looked
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)
    written: str = ""
    command: str = ""
    lm_eval_command: str | None = None
    git: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, Any] = field(default_factory=dict, repr=False)
    source: str = ""  # the program that wrote the files, where it was not this one
    file: Path = Path()  # result.json

    @cached_property
    def faults(self) -> dict[str, tuple[int, int]]:
        """The faults in the answers (`answer_faults`), which several readers ask for."""
        if self.source and self.judge is None:  # a task may want one letter, again and again
            return {}
        samples: dict[tuple[str, int], Sample] = {}
        for metric in self.metrics:
            samples |= {sample.key: sample for sample in metric.samples}
        answered = {key: sample for key, sample in samples.items() if sample.answer is not None}
        return answer_faults(
            {key: str(sample.answer).strip() for key, sample in answered.items()},
            num_cut=sum(sample.cut for sample in answered.values()),
            judged=self.judge is not None,
            form_only=FORM_ONLY in self.notes,
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of all its metrics."""
        return tuple(dict.fromkeys(metric.name for metric in self.metrics))


_schema: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def log_file(run: Path, name: str, against: str | None) -> Path:
    """Return where the result of an evaluation against an opponent lies in a run's folder."""
    suffix = "" if against in (None, REFERENCE) else f".against-{against}"
    return run / "evals" / name / f"result{suffix}.json"


def items_file(result: Path) -> Path:
    """Return the file of samples beside a result; a file of another program has its own."""
    return result.with_name(re.sub(r"^result\b(.*)", r"items\1l", result.name))


def write_log(log: EvalLog) -> None:
    """Write a log, result.json last; an earlier result of other settings is kept in earlier/."""
    items = items_file(log.file)
    key = str((object_or_none(log.file) or {}).get("key") or "")
    if key and key != log.key:
        if not _HASH.fullmatch(key):
            # of a damaged file: it may be any path
            key = text_hash(key)
        folder = log.file.parent / "earlier" / key[:12]
        folder.mkdir(parents=True, exist_ok=True)
        for file in filter(Path.is_file, (items, log.file)):
            shutil.copyfile(file, folder / file.name)
    rows: list[Row] = []
    for metric in log.metrics:
        if metric.parts:
            # its samples are those of its tasks, where they are stored
            continue
        for sample in metric.samples:
            values = _schema(Sample).dump_python(sample, exclude_defaults=True)
            rows.append({"metric": metric.metric, "task": metric.task, **values})
    write_lines(items, rows)
    write_json(log.file, to_json(log))


def to_json(log: EvalLog) -> dict[str, object]:
    """Return the content of result.json."""
    of_metrics = {"samples", "asked", "eval", "suite", "file"}
    left_out: Any = {"file": True, "metrics": {"__all__": of_metrics}}
    values = _schema(EvalLog).dump_python(log, mode="json", exclude=left_out)
    return {"format_version": RESULT_VERSION, **values}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write_bytes(path, b"".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> bytes:
    """A row as a JSON line; a lone surrogate in a text is read back as a replacement character."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def is_current(file: Path, settings: str, *fingerprints: str | None) -> bool:
    """Whether a result file is there, of a recipe's `settings_key` and of these fingerprints of the
    model, its opponent and its judge (None: of any).
    """
    stored = object_or_none(file) or {}
    if stored.get("settings") != settings:
        return False
    for wanted, side in zip(fingerprints, ("answers", "opponent", "judge"), strict=True):
        if wanted not in (None, (stored.get(side) or {}).get("fingerprint")):
            return False
    return True


def read_eval_logs(run: Path) -> tuple[tuple[EvalLog, ...], tuple[str, ...]]:
    """Return a run's finished evaluations, and the names of those that have no result."""
    logs: list[EvalLog] = []
    unfinished: list[str] = []
    for folder in sorted((run / "evals").glob("*/")):
        files = sorted(folder.glob("result*.json"), key=lambda file: (len(file.name), file.name))
        if not files and any(folder.glob("judgments*.jsonl")):  # an opponent has answers alone
            unfinished.append(folder.name)
        logs += map(read_eval_log, files)
    return tuple(logs), tuple(unfinished)


def read_eval_log(file: Path) -> EvalLog:
    """Return the log of a result file with its samples; a DataError where these do not agree."""
    row = read_object(file)
    if row.pop("format_version", None) != RESULT_VERSION:
        raise DataError("was written by another version of this project", _AGAIN, file=file)
    name = file.parent.name
    items = items_file(file)
    log: EvalLog = _validated(EvalLog, {**row, "eval": name, "file": file}, file)
    if not items.is_file() and any(metric.n for metric in log.metrics):
        raise DataError(f"is missing, though {file.name} beside it is there", _AGAIN, file=items)
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for number, item in enumerate(read_rows(items), 1):
        key = str(item.pop("metric", "")), str(item.pop("task", ""))
        sample: Sample = _validated(Sample, item, items, number)
        problem = _impossible(sample)
        if problem:
            raise DataError(f"is damaged: {problem}", _AGAIN, file=items, line=number)
        samples[key].append(sample)
    metrics = []
    for metric in log.metrics:
        stored = tuple(samples[metric.metric, metric.task])
        metric = replace(metric, samples=stored, eval=name, suite=log.suite, file=file)
        _check_samples(metric)
        metrics.append(metric)
    return replace(log, metrics=tuple(with_groups(metrics)))


def _validated(kind: Any, row: Row, file: Path, line: int | None = None) -> Any:
    try:
        return _schema(kind).validate_python(row)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        what = f"is damaged: {'.'.join(map(str, details['loc']))}: {details['msg']}"
        raise DataError(what, _AGAIN, file=file, line=line) from None


def _impossible(sample: Sample) -> str:
    """Return what of a sample cannot be, empty for a sound one."""
    value = sample.value
    outcome = sample.outcome
    if value is not None and not math.isfinite(value):
        return f"the value {value} is no number"
    if outcome in SCORE and value != SCORE[outcome]:
        return f"outcome '{outcome}' does not go with the value {value}"
    if outcome == UNRESOLVED and value is not None:
        return f"an unresolved sample has the value {value}"
    if outcome not in OUTCOMES:
        return f"outcome '{outcome}' is none of {', '.join(OUTCOMES)}"
    return ""


def _check_samples(metric: Metric) -> None:
    """Refuse a metric whose samples are not those that its value was computed from."""
    if not metric.samples and (metric.unit == "number" or metric.parts):
        return
    values = [sample.value for sample in metric.samples if sample.value is not None]
    if metric.unit == "grade" and not all(1 <= value <= 5 for value in values):
        what = f"{metric.metric}: a grade is not from 1 to 5"
        raise DataError(what, _AGAIN, file=items_file(metric.file))
    mean = math.fsum(values) / len(values) if values else metric.value
    # lm-eval's numbers are not always the mean of their samples
    is_mean = metric.unit == "number" or abs((mean or 0.0) - (metric.value or 0.0)) <= 1e-6
    is_once = len({sample.key for sample in metric.samples}) == len(metric.samples)
    if not (is_mean and is_once and len(values) == metric.n):
        stored = f"{len(values)} are stored (mean {mean}), or one is stored twice"
        what = f"the result is of {metric.n} samples, {stored}"
        raise DataError(f"{metric.task or metric.metric}: {what}", _AGAIN, file=metric.file)


def with_groups(metrics: Sequence[Metric]) -> Iterator[Metric]:
    """Yield metrics; a group of lm-eval with the samples of its tasks where the mean of all items
    is the value that lm-eval reported.
    """
    for group in metrics:
        samples = []
        asked = 0
        for task in metrics:
            if task.task in group.parts and task.metric == group.metric and not task.parts:
                asked += task.asked
                samples += [replace(item, id=f"{task.task}/{item.id}") for item in task.samples]
        mean = math.fsum(sample.value or 0.0 for sample in samples) / max(len(samples), 1)
        if samples and group.value is not None and abs(mean - group.value) <= 1e-6:
            yield replace(group, samples=tuple(samples), asked=asked)
        else:
            yield group


# ---- answers and judgments as they arrive ----


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text, lone surrogates allowed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class StoredRow(BaseModel):
    """What every line of a store has; a row may hold more."""

    model_config = ConfigDict(strict=True)
    key: str


class AnswerRow(StoredRow):
    """A line of generations.jsonl."""

    question_id: str
    turn: int = Field(ge=1)
    answer: str
    finish_reason: str


class JudgmentRow(StoredRow):
    """A line of judgments.jsonl."""

    question_id: str  # of the item, and of a probe its own
    question: str
    order: Literal["single", "AB", "BA"]
    probe: str
    judge: str
    source: Literal["rule", "judge", "limit"]
    cut: bool
    status: Literal["ok", "truncated", "empty", "unparsed", "refused"]
    value: Literal["A", "B", "tie", 1, 2, 3, 4, 5] | None
    raw: str | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _has_the_value_of_its_order(self) -> Self:
        if (self.status == "ok") != (self.value is not None):
            raise ValueError(f"status '{self.status}' does not go with the value {self.value}")
        is_grade = isinstance(self.value, int)
        if self.value is not None and is_grade != (self.order == "single"):
            raise ValueError(f"order '{self.order}' does not go with the value {self.value}")
        return self


# At the end of a stored line, of all before it: a changed letter is a verdict too.
_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"}\Z')


class Store(dict[str, Row]):
    """The rows of a JSON-lines file that is appended to and never changed, by their `key`, a hash
    of everything that makes them. A kill leaves at most a last line without its end, which the next
    append cuts. Whoever appends holds the folder (`run_lock`).

    Args:
        shape: what each row must have. A row is refused too if its checksum is not that of the
            row; rows of earlier versions have none.
    """

    def __init__(self, path: str | Path, shape: type[StoredRow] = StoredRow) -> None:
        super().__init__()
        self.path = Path(path)
        self._size = 0  # of the whole lines
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            row = parsed_line(line) or {}
            row.pop("crc32", None)
            problem = self._problem(row, shape)
            end = _CHECKSUM.search(line)
            if not problem and end and int(end[1], 16) != zlib.crc32(line[: end.start()] + b"}"):
                problem = "it was changed after it was written"
            if problem:
                what = f"this line is damaged: {problem}"
                remedy = "restore the file, or delete this line to have it made again"
                raise DataError(what, remedy, file=self.path, line=number)
            self[row["key"]] = row
            self._size += len(line) + 1

    def _problem(self, row: Row, shape: type[StoredRow]) -> str:
        """Return why an object is no row of this store, empty for a sound one."""
        if not isinstance(row.get("key"), str):
            return "not a stored row"
        if row["key"] in self:
            return "a duplicate of an earlier one"
        try:
            shape.model_validate(row)
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            name = ".".join(map(str, details["loc"][:1])) or "row"
            return f"{name}: {details['msg']}"
        return ""

    def append(self, rows: Iterable[Row]) -> None:
        """Append the rows with new keys: then all are on disk, or on an error none."""
        new = {row["key"]: row for row in rows if row["key"] not in self}
        if not new:
            return
        lines = []
        for row in new.values():
            line = _line(row).removesuffix(b"\n")
            lines.append(line[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(line))
        content = b"".join(lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.truncate(self._size)
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, "the disk is full")
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(self._size)
                what = f"rows could not be stored: {error.strerror}"
                hint = "free some disk and run the same command"
                raise EnvironmentFault(what, hint, file=self.path) from None
        if not self._size:
            sync(self.path.parent)
        self._size += len(content)
        self.update(new)
