"""How a model is loaded: the choice of its attention kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from recipes_lib.training.model import default_attention


@pytest.mark.parametrize(
    ("dtype", "capability", "installed", "expected"),
    [
        ("bfloat16", (9, 0), True, "flash_attention_2"),
        ("float16", (8, 0), True, "flash_attention_2"),
        ("float16", (7, 5), True, "sdpa"),  # Turing: installed, and refused at the first step
        ("float32", (9, 0), True, "sdpa"),
        ("bfloat16", (9, 0), False, "sdpa"),
    ],
)
def test_flash_attention_is_taken_where_it_is_installed_and_runs(dtype, capability, installed, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert default_attention(dtype) == expected
