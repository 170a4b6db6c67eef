"""Trained runs that several test files look at: a LoRA, a second LoRA, a QLoRA and a full
fine-tuning of the tiny model.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import NF4

HALF = ("model.dtype=bfloat16", "train.bf16=true")
KINDS = {
    "lora": [],
    "lora.chat": ["data.prompt_format=chat", "lora.r=2"],
    "qlora": [NF4.replace("}", ", bnb_4bit_use_double_quant: true}"), *HALF],
    "full": ["lora=null", "train.learning_rate=1e-3"],
}
STEPS = [f"train.{key}_steps=6" for key in ("max", "eval", "save")] + ["train.learning_rate=3e-2"]


@pytest.fixture(scope="session")
def runs_of_all_kinds(tiny_model_dir, tiny_recipe_text, tmp_path_factory) -> Iterator[Path]:
    """The folder of four finished runs, trained once; read it, and change only copies (`runs`)."""
    from recipes_lib.core.project import project_root
    from recipes_lib.train import main

    folder = tmp_path_factory.mktemp("kinds")
    rows = project_root() / "recipes" / "quickstart" / "data" / "instructions.jsonl"
    shutil.copyfile(rows, folder / "rows.jsonl")
    recipe = folder / "tiny.yaml"
    text = tiny_recipe_text(tiny_model_dir).replace(str(rows), "rows.jsonl")
    recipe.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_RUNS_ROOT", str(folder / "runs"))
        for name, overrides in KINDS.items():
            assert main([str(recipe), *STEPS, *overrides, f"run.name={name}"]) == 0
    yield folder / "runs"


@pytest.fixture
def runs(runs_of_all_kinds, tmp_path, monkeypatch) -> Callable[..., Path]:
    """A function that copies runs into this test's own runs root and returns the folder of the last
    one.
    """
    root = tmp_path / "runs"
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(root))

    def copy(*names: str) -> Path:
        for name in names:
            ignored = shutil.ignore_patterns("checkpoints")
            shutil.copytree(runs_of_all_kinds / name, root / name, ignore=ignored)
        return root / names[-1]

    return copy
