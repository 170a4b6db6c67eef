"""The rows of a recipe's data: what identifies each of them, where it stands, and how to read its
texts again.

A million rows fit here because texts are not kept: the files are read once to check and name every
row, and again, batch by batch, for the rows that are used.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from recipes_lib.config.sections import DataSection
from recipes_lib.data.columns import IDS_HINT, Reading
from recipes_lib.data.examples import BadRow, BadRows, Example, SettingError, content_hash
from recipes_lib.data.files import Table
from recipes_lib.data.sources import is_on_hub, listed_sources, load_tables, unread_files

NUM_CHECKED = 20_000
CONTENT_BYTES, LOOSE_BYTES = 32, 16


class Rows:
    """The usable rows of all sources in file order, as columns.

    Args:
        ids: unique names, for splits.json and supervision.json.
        split_keys: what the hash split looks at, where that is not the content: the explicit id.
            Empty without explicit ids.
        categories: of each row, or None.
        num_read: rows in the files, those that cannot be used included.
        unread: files of the sources' folders that are not read, per folder.
    """

    def __init__(self) -> None:
        self.tables: list[tuple[Table, Reading, int]] = []
        self.ids: list[str] = []
        self.split_keys: list[str | None] = []
        self.categories: list[str | None] = []
        self._table, self._row, self._line = array("i"), array("q"), array("q")
        self._contents, self._looses, self._empty = bytearray(), bytearray(), bytearray()
        self.num_read = 0
        self.unread: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._row)

    def contents(self) -> Iterator[bytes]:
        """A sha256 of each row's normalised texts."""
        return _digests(self._contents, CONTENT_BYTES)

    def looses(self) -> Iterator[bytes]:
        """A hash of each row's texts without case and white space."""
        return _digests(self._looses, LOOSE_BYTES)

    @property
    def empty(self) -> bytearray:
        """Whether the text that a row should teach is empty, 0 or 1 for each."""
        return self._empty

    @property
    def num_texts(self) -> int:
        """Rows that are one text each."""
        return sum("text" in self.tables[number][1].names for number in self._table)

    def content(self, index: int) -> str:
        """The hexadecimal sha256 of a row's texts."""
        return self._contents[CONTENT_BYTES * index : CONTENT_BYTES * (index + 1)].hex()

    def split_key(self, index: int) -> str:
        """What the hash split looks at: the explicit id, else the content."""
        return (self.split_keys[index] if self.split_keys else None) or self.content(index)

    def place(self, index: int) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return self._example(index).place

    def _example(self, index: int) -> Example:
        line = self._line[index]
        return Example(
            self.tables[self._table[index]][0].file,
            None if line < 0 else line,
            self._row[index],
            {},
        )

    def unused_columns(self) -> dict[str, list[str]]:
        """The columns that nothing reads, per file that has one."""
        found: dict[tuple[str, ...], list[str]] = {}
        for table, reading, _ in self.tables:
            if reading.unused:
                found.setdefault(reading.unused, []).append(table.file)
        shown = {
            names: files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
            for names, files in found.items()
        }
        return {files: list(names) for names, files in shown.items()}

    def files_longer_than(self, num_rows: int) -> list[str]:
        """The files with a row that stands behind so many others."""
        longer = {
            table: None for table, row in zip(self._table, self._row, strict=True) if row > num_rows
        }
        return [self.tables[number][0].file for number in longer]

    def add(self, example: Example, table: int) -> None:
        """Append a row; its id is the explicit one or a hash of its texts, not yet unique."""
        content = content_hash(example.fields)
        explicit = None if example.explicit_id is None else str(example.explicit_id)
        self.ids.append(content[:8].hex() if explicit is None else explicit)
        if explicit is not None or self.split_keys:
            self.split_keys += [None] * (len(self) - len(self.split_keys))
            self.split_keys.append(explicit)
        self.categories.append(example.category)
        self._contents += content
        self._looses += hashlib.blake2b(
            _loose_text(example).encode(), digest_size=LOOSE_BYTES
        ).digest()
        self._empty.append(is_empty(example))
        self._table.append(table)
        self._line.append(-1 if example.line is None else example.line)
        self._row.append(example.row)

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, in the order given."""
        if len(indices) == len(self):
            return self
        some = Rows()
        some.tables, some.num_read, some.unread = self.tables, self.num_read, self.unread
        for name in ("ids", "split_keys", "categories"):
            values = getattr(self, name)
            setattr(some, name, [values[index] for index in indices] if values else [])
        for name in ("_table", "_row", "_line"):
            column = getattr(self, name)
            getattr(some, name).extend(column[index] for index in indices)
        for name, size in (("_contents", CONTENT_BYTES), ("_looses", LOOSE_BYTES), ("_empty", 1)):
            whole = getattr(self, name)
            setattr(
                some,
                name,
                bytearray().join(whole[size * index : size * (index + 1)] for index in indices),
            )
        return some

    def extend(self, other: Rows) -> None:
        """Append the rows of another source."""
        shift = len(self.tables)
        if other.split_keys or self.split_keys:
            self.split_keys += [None] * (len(self) - len(self.split_keys))
            self.split_keys += other.split_keys + [None] * (len(other) - len(other.split_keys))
        self.tables += other.tables
        self.ids += other.ids
        self.categories += other.categories
        self._table.extend(number + shift for number in other._table)
        self._row += other._row
        self._line += other._line
        self._contents += other._contents
        self._looses += other._looses
        self._empty += other._empty
        self.num_read += other.num_read

    def name_uniquely(self, bad: BadRows) -> Rows:
        """Give rows of equal texts different ids; rows of equal explicit ids are bad. Return those
        that are left.
        """
        first: dict[str, int] = {}
        times: dict[str, int] = {}
        repeated = set()
        for index, name in enumerate(self.ids):
            if (earlier := first.setdefault(name, index)) == index:
                continue
            if self.split_keys and self.split_keys[index] is not None:
                bad.add(
                    self._example(index),
                    BadRow(f"id {name!r} appears again (first at {self.place(earlier)})", IDS_HINT),
                )
                repeated.add(index)
            else:
                times[name] = times.get(name, 1) + 1
                self.ids[index] = f"{name}#{times[name]}"
        return (
            self.take([index for index in range(len(self)) if index not in repeated])
            if repeated
            else self
        )

    def name_apart(self) -> None:
        """Make ids unique over a mixture: explicit ids carry the position of their source, other
        rows are told apart by content.
        """
        seen: dict[str, int] = {}
        for index, earlier in enumerate(self.ids):
            name = earlier.partition("#")[0]
            if self.split_keys and self.split_keys[index] is not None:
                self.split_keys[index] = name = f"{self.tables[self._table[index]][2]}:{earlier}"
            times = seen[name] = seen.get(name, 0) + 1
            self.ids[index] = name if times == 1 else f"{name}#{times}"

    def examples(self) -> Iterator[Example]:
        """The rows with their texts, read from the files again.

        Raises:
            SettingError: a file changed since the rows were named.
        """
        index, ignored = 0, BadRows()
        while index < len(self):
            number = self._table[index]
            table, reading, _ = self.tables[number]
            for example in reading.examples(table, ignored):
                if example.row == self._row[index]:
                    example.id = self.ids[index]
                    yield example
                    index += 1
                    if index == len(self) or self._table[index] != number:
                        break
            else:
                raise SettingError(
                    "data.source",
                    f"{table.file} changed while it was read",
                    "run the command again",
                )


def _digests(column: bytearray, size: int) -> Iterator[bytes]:
    whole = bytes(column)
    return (whole[start : start + size] for start in range(0, len(whole), size))


def read_data(
    section: DataSection, folders: Sequence[Path], bad: BadRows, *, max_rows: int | None = None
) -> Rows:
    """Read, check and name the rows of all sources; rows that cannot be used are added to `bad`.

    Args:
        folders: where a relative path is looked for.
        max_rows: no more than these of each file.

    Raises:
        DataError: see `sources` and `columns`.
    """
    sources = listed_sources(section)
    rows = Rows()
    for number, source in enumerate(sources):
        tables = load_tables(source, folders, max_rows)
        reading = Reading.of(tables, section.prompt_format, source.columns, section.drop_columns)
        own = Rows()
        before = len(bad.found)
        first: tuple[str, str] | None = None  # the type of the first id, and where it stands
        for table in tables:
            own.tables.append((table, reading, number))
            for example in reading.examples(table, bad):
                if (id := example.explicit_id) is not None:
                    first = first or (type(id).__name__, example.place)
                    if type(id).__name__ != first[0]:
                        bad.add(
                            example,
                            BadRow(
                                f"ids of mixed types: {type(id).__name__} here, {first[0]} at"
                                f" {first[1]}",
                                IDS_HINT,
                            ),
                        )
                        continue
                own.add(example, len(own.tables) - 1)
        own.num_read = len(own) + len(bad.found) - before
        own = own.name_uniquely(bad)
        if unread := unread_files(source, folders):
            rows.unread[source.source] = unread
        rows.extend(own.take(first_in_hash_order(own, source.max_examples, section.split.seed)))
    if len(sources) > 1:
        rows.name_apart()
    return rows


def check_local_rows(
    section: DataSection, folders: Sequence[Path], max_rows: int | None = NUM_CHECKED
) -> list[str]:
    """Read local files as training would, without a tokenizer; data sets on the Hub are not looked
    at.

    Args:
        max_rows: no more than these of each file.

    Returns:
        The files that have more rows.

    Raises:
        DataError: a file is missing or damaged, or one of its rows cannot be used.
    """
    entries = [section.source] if isinstance(section.source, str) else section.source
    local = [
        entry
        for entry, source in zip(entries, listed_sources(section), strict=True)
        if not is_on_hub(source, folders)
    ]
    if not local:
        return []
    bad = BadRows()
    rows = read_data(
        replace(section, source=local),
        folders,
        bad,
        max_rows=None if max_rows is None else max_rows + 1,
    )
    if bad.found and (section.on_bad_row == "error" or not len(rows)):
        raise bad.error(rows.num_read)
    return [] if max_rows is None else rows.files_longer_than(max_rows)


def unit_interval(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on the key and the salt alone.

    Example:
        >>> 0 <= unit_interval("row-1", "42") < 1 and unit_interval("row-1", "42") == unit_interval("row-1", "42")
        True
    """  # noqa: E501
    return int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big") / 2**64


def first_in_hash_order(rows: Rows, limit: int | None, seed: int) -> Sequence[int]:
    """Positions of the `limit` rows that come first in hash order, in file order.

    The salt differs from the split's, so that the chosen rows fall on all sides.
    """
    if limit is None or len(rows) <= limit:
        return range(len(rows))
    order = sorted(
        range(len(rows)),
        key=lambda i: (unit_interval(rows.split_key(i), f"order:{seed}"), rows.ids[i]),
    )
    return sorted(order[:limit])


def is_empty(example: Example) -> bool:
    """Whether the text that the example should teach is empty."""
    fields = example.fields
    for name in ("response", "completion", "text"):
        if isinstance(fields.get(name), str):
            return not fields[name].strip()
    messages = fields.get("messages") or fields.get("completion") or []
    return not any(
        message["content"].strip() for message in messages if message["role"] == "assistant"
    )


def _loose_text(example: Example) -> str:
    """Text as compared for near duplicates: no case, one space between words."""
    parts = []
    for name, value in example.fields.items():
        text = (
            value
            if isinstance(value, str)
            else "\n".join(f"{m['role']}: {m['content']}" for m in value)
        )
        parts.append(f"{name} {text}")
    return " ".join("\n".join(parts).casefold().split())
