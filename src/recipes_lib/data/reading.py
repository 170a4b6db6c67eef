"""All rows of a recipe: read from its sources, checked, named, selected and split."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import SFT, DataSection, Recipe, SourcePart, Stage
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import shown_path
from recipes_lib.data.columns import fields_by_format, map_columns, stage_hint
from recipes_lib.data.errors import BadRows, SettingError, place
from recipes_lib.data.readers import read_file
from recipes_lib.data.rows import DataRow, content_hash
from recipes_lib.data.sources import (
    listed_sources,
    load_rows,
    needs_hub,
    source_files,
    source_hashes,
)
from recipes_lib.data.splits import TRAIN, first_in_hash_order, split_rows


@dataclass(frozen=True)
class Rows:
    """The usable rows of all sources in file order."""

    rows: list[DataRow]  # their ids are unique
    sources: list[SourcePart]
    num_read: int  # rows in the files, those that cannot be used included
    notes: list[str]  # about columns that are not read


def read_data(section: DataSection, bad: BadRows, stage: Stage = SFT) -> Rows:
    """Read, check and name the rows of all sources; those that cannot be used go to `bad`."""
    rows: list[DataRow] = []
    notes: list[str] = []
    num_read = 0
    sources = listed_sources(section)
    for number, source in enumerate(sources):
        num_bad = len(bad)
        read = load_rows(source, bad)
        num_read += len(read) + len(bad) - num_bad
        if not read:
            raise bad.error() if bad else SettingError("data.source", f"0 rows in {source.source}")
        usable, unread = map_columns(read, section, source.columns or {}, bad, stage)
        for line in unread:
            notes.append(f"{source.source}: {line}" if len(sources) > 1 else line)
        for row in usable:
            row.source = number
            row.content = content_hash(row.fields)
        most = min(len(usable), source.max_examples or len(usable))
        taken = round(most * min(source.weight, 1))  # more than all of them: `prepare` repeats
        rows += first_in_hash_order(usable, max(taken, 1), section.split.seed)
    times = Counter[str]()
    for row in rows:  # ids are labels: the file's or a hash, numbered where they repeat
        row.id = row.id or row.content[:8].hex()
        times[row.id] += 1
        while times[row.id] > 1:  # a numbered one may be the name of another row
            row.id += f"#{times[row.id]}"
            times[row.id] += 1
    used = first_in_hash_order(rows, section.max_examples, section.split.seed)
    return Rows(rows=used, sources=sources, num_read=num_read, notes=notes)


def train_rows(recipe: Recipe, files: object = None) -> list[DataRow]:
    """Return the usable rows that train, without a tokenizer, and so before `max_tokens`; an error
    where the files are not those that a run recorded (`source_hashes`).
    """
    section = recipe.data
    if files is not None and source_hashes(section) != files:
        raise DataError("the data has changed since the run was trained")
    return split_rows(read_data(section, BadRows(), recipe.stage).rows, section.split)[TRAIN]


def check_rows(recipe: Recipe, most_bytes: int | None = None) -> list[DataError]:
    """Return the errors in rows that are all in local files, without a tokenizer; of files larger
    than `most_bytes` only whether they are there.
    """
    section = recipe.data
    bad = BadRows()
    try:
        if needs_hub(section):
            return []
        files = [file for part in listed_sources(section) for file in source_files(part)]
        if most_bytes is not None and sum(file.stat().st_size for file in files) > most_bytes:
            return []
        read = read_data(section, bad, recipe.stage)
        if bad and (section.on_bad_row == "error" or not read.rows):
            raise bad.error(read.num_read)
        if len(read.sources) == 1:  # of a mixture, rows may repeat
            split_rows(read.rows, section.split, recipe.run.global_batch_size or 1)
    except DataError as error:
        return [place(recipe, error)]
    return []


def first_local_row(source: str, split: str) -> dict[str, Any] | None:
    """Return the columns of the first row of a file or folder; None where there is none here."""
    if not Path(source).expanduser().exists():
        return None
    for file in source_files(SourcePart.model_construct(source=source, source_split=split)):
        for row in read_file(file, BadRows()):
            return row.fields
    return None


def formats_of(
    data: Path, columns: Mapping[Any, str] | None = None, stage: Stage = SFT
) -> tuple[str, ...]:
    """Return the prompt formats that can read the first row of a file or folder, best first.
    `columns` are our names -> the file's, where the user has said them.
    """
    file = source_files(SourcePart.model_construct(source=str(data), source_split=TRAIN))[0]
    bad = BadRows()
    rows = read_file(file, bad)
    if bad and not rows:
        raise bad.error()
    if not rows:
        raise DataError("the file has no rows", file=shown_path(file))
    names = list(rows[0].fields)
    formats = tuple(fields_by_format(columns or {}, names, stage)[1])
    if not formats:
        what = f"columns {', '.join(names) or '(none)'} are not understood"
        hints = ["say which is which: data.columns={instruction: NAME, response: NAME}"]
        hints += ["docs/data.md lists the known names", *stage_hint(names, stage)]
        raise DataError(what, *hints, file=shown_path(file), line=1)
    return formats
