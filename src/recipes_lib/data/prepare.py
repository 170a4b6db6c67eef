"""From a recipe and a tokenizer to data sets that TRL trains on as they are, with their audit. What
was prepared is kept under `.cache/rows`; a resume, an evaluation and the other ranks read it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import file_hash, hash_of, publish, write_json
from recipes_lib.core.project import cache_root, shown_path
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.data.audit import DataAudit
from recipes_lib.data.prompts import (
    chat_template,
    format_hash,
    training_template,
    unread_argument,
)
from recipes_lib.data.rows import BadRow, BadRows, DataRow, SettingError, place
from recipes_lib.data.sources import hub_data_set, is_on_hub, listed_sources, source_files
from recipes_lib.data.splits import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Rows,
    fingerprint_of,
    first_in_hash_order,
    read_data,
    select_rows,
    split_rows,
)
from recipes_lib.data.supervision import BATCH_ROWS, Encoded, Supervision, encode

if TYPE_CHECKING:
    from datasets import Dataset

_RECORD = "prepared.json"


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
    data, scratch = _prepare(recipe, settings, tokenizer, key), folder.with_name(f".{key}.tmp")
    names = ("splits", "fingerprint", "prompt_format_hash")
    record = {name: getattr(data, name) for name in names} | {"audit": vars(data.audit)}
    parts = {name: rows for name in SPLITS if (rows := getattr(data, name)) is not None}
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        disable_progress_bars()
        DatasetDict(parts).save_to_disk(scratch)
        write_json(scratch / _RECORD, record)
        publish(scratch, folder)
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

    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        parts: dict[str, Any] = dict.fromkeys(SPLITS) | dict(load_from_disk(str(folder)))
        audit = DataAudit(**record.pop("audit"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return PreparedData(**parts, **record, audit=audit)


# ---- the work ----


def _prepare(recipe: Recipe, settings: Supervision, tokenizer: Any, key: str) -> PreparedData:
    section, bad = recipe.data, BadRows()

    # files -> rows
    read = read_data(section, bad)
    if len(bad) and not read.rows:
        raise bad.error(read.num_read)
    rows, filtered = select_rows(read.rows, section)
    is_pair_loss = recipe.train.get("completion_only_loss") is True
    if is_pair_loss and any("text" in row.fields for row in rows):
        what = "train.completion_only_loss: true needs prompt and completion"
        hint = "remove the key (loss on the whole text)"
        raise SettingError("train.completion_only_loss", f"{what}; the rows are texts", hint)

    # rows -> tokens
    template, training = None, training_template(section, tokenizer)
    if section.prompt_format == "chat":
        template = training[1] if training else chat_template(section, tokenizer)
        if reason := unread_argument(section.chat_template_kwargs, template):
            raise SettingError("data.chat_template_kwargs", f"data.{reason.what}", *reason.hints)
    encoded: dict[str, Encoded] = {}
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        items = encode(batch, settings, tokenizer, template)
        for row, item in zip(batch, items, strict=True):
            if isinstance(item, BadRow):
                bad.add(row, item)
            else:
                encoded[row.id] = item
    if len(bad) and (section.on_bad_row == "error" or not encoded):
        raise bad.error(read.num_read)
    if (limit := section.filters.max_tokens) is not None:
        fitting = {id: item for id, item in encoded.items() if item.tokens_before <= limit}
        filtered["max_tokens"] = len(encoded) - len(fitting)
        if not fitting:
            what = f"0 rows: all {len(encoded)} rows are longer than {limit} tokens"
            raise SettingError("data.filters.max_tokens", what)
        encoded = fitting
    rows = [row for row in rows if row.id in encoded]

    # tokens -> splits -> data sets
    parts = split_rows(rows, section.split)
    parts[TRAIN] = _repeated(parts[TRAIN], read, section.split.seed)
    with_loss = {
        name: [row for row in part if encoded[row.id].supervised] for name, part in parts.items()
    }
    audit = DataAudit.of(settings, rows, [encoded[row.id] for row in rows], tokenizer)
    audit.rows |= {"read": read.num_read, "bad": len(bad), "filtered": filtered}
    audit.rows |= {name: len(part) for name, part in parts.items()}
    audit.rows |= {"trained": len(with_loss[TRAIN]), "validated": len(with_loss[VALIDATION])}
    audit.bad_rows, audit.unused_columns = bad.places_by_reason(), read.unused
    for number, (source, num_rows) in enumerate(read.sources):
        counts = {"used": sum(row.source == number for row in rows)}
        counts |= {name: sum(row.source == number for row in part) for name, part in parts.items()}
        name = shown_path(Path(source.source))
        audit.sources.append({"source": name, "weight": source.weight, "rows": num_rows} | counts)
    if training is not None:
        digest = hashlib.sha256(training[1].encode()).hexdigest()
        audit.training_template = {"file": training[0], "sha256": digest}
    audit.describe(settings)
    audit.check(settings, evaluates=recipe.train.get("eval_strategy", "no") != "no")
    splits: dict[str, Any] = {
        "method": section.split.method,
        "seed": section.split.seed,
        "fractions": {"validation": section.split.validation, "test": section.split.test},
    }
    for name, part in parts.items():
        ids = [row.id for row in part]
        without = [id for id in ids if not encoded[id].supervised]
        splits[name] = {"count": len(ids), "ids": ids, "without_supervision": without}
    return PreparedData(
        **{name: _data_set(part, encoded, key + name) for name, part in with_loss.items()},
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
        if source.weight > 1:
            whole, part = divmod(source.weight, 1)
            own = [row for row in rows if row.source == number]
            times |= {row.id: int(whole) for row in own}
            for row in first_in_hash_order(own, round(part * len(own)), seed):
                times[row.id] += 1
    return [row for row in rows for _ in range(times.get(row.id, 1))]


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
