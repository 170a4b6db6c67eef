"""The curves of a run, drawn from metrics.jsonl: loss, validation perplexity, learning rate,
throughput and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from recipes_lib.core.json_files import read_rows

PERPLEXITY_LIMIT = 20.0  # exp(20) is beyond any axis worth drawing


def draw_figures(metrics: Path, folder: Path, title: str) -> list[Path]:
    """Draw every figure that the metrics have numbers for, each as SVG and PNG; the same numbers
    give the same bytes.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "recipes",
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    series = _series(
        metrics, ("loss", "eval_loss", "learning_rate", "tokens_per_second", "peak_memory_gib")
    )
    validation = series["eval_loss"]
    perplexity = [(step, math.exp(loss)) for step, loss in validation if loss < PERPLEXITY_LIMIT]
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    written += _draw(
        folder / "loss",
        title,
        "loss per token",
        {"training": series["loss"], "validation": validation},
    )
    written += _draw(
        folder / "validation_perplexity", title, "validation perplexity", {"validation": perplexity}
    )
    written += _draw(
        folder / "learning_rate", title, "learning rate", {"learning rate": series["learning_rate"]}
    )
    written += _draw(
        folder / "throughput", title, "tokens per second", {"tokens/s": series["tokens_per_second"]}
    )
    written += _draw(
        folder / "memory", title, "peak memory, GiB", {"peak": series["peak_memory_gib"]}
    )
    return written


def _series(metrics: Path, keys: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """The finite values of each key with their steps, in one pass over the file."""
    series: dict[str, list[tuple[int, float]]] = {key: [] for key in keys}
    for line in read_rows(metrics, skip_damaged=True):
        for key in keys:
            if line.get(key) is not None and math.isfinite(line[key]):
                series[key].append((line["step"], line[key]))
    return series


def _draw(
    stem: Path, title: str, unit: str, series: dict[str, list[tuple[int, float]]]
) -> list[Path]:
    import matplotlib.pyplot as plt

    series = {name: points for name, points in series.items() if points}
    if not series:
        return []
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, points in series.items():
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            marker="o" if len(points) < 40 else None,
            markersize=3,
            linewidth=1.4,
            label=name,
        )
    axes.set(xlabel="optimizer step", ylabel=unit, title=title)
    if len(series) > 1:
        axes.legend(frameon=False)
    files = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=120, metadata={"Software": None})
    plt.close(figure)
    return files
