"""Which learning rate a new recipe starts with, and the measurement that speaks for it.

Source: tinker-cookbook, recipes/chat_sl/results (2026): test NLL per token after 780 steps of 128
conversations of tulu3, LoRA on every layer scaled by 32 / r, one training per cell. Of each model
the largest rank up to 64. A model that is not there gets the rate that was never far from the best.
"""

from __future__ import annotations

from dataclasses import dataclass

RANK, LORA_ALPHA = 64, 32  # what most of the table was measured at
USUAL = 3e-4
# model, rank, then learning rate:test NLL
_SWEEP = """
Qwen/Qwen3-4B-Instruct-2507 64 4e-5:.5815 1e-4:.5725 3e-4:.5641 1e-3:.5596
Qwen/Qwen3-8B 64 4e-5:.5604 1e-4:.5518 3e-4:.5433 1e-3:.5382
Qwen/Qwen3-8B-Base 64 4e-5:.5320 1e-4:.5268 3e-4:.5216 1e-3:.5195
Qwen/Qwen3-32B 64 4e-5:.5124 1e-4:.5055 3e-4:.4990
Qwen/Qwen3-30B-A3B 64 4e-5:.5310 1e-4:.5231 3e-4:.5168 1e-3:.5127 3e-3:.5428
Qwen/Qwen3-30B-A3B-Base 64 4e-5:.5074 1e-4:.5023 3e-4:.4983 1e-3:.4965 3e-3:.5311
Qwen/Qwen3-30B-A3B-Instruct-2507 64 4e-5:.5154 1e-4:.5083 3e-4:.5029 1e-3:.5004
Qwen/Qwen3-VL-30B-A3B-Instruct 64 4e-5:.5083 1e-4:.5022 3e-4:.4975 1e-3:.4971
Qwen/Qwen3.5-4B 64 4e-5:.5546 1e-4:.5478 3e-4:.5406 1e-3:.5438
Qwen/Qwen3.5-9B 64 4e-5:.7449 1e-4:.7287 3e-4:.7166 1e-3:.7333
Qwen/Qwen3.5-9B-Base 64 4e-5:.7010 1e-4:.6894 3e-4:.6758 1e-3:.6892
Qwen/Qwen3.5-27B 64 4e-5:.4770 1e-4:.4727 3e-4:.4682 1e-3:.4704
Qwen/Qwen3.5-35B-A3B 64 4e-5:.4916 1e-4:.4872 3e-4:.4827 1e-3:.4841
Qwen/Qwen3.5-35B-A3B-Base 64 4e-5:.6565 1e-4:.6475 3e-4:.6388 1e-3:.6469
Qwen/Qwen3.6-27B 64 4e-5:.6741 1e-4:.6635 3e-4:.6541 1e-3:.6738
Qwen/Qwen3.6-35B-A3B 64 4e-5:.6911 1e-4:.6783 3e-4:.6714 1e-3:.6829
meta-llama/Llama-3.1-8B 64 4e-5:.6110 1e-4:.5977 3e-4:.5839 1e-3:.5839
meta-llama/Llama-3.1-8B-Instruct 64 4e-5:.5931 1e-4:.5830 3e-4:.5730 1e-3:.5756
meta-llama/Llama-3.1-70B 4 4e-5:.5121 1e-4:.5047 3e-4:.4997
meta-llama/Llama-3.2-1B 64 4e-5:.8532 1e-4:.8275 3e-4:.7978 1e-3:.7802
meta-llama/Llama-3.2-3B 64 4e-5:.7119 1e-4:.6927 3e-4:.6710 1e-3:.6580
meta-llama/Llama-3.3-70B-Instruct 4 4e-5:.5153 1e-4:.5076 3e-4:.5021
nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 64 4e-5:.5649 2e-4:.5501 4e-4:.5449 2e-3:.5469
openai/gpt-oss-20b 16 4e-5:.5473 1e-4:.5420
openai/gpt-oss-120b 16 4e-5:.5129 3e-4:.5032 1e-3:.5053 3e-3:.5477
"""


@dataclass(frozen=True)
class Rate:
    """A learning rate and why."""

    value: float
    because: str


def sweep() -> dict[str, tuple[int, dict[float, float]]]:
    """Return model -> (rank, learning rate -> test NLL)."""
    found = {}
    for line in _SWEEP.strip().splitlines():
        model, rank, *cells = line.split()
        pairs = (cell.split(":") for cell in cells)
        found[model] = (int(rank), {float(rate): float(nll) for rate, nll in pairs})
    return found


def lora_rate(model: str) -> Rate:
    """Return the learning rate for an adapter on a model.

    Example:
        >>> lora_rate("Qwen/Qwen3-8B").value, lora_rate("your/model").value
        (0.001, 0.0003)
    """
    known = sweep()
    if model in known:
        rank, measured = known[model]
        best = min(measured, key=lambda rate: (measured[rate], rate))
        return Rate(
            best,
            f"the best of {len(measured)} for this model on tulu3 at rank {rank}"
            f" (tinker-cookbook's sweep)",
        )
    compared = [cells for rank, cells in known.values() if rank == RANK and USUAL in cells]
    worse = [round(cells[USUAL] - min(cells.values()), 4) for cells in compared]
    near = sum(loss <= 0.0051 for loss in worse)
    return Rate(
        USUAL,
        f"within .0051 of the best test NLL for {near} of {len(worse)} models on tulu3 at rank"
        f" {RANK} (tinker-cookbook's sweep); this one was not among them",
    )
