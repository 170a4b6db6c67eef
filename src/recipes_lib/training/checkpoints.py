"""Training checkpoints that can be trusted: complete ones are marked last, broken ones are set
aside, none is used half-written.

A checkpoint is complete when COMPLETE.json in it, written last, lists every file with its size (and
its sha256 up to 1 GB), and all of them are there. Resuming uses the newest complete checkpoint
whose files are still those. What a crash left behind, or a disk damaged, is renamed to
checkpoint-N.incomplete, never deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import file_hashes, sync, sync_tree, write_json

MARKER = "COMPLETE.json"
STATE_FILES = ("trainer_state.json", "scheduler.pt")
HASHED_UP_TO = 10**9  # bytes


class Marker(TypedDict):
    """COMPLETE.json: the run and data of a checkpoint, and the files that it has."""

    run: str
    data_fingerprint: str
    guard: Mapping[str, object]  # what must be shared to resume it
    step: int
    world_size: int
    files: dict[str, int]
    sha256: dict[str, str]


def mark_complete(checkpoint: Path, **facts: Any) -> None:
    """Flush every file of a checkpoint to the disk, then write its marker, once every rank has
    written its part. Files above `HASHED_UP_TO` get no hash: all GPUs wait meanwhile, 1.4 s for
    each GB.

    Args:
        **facts: what the marker records beside sizes and hashes.
    """
    names = sorted(
        str(file.relative_to(checkpoint))
        for file in checkpoint.rglob("*")
        if file.is_file() and file.name != MARKER
    )
    files = {name: (checkpoint / name).stat().st_size for name in names}
    hashes = file_hashes(checkpoint, [name for name in names if files[name] <= HASHED_UP_TO])
    sync_tree(checkpoint)
    write_json(checkpoint / MARKER, {**facts, "files": files, "sha256": hashes})
    sync(checkpoint.parent)


def read_marker(checkpoint: Path) -> Marker:
    """Return the content of a complete checkpoint's marker."""
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))


def what_is_missing(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be used, by the sizes of its files; None for a whole one."""
    try:
        marker = read_marker(checkpoint)
        sizes, hashed = dict(marker["files"]), {*marker["sha256"]}
    except FileNotFoundError:
        return f"no {MARKER}: the save was interrupted"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MARKER} is not readable"
    if hashed - set(sizes):
        return f"{MARKER} is damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"no {name}"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
    return None


def what_is_damaged(checkpoint: Path) -> str | None:
    """Return which files of a complete checkpoint changed since; None where none did. Those above
    `HASHED_UP_TO` are known by their size alone.
    """
    recorded = read_marker(checkpoint)["sha256"]
    hashes = file_hashes(checkpoint, recorded)
    changed = ", ".join(name for name in recorded if hashes[name] != recorded[name])
    what = "changed after the checkpoint was written (sha256 differs)"
    return f"{changed} {what}" if changed else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest step first."""
    folders = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    numbered = ((path.name.removeprefix("checkpoint-"), path) for path in folders)
    return [path for _, path in sorted((int(n), path) for n, path in numbered if n.isdecimal())]


def find_newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint, and why others cannot be used: newer ones, and older ones
    by the sizes of their files. Nothing is changed.
    """
    whole: Path | None = None
    broken: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = what_is_missing(checkpoint)
        if reason is None and whole is None:
            reason = what_is_damaged(checkpoint)
        if reason is not None:
            broken[checkpoint] = reason
        elif whole is None:
            whole = checkpoint
    return whole, broken


def check_resumable(checkpoint: Path, world_size: int) -> None:
    """Refuse a checkpoint that lacks training state: the Trainer would go on with a fresh one, and
    say nothing.

    Raises:
        EnvironmentFault: optimizer, scheduler or random-number state is missing.
    """
    rngs = [f"rng_state_{rank}.pth" for rank in range(world_size)]
    needed = [*STATE_FILES, *(rngs if world_size > 1 else ["rng_state.pth"])]
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not [*checkpoint.glob("optimizer*")]:
        missing.append("optimizer.pt")
    if missing:
        written_by = read_marker(checkpoint).get("world_size", "?")
        raise EnvironmentFault(
            f"{checkpoint.name} lacks {', '.join(missing)}: training would go on with a fresh"
            " state, and end with other weights",
            f"it was written by {written_by} process(es), {world_size} would resume it",
            "restore the files, or accept another result with --allow-partial-resume",
        )


def rotate(folder: Path, keep: int | None, best: Path | None) -> None:
    """Delete the oldest complete checkpoints beyond `keep`; never the newest, the best or an
    incomplete one.
    """
    if keep is None:
        return
    complete = [path for path in list_checkpoints(folder) if what_is_missing(path) is None]
    for checkpoint in complete[: -max(keep, 1)]:
        if best is None or checkpoint.resolve() != best.resolve():
            (checkpoint / MARKER).unlink()
            shutil.rmtree(checkpoint)


def set_aside(folder: Path, ending: str) -> Path:
    """Rename a folder to its name with `ending`, and a number where that exists; return the new
    path.
    """
    numbers = ("", *(f"-{number}" for number in range(2, 1000)))
    aside = next(
        path
        for number in numbers
        if not (path := folder.with_name(f"{folder.name}{ending}{number}")).exists()
    )
    return folder.rename(aside)
