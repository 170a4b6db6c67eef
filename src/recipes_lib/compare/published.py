"""Numbers that somebody published, with what is known about how they came to be:
`recipes/studies/published/*.yaml`.

They are shown beside ours and never take part in a test: a mean without its items can be compared
with nothing. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.loader import Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, load
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError

if TYPE_CHECKING:
    from jsonschema import ValidationError

_BESIDE = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9.,_-]+){1,2}\Z")


@dataclass(frozen=True)
class PublishedNumber:
    """One number.

    `value` is as published, `ours` in the unit of the metric it stands `beside` (None where ours
    has no such metric). `notes` are those of the number and of its metric, `protocol` those of its
    table.
    """

    arm: str
    table: str
    metric: str
    label: str
    value: float
    shown: str
    n: int | None = None
    interval: tuple[float, float] | None = None
    beside: str | None = None
    factor: float = 1.0
    notes: tuple[str, ...] = ()
    protocol: tuple[str, ...] = ()
    file: str = ""
    line: int | None = None

    @property
    def ours(self) -> float | None:
        """The value in the unit of our metric."""
        return None if self.beside is None else self.factor * self.value

    @property
    def our_interval(self) -> tuple[float, float] | None:
        """The interval in the unit of our metric."""
        return (
            None
            if self.beside is None or self.interval is None
            else (self.factor * self.interval[0], self.factor * self.interval[1])
        )


@dataclass(frozen=True)
class Published:
    """All numbers of one publication. `circumstances` are arm -> what -> how it was there, where no
    recipe can say it.
    """

    path: Path
    publication: str
    source: str
    numbers: tuple[PublishedNumber, ...]
    titles: dict[str, str]
    circumstances: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, arm: str) -> list[PublishedNumber]:
        """Return an arm's numbers, in the order of the file."""
        return [number for number in self.numbers if number.arm == arm]

    def beside(self, arm: str, metric: str) -> PublishedNumber | None:
        """Return the number that stands beside one of our metrics (`Measure.name`:
        `alpaca_eval/win_rate`).
        """
        return next(
            (number for number in self.numbers if number.arm == arm and number.beside == metric),
            None,
        )

    @property
    def arms(self) -> list[str]:
        """The arms that have a number."""
        return list(dict.fromkeys(number.arm for number in self.numbers))


def load_published(path: str | Path) -> Published:
    """Load and check a file of published numbers.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    document = load(path, "published")
    values = document.values
    return Published(
        path=document.path,
        publication=values["publication"],
        source=values["source"],
        numbers=tuple(_numbers(document)),
        titles={name: table["title"] for name, table in values["tables"].items()},
        circumstances=_circumstances(values["tables"].values()),
    )


def _circumstances(tables: Iterable[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The circumstances of each arm, of all tables together."""
    found: dict[str, dict[str, str]] = {}
    for table in tables:
        for arm, told in (table.get("circumstances") or {}).items():
            found.setdefault(arm, {}).update(told)
    return found


class PublishedRules(KindRules):
    """Rules of published numbers: metrics that exist, intervals around their value, one number
    beside one of ours.
    """

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with every bare number written as `{value: number}`; what has another
        shape stays as it is.
        """
        copy = deepcopy(values)
        tables = copy.get("tables")
        for table in tables.values() if isinstance(tables, dict) else ():
            arms = table.get("arms") if isinstance(table, dict) else None
            for row in arms.values() if isinstance(arms, dict) else ():
                if isinstance(row, dict):
                    row.update(
                        {
                            name: {"value": value}
                            for name, value in row.items()
                            if not isinstance(value, dict)
                        }
                    )
        return copy

    def wrong(self, document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
        """Return the error for a value that the schema refuses."""
        if path == ("tables",) and error.validator == "minProperties":
            return document.error(path, "tables is empty", "a table has a title, metrics and arms")
        return super().wrong(document, path, error)

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what the schema cannot say."""
        yield from [*_metrics(document), *_rows(document)] or _twice(document)


def _metrics(document: Document) -> Iterator[RecipeError]:
    """Columns beside metrics that cannot be ours."""
    for name, table in document.values["tables"].items():
        for key, metric in table["metrics"].items():
            beside = metric.get("beside")
            if beside is not None and not _BESIDE.match(beside):
                place: KeyPath = ("tables", name, "metrics", key, "beside")
                yield document.error(
                    place,
                    f"beside {beside!r} is no metric of ours",
                    "for example alpaca_eval/win_rate",
                )


def _rows(document: Document) -> Iterator[RecipeError]:
    """Arms without a row, numbers without a column, and values outside their interval."""
    for name, table in document.values["tables"].items():
        for arm in (arm for arm in table.get("circumstances") or {} if arm not in table["arms"]):
            near = did_you_mean(arm, table["arms"])
            yield document.error(
                ("tables", name, "circumstances", arm), f"table '{name}' has no arm '{arm}'", *near
            )
        for arm, row in table["arms"].items():
            for key, number in row.items():
                place: KeyPath = ("tables", name, "arms", arm, key)
                if key not in table["metrics"]:
                    near = did_you_mean(key, table["metrics"])
                    yield document.error(
                        place,
                        f"table '{name}' has no metric '{key}'",
                        *near,
                        f"metrics: {', '.join(table['metrics'])}",
                    )
                elif isinstance(number, dict) and "interval" in number:
                    low, high = number["interval"]
                    if not low <= number["value"] <= high:
                        yield document.error(
                            place,
                            f"{number['value']:g} is not within its interval [{low:g}, {high:g}]",
                        )


def _twice(document: Document) -> Iterator[RecipeError]:
    """Two numbers of one arm beside the same metric of ours: which one would be shown?"""
    seen: dict[tuple[str, str], PublishedNumber] = {}
    for number in _numbers(document):
        if (
            number.beside is not None
            and (first := seen.setdefault((number.arm, number.beside), number)) is not number
        ):
            what = (
                f"arm '{number.arm}' has two numbers beside {number.beside}: {first.shown} and"
                f" {number.shown}"
            )
            yield RecipeError(
                what,
                "name one of them, or give it an arm of its own",
                file=number.file,
                line=number.line,
            )


def _numbers(document: Document) -> Iterator[PublishedNumber]:
    """Every number of a checked document."""
    for name, table in document.values["tables"].items():
        for arm, row in table["arms"].items():
            for key, entry in row.items():
                metric = table["metrics"][key]
                number = entry if isinstance(entry, dict) else {"value": entry}
                origin = document.origin(("tables", name, "arms", arm, key))
                places = metric.get("places")
                value, interval = number["value"], number.get("interval")
                yield PublishedNumber(
                    arm=arm,
                    table=name,
                    metric=key,
                    label=metric["label"],
                    value=float(value),
                    shown=str(value) if places is None else f"{value:.{places}f}",
                    n=number.get("n", metric.get("n", table.get("n"))),
                    interval=None if interval is None else (float(interval[0]), float(interval[1])),
                    beside=metric.get("beside"),
                    factor=float(metric.get("factor", 1)),
                    notes=tuple(note for note in (number.get("note"), metric.get("note")) if note),
                    protocol=tuple(table.get("protocol", ())),
                    file=origin.file,
                    line=origin.line,
                )
