"""Installs a peer into an environment of its own, from the package index only; a peer that does not
install is reported as such.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).with_name(".peers")


@dataclass(frozen=True)
class Peer:
    """A peer's Python, or the reason why there is none."""

    name: str
    python: Path | None
    reason: str = ""


def install(
    package: str, version: str, folder: Path = PEERS, without: tuple[str, ...] = ()
) -> Peer:
    """Return the peer, installed once under `<folder>/<package>-<version>`.

    Args:
        package: its name on the package index.
        version: its exact version.
        folder: where environments go.
        without: dependencies to take out again that text training does not use and that may not
            load beside a CPU build of torch.
    """
    name, home = f"{package} {version}", folder / f"{package}-{version}"
    python = home / "bin" / "python"
    if not _imports(python, package):
        print(f"installing {name} into {home} ...", flush=True)
        try:
            subprocess.run(
                [sys.executable, "-m", "venv", "--clear", str(home)],
                check=True,
                capture_output=True,
            )
            command = [str(python), "-m", "pip", "install", "-q", f"{package}=={version}"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
            if without:
                subprocess.run(
                    [str(python), "-m", "pip", "uninstall", "-q", "-y", *without],
                    check=True,
                    capture_output=True,
                    text=True,
                )
        except subprocess.CalledProcessError as error:
            return Peer(
                name,
                None,
                "does not install:"
                f" {(str(error.stderr or error).strip().splitlines() or ['?'])[-1]}",
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            return Peer(name, None, f"does not install: {error}")
        if not _imports(python, package):
            return Peer(name, None, "installs, but does not import")
    return Peer(name, python)


def _imports(python: Path, package: str) -> bool:
    return (
        python.exists()
        and subprocess.run([str(python), "-c", f"import {package}"], capture_output=True).returncode
        == 0
    )
