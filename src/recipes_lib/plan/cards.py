"""The cards of a plan, with the vendors' dense bf16 peaks, and the devices here; no torch."""

import itertools
import os
import re
import subprocess
from dataclasses import dataclass, replace

from recipes_lib.core.errors import RecipeError


@dataclass(frozen=True)
class Card:
    """One kind of card."""

    name: str
    memory_gib: float  # what a process can see of it
    tflops: float | None = None  # dense bf16 peak, None where it is not known

    @property
    def words(self) -> list[str]:
        """The parts of its name that tell it from others, its memory last."""
        return self.name.removeprefix("rtx-").removesuffix("gb").split("-")


CARDS = (
    Card("b200-180gb", 178.0, 2250),
    Card("h200-141gb", 139.8, 989),
    Card("h100-80gb", 79.1, 989),
    Card("h100-pcie-80gb", 79.1, 756),
    Card("a100-80gb", 79.2, 312),
    Card("a100-40gb", 39.4, 312),
    Card("mi300x-192gb", 191.5, 1307),
    Card("l40s-48gb", 44.4, 362),
    Card("rtx-6000-ada-48gb", 47.5, 364),
    Card("a10-24gb", 22.0, 125),
    Card("l4-24gb", 22.0, 121),
    Card("rtx-5090-32gb", 31.3, 210),
    Card("rtx-4090-24gb", 23.5, 165),
)
DEFAULT = "h100-80gb"


def card_named(name: str, memory_gib: float | None = None) -> Card:
    """Return the card of a name as people type it or CUDA gives it; a MIG slice has its share of
    seven of the speed, and with `memory_gib` an unknown card has that memory and no peak.
    """
    words = set(re.split(r"[^a-z0-9]+|gb\b", name.lower()))
    candidates = [card for card in CARDS if words.issuperset(card.words[:-1])]

    def fitness(card: Card) -> tuple[int, float]:
        """Order cards by the words of their name, then by their memory."""
        if memory_gib is None:
            return len(card.words), float(card.words[-1] in words)
        return len(card.words), -abs(card.memory_gib - memory_gib)

    if not candidates and memory_gib is None:
        names = ", ".join(card.name for card in CARDS)
        hint = f"cards: {names}, h100-mig-3g.40gb (any profile), cpu"
        raise RecipeError(f"--gpu: there is no card '{name}'", hint)
    card = max(candidates, key=fitness) if candidates else Card(name, memory_gib or 0.0)
    slice_of = re.search(r"(\d+)g\.(\d+)gb", name.lower())
    if slice_of:
        tflops = card.tflops and round(card.tflops * int(slice_of[1]) / 7)
        return Card(name, round(0.97 * float(slice_of[2]), 1), tflops)
    return replace(card, memory_gib=round(min(card.memory_gib, memory_gib or card.memory_gib), 1))


def devices_here() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls each GPU (or MIG slice) that may be used here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA reads it up to the first word that names no device
        words = (word.strip() for word in visible.split(","))
        return list(itertools.takewhile(re.compile(r"\d|GPU-|MIG-").match, words))
    try:
        command = ["nvidia-smi", "-L"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    names = re.findall(r"UUID: ([^)\s]+)", done.stdout)
    devices = []
    for name, after in itertools.pairwise(names + [""]):
        # a card that is cut stands before its slices
        if name.startswith("MIG-") or not after.startswith("MIG-"):
            devices.append(name)
    return devices
