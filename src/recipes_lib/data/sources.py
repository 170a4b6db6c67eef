"""Where the rows come from: a local file, a folder, a Hub data set, or a mixture of these. A local
path wins over a Hub id of the same name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.sections import DATA_FORMATS, HUB_ID, DataSection, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import refuse_pipe, remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import RESERVED, RESERVED_HINT
from recipes_lib.data.files import Table, read_file
from recipes_lib.data.rows import SettingError, listed, shown_real_path

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_IN_NAME = re.compile(
    r"(?:^|[-_.])(train|training|test|testing|validation|valid|val|dev|eval)(?=[-_.]|$)"
)
SPLIT_NAMES = {
    "training": "train",
    "testing": "test",
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}
# Files that `datasets` writes beside the rows.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
_OF_CHAT = ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture; a single `data.source` is a mixture of one.

    Args:
        weight: how often an epoch has its training rows; below 1, the share of its rows that is
            read at all.
    """

    source: str
    subset: str | None = None
    source_split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str]
    encoding: str = "utf-8"
    delimiter: str | None = None
    max_examples: int | None = None
    weight: float = 1

    def num_taken(self, num_rows: int) -> int:
        """Return how many of its rows are used.

        Example:
            >>> Source(source="a", columns={}, weight=0.5, max_examples=30).num_taken(100)
            15
        """
        return round(min(num_rows, self.max_examples or num_rows) * min(self.weight, 1))


def listed_sources(section: DataSection) -> list[Source]:
    """Return the sources that `data.source` names.

    Raises:
        SettingError: no source, an unknown encoding, or a key that only `chat` reads is set with
            another prompt format.
    """
    if not section.source:
        raise SettingError("data.source", "is empty: name at least one source")
    for name in sorted(RESERVED & section.chat_template_kwargs.keys()):
        key = "data.chat_template_kwargs"
        raise SettingError(key, f"{key}: {name} is no template argument", RESERVED_HINT)
    absent = DataSection(source="")
    for key in _OF_CHAT if section.prompt_format != "chat" else ():
        if getattr(section, key) != getattr(absent, key):
            what = f"data.{key} acts in prompt_format chat alone, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    shared = ("subset", "source_split", "revision", "columns", "encoding", "delimiter")
    whole = Source(source="", **{name: getattr(section, name) for name in shared})
    sources = []
    for entry in [section.source] if isinstance(section.source, str) else section.source:
        keys: dict[str, Any] = {"source": entry} if isinstance(entry, str) else dict(entry)
        keys["columns"] = {**whole.columns, **(keys.get("columns") or {})}
        sources.append(replace(whole, **keys))
    for source in sources:
        try:
            "".encode(source.encoding)
        except (LookupError, ValueError):
            what = f"data.encoding: Python knows no text encoding {source.encoding!r}"
            hint = "common ones: utf-8, latin-1, cp1252, utf-16"
            raise SettingError("data.encoding", what, hint) from None
        if source.delimiter is not None and len(source.delimiter) != 1:
            what = f"data.delimiter: expected one character, found {source.delimiter!r}"
            raise SettingError("data.delimiter", what)
    return sources


def is_on_hub(source: Source) -> bool:
    """Return whether no file or folder has a source's name, and it is not named like a file."""
    is_local = find_path(source.source) is not None or data_format(Path(source.source))
    return not is_local and bool(HUB_ID.fullmatch(source.source))


def find_path(name: str) -> Path | None:
    """Return the file or folder `name`; None where there is none, as for a Hub id."""
    path = Path(name).expanduser()
    return path if path.exists() else None


def load_tables(source: Source, max_rows: int | None = None) -> list[Table]:
    """Return the rows of one source, at most `max_rows` of each file.

    Raises:
        DataError: the file, folder or data set is missing or damaged, or its files have different
            columns.
    """
    if is_on_hub(source):
        rows = [(None, dict(row)) for row in hub_data_set(source)]
        return [Table(source.source, list(rows), columnar=True)]
    tables = [
        read_file(file, max_rows, encoding=source.encoding, delimiter=source.delimiter)
        for file in source_files(source)
    ]
    first = tables[0]
    for table in tables[1:]:
        if table.columns and first.columns and {*table.columns} != {*first.columns}:
            what = f"columns are {', '.join(table.columns)}, but {', '.join(first.columns)}"
            hint = "give files of other columns as sources of their own: data.source: [...]"
            raise DataError(f"{what} in {first.file}", hint, file=table.file)
    return tables


def source_files(source: Source) -> list[Path]:
    """Return the files of a local source.

    Raises:
        DataError: there is nothing of this name, or no data file of the split in the folder.
    """
    if (path := find_path(source.source)) is not None:
        return [path] if path.is_file() else data_files(path, source.source_split)
    path = Path(source.source).expanduser()
    parent = path.parent.resolve()
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    hints = [f"looked in {shown_real_path(parent)}"]
    if near := difflib.get_close_matches(path.name, names, 1):
        hints.insert(0, f"did you mean {shown_path(path.with_name(near[0]))}?")
    raise SettingError("data.source", f"no such file or folder: {shown_path(path)}", *hints)


def source_hashes(section: DataSection) -> dict[str, str]:
    """Return the SHA-256 of each local file that a recipe's rows come from, by its number and name;
    a data set of the Hub is known by name and revision alone.

    Raises:
        DataError: a source is missing.
    """
    return {
        f"data {number} {file.name}": remembered_hash(file)
        for number, source in enumerate(listed_sources(section), 1)
        if not is_on_hub(source)
        for file in source_files(source)
    }


def data_files(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder in name order; those of `split` where names tell splits
    apart.

    Raises:
        DataError: the folder has no data file, or none of this split.
    """
    shown = shown_real_path(folder)
    refuse_pipe(folder, shown)
    files: list[Path] = []
    for place in (folder, folder / split, folder / "data"):
        paths = sorted(place.glob("[!.]*"))
        files = files or [path for path in paths if data_format(path) and path.name not in NOT_DATA]
    if not files:
        what = f"no data file in this folder; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what, file=shown)
    splits = {
        path: SPLIT_NAMES.get(match.group(1), match.group(1))
        for path in files
        if (match := SPLIT_IN_NAME.search(path.name.lower()))
    }
    wanted = [path for path in files if splits.get(path) == SPLIT_NAMES.get(split, split)]
    rest = [path for path in files if path not in splits]
    if not wanted and not rest:
        splits_listed = listed(sorted(set(splits.values())))
        what = f"{shown} has no file of the split '{split}'; splits: {splits_listed}"
        raise SettingError("data.source_split", what)
    return wanted or rest


def hub_data_set(source: Source) -> Dataset:
    """Return a Hub data set as `datasets` loads it, from its cache where it is offline.

    Raises:
        SettingError: it is neither on the Hub nor in the cache, or not open to the user.
    """
    import datasets

    name = source.source
    try:
        return datasets.load_dataset(
            name, source.subset, split=source.source_split, revision=source.revision
        )
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        what = f"cannot load '{name}' from the Hub: {one_line(error)}"
        hint = "check the name; for a private or gated data set: hf auth login"
        if offline_by_environment():
            what = f"offline, and '{name}' is no file or folder here and not in the Hub's cache"
            hint = f"put a file at {name}/train.jsonl, or set data.source to a path"
        raise SettingError("data.source", what, hint) from error


def offline_by_environment() -> bool:
    """Return whether a variable tells the Hub's libraries to stay offline."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def hub_answers() -> bool:
    """Return False only where no connection to the Hub can be made, which its client would try for
    46 seconds. A slow answer, a proxy's or a certificate's refusal is for the client to tell.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=15)
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        return not kinds & {"ConnectError", "ConnectTimeout"} or "CERTIFICATE" in str(error)
    return True
