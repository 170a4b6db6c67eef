"""The curves of a training: what metrics.jsonl says, thinned while it is read."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from recipes_lib.core.files import read_rows

MOST_POINTS = 1_000
CURVES = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}


@dataclass
class Curve:
    """Points (step, value) of one thing that a training logged, thinned while they are read."""

    points: list[tuple[float, float]] = field(default_factory=list)
    count: int = 0
    every: int = 1  # how many points each stands for; the last one stands for itself

    def add(self, step: float, value: float) -> None:
        """Add a point; of more than `MOST_POINTS` every second one is dropped."""
        # The last point is kept as the curve's end; unless its turn had come, a newer replaces it.
        if (self.count - 1) % self.every:
            self.points.pop()
        self.points.append((step, value))
        self.count += 1
        if len(self.points) > MOST_POINTS:
            self.points = self.points[::2]
            self.every *= 2


def read_curves(file: Path) -> dict[str, Curve]:
    """Return the curves of metrics.jsonl; nothing of it stays in memory but them."""
    curves: dict[str, Curve] = {}
    for row in read_rows(file):
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for name in CURVES:
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, Curve()).add(step, value)
    return curves
