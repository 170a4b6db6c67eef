"""The forms of a report, from one content: HTML (one file, offline, everything in it), Markdown,
LaTeX with a PDF where TeX is installed, CSV and JSON, and the writing of them.

Text of models and of files is escaped in every form, or stands in a JSON block that no parser runs.
In LaTeX escaping is the default: the finalizer escapes whatever is no `Tex`. Characters that plain
LaTeX has no letter for are written as [U+XXXX].
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.compare import wording
from recipes_lib.compare.answers import ANSWERS_HEAD
from recipes_lib.core.atomic_files import write_bytes, write_text
from recipes_lib.core.terminal import printable, say
from recipes_lib.report.content import Content
from recipes_lib.report.figures import Figure, draw_comparison
from recipes_lib.report.numbers import Number, numbers_csv, numbers_json
from recipes_lib.report.samples import SampleSet

if TYPE_CHECKING:
    from jinja2 import Environment


TEMPLATES = Path(__file__).parent / "templates"
COMPILE_TIMEOUT_S = 120
_MAX_CHARACTERS = 2_000
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~&$])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "_": r"\_\allowbreak{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "/": r"/\allowbreak{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "-": "-{}",
    "\N{MINUS SIGN}": r"\ensuremath{-}",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{MIDDLE DOT}": r"\textperiodcentered{}",
    "\N{LESS-THAN OR EQUAL TO}": r"\ensuremath{\leq}",
    "\N{MULTIPLICATION SIGN}": r"\ensuremath{\times}",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ensuremath{\geq}",
    "\N{LEFT SINGLE QUOTATION MARK}": "`",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": "``",
    "\N{RIGHT DOUBLE QUOTATION MARK}": "''",
    "\N{NO-BREAK SPACE}": "~",
    "\N{LATIN SMALL LETTER SHARP S}": r"\ss{}",
    "\N{LATIN SMALL LETTER AE}": r"\ae{}",
    "\N{LATIN SMALL LETTER O WITH STROKE}": r"\o{}",
}
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0308\u030a\u0327\u030c", "`'^~\"rcv", strict=True))


class Tex(str):
    """LaTeX of ours, which is not escaped."""


def tex(text: object) -> Tex:
    r"""Return text that LaTeX shows as it is.

    Example:
        >>> tex(r"\input{a} 50% x_1")
        '\\textbackslash{}input\\{a\\} 50\\% x\\_\\allowbreak{}1'
    """
    if isinstance(text, Tex):
        return text
    one = " ".join(str(text).split())
    if len(one) > _MAX_CHARACTERS:
        one = f"{one[:_MAX_CHARACTERS]} [cut: {len(one):,} characters]"
    return Tex("".join(map(_character, one)))


def _character(char: str) -> str:
    if char in _LATEX or " " <= char <= "~":
        return _LATEX.get(char, char)
    parts = unicodedata.normalize("NFD", char)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        return f"\\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"[U+{ord(char):04X}]"


def markdown(text: object) -> str:
    """Return text that Markdown shows as it is, on one line.

    Example:
        >>> markdown("a | *b* <script>")
        'a \\\\| \\\\*b\\\\* \\\\<script\\\\>'
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(text).split()))


def code(lines: Sequence[str]) -> str:
    """Return lines as an indented code block of Markdown, which no fence in a line can end."""
    return "\n".join(f"    {visible(part)}" for line in lines for part in str(line).splitlines())


def visible(text: object) -> str:
    """Return text whose control characters (ANSI escapes, direction overrides) are shown instead of
    obeyed.
    """
    return printable(str(text))


def interval_of(one: Number) -> str:
    """Return the interval of anything with `low`, `high` and `unit`; nothing where there is
    none.
    """
    known = one.low is not None and one.high is not None
    return wording.interval_text(one.low, one.high, one.unit or "", signed=False) if known else ""


@lru_cache(maxsize=3)
def _templates(form: str) -> Environment:
    """The templates of a form: every value escaped, a misspelt name an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    options: Mapping[str, Mapping[str, Any]] = {
        "html": {"autoescape": True},
        "md": {"finalize": lambda value: "" if value is None else value},
        "tex": {
            "finalize": lambda value: tex("" if value is None else value),
            "block_start_string": "<%",
            "block_end_string": "%>",
            "variable_start_string": "<<",
            "variable_end_string": ">>",
            "comment_start_string": "<#",
            "comment_end_string": "#>",
        },
    }
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options[form],
    )
    made.filters |= {
        "value": wording.metric_text,
        "difference": wording.difference_text,
        "p": wording.p_text,
        "number": wording.plain_number,
        "interval": interval_of,
        "shown": visible,
        "md": markdown,
        "code": code,
        "ours": Tex,
    }
    return made


def _rendered(form: str, content: Content, **values: Any) -> str:
    template = _templates(form).get_template(f"report.{form}.jinja")
    own = {"comparison": content.comparison, "answers_head": ANSWERS_HEAD}
    return template.render(content=content, **own, **values)


def report_markdown(content: Content, figures: Sequence[Figure]) -> str:
    """Return the Markdown."""
    return _rendered("md", content, figures=figures)


def report_latex(content: Content, figures: Sequence[Figure]) -> str:
    """Return the LaTeX source."""
    return _rendered("tex", content, figures=figures)


def report_html(content: Content, figures: Sequence[Figure]) -> str:
    """Return the page."""
    from markupsafe import Markup

    style, script = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    places = ("effects", "grid", "by", "noise", "")
    by_place: dict[str, list[dict[str, str]]] = {place: [] for place in places}
    for figure in figures:
        data = base64.b64encode(figure.files["svg"]).decode()
        start = figure.name.partition("_")[0]
        by_place[start if start in by_place else ""].append(
            {"title": figure.title, "caption": figure.caption, "data": data}
        )
    severities = [one.severity for one in content.comparison.findings]
    return _rendered(
        "html",
        content,
        style=Markup(style),
        script=Markup(script),
        samples=Markup(samples_json(content.samples)),
        effects=next(iter(by_place["effects"]), None),
        grids=by_place["grid"],
        curves=by_place[""],
        groups=by_place["by"],
        floor_figure=next(iter(by_place["noise"]), None),
        severities=[(name, severities.count(name)) for name in dict.fromkeys(severities)],
    )


def samples_json(found: SampleSet) -> str:
    """Return the samples as JSON that is safe inside a script element: no `<`, `>`, `&`, no line
    separators of JavaScript.
    """
    value = {
        "groups": found.groups,
        "texts": [visible(text) for text in found.texts],
        "samples": found.samples,
        "total": found.total,
    }
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_report(folder: Path, content: Content) -> list[Path]:
    """Write report.html, report.md, report.tex (report.pdf where TeX exists), numbers.csv,
    numbers.json and figures/.

    The same content gives the same bytes. Files of an earlier report that no longer belong to this
    one are removed.

    Returns:
        The files written.
    """
    figures = draw_comparison(content)
    drawn = {
        f"figures/{figure.name}.{kind}": data
        for figure in figures
        for kind, data in figure.files.items()
    }
    for path in (folder / "figures").glob("*.*"):
        if f"figures/{path.name}" not in drawn:
            path.unlink()
    texts = {
        "numbers.json": numbers_json(content),
        "numbers.csv": numbers_csv(content),
        "report.md": report_markdown(content, figures),
        "report.tex": report_latex(content, figures),
        "report.html": report_html(content, figures),
    }
    for name, data in drawn.items():
        write_bytes(folder / name, data)
    for name, text in texts.items():
        write_text(folder / name, text)
    pdf = compile_pdf(folder)
    return [*(folder / name for name in (*drawn, *texts)), *([pdf] if pdf else [])]


def compile_pdf(folder: Path) -> Path | None:
    """Compile report.tex where pdflatex is installed, and return report.pdf; the same source gives
    the same bytes.

    A failure is said and leaves no PDF: an old one would belong to another report.
    """
    target, program = folder / "report.pdf", shutil.which("pdflatex")
    target.unlink(missing_ok=True)
    if program is None:
        return None
    words = [program, "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error"]
    # Dates come from SOURCE_DATE_EPOCH; openin_any=p lets TeX read nothing above this folder but
    # its own files.
    dates = {"SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"}
    with tempfile.TemporaryDirectory() as place:
        problem = ""
        for _ in range(2):  # the second run knows the widths of the long tables
            try:
                done = subprocess.run(
                    [*words, f"-output-directory={place}", "report.tex"],
                    cwd=folder,
                    env={**os.environ, **dates, "openin_any": "p", "openout_any": "p"},
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=COMPILE_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired:
                problem = f"pdflatex took more than {COMPILE_TIMEOUT_S} s"
                break
            if done.returncode:
                lines = (line for line in done.stdout.splitlines() if line.startswith("!"))
                problem = next(lines, "pdflatex failed")
                break
        made = Path(place) / "report.pdf"
        if problem or not made.is_file():
            say(f"report.pdf was not made: {problem or 'pdflatex failed'}")
            return None
        write_bytes(target, made.read_bytes())
    return target
