"""What `recipes doctor` finds on this machine, with the remedies."""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipes_lib.core.environment import describe_devices
from recipes_lib.core.errors import missing_extra
from recipes_lib.core.extras import extras, installed_version
from recipes_lib.core.project import project_root, runs_root

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "fail"
REINSTALL = "make setup"
DISK_GIB = 15  # Llama-2-7B takes 13


class DoctorLine(NamedTuple):
    """One finding: how bad it is, what is so, and what to do."""

    level: str
    text: str
    remedy: str = ""


def diagnose() -> Iterator[tuple[str, DoctorLine]]:
    """Yield the topic of each finding, and the finding."""
    for check in DOCTOR_CHECKS:
        topic = check.__name__.removeprefix("check_")
        try:
            findings = list(check())
        except Exception as error:  # a broken installation fails in its own ways
            findings = [DoctorLine(FAIL, f"{type(error).__name__}: {error}", REINSTALL)]
            fault = missing_extra(error)
            if fault is not None:  # `check_extras` says how to install it
                findings = [DoctorLine(NOTE, f"not looked at: {fault.what}")]
        for finding in findings:
            yield topic, finding


def check_versions() -> Iterator[DoctorLine]:
    """Installed packages against the tested versions."""
    from packaging.requirements import Requirement

    constraints = project_root() / "constraints.txt"
    lines = constraints.read_text("utf-8").splitlines() if constraints.is_file() else []
    other = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        package = Requirement(line)
        version = installed_version(package.name)
        if version and not package.specifier.contains(version, prereleases=True):
            other.append(f"{package.name} {version} (tested {package.specifier})")
    if other:
        yield DoctorLine(WARN, f"not the tested versions: {', '.join(other)}", REINSTALL)
    else:
        yield DoctorLine(OK, f"Python {platform.python_version()}, packages as tested")


def check_extras() -> Iterator[DoctorLine]:
    """What of each extra is installed; a missing package is named with the smallest extra."""
    named: set[str] = set()
    for extra in extras():
        missing = [package for package in extra.missing if package not in named]
        named.update(missing)
        if extra.other:
            yield DoctorLine(WARN, f"{extra.name}: {', '.join(extra.other)}", extra.install)
        elif missing:
            what = f"{extra.name}: not installed: {', '.join(missing)}"
            yield DoctorLine(NOTE, what, extra.install)
        elif not extra.missing:
            yield DoctorLine(OK, f"{extra.name}: installed")


def check_device() -> Iterator[DoctorLine]:
    """GPUs with their memory and bf16, or the CPU."""
    import torch

    if torch.cuda.is_available():
        for card in describe_devices():
            yield DoctorLine(OK, card)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            remedy = "train.bf16=false train.fp16=true model.dtype=float16"
            yield DoctorLine(WARN, "this GPU has no bf16", remedy)
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        remedy = "nvidia-smi shows the driver's CUDA version; install the torch build for it"
        what = f"there is a GPU, but torch (built for CUDA {torch.version.cuda}) cannot use it"
        yield DoctorLine(FAIL, what, remedy)
    else:
        yield DoctorLine(NOTE, f"no GPU; {os.cpu_count()} CPU cores: the quickstart trains here")


def check_hub() -> Iterator[DoctorLine]:
    """Token and offline mode."""
    from huggingface_hub import constants, get_token

    if get_token():
        yield DoctorLine(OK, "a token is set")
    else:
        yield DoctorLine(NOTE, "no token: gated models cannot be downloaded", "hf auth login")
    if constants.HF_HUB_OFFLINE:
        what = "offline: only what is cached or local is found"
        yield DoctorLine(NOTE, what, "unset HF_HUB_OFFLINE")


def check_disk() -> Iterator[DoctorLine]:
    """Free space where runs and downloads go."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("runs", runs_root()), ("Hub cache", hub)):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(existing, os.W_OK):
            remedy = "set RECIPES_RUNS_ROOT or HF_HOME"
            yield DoctorLine(FAIL, f"{name}: {folder} is not writable", remedy)
            continue
        free_gib = shutil.disk_usage(existing).free / 2**30
        text = f"{name}: {free_gib:.0f} GiB free"
        if free_gib > DISK_GIB:
            yield DoctorLine(OK, text)
        else:
            yield DoctorLine(WARN, text, "free some space")


def check_env() -> Iterator[DoctorLine]:
    """Variables that silently change how a training is launched."""
    prefixes = ("ACCELERATE_", "FSDP_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    left = [name for name in os.environ if name.startswith(prefixes)]
    if left:
        what = f"left over in the environment: {', '.join(left)}"
        yield DoctorLine(WARN, what, f"unset {' '.join(left)}")


DOCTOR_CHECKS = (check_versions, check_extras, check_device, check_hub, check_disk, check_env)
