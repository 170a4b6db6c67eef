"""Numbers that somebody published, with what is known about how they came to be:
`recipes/studies/published/*.yaml`.

They are shown beside ours and never take part in a test: a mean without its items can be compared
with nothing. Needs no torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.loader import Document
from recipes_lib.config.schema import file_schema
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, load
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError

if TYPE_CHECKING:
    from jsonschema import ValidationError

_ROWS = re.compile(r"/(tokens|text)-[0-9a-f]{8}/")
_BESIDE = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9.,_-]+){1,2}\Z")


@dataclass(frozen=True)
class PublishedNumber:
    """One number.

    `value` is as published, `ours` in the unit of the metric it stands `beside`. `notes` are those
    of the number and of its metric, `protocol` those of its table.
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
        if self.beside is None or self.interval is None:
            return None
        return self.factor * self.interval[0], self.factor * self.interval[1]


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
        `alpaca_eval/win_rate`). A held-out loss is named after its very tokens, which nobody who
        published one could know.
        """
        plain = _ROWS.sub("/", metric)
        found = (one for one in self.numbers if one.arm == arm and one.beside in (metric, plain))
        return next(found, None)


def load_published(path: str | Path) -> Published:
    """Load and check a file of published numbers.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    document = load(path, "published")
    values, circumstances = document.values, defaultdict[str, dict[str, str]](dict)
    for table in values["tables"].values():
        for arm, told in table.get("circumstances", {}).items():
            circumstances[arm] |= told
    return Published(
        path=document.path,
        publication=values["publication"],
        source=values["source"],
        numbers=tuple(_numbers(document)),
        titles={name: table["title"] for name, table in values["tables"].items()},
        circumstances=dict(circumstances),
    )


class PublishedRules(KindRules):
    """Rules of published numbers: metrics that exist, intervals around their value."""

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with every bare number written as `{value: number}`."""
        copy = deepcopy(values)
        tables = copy.get("tables")
        for table in tables.values() if isinstance(tables, dict) else ():
            arms = table.get("arms") if isinstance(table, dict) else None
            for row in arms.values() if isinstance(arms, dict) else ():
                for name, value in row.items() if isinstance(row, dict) else ():
                    row[name] = value if isinstance(value, dict) else {"value": value}
        return copy

    def wrong(self, document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
        """Return the error for a value that the schema refuses."""
        if path == ("tables",) and error.validator == "minProperties":
            return document.error(path, "tables is empty", "a table has a title, metrics and arms")
        return super().wrong(document, path, error)

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what the schema cannot say."""
        tables = document.values["tables"].items()
        errors = [error for name, table in tables for error in _wrong_table(document, name, table)]
        yield from errors or _twice(document)


def _wrong_table(document: Document, name: str, table: Mapping[str, Any]) -> Iterator[RecipeError]:
    """Columns beside metrics that cannot be ours, arms without a row, numbers without a column, and
    values outside their interval.
    """
    for key, metric in table["metrics"].items():
        beside = metric.get("beside")
        if beside is not None and not _BESIDE.match(beside):
            place = ("tables", name, "metrics", key, "beside")
            what = f"beside {beside!r} is no metric of ours"
            yield document.error(place, what, "for example alpaca_eval/win_rate")
    for arm in table.get("circumstances", {}):
        if arm not in table["arms"]:
            near, what = did_you_mean(arm, table["arms"]), f"table '{name}' has no arm '{arm}'"
            yield document.error(("tables", name, "circumstances", arm), what, *near)
    metrics = table["metrics"]
    for arm, row in table["arms"].items():
        for key, number in row.items():
            place = ("tables", name, "arms", arm, key)
            if key not in metrics:
                near, what = did_you_mean(key, metrics), f"table '{name}' has no metric '{key}'"
                yield document.error(place, what, *near, f"metrics: {', '.join(metrics)}")
            elif isinstance(number, dict) and "interval" in number:
                value, (low, high) = number["value"], number["interval"]
                if not low <= value <= high:
                    what = f"{value:g} is not within its interval [{low:g}, {high:g}]"
                    yield document.error(place, what)


def _twice(document: Document) -> Iterator[RecipeError]:
    """Two numbers of one arm beside the same metric of ours: which one would be shown?"""
    seen: dict[tuple[str, str], PublishedNumber] = {}
    for number in _numbers(document):
        if number.beside is None:
            continue
        first = seen.setdefault((number.arm, number.beside), number)
        if first is not number:
            both = f"beside {number.beside}: {first.shown} and {number.shown}"
            yield RecipeError(
                f"arm '{number.arm}' has two numbers {both}",
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


def _of(kind: str, description: str, /, **words: Unpack[JsonSchema]) -> JsonSchema:
    return {"type": kind, **words, "description": description}


def _keys(description: str, required: list[str], **properties: JsonSchema) -> JsonSchema:
    """A mapping of these keys and no others."""
    return {
        "type": "object",
        "description": description,
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def _names(values: JsonSchema, description: str) -> JsonSchema:
    """A mapping of names to values, at least one."""
    return _of("object", description, minProperties=1, additionalProperties=values)


def published_schema() -> JsonSchema:
    """Return the schema; a bare number in a table is short for `{value: number}`."""
    text: JsonSchema = {"type": "string"}
    factor = "Our metric's value is this times the published one. Absent: 1."
    beside = "Our metric it stands beside: EVAL/METRIC, or EVAL/TASK/METRIC for lm-eval."
    protocol = "How it was measured, a note each: shown as flags beside the numbers."
    circumstances = (
        "Arm -> what -> how it was there, where no recipe can say it (hardware). Arms that differ"
        " are confounded."
    )
    arms = "Rows by arm, as studies call the arm: short name of the metric -> number."
    interval = "[low, high], where one was published."
    number: JsonSchema = {"type": "number"}
    entry = _keys(
        "One published number.",
        ["value"],
        value=_of("number", "As it was published."),
        interval=_of("array", interval, items=number, minItems=2, maxItems=2),
        n=_of("integer", "Items behind it, where they are not the table's n.", minimum=1),
        note=_of("string", "What must be known about this number."),
    )
    metric = _keys(
        "One column of the table.",
        ["label"],
        label=_of("string", "The name it was published under."),
        beside=_of("string", beside),
        factor={**_of("number", factor), "default": 1},
        places=_of("integer", "Decimal places it was published with.", minimum=0),
        n=_of("integer", "Items behind each number, where they are not the table's n.", minimum=1),
        note=_of("string", "How the metric differs from ours."),
    )
    named_texts: JsonSchema = {"type": "object", "additionalProperties": text}
    row: JsonSchema = {"type": "object", "additionalProperties": {"anyOf": [number, entry]}}
    table = _keys(
        "One table of the publication.",
        ["title", "metrics", "arms"],
        title=_of("string", "What was measured."),
        n=_of("integer", "Items behind each number; absent where it was not published.", minimum=1),
        protocol=_of("array", protocol, items=text),
        circumstances=_of("object", circumstances, additionalProperties=named_texts),
        metrics=_names(metric, "Columns by short name."),
        arms=_names(row, arms),
    )
    properties = {
        "publication": _of("string", "What was published."),
        "source": _of("string", "Where."),
        "tables": _names(table, "Tables by short name."),
    }
    return file_schema(
        "published", "Published numbers", required=list(properties), properties=properties
    )
