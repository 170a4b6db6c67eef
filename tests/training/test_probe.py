"""The probe before the first step: it leaves nothing, and says what a step takes."""

from __future__ import annotations

import re

import pytest
import torch

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main
from recipes_lib.training import trainer

SHORT = ["train.max_steps=3", "train.eval_strategy='no'", "train.save_strategy='no'"]
LOGGED = re.compile(r'"(?:loss|grad_norm|tokens)": [^,]*')


@pytest.mark.parametrize(
    "words",
    [["lora.lora_dropout=0.3"], ["lora=null", "train.neftune_noise_alpha=5"]],
    ids=["lora with dropout", "full with noise"],
)
def test_a_training_with_the_probe_is_the_training_without(
    tiny_recipe, monkeypatch, words, capsys
) -> None:
    runs = tiny_recipe.parent / "runs"
    assert main([str(tiny_recipe), *SHORT, *words, "run.name=probed"]) == 0
    line = r"^probe: .*4 rows, 768 tokens.* s and \d\.\d GiB; training .*about"
    assert re.search(line, capsys.readouterr().out, re.M)
    monkeypatch.setattr(trainer, "probe", lambda *_: "")
    assert main([str(tiny_recipe), *SHORT, *words, "run.name=plain"]) == 0
    lines = [(runs / name / "metrics.jsonl").read_text() for name in ("probed", "plain")]
    probed, plain = map(LOGGED.findall, lines)
    assert probed == plain and len(probed) == 9
    probed, plain = (
        {file.name: file.read_bytes() for file in (runs / name).glob("*/*.safetensors")}
        for name in ("probed", "plain")
    )
    assert probed == plain != {}


def test_memory_that_does_not_suffice_is_one_line_with_what_to_change(
    tiny_recipe, monkeypatch, capsys
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.RecipeTrainer, "training_step", full)
    assert main([str(tiny_recipe), *SHORT, "run.name=full"]) == ExitCode.ENVIRONMENT
    error = capsys.readouterr().err
    assert "out of GPU memory" in error and "internal error" not in error
    assert "train.per_device_train_batch_size" in error
