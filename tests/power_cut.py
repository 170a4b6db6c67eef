"""A model of a power cut for tests: what was not flushed before a rename, or before a record that
vouches for it, would be lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ASIDE = (
    ".incomplete",
    ".damaged",
    ".replaced",
    "lock.json",
)  # nothing new, or a heartbeat, which a cut ends anyway


class Disk:
    """Watches `os.fsync` and the renames of this process; native writers do not pass here, so what
    they wrote counts as not flushed.

    Attributes:
        lost: what a cut right after a rename would leave without its content, one line each.
        published: the names that renames gave to folders and files.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lost: list[str] = []
        self.published: list[str] = []
        self._flushed: dict[int, tuple[int, int]] = {}
        self._renamed_in: set[Path] = set()
        fsync = os.fsync

        def flush(handle: int) -> None:
            fsync(handle)
            facts = os.fstat(handle)
            self._flushed[facts.st_ino] = (facts.st_size, facts.st_mtime_ns)
            self._renamed_in.discard(Path(f"/proc/self/fd/{handle}").readlink())

        patch.setattr(os, "fsync", flush)
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            source, target = Path(source), Path(target)
            if not target.name.endswith(ASIDE) and ".incomplete" not in target.name:
                self.published.append(target.name)
                self._check(source, f"{target.name} was published")
                self._check_record(source, target)
            rename(source, target, **options)
            if target.name != "lock.json":
                self._renamed_in.add(target.parent.resolve())

        return renamed

    def _check_record(self, source: Path, target: Path) -> None:
        """A record vouches for other files: they must have been flushed before it appears."""
        if target.name == "COMPLETE.json":
            self._check(target.parent, "the checkpoint was marked complete", but=source)
            self._check(
                target.parent.parent.with_name("metrics.jsonl"),
                "the checkpoint was marked complete",
            )
        if target.name == "run.json" and json.loads(source.read_text())["state"] == "finished":
            for name in ("adapter", "model", "metrics.jsonl", "figures"):
                self._check(target.parent / name, "the run was called finished")
            if target.parent.resolve() in self._renamed_in:
                self.lost.append(
                    "the run's folder was not flushed before the run was called finished"
                )

    def _check(self, place: Path, when: str, but: Path | None = None) -> None:
        for file in [place] if place.is_file() else place.rglob("*"):
            facts = file.stat()
            if (
                file.is_file()
                and file != but
                and self._flushed.get(facts.st_ino) != (facts.st_size, facts.st_mtime_ns)
            ):
                self.lost.append(f"{file.name} was not flushed before {when}")
