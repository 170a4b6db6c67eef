"""Made-up runs for reports: the builder of the benchmark, and texts that try to break out of every
format.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.measurements import read_measurements
from recipes_lib.report.content import Content, gather
from recipes_lib.report.documents import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import synthetic_runs

# What models (and whoever trained them) may write. Every piece tries to be code somewhere: HTML,
# JSON in a script, a spreadsheet, LaTeX, a terminal, rich's markup.
HOSTILE = (
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<svg onload=\"document.title='owned'\">",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<a href=\"javascript:document.title='owned'\">x</a>",
    '"><style>body{display:none}</style>',
    "<!--<script>",
    "]]>",
    "&lt;script&gt;",
    "{{ 7*7 }} {% raw %}",
    "${alert(1)}",
    "\u2028document.title='owned'\u2029",
    '=HYPERLINK("http://example.invalid")',
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "\\input{/etc/passwd} \\write18{id} \\end{document} $x^2$ % & # _ ~ ^ { }",
    "^^5cinput{/etc/passwd}",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x00 \x08",
    "[bold red]x[/] [link=file:///etc]y[/link]",
    "a | b \n| - | - |\n# head",
    "```\nfence\n```",
    "<details><summary>",
    "\u202egnirts desrever\u202c",
    "مرحبا بالعالم",
    "שלום",
    "日本語 \U0001f600",
    "\ud800 lone surrogate",
    "A" * 20_000,
)


def hostile_text(who: str, question: str) -> str:
    """Return a hostile answer."""
    number = int("".join(char for char in question if char.isdigit()) or 0)
    return f"{HOSTILE[number % len(HOSTILE)]}\n{who}"


@pytest.fixture
def make_content(tmp_path: Path) -> Callable[..., Content]:
    """Return a function that writes runs (`hostile=True` for hostile ones) and gathers their
    report's content.
    """

    def make(
        n: int = 40,
        names: tuple[str, ...] = ("r8", "r32"),
        hostile: bool = False,
        findings: tuple[Finding, ...] = (),
    ) -> Content:
        options: dict[str, Any] = {}
        if hostile:
            options = {
                "text": hostile_text,
                "category": lambda number: HOSTILE[number % 5],
                "raw": lambda said: HOSTILE[len(said) + 1],
            }
            findings = tuple(
                Finding("test", "note", text[:200], (text[:300],), text[:100]) for text in HOSTILE
            )
        folders = synthetic_runs.write_study(tmp_path / "runs", names, n, **options)
        measurements = read_measurements(folders)
        return gather("study", measurements, compare_arms(measurements, findings))

    return make


@pytest.fixture
def written(make_content: Callable[..., Content], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a report and returns its folder."""

    def write(**options: Any) -> Path:
        write_report(tmp_path / "report", make_content(**options))
        return tmp_path / "report"

    return write
