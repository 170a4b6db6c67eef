"""The cards a plan can be made for, and those of this machine.

Peaks are the vendors' dense bf16 figures with float32 sums; links are what an all-gather is taken
to reach. A card that is not in the table has its memory and no time.
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
        tflops: dense bf16 peak, None where it is not known.
        link: GB/s of an all-gather per card on one machine.
        assumed: whether nobody named it and this machine has none.
    """

    name: str
    memory_gib: float
    tflops: float | None = None
    link: float = 10.0
    assumed: bool = False


CARDS = (
    Card("b200-180gb", 178.0, 2250, 600),
    Card("h200-141gb", 139.8, 989, 300),
    Card("h100-80gb", 79.1, 989, 300),
    Card("h100-pcie-80gb", 79.1, 756, 25),
    Card("h100-nvl-94gb", 93.1, 835, 25),
    Card("h100-96gb", 93.0, 989, 300),
    Card("a100-80gb", 79.2, 312, 200),
    Card("a100-40gb", 39.4, 312, 200),
    Card("mi300x-192gb", 191.5, 1307, 300),
    Card("l40s-48gb", 44.4, 362, 20),
    Card("rtx-6000-ada-48gb", 47.5, 364, 20),
    Card("a6000-48gb", 47.5, 155, 20),
    Card("a10-24gb", 22.0, 125, 10),
    Card("l4-24gb", 22.0, 121, 10),
    Card("rtx-5090-32gb", 31.3, 210, 20),
    Card("rtx-4090-24gb", 23.5, 165, 10),
)
DEFAULT = "h100-80gb"
MIG_LINK = 7.0  # slices have no peer-to-peer access
_MIG = re.compile(r"(?:\d+c\.)?(\d+)g\.(\d+)gb")
# TFLOP/s of a core with AVX512-BF16, as 4N operations per token of a LoRA training of
# SmolLM2-135M (341 and 155 tokens per CPU second; 4-bit weights 305). Another core is slower.
CORE_TFLOPS = {"bf16": 0.18, "float32": 0.083, "4-bit": 0.16}
SCALING = 0.85  # threads of one process share caches and memory


def card_named(name: str) -> Card:
    """Return the card of a name, of its beginning, or a MIG slice by its profile.

    Raises:
        RecipeError: there is none; the nearest names are given.

    Example:
        >>> card_named("H100").name, card_named("4090").name, card_named("a100-mig-3g.20gb").memory_gib
        ('h100-80gb', 'rtx-4090-24gb', 19.4)
    """  # noqa: E501
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    if profile := _MIG.search(key):
        whole = next((card for card in CARDS if card.name.startswith(key[:4])), None)
        return _slice(key, whole or card_named(DEFAULT), profile)
    if key == "cpu":
        return cpu_card()
    exact = [card for card in CARDS if card.name == key]
    short = [card for card in CARDS if card.name.removeprefix("rtx-").startswith(key)]
    found = exact or short or [card for card in CARDS if card.name.startswith(key)]
    if not found or len(key) < 2:
        names = [card.name for card in CARDS]
        hints = did_you_mean(key, names)
        known = f"cards: {', '.join(names)}, h100-mig-3g.40gb (any profile), cpu"
        raise RecipeError(f"--gpu: there is no card '{name}'", *hints, known)
    return min(found, key=lambda card: (len(card.name), card.name != DEFAULT))


def _slice(name: str, whole: Card, profile: re.Match[str]) -> Card:
    """Return a MIG slice: its memory by its profile, and its share of seven of the speed."""
    share = int(profile[1]) / 7
    tflops = None if whole.tflops is None else round(whole.tflops * share)
    return Card(name, round(0.97 * float(profile[2]), 1), tflops, MIG_LINK)


@lru_cache(maxsize=1)
def cards_here() -> tuple[Card, ...]:
    """Return the GPUs that a training may use here, in CUDA's order, which CUDA_VISIBLE_DEVICES
    numbers: the fastest first, or nvidia-smi's with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    return tuple(card for _, card in _visible_here())


def devices_here() -> list[str]:
    """Return the words by which CUDA_VISIBLE_DEVICES names each GPU that may be used here."""
    words = visible_words(os.environ)
    return [uuid for uuid, _ in _visible_here()] if words is None else words


def _visible_here() -> list[tuple[str, Card]]:
    """Return identifier and card of each GPU that may be used here."""
    words, found = visible_words(os.environ), _found_here()
    if os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST") != "PCI_BUS_ID":
        found.sort(key=lambda entry: -(entry[1].tflops or 0))
    if words is None:
        return found
    chosen = []
    for word in words:
        if word.isdigit():
            chosen += found[int(word) : int(word) + 1]
        else:
            chosen += [entry for entry in found if entry[0].startswith(word)][:1]
    return chosen


def visible_words(environment: Mapping[str, str]) -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES names up to the first word that is no device, as CUDA reads
    it, or None where it is not set.

    Example:
        >>> visible_words({"CUDA_VISIBLE_DEVICES": "2, 0,-1,1"}), visible_words({})
        (['2', '0'], None)
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    words = [word.strip() for word in visible.split(",")]
    return list(
        itertools.takewhile(lambda word: word.isdigit() or word.startswith(("GPU-", "MIG-")), words)
    )


def _found_here() -> list[tuple[str, Card]]:
    """Return identifier and card of each GPU in nvidia-smi's order. MIG slices, which only
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
                found.append((own, recognised(f"{name} MIG {profile}", 0.0)))
        elif memory.replace(".", "").isdigit():
            found.append((uuid, recognised(name, float(memory))))
    return found


def _nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none where it is not there or fails."""
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def recognised(name: str, memory_mib: float) -> Card:
    """Return the table's card of a name as nvidia-smi prints it, with the real memory.

    Example:
        >>> recognised("NVIDIA H100 80GB HBM3", 81559.0).name, recognised("NVIDIA H100 PCIe", 81559.0).name
        ('h100-80gb', 'h100-pcie-80gb')
        >>> recognised("NVIDIA T4", 15360.0)
        Card(name='NVIDIA T4', memory_gib=14.6, tflops=None, link=10.0, assumed=False)
    """  # noqa: E501
    words = {word for word in re.split(r"[^a-z0-9.]+", name.lower()) if word}
    kinds = [({*card.name.split("-")[:-1]} - {"rtx"}, card) for card in CARDS]
    like = [card for kind, card in kinds if kind <= words]
    if profile := _MIG.search(name):
        return _slice(name, like[0] if like else Card(name, 0.0), profile)
    gib = memory_mib / 1024
    known = [card for card in like if abs(card.memory_gib - gib) <= 3]
    if not known:
        return Card(name, round(gib - 0.4, 1))
    card = max(known, key=lambda card: card.name.count("-"))  # h100-pcie before h100
    return replace(card, memory_gib=round(min(card.memory_gib, gib), 1))


def cpu_card(precision: str = "bf16", processes: int = 1) -> Card:
    """Return this machine's processor as one of several processes has it, with the cores that this
    process may use.
    """
    written = os.environ.get("OMP_NUM_THREADS", "")
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if written.isdigit() and int(written) > 0:
        cores = min(int(written) * processes, cores)
    tflops = cores**SCALING * CORE_TFLOPS[precision] / processes
    return Card("cpu", round(available_gib() / processes, 1), tflops, link=2.0)


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
