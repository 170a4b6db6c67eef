"""Finished runs made by hand: a tiny base, and adapters with random weights on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


@pytest.fixture
def make_run(runs_folder, tiny_model_dir):
    """A function that makes a finished LoRA run on the tiny base."""

    def make(name: str, seed: int, prompt_format: str = "dolly", dtype: str = "float32", recorded_hash: str | None = None) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = runs_folder / name
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(seed)
        for key, value in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value, std=0.5)
        model.save_pretrained(folder / "adapter")
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder / "adapter")
        recipe = {
            "model": {"name_or_path": str(tiny_model_dir), "dtype": dtype},
            "data": {"source": "unused.jsonl", "prompt_format": prompt_format},
            "lora": {"r": 4, "lora_alpha": 8},
            "run": {"name": name},
        }
        (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe))
        state = {"format_version": 1, "name": name, "created": "", "updated": "", "state": "finished"}
        if recorded_hash:
            state["guard"] = {"prompt_format_hash": recorded_hash}
        (folder / "run.json").write_text(json.dumps(state))
        return folder

    return make
