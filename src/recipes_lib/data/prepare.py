"""From a recipe and a tokenizer to data sets that TRL trains on as they are, with the audit of
supervision.json. What was prepared is kept under `.cache/rows`, so that a resume, an evaluation and
the other ranks read it instead of making it again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import file_hash, publish, write_json
from recipes_lib.core.project import cache_root, shown_path
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.data.audit import DataAudit, SourceCounts
from recipes_lib.data.prompts import (
    chat_template,
    check_template_kwargs,
    format_hash,
    training_template,
)
from recipes_lib.data.rows import BadRow, BadRows, DataRow, SettingError, place
from recipes_lib.data.sources import hub_data_set, is_on_hub, listed_sources, source_files
from recipes_lib.data.splits import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Rows,
    fingerprint_of,
    read_data,
    select_rows,
    split_rows,
)
from recipes_lib.data.supervision import (
    BATCH_ROWS,
    Encoded,
    Supervision,
    check_settings,
    encode,
    render_turns,
)

if TYPE_CHECKING:
    from datasets import Dataset

MOST_PREPARED = 12  # prepared data sets in the cache
_RECORD = "prepared.json"
# The keys of `train` that decide what is prepared.
_TRAIN_KEYS = (
    *("max_length", "truncation_mode", "eos_token", "packing", "packing_strategy"),
    *("completion_only_loss", "assistant_only_loss", "eval_strategy"),
)


@dataclass(frozen=True)
class PreparedData:
    """What training needs and what the run directory records.

    The data sets have the columns `input_ids`, `labels` (-100 where there is no loss) and
    `example_id`. They are truncated, and rows without supervised tokens are dropped.

    Args:
        audit: supervision.json, where all dropped rows are named.
        splits: content of splits.json.
        fingerprint: `splits.fingerprint_of`.
        prompt_format_hash: `prompts.format_hash`.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    audit: DataAudit
    splits: dict[str, Any]
    fingerprint: str
    prompt_format_hash: str


def prepare_data(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Read, split, tokenise and audit the data of a recipe; every rank has to call.

    Raises:
        DataError: rows, files, columns or settings that cannot be used; with file and line.
    """
    try:
        folder = on_main_rank(lambda: _prepared_folder(recipe, tokenizer))
        return _read(folder) or _prepare(recipe, tokenizer, folder.name)
    except DataError as error:
        raise place(recipe, error) from error.__cause__


# ---- the cache ----


def _prepared_folder(recipe: Recipe, tokenizer: Any) -> Path:
    """Return the folder of the prepared data, made now where it is not there; nothing is in it
    where it cannot be written.
    """
    key = _key(recipe, tokenizer)
    folder = cache_root() / "rows" / key
    if (folder / _RECORD).is_file():
        folder.touch()
        return folder
    data = _prepare(recipe, tokenizer, key)
    scratch = folder.with_name(f".{key}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write(data, scratch)
        publish(scratch, folder)
        prepared = [path for path in folder.parent.iterdir() if (path / _RECORD).is_file()]
        for path in sorted(prepared, key=lambda path: path.stat().st_mtime)[:-MOST_PREPARED]:
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _key(recipe: Recipe, tokenizer: Any) -> str:
    """Return a hash of all that decides what is prepared: rows, settings, tokenizer, our code."""
    import tokenizers
    import transformers

    check_settings(recipe.data, recipe.train, tokenizer)
    sources = listed_sources(recipe.data)
    local = [source for source in sources if not is_on_hub(source)]
    files = [file for source in local for file in source_files(source)]
    code = sorted(Path(__file__).parent.glob("*.py"))
    parts: list[Any] = [
        recipe.data.model_dump(warnings=False),
        {name: recipe.train.get(name) for name in _TRAIN_KEYS},
        [tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()],
        [tokenizers.__version__, transformers.__version__],
        [[str(file), file_hash(file)] for file in (*files, *code)],
        [hub_data_set(source)._fingerprint for source in sources if source not in local],
    ]
    if recipe.data.prompt_format == "chat":
        parts.append(chat_template(recipe.data, tokenizer))
        parts.append(training_template(recipe.data, tokenizer))
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _write(data: PreparedData, folder: Path) -> None:
    import pyarrow

    for name in SPLITS:
        if (rows := getattr(data, name)) is not None:
            table = rows.with_format("arrow")[:]
            with pyarrow.ipc.new_stream(folder / f"{name}.arrow", table.schema) as stream:
                stream.write_table(table)
    names = ("splits", "fingerprint", "prompt_format_hash")
    record = {name: getattr(data, name) for name in names}
    write_json(folder / _RECORD, {"audit": data.audit.to_dict(), **record})


def _read(folder: Path) -> PreparedData | None:
    """Return what `_write` wrote; None on a machine that does not see the folder."""
    from datasets import Dataset

    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        files = {name: folder / f"{name}.arrow" for name in SPLITS}
        parts: dict[str, Any] = {
            name: Dataset.from_file(str(file)) if file.is_file() else None
            for name, file in files.items()
        }
        audit = DataAudit.from_dict(record.pop("audit"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return PreparedData(**parts, **record, audit=audit)


# ---- the work ----


def _prepare(recipe: Recipe, tokenizer: Any, key: str) -> PreparedData:
    section, bad = recipe.data, BadRows()

    # files -> rows
    rows = read_data(section, bad)
    template, training = None, training_template(section, tokenizer)
    if section.prompt_format == "chat":
        template = training[1] if training else chat_template(section, tokenizer)
        try:
            check_template_kwargs(section.chat_template_kwargs, template)
        except BadRow as reason:
            key = "data.chat_template_kwargs"
            raise SettingError(key, f"data.{reason.what}", reason.hint) from None
    if len(bad) and section.on_bad_row == "error":
        for row in rows.rows if template else ():  # name those too that the template refuses
            chat = render_turns(row, section, tokenizer, template or "")
            if isinstance(chat, BadRow):
                bad.add(row, chat)
        raise bad.error(rows.num_read)
    rows, filtered = select_rows(rows, section, bad)

    # rows -> tokens
    check_settings(section, recipe.train, tokenizer, any("text" in row.fields for row in rows.rows))
    settings = Supervision.of(section, recipe.train, tokenizer)
    usable: list[int] = []
    encoded: list[Encoded] = []
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows.rows[start : start + BATCH_ROWS]
        for index, item in enumerate(encode(batch, settings, tokenizer, template), start):
            if isinstance(item, BadRow):
                bad.add(rows.rows[index], item)
            else:
                usable.append(index)
                encoded.append(item)
    rows = rows.take(usable)
    if len(bad) and (section.on_bad_row == "error" or not encoded):
        raise bad.error(rows.num_read)
    if (limit := section.filters.max_tokens) is not None:
        fitting = [i for i, item in enumerate(encoded) if item.tokens_before <= limit]
        filtered["max_tokens"] = len(rows) - len(fitting)
        if not fitting:
            what = f"0 rows: all {len(rows)} rows are longer than {limit} tokens"
            raise SettingError("data.filters.max_tokens", what)
        rows, encoded = rows.take(fitting), [encoded[i] for i in fitting]

    # tokens -> splits -> data sets
    parts = split_rows(rows.rows, section.split)
    parts[TRAIN] = rows.repeated(parts[TRAIN], section.split.seed)
    audit = DataAudit.of(settings)
    audit.count(rows.rows, encoded, tokenizer)
    _count_parts(audit, rows, encoded, parts)
    audit.rows |= {"filtered": filtered, "bad": len(bad)}
    audit.bad_rows, audit.unused_columns = bad.record(), rows.unused
    if training is not None:
        digest = hashlib.sha256(training[1].encode()).hexdigest()
        audit.training_template = {"file": training[0], "sha256": digest}
    evaluates = recipe.train.get("eval_strategy", "no") != "no"
    audit.check(section.max_unsupervised_fraction, evaluates=evaluates)
    sets = {
        name: _dataset(
            [(rows.rows[i], encoded[i]) for i in indices if encoded[i].supervised], key + name
        )
        for name, indices in parts.items()
    }
    bare = {*audit.no_supervised_tokens.ids}
    splits: dict[str, Any] = {"method": section.split.method, "seed": section.split.seed}
    splits["fractions"] = {"validation": section.split.validation, "test": section.split.test}
    for name, indices in parts.items():
        ids = [rows.rows[index].id for index in indices]
        without = [id for id in ids if id in bare]
        splits[name] = {"count": len(ids), "ids": ids, "without_supervision": without}
    return PreparedData(
        **sets,
        audit=audit,
        splits=splits,
        fingerprint=fingerprint_of(
            {name: [rows.rows[index] for index in indices] for name, indices in parts.items()}
        ),
        prompt_format_hash=format_hash(section, tokenizer, eos_token=settings.eos_token),
    )


def _count_parts(
    audit: DataAudit, rows: Rows, encoded: Sequence[Encoded], parts: Mapping[str, Sequence[int]]
) -> None:
    """Count the rows of each split and source."""
    with_loss = {name: sum(encoded[i].supervised > 0 for i in part) for name, part in parts.items()}
    audit.rows = {"read": rows.num_read, "used": len(rows)}
    audit.rows |= {name: len(indices) for name, indices in parts.items()}
    audit.rows |= {"trained": with_loss[TRAIN], "validated": with_loss[VALIDATION]}
    audit.duplicates = len(rows) - len({row.content for row in rows.rows})
    for number, (source, num_rows) in enumerate(rows.sources):
        own = {n: [i for i in p if rows.rows[i].source == number] for n, p in parts.items()}
        counts = SourceCounts(
            source=shown_path(Path(source.source)),
            weight=source.weight,
            rows=num_rows,
            used=sum(row.source == number for row in rows.rows),
            **{name: len(indices) for name, indices in own.items()},
            supervised=sum(encoded[i].supervised for i in own[TRAIN]),
        )
        audit.sources.append(counts)


def _dataset(items: Sequence[tuple[DataRow, Encoded]], fingerprint: str) -> Dataset | None:
    """Return tokenised rows as a data set, or None for no rows. Without a fingerprint, `datasets`
    would pickle the table, in three times its memory.
    """
    import datasets
    import numpy as np
    import pyarrow

    if not items:
        return None
    ends = pyarrow.array(np.cumsum([0, *(item.length for _, item in items)], dtype=np.int32))

    def tokens(arrays: list[np.ndarray]) -> pyarrow.ListArray:
        return pyarrow.ListArray.from_arrays(ends, pyarrow.array(np.concatenate(arrays)))

    columns = {
        "input_ids": tokens([item.ids for _, item in items]),
        "labels": tokens([item.labels for _, item in items]),
        "example_id": pyarrow.array([row.id for row, _ in items], pyarrow.string()),
    }
    return datasets.Dataset(pyarrow.table(columns), fingerprint=fingerprint)
