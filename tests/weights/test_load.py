"""How a base is loaded and told apart from others, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import RecipeError
from recipes_lib.weights.load import (
    attach,
    check_whole,
    default_attention,
    device_with_room,
    explain_load_failure,
    fingerprint,
)


def test_why_a_model_cannot_be_had_is_said_by_the_hubs_status_and_not_by_digits() -> None:
    request = "Request ID: Root=1-6940141f-401403404"
    for text, revision, words in (
        (f"404 Client Error. Entry Not Found ({request})", "v9", "no revision 'v9'"),
        (f"404 Client Error. ({request})", None, "neither a folder here nor a model"),
        (f"Repository Not Found, or gated, {request}", None, "has no model 'org/m'"),
        (f"401 Client Error: Unauthorized ({request})", None, "is gated"),
        (f"403 Client Error: Forbidden ({request})", None, "is gated"),
        ("You are trying to access a gated repo.", None, "is gated"),
        ("We couldn't connect to the Hub", None, "offline, and 'org/m' is not in the local cache"),
    ):
        section = ModelSection(name_or_path="org/m", revision=revision)
        error = explain_load_failure(section, OSError(text))
        assert words in error.what, text


def test_flash_attention_is_taken_where_it_is_installed_and_runs(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for dtype, capability, installed, expected in (
        ("bfloat16", (9, 0), True, "flash_attention_2"),
        ("float16", (7, 5), True, None),  # Turing: installed, and refused at the first step
        ("float32", (9, 0), True, None),
        ("bfloat16", (9, 0), False, None),
    ):
        with monkeypatch.context() as patch:
            spec = object() if installed else None
            patch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
            patch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
            assert default_attention(dtype) == expected, (dtype, capability)


def test_a_model_that_one_gpu_does_not_hold_is_loaded_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    model = torch.nn.Linear(1000, 1, bias=False)  # 4,000 bytes
    for free, device in ((4400, "cpu"), (4500, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert str(device_with_room(model)) == device


def test_an_adapter_on_another_base_is_refused_by_the_name_of_a_layer(
    tiny_model_dir: Path, runs: Callable[..., Path]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = runs("lora") / "adapter"
    config = LlamaConfig.from_pretrained(tiny_model_dir)
    for change in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}):
        config = LlamaConfig.from_pretrained(tiny_model_dir, **change)
        with pytest.raises(RecipeError, match="its base") as caught:
            attach(LlamaForCausalLM(config), {"default": adapter})
        assert "another base model" in caught.value.hints[0], change
    base = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model_dir))
    model = attach(base, {"one": adapter, "two": adapter})
    assert {*model.peft_config} == {"one", "two"}


def test_a_base_is_known_by_its_content_and_a_truncated_file_is_named(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    assert fingerprint(folder) == fingerprint(tiny_model_dir)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(folder) != fingerprint(tiny_model_dir)
    check_whole(folder)
    file.write_bytes(content[:-9])
    with pytest.raises(Exception, match="is damaged"):
        check_whole(folder)
