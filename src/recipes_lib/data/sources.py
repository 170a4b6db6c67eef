"""Where the rows come from: a local file, a folder, a Hub data set, or a mixture of these. A local
path wins over a Hub id of the same name.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.sections import DATA_FORMATS, HUB_ID, DataSection, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import refuse_pipe, remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import RESERVED, RESERVED_HINT
from recipes_lib.data.files import Table, read_file
from recipes_lib.data.rows import SettingError, listed, shown_real_path, type_name

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


# What an entry of a mixture may say, and of which type; what it leaves out comes from `data`.
_TEXTS = ("source", "subset", "source_split", "revision", "encoding", "delimiter")
_TYPES: dict[str, type] = {
    **dict.fromkeys(_TEXTS, str),
    "columns": dict,
    "max_examples": int,
    "weight": float,
}
_OF_ENTRY = ("source", "max_examples", "weight")  # have no place in `data` itself
_OF_CHAT = ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss")


def listed_sources(section: DataSection) -> list[Source]:
    """Return the sources that `data.source` names.

    Raises:
        SettingError: an entry of a mixture has an unknown key or a value of the wrong type, or a
            key that only `chat` reads is set with another prompt format.
    """
    if not section.source:
        empty = "the mixture is empty: list at least one source"
        raise SettingError("data.source", empty if section.source == [] else "is empty")
    for name in sorted(RESERVED & section.chat_template_kwargs.keys()):
        key = "data.chat_template_kwargs"
        raise SettingError(key, f"{key}: {name} is no template argument", RESERVED_HINT)
    absent = DataSection(source="")
    for key in _OF_CHAT if section.prompt_format != "chat" else ():
        if getattr(section, key) != getattr(absent, key):
            what = f"data.{key} acts in prompt_format chat alone, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    shared = [name for name in _TYPES if name not in _OF_ENTRY]
    whole = Source(source="", **{name: getattr(section, name) for name in shared})
    entries = [section.source] if isinstance(section.source, str) else section.source
    sources = [_mixture_entry(entry, index, whole) for index, entry in enumerate(entries)]
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


def _mixture_entry(entry: Any, index: int, whole: Source) -> Source:
    key = f"data.source[{index}]"
    if isinstance(entry, str):
        return replace(whole, source=entry)
    if not isinstance(entry, Mapping):
        what = f"{key}: expected a mapping with `source`, found {type_name(entry)}"
        raise SettingError("data.source", what)
    for name, value in entry.items():
        if name not in _TYPES:
            hints = did_you_mean(str(name), _TYPES) or [f"keys: {', '.join(_TYPES)}"]
            raise SettingError("data.source", f"unknown key '{name}' in {key}", *hints)
        if name == "weight":
            is_right = isinstance(value, int | float) and 0 < value < math.inf
        else:
            is_right = isinstance(value, _TYPES[name])
            is_right = is_right and not (isinstance(value, int) and value < 1)
        if not is_right or isinstance(value, bool):
            expected = "a number above 0" if name == "weight" else _TYPES[name].__name__
            what = f"{key}.{name}: expected {expected}, found {value!r}"
            raise SettingError("data.source", what)
    if "source" not in entry:
        raise SettingError("data.source", f"{key} names no `source`")
    return replace(whole, **{**entry, "columns": {**whole.columns, **entry.get("columns", {})}})


def is_on_hub(source: Source) -> bool:
    """Return whether nothing here has a source's name, and it is not named like a file."""
    is_here = find_path(source.source) is not None or data_format(Path(source.source))
    return not is_here and bool(HUB_ID.fullmatch(source.source))


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
        return [_load_from_hub(source)]
    tables = [
        read_file(file, max_rows, encoding=source.encoding, delimiter=source.delimiter)
        for file in source_files(source)
    ]
    first = tables[0]
    for table in tables[1:]:
        if table.columns and first.columns and {*table.columns} != {*first.columns}:
            name = min({*table.columns} ^ {*first.columns})
            where = first.file if name in table.columns else table.file
            what = f"column '{name}' is not in {where}"
            hint = "give files of other columns as sources of their own: data.source: [...]"
            raise DataError(what, hint, file=table.file)
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
        found = sorted(place.glob("[!.]*"))
        files = files or [path for path in found if data_format(path) and path.name not in NOT_DATA]
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
        have = listed(sorted(set(splits.values())))
        what = f"{shown} has no file of the split '{split}'; splits: {have}"
        raise SettingError("data.source_split", what)
    return wanted or rest


def _load_from_hub(source: Source) -> Table:
    """Read a Hub data set through `datasets`, from its cache where the Hub does not answer."""
    import datasets

    name = source.source
    is_offline = offline_by_environment() or not hub_answers()
    try:
        with _offline_mode(is_offline):
            found = datasets.load_dataset(
                name, source.subset, split=source.source_split, revision=source.revision
            )
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        missing = isinstance(error, datasets.exceptions.DatasetNotFoundError)
        if is_offline and not isinstance(error, ValueError):
            what = f"offline, and '{name}' is no file or folder here and not in the Hub's cache"
            hint = f"put a file at {name}/train.jsonl, or set data.source to a path"
        elif missing or "Repository Not Found" in str(error):
            what = f"the Hub has no data set '{name}', or it is not open to you"
            hint = "check the name; for a private or gated data set: hf auth login"
        else:
            what, hint = f"cannot load '{name}' from the Hub: {one_line(error)}", ""
        raise SettingError("data.source", what, *filter(None, [hint])) from error
    return Table(name, [(None, row) for row in found], columnar=True)


def offline_by_environment() -> bool:
    """Return whether a variable tells the Hub's libraries to stay offline."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def hub_answers() -> bool:
    """Return False only where no connection to the Hub can be made, tried twice: its client would
    try for 46 seconds. A slow answer, a proxy's or a certificate's refusal is for the client to
    tell: none of them means offline.
    """
    from huggingface_hub import constants, get_session

    for timeout in (3.0, 15.0):
        try:
            get_session().head(constants.ENDPOINT, timeout=timeout)
        except Exception as error:
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if not kinds & {"ConnectError", "ConnectTimeout"} or "CERTIFICATE" in str(error):
                return True
        else:
            return True
    return False


@contextmanager
def _offline_mode(is_offline: bool) -> Iterator[None]:
    """Tell the Hub's client for a moment not to try the network."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if is_offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
