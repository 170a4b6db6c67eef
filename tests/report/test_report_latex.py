"""The LaTeX report compiles, whatever models wrote, and the same source gives the same PDF."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from recipes_lib.report.documents import compile_pdf

pytestmark = pytest.mark.latex


@pytest.fixture(autouse=True)
def needs_tex():
    if shutil.which("pdflatex") is None:
        why = "no pdflatex: apt-get install texlive-latex-base texlive-latex-recommended"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def test_hostile_text_compiles_and_reads_no_file(written):
    folder = written(hostile=True, n=40)
    made = (folder / "report.pdf").read_bytes()
    assert made.startswith(b"%PDF")
    again = compile_pdf(folder)
    assert again is not None and again.read_bytes() == made
    if shutil.which("pdftotext"):
        words = subprocess.run(
            ["pdftotext", folder / "report.pdf", "-"], capture_output=True, text=True, check=True
        ).stdout
        assert "root:x:0" not in words and "input{/etc/passwd}" in words.replace("\n", "")


def test_a_source_that_cannot_be_compiled_leaves_no_old_pdf(tmp_path, capsys):
    (tmp_path / "report.pdf").write_bytes(b"old")
    (tmp_path / "report.tex").write_text(
        "\\documentclass{article}\\begin{document}\\nosuchcommand\\end{document}"
    )
    assert compile_pdf(tmp_path) is None
    assert not (tmp_path / "report.pdf").exists()
    assert "report.pdf was not made: ! Undefined control sequence" in capsys.readouterr().out
