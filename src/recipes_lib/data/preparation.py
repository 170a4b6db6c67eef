"""From a recipe and a tokenizer to data sets that TRL trains on as they are, with the audit of supervision.json.

Deterministic, and cheap enough to run on every rank: the rows are read once, tokenised once, and nothing is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes_lib.data.audit import audit_rows, check_audit, is_empty
from recipes_lib.data.columns import read_examples
from recipes_lib.data.examples import Example, SettingError, place
from recipes_lib.data.injections import find_injections
from recipes_lib.data.prompts import chat_template, format_hash
from recipes_lib.data.sources import listed_sources, load_tables
from recipes_lib.data.splits import SPLITS, TEST, TRAIN, VALIDATION, Splits, first_in_hash_order, split_examples
from recipes_lib.data.supervision import Encoded, Supervision, check_settings, encode
from recipes_lib.errors import DataError
from recipes_lib.recipe.sections import DataSection
from recipes_lib.terminal import say

if TYPE_CHECKING:
    from datasets import Dataset

    from recipes_lib.recipe.recipe import Recipe

NUM_ROWS_WORTH_A_LINE = 20_000


@dataclass(frozen=True)
class PreparedData:
    """What training needs and what the run directory records.

    The data sets have the columns `input_ids`, `labels` (-100 where there is no loss) and `example_id`. They are truncated, and
    rows without supervised tokens are dropped, counted and named in `audit`.

    Args:
        audit: content of supervision.json.
        splits: content of splits.json: per split the ids and counts, before rows without supervised tokens are dropped.
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
        recipe: a resolved recipe; its `data` section and the keys of `train` that shape rows are used.
        tokenizer: a fast tokenizer.

    Raises:
        DataError: rows, files, columns or settings that cannot be used; with file and line.
    """
    with _placed(recipe):
        section, folders = recipe.data, data_folders(recipe)
        examples = read_all(section, folders)
        kept, filtered = filter_rows(examples, section)
        kept = first_in_hash_order(kept, section.max_examples, section.split.seed)
        check_settings(kept, section, recipe.train, tokenizer)
        settings = Supervision.of(section, recipe.train, tokenizer)
        template = chat_template(section, tokenizer, folders) if section.prompt_format == "chat" else None
        _progress(f"{len(kept):,} of {len(examples):,} rows, tokenising", len(kept))
        encoded = dict(zip((example.id for example in kept), encode(kept, settings, tokenizer, template), strict=True))
        kept = _drop_long(kept, encoded, section.filters.max_tokens, filtered)
        splits = split_examples(kept, section.split)
        rows = {name: [(example, encoded[example.id]) for example in splits.rows[name]] for name in SPLITS}
        injections = find_injections(kept, tokenizer, section.prompt_format)
        audit = audit_rows(rows, splits, settings, tokenizer, rows_read=len(examples), filtered=filtered, injections=injections)
        check_audit(audit, section.max_unsupervised_fraction, evaluates=recipe.train.get("eval_strategy", "no") != "no")
        _progress(f"{audit['tokens']['total']:,} tokens, {audit['supervised_tokens']['total']:,} with loss", len(kept))
        return PreparedData(
            train=_dataset(rows[TRAIN]),
            validation=_dataset(rows[VALIDATION]) if rows[VALIDATION] else None,
            test=_dataset(rows[TEST]) if rows[TEST] else None,
            audit=audit,
            splits=_split_record(splits, section, audit),
            fingerprint=fingerprint(splits),
            prompt_format_hash=format_hash(section, tokenizer, folders, eos_token=settings.eos_token),
        )


def data_folders(recipe: Recipe) -> list[Path]:
    """Where relative data and template paths are looked for: beside the file that wrote them, before the working directory."""
    return list(dict.fromkeys([recipe.folder_of("data.source"), recipe.folder_of("data.chat_template")]))


def read_all(section: DataSection, folders: Sequence[Path]) -> list[Example]:
    """Read the rows of all sources; in a mixture, ids carry the position of their source.

    Raises:
        DataError: see `sources` and `columns`.
    """
    sources = listed_sources(section)
    examples: list[Example] = []
    for index, source in enumerate(sources):
        rows = read_examples(load_tables(source, folders), section.prompt_format, source.columns, index)
        examples += first_in_hash_order(rows, source.max_examples, section.split.seed)
    if len(sources) > 1:
        _name_apart(examples)
    return examples


def _name_apart(examples: Sequence[Example]) -> None:
    """Make ids unique over a mixture. Rows without an explicit id are told apart by content already."""
    seen: dict[str, int] = {}
    for example in examples:
        name = example.id.partition("#")[0] if example.explicit_id is None else f"{example.source}:{example.explicit_id}"
        if example.explicit_id is not None:
            example.split_key = name
        seen[name] = count = seen.get(name, 0) + 1
        example.id = name if count == 1 else f"{name}#{count}"


def filter_rows(examples: Sequence[Example], section: DataSection) -> tuple[list[Example], dict[str, int]]:
    """Leave out rows by category and empty completion.

    Returns:
        The rows kept, and per filter how many it left out.

    Raises:
        SettingError: no row has a category, or nothing is left.
    """
    filters, filtered, kept = section.filters, {}, list(examples)
    if filters.categories is not None:
        categories = {example.category for example in examples} - {None}
        if not categories:
            what = "data.filters.categories needs a category column"
            raise SettingError("data.filters.categories", what, "name it: data.columns.category")
        if unknown := sorted(set(filters.categories) - categories):
            have = ", ".join(sorted(map(str, categories)))
            raise SettingError("data.filters.categories", f"no row has the category {', '.join(unknown)}", f"categories: {have}")
        kept = [example for example in kept if example.category in filters.categories]
        filtered["categories"] = len(examples) - len(kept)
    if filters.drop_empty_completions:
        before = len(kept)
        kept = [example for example in kept if not is_empty(example)]
        filtered["drop_empty_completions"] = before - len(kept)
    if not kept:
        raise SettingError("data.filters", f"0 rows: the filters leave none of {len(examples)} rows")
    return kept, filtered


def _drop_long(examples: list[Example], encoded: dict[str, Encoded], limit: int | None, filtered: dict[str, int]) -> list[Example]:
    if limit is None:
        return examples
    kept = [example for example in examples if encoded[example.id].tokens_before <= limit]
    filtered["max_tokens"] = len(examples) - len(kept)
    if not kept:
        raise SettingError("data.filters.max_tokens", f"0 rows: all {len(examples)} rows are longer than {limit} tokens")
    return kept


def _dataset(rows: Sequence[tuple[Example, Encoded]]) -> Dataset:
    """The rows with supervised tokens as an Arrow data set, built without a Python list per token."""
    import datasets
    import pyarrow as pa

    rows = [pair for pair in rows if pair[1].supervised]

    def column(arrays: list[np.ndarray]) -> pa.Array:
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        values = np.concatenate(arrays) if arrays else np.array([], dtype=np.int32)
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))

    table = pa.table(
        {
            "input_ids": column([encoded.ids for _, encoded in rows]),
            "labels": column([encoded.labels for _, encoded in rows]),
            "example_id": pa.array([example.id for example, _ in rows], pa.string()),
        }
    )
    lists = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", lists), ("labels", lists), ("example_id", pa.string())])
    return datasets.Dataset(table.cast(schema))


def fingerprint(splits: Splits) -> str:
    """sha256 over split, id and content of all rows used, in order."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for example in splits.rows[name]:
            digest.update(f"{name}\t{example.id}\t{example.content}\n".encode())
    return digest.hexdigest()


def _split_record(splits: Splits, section: DataSection, audit: dict[str, Any]) -> dict[str, Any]:
    bare = set(audit["no_supervised_tokens"]["ids"])
    record: dict[str, Any] = {"method": section.split.method, "seed": section.split.seed}
    record |= {"fractions": {"validation": section.split.validation, "test": section.split.test}}
    for name in SPLITS:
        ids = [example.id for example in splits.rows[name]]
        record[name] = {"count": len(ids), "ids": ids, "without_supervision": [id for id in ids if id in bare]}
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
