"""`recipes chat`: the base beside the runs, each asked as it was trained, and model text that
cannot do anything to a terminal.
"""

import io
import sys
from typing import Any

from recipes_lib.commands import chat as verbs
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.run_directory import open_run
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.train import main as train
from recipes_lib.weights.runs import Family, finished_run

NASTY = "\x1b[31mred\x1b[0m \x1b]0;title\x07 [bold]loud[/bold] \r\x08\x9b2J \u202eevil"
PERSIAN = "می\u200cخواهم क्\u200dष 👩\u200d👧"


def headings(out: str, *names: str) -> list[str]:
    """The first word of each line that names a model."""
    return [line.split()[0] for line in out.splitlines() if line and line.split()[0] in names]


def test_one_prompt_is_answered_by_the_base_and_every_run(runs, recipes) -> None:
    runs("lora", "lora.chat", "full", "qlora")
    words = ("--prompt", "What is gold?", "--max-new-tokens", "5")
    first = recipes("chat", "lora", "lora.chat", *words)
    assert first[0] == 0 and first[1].endswith("next: recipes export lora --to lora-export\n")
    assert headings(first[1], "base", "lora", "lora.chat") == ["base", "lora", "lora.chat"]
    assert recipes("chat", "lora", "lora.chat", *words) == first
    code, out, _ = recipes("chat", "lora", "full", "qlora", *words)
    expected = ["base", "lora", "full", "base", "qlora"]
    assert code == 0 and headings(out, "base", "lora", "full", "qlora") == expected
    bases = [line for line in out.splitlines() if line.startswith("base ")]
    assert "4-bit" in bases[1] and "4-bit" not in bases[0]


def test_each_run_is_asked_in_the_prompt_format_it_was_trained_with(runs) -> None:
    runs("lora", "lora.chat")
    family = Family([finished_run(open_run(name)) for name in ("lora", "lora.chat")])
    texts = {
        name: generation_prompt(*family.prompting(name), [{"role": "user", "content": "Say hi."}])
        for name in family.names
    }
    assert texts["lora"] == texts["base"] == "### Instruction:\nSay hi.\n\n### Response:\n"
    assert texts["lora.chat"] == "<s><|user|>\nSay hi.</s>\n<|assistant|>\n"


def test_a_run_whose_adapter_changes_the_base_has_it_for_itself(runs, tiny_recipe, recipes) -> None:
    runs("lora")
    words = ["lora.init_lora_weights=pissa", "train.max_steps=1", "train.learning_rate=1e-12"]
    assert train([str(tiny_recipe), *words, "run.name=pissa"]) == 0
    words = ("--prompt", "What is gold?", "--max-new-tokens", "5")
    code, out, _ = recipes("chat", "pissa", "lora", *words)
    assert code == 0 and headings(out, "base", "pissa", "lora") == ["pissa", "base", "lora"]
    answers = [part.partition("\n")[2] for part in out.split("\n\n")[:3]]
    assert answers[0] == answers[1]  # it has learned nothing


def test_answers_are_computed_in_the_precision_of_the_training(runs) -> None:
    import torch

    runs("qlora")
    family = Family([finished_run(open_run("qlora"))])
    for name, half in (("qlora", True), ("base", False)):
        with family.answering(name) as model:
            assert torch.is_autocast_enabled(model.device.type) == half


def test_escapes_and_control_characters_in_answers_are_shown_not_obeyed(
    runs, recipes, monkeypatch
) -> None:
    runs("lora")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    controls = set("\x1b\x07\r\x08\x9b\u202e")
    nasty = ("\\x1b[31mred", "[bold]loud[/bold]", "\\u202eevil")
    for written, shown in ((NASTY, nasty), (PERSIAN, (PERSIAN,)), ("", ("(empty answer)",))):
        monkeypatch.setattr(verbs.Conversation, "ask", lambda *args, text=written: text)
        code, out, _ = recipes("chat", "lora", "--prompt", "hi")
        assert code == 0 and not [part for part in shown if part not in out]
        for own in ("\r\x1b[2K", "\x1b[0m", "\x1b[1m", "\x1b[32m"):  # erased line, bold, green
            out = out.replace(own, "")
        assert not set(out) & controls


def test_the_turns_before_and_the_system_prompt_reach_the_model(runs, recipes, monkeypatch) -> None:
    runs("lora.chat")
    prompts: list[str] = []

    def recorded(*args: Any, **values: Any) -> str:
        prompts.append(generation_prompt(*args, **values))
        return prompts[-1]

    monkeypatch.setattr(verbs, "generation_prompt", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is gold?\n And silver? \n\nnever\n"))
    words = ("--system", "Be brief.", "--max-new-tokens", "3")
    code, out, _ = recipes("chat", "lora.chat", *words)
    assert code == 0 and "> " not in out
    first, second = prompts[1::2]  # the base is asked too
    assert "Be brief." in first and "What is gold?" in first
    assert second.startswith(first) and second.index("And silver?") > len(first)


def test_an_impossible_temperature_and_an_unknown_run_are_usage_errors(runs, recipes) -> None:
    runs("lora")
    for flag, value in (("--max-new-tokens", "0"), ("--temperature", "-1")):
        assert recipes("chat", "lora", "--prompt", "hi", flag, value)[0] == ExitCode.USAGE, flag
    code, _, err = recipes("chat", "lor", "--prompt", "hi")
    assert code == ExitCode.USAGE and "no run named 'lor'" in err and "recipes status" in err
