"""`recipes chat`: the base beside the runs, each asked as it was trained, and model text that
cannot do anything to a terminal.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.commands import chat
from recipes_lib.core.errors import ExitCode
from recipes_lib.data.prompts import generation_prompt

Verb = Callable[..., tuple[int, str, str]]
Runs = Callable[..., Path]
NASTY = "\x1b[31mred\x1b[0m \x1b]0;title\x07 [bold]loud[/bold] \r\x08\x9b2J \u202eevil"


def headings(out: str, names: list[str]) -> list[str]:
    return [line for line in out.splitlines() if line in names]


def test_one_prompt_is_answered_by_the_base_and_every_run(runs: Runs, recipes: Verb) -> None:
    runs("lora", "lora.chat")
    names = ["base", "lora", "lora.chat"]
    first = recipes(
        "chat", "lora", "lora.chat", "--prompt", "What is gold?", "--max-new-tokens", "5"
    )
    assert (
        first[0] == 0
        and headings(first[1], names) == names
        and first[1].endswith("next: recipes export lora --to DIR\n")
    )
    assert (
        recipes("chat", "lora", "lora.chat", "--prompt", "What is gold?", "--max-new-tokens", "5")
        == first
    )
    out = recipes(
        "chat", "lora", "lora", "--no-base", "--prompt", "What is gold?", "--max-new-tokens", "5"
    )[1]
    assert headings(out, names) == ["lora"]


def test_a_full_fine_tuning_and_another_base_stand_beside(runs: Runs, recipes: Verb) -> None:
    runs("lora", "full", "qlora")
    code, out, _ = recipes(
        "chat", "lora", "full", "qlora", "--prompt", "hi", "--max-new-tokens", "3"
    )
    lines = [
        line
        for line in out.splitlines()
        if line.startswith("base ") or line in {"lora", "full", "qlora"}
    ]
    assert code == 0 and [line.split()[0] for line in lines] == [
        "base",
        "lora",
        "full",
        "base",
        "qlora",
    ]
    assert "4 bit" in lines[3] and "4 bit" not in lines[0]


def test_each_run_is_asked_in_the_prompt_format_it_was_trained_with(runs: Runs) -> None:
    from recipes_lib.core.run_directory import open_run
    from recipes_lib.data.prompts import generation_prompt
    from recipes_lib.weights.runs import Family, finished_run

    runs("lora", "lora.chat")
    family = Family([finished_run(open_run(name)) for name in ("lora", "lora.chat")])
    texts = {
        name: generation_prompt(*family.prompting(name), instruction="Say hi.")
        for name in family.names
    }
    assert texts["lora"] == texts["base"] == "### Instruction:\nSay hi.\n\n### Response:\n"
    assert texts["lora.chat"] == "<s><|user|>\nSay hi.</s>\n<|assistant|>\n"


def test_answers_are_computed_in_the_precision_of_the_training(tiny_recipe: Path) -> None:
    import torch

    from recipes_lib.core.run_directory import open_run
    from recipes_lib.train import main
    from recipes_lib.weights.runs import Family, finished_run

    words = ["run.name=half", "train.bf16=true", "train.max_steps=3", "train.eval_strategy='no'"]
    assert main([str(tiny_recipe), *words]) == 0
    family = Family([finished_run(open_run("half"))])
    for name, half in (("half", True), ("base", False)):
        with family.answering(name) as model:
            assert torch.is_autocast_enabled(model.device.type) == half


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_escapes_control_characters_and_markup_in_answers_are_shown_not_obeyed(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    runs("lora")
    monkeypatch.setattr(chat, "answer", lambda *args: NASTY)
    if terminal:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    code, out, _ = recipes("chat", "lora", "--prompt", "hi")
    assert code == 0
    assert not set(out.replace("\x1b[1m", "").replace("\x1b[0m", "")) & set(
        "\x1b\x07\r\x08\x9b\u202e"
    )
    assert "\\x1b[31mred" in out and "[bold]loud[/bold]" in out and "\\u202eevil" in out


def test_the_turns_before_and_the_system_prompt_are_read_again(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs("lora")
    read: list[list[str]] = []

    def answer(family, name, messages, *rest) -> str:
        read.append([message["content"] for message in messages])
        return f"answer {len(read)}"

    monkeypatch.setattr(chat, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n  second \n\nnever\n"))
    code, out, _ = recipes("chat", "lora", "--no-base", "--system", "Be brief.")
    assert code == 0 and "> " not in out
    assert read == [["Be brief.", "first"], ["Be brief.", "first", "answer 1", "second"]]


def test_a_second_turn_and_a_system_prompt_reach_the_model(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs("lora.chat")
    prompts: list[str] = []

    def recorded(*args: Any, **values: Any) -> str:
        prompts.append(generation_prompt(*args, **values))
        return prompts[-1]

    monkeypatch.setattr(chat, "generation_prompt", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is gold?\nAnd silver?\n"))
    words = ("--no-base", "--system", "Be brief.", "--max-new-tokens", "3")
    assert recipes("chat", "lora.chat", *words)[0] == 0
    first, second = prompts
    assert "Be brief." in first and "What is gold?" in first
    assert second.startswith(first) and second.index("And silver?") > len(first)


def test_persian_hindi_and_emoji_are_printed_as_they_are(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs("lora")
    text = "می\u200cخواهم क्\u200dष 👩\u200d👧"
    monkeypatch.setattr(chat, "answer", lambda *args: text)
    assert text in recipes("chat", "lora", "--prompt", "hi")[1]


@pytest.mark.parametrize(
    "flags", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"]]
)
def test_impossible_settings_are_usage_errors(runs: Runs, recipes: Verb, flags: list[str]) -> None:
    runs("lora")
    assert recipes("chat", "lora", "--prompt", "hi", *flags)[0] == ExitCode.USAGE


def test_an_empty_answer_says_so(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs("lora")
    monkeypatch.setattr(chat, "answer", lambda *args: "")
    assert "(empty answer)" in recipes("chat", "lora", "--prompt", "hi")[1]


def test_an_unknown_run_names_its_neighbours(runs: Runs, recipes: Verb) -> None:
    runs("lora")
    code, _, err = recipes("chat", "lor", "--prompt", "hi")
    assert code == ExitCode.USAGE and "no run named 'lor'" in err and "lora" in err
