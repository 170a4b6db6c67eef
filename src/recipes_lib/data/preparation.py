"""From a recipe and a tokenizer to data sets that TRL trains on as they are, with the audit of
supervision.json. Deterministic, cheap enough to run on every rank, and nothing is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.core.ranks import say_once
from recipes_lib.data.audit import DataAudit, Injections, audit_rows, check_audit
from recipes_lib.data.columns import check_dropped_are_there
from recipes_lib.data.conversations import conversation_of, turn_counts
from recipes_lib.data.examples import BadRow, BadRows, Example, SettingError, place
from recipes_lib.data.prompts import (
    Twin,
    chat_template,
    check_template_kwargs,
    format_hash,
    twin_of,
)
from recipes_lib.data.rows import Rows, filter_rows, first_in_hash_order, read_data
from recipes_lib.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    SplitPart,
    SplitRecord,
    Splits,
    fingerprint_of,
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
    import pyarrow
    from datasets import Dataset


NUM_ROWS_WORTH_A_LINE = 20_000
# Numbers that are kept of each tokenised example; see `Encoded`, and `turn_counts` for the rest.
_KEPT = (
    *("length", "supervised", "tokens_before", "prompt_tokens"),
    *("ends", "boundary_merge", "changed", "unlike_prompt", "end_token"),
)
_COUNTED = ("turns", "tool_calls", "thoughts")
TOKEN_NUMBERS = np.dtype([(name, np.int32) for name in (*_KEPT, *_COUNTED)])


@dataclass(frozen=True)
class PreparedData:
    """What training needs and what the run directory records.

    The data sets have the columns `input_ids`, `labels` (-100 where there is no loss) and
    `example_id`. They are truncated, and rows without supervised tokens are dropped.

    Args:
        audit: content of supervision.json, where all dropped rows are named.
        splits: content of splits.json.
        fingerprint: `splits.fingerprint_of`.
        prompt_format_hash: `prompts.format_hash`.
        twin: what the conversations were rendered with in place of the tokenizer's chat template.
        rows: all rows used, in file order.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    audit: DataAudit
    splits: SplitRecord
    fingerprint: str
    prompt_format_hash: str
    twin: Twin | None = None
    rows: Rows = field(default_factory=Rows)


def prepare_data(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Read, split, tokenise and audit the data of a recipe.

    Raises:
        DataError: rows, files, columns or settings that cannot be used; with file and line.
    """
    try:
        return _prepare(recipe, tokenizer)
    except DataError as error:
        raise place(recipe, error) from error.__cause__


def _prepare(recipe: Recipe, tokenizer: Any) -> PreparedData:
    section, bad = recipe.data, BadRows()
    rows = read_data(section, bad)
    columns = dict.fromkeys(name for table, _, _ in rows.tables for name in table.columns)
    check_dropped_are_there(section.drop_columns, list(columns))
    num_usable = len(rows)
    if bad.found and section.on_bad_row == "error":
        if section.prompt_format == "chat":  # name those too that the template alone refuses
            own, twin = chat_template(section, tokenizer), twin_of(section, tokenizer)
            for example in rows.with_texts():
                found = render_turns(example, section, tokenizer, own, twin)
                if isinstance(found, BadRow):
                    bad.add(example, found)
        raise bad.error(rows.num_read)
    rows, filtered = filter_rows(rows, section, bad)
    rows = rows.take(first_in_hash_order(rows.examples, section.max_examples, section.split.seed))
    check_settings(rows.num_texts(), section, recipe.train, tokenizer)
    settings = Supervision.of(section, recipe.train, tokenizer)
    chat = section.prompt_format == "chat"
    template = chat_template(section, tokenizer) if chat else None
    twin = twin_of(section, tokenizer)
    if template is not None:
        check_template_kwargs(section, twin.text if twin else template)
    _progress(f"{len(rows):,} of {num_usable:,} rows, tokenising", len(rows))

    parts, numbers, usable = [], [np.empty(0, TOKEN_NUMBERS)], []
    injections = Injections(tokenizer, section.prompt_format)
    texts = rows.with_texts()
    start = 0
    while batch := list(islice(texts, BATCH_ROWS)):
        good: list[tuple[Example, Encoded]] = []
        items = encode(batch, settings, tokenizer, template, twin)
        for index, (example, item) in enumerate(zip(batch, items, strict=True), start):
            if isinstance(item, BadRow):
                bad.add(example, item)
            else:
                good.append((example, item))
                usable.append(index)
        start += len(batch)
        injections.search([example for example, _ in good])
        parts.append(_record_batch(good))
        of_each = [
            (
                *(getattr(item, name) for name in _KEPT),
                *(turn_counts(conversation_of(example, None)) if chat else (0, 0, 0)),
            )
            for example, item in good
        ]
        numbers.append(np.array(of_each, TOKEN_NUMBERS))
    if bad.found and (section.on_bad_row == "error" or not usable):
        raise bad.error(rows.num_read)
    rows, tokens, encoded = rows.take(usable), np.concatenate(numbers), _dataset(parts)

    if (limit := section.filters.max_tokens) is not None:
        kept = np.flatnonzero(tokens["tokens_before"] <= limit).tolist()
        filtered["max_tokens"] = len(rows) - len(kept)
        if not kept:
            what = f"0 rows: all {len(rows)} rows are longer than {limit} tokens"
            raise SettingError("data.filters.max_tokens", what)
        rows, tokens, encoded = rows.take(kept), tokens[kept], encoded.select(kept)
    splits = split_rows(rows.examples, section.split)
    splits.rows[TRAIN] = rows.repeated(splits.rows[TRAIN], section.split.seed)
    audit = audit_rows(
        rows,
        tokens,
        splits,
        settings,
        tokenizer,
        filtered=filtered,
        skipped=bad,
        injections=injections,
        encoded=encoded,
        twin=twin,
    )
    evaluates = recipe.train.get("eval_strategy", "no") != "no"
    check_audit(audit, section.max_unsupervised_fraction, evaluates=evaluates)
    totals = audit["tokens"]["total"], audit["supervised_tokens"]["total"]
    _progress("{:,} tokens, {:,} with loss".format(*totals), len(rows))
    sets = {
        name: encoded.select([i for i in indices if tokens["supervised"][i]]) if indices else None
        for name, indices in splits.rows.items()
    }
    return PreparedData(
        **sets,
        audit=audit,
        splits=_split_record(rows, splits, section, audit),
        fingerprint=fingerprint_of(rows, splits.rows),
        prompt_format_hash=format_hash(section, tokenizer, eos_token=settings.eos_token),
        twin=twin,
        rows=rows,
    )


def _record_batch(examples: Sequence[tuple[Example, Encoded]]) -> pyarrow.RecordBatch:
    """The tokens of some examples as columns."""
    import pyarrow

    ends = np.cumsum([0, *(item.length for _, item in examples)], dtype=np.int32)

    def tokens(rows: list[np.ndarray]) -> pyarrow.ListArray:
        # not built by Arrow, whose buffers may be twice as large as what is in them
        flat = np.concatenate([np.empty(0, np.int32), *rows])
        return pyarrow.ListArray.from_arrays(pyarrow.array(ends), pyarrow.array(flat))

    columns = {
        "input_ids": tokens([item.ids for _, item in examples]),
        "labels": tokens([item.labels for _, item in examples]),
        "example_id": pyarrow.array([example.id for example, _ in examples], pyarrow.string()),
    }
    return pyarrow.RecordBatch.from_pydict(columns)


def _dataset(parts: Sequence[pyarrow.RecordBatch]) -> Dataset:
    """All tokenised rows as one data set. Without a fingerprint, `datasets` would pickle the table
    to name it, in three times the memory of the tokens.
    """
    import datasets
    import pyarrow

    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        for buffer in (buffer for column in part.columns for buffer in column.buffers()):
            digest.update(buffer or b"")
    return datasets.Dataset(pyarrow.Table.from_batches(parts), fingerprint=digest.hexdigest())


def _split_record(
    rows: Rows, splits: Splits, section: DataSection, audit: DataAudit
) -> SplitRecord:
    bare = set(audit["no_supervised_tokens"]["ids"])

    def part(name: str) -> SplitPart:
        ids = [rows[index].id for index in splits.rows[name]]
        without = [id for id in ids if id in bare]
        return {"count": len(ids), "ids": ids, "without_supervision": without}

    return {
        "method": section.split.method,
        "seed": section.split.seed,
        "fractions": {"validation": section.split.validation, "test": section.split.test},
        "train": part(TRAIN),
        "validation": part(VALIDATION),
        "test": part(TEST),
        "duplicates_across": splits.across,
        "duplicates_moved": splits.moved,
    }


def _progress(line: str, num_rows: int) -> None:
    if num_rows >= NUM_ROWS_WORTH_A_LINE:
        say_once(f"data: {line}")
