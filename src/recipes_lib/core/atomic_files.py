"""Files and folders that are either whole or absent: written beside their place, flushed to the
disk, then renamed.

A rename reaches the disk before the bytes it names, unless those were flushed first: after a power
cut the name is there and the file is full of zeros. So whatever gets its final name by a rename
gets it here, from `write_bytes` or `publish`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing
    between.

    Raises:
        OSError: the disk is full or not writable; the old file is untouched and no temporary file
            stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with (
            named_in_errors(path),
            # created as any file is, so that the user's umask decides who may read it
            temporary.open("xb") as stream,
        ):
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not say which it is: a write that fails does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, keys in the order given, one final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish(scratch: Path, final: Path, replace: bool = True) -> None:
    """Give a finished folder its final name, once everything in it is on the disk.

    A crash leaves the old folder, the new one, or neither, never a mixture; the next `publish`
    removes what it left behind.

    Args:
        scratch: the folder, beside `final` on the same file system.
        final: its name; an empty folder of that name is replaced in any case.
        replace: whether a folder that has something in it is replaced too.

    Raises:
        OSError: the disk is full or not writable, or `final` has something in it and is not to be
            replaced.
    """
    sync_tree(scratch)
    old = final.with_name(f".{final.name}.replaced")
    if replace:
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
    os.replace(scratch, final)
    sync(final.parent)
    if replace:
        shutil.rmtree(old, ignore_errors=True)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files below `folder` by name, several read at a time."""
    names = list(names)
    # hashing lets other threads run
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashes = pool.map(file_hash, [folder / name for name in names])
        return dict(zip(names, hashes, strict=True))


def sync_tree(folder: Path) -> None:
    """Flush every file and every folder below `folder`, and `folder` itself, to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
