"""What `recipes eval --json` prints of an evaluation."""

from __future__ import annotations

from typing import Any

from recipes_lib.evaluate import evaluate_all, printed


def results_of(*arguments: Any, **options: Any) -> list[Any]:
    """Evaluate as `evaluate_all` does; return what is printed of each log."""
    return [printed(log) for log in evaluate_all(*arguments, **options)]
