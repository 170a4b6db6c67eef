"""The losses of a training are those of a plain torch loop over the same rows."""

import json
from typing import Any

import pytest
import torch
from tests.families import build_family
from transformers import AutoModelForCausalLM

from recipes_lib.train import main
from recipes_lib.training.trainer import RunCallback

STEPS, RATE = 4, 1e-3


def plain_losses(model: Any, steps: list[list[dict[str, list[int]]]]) -> list[float]:
    """Train with one row at a time and nothing of the libraries but the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    model.train()
    for rows in steps:
        tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
        total = 0.0
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[:-1].float(), torch.tensor(row["labels"][1:]), reduction="sum"
            )
            (loss / tokens).backward()
            total += float(loss.detach()) / tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_losses_are_those_of_a_plain_loop(
    family, tiny_recipe, tiny_model_dir, tmp_path, monkeypatch
) -> None:
    """Phi's head has a bias, Gemma 2's caps its logits."""
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    trainers: list[Any] = []
    monkeypatch.setattr(
        RunCallback, "on_step_begin", lambda self, *_, **__: trainers.append(self.trainer)
    )
    words = [f"model.name_or_path={folder}", "lora=null", f"train.learning_rate={RATE}"]
    words += ["train.lr_scheduler_type=constant", f"train.max_steps={STEPS}"]
    words += ["train.eval_strategy='no'", "train.save_strategy='no'"]
    assert main([str(tiny_recipe), *words]) == 0
    run = tiny_recipe.parent / "runs" / "tiny" / "metrics.jsonl"
    ours = [json.loads(line)["loss"] for line in run.read_text().splitlines()]
    trainer = trainers[0]
    steps = [
        [trainer.train_dataset[row] for row in trainer.batches.rows_of_step(step)]
        for step in range(STEPS)
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert ours == pytest.approx(plain_losses(model, steps), rel=1e-5)
