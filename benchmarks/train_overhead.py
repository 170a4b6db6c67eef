"""What this project adds to a training step: seconds inside our callbacks and collator, summed,
against the whole loop.

    python benchmarks/train_overhead.py [RECIPE] [--steps 8] [--json FILE]

Without RECIPE: the quickstart's, SmolLM2-135M with LoRA r=8. The limit is 2%.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import write_record

PROJECT = Path(__file__).resolve().parents[1]
LIMIT = 0.02
HOOKS = ("on_train_begin", "on_step_end", "on_log", "on_save", "on_prediction_step", "on_train_end")


class Stopwatch:
    """Sums the time spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun
                self.calls += 1

        return timed


def main() -> None:
    """Train a few steps and print the share."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "recipe", nargs="?", default=str(PROJECT / "recipes" / "quickstart" / "lora-r8.yaml")
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from transformers import Trainer

    from recipes_lib.train import main as train
    from recipes_lib.training.batches import RowTrackingCollator
    from recipes_lib.training.metrics import MetricsCallback
    from recipes_lib.training.stopping import StopCallback

    ours, loop = Stopwatch(), Stopwatch()
    for owner in (MetricsCallback, StopCallback):
        for hook in HOOKS:
            if hook in vars(owner):
                setattr(owner, hook, ours.wrap(vars(owner)[hook]))
    RowTrackingCollator.__call__ = ours.wrap(RowTrackingCollator.__call__)  # type: ignore[method-assign]
    Trainer._inner_training_loop = loop.wrap(Trainer._inner_training_loop)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RECIPES_RUNS_ROOT"] = folder
        code = train(
            [
                options.recipe,
                f"train.max_steps={options.steps}",
                f"train.save_steps={options.steps}",
                "train.eval_strategy='no'",
            ]
        )
    if code:
        raise SystemExit(code)
    share = ours.seconds / loop.seconds
    print(
        f"\nloop {loop.seconds:.2f} s, ours {ours.seconds * 1000:.1f} ms in {ours.calls} calls:"
        f" {share:.3%} of the loop (limit {LIMIT:.0%})"
    )
    if options.json:
        measured = {
            "steps": options.steps,
            "loop_s": round(loop.seconds, 2),
            "ours_s": round(ours.seconds, 4),
            "calls": ours.calls,
        }
        write_record(options.json, measured | {"share": round(share, 6), "limit": LIMIT})


if __name__ == "__main__":
    main()
