"""Where the rows come from: a local file, a folder, a Hub data set, or a mixture of these.

A local path always wins over a Hub id of the same name. Nothing is downloaded when the machine is
offline: a data set that is not in the cache is one clear error.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import refuse_pipe
from recipes_lib.data.examples import SettingError, listed, shown_real_path, type_name
from recipes_lib.data.files import (
    COLUMNAR_ROWS,
    DATA_FORMATS,
    Numbered,
    Table,
    data_format,
    read_file,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SPLIT_IN_NAME = re.compile(
    r"(?:^|[-_.])(train|training|test|testing|validation|valid|val|dev|eval)(?=[-_.]|$)"
)
SPLIT_NAMES = {
    "training": "train",
    "testing": "test",
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}
NOTES = {"", ".md", ".py"}  # a README, a licence, the script that made the data
MOST_UNREAD = 1000
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture; a single `data.source` is a mixture of one."""

    source: str
    subset: str | None = None
    source_split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str]
    encoding: str = "utf-8"
    delimiter: str | None = None
    max_examples: int | None = None


def listed_sources(section: DataSection) -> list[Source]:
    """The sources that `data.source` names.

    Raises:
        SettingError: an entry of a mixture has an unknown key or a value of the wrong type.
    """
    shared = ("subset", "source_split", "revision", "columns", "encoding", "delimiter")
    whole = Source(source="", **{name: getattr(section, name) for name in shared})
    if not section.source:
        raise SettingError(
            "data.source",
            "the mixture is empty: list at least one source"
            if section.source == []
            else "is empty",
        )
    settings = {"chat_template": section.chat_template, "system_prompt": section.system_prompt}
    for key, value in {
        **settings,
        "chat_loss": None if section.chat_loss == "all" else section.chat_loss,
    }.items():
        if value is not None and section.prompt_format != "chat":
            what = f"data.{key} acts in prompt_format chat alone, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    entries = [section.source] if isinstance(section.source, str) else section.source
    sources = [_mixture_entry(entry, index, whole) for index, entry in enumerate(entries)]
    for source in sources:
        try:
            "".encode(source.encoding)
        except (LookupError, ValueError):
            what = f"data.encoding: Python knows no text encoding {source.encoding!r}"
            raise SettingError(
                "data.encoding", what, "common ones: utf-8, latin-1, cp1252, utf-16"
            ) from None
        if source.delimiter is not None and len(source.delimiter) != 1:
            raise SettingError(
                "data.delimiter",
                f"data.delimiter: expected one character, found {source.delimiter!r}",
            )
    return sources


def _mixture_entry(entry: Any, index: int, whole: Source) -> Source:
    key = f"data.source[{index}]"
    if isinstance(entry, str):
        return replace(whole, source=entry)
    if not isinstance(entry, Mapping):
        raise SettingError(
            "data.source", f"{key}: expected a mapping with `source`, found {type_name(entry)}"
        )
    types: dict[str, type] = dict.fromkeys(
        ("source", "subset", "source_split", "revision", "encoding", "delimiter"), str
    )
    types |= {"columns": dict, "max_examples": int}
    for name, value in entry.items():
        if name not in types:
            near = difflib.get_close_matches(str(name), types, 1)
            hint = f"did you mean {near[0]}?" if near else f"keys: {', '.join(types)}"
            raise SettingError("data.source", f"unknown key '{name}' in {key}", hint)
        if (
            isinstance(value, bool)
            or not isinstance(value, types[name])
            or (isinstance(value, int) and value < 1)
        ):
            raise SettingError(
                "data.source", f"{key}.{name}: expected {types[name].__name__}, found {value!r}"
            )
    if "source" not in entry:
        raise SettingError("data.source", f"{key} names no `source`")
    return replace(whole, **{**entry, "columns": {**whole.columns, **entry.get("columns", {})}})


def is_on_hub(source: Source, folders: Sequence[Path]) -> bool:
    """Whether a source can only be a data set on the Hub: nothing here has its name, and it is not
    named like a file.
    """
    here = find_path(source.source, folders) is not None or data_format(Path(source.source))
    return not here and bool(HUB_ID.fullmatch(source.source))


def load_tables(
    source: Source, folders: Sequence[Path], max_rows: int | None = None
) -> list[Table]:
    """The rows of one source, one table per file, all with the same columns.

    Args:
        folders: where a relative path is looked for, in this order.
        max_rows: no more than these of each file.

    Raises:
        DataError: the file, folder or data set is missing, damaged or mixed.
    """
    if is_on_hub(source, folders):
        return [load_from_hub(source)]
    files = source_files(source, folders)
    tables = [
        read_file(file, max_rows, encoding=source.encoding, delimiter=source.delimiter)
        for file in files
    ]
    for table in tables[1:]:
        _check_same_columns(tables[0], table)
    return tables


def source_files(source: Source, folders: Sequence[Path]) -> list[Path]:
    """The files of a local source.

    Raises:
        DataError: there is nothing of this name, or no data file of the split in the folder.
    """
    path = find_path(source.source, folders)
    if path is None:
        raise SettingError(
            "data.source",
            f"no such file or folder: {source.source}",
            *_similar(source.source, folders),
        )
    return [path] if path.is_file() else data_files(path, source.source_split)


def find_path(name: str, folders: Sequence[Path]) -> Path | None:
    """The existing file or folder that `name` means, looked for in `folders` and the working
    directory.
    """
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [folder / path for folder in (*folders, Path.cwd())]
    return next((place for place in places if place.exists()), None)


def data_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder in name order; only those of `split` where file names tell splits
    apart.

    Raises:
        DataError: the folder has no data file, or none of this split.
    """
    refuse_pipe(folder, shown_real_path(folder))
    for place in (folder, folder / split, folder / "data"):
        files = [
            path
            for path in sorted(place.glob("[!.]*"))
            if data_format(path) and path.name not in NOT_DATA
        ]
        if files:
            break
    else:
        raise DataError(
            f"no data file in this folder; known endings: {', '.join(DATA_FORMATS)}",
            file=shown_real_path(folder),
        )
    named = {
        path: match.group(1) for path in files if (match := SPLIT_IN_NAME.search(path.name.lower()))
    }
    named = {path: SPLIT_NAMES.get(name, name) for path, name in named.items()}
    wanted = [path for path in files if named.get(path) == SPLIT_NAMES.get(split, split)]
    rest = [path for path in files if path not in named]
    if not wanted and not rest:
        splits = listed(sorted(set(named.values())))
        raise SettingError(
            "data.source_split",
            f"{shown_real_path(folder)} has no file of the split '{split}'; splits: {splits}",
        )
    return wanted or rest


def unread_files(source: Source, folders: Sequence[Path]) -> list[str]:
    """What else lies in the folder of a source: files of other splits, of unknown formats, in
    folders below. Notes are left out.
    """
    folder = None if is_on_hub(source, folders) else find_path(source.source, folders)
    if folder is None or folder.is_file():
        return []
    read = set(data_files(folder, source.source_split))
    others = (
        path
        for path in folder.rglob("*")
        if path not in read and path.name not in NOT_DATA and path.suffix.lower() not in NOTES
    )
    names = (path.relative_to(folder) for path in others if path.is_file())
    return sorted(
        str(name)
        for name in islice(names, MOST_UNREAD)
        if not any(part.startswith(".") for part in name.parts)
    )


def _check_same_columns(first: Table, other: Table) -> None:
    for column in other.columns:
        if column not in first.columns and first.columns:
            hint = f"there the columns are {', '.join(first.columns)}"
            raise DataError(f"column '{column}' is not in {first.file}", hint, file=other.file)
    for column in first.columns:
        if column not in other.columns and other.columns:
            hint = f"here the columns are {', '.join(other.columns)}"
            raise DataError(f"column '{column}' of {first.file} is missing", hint, file=other.file)


def _similar(name: str, folders: Sequence[Path]) -> list[str]:
    """Hints that name files like the one that was not found, and the folders that were searched."""
    path = Path(name).expanduser()
    parents = {(folder / path).parent.resolve() for folder in (*folders, Path.cwd())}
    names = {entry.name for parent in parents if parent.is_dir() for entry in parent.iterdir()}
    near = difflib.get_close_matches(path.name, sorted(names), 3)
    looked = f"looked in {', '.join(sorted(shown_real_path(parent) for parent in parents))}"
    return [*([f"did you mean {path.with_name(near[0])}?"] if near else []), looked]


def load_from_hub(source: Source) -> Table:
    """Read a Hub data set through `datasets`, from its cache when the machine is offline.

    Raises:
        DataError: offline and not cached, no such data set, configuration or split, or access
            refused.
    """
    offline = offline_by_environment()
    if offline and not _perhaps_cached(source.source):
        raise _offline_error(source.source)
    import datasets

    offline = offline or not hub_answers()
    try:
        with _offline_mode(offline):
            dataset = datasets.load_dataset(
                source.source, source.subset, split=source.source_split, revision=source.revision
            )
    except Exception as error:
        # the Hub client has many exception types; each becomes one line with the client's own words
        if offline and not isinstance(error, ValueError):
            raise _offline_error(source.source) from error
        if "Repository Not Found" in str(error) or isinstance(
            error, datasets.exceptions.DatasetNotFoundError
        ):
            hint = "check the name; for a private or gated data set: hf auth login"
            raise SettingError(
                "data.source",
                f"the Hub has no data set '{source.source}', or it is not open to you",
                hint,
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            "data.source", f"cannot load '{source.source}' from the Hub: {reason}"
        ) from error

    def rows() -> Numbered:
        for batch in dataset.with_format("arrow").iter(COLUMNAR_ROWS):
            yield from ((None, row) for row in batch.to_pylist())

    return Table(source.source, rows, dataset.column_names)


def _offline_error(name: str) -> SettingError:
    what = f"offline: put a file at {name}/train.jsonl or set data.source to a path"
    return SettingError(
        "data.source",
        what,
        f"'{name}' is neither a file or folder here nor in the cache of Hub data sets",
    )


def offline_by_environment() -> bool:
    """Whether a variable tells the Hub's libraries to stay offline."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def _perhaps_cached(name: str) -> bool:
    """Whether a cache folder of this data set exists, found without importing `datasets` (which
    takes a second).
    """
    home = Path(
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    )
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    downloaded = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return (prepared / name.replace("/", "___")).exists() or (
        downloaded / f"datasets--{name.replace('/', '--')}"
    ).exists()


def hub_answers() -> bool:
    """Whether the Hub can be reached at all: one request with a short time limit, through the
    user's proxy if there is one.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
    except (
        Exception
    ):  # any failure to connect means the same: use the cache, or say that we are offline
        return False
    return True


@contextmanager
def _offline_mode(offline: bool) -> Iterator[None]:
    """Tell the Hub client for a moment not to try the network, which would retry for minutes."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = (
        before[0] or offline,
        before[1] or offline,
    )
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
