"""How fast and how large a LoRA training is on the GPU that is here, way by way, through the real
trainer: tokens per second, share of the peak (MFU), peak memory beside the plan, and the losses.

    python benchmarks/throughput.py [--minutes 10] [--csv benchmarks/results/throughput.csv]
    python benchmarks/throughput.py --tiny     # the same code with a tiny model, on a CPU too

It needs no network: weights are random, tokenizer and rows are made. Each way is a process of its
own; what fails or does not fit costs its own row. A way whose losses are more than 0.2% from those
of plain padded batches is marked: a speed that computes something else is no speed.
"""

import argparse
import csv
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
STEPS, WARM = 20, 5  # the first steps compile and warm up, and are not timed
AS_LOSSES = 0.002
REFERENCE = "padded"
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
NF4 = (
    "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true,"
    " bnb_4bit_compute_dtype: bfloat16}"
)
WAYS: dict[str, list[str]] = {
    REFERENCE: ["model.attn_implementation=sdpa", "train.padding_free=false"],
    "padding-free": ["model.attn_implementation=sdpa", "train.padding_free=true"],
    "checkpointed": ["train.activation_checkpointing=true"],
    "flash_attention_2": ["model.attn_implementation=flash_attention_2"],
    "varlen": ["model.attn_implementation=varlen"],
    "compiled": ["train.torch_compile=true"],
    "QLoRA": [NF4],
    "8 bits": ["quantization={load_in_8bit: true}"],
}
RECIPE = """\
model: {{name_or_path: {model}, dtype: bfloat16}}
data: {{source: {rows}, prompt_format: dolly, split: {{method: none}}}}
lora: {{r: 32, lora_alpha: 64, lora_dropout: 0.0, target_modules: all-linear}}
train:
  bf16: true
  learning_rate: 1.0e-4
  lr_scheduler_type: constant
  max_length: 1024
  max_steps: {steps}
  per_device_train_batch_size: 4
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  seed: 42
run: {{global_batch_size: 16}}
launch: {{accelerate: {launch}}}
"""


def make_inputs(folder: Path, size: dict[str, int], launch: str) -> Path:
    """Write a model with random weights, a tokenizer of one word a token, and rows as long as
    Dolly's; return the recipe.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(size["vocab_size"] - 3))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = LlamaConfig(**size, max_position_embeddings=4096)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(16 * STEPS):
            length = min(1000, max(16, round(draw.lognormvariate(4.9, 0.8))))  # mean about 185
            text = " ".join(draw.choice(words[3:]) for _ in range(length))
            row = {"instruction": "w1 w2", "context": "", "response": text}
            file.write(json.dumps(row) + "\n")
    recipe = folder / "recipe.yaml"
    rows, model_folder = folder / "rows.jsonl", folder / "model"
    recipe.write_text(
        RECIPE.format(model=model_folder, rows=rows, steps=STEPS, launch=launch), encoding="utf-8"
    )
    return recipe


def measure(recipe: Path, name: str, words: list[str], seconds: float) -> dict[str, Any]:
    """Train one way in a process of its own; return its row of the table."""
    runs, run = recipe.parent / "runs", name.replace(" ", "-")
    command = [sys.executable, "-m", "recipes_lib.train", str(recipe), *words, f"run.name={run}"]
    environment = {**os.environ, "RECIPES_RUNS_ROOT": str(runs), "HF_HUB_OFFLINE": "1"}
    row: dict[str, Any] = {"way": name}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired:
        return row | {"state": "out of time"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[0]
        return row | {"state": f"exit {done.returncode}: {last[:120]}"}
    lines = (runs / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    summary = json.loads((runs / run / "run.json").read_text(encoding="utf-8"))["summary"]
    speeds = [line["tokens_per_second"] for line in steps[WARM:]]
    return row | {
        "state": "measured",
        "tokens_per_second": round(statistics.median(speeds), 1),
        "steps": len(speeds),
        "peak_gib": round(summary["peak_memory_gib"], 2),
        "losses": [line["loss"] for line in steps],
    }


def add_plan(row: dict[str, Any], recipe: Path, words: list[str]) -> None:
    """Put the plan's peak, and the share of the card's peak that was reached, into a row."""
    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.plan.plan import launch_and_card, plan_of

    loaded = load_recipe(recipe, words)
    plan = plan_of(loaded, *launch_and_card(loaded, None))
    row["card"] = plan.card.name
    row["planned_gib"] = round(
        plan.needed - (0 if plan.card.name == "cpu" else plan.memory["context"]), 2
    )
    if plan.card.tflops and row["state"] == "measured":
        operations = 4 * plan.trace.active * row["tokens_per_second"]
        row["mfu"] = round(operations / (plan.card.tflops * 1e12), 4)


def losses_apart(losses: list[float], reference: list[float]) -> float:
    """Return the largest relative difference of two trainings' losses, step by step."""
    pairs = zip(losses, reference, strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)


def main(argv: list[str] | None = None) -> int:
    """Measure every way and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument("--minutes", type=float, default=10, help="for all ways together")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--csv", type=Path, help="file for the table")
    options = parser.parse_args(argv)
    import torch

    launch = "single_gpu" if torch.cuda.is_available() else "cpu"
    if launch == "cpu" and not options.tiny:
        print("there is no GPU here; --tiny tries the code with a tiny model", file=sys.stderr)
        return 2
    end, rows = time.monotonic() + 60 * options.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_inputs(Path(folder), TINY if options.tiny else LLAMA_2_7B, launch)
        for way in options.ways:
            row = measure(recipe, way, WAYS[way], end - time.monotonic())
            if row["state"] == "measured":
                add_plan(row, recipe, WAYS[way])
            rows.append(row)
            print({key: value for key, value in row.items() if key != "losses"}, flush=True)
    reference = next((row.get("losses") for row in rows if row["way"] == REFERENCE), None)
    for row in rows:
        losses = row.pop("losses", None)
        if losses and reference and row["way"] not in ("QLoRA", "8 bits"):
            apart = losses_apart(losses, reference)
            row["losses_apart"] = f"{apart:.4%}" + " TOO FAR" * (apart > AS_LOSSES)
    if options.csv:
        names = ["date", *dict.fromkeys(key for row in rows for key in row)]
        today = datetime.date.today().isoformat()
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({"date": today, **row} for row in rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return 0 if any(row["state"] == "measured" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
