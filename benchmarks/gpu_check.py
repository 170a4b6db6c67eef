"""How fast and how large training and answering are on this GPU, through the real trainer: the
shipped recipes on Llama-2-7B at full size with random weights, rows as long as Dolly's.

    python -m benchmarks.gpu_check [--minutes 8] [--json benchmarks/results/gpu_check.json]
    python -m benchmarks.gpu_check --cpu    # the same code on a CPU with a tiny model

It needs no network: weights, tokenizer and rows are made. Each row of the table is a process of its
own with a budget of seconds; what fails, does not fit or takes too long costs its own row, and a
row that the time does not reach is "not run". Results are written after each row.

Tokens are those of the examples, padding does not count; MFU is counted with 4N operations per
token for adapters, 6N for full weights; the plan is that of the run itself. A goal is compared with
a row only where the trainer really took the path that the goal is for, on the card and the model
that it is for.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path[:0] = [str(HERE), str(PROJECT / "src")]
# unlike in a training, the tokenizer has a handful of rows, and no Hub is asked
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

LORA, QLORA, FULL = (
    f"llama2-7b-dolly/{name}" for name in ("lora-bf16-r32", "qlora-r32", "full-bf16")
)
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = {
    **LLAMA_2_7B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
VARLEN, COMPILED, FUSED, FP8 = "varlen", "compiled", "fused", "fp8"
FEWEST_STEPS = 10  # timed, for a speed that plans are made with
AS_LOSSES = 0.002  # how far the losses of a path may be from the reference's
REFERENCE = "padded, nothing compiled"


@dataclass(frozen=True)
class Row:
    """What is measured.

    Args:
        recipe: a shipped one.
        seconds: the most that the row may take.
        kind: training, command (the training that a user starts, to its checked adapter), answers
            or judgments.
        path: what the trainer must really have taken for the goal to be the row's.
        goal: tokens per second on one H100.
    """

    name: str
    recipe: str = LORA
    overrides: tuple[str, ...] = ()
    seconds: int = 60
    kind: str = "training"
    path: tuple[str, ...] = ()
    goal: int | None = None

    @property
    def run(self) -> str:
        """The name of its run."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


_A = ("model.attn_implementation=varlen",)
_B = (*_A, "train.torch_compile=true")
_C = (*_B, "model.lora_implementation=fused")
_D = (*_C, "model.base_precision=fp8")
ROWS = (
    Row("shipped default", seconds=75),
    Row("A: varlen", LORA, _A, path=(VARLEN,), goal=9_000),
    Row("B: A, blocks compiled", LORA, _B, 90, path=(VARLEN, COMPILED), goal=13_000),
    Row("C: B, adapters fused", LORA, _C, 90, path=(VARLEN, COMPILED, FUSED), goal=18_000),
    Row("QLoRA", QLORA),
    Row(REFERENCE, LORA, ("model.attn_implementation=sdpa", "train.padding_free=false"), 75),
    Row("D: C, base in FP8", LORA, _D, 90, path=(VARLEN, COMPILED, FUSED, FP8), goal=25_000),
    Row("answers", seconds=60, kind="answers"),
    Row("judgments", seconds=60, kind="judgments"),
    Row("full", FULL, seconds=75),
    Row("QLoRA, C", QLORA, _C, 90),
    Row("single_gpu.yaml", seconds=90, kind="command"),
)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        examples: of an optimizer step.
        steps: optimizer steps; another one is profiled.
        warm: steps that count for losses, and not for the speed.
        requests: answers, and judgments.
        tokens: of an answer.
    """

    config: dict[str, int] = field(default_factory=lambda: dict(LLAMA_2_7B))
    examples: int = 32
    steps: int = 20
    warm: int = 5
    max_length: int = 1024
    requests: int = 256
    tokens: int = 256
    on_cpu: bool = False


SMALL = Size(TINY, 8, steps=4, warm=1, max_length=128, requests=4, tokens=8, on_cpu=True)


def make_inputs(folder: Path, size: Size) -> None:
    """Write a model with random weights, a tokenizer of one token per word, and rows as long as
    Dolly's.
    """
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from recipes_lib.planning.lengths import dolly_lengths

    vocabulary = size.config["vocab_size"]
    words = ["<unk>", "<s>", "</s>", "A", "B", "[RESULT]"]
    words += [f"w{number}" for number in range(vocabulary - len(words))]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    model = folder / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(model)
    torch.manual_seed(0)
    with torch.device("cpu" if size.on_cpu else "cuda"):
        LlamaForCausalLM(LlamaConfig(**size.config)).to(torch.bfloat16).save_pretrained(model)
    draw = random.Random(0)
    lengths = dolly_lengths(vocabulary)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for _ in range((size.steps + 2) * size.examples):
            many = min(draw.choice(lengths), size.max_length - 10) - 30  # the template's words
            text = draw.choices(words[6:], k=max(8, many))
            half = len(text) // 2
            row = {"instruction": " ".join(text[:half]), "response": " ".join(text[half:])}
            rows.write(json.dumps({**row, "context": "", "category": "open_qa"}) + "\n")


def overrides_of(row: Row, size: Size, folder: Path) -> list[str]:
    """Return what is written over a row's recipe: the made inputs, and few steps."""
    own = [*row.overrides, f"model.name_or_path={folder / 'model'}"]
    own += [f"data.source={folder / 'rows.jsonl'}", "data.split={method: none}"]
    own += ["train.eval_strategy='no'", "train.save_strategy='no'", "train.logging_steps=1"]
    own += [f"train.max_steps={size.steps + 1}", f"train.max_length={size.max_length}"]
    own += [f"run.global_batch_size={size.examples}", f"run.name={row.run}"]
    if size.on_cpu:  # which has no such kernel, and compiles for minutes
        own = [word for word in own if word not in _A]
        own += ["train.torch_compile_backend=aot_eager"] * ("train.torch_compile=true" in own)
    return own


def train_row(row: Row, size: Size, folder: Path, until: float) -> dict[str, Any]:
    """Train a recipe as `recipes_lib.train` does, its last step under torch's profiler, and return
    what its own records say; the weights are not saved.

    Args:
        until: `time.monotonic()` at which the last step begins, however few there were.
    """
    import transformers.trainer
    from torch._dynamo.utils import counters
    from transformers.trainer import DEFAULT_CALLBACKS

    from recipes_lib import train
    from recipes_lib.core.project import runs_root
    from recipes_lib.planning import measured
    from recipes_lib.training import finish
    from recipes_lib.training.trainer import RecipeTrainer

    counters.clear()
    watch = _watch(size, until)
    found: dict[str, Any] = {}

    def keep(trainer: Any, recipe: Any, data: Any, run: Any, summary: Any) -> dict[str, Any]:
        took = path_of(trainer, fused=found["fused"])
        found.update(summary=summary, path=took, operations=_operations(recipe))
        found["planned_path"] = _planned_path(recipe, took, size)
        return {}

    def begin(trainer: RecipeTrainer, checkpoint: Path | None) -> float:
        # they are PEFT's again when the training ends
        found["fused"] = bool(trainer.fused_lora and trainer.fused_lora.groups)
        return whole(trainer, checkpoint)

    whole = RecipeTrainer.train_until_stop

    with (
        patch.object(transformers.trainer, "DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, watch]),
        patch.object(RecipeTrainer, "train_until_stop", begin),
        patch.object(finish, "save_and_check", keep),
        patch.object(finish, "record_finish", lambda *_: None),
        patch.object(measured, "rows", tuple),  # the plan beside it is the counted one
    ):
        code = train.main([str(row.recipe), *overrides_of(row, size, folder)])
    if code:
        raise RuntimeError(f"exit code {code}")
    lines = [
        json.loads(line)
        for line in (runs_root() / row.run / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    summary = found["summary"]
    return {
        **speed_of(lines[: watch.steps], size.warm),
        "counted_tokens_per_s": summary["tokens"] / (summary["planned_seconds"] or math.inf),
        "planned_path": found["planned_path"],
        "losses": [line["loss"] for line in lines],
        "path": found["path"],
        "peak_gib": summary["peak_memory_gib"],
        "planned_peak_gib": summary["planned_peak_memory_gib"],
        "operations_per_token": found["operations"],
        "largest_kernels": watch.largest,
    }


def _watch(size: Size, until: float) -> Any:
    """Return a callback that counts the steps before the profiled one, and names the kernels that
    took most of that.
    """
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        steps = 0
        largest: list[dict[str, Any]] = []
        _profile: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == size.steps or time.monotonic() > until:
                activities = [ProfilerActivity.CPU if size.on_cpu else ProfilerActivity.CUDA]
                self._profile = profile(activities=activities)
                self._profile.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self._profile is None:
                self.steps = state.global_step
                return
            self._profile.__exit__(None, None, None)
            self.largest = largest_kernels(self._profile.key_averages(), size.on_cpu)
            control.should_training_stop = True

    return Watch()


def largest_kernels(events: Any, on_cpu: bool, many: int = 5) -> list[dict[str, Any]]:
    """Return the kernels that took most of a step, with their share of all kernels' time."""
    own = {
        one.key: one.self_cpu_time_total if on_cpu else one.self_device_time_total for one in events
    }
    total = sum(own.values()) or 1
    ordered = sorted(own, key=lambda name: -own[name])[:many]
    return [{"kernel": name, "share": own[name] / total} for name in ordered]


def path_of(trainer: Any, fused: bool) -> list[str]:
    """Return what a trainer really took: its attention, whether padding was dropped, blocks
    compiled, adapters fused, and the base multiplied in FP8.

    Args:
        fused: whether any adapters were, while it trained.
    """
    from torch._dynamo.utils import counters

    from recipes_lib.models.fp8 import Fp8Linear

    path = [trainer.model.config._attn_implementation]
    path += ["padding-free"] if trainer.flattens else []
    path += [COMPILED] if counters["stats"]["unique_graphs"] else []
    path += [FUSED] if fused else []
    layers = [one for one in trainer.model.modules() if isinstance(one, Fp8Linear)]
    return path + ([FP8] if layers and layers[0].scaled else [])


def _planned_path(recipe: Any, took: list[str], size: Size) -> str | None:
    """Return the path that the plan counts for a recipe, where the trainer took it."""
    from recipes_lib.config.launch import plan_launch
    from recipes_lib.planning.measured import counted_path
    from recipes_lib.planning.plan import model_shape
    from recipes_lib.planning.settings import settings_of

    launch = plan_launch(recipe.launch, "cpu" if size.on_cpu else "single_gpu", gpus=1)
    settings = settings_of(recipe, launch, model_shape(recipe), on_cpu=size.on_cpu)
    kinds = {VARLEN: "flash", "sdpa_by_document": "documents"}
    fused = settings.adapter is not None and settings.adapter.fused
    counted = (settings.attention, settings.compiled, fused, settings.fp8)
    really = (kinds.get(took[0], took[0]), *(one in took for one in (COMPILED, FUSED, FP8)))
    return counted_path(settings) if counted == really else None


def speeds_for_plans(rows: list[dict[str, Any]], card: str, date: str) -> list[Any]:
    """Return the rows that `recipes plan` takes its times from: timed over enough steps, and
    trained the way that the plan counts.
    """
    from recipes_lib.planning.measured import Measured

    return [
        Measured(
            card=card,
            path=row["planned_path"],
            model="Llama-2-7B",
            tokens_per_second=round(row["tokens_per_s"], 1),
            counted=round(row["counted_tokens_per_s"], 1),
            n=row["n"],
            date=date,
        )
        for row in rows
        if row.get("planned_path") and row["n"] >= FEWEST_STEPS and row["counted_tokens_per_s"]
    ]


def _operations(recipe: Any) -> int:
    """4N for adapters, 6N for full weights."""
    from recipes_lib.planning.plan import model_shape

    return (6 if recipe.lora is None else 4) * model_shape(recipe).active_parameters


def speed_of(lines: list[dict[str, Any]], warm: int) -> dict[str, Any]:
    """Return tokens per second of the steps that metrics.jsonl tells the time of, those of the
    beginning left out.

    Example:
        >>> lines = [{"tokens": 9, "step_seconds": [None]}, {"tokens": 29, "step_seconds": [2.0]}]
        >>> speed_of([*lines, {"tokens": 59, "step_seconds": [2.0]}], warm=1)
        {'tokens_per_s': 12.5, 'median': 12.5, 'n': 2}
    """
    counts = [0, *(line["tokens"] for line in lines)]
    steps = [
        (counts[at + 1] - counts[at], line["step_seconds"][0]) for at, line in enumerate(lines)
    ]
    timed = [(tokens, seconds) for tokens, seconds in steps[warm:] if seconds]
    if not timed:
        raise RuntimeError(f"no step was timed after the first {warm}")
    spent = sum(seconds for _, seconds in timed)
    return {
        "tokens_per_s": sum(tokens for tokens, _ in timed) / spent,
        "median": statistics.median(tokens / seconds for tokens, seconds in timed),
        "n": len(timed),
    }


def command_row(row: Row, size: Size, folder: Path, until: float) -> dict[str, Any]:
    """Train as a user does, with `accelerate launch`, until the adapter was reloaded and checked;
    return what run.json says.
    """
    from recipes_lib.core.project import runs_root

    config = PROJECT / f"accelerate_configs/{'cpu' if size.on_cpu else 'single_gpu'}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    words = [*overrides_of(row, size, folder), f"train.max_steps={size.warm + 2}"]
    command = [*launcher, "-m", "recipes_lib.train", row.recipe, *words, "train.warmup_steps=0"]
    path = os.pathsep.join([str(PROJECT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=max(until - time.monotonic(), 1),
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(_said(done.stderr))
    record = json.loads((runs_root() / row.run / "run.json").read_text(encoding="utf-8"))
    summary, reload = record["summary"], record["weights_check"]["reload"]
    return {
        "tokens_per_s": summary["tokens_per_second"],
        "n": summary["steps"],
        "peak_gib": summary["peak_memory_gib"],
        "planned_peak_gib": summary["planned_peak_memory_gib"],
        "reloaded": reload,
    }


def answer_row(row: Row, size: Size, folder: Path, until: float) -> dict[str, Any]:
    """Answer questions in batches of what fits the free memory."""
    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.engine import Decoding, Request
    from recipes_lib.generation.transformers_engine import TransformersEngine
    from recipes_lib.models.architectures import ready_to_answer
    from recipes_lib.weights.base import load_base, load_checked_tokenizer

    recipe = load_recipe(row.recipe, overrides_of(row, size, folder))
    tokenizer = load_checked_tokenizer(recipe, remote_code=False)
    model = ready_to_answer(load_base(recipe, tokenizer))
    engine = TransformersEngine(model, tokenizer, "random weights")
    engine.stop_ids = [len(tokenizer) - 1]  # random weights hardly choose it: all answers are long
    asked = [
        Request(key=str(at), ids=tuple(range(6, 6 + 20 + at % 60))) for at in range(size.requests)
    ]
    list(engine.complete(asked[:2], Decoding(max_new_tokens=4)))
    began = time.perf_counter()
    answered = list(engine.complete(asked, Decoding(max_new_tokens=size.tokens)))
    spent = time.perf_counter() - began
    written = sum(one.num_tokens for one in answered)
    return {
        "answers_per_s": len(answered) / spent,
        "tokens_per_s": written / spent,
        "n": len(asked),
    }


def judge_row(row: Row, size: Size, folder: Path, until: float) -> dict[str, Any]:
    """Judge pairs of answers by the probabilities of the verdicts."""
    from recipes_lib.generation.judges import opened
    from recipes_lib.judging.judge import Item, judge_items
    from recipes_lib.judging.judge_file import load_judge_file
    from recipes_lib.judging.store import JudgmentStore

    file = load_judge_file(PROJECT / "evals/judges/quickstart.yaml")
    judge = replace(file.judge, model=str(folder / "model"), prompt_style="prometheus")
    pairs = [
        Item(str(at), f"w1 w2 w{at}", "w3 w4 w5 " * 60, f"w6 w7 w{at} " * 40)
        for at in range(1 + size.requests // 2)
    ]
    with opened(replace(file, judge=judge)) as judging:
        plan = judging.plan("relative")
        store = JudgmentStore(folder / "first.jsonl")
        judge_items(pairs[:1], judging, store, plan)  # loads the weights
        began = time.perf_counter()
        run = judge_items(pairs[1:], judging, JudgmentStore(folder / "rest.jsonl"), plan)
        return {"judgments_per_s": run.asked / (time.perf_counter() - began), "n": run.asked}


MEASURE: dict[str, Callable[[Row, Size, Path, float], dict[str, Any]]] = {
    "training": train_row,
    "command": command_row,
    "answers": answer_row,
    "judgments": judge_row,
}


def attempt(row: Row, size: Size, folder: Path, until: float) -> dict[str, Any]:
    """Return what was measured of a row in this process, or why nothing was."""
    said = io.StringIO()
    os.environ["RECIPES_RUNS_ROOT"] = str(folder / "runs")
    try:
        with contextlib.redirect_stderr(said):
            return MEASURE[row.kind](row, size, folder, until)
    except Exception as error:
        reason = _said(said.getvalue(), last=True) if row.kind == "training" else ""
        return {"not_run": reason or f"{type(error).__name__}: {_said(str(error))}"}


def _said(text: str, last: bool = False) -> str:
    """The first, or the last, line that is no hint, progress, warning or traceback."""
    noise = (" ", "warning", "Traceback", "\r", "Loading", "Writing")
    lines = [line for line in text.splitlines() if line and not line.startswith(noise)]
    return lines[-1 if last else 0][:200] if lines else ""


def attempt_apart(row: Row, size: Size, folder: Path, seconds: float) -> dict[str, Any]:
    """Measure a row in a process of its own, which is ended when its time is over."""
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    words = ["--row", row.name, "--folder", str(folder), "--seconds", str(seconds - 10)]
    command = [sys.executable, "-m", "benchmarks.gpu_check", *words]
    try:
        done = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, timeout=seconds + 5
        )
    except subprocess.TimeoutExpired:
        return {"not_run": f"not done after {seconds:.0f} s"}
    if not out.is_file():
        return {"not_run": _said(done.stderr) or f"exit code {done.returncode}"}
    return dict(json.loads(out.read_text(encoding="utf-8")))


def run_rows(
    rows: Iterator[Row] | tuple[Row, ...],
    size: Size,
    folder: Path,
    deadline: float,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measure row after row until the deadline; each is measured or says why not.

    Args:
        keep: is given all rows after each.
    """
    found: list[dict[str, Any]] = []
    for row in rows:
        left = deadline - time.monotonic()
        if left < (0 if size.on_cpu else 30):
            measured: dict[str, Any] = {"not_run": "no time left"}
        elif size.on_cpu:
            measured = attempt(row, size, folder, time.monotonic() + min(left, row.seconds))
        else:
            measured = attempt_apart(row, size, folder, min(left, row.seconds))
        found.append({"row": row.name, "setting": asdict(row), **measured})
        print(row.name, measured.get("not_run") or _numbers(measured), sep=": ", flush=True)
        keep(found)
    return found


def _numbers(measured: dict[str, Any]) -> str:
    units = {"answers_per_s": "answers/s", "judgments_per_s": "judgments/s"}
    units["tokens_per_s"] = "tokens/s"
    found = [f"{measured[key]:,.1f} {unit}" for key, unit in units.items() if key in measured]
    return ", ".join([*found, f"n={measured['n']}", *measured.get("path", ())])


def compare(rows: list[dict[str, Any]], card: Any, size: Size) -> list[str]:
    """Add MFU and the distance of the losses to the rows, and return the sentences that the numbers
    allow.
    """
    by_name = {row["row"]: row for row in rows if "not_run" not in row}
    reference = by_name.get(REFERENCE)
    said = []
    for name, row in by_name.items():
        if card is not None and row.get("operations_per_token"):
            row["mfu"] = row["operations_per_token"] * row["tokens_per_s"] / (card.tflops * 1e12)
        if (
            reference
            and row is not reference
            and row["setting"]["recipe"] == LORA
            and "losses" in row
        ):
            row["losses_apart"] = apart = losses_apart(row["losses"], reference["losses"])
            if apart > AS_LOSSES and FP8 not in row["path"]:  # which is another precision
                said.append(f"{name}: losses are {apart:.2%} from those of '{REFERENCE}'")
        said += goal_of(row, card, size)
    base, quantized = (by_name.get(name) for name in ("shipped default", "QLoRA"))
    if base and quantized and card is not None:
        share = quantized["tokens_per_s"] / base["tokens_per_s"]
        said.append(f"QLoRA runs at {share:.2f} of bf16 LoRA as shipped (goal 0.9)")
    measured = [row for row in rows if row.get("peak_gib") and row.get("planned_peak_gib")]
    near = [row for row in measured if abs(row["planned_peak_gib"] / row["peak_gib"] - 1) <= 0.08]
    if measured and not size.on_cpu:
        said.append(f"peak within 8% of the plan in {len(near)} of {len(measured)} rows")
    return said


def losses_apart(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference of two trajectories, step by step.

    Example:
        >>> round(losses_apart([2.0, 1.0], [2.0, 1.01, 0.5]), 4)
        0.0099
    """
    return max(abs(mine / theirs - 1) for mine, theirs in zip(one, other, strict=False))


def goal_of(row: dict[str, Any], card: Any, size: Size) -> list[str]:
    """Return a row's speed beside its goal, where it is one for this card, this model and the path
    that was really trained.
    """
    goal, wanted = row["setting"]["goal"], row["setting"]["path"]
    whole = size.config == LLAMA_2_7B and card is not None and card.name == "h100-80gb"
    if goal is None or not whole:
        return []
    if missing := [part for part in wanted if part not in row["path"]]:
        trained = ", ".join(row["path"])
        return [f"{row['row']}: no goal, trained without {', '.join(missing)} ({trained})"]
    met = "reached" if row["tokens_per_s"] >= goal else "not reached"
    return [f"{row['row']}: {row['tokens_per_s']:,.0f} tokens/s, goal {goal:,} {met}"]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| row | what was trained | per second | MFU | peak GiB | plan GiB | losses apart | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "not_run" in row:
            lines.append(f"| {row['row']} | | not run: {row['not_run']} | | | | | |")
            continue
        rates = ("answers_per_s", "judgments_per_s", "tokens_per_s")
        rate = next(key for key in rates if key in row)
        cells = [", ".join(row.get("path", ())), f"{row[rate]:,.1f} {rate.partition('_')[0]}"]
        cells.append(f"{row['mfu']:.1%}" if row.get("mfu") else "")
        memory = ("peak_gib", "planned_peak_gib")
        cells += [f"{row[key]:.2f}" if row.get(key) else "" for key in memory]
        cells.append(f"{row['losses_apart']:.3%}" if "losses_apart" in row else "")
        lines.append(f"| {row['row']} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


def kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the largest kernels of each row, one line a row."""
    return [
        f"{row['row']}: "
        + "; ".join(f"{one['kernel'][:60]} {one['share']:.0%}" for one in row["largest_kernels"])
        for row in rows
        if row.get("largest_kernels")
    ]


def card_here() -> Any:
    """Return the planner's card for the GPU that torch uses; None without one."""
    import torch

    from recipes_lib.planning.cards import recognised

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return recognised(found.name, found.total_memory / 2**20)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cpu", action="store_true", help="a tiny model on the CPU: checks this script itself")
    add("--minutes", type=float, default=8.0, help="rows that would begin later are not run")
    add("--rows", help="names of rows, separated by semicolons; default: all")
    add("--json", type=Path, help="write rows, card and versions; the table goes beside it as .md")
    add("--row", help=argparse.SUPPRESS)  # this process measures one row, for another
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    size = SMALL if options.cpu else Size()
    names = (options.rows or "").split(";") if options.rows else [row.name for row in ROWS]
    if unknown := sorted({*names} - {row.name for row in ROWS}):
        parser.error(f"no row {', '.join(unknown)}; there are {'; '.join(r.name for r in ROWS)}")
    if options.row:
        row = next(row for row in ROWS if row.name == options.row)
        measured = attempt(row, size, options.folder, time.monotonic() + options.seconds)
        (options.folder / "row.json").write_text(json.dumps(measured), encoding="utf-8")
        return 0
    import torch
    from measuring import write_record

    from recipes_lib.planning.measured import record

    if not options.cpu and not torch.cuda.is_available():
        text = "no GPU here: nothing to measure (--cpu checks the script itself with a tiny model)"
        print(text, file=sys.stderr)
        return 5
    deadline = time.monotonic() + 60 * options.minutes
    card = None if options.cpu else card_here()

    def keep(rows: list[dict[str, Any]]) -> None:
        if options.json:
            facts = {"card": card and asdict(card), "size": asdict(size), "rows": rows}
            write_record(options.json, facts)

    chosen = tuple(row for row in ROWS if row.name in names)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        folder = Path(scratch)
        make_inputs(folder, size)
        rows = run_rows(chosen, size, folder, deadline, keep)
    said = compare(rows, card, size)
    keep(rows)
    if card is not None and size.config == LLAMA_2_7B:
        speeds = speeds_for_plans(rows, card.name, datetime.date.today().isoformat())
        record(speeds)
        said += [f"recipes plan takes from now on: {one.basis}" for one in speeds]
    text = "\n".join(["", table(rows), "", *kernel_lines(rows), "", *said])
    print(text)
    if options.json:
        options.json.with_suffix(".md").write_text(text.lstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
