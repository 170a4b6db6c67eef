"""One command that says how fast and how large training is on this GPU: Llama-2-7B at full size
with random weights, Dolly's lengths.

    python -m benchmarks.gpu_check [--minutes 8] [--json benchmarks/results/gpu_check.json]
    python -m benchmarks.gpu_check --tiny    # the same code on a CPU with a tiny model

No network, no weights, no data: the lengths are the histogram in `recipes_lib.planning`. Every
number is of one training step without a trainer: forward, backward, clipping, fused AdamW, LoRA of
rank 32 on every linear layer. Tokens are those of the examples; padding does not count, so that
padded and padding-free rows compare. MFU counts 4N operations per token against the card's dense
bf16 peak. The plan is `recipes plan`'s arithmetic for the largest micro-batch that was drawn. A
case that does not run says why, also if the time was over or a library is not there; the JSON is
written after each case.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
REQUIRED, GOAL = 14_600, 18_200  # tokens/s of bf16 LoRA on one H100: 40% and 50% MFU


def attentions(device: str) -> dict[str, str | None]:
    """Return each attention kernel, the one that training would choose first, and why it cannot be
    tried here (None: it can).
    """
    import torch

    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if device == "cpu":
        flash = ours = "needs a GPU"
    else:
        flash = (
            ""
            if importlib.util.find_spec("flash_attn") is not None
            else "flash-attn is not installed"
        )
        ours = "" if varlen else "this torch has no torch.nn.attention.varlen"
        if torch.cuda.get_device_capability()[0] < 8:
            flash = ours = "needs compute capability 8.0"
    return {
        "flash_attention_2": flash or None,
        "torch_varlen": ours or None,
        "sdpa_by_document": None,
        "sdpa": None,
        "eager": None,
    }


def cases_of(device: str) -> list[Any]:
    """Return the cases, those that matter most first; a kernel that is not here has a case that
    says so.
    """
    from gpu_model import Case, with_bits

    kernels = attentions(device)
    best = next(kernel for kernel, reason in kernels.items() if reason is None)
    free = Case("padding-free, 16 examples", "padding-free", 16, best)
    packed = Case("packed rows of 4,096", "packed", 1, best)
    one = Case("padding-free, 1 example", "padding-free", 1, best)
    plain = [
        packed,
        free,
        Case("padded, 4 examples", "padded", 4, "sdpa"),
        replace(packed, name="packed, dropout 0", dropout=0.0),
        replace(packed, name="packed, activation checkpointing", checkpointing=True),
        replace(free, name="padding-free, activation checkpointing", checkpointing=True),
        one,
        *(
            replace(free, name=f"padding-free, {count} examples", examples=count)
            for count in (2, 4, 8, 32)
        ),
        Case("padded, 16 examples", "padded", 16, "sdpa"),
        *(
            replace(
                free, name=f"attention {kernel}", examples=8, attention=kernel, unavailable=reason
            )
            for kernel, reason in kernels.items()
        ),
        replace(free, name="FSDP2 on one rank", fsdp=True),
    ]
    return [*plain, *(with_bits(case) for case in (packed, free, one, plain[4]))]


def measure(
    model: Any, case: Any, config: dict[str, Any], device: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Time one case on a model that is set up for it."""
    import torch
    from gpu_model import micro_batches, planned_peak_gib, set_up, train_step, trained

    set_up(model, case)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4, weight_decay=0.0, fused=True)
    batches = micro_batches(case, config, device, options.longest)
    for _ in range(2):
        train_step(model, optimizer, next(batches))
    wait(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    speeds, largest, row, began = [], 0, 0, time.perf_counter()
    while len(speeds) < options.steps or (
        time.perf_counter() - began < options.seconds and len(speeds) < 50
    ):
        batch = next(batches)
        largest = max(largest, batch["input_ids"].numel())
        row = max(
            row,
            (
                batch["input_ids"].shape[1]
                if case.batching == "padded" or case.attention in ("sdpa", "eager")
                else batch["max_length_q"]
            ),
        )
        started = time.perf_counter()
        tokens, loss = train_step(model, optimizer, batch)
        wait(device)
        speeds.append(tokens / (time.perf_counter() - started))
    if not torch.isfinite(loss):
        raise ValueError(f"loss is {float(loss)}")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else None
    planned = planned_peak_gib(case, config, largest, row, options.longest, device == "cpu")
    return {
        "tokens_per_s": statistics.median(speeds),
        "n": len(speeds),
        "peak_gib": peak,
        "planned_peak_gib": planned,
        "largest_micro_batch": largest,
    }


def wait(device: str) -> None:
    """Wait for the GPU."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def generate(model: Any, config: dict[str, Any], device: str, new_tokens: int) -> dict[str, Any]:
    """Time batched greedy generation with the adapter on the model."""
    import torch

    model.eval()
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    base.set_attn_implementation("sdpa")
    rows = 32 if device != "cpu" else 4
    prompt = torch.randint(
        1, config["vocab_size"], (rows, 128 if device != "cpu" else 16), device=device
    )
    speeds = []
    for _ in range(3):
        wait(device)
        started = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            settings = {
                "max_new_tokens": new_tokens,
                "min_new_tokens": new_tokens,
                "do_sample": False,
                "pad_token_id": 0,
            }
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        wait(device)
        speeds.append(rows * new_tokens / (time.perf_counter() - started))
    model.train()
    return {"tokens_per_s": statistics.median(speeds[1:]), "n": 2, "batch": rows}


def run_all(
    device: str,
    config: dict[str, Any],
    options: argparse.Namespace,
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Run every case until the time is over; one row each, measured or with the reason why not.

    Args:
        keep: is given all rows after each case, so that what was measured is not lost if the rest
            is interrupted.
    """
    import torch

    bench, deadline, rows = (
        Bench(device, config),
        time.monotonic() + 60 * options.minutes,
        list[dict[str, Any]](),
    )
    for case in cases_of(device):
        row: dict[str, Any] = {"case": case.name, "setting": asdict(case)}
        rows.append(row)
        if case.unavailable:
            row["not_measured"] = case.unavailable
        elif time.monotonic() > deadline:
            row["not_measured"] = "no time left"
        else:
            if (case.fsdp or case.bits) and not bench.generated:
                rows.insert(
                    -1,
                    {"case": "generation, LoRA unmerged, sdpa"}
                    | bench.generation(options.new_tokens),
                )
            row |= bench.prepare(case) or attempt(
                measure, bench.model, case, config, device, options
            )
            empty(device)
        print(
            row["case"],
            row.get("not_measured") or f"{row['tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )
        keep(rows)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Bench:
    """The model that the cases share: bf16, then sharded, then built again and quantized.

    Args:
        device: cuda or cpu.
        config: the model's shape.
    """

    def __init__(self, device: str, config: dict[str, Any]) -> None:
        self.device, self.config = device, config
        self.model: Any = None
        self.state = "nothing"
        self.refused = dict[str, Any]()
        self.generated = False

    def prepare(self, case: Any) -> dict[str, Any]:
        """Bring the model into the state that a case wants; return why it cannot be had, or
        nothing.
        """
        from gpu_model import quantize, shard

        wanted = "4 bits" if case.bits else "sharded" if case.fsdp else "bf16"
        if wanted != self.state:
            self.refused = self._build() if self.model is None or case.bits else {}
            action = {"4 bits": quantize, "sharded": shard}.get(wanted)
            self.refused = self.refused or (
                attempt(action, self.model, self.device) if action else {}
            )
            self.state = wanted
        return self.refused

    def generation(self, new_tokens: int) -> dict[str, Any]:
        """Time generation, once."""
        self.generated = True
        return self.refused or attempt(generate, self.model, self.config, self.device, new_tokens)

    def _build(self) -> dict[str, Any]:
        from gpu_model import build_model

        self.model = None
        empty(self.device)

        def build() -> None:
            self.model = build_model(self.config, self.device)

        return attempt(build)


def attempt(action: Any, *args: Any) -> dict[str, Any]:
    """Return what an action returns, or why it did not."""
    import torch

    try:
        return dict(action(*args) or {})
    except torch.OutOfMemoryError:
        return {"not_measured": "out of memory"}
    except Exception as error:
        return {
            "not_measured": (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
            )
        }


def empty(device: str) -> None:
    """Give unused memory back."""
    import gc

    import torch

    gc.collect()
    if device != "cpu":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def card_here(device: str) -> Any:
    """Return the planner's card for the GPU that torch uses; None on a CPU."""
    import torch

    from recipes_lib.planning.cards import recognised

    if device == "cpu":
        return None
    found = torch.cuda.get_device_properties(0)
    return recognised(found.name, found.total_memory / 2**20)


def add_mfu(rows: list[dict[str, Any]], config: dict[str, Any], card: Any) -> None:
    """Add MFU by 4N to the training rows, where the card's peak is known."""
    from gpu_model import shape_of

    for row in rows:
        if card is not None and row.get("tokens_per_s") and "setting" in row:
            row["mfu"] = (
                4 * shape_of(config).parameters * row["tokens_per_s"] / (card.tflops * 1e12)
            )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| case | attention | tokens/s | MFU (4N) | peak GiB | plan GiB | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        attention = row.get("setting", {}).get("attention", "")
        if not row.get("tokens_per_s"):
            lines.append(
                f"| {row['case']} | {attention} | not measured: {row.get('not_measured', '?')} | |"
                " | | |"
            )
            continue
        cells = [f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}" if row.get("mfu") else ""]
        cells += [
            f"{row[key]:.2f}" if row.get(key) else "" for key in ("peak_gib", "planned_peak_gib")
        ]
        lines.append(f"| {row['case']} | {attention} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


def conclusions(rows: list[dict[str, Any]], card: Any) -> list[str]:
    """Return the sentences that the numbers allow."""
    speed = {
        row["case"]: row["tokens_per_s"]
        for row in rows
        if row.get("tokens_per_s") and "setting" in row
    }
    plain = {name: value for name, value in speed.items() if not name.startswith("QLoRA")}
    said = []
    if plain:
        best = max(plain, key=lambda name: plain[name])
        said.append(f"fastest bf16 LoRA: {best}, {plain[best]:,.0f} tokens/s")
        if card is not None and card.name in ("h100-80gb", "h100-96gb"):
            met = (
                "goal reached"
                if plain[best] >= GOAL
                else "required reached"
                if plain[best] >= REQUIRED
                else "below what is required"
            )
            said.append(f"against {REQUIRED:,} required and {GOAL:,} as the goal: {met}")
    pairs = [(name, name.removeprefix("QLoRA: ")) for name in speed if name.startswith("QLoRA")]
    said += [
        f"{name} runs at {speed[name] / speed[other]:.2f} of bf16"
        for name, other in pairs
        if other in speed
    ]
    off = [
        row
        for row in rows
        if row.get("peak_gib") and abs(row["planned_peak_gib"] / row["peak_gib"] - 1) > 0.08
    ]
    measured = [row for row in rows if row.get("peak_gib")]
    if measured:
        said.append(
            f"peak memory within 8% of the plan in {len(measured) - len(off)} of {len(measured)}"
            " cases"
        )
    return said


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny model on the CPU: checks this script, measures nothing of interest",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="cases that would begin later are left out"
    )
    parser.add_argument(
        "--json", type=Path, help="write rows, card and versions; the table goes beside it as .md"
    )
    options = parser.parse_args(argv)
    import torch
    from gpu_model import LLAMA_2_7B, TINY
    from measuring import write_record

    if not options.tiny and not torch.cuda.is_available():
        print(
            "no GPU here: nothing to measure (--tiny checks the script itself on a CPU)",
            file=sys.stderr,
        )
        return 5
    device, config = ("cpu", TINY) if options.tiny else ("cuda", LLAMA_2_7B)
    options.longest, options.steps, options.seconds, options.new_tokens = (
        (64, 1, 0.0, 4) if options.tiny else (1024, 5, 5.0, 128)
    )
    card, last = card_here(device), list[str]()

    def keep(rows: list[dict[str, Any]]) -> None:
        add_mfu(rows, config, card)
        said = conclusions(rows, card)
        last[:] = [table(rows), *said]
        if options.json:
            facts = (
                None
                if card is None
                else {"name": card.name, "title": card.title, "peak_tflops": card.tflops}
            )
            write_record(
                options.json, {"model": config, "card": facts, "conclusions": said, "rows": rows}
            )
            options.json.with_suffix(".md").write_text(
                table(rows) + "\n\n" + "\n".join(said) + "\n", encoding="utf-8"
            )

    run_all(device, config, options, keep)
    print(*last, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
