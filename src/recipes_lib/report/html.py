"""The HTML report: one file, offline, everything in it. Text of models is escaped or stands in a
JSON block that no parser runs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.compare import wording
from recipes_lib.compare.table_lines import effect_interval, effect_value
from recipes_lib.core.terminal import printable
from recipes_lib.report.content import size_text

if TYPE_CHECKING:
    from jinja2 import Environment

    from recipes_lib.report.content import Content
    from recipes_lib.report.figures import Figure
    from recipes_lib.report.samples import SampleSet

TEMPLATES = Path(__file__).parent / "templates"


@lru_cache(maxsize=1)
def templates() -> Environment:
    """Return the template environment: every value escaped, a misspelt name an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= filters()
    return made


def filters() -> dict[str, Any]:
    """Return the number formats that the templates of all forms use."""
    return {
        "value": wording.metric_text,
        "difference": wording.difference_text,
        "p": wording.p_text,
        "number": wording.plain_number,
        "interval": interval_of,
        "shown": visible,
        "effect": effect_value,
        "effect_interval": effect_interval,
    }


def interval_of(one: Any, unit: str | None = None) -> str:
    """Return the interval of anything with `low` and `high` (an object or a mapping); nothing where
    there is none.
    """
    low, high = (one["low"], one["high"]) if isinstance(one, dict) else (one.low, one.high)
    return (
        ""
        if low is None or high is None
        else wording.interval_text(low, high, unit or one.unit, signed=False)
    )


def visible(text: object) -> str:
    """Return text whose control characters (ANSI escapes, direction overrides) are shown instead of
    obeyed.
    """
    return printable(str(text))


def report_html(content: Content, figures: Sequence[Figure]) -> str:
    """Return the whole file."""
    pictures = [
        {
            "name": figure.name,
            "title": figure.title,
            "caption": figure.caption,
            "data": base64.b64encode(figure.files["svg"]).decode(),
        }
        for figure in figures
    ]
    curves = [
        picture for picture in pictures if not picture["name"].startswith(("by_", "noise_floor"))
    ]
    style, script = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            content=content,
            comparison=content.comparison,
            curves=curves,
            style=_raw(style),
            script=_raw(script),
            size=size_text(content),
            groups=[picture for picture in pictures if picture["name"].startswith("by_")],
            floor_figure=next(
                (picture for picture in pictures if picture["name"] == "noise_floor"), None
            ),
            samples=_raw(samples_json(content.samples)),
            severities=_severities(content),
        )
    )


def _severities(content: Content) -> list[tuple[str, int]]:
    counts = [
        (name, sum(finding.severity == name for finding in content.comparison.findings))
        for name in ("error", "warning", "note")
    ]
    return [(name, number) for name, number in counts if number]


def _raw(text: str) -> Any:
    """Our own file, or JSON that `samples_json` made safe: not escaped."""
    from markupsafe import Markup

    return Markup(text)


def samples_json(found: SampleSet) -> str:
    """Return the samples as JSON that is safe inside a script element: no `<`, `>`, `&`, no line
    separators of JavaScript.
    """
    value = {
        "groups": found.groups,
        "texts": [visible(text) for text in found.texts],
        "samples": [
            [
                one.group,
                visible(one.question),
                visible(one.category),
                one.outcome,
                int(one.flip),
                one.instruction,
                one.answer,
                one.opponent,
                [list(verdict) for verdict in one.verdicts],
            ]
            for one in found.samples
        ],
        "total": found.total,
    }
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
