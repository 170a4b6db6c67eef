"""Every number of a report as CSV and JSON: what it is, n, interval, and the file it comes from.

A CSV cell that a spreadsheet would read as a formula gets an apostrophe before it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.table import HALF, json_value

if TYPE_CHECKING:
    from recipes_lib.report.content import Content

_FORMAT_VERSION = 1
_COLUMNS = (
    "kind",
    "metric",
    "arm",
    "other_arm",
    "against",
    "group",
    "unit",
    "value",
    "low",
    "high",
    "n",
    "questions",
    "seeds",
    "unresolved",
    "lowest",
    "highest",
    "p",
    "p_holm",
    "mde",
    "verdict",
    "claim_stopped",
    "test",
    "interval",
    "file",
)
_OF_TEST = (
    "low",
    "high",
    "p",
    "n",
    "questions",
    "seeds",
    "unresolved",
    "lowest",
    "highest",
    "test",
)
_OF_TRAINING = (
    "steps",
    "train_loss",
    "validation_loss",
    "best_validation_loss",
    "perplexity",
    "tokens_per_second",
    "peak_memory_gib",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")


def number_rows(content: Content) -> Iterator[dict[str, Any]]:
    """Yield every number with the columns that apply to it."""
    for score in content.scores:
        yield {
            "kind": "score",
            "metric": score.metric,
            "arm": score.arm,
            "against": score.opponent,
            "unit": score.unit,
            "value": score.value,
            "low": score.low,
            "high": score.high,
            "n": score.n,
            "seeds": score.seeds,
            "unresolved": score.unresolved,
            "lowest": score.lowest,
            "highest": score.highest,
            "interval": score.method,
            "file": " ".join(score.files),
        }
    for row in content.comparison.rows:
        facts = row.tested.to_dict() if row.tested else {}
        shift = HALF if row.head_to_head else 0.0  # as in the table, a win rate and no difference
        shifted = {
            name: facts[name] + shift
            for name in ("low", "high", "lowest", "highest")
            if facts.get(name) is not None
        }
        kept = {name: facts.get(name) for name in _OF_TEST} | shifted
        yield {
            "kind": "comparison",
            "metric": row.metric,
            "arm": row.first,
            "other_arm": row.second,
            "against": "head to head" if row.head_to_head else row.opponent,
            "unit": row.unit,
            "value": row.first_value if row.head_to_head else row.difference,
            **kept,
            "p_holm": row.p_holm,
            "mde": row.mde,
            "verdict": row.verdict,
            "claim_stopped": bool(row.stopped),
            "interval": facts.get("interval_method"),
            "file": " ".join(row.files),
        }
    for breakdown in content.breakdowns:
        for cell in breakdown.cells:
            yield {
                "kind": f"by {breakdown.kind}",
                "metric": breakdown.metric,
                "arm": cell.arm,
                "group": cell.group,
                "unit": breakdown.unit,
                "value": cell.value,
                "low": cell.low,
                "high": cell.high,
                "n": cell.n,
                "unresolved": cell.unresolved,
                "file": cell.file,
            }
    yield from _of_runs(content)
    yield from _of_judges(content)
    if content.published is not None:
        for number in content.published.numbers:
            ours = (
                number.beside is not None
            )  # then in the unit of our metric, as everywhere under its name
            low, high = (number.our_interval if ours else number.interval) or (None, None)
            yield {
                "kind": "published",
                "metric": number.beside or f"{number.table}/{number.metric}",
                "arm": number.arm,
                "value": number.ours if ours else number.value,
                "group": number.label,
                "low": low,
                "high": high,
                "n": number.n,
                "file": content.published.path.name,
            }


def _of_runs(content: Content) -> Iterator[dict[str, Any]]:
    """Trainings and costs; one run each, so n is 1 and there is no interval."""
    for one in content.trainings:
        for name in _OF_TRAINING:
            if (value := getattr(one, name)) is not None:
                yield {
                    "kind": "training",
                    "metric": name,
                    "arm": one.arm,
                    "group": one.run,
                    "value": value,
                    "n": 1,
                    "file": one.file,
                }
    for cost in content.costs:
        for name in ("seconds", "device_hours", "tokens", "tokens_per_second"):
            if (value := getattr(cost, name)) is not None:
                group = f"{cost.run}, {cost.what}"
                yield {
                    "kind": "cost",
                    "metric": name,
                    "arm": cost.arm,
                    "group": group,
                    "value": value,
                    "n": 1,
                    "file": cost.file,
                }


def _of_judges(content: Content) -> Iterator[dict[str, Any]]:
    for audit in content.audits:
        for what, interval in audit.measured:
            limits = {
                "value": interval["estimate"],
                "low": interval["low"],
                "high": interval["high"],
                "n": interval["n"],
            }
            yield {
                "kind": "judge audit",
                "metric": what,
                "group": f"{audit.eval}, {audit.judge}",
                "unit": "share",
                **limits,
                "file": audit.file,
            }
    for floor in content.floor:
        limits = {"value": floor.value, "low": floor.low, "high": floor.high, "n": floor.n}
        yield {
            "kind": "noise floor",
            "metric": floor.what,
            "group": floor.where,
            "unit": floor.unit,
            **limits,
            "file": floor.file,
        }


def numbers_csv(content: Content) -> str:
    """Return the CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in number_rows(content):
        writer.writerow({key: cell(row.get(key)) for key in _COLUMNS})
    return stream.getvalue()


def cell(value: Any) -> Any:
    """Return a cell: numbers as they are, text that a spreadsheet would run made text.

    Example:
        >>> cell("=1+1"), cell(-0.5), cell("plain"), cell(None)
        ("'=1+1", -0.5, 'plain', '')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        return value
    text = "".join(char for char in value if char.isprintable() or char in "\n\t")
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text.startswith(_FORMULA) else text


def numbers_json(content: Content) -> str:
    """Return the JSON: question, answer, findings, and all numbers."""
    numbers = [
        {key: json_value(item) for key, item in row.items() if item is not None}
        for row in number_rows(content)
    ]
    value = {
        "format_version": _FORMAT_VERSION,
        "name": content.name,
        **content.comparison.to_dict(),
        "numbers": numbers,
    }
    return json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
