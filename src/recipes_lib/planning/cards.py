"""The cards a plan can be made for, this machine's own among them.

No GPU's speed was measured by this project: each is `counted` (see `planning.duration`) until
`benchmarks/` has a number for it. Peaks are the vendors' dense bf16 figures; links are what an
all-gather is taken to reach. MIG slices have the 7 GB/s that explain the original study's 449
tokens/s under FSDP without peer-to-peer access.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import RecipeError


@dataclass(frozen=True)
class Card:
    """One kind of card.

    Args:
        memory_gib: what a process can see of it.
        tflops: dense bf16 peak.
        bandwidth: memory, GB/s.
        link: GB/s of an all-gather per card on one machine.
        basis: `counted`, or what was measured where.
        stands_in: whether nobody named it: it stands in for the GPU that this machine has not.
    """

    name: str
    title: str
    memory_gib: float
    tflops: float
    bandwidth: float
    link: float
    basis: str = "counted"
    stands_in: bool = False


CARDS = (
    Card("h100-80gb", "H100 80GB SXM", 79.1, 989, 3350, 300),
    Card("h100-pcie-80gb", "H100 80GB PCIe", 79.1, 756, 2000, 25),
    Card("h100-96gb", "H100 96GB", 93.0, 989, 3350, 300),
    Card("h200-141gb", "H200 141GB", 139.8, 989, 4800, 300),
    Card("a100-80gb", "A100 80GB", 79.2, 312, 2039, 200),
    Card("a100-40gb", "A100 40GB", 39.4, 312, 1555, 200),
    Card("h100-mig-4g.40gb", "H100 MIG slice 4g.40gb", 39.2, 480, 1675, 7),
    Card("h100-mig-3g.40gb", "H100 MIG slice 3g.40gb", 39.2, 450, 1675, 7),
    Card("h100-mig-3g.47gb", "H100 96GB MIG slice 3g.47gb", 46.2, 450, 1675, 7),
    Card("h100-mig-2g.20gb", "H100 MIG slice 2g.20gb", 19.4, 240, 837, 7),
    Card("h100-mig-1g.10gb", "H100 MIG slice 1g.10gb", 9.5, 120, 418, 7),
    Card("a100-mig-3g.40gb", "A100 80GB MIG slice 3g.40gb", 39.2, 121, 1019, 7),
    Card("a100-mig-3g.20gb", "A100 40GB MIG slice 3g.20gb", 19.4, 121, 777, 7),
    Card("l40s-48gb", "L40S 48GB", 44.4, 362, 864, 20),
    Card("rtx-4090-24gb", "RTX 4090 24GB", 23.5, 165, 1008, 10),
)
_ALIASES = {
    "h100": "h100-80gb",
    "h200": "h200-141gb",
    "a100": "a100-80gb",
    "l40s": "l40s-48gb",
    "4090": "rtx-4090-24gb",
    "rtx4090": "rtx-4090-24gb",
    "rtx-4090": "rtx-4090-24gb",
    "h100-sxm": "h100-80gb",
    "h100-pcie": "h100-pcie-80gb",
    "h100-47": "h100-mig-3g.47gb",
    "h100-47gb": "h100-mig-3g.47gb",
    "h100-96": "h100-96gb",
    "a100-40": "a100-40gb",
    "a100-80": "a100-80gb",
}
DEFAULT = "h100-80gb"

# Tokens per CPU second of LoRA training, SmolLM2-135M, one thread of a server CPU with AVX512-BF16,
# torch 2.13 (2026-11-24, n=1 each): 4bit counted over the steps, the others from whole runs less an
# estimated start, so good to a fifth. As 4N operations per token. Another CPU, above all one
# without bf16 instructions, is slower.
_TOKENS_PER_CPU_SECOND = {"bf16": 400.0, "fp32": 155.0, "4bit": 305.0}
MEASURED_PARAMETERS = 134_515_008  # SmolLM2-135M's
SCALING = 0.85  # threads of one process share caches and memory


def card_named(name: str) -> Card:
    """Return the card of that name or alias.

    Raises:
        RecipeError: there is none; the nearest names are given.

    Example:
        >>> card_named("H100").name
        'h100-80gb'
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    by_name = {card.name: card for card in CARDS}
    card = by_name.get(_ALIASES.get(key, key))
    if card is None:
        hints = did_you_mean(key, [*by_name, *_ALIASES])
        raise RecipeError(
            f"--gpu: there is no card '{name}'", *hints, f"cards: {', '.join([*by_name, 'cpu'])}"
        )
    return card


@lru_cache(maxsize=1)
def cards_here() -> tuple[Card, ...]:
    """Return the GPUs a training may use here, the fastest first as CUDA numbers them: of
    nvidia-smi's those that CUDA_VISIBLE_DEVICES leaves.
    """
    words = visible_words(os.environ)
    return tuple(
        card
        for number, uuid, card in _found_here()
        if words is None or any(number == word or uuid.startswith(word) for word in words)
    )


def devices_here() -> list[str]:
    """Return the words by which CUDA_VISIBLE_DEVICES names, or would name, each GPU here."""
    words = visible_words(os.environ)
    return [uuid for _, uuid, _ in _found_here()] if words is None else words


def visible_words(environment: Mapping[str, str]) -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES names up to the first word that is no device, as CUDA reads
    it, or None where it is not set.

    Example:
        >>> visible_words({"CUDA_VISIBLE_DEVICES": "2, 0,-1,1"}), visible_words({"CUDA_VISIBLE_DEVICES": ""}), visible_words({})
        (['2', '0'], [], None)
    """  # noqa: E501
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    words = [word.strip() for word in visible.split(",")]
    return list(
        itertools.takewhile(lambda word: word.isdigit() or word.startswith(("GPU-", "MIG-")), words)
    )


def _found_here() -> list[tuple[str, str, Card]]:
    """Return number, identifier and card of each GPU, the fastest first. MIG slices, which only
    `nvidia-smi -L` tells, stand in place of the card they are cut from.
    """
    slices: dict[str, list[tuple[str, str]]] = {}
    number = ""
    for line in _nvidia_smi("-L"):
        words = line.split()
        number = words[1].rstrip(":") if line.startswith("GPU ") else number
        if words[:1] == ["MIG"]:
            slices.setdefault(number, []).append((words[1], words[-1].rstrip(")")))
    found = []
    query = "--query-gpu=index,uuid,name,memory.total"
    for line in _nvidia_smi(query, "--format=csv,noheader,nounits"):
        number, uuid, name, memory = (part.strip() for part in f"{line},,,".split(",")[:4])
        if number in slices:
            for profile, own in slices[number]:
                found.append((number, own, recognised(f"{name} MIG {profile}", 0.0)))
        elif memory.replace(".", "").isdigit():
            found.append((number, uuid, recognised(name, float(memory))))
    return sorted(found, key=lambda entry: -entry[2].tflops)


def _nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none where it is not there or fails."""
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def recognised(name: str, memory_mib: float) -> Card:
    """Return the table's card of that name, with the real memory; one that is not in the table gets
    a guessed speed. A MIG slice is known by its profile, which holds its memory.

    Example:
        >>> recognised("NVIDIA H100 80GB HBM3", 81559.0).name, recognised("NVIDIA H100 PCIe", 81559.0).name
        ('h100-80gb', 'h100-pcie-80gb')
        >>> recognised("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 0.0).name
        'h100-mig-3g.40gb'
    """  # noqa: E501
    words = {word for word in re.split(r"[^a-z0-9.]+", name.lower()) if word}
    like = [
        card
        for card in CARDS
        if card.name.split("-")[0] in words or ("4090" in words and "4090" in card.name)
    ]
    gib = memory_mib / 1024
    if profile := re.search(r"\bMIG (?:\d+c\.)?(\d+g\.(\d+)gb)", name):
        known = [card for card in like if card.name.endswith(f"-mig-{profile[1]}")]
        guessed = 0.97 * float(profile[2])
    else:
        known = [
            card for card in like if "mig" not in card.name and abs(card.memory_gib - gib) <= 3
        ]
        known.sort(key=lambda card: ("pcie" in card.name) != ("pcie" in words))
        guessed = gib - 0.4
    if not known:
        title = f"{name} (not in the table: speed guessed)"
        return Card(name, title, round(guessed, 1), 100, 600, 10)
    card = known[0]
    return card if profile else replace(card, memory_gib=round(min(card.memory_gib, gib), 1))


def cpu_card() -> Card:
    """Return this machine's processor, with the cores that this process may use."""
    written = os.environ.get("OMP_NUM_THREADS", "")
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if written.isdigit() and int(written) > 0:
        cores = min(int(written), cores)
    return Card(
        "cpu",
        f"this machine, {cores} core{'s' * (cores != 1)}",
        round(available_gib(), 1),
        tflops=cores**SCALING * core_tflops("bf16"),
        bandwidth=10.0,
        link=2.0,
        basis="measured with SmolLM2-135M on one core of another machine; elsewhere taken as"
        " proportional",
    )


def available_gib() -> float:
    """Return the memory that is free or can be freed, and no more than the control group allows."""
    gib = _meminfo("MemAvailable")
    cached = _meminfo("Cached")  # file cache, which a control group counts as used and gives back
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            free = int((group / limit).read_text()) - int((group / used).read_text())
            gib = min(gib, free / 2**30 + cached)
    return max(gib, 0.1)


def _meminfo(key: str) -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**20
    except (OSError, StopIteration, ValueError):
        return 1024.0 if key == "MemAvailable" else 0.0  # not Linux: no opinion


def core_tflops(kind: str) -> float:
    """Return what one core reaches in a precision: bf16, fp32 or 4bit."""
    return 4 * MEASURED_PARAMETERS * _TOKENS_PER_CPU_SECOND[kind] / 1e12
