"""How a run came to be: code, library versions, devices. And how large libraries are imported."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from recipes_lib.core.project import project_root
from recipes_lib.core.terminal import masked_command

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
    return masked_command([sys.executable, *sys.orig_argv[1:]])


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
        said = subprocess.check_output(
            command, cwd=project_root(), text=True, timeout=10, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")}


def describe_devices() -> list[str]:
    """Return one line per accelerator, or the processor if there is none. Imports torch."""
    import torch

    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]
    return [f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]


@contextmanager
def importing() -> Iterator[None]:
    """Import without collecting garbage: a quarter of the time, and 0.4 s a collection later."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
            atexit.register(gc.unfreeze)  # Triton reports what the end of the process leaves
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
