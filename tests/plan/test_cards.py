"""The cards of the table, and the devices of this machine."""

import pytest

from recipes_lib.core.errors import RecipeError
from recipes_lib.plan.cards import card_named, devices_here

SLICED = """GPU 0: NVIDIA H100 (UUID: GPU-0)
  MIG 3g.40gb Device 0: (UUID: MIG-a)
  MIG 1g.10gb Device 1: (UUID: MIG-b)
GPU 1: NVIDIA H100 (UUID: GPU-1)"""
NAMES = {  # what people type, or what CUDA says of a card and its memory
    ("h100", None): "h100-80gb",
    ("a100", None): "a100-80gb",
    ("a100-40gb", None): "a100-40gb",
    ("a100-40", None): "a100-40gb",
    ("4090", None): "rtx-4090-24gb",
    ("NVIDIA B200", 178.0): "b200-180gb",
    ("NVIDIA H100 80GB HBM3", 79.1): "h100-80gb",
    ("NVIDIA A100-SXM4-40GB", 39.4): "a100-40gb",
    ("NVIDIA GeForce RTX 4090", 23.5): "rtx-4090-24gb",
}


def test_devices_are_those_that_cuda_will_see(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<END\n{SLICED}\nEND\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_here() == ["MIG-a", "MIG-b", "GPU-1"], "not the card that is cut into slices"
    for visible, seen in {"": [], "1": ["1"], "0,-1,1": ["0"], "GPU-1, 0": ["GPU-1", "0"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert devices_here() == seen


def test_a_card_has_many_names_and_a_slice_has_its_share():
    assert {words: card_named(*words).name for words in NAMES} == NAMES
    for name in ("h100-mig-3g.40gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"):
        card = card_named(name, 39.0)
        assert card.memory_gib == 38.8 and card.tflops == pytest.approx(989 * 3 / 7, abs=1)
    unknown = card_named("Tesla T4", 14.6)
    assert (unknown.memory_gib, unknown.tflops) == (14.6, None)
    with pytest.raises(RecipeError, match="no card 'tpu'"):
        card_named("tpu")
