"""Where rows come from: a local file, a folder, a Hub data set, or a mixture of these. A local
path wins over a Hub id of the same name.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.documents import near_file
from recipes_lib.config.recipe import DATA_FORMATS, HUB_ID, DataSection, SourcePart, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.errors import BadRows, SettingError
from recipes_lib.data.readers import read_file, without_nulls
from recipes_lib.data.rows import DataRow

if TYPE_CHECKING:
    from datasets import Dataset


def listed_sources(section: DataSection) -> list[SourcePart]:
    """Return the sources that `data.source` names, with all of their keys; a single one is a
    mixture of one.
    """
    for key in ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss"):
        is_set = getattr(section, key) != DataSection.model_fields[key].default
        if is_set and section.prompt_format != "chat":
            what = f"data.{key} works only in prompt_format chat, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    shared = section.model_dump(include={"subset", "source_split", "revision"})
    sources = []
    for part in [section.source] if isinstance(section.source, str) else section.source:
        keys: dict[str, Any] = {"source": part}
        columns = section.columns
        if isinstance(part, SourcePart):
            keys = part.model_dump(exclude_none=True)
            columns = columns | (part.columns or {})
        keys = shared | keys | {"columns": columns}
        sources.append(SourcePart.model_construct(**keys))
    return sources


def is_on_hub(source: SourcePart) -> bool:
    """Return whether no file or folder has a source's name, and it is not named like a file."""
    path = Path(source.source).expanduser()
    return not (path.exists() or data_format(path)) and bool(HUB_ID.fullmatch(source.source))


def needs_hub(section: DataSection) -> bool:
    """Return whether some of the rows are on the Hub."""
    return any(map(is_on_hub, listed_sources(section)))


def load_rows(source: SourcePart, bad: BadRows | None = None) -> list[DataRow]:
    """Return the rows of one source, as `read_file` returns them."""
    if not is_on_hub(source):
        rows = []
        for file in source_files(source):
            rows += read_file(file, bad)
        return rows
    numbered = enumerate(map(without_nulls, hub_data_set(source)), 1)
    return [DataRow(f"{source.source} row {number}", None, row) for number, row in numbered]


def source_files(source: SourcePart) -> list[Path]:
    """Return the files of a local source, or raise an error that names the nearest."""
    if "://" in source.source:
        of_hub = re.search(r"(?:huggingface\.co|hf\.co)/datasets/([^/?#]+/[^/?#]+)", source.source)
        hint = "download the file, and set data.source to its path"
        what = f"{source.source} is an address, not a file, folder or Hub id"
        raise SettingError("data.source", what, f"set data.source: {of_hub[1]}" if of_hub else hint)
    path = Path(source.source).expanduser()
    if path.exists():
        return [path] if path.is_file() else data_files(path, source.source_split or "train")
    folder = f"looked in {shown_path(path.parent.resolve())}"
    what = f"no such file or folder: {shown_path(path)}"
    raise SettingError("data.source", what, *near_file(path), folder)


def source_hashes(section: DataSection) -> dict[str, str]:
    """Return the SHA-256 of each local file of a recipe's rows, by its number and name."""
    hashes = {}
    for number, source in enumerate(listed_sources(section), 1):
        files = [] if is_on_hub(source) else source_files(source)
        for file in files:
            hashes[f"data {number} {file.name}"] = remembered_hash(file)
    return hashes


def data_files(folder: Path, split: str) -> list[Path]:
    """Return a folder's data files of a split, as `datasets` tells them by their names."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        what = "the files of datasets' save_to_disk, which are not data files"
        hint = "write the rows as Parquet: datasets.load_from_disk(FOLDER).to_parquet(FILE)"
        raise DataError(what, hint, file=shown_path(folder))
    root = str(folder.resolve())
    kinds = list(DATA_FORMATS)
    try:
        patterns = get_data_patterns(root)
        files = DataFilesDict.from_patterns(patterns, root, allowed_extensions=kinds)
    except OSError:  # there is none
        files = {}
    by_split = {str(name): sorted(map(Path, paths)) for name, paths in files.items() if paths}
    if split not in by_split:
        what = f"no data file of the split '{split}' in this folder"
        hint = f"splits: {', '.join(by_split) or 'none'}; known endings: {', '.join(kinds)}"
        raise DataError(what, hint, file=shown_path(folder))
    return by_split[split]


def hub_data_set(source: SourcePart) -> "Dataset":
    """Return a Hub data set as `datasets` loads it, from its cache where it is offline."""
    import datasets

    name = source.source
    options = {"split": source.source_split, "revision": source.revision}
    try:
        return datasets.load_dataset(name, source.subset, **options)
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        what = f"'{name}' is not a file or folder, nor found on the Hub: {one_line(error)}"
        hint = f"check the name (private: hf auth login), or put a file at {name}/train.jsonl"
        raise SettingError("data.source", what, hint) from error
