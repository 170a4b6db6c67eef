"""The cards of this machine, as CUDA numbers them, and those of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.core.errors import RecipeError
from recipes_lib.plan.cards import card_named, cards_here, devices_here, recognised

QUADRO, H100 = "Quadro P2000, 5120", "NVIDIA H100 80GB HBM3, 81559"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that puts an nvidia-smi with these cards onto the path."""

    def install(*cards: str, slices: tuple[str, ...] = ()) -> None:
        listed = [f"GPU {number}: {card} (UUID: GPU-{number})" for number, card in enumerate(cards)]
        listed += [f"  MIG {profile} Device 0: (UUID: MIG-{profile})" for profile in slices]
        rows = []
        for number, card in enumerate(cards):
            name, memory = card.split(", ")
            rows.append(f"{number}, GPU-{number}, {name}, {memory}")
        script = tmp_path / "nvidia-smi"
        lines = [
            "#!/bin/sh",
            'if [ "$1" = -L ]; then cat <<END',
            *listed,
            "END",
            "else cat <<END",
            *rows,
            "END",
            "fi",
        ]
        script.write_text("\n".join(lines) + "\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        cards_here.cache_clear()

    yield install
    cards_here.cache_clear()


def test_a_number_names_a_card_in_cudas_order_the_fastest_first(
    nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi numbers by PCI bus: there the Quadro is 0."""
    nvidia_smi(QUADRO, H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [card.name for card in cards_here()] == ["h100-80gb"]
    cards_here.cache_clear()
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [card.name for card in cards_here()] == ["Quadro P2000"]
    cards_here.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert [card.name for card in cards_here()] == ["h100-80gb"]


@pytest.mark.parametrize(("visible", "number"), [(None, 2), ("", 0), ("1", 1), ("0,-1,1", 1)])
def test_cards_that_a_training_will_not_see_do_not_count(
    nvidia_smi: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    number: int,
) -> None:
    nvidia_smi(H100, H100)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(cards_here()) == len(devices_here()) == number


def test_a_mig_slice_counts_and_not_the_card_it_is_cut_from(
    nvidia_smi: Callable[..., None],
) -> None:
    nvidia_smi(H100, slices=("3g.40gb", "1g.10gb"))
    first, second = cards_here()
    assert (first.memory_gib, second.memory_gib) == (38.8, 9.7)
    assert first.tflops == pytest.approx(989 * 3 / 7, abs=1)


def test_names_of_cards_are_short_and_unknown_ones_have_memory_and_no_time() -> None:
    named = {word: card_named(word).name for word in ("h100", "a100", "4090", "H200", "b200", "l4")}
    assert named == {
        "h100": "h100-80gb",
        "a100": "a100-80gb",
        "4090": "rtx-4090-24gb",
        "H200": "h200-141gb",
        "b200": "b200-180gb",
        "l4": "l4-24gb",
    }
    assert recognised("NVIDIA B200", 183359).name == "b200-180gb"
    assert recognised("NVIDIA H100 NVL", 95830).name == "h100-nvl-94gb"
    assert recognised("NVIDIA A10", 23028).name == "a10-24gb"
    assert recognised("Tesla T4", 15360).tflops is None
    with pytest.raises(RecipeError, match="no card 'tpu'"):
        card_named("tpu")
