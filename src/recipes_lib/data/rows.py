"""The rows of a recipe's data: what identifies each of them, where it stands, and how to read its
texts again: a million rows fit because texts are not kept. The files are read once to check and
name every row, and again, batch by batch, for the rows that are used.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import Document
from recipes_lib.config.recipe import recipe_from
from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import say
from recipes_lib.data.columns import IDS_HINT, Reading
from recipes_lib.data.examples import (
    BadRow,
    BadRows,
    Example,
    SettingError,
    message_texts,
    place,
)
from recipes_lib.data.files import Table
from recipes_lib.data.sources import (
    Source,
    is_on_hub,
    listed_sources,
    load_tables,
    unread_files,
)

NUM_CHECKED = 20_000
_NO_TEXTS: dict[str, Any] = {}  # one for all rows: an empty dict takes 64 bytes


@dataclass
class Rows:
    """The usable rows of all sources in file order.

    Args:
        examples: without their texts; their ids are unique.
        tables: each file, how it is read, and the position of its source in the mixture.
        sources: each source of the mixture, and how many usable rows it has.
        num_read: rows in the files, those that cannot be used included.
        unread: files of the sources' folders that are not read, per folder.
    """

    examples: list[Example] = field(default_factory=list)
    tables: list[tuple[Table, Reading, int]] = field(default_factory=list)
    sources: list[tuple[Source, int]] = field(default_factory=list)
    num_read: int = 0
    unread: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, in the order given."""
        return replace(self, examples=[self.examples[index] for index in indices])

    def source_of(self, index: int) -> int:
        """Position of a row's source in the mixture."""
        return self.tables[self[index].table][2]

    def repeated(self, indices: Sequence[int], seed: int) -> list[int]:
        """Training rows as often as the weights of their sources say: whole times all of them, and
        the first in hash order once more.
        """
        times: dict[int, int] = {}
        for number, (source, _) in enumerate(self.sources):
            whole, part = divmod(source.weight, 1)
            if source.weight > 1:
                own = [index for index in indices if self.source_of(index) == number]
                examples = [self[index] for index in own]
                more = {*first_in_hash_order(examples, round(part * len(own)), seed)}
                times |= {index: int(whole) + (at in more) for at, index in enumerate(own)}
        return [index for index in indices for _ in range(times.get(index, 1))]

    def num_texts(self) -> int:
        """Rows that are one text each."""
        return sum("text" in self.tables[example.table][1].names for example in self.examples)

    def unused_columns(self) -> dict[str, list[str]]:
        """The columns that nothing reads, per file that has one."""
        found: dict[tuple[str, ...], list[str]] = {}
        for table, reading, _ in self.tables:
            if reading.unused:
                found.setdefault(reading.unused, []).append(table.file)
        return {
            files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more": list(names)
            for names, files in found.items()
        }

    def with_texts(self) -> Iterator[Example]:
        """The rows with their texts, read from the files again.

        Raises:
            SettingError: a file changed since the rows were named.
        """
        index, ignored = 0, BadRows()
        while index < len(self):
            number = self[index].table
            table, reading, _ = self.tables[number]
            for found in reading.examples(table, ignored):
                if found.row == self[index].row:
                    found.id = self[index].id
                    yield found
                    index += 1
                    if index == len(self) or self[index].table != number:
                        break
            else:
                raise SettingError(
                    "data.source",
                    f"{table.file} changed while it was read",
                    "run the command again",
                )


def read_data(section: DataSection, bad: BadRows, *, max_rows: int | None = None) -> Rows:
    """Read, check and name the rows of all sources, at most `max_rows` of each file; rows that
    cannot be used are added to `bad`.

    Raises:
        DataError: see `sources` and `columns`.
    """
    sources = listed_sources(section)
    rows = Rows()
    for number, source in enumerate(sources):
        tables = load_tables(source, max_rows)
        reading = Reading.of(tables, section.prompt_format, source.columns, section.drop_columns)
        examples: list[Example] = []
        before = len(bad.found)
        first: tuple[str, str] | None = None  # the type of the first id, and where it stands
        for table in tables:
            rows.tables.append((table, reading, number))
            for example in reading.examples(table, bad):
                if example.explicit_id is not None:
                    kind = type(example.explicit_id).__name__
                    first = first or (kind, example.place)
                    if kind != first[0]:
                        what = f"ids of mixed types: {kind} here, {first[0]} at {first[1]}"
                        bad.add(example, BadRow(what, IDS_HINT))
                        continue
                identify(example, len(rows.tables) - 1)
                examples.append(example)
        rows.num_read += len(examples) + len(bad.found) - before
        examples = named_uniquely(examples, bad)
        if unread := unread_files(source):
            rows.unread[shown_path(Path(source.source))] = unread
        taken = source.num_taken(len(examples))
        if examples and not taken and max_rows is None:
            what = (
                f"data.source[{number}].weight: {source.weight} of {len(examples)} rows is no row"
            )
            raise SettingError("data.source", what, "raise it, or remove the source")
        rows.sources.append((source, len(examples)))
        chosen = first_in_hash_order(examples, taken, section.split.seed)
        rows.examples += [examples[index] for index in chosen]
    if len(sources) > 1:
        _name_apart(rows)
    return rows


def identify(example: Example, table: int) -> None:
    """Hash the texts and let them go; the id is the explicit one or a hash, not yet unique."""
    fields, example.fields = example.fields, _NO_TEXTS
    normal = _normalised_fields(fields)
    example.table, example.empty = table, _is_empty(fields)
    example.content = hashlib.sha256(json.dumps(normal, ensure_ascii=False).encode()).digest()
    example.loose = hashlib.blake2b(_loose_text(fields).encode(), digest_size=16).digest()
    explicit = example.explicit_id
    example.id = example.content[:8].hex() if explicit is None else str(explicit)


def named_uniquely(examples: Sequence[Example], bad: BadRows) -> list[Example]:
    """Return the rows, those of equal texts with different ids; equal explicit ids are bad."""
    first: dict[str, Example] = {}
    times = Counter[str]()
    kept = []
    for example in examples:
        if (earlier := first.setdefault(example.id, example)) is not example:
            if example.explicit_id is not None:
                what = f"id {example.id!r} appears again (first at {earlier.place})"
                bad.add(example, BadRow(what, IDS_HINT))
                continue
            times[example.id] += 1
            example.id += f"#{times[example.id] + 1}"
        kept.append(example)
    return kept


def _name_apart(rows: Rows) -> None:
    """Make ids unique over a mixture: explicit ones get the position of their source before them,
    others are numbered.
    """
    times = Counter[str]()
    for example in rows.examples:
        name = example.id.partition("#")[0]
        if example.explicit_id is not None:
            example.explicit_id = name = f"{rows.tables[example.table][2]}:{example.id}"
        times[name] += 1
        example.id = name if times[name] == 1 else f"{name}#{times[name]}"


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
    kept = rows.examples
    if filters.categories is not None:
        categories = {example.category for example in kept if example.category is not None}
        key = "data.filters.categories"
        if not categories:
            what = f"{key} needs a category column"
            raise SettingError(key, what, "name it: data.columns.category")
        if unknown := sorted(set(filters.categories) - categories):
            what = f"no row has the category {', '.join(unknown)}"
            raise SettingError(key, what, f"categories: {', '.join(sorted(categories))}")
        kept = [example for example in kept if example.category in filters.categories]
        filtered["categories"] = len(rows) - len(kept)
    if filters.drop_empty_completions:
        before = len(kept)
        kept = [example for example in kept if not example.empty]
        filtered["drop_empty_completions"] = before - len(kept)
    if not kept:
        raise SettingError("data.filters", f"0 rows: the filters leave none of {len(rows)} rows")
    return replace(rows, examples=kept), filtered


def check_rows(document: Document, full: bool) -> list[DataError]:
    """Return what is wrong with a recipe's local rows, for `recipes check`; the files of which not
    all rows were read are printed.
    """
    recipe, most = recipe_from(document), None if full else NUM_CHECKED
    try:
        for file in check_local_rows(recipe.data, most):
            looked = f"only the first {NUM_CHECKED:,} rows of {file} were looked at"
            say(f"note: {looked}; --full reads all")
    except DataError as error:
        return [place(recipe, error)]
    return []


def check_local_rows(section: DataSection, max_rows: int | None = NUM_CHECKED) -> list[str]:
    """Read local files as training would, without a tokenizer.

    Args:
        max_rows: no more than these of each file.

    Returns:
        The files that have more rows.

    Raises:
        DataError: a file is missing or damaged, or one of its rows cannot be used.
    """
    entries = [section.source] if isinstance(section.source, str) else section.source
    sources = zip(entries, listed_sources(section), strict=True)
    local = [entry for entry, source in sources if not is_on_hub(source)]
    if not local:
        return []
    bad, limit = BadRows(), None if max_rows is None else max_rows + 1
    rows = read_data(replace(section, source=local), bad, max_rows=limit)
    if bad.found and (section.on_bad_row == "error" or not len(rows)):
        raise bad.error(rows.num_read)
    longer = {example.table for example in rows.examples if example.row == limit}
    return [rows.tables[number][0].file for number in sorted(longer)]


def unit_interval(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on the key and the salt alone.

    Example:
        >>> round(unit_interval("row-1", "42"), 3), round(unit_interval("row-1", "43"), 3)
        (0.501, 0.853)
    """
    return int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big") / 2**64


def first_in_hash_order(rows: Sequence[Example], limit: int | None, seed: int) -> Sequence[int]:
    """Positions of the `limit` rows that come first in hash order, in file order. The salt is not
    the split's, so that they fall on all sides.
    """
    if limit is None or len(rows) <= limit:
        return range(len(rows))

    def order(index: int) -> tuple[float, str]:
        return unit_interval(rows[index].split_key, f"order:{seed}"), rows[index].id

    return sorted(sorted(range(len(rows)), key=order)[:limit])


def _is_empty(fields: dict[str, Any]) -> bool:
    """Whether the text that the fields should teach is empty."""
    for name in ("response", "completion", "text"):
        if isinstance(fields.get(name), str):
            return not fields[name].strip()
    messages = fields.get("messages") or fields.get("completion") or []
    answers = (message_texts(message) for message in messages if message["role"] == "assistant")
    return not any(text.strip() for texts in answers for text in texts)


def _loose_text(fields: dict[str, Any]) -> str:
    """Texts as compared for near duplicates: no case, one space between words."""
    parts = []
    for name, value in fields.items():
        if not isinstance(value, str):
            value = "\n".join(f"{m['role']}: {' '.join(message_texts(m))}" for m in value)
        parts.append(f"{name} {value}")
    return " ".join("\n".join(parts).casefold().split())


def _normalised_fields(fields: dict[str, Any]) -> list[Any]:
    """What the content hash sees: whatever the prompt format and the order of columns; empty
    fields leave no trace.
    """
    parts: list[Any] = []
    for name in sorted(fields):
        value = fields[name]
        if isinstance(value, list):
            turns = [
                [m["role"], *map(_normalised, message_texts(m)), *([0] if "weight" in m else [])]
                for m in value
            ]
            parts.append([name, turns])
        elif value := _normalised(value):
            parts.append([name, value])
    return parts


def _normalised(text: str) -> str:
    """Text as compared for exact duplicates: Unicode NFC, newlines as \\n, stripped."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
