"""The probe before the first step: it leaves nothing, and says what a step takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main
from recipes_lib.training import trainer

SHORT = ["train.max_steps=3", "train.eval_strategy='no'", "train.save_strategy='no'"]


@pytest.mark.parametrize(
    "words",
    [["lora.lora_dropout=0.3"], ["lora=null", "train.neftune_noise_alpha=5"]],
    ids=["lora with dropout", "full with noise"],
)
def test_a_training_with_the_probe_is_the_training_without(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    runs = tiny_recipe.parent / "runs"
    assert main([str(tiny_recipe), *SHORT, *words, "run.name=probed"]) == 0
    monkeypatch.setattr(trainer, "probe", lambda *_: "")
    assert main([str(tiny_recipe), *SHORT, *words, "run.name=plain"]) == 0
    losses = [
        re.findall(
            r'"(?:loss|grad_norm|tokens)": [^,]*', (runs / name / "metrics.jsonl").read_text()
        )
        for name in ("probed", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    weights = [
        {file.name: file.read_bytes() for file in (runs / name).glob("*/*.safetensors")}
        for name in ("probed", "plain")
    ]
    assert weights[0] == weights[1] != {}


def test_it_says_the_size_of_the_longest_micro_batch_its_time_and_its_memory(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), *SHORT, "run.name=said"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^probe: .*4 rows, 768 tokens.* s and \d\.\d GiB; training .*about", said, re.M
    )


def test_memory_that_does_not_suffice_is_one_line_with_what_to_change(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.RecipeTrainer, "training_step", full)
    assert main([str(tiny_recipe), *SHORT, "run.name=full"]) == ExitCode.ENVIRONMENT
    error = capsys.readouterr().err
    assert "longest micro-batch (4 rows, 768 tokens)" in error
    assert "train.per_device_train_batch_size" in error
    assert "train.activation_checkpointing: true" in error


def test_attention_without_a_backward_pass_is_an_error_of_the_recipe(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SHORT, "model.attn_implementation=flex_attention", "run.name=flex"]
    assert main([str(tiny_recipe), *words]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith("command line") and "flex_attention" in error
