"""The LaTeX report: booktabs tables and figures, and a PDF where TeX is installed. Every value is
escaped unless it is ours.

Escaping is the default: the template's finalizer escapes whatever is no `Tex`. Characters that
plain LaTeX has no letter for are written as [U+XXXX].
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.atomic_files import write_bytes
from recipes_lib.core.terminal import say
from recipes_lib.report.content import size_text
from recipes_lib.report.html import TEMPLATES, filters

if TYPE_CHECKING:
    from jinja2 import Environment

    from recipes_lib.report.content import Content
    from recipes_lib.report.figures import Figure

_MAX_CHARACTERS = 2_000
COMPILE_TIMEOUT_S = 120
_SPECIAL = {
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
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u030a": "r",
    "\u0327": "c",
    "\u030c": "v",
}


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
    return Tex("".join(_character(char) for char in one))


def _character(char: str) -> str:
    """One character as LaTeX."""
    if char in _SPECIAL:
        return _SPECIAL[char]
    if " " <= char <= "~":
        return char
    parts = unicodedata.normalize("NFD", char)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        return f"\\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"[U+{ord(char):04X}]"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=lambda value: tex("" if value is None else value),
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    made.filters |= filters() | {"ours": Tex}
    return made


def report_latex(content: Content, figures: Sequence[Figure]) -> str:
    """Return the LaTeX source."""
    return (
        _environment()
        .get_template("report.tex.jinja")
        .render(
            content=content, comparison=content.comparison, figures=figures, size=size_text(content)
        )
    )


def compile_pdf(folder: Path) -> Path | None:
    """Compile report.tex where pdflatex is installed, and return report.pdf; the same source gives
    the same bytes.

    A failure is said and leaves no PDF: an old one would belong to another report.
    """
    target = folder / "report.pdf"
    program = shutil.which("pdflatex")
    if program is None:
        target.unlink(missing_ok=True)
        return None
    with tempfile.TemporaryDirectory() as place:
        words = [
            program,
            "-no-shell-escape",
            "-interaction=nonstopmode",
            "-halt-on-error",
            f"-output-directory={place}",
            "report.tex",
        ]
        # Dates come from SOURCE_DATE_EPOCH; openin_any=p lets TeX read nothing above this folder
        # but its own files.
        quiet = {
            **os.environ,
            "SOURCE_DATE_EPOCH": "0",
            "FORCE_SOURCE_DATE": "1",
            "openin_any": "p",
            "openout_any": "p",
        }
        try:
            for _ in range(2):  # the second run knows the widths of the long tables
                done = subprocess.run(
                    words,
                    cwd=folder,
                    env=quiet,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=COMPILE_TIMEOUT_S,
                )
                if done.returncode:
                    break
        except subprocess.TimeoutExpired:
            say(f"report.pdf was not made: pdflatex took more than {COMPILE_TIMEOUT_S} s")
            target.unlink(missing_ok=True)
            return None
        made = Path(place) / "report.pdf"
        if done.returncode or not made.is_file():
            problem = next(
                (line for line in done.stdout.splitlines() if line.startswith("!")),
                "pdflatex failed",
            )
            say(f"report.pdf was not made: {problem}")
            target.unlink(missing_ok=True)
            return None
        write_bytes(target, made.read_bytes())
    return target
