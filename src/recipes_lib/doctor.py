"""What `recipes doctor` finds on this machine, with the remedies."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from recipes_lib.core.environment import PACKAGES, describe_devices, installed_version
from recipes_lib.core.project import project_root, runs_root

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "fail"
REINSTALL = "make setup"
DISK_GIB = 15  # Llama-2-7B takes 13
DoctorLine = tuple[str, str, str]  # level, what is so, what to do


def diagnose() -> Iterator[tuple[str, DoctorLine]]:
    """Yield the topic of each finding, and the finding."""
    for check in DOCTOR_CHECKS:
        topic = check.__name__.removeprefix("check_")
        try:
            findings = list(check())
        except Exception as error:  # a broken installation fails in its own ways
            findings = [(FAIL, f"{type(error).__name__}: {error}", REINSTALL)]
        yield from ((topic, finding) for finding in findings)


def check_versions() -> Iterator[DoctorLine]:
    """Installed packages against the tested versions."""
    from packaging.requirements import Requirement

    constraints = project_root() / "constraints.txt"
    lines = constraints.read_text("utf-8").splitlines() if constraints.is_file() else []
    other = []
    for package in (Requirement(line) for line in lines if line and not line.startswith("#")):
        version = installed_version(package.name)
        if version and not package.specifier.contains(version, prereleases=True):
            other.append(f"{package.name} {version} (tested {package.specifier})")
    if missing := [name for name in PACKAGES if installed_version(name) is None]:
        yield FAIL, f"not installed: {', '.join(missing)}", REINSTALL
    if other:
        yield WARN, f"not the tested versions: {', '.join(other)}", REINSTALL
    else:
        yield OK, f"Python {platform.python_version()}, packages as tested", ""


def check_device() -> Iterator[DoctorLine]:
    """GPUs with their memory and bf16, or the CPU."""
    import torch

    if torch.cuda.is_available():
        for card in describe_devices():
            yield OK, card, ""
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            remedy = "train.bf16=false train.fp16=true model.dtype=float16"
            yield WARN, "this GPU has no bf16", remedy
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        remedy = "nvidia-smi shows the driver's CUDA version; install the torch build for it"
        what = f"there is a GPU, but torch (built for CUDA {torch.version.cuda}) cannot use it"
        yield FAIL, what, remedy
    else:
        yield NOTE, f"no GPU; {os.cpu_count()} CPU cores: the quickstart trains here", ""


def check_hub() -> Iterator[DoctorLine]:
    """Token and offline mode."""
    from huggingface_hub import constants, get_token

    no_token = NOTE, "no token: gated models cannot be downloaded", "hf auth login"
    yield (OK, "a token is set", "") if get_token() else no_token
    if constants.HF_HUB_OFFLINE:
        yield NOTE, "offline: only what is cached or local is found", "unset HF_HUB_OFFLINE"


def check_disk() -> Iterator[DoctorLine]:
    """Free space where runs and downloads go."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("runs", runs_root()), ("Hub cache", hub)):
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free / 2**30
        if not os.access(place, os.W_OK):
            yield FAIL, f"{name}: {folder} is not writable", "set RECIPES_RUNS_ROOT or HF_HOME"
        else:
            level, remedy = (OK, "") if free > DISK_GIB else (WARN, "free some space")
            yield level, f"{name}: {free:.0f} GiB free", remedy


def check_env() -> Iterator[DoctorLine]:
    """Variables that silently change how a training is launched."""
    begin = ("ACCELERATE_", "FSDP_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    if left := [name for name in os.environ if name.startswith(begin)]:
        yield WARN, f"left over in the environment: {', '.join(left)}", f"unset {' '.join(left)}"


DOCTOR_CHECKS = (check_versions, check_device, check_hub, check_disk, check_env)
