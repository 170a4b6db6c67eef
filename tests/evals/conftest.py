"""Finished runs made by hand: a tiny base, and adapters with random weights on it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.weights.runs import recorded_hashes


@pytest.fixture
def runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


@pytest.fixture
def make_run(runs_folder, tiny_model_dir):
    """A function that makes a finished LoRA run on the tiny base."""

    def make(name: str, seed: int, prompt_format: str = "dolly", dtype: str = "float32") -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = runs_folder / name
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base, lora)
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
        autocast = "bfloat16" if dtype == "bfloat16" else None
        check = {"sha256": recorded_hashes(folder / "adapter"), "autocast": autocast}
        RunDirectory(name).write_state("finished", weights_check=check)
        return folder

    return make


@pytest.fixture(scope="session")
def long_tiny_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with a context that judge prompts fit into."""
    folder = tmp_path_factory.mktemp("long") / "tiny-judge"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


@pytest.fixture
def judge_file(long_tiny_model_dir, tmp_path):
    """A function that writes and loads a judge file for the tiny model; keyword arguments replace
    its keys.
    """
    from recipes_lib.evals.recipe import load_judge_file

    evals = Path(__file__).resolve().parents[2] / "evals"

    def make(**keys):
        values = {
            "model": str(long_tiny_model_dir),
            "dtype": "float32",
            "mode": "logits",
            "max_new_tokens": 8,
            "relative_prompt": str(evals / "prompts/prometheus-relative.txt"),
            "absolute_prompt": str(evals / "prompts/prometheus-absolute.txt"),
            "rubric": str(evals / "rubrics/helpfulness.txt"),
            "reference_rubric": str(evals / "rubrics/correctness.txt"),
        }
        path = tmp_path / "judge.yaml"
        path.write_text(yaml.safe_dump({"judge": values | keys}))
        return load_judge_file(path).judge

    return make
