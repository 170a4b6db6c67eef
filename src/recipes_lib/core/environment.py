"""How a run came to be: command, code version, library versions, devices. No secret is ever
recorded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypedDict

from recipes_lib.core.project import project_root
from recipes_lib.core.redaction import masked, masked_command

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
)
RECORDED_VARIABLES = re.compile(
    r"^(ACCELERATE_|FSDP_|NCCL_|RECIPES_|OMP_NUM_THREADS$|CUDA_VISIBLE_DEVICES$|HF_HUB_OFFLINE$"
    r"|SLURM_JOB_(ID|NODELIST|NUM_NODES)$|WORLD_SIZE$)"
)


class GitState(TypedDict):
    """What is checked out, and whether files are changed; None where it is not a git checkout."""

    commit: str | None
    dirty: bool | None


class Environment(TypedDict):
    """environment.json."""

    python: str
    platform: str
    host: str
    libraries: dict[str, str | None]
    git: GitState
    devices: list[str]
    variables: dict[str, str]


def environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Return what environment.json holds. Variables are taken from an allow-list, and secrets among
    them masked.
    """
    names = filter(RECORDED_VARIABLES.match, sorted(variables))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "libraries": library_versions(),
        "git": git_state(),
        "devices": describe_devices(),
        "variables": masked({name: variables[name] for name in names}),
    }


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return this process's command, quoted for a shell, secrets masked."""
    return masked_command(argv if argv is not None else [sys.executable, *sys.orig_argv[1:]])


def library_versions() -> dict[str, str | None]:
    """Return the installed version of each library that can change a result; None where one is
    absent. Imports none of them.
    """
    return {package: installed_version(package) for package in PACKAGES}


def installed_version(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def git_state() -> GitState:
    """Return what is checked out."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(*words: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *words], cwd=project_root(), capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def describe_devices() -> list[str]:
    """Return one line per accelerator, or the processor where there is none. Imports torch."""
    import torch

    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]
    return [f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
