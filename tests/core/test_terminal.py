"""What a terminal shows: colours, folded lines and one updating line; a pipe gets plain lines."""

import io
import sys

import pytest

from recipes_lib.core.errors import RecipeError, print_error
from recipes_lib.core.terminal import next_step, say, say_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make both streams terminals of 40 columns, and return the first."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name, value in {"COLUMNS": "40", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_a_terminal_has_colours_unless_no_color_is_set(monkeypatch):
    screen = terminal(monkeypatch)
    say("r32 is better", "and so on", "", "warning: few questions", is_result=True)
    next_step("ls")
    shown = screen.getvalue()
    for line in ("\x1b[1mr32 is better\x1b[0m", "\x1b[33mwarning: few questions\x1b[0m"):
        assert line in shown
    assert "\x1b[32mnext: recipes ls\x1b[0m" in shown
    for color in ("\x1b[31m", ""):
        print_error(RecipeError("no such key", "use lr", file="a.yaml"))
        assert f"{color}a.yaml: no such key" in sys.stderr.getvalue()
        monkeypatch.setenv("NO_COLOR", "1")
    assert sys.stderr.getvalue().endswith("\x1b[2Ka.yaml: no such key\n  use lr\n")


def test_a_terminal_folds_sentences_and_leaves_commands_and_yaml_whole(monkeypatch):
    screen = terminal(monkeypatch)
    say("  " + "word " * 12)
    say("key: " + "a" * 20 + " " + "b" * 20, fold=False)
    next_step("study", "run", "recipes/studies/a-long-name-of-a-study.yaml")
    lines = screen.getvalue().replace("\x1b[2K", "").split("\n")
    assert lines[:2] == ["\r  " + "word " * 6 + "word", "    " + "word " * 4 + "word"]
    assert lines[2].endswith("a " + "b" * 20) and "study run recipes/studies" in lines[3]


def test_a_terminal_updates_one_line_of_a_training(monkeypatch):
    screen = terminal(monkeypatch)
    for step in (1, 2):
        say_progress(f"step {step} " + "x" * 60)
    assert screen.getvalue().count("\r\x1b[2Kstep") == 2 and "\n" not in screen.getvalue()
    assert all(len(line) <= 39 for line in screen.getvalue().split("\r\x1b[2K"))


def test_a_pipe_gets_plain_whole_lines(capsys):
    say_progress("step 1")
    say("warning: " + "x " * 200, is_result=True)
    assert capsys.readouterr().out == "step 1\n" + "warning: " + "x " * 200 + "\n"
