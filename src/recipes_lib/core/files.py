"""Files that are either whole or absent, and the one reader and writer of JSON and JSON lines.

A rename reaches the disk before the bytes it names, unless those were flushed first: after a power
cut the name is there and the file is full of zeros. So every final name is given here, by
`write_bytes` or `publish`.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import DataError, RecipesError
from recipes_lib.core.project import cache_root

Row = dict[str, Any]
_NOT_TEXT = re.compile("[\ud800-\udfff\x00]")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: on an error, which names the file, the old one is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: another process may be writing the same file
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("xb") as stream:  # so that the user's umask decides who may read it
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a write that fails does not say it
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, keys in the order given, one final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish(scratch: Path, final: Path) -> None:
    """Name a folder that is on the disk with all in it; a crash leaves the old, the new or none."""
    sync_tree(scratch)
    old = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(scratch, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and every folder below `folder`, and `folder` itself, to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in (*names, "."):
            sync(Path(parent, name))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def utc_now() -> str:
    """Return the time as our files note it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_object(path: Path, remedy: str = "restore it, or rerun the step that wrote it") -> Row:
    """Return a JSON object, empty for an absent file; of a damaged one the error has the remedy."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    raise DataError("is damaged: not a JSON object", remedy, file=path)


def object_or_none(path: Path) -> Row | None:
    """Return a JSON object, or None if the file is missing, damaged or not readable."""
    with suppress(RecipesError, OSError):
        if path.is_file():
            return read_object(path)
    return None


def read_rows(path: Path, may_be_cut: bool = True) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file; an absent file has none.

    A crash may have cut the last line of a file of ours: it is left out. Any other damaged line is
    an error.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = parsed_line(line)
            if row is not None:
                yield row
            elif line.strip() and (lines.peek(1) or not may_be_cut):
                raise DataError("this line is damaged; restore or cut it", file=path, line=number)


def parsed_line(line: bytes) -> Row | None:
    """Return the JSON object of a line, None for anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if b"\\u" in line or b"\xed" in line:  # an escape, or the first byte of a surrogate
        value = valid_texts(value)
    return value if isinstance(value, dict) else None


def valid_texts(value: Any) -> Any:
    """Return a JSON value with the replacement character for lone surrogates and NUL."""
    if isinstance(value, dict):
        return {valid_texts(key): valid_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [valid_texts(item) for item in value]
    if isinstance(value, str):
        return _NOT_TEXT.sub("\ufffd", value)
    return value


def hash_of(*parts: Any) -> str:
    """Return the SHA-256 of JSON-ready values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remembered_hash(path: Path) -> str:
    """Return the SHA-256 of a large file, remembered in the cache folder by path, size and time."""
    stat = path.stat()
    stamp = hash_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    memory = cache_root() / "digests" / stamp[:32]
    if not memory.is_file():
        write_text(memory, file_hash(path))
    return memory.read_text("utf-8")


def cached_model(hub_id: str, revision: str | None) -> Path | None:
    """Return a Hub model's folder in the Hub's cache, whose name is that of its commit; None where
    it is not on this machine.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    # else it is not there, or known to be absent on the Hub
    return Path(config).parent if isinstance(config, str) else None


def model_fingerprint(model: str | Path, revision: str | None = None) -> str:
    """Return a hash of a folder's weights and settings, or of a Hub model's name and commit."""
    folder = Path(model)
    if not folder.is_dir():
        cached = cached_model(str(model), revision)
        return hash_of(model, cached.name if cached else revision)
    files = sorted(folder.glob("*.safetensors"))  # no other weights are read
    parts: list[object] = [[path.name, remembered_hash(path)] for path in files]
    for name in ("config.json", "adapter_config.json", "generation_config.json"):
        settings = read_object(folder / name)
        # the base may have been moved
        for key in ("base_model_name_or_path", "_name_or_path"):
            settings.pop(key, None)
        for key in {"target_modules", "exclude_modules"} & settings.keys():
            settings[key] = sorted(settings[key] or ())  # PEFT writes a set, in any order
        parts.append([name, settings])
    return hash_of(parts)
