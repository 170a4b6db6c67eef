"""Training checkpoints that can be trusted: none is used half-written.

A checkpoint is complete when COMPLETE.json in it, written last, lists every file with its size (and
its sha256 up to 1 GB), and all of them are there. Resuming uses the newest whose files are still
those. What a crash left behind, or a disk damaged, is renamed to checkpoint-N.incomplete.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import file_hashes, sync, sync_tree, write_json

MARKER = "COMPLETE.json"
HASHED_UP_TO = 10**9  # bytes: all GPUs wait for the hashes, 1.4 s for each GB


def mark_complete(checkpoint: Path, **facts: Any) -> None:
    """Flush every file of a checkpoint to the disk, then write its marker with these facts."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER]
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(paths)}
    hashed = [name for name, size in files.items() if size <= HASHED_UP_TO]
    hashes = file_hashes(checkpoint, hashed)
    sync_tree(checkpoint)
    write_json(checkpoint / MARKER, {**facts, "files": files, "sha256": hashes})
    sync(checkpoint.parent)


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a complete checkpoint's marker."""
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))


def what_is_wrong(checkpoint: Path, hashes: bool = False) -> str | None:
    """Return why a checkpoint cannot be used, by sizes or hashes too; None for a whole one."""
    try:
        marker = read_marker(checkpoint)
        sizes, recorded = dict(marker["files"]), dict(marker["sha256"])
    except FileNotFoundError:
        return f"no {MARKER}: the save was interrupted"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MARKER} is not readable"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"no {name}"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
    current = file_hashes(checkpoint, sizes.keys() & recorded) if hashes else recorded
    changed = [name for name, digest in recorded.items() if current.get(name) != digest]
    if changed:
        return f"{', '.join(changed)} changed after the checkpoint was written (sha256 differs)"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest step first."""
    folders = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    steps = {path: path.name.removeprefix("checkpoint-") for path in folders}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda p: int(steps[p]))


def find_newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint, and why others cannot be used; change nothing."""
    whole: Path | None = None
    broken: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = what_is_wrong(checkpoint, hashes=whole is None)
        if reason is not None:
            broken[checkpoint] = reason
        elif whole is None:
            whole = checkpoint
    return whole, broken


def check_resumable(checkpoint: Path, num_processes: int) -> None:
    """Refuse a checkpoint that lacks training state: the Trainer would begin a fresh one."""
    ranks = [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    needed = ["trainer_state.json", "scheduler.pt"]
    needed += ranks if num_processes > 1 else ["rng_state.pth"]
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    missing += [] if [*checkpoint.glob("optimizer*")] else ["optimizer.pt"]
    if missing:
        written_by = read_marker(checkpoint).get("world_size", "?")
        raise EnvironmentFault(
            f"{checkpoint.name} lacks {', '.join(missing)}, without which other weights come out",
            f"it was written by {written_by} process(es), {num_processes} would resume it",
            "restore the files, or start a new run with run.name=OTHER",
        )


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, never the newest or the best one."""
    complete = [path for path in list_checkpoints(folder) if what_is_wrong(path) is None]
    for checkpoint in complete[: -max(keep, 1)] if keep is not None else ():
        if best is None or checkpoint.resolve() != Path(best).resolve():
            (checkpoint / MARKER).unlink()
            shutil.rmtree(checkpoint)


def set_aside(folder: Path, ending: str) -> Path:
    """Rename a folder to its name with `ending` (and a number); return the new path."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (folder.with_name(f"{folder.name}{ending}{number}") for number in numbers)
    return folder.rename(next(path for path in names if not path.exists()))
