"""The cache of prepared rows: a folder is read only while every file in it has the SHA-256 with
which it was written.

    rows/KEY/lock           held by the process that makes the rows
    rows/KEY/data/          the rows, named when all of it is on the disk
    rows/KEY/data/SEAL      the SHA-256 of every other file in it, and of this list
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from recipes_lib.core.errors import DataError, one_line, print_error
from recipes_lib.core.files import file_hash, hash_of, object_or_none, publish, write_json
from recipes_lib.core.project import cache_root, shown_path
from recipes_lib.data.errors import listed

SEAL = "files.json"


def folder_of(key: str) -> Path:
    """Return the folder of the rows that have this key, whether they are there or not."""
    return cache_root() / "rows" / key / "data"


def keep_rows(key: str, make: Callable[[Path], None]) -> None:
    """Have whole rows in `folder_of(key)`: check what is there, and `make` what is missing or
    damaged; an error where it cannot, as on a read-only disk. `key` is a hash of all that decides
    the rows, and `make` writes them into an empty folder, the same bytes at every call.
    """
    folder = folder_of(key)
    # Without the lock first: checking writes nothing, and a cache may be read-only.
    damaged = find_damage(folder)
    if folder.exists() and not damaged:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "lock"):  # arms of a study start at the same time
            damaged = find_damage(folder)
            if folder.exists() and not damaged:
                return
            # made beside its place, so that the folder is whole when it has its name
            scratch = folder.with_name("unfinished")
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            scratch.mkdir()
            make(scratch)
            files = sorted(path for path in scratch.rglob("*") if path.is_file())
            hashes = {path.relative_to(scratch).as_posix(): file_hash(path) for path in files}
            write_json(scratch / SEAL, {"files": hashes, "sha256": hash_of(hashes)})
            publish(scratch, folder)
    except OSError as error:
        if not damaged:
            raise
        what = f"these prepared rows are damaged ({listed(damaged, 3)})"
        raise DataError(
            f"{what}, and cannot be made again: {one_line(error)}",
            "delete this folder, or set RECIPES_CACHE to another one that can be written",
            file=shown_path(folder),
        ) from error
    if damaged:
        what = f"prepared rows were damaged ({listed(damaged, 3)})"
        print_error(f"warning: {shown_path(folder)}: {what}; they were made again")


def find_damage(folder: Path) -> list[str]:
    """Return the files of a folder that are missing or not as they were written; the whole folder
    is read. An absent folder has none.
    """
    if not folder.exists():
        return []
    seal = object_or_none(folder / SEAL) or {}
    hashes = seal.get("files")
    if not isinstance(hashes, dict) or seal.get("sha256") != hash_of(hashes):
        return [SEAL]
    missing = [name for name in hashes if not (folder / name).is_file()]
    return missing or [name for name in hashes if file_hash(folder / name) != hashes[name]]
