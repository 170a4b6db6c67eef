"""Hashes of weights: what an answer, a judgment or a cache entry depends on. Digests of large files
are remembered by size and time.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import file_hash, hash_of, read_object, write_json
from recipes_lib.core.project import cache_root

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")

_PLACES = ("base_model_name_or_path", "_name_or_path")  # where a base lies


def folder_fingerprint(folder: Path) -> str:
    """Return a hash of a folder's weights and configuration; it does not depend on where the folder
    lies.
    """
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    parts: list[Any] = [[path.name, file_digest(path)] for path in files]
    for name in ("config.json", "adapter_config.json", "generation_config.json"):
        if (folder / name).is_file():
            values = {
                key: value
                for key, value in read_object(folder / name).items()
                if key not in _PLACES
            }
            parts.append([name, _in_order(values) if name == "adapter_config.json" else values])
    return hash_of(parts)


def _in_order(values: dict[str, object]) -> dict[str, object]:
    """PEFT's settings with names in order: it writes sets, whose order is another one in every
    process.
    """
    return {
        key: sorted(value)
        if isinstance(value, list) and all(isinstance(item, str) for item in value)
        else value
        for key, value in values.items()
    }


def model_fingerprint(path: str, revision: str | None) -> str:
    """Return a hash of a base model: its files where they are local, else its Hub name and commit.

    Args:
        path: what `from_pretrained` took.
        revision: as asked for.
    """
    if Path(path).is_dir():
        return folder_fingerprint(Path(path))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json", revision=revision or "main")
    return hash_of(path, Path(cached).parent.name if isinstance(cached, str) else revision)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, remembered in the cache folder by path, size and modification
    time.
    """
    stat = path.stat()
    stamp = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    memory = cache_root() / "digests" / f"{hash_of(stamp)[:32]}.json"
    with suppress(RecipesError, KeyError):  # a memory that is damaged is made again
        return str(read_object(memory)["sha256"])
    digest = file_hash(path)
    write_json(memory, {"file": path.name, "sha256": digest})
    return digest
