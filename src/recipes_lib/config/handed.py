"""Files as they were when jobs were submitted: one JSON file that their processes read in place of
YAML, prompts and templates; what it does not hold they read where it lies. Warnings were said when
it was written.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from recipes_lib.config.kinds import KINDS
from recipes_lib.config.loader import Document, Origin
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.json_files import DamagedFile, Row, read_object

HANDED_FILES = "RECIPES_HANDED_FILES"
FILES_FILE = "files.json"
_REMEDY = "submit the jobs again: recipes launch"


@dataclass
class Files:
    """YAML documents that passed their check, and texts, both as JSON has them."""

    documents: dict[str, Row] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def add_texts(self, *paths: Path) -> None:
        """Add text files; one that is not there or no text is the error of who reads it."""
        for path in paths:
            try:
                self.texts[_key(path)] = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue

    def write(self, path: Path) -> None:
        """Write them for other processes."""
        write_json(path, {"documents": self.documents, "texts": self.texts})


_recorded: list[Files] = []


@contextmanager
def recording() -> Iterator[Files]:
    """Note every document that is loaded until the block ends."""
    _recorded.append(Files())
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()


def note(document: Document, overrides: Sequence[str]) -> None:
    """Note a document that passed its check, where somebody records."""
    for files in _recorded:
        files.documents[_key(document.path, *overrides)] = {
            "path": str(document.path),
            "kind": document.kind.name,
            "values": document.values,
            "origins": [[list(key), str(at)] for key, at in document.origins.items()],
            "text": document.text,
        }


def handed_document(path: str | Path, overrides: Sequence[str]) -> Document | None:
    """Return a document as it was handed to this process; None where it was not.

    Raises:
        DamagedFile: the file that holds it is not what was written.
    """
    place = os.environ.get(HANDED_FILES, "")
    try:
        stored = _handed(place).documents.get(_key(path, *overrides))
        if stored is None:
            return None
        (kind,) = (one for one in KINDS if one.name == stored["kind"])
        origins = {tuple(key): Origin.of(at) for key, at in stored["origins"]}
        values, text = stored["values"], stored["text"]
        return Document(Path(stored["path"]), kind, values, origins=origins, text=text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"is damaged, or of another version: {type(error).__name__}: {error}"
        raise DamagedFile(what, _REMEDY, file=place) from None


def handed_text(path: str | Path) -> str | None:
    """Return a text file as it was handed to this process, its line ends as they were; None where
    it was not.
    """
    return _handed(os.environ.get(HANDED_FILES, "")).texts.get(_key(path))


def read_text(path: str | Path) -> str:
    """Return a text file, as it was handed to this process where it was.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no UTF-8.
    """
    text = handed_text(path)
    if text is None:
        return Path(path).read_text(encoding="utf-8")
    return io.StringIO(text, newline=None).read()


def _key(path: str | Path, *overrides: str) -> str:
    return "\n".join([os.path.abspath(path), *overrides])  # noqa: PTH100 (resolve follows links)


@lru_cache(maxsize=1)
def _handed(place: str) -> Files:
    if not place:
        return Files()
    stored = read_object(Path(place), _REMEDY)
    if not stored:
        raise DamagedFile("is not there", _REMEDY, file=place)
    return Files(**stored)
