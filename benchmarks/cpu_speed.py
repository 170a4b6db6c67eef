"""Tokens per CPU second of a LoRA training on one thread: this project's trainer beside a bare loop
over the same rows with transformers' own loss.

    python benchmarks/cpu_speed.py [RECIPE] [--steps 6]

Without RECIPE: the quickstart's. CPU seconds suffer little from other work on the machine; the
first step is not counted. Run both sides of a comparison on the same machine.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = Path(__file__).resolve().parents[1]
QUICKSTART = PROJECT / "recipes" / "quickstart" / "lora-r8.yaml"


def words_of(steps: int) -> list[str]:
    """Return the overrides that leave nothing but training."""
    return [
        f"train.max_steps={steps}",
        "train.logging_steps=1",
        "train.eval_strategy='no'",
        "train.save_strategy='no'",
    ]


def ours(recipe: Path, steps: int) -> float:
    """Train as `recipes train` does; return tokens per CPU second after the first step."""
    from transformers import Trainer

    from recipes_lib.train import main as train

    counted, ended = [], []
    original = Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step and not ended:
            ended.append(time.process_time())
        loss = original(self, model, inputs, *args, **options)
        if ended:
            counted.append((inputs["input_ids"].numel(), time.process_time()))
        return loss

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, RECIPES_RUNS_ROOT=folder),
        mock.patch.object(Trainer, "training_step", training_step),
    ):
        code = train([str(recipe), *words_of(steps)])
    if code:
        raise SystemExit(code)
    return sum(tokens for tokens, _ in counted) / (counted[-1][1] - ended[0])


def bare_loop(recipe: Path, steps: int) -> float:
    """Train the same rows one by one with transformers' loss; return tokens per CPU second."""
    import peft
    import torch

    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.config.upstream import build_lora_config
    from recipes_lib.data.prepare import prepare_data
    from recipes_lib.weights.load import load_model, load_tokenizer

    loaded = load_recipe(recipe, words_of(steps))
    tokenizer = load_tokenizer(loaded)
    rows = prepare_data(loaded, tokenizer).train
    model = peft.get_peft_model(load_model(loaded, tokenizer), build_lora_config(loaded)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=loaded.train["learning_rate"], fused=True)
    half = torch.bfloat16 if loaded.train.get("bf16", True) else None
    batch = loaded.run.global_batch_size or 8
    tokens, started = 0, 0.0
    for step in range(steps):
        if step == 1:
            tokens, started = 0, time.process_time()
        for row in rows.select(range(step * batch, (step + 1) * batch)):
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = model(input_ids=ids, labels=labels).loss / batch
            loss.backward()
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return tokens / (time.process_time() - started)


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    loop = bare_loop(options.recipe, options.steps)
    trainer = ours(options.recipe, options.steps)
    print(f"bare loop, transformers' loss: {loop:.0f} tokens per CPU second")
    print(f"this project: {trainer:.0f} tokens per CPU second, {trainer / loop:.2f} times as many")


if __name__ == "__main__":
    main()
