"""From a recipe and a tokenizer to data sets that TRL trains on as they are, with the audit of
supervision.json.

Deterministic, and cheap enough to run on every rank: the files are read batch by batch (once to
check and name the rows, once to tokenise them), and nothing is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.core.terminal import say
from recipes_lib.data.audit import audit_rows, check_audit
from recipes_lib.data.columns import check_dropped_are_there
from recipes_lib.data.conversations import conversation_of
from recipes_lib.data.examples import BadRow, BadRows, Example, SettingError, place
from recipes_lib.data.injections import Injections
from recipes_lib.data.prompts import chat_template, format_hash
from recipes_lib.data.rows import Rows, first_in_hash_order, read_data
from recipes_lib.data.splits import SPLITS, TEST, TRAIN, VALIDATION, Splits, split_rows
from recipes_lib.data.supervision import BATCH_ROWS, Supervision, Tokens, check_settings, encode
from recipes_lib.data.templates import render_conversations

if TYPE_CHECKING:
    from datasets import Dataset

    from recipes_lib.config.recipe import Recipe

NUM_ROWS_WORTH_A_LINE = 20_000
NUM_SHOWN = 3


@dataclass(frozen=True)
class PreparedData:
    """What training needs and what the run directory records.

    The data sets have the columns `input_ids`, `labels` (-100 where there is no loss) and
    `example_id`. They are truncated, and rows without supervised tokens are dropped, counted and
    named in `audit`.

    Args:
        audit: content of supervision.json.
        splits: content of splits.json: per split the ids and counts, before rows without supervised
            tokens are dropped.
        fingerprint: sha256 over split, id and content of all rows used, in order.
        prompt_format_hash: `prompts.format_hash`.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    audit: dict[str, Any]
    splits: dict[str, Any]
    fingerprint: str
    prompt_format_hash: str


def prepare_data(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Read, split, tokenise and audit the data of a recipe.

    Args:
        recipe: a resolved recipe; its `data` section and the keys of `train` that shape rows are
            used.
        tokenizer: a fast tokenizer.

    Raises:
        DataError: rows, files, columns or settings that cannot be used; with file and line.
    """
    with _placed(recipe):
        section, folders, bad = recipe.data, data_folders(recipe), BadRows()
        rows = read_data(section, folders, bad)
        check_dropped_are_there(
            section.drop_columns,
            list(dict.fromkeys(name for table, _, _ in rows.tables for name in table.columns)),
        )
        num_read, num_usable = rows.num_read, len(rows)
        if bad.found and section.on_bad_row == "error":
            raise _all_bad_rows(bad, rows, section, tokenizer, folders)
        rows, filtered = filter_rows(rows, section, bad)
        rows = rows.take(first_in_hash_order(rows, section.max_examples, section.split.seed))
        check_settings(rows.num_texts, section, recipe.train, tokenizer)
        settings = Supervision.of(section, recipe.train, tokenizer)
        template = (
            chat_template(section, tokenizer, folders) if section.prompt_format == "chat" else None
        )
        _progress(f"{len(rows):,} of {num_usable:,} rows, tokenising", len(rows))

        tokens, injections, usable = Tokens(), Injections(tokenizer, section.prompt_format), []
        for first, batch in _batches(rows.examples()):
            encoded = list(encode(batch, settings, tokenizer, template))
            good = [index for index, item in enumerate(encoded) if not isinstance(item, BadRow)]
            for example, item in zip(batch, encoded, strict=True):
                if isinstance(item, BadRow):
                    bad.add(example, item)
            tokens.add([encoded[index] for index in good])  # type: ignore[misc]
            injections.search([batch[index] for index in good])
            usable += [first + index for index in good]
        if bad.found and (section.on_bad_row == "error" or not usable):
            raise bad.error(num_read)
        rows = rows.take(usable)

        numbers, kept, names = tokens.numbers(), range(len(rows)), rows.ids
        if section.filters.max_tokens is not None:
            kept = np.flatnonzero(numbers["tokens_before"] <= section.filters.max_tokens).tolist()
            filtered["max_tokens"] = len(rows) - len(kept)
            if not kept:
                what = (
                    f"0 rows: all {len(rows)} rows are longer than {section.filters.max_tokens}"
                    " tokens"
                )
                raise SettingError("data.filters.max_tokens", what)
            rows, numbers = (
                rows.take(kept),
                {name: column[kept] for name, column in numbers.items()},
            )
            injections.keep(rows.ids)
        splits = split_rows(rows, section.split)
        audit = audit_rows(
            rows,
            numbers,
            splits,
            settings,
            tokenizer,
            filtered=filtered,
            skipped=bad,
            injections=injections,
            shown=[(index, *tokens.row(kept[index])) for index in splits.rows[TRAIN][:NUM_SHOWN]],
        )
        check_audit(
            audit,
            section.max_unsupervised_fraction,
            evaluates=recipe.train.get("eval_strategy", "no") != "no",
        )
        _progress(
            f"{audit['tokens']['total']:,} tokens, {audit['supervised_tokens']['total']:,} with"
            " loss",
            len(rows),
        )
        whole, sets = _dataset(tokens, names), {}
        for name in SPLITS:
            trained = [kept[index] for index in splits.rows[name] if numbers["supervised"][index]]
            sets[name] = whole.select(trained) if splits.rows[name] else None
        return PreparedData(
            train=sets[TRAIN],
            validation=sets[VALIDATION],
            test=sets[TEST],
            audit=audit,
            splits=_split_record(rows, splits, section, audit),
            fingerprint=fingerprint_rows(rows, splits),
            prompt_format_hash=format_hash(
                section, tokenizer, folders, eos_token=settings.eos_token
            ),
        )


def _batches(examples: Iterator[Example]) -> Iterator[tuple[int, list[Example]]]:
    """Batches of examples with the position of their first one."""
    first = 0
    while batch := list(islice(examples, BATCH_ROWS)):
        yield first, batch
        first += len(batch)


def _all_bad_rows(
    bad: BadRows, rows: Rows, section: DataSection, tokenizer: Any, folders: Sequence[Path]
) -> DataError:
    """The error for rows that cannot be used, those included that the chat template alone
    refuses.
    """
    if section.prompt_format == "chat":
        template = chat_template(section, tokenizer, folders)
        for _, batch in _batches(rows.examples()):
            conversations = [conversation_of(example, section.system_prompt) for example in batch]
            for example, item in zip(
                batch, render_conversations(conversations, tokenizer, template), strict=True
            ):
                if isinstance(item, BadRow):
                    bad.add(example, item)
    return bad.error(rows.num_read)


def data_folders(recipe: Recipe) -> list[Path]:
    """Where relative data and template paths are looked for: beside the file that wrote them,
    before the working directory.
    """
    return list(
        dict.fromkeys([recipe.folder_of("data.source"), recipe.folder_of("data.chat_template")])
    )


def filter_rows(rows: Rows, section: DataSection, bad: BadRows) -> tuple[Rows, dict[str, int]]:
    """Leave out rows by category and empty completion.

    Returns:
        The rows kept, and per filter how many it left out.

    Raises:
        DataError: no row has a category, or nothing is left.
    """
    if bad.found and not len(rows):
        raise bad.error(rows.num_read)
    filters, filtered = section.filters, {}
    kept: Sequence[int] = range(len(rows))
    if filters.categories is not None:
        categories = set(rows.categories) - {None}
        if not categories:
            what = "data.filters.categories needs a category column"
            raise SettingError("data.filters.categories", what, "name it: data.columns.category")
        if unknown := sorted(set(filters.categories) - categories):
            have = ", ".join(sorted(map(str, categories)))
            raise SettingError(
                "data.filters.categories",
                f"no row has the category {', '.join(unknown)}",
                f"categories: {have}",
            )
        kept = [index for index in kept if rows.categories[index] in filters.categories]
        filtered["categories"] = len(rows) - len(kept)
    if filters.drop_empty_completions:
        before, empty = len(kept), rows.empty
        kept = [index for index in kept if not empty[index]]
        filtered["drop_empty_completions"] = before - len(kept)
    if not kept:
        raise SettingError("data.filters", f"0 rows: the filters leave none of {len(rows)} rows")
    return rows.take(kept), filtered


def _dataset(tokens: Tokens, names: Sequence[str]) -> Dataset:
    """All tokenised rows as an Arrow data set, which takes over the arrays of `tokens`."""
    import datasets
    import pyarrow as pa

    lists = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", lists), ("labels", lists), ("example_id", pa.string())])
    batches, digest = [], hashlib.blake2b(digest_size=8)
    for first, last, offsets, ids, labels in tokens.batches():
        for values in (offsets, ids, labels):
            digest.update(values)
        columns = [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
            for values in (ids, labels)
        ]
        batches.append(
            pa.RecordBatch.from_arrays(
                [*columns, pa.array(names[first:last], pa.string())], schema=schema
            )
        )
    # Given one, `datasets` need not pickle the whole table to name it, which takes three times the
    # memory of the tokens.
    return datasets.Dataset(pa.Table.from_batches(batches, schema), fingerprint=digest.hexdigest())


def fingerprint_rows(rows: Rows, splits: Splits) -> str:
    """sha256 over split, id and content of all rows used, in order."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for index in splits.rows[name]:
            digest.update(f"{name}\t{rows.ids[index]}\t{rows.content(index)}\n".encode())
    return digest.hexdigest()


def _split_record(
    rows: Rows, splits: Splits, section: DataSection, audit: dict[str, Any]
) -> dict[str, Any]:
    bare = set(audit["no_supervised_tokens"]["ids"])
    record: dict[str, Any] = {"method": section.split.method, "seed": section.split.seed}
    record |= {"fractions": {"validation": section.split.validation, "test": section.split.test}}
    for name in SPLITS:
        ids = [rows.ids[index] for index in splits.rows[name]]
        record[name] = {
            "count": len(ids),
            "ids": ids,
            "without_supervision": [id for id in ids if id in bare],
        }
    return record | {"duplicates_across": splits.across, "duplicates_moved": splits.moved}


@contextmanager
def _placed(recipe: Recipe) -> Iterator[None]:
    """Give errors about a key the file and line of that key."""
    try:
        yield
    except DataError as error:
        raise place(recipe, error) from error.__cause__


def _progress(line: str, num_rows: int) -> None:
    if num_rows >= NUM_ROWS_WORTH_A_LINE and os.environ.get("RANK", "0") == "0":
        say(f"data: {line}")
