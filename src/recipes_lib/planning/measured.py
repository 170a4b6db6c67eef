"""Speeds that were measured on GPUs: a plan for the same card, method, attention and compiler has
its counted time longer or shorter by what those were.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.json_files import read_object

if TYPE_CHECKING:
    from recipes_lib.planning.settings import Settings

FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row: a training on one card.

    Args:
        card: as `cards` names it.
        path: `counted_path` the training's settings.
        tokens_per_second: of the examples, padding not counted.
        counted: the tokens per second that the plan counted for the same steps.
        n: optimizer steps that were timed.
    """

    card: str
    path: str
    model: str
    tokens_per_second: float
    counted: float
    n: int
    date: str

    @property
    def stretch(self) -> float:
        """Seconds that were measured, over those that were counted."""
        return self.counted / self.tokens_per_second

    @property
    def basis(self) -> str:
        """Where the speed is from."""
        return (
            f"measured on {self.date}: {self.tokens_per_second:,.0f} tokens/s of {self.model},"
            f" {self.path}, n={self.n}"
        )


def counted_path(settings: Settings) -> str:
    """Return what of the settings decides how fast a step of a given size is."""
    method = "full" if settings.adapter is None else "QLoRA" if settings.bits else "LoRA"
    compiled = ", compiled" if settings.compiled else ""
    return f"{method}, {settings.attention}{compiled}"


@lru_cache(maxsize=1)
def rows() -> tuple[Measured, ...]:
    """Return what was measured; nothing yet where there is no file."""
    if not FILE.is_file():
        return ()
    return tuple(Measured(**row) for row in read_object(FILE)["rows"])


def measured_on(card: str, settings: Settings) -> Measured | None:
    """Return the measured row for a card and settings, or None."""
    wanted = (card, counted_path(settings))
    return next((row for row in rows() if (row.card, row.path) == wanted), None)


def record(new: Iterable[Measured]) -> None:
    """Keep rows in place of earlier ones of the same card and path."""
    kept = {(row.card, row.path): row for row in (*rows(), *new)}
    write_json(FILE, {"rows": [asdict(row) for row in kept.values()]})
    rows.cache_clear()
