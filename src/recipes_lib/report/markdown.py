"""The Markdown report: the same content for a repository's page. Text of models and of files is
escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from recipes_lib.report.content import size_text
from recipes_lib.report.html import TEMPLATES, filters, visible

if TYPE_CHECKING:
    from jinja2 import Environment

    from recipes_lib.report.content import Content
    from recipes_lib.report.figures import Figure

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&$])")


def escaped(text: object) -> str:
    """Return text that Markdown shows as it is, on one line.

    Example:
        >>> escaped("a | *b* <script>")
        'a \\\\| \\\\*b\\\\* \\\\<script\\\\>'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        autoescape=False,
    )
    made.filters |= filters() | {"md": escaped, "code": code}
    return made


def _finalize(value: object) -> object:
    return "" if value is None else value


def code(lines: Sequence[str]) -> str:
    """Return lines as an indented code block, which no fence in a line can end."""
    return "\n".join(f"    {visible(part)}" for line in lines for part in str(line).splitlines())


def report_markdown(content: Content, figures: Sequence[Figure]) -> str:
    """Return the Markdown."""
    return (
        _environment()
        .get_template("report.md.jinja")
        .render(
            content=content, comparison=content.comparison, figures=figures, size=size_text(content)
        )
    )
