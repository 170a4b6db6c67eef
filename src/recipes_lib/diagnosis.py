"""What `recipes doctor` looks at: one finding per topic, each with what to do about it. Looks only;
changes and downloads nothing.

Every check is a function that returns findings; one that crashes becomes a finding itself, because
a broken installation is what this is for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from recipes_lib.weights.base import PACKAGED_MODELS, PREFIX, packaged_folder

_GIB = 1024**3
REINSTALL = "make setup, or pip install -c constraints.txt -e '.[quickstart,dev]'"
OPTIONAL = {  # extra of setup.py -> its packages and the setting that needs each
    "gpu": {"liger-kernel": "train.use_liger_kernel"},
    "chat-evals": {"langdetect": "evals/ifeval.yaml", "math-verify": "evals/math.yaml"},
    "tracking": {name: f"train.report_to: {name}" for name in ("tensorboard", "trackio", "wandb")},
}
LAUNCH_VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
LAUNCH_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # x86 and Arm, as /proc/cpuinfo spells them


@dataclass(frozen=True)
class DoctorLine:
    """One line of the report.

    Args:
        level: ok; note (good to know); warn (something will go differently than expected); fail
            (something cannot work).
        remedy: what to type or change; empty when there is nothing to do.
    """

    level: str
    text: str
    remedy: str = ""
    topic: str = ""

    def __str__(self) -> str:
        """Return the line as it is printed.

        Example:
            >>> str(DoctorLine("note", "no token", "hf auth login", "hub"))
            'note  hub           no token -> hf auth login'
        """
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.level:<5} {self.topic:<13} {self.text}{remedy}"


_ok, _note, _warn, _fail = (partial(DoctorLine, level) for level in ("ok", "note", "warn", "fail"))


def check_python() -> Iterator[DoctorLine]:
    """The interpreter: 3.11 to 3.13."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        yield _ok(version)
    else:
        yield _fail(version, "make setup PYTHON=python3.12 (3.11, 3.12 or 3.13)")


def check_versions(
    constraints: Path, required: Iterable[str] | None = None
) -> Iterator[DoctorLine]:
    """Installed packages against the tested versions.

    Args:
        constraints: the file with one requirement a line.
        required: packages that cannot be missing; default: what recipes-lib itself requires.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    if not constraints.is_file():
        what = f"{constraints} is not there, so nothing to compare with"
        yield _note(what, "run it from a checkout of the project")
        return
    if required is None:
        ours = importlib.metadata.requires("recipes-lib") or []
        required = [Requirement(line).name for line in ours if "extra ==" not in line]
    needed = {canonicalize_name(name) for name in required}
    text = constraints.read_text(encoding="utf-8")
    same, other, missing = 0, [], []
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        wanted = Requirement(line)
        installed = _version(wanted.name)
        if installed is None:
            missing += [wanted.name] * (canonicalize_name(wanted.name) in needed)
        elif wanted.specifier.contains(installed, prereleases=True):
            same += 1
        else:
            other.append(f"{wanted.name} {installed} (tested {wanted.specifier})")
    if missing:
        yield _fail(f"not installed: {', '.join(missing)}", REINSTALL)
    if other:
        yield _warn(f"other than tested: {', '.join(other)}", REINSTALL)
    if not missing:
        yield _ok(f"{same} packages as tested")


def check_devices() -> Iterator[DoctorLine]:
    """GPUs with their memory, or the CPU."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield _ok(
                f"{index}: {card.name}, {card.total_memory / _GIB:.0f} GiB, compute capability"
                f" {card.major}.{card.minor}"
            )
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        built = torch.version.cuda or "none"
        what = (
            f"a GPU driver is here, but torch {torch.__version__} cannot use it (built for CUDA"
            f" {built})"
        )
        remedy = "nvidia-smi shows the driver's CUDA version; install the torch build for it"
        yield _fail(what, remedy)
    else:
        yield _note(
            f"none; {cores} CPU cores: quickstart trains here, smollm2-135m-dolly too where it has"
            " its rows (the Hub, or data.source=dolly.jsonl), llama2-7b-dolly can be checked"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        what = f"CUDA_VISIBLE_DEVICES={visible!r} hides the others"
        yield _note(what, "unset CUDA_VISIBLE_DEVICES to use all")


def check_bf16() -> Iterator[DoctorLine]:
    """Whether bfloat16 works, and whether it is fast."""
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield _ok("supported by the GPU")
        else:
            remedy = "train.bf16=false train.fp16=true model.dtype=float16"
            yield _warn("this GPU is older than Ampere and has no bf16", remedy)
        return
    a, cpuinfo = torch.ones(4, 4, dtype=torch.bfloat16), Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    how = "without instructions for it: float32 may be as fast"
    if fast := [flag for flag in FAST_BF16 if flag in flags]:
        how = f"with {fast[0]} instructions"
    if torch.isfinite(a @ a).all():
        yield _ok(f"works on this CPU, {how}")
    else:
        yield _fail("a product of two bf16 matrices is not finite", REINSTALL)


def check_attention() -> Iterator[DoctorLine]:
    """Attention kernels that are installed, and whether transformers takes their version."""
    import torch
    from packaging.requirements import Requirement

    from recipes_lib.config.upstream import get_kernels, kernels_wanted_and_found
    from recipes_lib.training.varlen import why_not_here

    found = ["flash-attn"] if importlib.util.find_spec("flash_attn") else []
    wanted, installed = kernels_wanted_and_found()
    taken = Requirement(wanted).specifier
    if installed and taken.contains(installed, prereleases=True):
        found.append("kernels")
    elif installed:
        what = f"kernels {installed} is not taken by transformers, which wants {taken}"
        yield _warn(f"{what}: no kernels-community/ attention", get_kernels(wanted))
    if found or not torch.cuda.is_available():
        yield _ok(", ".join(["sdpa", *found]))
    elif not installed:
        if why := why_not_here(torch.bfloat16):
            yield _note(f"sdpa; varlen {why}", "pip install flash-attn, or " + get_kernels(wanted))
        else:
            yield _ok("sdpa, varlen")


def check_optional() -> Iterator[DoctorLine]:
    """Packages that only some settings need."""
    import torch

    for extra, packages in OPTIONAL.items():
        missing = [f"{name} ({key})" for name, key in packages.items() if _version(name) is None]
        if missing and (extra != "gpu" or torch.cuda.is_available()):
            remedy = f"pip install -c constraints.txt -e '.[{extra}]'"
            yield _note(f"not installed: {', '.join(missing)}", remedy)


def _version(package: str) -> str | None:
    """Return the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_bitsandbytes() -> Iterator[DoctorLine]:
    """A 4-bit layer computes something close to what its weights say."""
    # on a CPU it reports a faster kernel that it did not find
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        64,
        64,
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.bfloat16,
    )
    weight = layer.weight.data.clone().float()
    row = torch.randn(1, 64)
    with torch.no_grad():
        exact, answer = row @ weight.T, layer.to(device)(row.to(device)).float().cpu()
    error = float((answer - exact).norm() / exact.norm())
    packed = layer.weight.numel() * layer.weight.element_size() < weight.numel()
    if packed and error < 0.3:
        yield _ok(f"{bitsandbytes.__version__}, an NF4 layer computes on the {device}")
    else:
        what = f"an NF4 layer on the {device} is off by {error:.0%}"
        what += "" if packed else " and was not quantized"
        yield _fail(what, f"QLoRA recipes will not work; {REINSTALL}")


def check_hub(environment: Mapping[str, str] = os.environ) -> Iterator[DoctorLine]:
    """Token and offline mode; nothing is asked over the network."""
    from huggingface_hub import get_token

    if get_token():
        yield _ok("a token is set")
    else:
        what = "no token: gated models such as llama2-7b-dolly's cannot be downloaded"
        yield _note(what, "hf auth login")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    yes = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads them
    if offline := [name for name in names if environment.get(name, "").upper() in yes]:
        what = f"offline ({', '.join(offline)}): only what is cached or local is found"
        yield _note(what, f"unset {' '.join(offline)}")


def check_disk(folders: Mapping[str, tuple[Path, float]]) -> Iterator[DoctorLine]:
    """Free space where runs and downloads go.

    Args:
        folders: what lies there -> (folder, GiB below which it is said that space is short).
    """
    for name, (folder, enough) in folders.items():
        whole = folder.absolute()
        place = next(parent for parent in (whole, *whole.parents) if parent.exists())
        free = shutil.disk_usage(place).free / _GIB
        if not os.access(place, os.W_OK):
            remedy = "choose another folder: RECIPES_RUNS_ROOT, HF_HOME"
            yield _fail(f"{name}: {folder} cannot be written", remedy)
        elif free < enough:
            what = f"{name}: {free:.1f} GiB free, {enough:.0f} wanted"
            yield _warn(what, f"free some, or move {folder}")
        else:
            yield _ok(f"{name}: {free:.0f} GiB free")


def check_quickstart_model() -> Iterator[DoctorLine]:
    """Whether the quickstart's model is here already, or can be made."""
    for name, package in PACKAGED_MODELS.items():
        if packaged_folder(PREFIX + name):
            yield _ok(f"{package.folder} is ready")
        elif importlib.util.find_spec("gguf") is None:
            yield _fail(f"{package.folder} cannot be read without gguf", REINSTALL)
        else:
            yield _note(f"{package.folder} ({package.download_mib} MiB) is fetched on first use")


def check_launcher(environment: Mapping[str, str] = os.environ) -> Iterator[DoctorLine]:
    """What silently changes how a training is launched: variables left behind, threads,
    accelerate's own default file.
    """
    left = sorted(
        name for name in environment if name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES)
    )
    if left:
        what = f"left in the environment, where they overrule a config: {', '.join(left)}"
        yield _warn(what, f"unset {' '.join(left)}")
    cores, threads = os.cpu_count() or 1, environment.get("OMP_NUM_THREADS", "")
    unset, set_to = "unset OMP_NUM_THREADS", f"OMP_NUM_THREADS={threads}"
    if threads and not threads.isdigit():
        yield _warn(f"OMP_NUM_THREADS={threads!r} is no number", unset)
    elif threads and int(threads) > cores:
        yield _warn(f"{set_to} on {cores} cores: threads will wait for each other", unset)
    elif threads and int(threads) < cores:
        yield _note(f"{set_to} of {cores} cores: one process trains on that many", unset)
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    folder = Path(environment.get("HF_HOME") or cache) / "accelerate"
    files = [folder / f"default_config.{ending}" for ending in ("yaml", "json")]
    default = next((path for path in files if path.is_file()), None)
    if default:
        what = f"accelerate launch without --config_file reads {default}"
        yield _note(what, "always give --config_file; recipes train does")
    if not left and not threads and not default:
        yield _ok("no variable and no default config that changes a launch")


def diagnose(checks: Mapping[str, Callable[[], Iterable[DoctorLine]]]) -> list[DoctorLine]:
    """Run the checks; one that raises becomes a finding of its own.

    Args:
        checks: topic -> check.
    """
    findings: list[DoctorLine] = []
    for topic, check in checks.items():
        try:
            findings += (replace(line, topic=topic) for line in check())
        except Exception as error:
            summary = (str(error).strip().splitlines() or [""])[0]
            what = f"{type(error).__name__}: {summary}"
            findings.append(_fail(what, REINSTALL, topic))
    return findings
