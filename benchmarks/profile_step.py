"""Where one training step goes: torch.profiler over the second optimizer step, its costs grouped
and the three largest named.

    # through the real training script, CPU or GPU
    python benchmarks/profile_step.py [RECIPE] [section.key=value ...] [--json FILE]
    # with one of this project's levers taken back (names: train_cpu_worker.py)
    python benchmarks/profile_step.py --without trl-loss ...

RECIPE is the quickstart's lora-r8 if none is given. Times are the operators' own (without what they
call), on the CPU or, where there is one, on the GPU. One thread on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path[:0] = [str(HERE), str(PROJECT / "src")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: group -> beginnings of operator and kernel names; the first that fits counts
GROUPS = {
    "the loss over the vocabulary": (
        "ScaledTokenLoss",
        "ChunkedLogProb",
        "chunked_logprob",
        "aten::exp",
        "aten::amax",
        "aten::_log_softmax",
    ),
    "attention": (
        "aten::_scaled_dot_product",
        "aten::_flash",
        "aten::_efficient",
        "flash",
        "fmha",
        "pytorch_flash",
    ),
    "dequantizing 4-bit weights": ("bitsandbytes", "kDequantize", "kgemm", "aten::dequant"),
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::matmul",
        "mkldnn",
        "nvjet",
        "sm90_xmma",
        "ampere_",
        "cutlass",
        "void cutlass",
    ),
    "copies and casts": (
        "aten::copy_",
        "aten::_to_copy",
        "aten::cat",
        "aten::clone",
        "Memcpy",
        "direct_copy",
    ),
    "optimizer": ("aten::_fused_adam", "Optimizer", "multi_tensor"),
    "masks, norms, activations and other elementwise work": (
        "aten::",
        "void at::native",
        "elementwise",
    ),
}


def group_of(name: str) -> str:
    """Return the group an operator belongs to.

    Example:
        >>> group_of("aten::mm"), group_of("aten::mul"), group_of("cudaLaunchKernel")
        ('matrix products', 'masks, norms, activations and other elementwise work', 'everything
        else')
    """
    return next(
        (group for group, beginnings in GROUPS.items() if name.startswith(beginnings)),
        "everything else",
    )


def by_group(events: Any, on_gpu: bool) -> dict[str, float]:
    """Return seconds by group, largest first."""
    seconds: dict[str, float] = {}
    for event in events:
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        group = group_of(event.key)
        seconds[group] = seconds.get(group, 0.0) + spent
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


class StepProfiler:
    """Profiles from the end of the first optimizer step to the end of the second."""

    def __init__(self, on_gpu: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        )
        self.events: Any = None

    def end_of_step(self, step: int) -> None:
        """Start after step 1, stop after step 2."""
        if step == 1:
            self.profile.__enter__()
        elif step == 2:
            self.profile.__exit__(None, None, None)
            self.events = self.profile.key_averages()


def profile_recipe(recipe: str, overrides: list[str], profiler: StepProfiler) -> None:
    """Train two steps of a recipe through the training script."""
    import transformers.trainer
    from transformers import TrainerCallback

    from recipes_lib.train import main

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            profiler.end_of_step(state.global_step)

    transformers.trainer.DEFAULT_CALLBACKS.append(Report)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["RECIPES_RUNS_ROOT"] = folder
            own = [
                "run.name=profile",
                "train.max_steps=2",
                "train.eval_strategy='no'",
                "train.save_strategy='no'",
            ]
            code = main([recipe, *own, *overrides])
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Report)
    if code:
        raise SystemExit(code)


def main(argv: list[str] | None = None) -> int:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", nargs="?", default=str(PROJECT / "recipes/quickstart/lora-r8.yaml")
    )
    parser.add_argument("--without", help="take a lever back: trl-loss, trl-head, masked-attention")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args(argv)
    if "=" in options.recipe:  # no recipe, an override came first
        options.recipe, overrides = parser.get_default("recipe"), [options.recipe, *overrides]
    import torch
    from measuring import write_record
    from train_cpu_worker import apply_patch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
    apply_patch(options.without)
    profiler = StepProfiler(on_gpu)
    profile_recipe(options.recipe, overrides, profiler)
    seconds = by_group(profiler.events, on_gpu)
    total = sum(seconds.values())
    print(
        f"\none optimizer step, {total:.2f} s in operators on the"
        f" {'GPU' if on_gpu else 'CPU (one thread)'}"
    )
    for number, (group, spent) in enumerate(seconds.items(), 1):
        print(
            f"{'largest: ' if number <= 3 else '         '}{group:<56}{spent:8.2f} s "
            f" {spent / total:5.1%}"
        )
    if options.json:
        write_record(options.json, {"seconds": seconds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
