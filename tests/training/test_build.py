"""What a trainer is made of before its first step, where only a GPU would show the fault."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

import recipes_lib
from recipes_lib.core.errors import RecipesError
from recipes_lib.train import main
from recipes_lib.training.build import describe_trainable
from recipes_lib.training.trainer import RecipeTrainer

NF4 = (
    "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"
)


@pytest.mark.parametrize(("fp16", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_adapters_of_a_quantized_base_are_float32_where_fp16_scales_the_loss(
    fp16: bool, expected: torch.dtype, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch cannot unscale bfloat16 gradients on a GPU, and TRL makes these adapters bfloat16."""
    from recipes_lib.config import upstream

    build, found = upstream.build_sft_config, []

    def build_config(*args: Any, **kwargs: Any) -> Any:
        config = build(*args, **kwargs)
        config.fp16 = fp16  # a recipe with fp16 is refused without a GPU
        return config

    def look(trainer: RecipeTrainer, checkpoint: Path | None) -> None:
        found.extend(
            parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad
        )
        raise RecipesError("seen")

    monkeypatch.setattr(upstream, "build_sft_config", build_config)
    monkeypatch.setattr(RecipeTrainer, "train_until_stop", look)
    dtype = "float16" if fp16 else "bfloat16"
    assert main([str(tiny_recipe), NF4, f"model.dtype={dtype}", "train.bf16=false"]) == 1
    assert found and set(found) == {expected}


def test_the_start_up_line_says_that_fsdp2_trains_half_precision_weights_in_float32() -> None:
    model = torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16)
    assert describe_trainable(model) == "6 of 6 parameters in bfloat16"
    assert (
        describe_trainable(model, raised=True)
        == "6 of 6 parameters in float32 (FSDP2 keeps the bfloat16 weights so)"
    )
    assert (
        describe_trainable(model.to(torch.float32), raised=True) == "6 of 6 parameters in float32"
    )


def assigned_arguments(source: str) -> list[str]:
    """Every `args.X = ...`, `anything.args.X = ...` and `setattr(args, ...)` of a file that knows
    TRL's arguments.
    """
    if not ("SFTConfig" in source or "TrainingArguments" in source or "SFTTrainer" in source):
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            found.append((node.value, f"{ast.unparse(node)}, line {node.lineno}"))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "setattr"
        ):
            found.append((node.args[0], f"{ast.unparse(node)}, line {node.lineno}"))
    return [
        where
        for owner, where in found
        if getattr(owner, "id", getattr(owner, "attr", None)) == "args"
    ]


def test_no_line_assigns_to_the_arguments_after_they_were_built() -> None:
    sources = {
        str(path): path.read_text(encoding="utf-8")
        for path in Path(recipes_lib.__file__).parent.rglob("*.py")
    }
    assert [
        (path, where) for path, source in sources.items() for where in assigned_arguments(source)
    ] == []
    assert assigned_arguments(
        "class SFTTrainer:\n  def f(self):\n    self.args.eval_on_start, x = False, 1"
    )


def test_a_training_and_its_resumption_change_none_of_their_arguments(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, changed = str(Path(recipes_lib.__file__).parent), []
    honest = SFTConfig.__setattr__

    def record(self: SFTConfig, name: str, value: Any) -> None:
        frame = sys._getframe(1)
        if frame.f_code.co_filename.startswith(ours) and frame.f_code.co_name != "build_sft_config":
            changed.append((frame.f_code.co_qualname, name))
        honest(self, name, value)

    monkeypatch.setattr(SFTConfig, "__setattr__", record)
    words = [
        str(tiny_recipe),
        "train.eval_on_start=true",
        "train.save_total_limit=1",
        "train.max_steps=4",
    ]
    with monkeypatch.context() as patch:
        from recipes_lib.training.stopping import StopRequest

        patch.setattr(StopRequest, "_asked_by_file", lambda self: 1)
        assert main(words) == 75
    assert main(words) == 0
    lines = (tiny_recipe.parent / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert sum('"step": 0,' in line for line in lines) <= 1
    assert changed == []
