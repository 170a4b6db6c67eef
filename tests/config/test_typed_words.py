"""A word that is no `section.key=value` is answered with what to type."""

import pytest

from recipes_lib.cli import main as recipes

RECIPE = "quickstart/lora-r8"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--learning_rate", "1e-4"], "no spaces: train.learning_rate=1e-4"),
        (["--lr"], "no spaces: train.learning_rate=VALUE"),
        (["--resume"], "the same command resumes"),
        (["train.seed", "=", "1"], "write it without spaces: train.seed=1"),
        (["train.seed", "=1"], "write it without spaces: train.seed=1"),
        (["train.seed=", "1"], "write it without spaces: train.seed=1"),
        (["train.seed"], "in one word, for example"),
        (["accelerate_configs/ddp"], "--accelerate FILE"),
        (["max_seq_length=9"], "write train.max_length"),
        (["train.learning_rate:1e-4"], "train.learning_rate=1e-4"),
        (["quickstart/lora-r32"], "recipes study"),
        (["lr=1e-4"], "write train.learning_rate"),
        (["model=Qwen/Qwen3-8B"], "write model.name_or_path=Qwen/Qwen3-8B"),
        (["train=3"], "recipes explain train"),
    ],
)
def test_a_mistyped_word_is_answered_with_what_to_type(words, hint, said) -> None:
    assert hint in said("show", RECIPE, *words, code=2)


def test_the_wrong_kind_of_file_is_answered_with_the_verb_for_it(said) -> None:
    assert "recipes train" in said("study", "plan", RECIPE, code=2)
    assert "--accelerate FILE" in said("show", "accelerate_configs/ddp.yaml", code=2)
    assert "--profile FILE" in said("show", "launch/profiles/example", code=2)
    assert "lora-r" in said("show", "quickstart", code=2)


def test_a_study_that_does_not_exist_is_answered_with_the_names_of_studies(said) -> None:
    answer = said("study", "plan", "lora-rnk", code=2)
    assert "did you mean lora-rank?" in answer and "quickstart, " in answer


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("data.source=nowhere.jsonl", 4),
        ("model.name_or_path=./nowhere", 2),
        ("data.chat_template=nowhere.jinja", 4),
        ("run.global_batch_size=7", 2),
    ],
)
def test_what_check_finds_is_refused_before_torch_is_loaded(word, code, tmp_path, capfd) -> None:
    words = ["data.prompt_format=chat", f"run.name={tmp_path.name}", word]
    assert recipes(["train", RECIPE, *words]) == code
    said = capfd.readouterr().err
    assert word.partition("=")[0] in said or "nowhere" in said
    assert "loading torch" not in said
