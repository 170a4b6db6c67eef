"""From a recipe and a tokenizer to data sets that TRL trains on as they are, with their audit: what
would happen silently is counted, and its rows are named.

What was prepared is kept under `.cache/rows`; a resume, an evaluation and the other ranks read it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import file_hash, hash_of, publish, read_object, write_json
from recipes_lib.core.project import cache_root, shown_path
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.data.prompts import chat_template, format_hash, training_template, unread_argument
from recipes_lib.data.rows import NUM_LISTED, BadRow, BadRows, DataRow, SettingError, listed, place
from recipes_lib.data.sources import (
    SPLITS,
    TRAIN,
    Rows,
    fingerprint_of,
    first_in_hash_order,
    hub_data_set,
    is_on_hub,
    listed_sources,
    read_data,
    source_files,
    split_rows,
)
from recipes_lib.data.supervision import Encoded, Supervision, encode, special_ids

if TYPE_CHECKING:
    from datasets import Dataset

NUM_CACHED = 20
MOST_UNSUPERVISED = 0.05  # of the rows
_RECORD = "prepared.json"


@dataclass
class DataAudit:
    """supervision.json."""

    prompt_format: str
    loss_on: str
    rows: dict[str, Any] = field(default_factory=dict)  # read, bad, filtered, used; of each split
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)  # total, p5, ... of a row
    places: dict[str, list[str]] = field(default_factory=dict)  # of rows of which something is true
    end_tokens: dict[str, int] = field(default_factory=dict)  # how many rows end with each
    bad_rows: dict[str, list[str]] = field(default_factory=dict)  # why rows were left out
    unused_columns: dict[str, list[str]] = field(default_factory=dict)  # by file
    sources: list[str] = field(default_factory=list)  # the rows that each has and gives
    training_template: dict[str, str] | None = None  # file and hash of TRL's
    notes: list[str] = field(default_factory=list)  # how conversations are rendered
    warnings: list[str] = field(default_factory=list)  # what the user should know before training


@dataclass(frozen=True)
class PreparedData:
    """What training needs and what the run directory records.

    The data sets have the columns `input_ids`, `labels` (-100 where there is no loss) and
    `example_id`. They are truncated, and rows without supervised tokens are dropped.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    audit: DataAudit  # supervision.json, where all dropped rows are named
    splits: dict[str, Any]  # splits.json
    fingerprint: str  # `splits.fingerprint_of`
    prompt_format_hash: str


def prepare_data(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Read, split, tokenise and audit the data of a recipe; every rank has to call."""
    try:
        settings = Supervision.of(recipe.data, recipe.train, tokenizer)
        folder = on_main_rank(lambda: _prepared_folder(recipe, settings, tokenizer))
        return _read(folder) or _prepare(recipe, settings, tokenizer, folder.name)
    except DataError as error:
        raise place(recipe, error) from error.__cause__


# ---- the cache ----


def _prepared_folder(recipe: Recipe, settings: Supervision, tokenizer: Any) -> Path:
    """Return the folder of the prepared data; it is empty where it cannot be written."""
    from datasets import DatasetDict, disable_progress_bars

    key = _key(recipe, settings, tokenizer)
    folder = cache_root() / "rows" / key
    if (folder / _RECORD).is_file():
        return folder
    data = _prepare(recipe, settings, tokenizer, key)
    scratch = folder.with_name(f".{os.urandom(8).hex()}.tmp")  # arms of an array start at once
    names = ("splits", "fingerprint", "prompt_format_hash")
    record = {name: getattr(data, name) for name in names} | {"audit": asdict(data.audit)}
    parts = {name: rows for name in SPLITS if (rows := getattr(data, name)) is not None}
    try:
        disable_progress_bars()
        DatasetDict(parts).save_to_disk(scratch)
        write_json(scratch / _RECORD, record)
        publish(scratch, folder, replace=False)
        for old in sorted(folder.parent.iterdir(), key=os.path.getmtime)[:-NUM_CACHED]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _key(recipe: Recipe, settings: Supervision, tokenizer: Any) -> str:
    """Return a hash of all that decides what is prepared: rows, settings, tokenizer, our code."""
    import tokenizers
    import transformers

    section, train = recipe.data, recipe.train
    sources = listed_sources(section)
    local = [source for source in sources if not is_on_hub(source)]
    files = [file for source in local for file in source_files(source)]
    files += sorted(Path(__file__).parent.glob("*.py"))
    parts: list[Any] = [
        [str(settings), train.get("completion_only_loss"), train.get("eval_strategy")],
        [tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()],
        [tokenizers.__version__, transformers.__version__],
        [[str(file), file_hash(file)] for file in files],
        [hub_data_set(source)._fingerprint for source in sources if source not in local],
    ]
    if section.prompt_format == "chat":
        parts += [chat_template(section, tokenizer), training_template(section, tokenizer)]
    return hash_of(parts)[:32]


def _read(folder: Path) -> PreparedData | None:
    """Return what `_prepared_folder` kept; None on a machine that does not see the folder."""
    from datasets import load_from_disk

    record = read_object(folder / _RECORD, remedy=f"delete {folder}")
    if not record:
        return None
    parts: dict[str, Any] = dict.fromkeys(SPLITS) | dict(load_from_disk(str(folder)))
    return PreparedData(audit=DataAudit(**record.pop("audit")), **parts, **record)


# ---- the work ----


def _prepare(recipe: Recipe, settings: Supervision, tokenizer: Any, key: str) -> PreparedData:
    section, bad = recipe.data, BadRows()

    # files -> rows
    read = read_data(section, bad)
    rows = first_in_hash_order(read.rows, section.max_examples, section.split.seed)
    is_text = any("text" in row.fields for row in rows)
    if is_text and recipe.train.get("completion_only_loss") is True:
        what = "train.completion_only_loss: true needs prompt and completion, not texts"
        raise SettingError("train.completion_only_loss", what, "remove it: all of a text has loss")

    # rows -> tokens
    template, training = None, training_template(section, tokenizer)  # TRL's: its file, its text
    if section.prompt_format == "chat":
        template = training[1] if training else chat_template(section, tokenizer)
        if reason := unread_argument(section.chat_template_kwargs, template):
            raise SettingError("data.chat_template_kwargs", f"data.{reason.what}", *reason.hints)
    encoded: dict[str, Encoded] = {}
    for row in rows:
        try:
            encoded[row.id] = encode(row, settings, tokenizer, template)
        except BadRow as reason:
            bad.add(row, reason)
    if len(bad) and (section.on_bad_row == "error" or not encoded):
        raise bad.error(read.num_read)
    limit, filtered = section.filters.max_tokens, {}
    if limit is not None:
        fitting = {id: item for id, item in encoded.items() if item.tokens_before <= limit}
        if not fitting:
            what = f"0 rows: all {len(encoded)} rows are longer than {limit} tokens"
            raise SettingError("data.filters.max_tokens", what)
        filtered, encoded = {"max_tokens": len(encoded) - len(fitting)}, fitting
    rows = [row for row in rows if row.id in encoded]

    # tokens -> splits -> data sets
    parts = split_rows(rows, section.split)
    for name in SPLITS:
        parts[name] = [row for row in parts[name] if encoded[row.id].supervised]
    parts[TRAIN] = _repeated(parts[TRAIN], read, section.split.seed)
    counts = {"read": read.num_read, "bad": len(bad), "filtered": filtered, "used": len(rows)}
    audit = _audit(rows, encoded, settings, tokenizer, training)
    audit.rows = counts | {name: len(part) for name, part in parts.items()}
    audit.bad_rows, audit.unused_columns = bad.places_by_reason(), read.unused
    for number, (source, num_rows) in enumerate(read.sources):
        used, trained = (sum(row.source == number for row in part) for part in (rows, parts[TRAIN]))
        name = f"{shown_path(Path(source.source))} (weight {source.weight:g})"
        audit.sources.append(f"{name}: {num_rows:,} rows, {used:,} used, {trained:,} train")
    _judge(audit, settings, evaluates=recipe.train.get("eval_strategy", "no") != "no")
    splits: dict[str, Any] = {"method": section.split.method}
    for name, part in parts.items():
        splits[name] = {"count": len(part), "ids": [row.id for row in part]}
    return PreparedData(
        **{name: _data_set(part, encoded, key + name) for name, part in parts.items()},
        audit=audit,
        splits=splits,
        fingerprint=fingerprint_of(parts),
        prompt_format_hash=format_hash(section, tokenizer, eos_token=settings.eos_token),
    )


def _repeated(rows: Sequence[DataRow], read: Rows, seed: int) -> list[DataRow]:
    """Return training rows as often as the weights of their sources say: whole times all of them,
    and the first in hash order once more.
    """
    times: dict[str, int] = {}
    for number, (source, _) in enumerate(read.sources):
        whole, part = divmod(max(source.weight, 1), 1)
        own = [row for row in rows if row.source == number]
        times |= {row.id: int(whole) for row in own}
        for row in first_in_hash_order(own, round(part * len(own)), seed):
            times[row.id] += 1
    return [row for row in rows for _ in range(times[row.id])]


def _data_set(rows: Sequence[DataRow], encoded: dict[str, Encoded], name: str) -> Dataset | None:
    """Return tokenised rows as a data set, or None for no rows."""
    import datasets
    import pyarrow

    if not rows:
        return None
    columns = {
        "input_ids": [encoded[row.id].ids for row in rows],
        "labels": [encoded[row.id].labels for row in rows],
        "example_id": [row.id for row in rows],
    }
    # without a fingerprint, `datasets` would pickle the table, in three times its memory
    return datasets.Dataset(pyarrow.table(columns), fingerprint=name)


# ---- the audit ----


def _audit(
    rows: list[DataRow],
    encoded: dict[str, Encoded],
    settings: Supervision,
    tokenizer: Any,
    training: tuple[str, str] | None,
) -> DataAudit:
    """Return what the rows that are used, and their tokens, show."""
    loss_on = "whole text" if settings.whole else "completion"
    audit = DataAudit(settings.section.prompt_format, loss_on)
    special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    texts = re.compile("|".join(re.escape(name) for name in special if len(name) > 1) or "(?!)")
    seen = set[bytes]()
    for row in rows:
        item = encoded[row.id]
        was_cut, has_end = len(item.ids) < item.tokens_before, item.end_token >= 0
        for name, is_true in {
            "truncated": was_cut,
            "lost_end": was_cut and not has_end,
            "no_supervised_tokens": not item.supervised,
            "without_end_token": not was_cut and not has_end,
            "empty_completions": row.is_empty,
            "changed_by_template": item.changed,
            "other_prompt": item.other_prompt,
            "special_tokens": any(map(texts.search, row.texts)),
            "duplicates": row.content in seen,
        }.items():
            audit.places.setdefault(name, []).extend([row.place] if is_true else [])
        seen.add(row.content)
    items = [encoded[row.id] for row in rows]
    ends = Counter(item.end_token for item in items if item.end_token >= 0)
    audit.end_tokens = {tokenizer.convert_ids_to_tokens(end): ends[end] for end in ends}
    for title, lengths in (
        ("prompt", [item.prompt_tokens for item in items]),
        ("row, as trained", [len(item.ids) for item in items]),
        ("with loss", [item.supervised for item in items]),
    ):
        p5, p50, p95 = map(int, np.percentile(lengths, (5, 50, 95), method="nearest"))
        counts = {"total": sum(lengths), "p5": p5, "p50": p50, "p95": p95, "max": max(lengths)}
        audit.tokens[title] = counts
    if training is not None:
        digest = hashlib.sha256(training[1].encode()).hexdigest()
        audit.training_template = {"file": training[0], "sha256": digest}
        name = f"{training[0]} ({digest[:12]})"
        what = f"trained through TRL's {name}; the plain one is saved, and answers"
        audit.notes.append(f"chat template: {what}")
    if date := settings.section.template_date:
        what = f"prints the date, fixed to {date} for this run"
        audit.notes.append(f"chat template: {what}, in every resume, chat and evaluation")
    return audit


def _judge(audit: DataAudit, settings: Supervision, *, evaluates: bool) -> None:
    """Write the warnings, and refuse data that cannot teach what the recipe asks for."""
    used, places, warnings = audit.rows["used"], audit.places, audit.warnings
    if bad := audit.rows["bad"]:
        what = f"{bad} of {audit.rows['read']} rows cannot be used and are left out"
        reasons = [f"{what}: {listed(rows, 3)}" for what, rows in audit.bad_rows.items()]
        warnings += [f"{what} (on_bad_row: skip):", *reasons[:NUM_LISTED]]
    for file, columns in audit.unused_columns.items():
        warnings.append(f"columns that are not used: {listed(columns)} (in {file})")
    limit, lost = f"max_length={settings.max_length}", len(places["lost_end"])
    acting = "ACTING as such" if audit.prompt_format == "chat" else "read as text"
    p95 = audit.tokens["prompt"]["p95"]
    facts = {
        "truncated": f"cut at {limit}, {lost} of them lose their end",
        "no_supervised_tokens": f"no supervised token at {limit}; p95 prompt is {p95}",
        "empty_completions": "an empty completion, which teaches the end token alone",
        "without_end_token": "no supervised end token, so the model would not learn to stop",
        "changed_by_template": "the chat template changes or drops text",
        "other_prompt": "not as the model is asked: the prompt ends in a space, or the template"
        " begins a thought (data.chat_template_kwargs: {enable_thinking: ...})",
        "special_tokens": f"special tokens in the text, {acting}",
        "duplicates": "exact duplicates",
    }
    for name, what in facts.items():
        if rows := places[name]:
            warnings.append(f"{len(rows)} of {used} rows: {what}: {listed(rows, 3)}")
    if audit.end_tokens and settings.eos_token not in audit.end_tokens:
        what = f"turns end with {listed(audit.end_tokens, 3)}, but generation stops at"
        warnings.append(f"{what} {settings.eos_token}: set train.eos_token to the turn's end")
    longer = "raise train.max_length above that, or set data.filters.max_tokens"
    end = "end each assistant turn with a special token, inside any {% generation %} block"
    for name, most, key, hint in (
        ("empty_completions", used - 1, "data.source", "check data.columns"),
        ("no_supervised_tokens", MOST_UNSUPERVISED * used, "train.max_length", longer),
        ("without_end_token", 0, "data.chat_template", end),
    ):
        if len(rows := places[name]) > most:
            what = f"{len(rows)}/{used} rows: {facts[name]}"
            raise SettingError(key, what, listed(rows, 3), f"at most {most:.0f} rows; {hint}")
    if evaluates and not audit.rows["validation"]:
        what = f"none of {used} rows is held out for the validation of train.eval_strategy"
        hint = "add rows, raise data.split.validation, or set train.eval_strategy: 'no'"
        raise SettingError("data.split.validation", what, hint)
