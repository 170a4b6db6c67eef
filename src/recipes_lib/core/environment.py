"""How a run came to be: code, library versions, devices. And how libraries are kept quiet."""

import os
import shlex
import subprocess
import sys
import warnings

from recipes_lib.core.errors import EnvironmentFault, print_error
from recipes_lib.core.extras import extras, installed_version
from recipes_lib.core.project import project_root
from recipes_lib.core.terminal import count, mask_secrets

PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate",
    "bitsandbytes", "datasets", "tokenizers", "safetensors",
)  # fmt: skip
# What only some evaluations need; recorded where it is installed.
EVALUATION_PACKAGES = ("lm_eval", "vllm")


def environment() -> dict[str, object]:
    """Return what environment.json holds."""
    return {"libraries": library_versions(), "git": git_state(), "devices": describe_devices()}


def command_line() -> str:
    """Return this process's command, quoted for a shell, secrets masked."""
    return mask_secrets(shlex.join([sys.executable, *sys.orig_argv[1:]]))


def library_versions() -> dict[str, str | None]:
    """Return the version of each library that can change a result; None if one is absent."""
    versions = {package: installed_version(package) for package in PACKAGES}
    for package in EVALUATION_PACKAGES:
        version = installed_version(package)
        if version:
            versions[package] = version
    return versions


def git_state() -> dict[str, str | bool | None]:
    """Return what is checked out, and whether files are changed; None outside a git checkout."""
    # without tags, what git describes is the commit
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

    if not torch.cuda.is_available():
        return [f"CPU, {os.cpu_count()} cores, {count(torch.get_num_threads(), 'thread')}"]
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]


def require_extra(name: str) -> None:
    """Refuse to go on without the packages of an extra; warn of versions that it does not take."""
    for extra in extras():  # none where the package runs from its files, without being installed
        if extra.name == name and extra.missing:
            what = f"not installed: {', '.join(extra.missing)}"
            raise EnvironmentFault(what, f"the extra {name} brings them: {extra.install}")
        if extra.name == name and extra.other and os.environ.get("RANK", "0") == "0":
            print_error(f"warning: not the versions of the extra {name}: {', '.join(extra.other)}")


def quiet_libraries() -> None:
    """Let libraries report only errors. Call it before torch is imported."""
    require_extra("train")
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        print("loading torch ...", file=sys.stderr, flush=True)
    # not by its functions: an evaluation whose answers are stored does without its 0.6 s
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    import transformers

    # without a network it tells of each of its retries, 14 to 21 lines before the error
    huggingface_hub.logging.set_verbosity_error()
    warnings.filterwarnings(
        "ignore", "", FutureWarning, r"(transformers|trl|peft|torch|recipes_lib)\."
    )
    # PEFT looks for the pattern of experts' fused matrices, which are parameters, among modules
    warnings.filterwarnings("ignore", r".*_pattern keys did not match .*\.gate_up_proj'\]")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
