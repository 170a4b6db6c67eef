"""A word that is no `section.key=value` is answered with what to type."""

import pytest

from recipes_lib.cli import main as recipes

RECIPE = "quickstart/lora-r8"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--learning_rate", "1e-4"], "train.learning_rate=VALUE"),
        (["--lr", "1e-4"], "train.learning_rate=VALUE"),
        (["--resume"], "the same command resumes"),
        (["train.learning_rate", "=", "1e-4"], "in one word, for example train.learning_rate=1e-4"),
        (["train.learning_rate:1e-4"], "train.learning_rate=1e-4"),
        (["quickstart/lora-r32"], "recipes study"),
        (["lr=1e-4"], "write train.learning_rate"),
        (["model=Qwen/Qwen3-8B"], "recipes explain model"),
    ],
)
def test_a_mistyped_word_is_answered_with_what_to_type(words, hint, capsys) -> None:
    assert recipes(["show", RECIPE, *words]) == 2
    assert hint in capsys.readouterr().err


def test_the_wrong_kind_of_file_is_answered_with_the_verb_for_it(capsys) -> None:
    assert recipes(["study", "plan", RECIPE]) == 2
    assert "recipes train" in capsys.readouterr().err
    assert recipes(["show", "accelerate_configs/ddp.yaml"]) == 2
    assert "--accelerate FILE" in capsys.readouterr().err


def test_help_of_a_verb_can_be_asked_in_two_ways(capsys) -> None:
    assert recipes(["help", "chat"]) == recipes(["chat", "--help"]) == 0
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second
