"""How a run came to be: code, library versions, devices. And how large libraries are imported."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from recipes_lib.core.project import project_root
from recipes_lib.core.terminal import mask_secrets

PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate"),
    *("bitsandbytes", "datasets", "tokenizers", "safetensors"),
)
# PEFT doubles the rank for the experts' two fused matrices, and then looks for the pattern among
# modules, where no parameter is.
_EXPERTS = r"The following (rank|alpha)_pattern keys did not match .*: \['\.\*.*\.gate_up_proj'\]"


def environment() -> dict[str, object]:
    """Return what environment.json holds."""
    libraries, git = library_versions(), git_state()
    return {"libraries": libraries, "git": git, "devices": describe_devices()}


def command_line() -> str:
    """Return this process's command, quoted for a shell, secrets masked."""
    return mask_secrets(shlex.join([sys.executable, *sys.orig_argv[1:]]))


def library_versions() -> dict[str, str | None]:
    """Return the version of each library that can change a result; None if one is absent."""
    return {package: installed_version(package) for package in PACKAGES}


def installed_version(package: str) -> str | None:
    """Return the version of a package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, str | bool | None]:
    """Return what is checked out, and whether files are changed; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
    except OSError:  # no git
        return {"commit": None, "dirty": None}
    commit = done.stdout.strip()
    return {"commit": commit.removesuffix("-dirty") or None, "dirty": commit.endswith("-dirty")}


def describe_devices() -> list[str]:
    """Return one line per accelerator, or the processor if there is none. Imports torch."""
    import torch

    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]
    return [f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]


@contextmanager
def importing() -> Iterator[None]:
    """Import without collecting garbage, which takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet_libraries() -> None:
    """Let libraries report only errors. Call it before torch is imported."""
    # not by its functions: an evaluation whose answers are stored does without its 0.6 s
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    with importing():
        import transformers

    warnings.filterwarnings("ignore", "", FutureWarning, r"(transformers|trl|peft|torch)\.")
    warnings.filterwarnings("ignore", _EXPERTS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
