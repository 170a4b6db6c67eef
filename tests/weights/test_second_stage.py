"""A run of one stage begins with the weights of another: named by its folder, checked, carried."""

import json
from pathlib import Path

import pytest
import yaml
from tests.pairs import write_pair_recipe
from transformers import AutoTokenizer

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import model_fingerprint
from recipes_lib.train import main

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
SHORT = ["train.max_steps=2", "train.eval_strategy='no'"]
NAME = "a-first-stage-with-a-name-of-forty-chars"  # which is what they are


@pytest.fixture
def first(tiny_recipe: Path) -> Path:
    """The folder of a run of stage sft, with a chat template of its own."""
    words = ["data.prompt_format=chat", f"data.chat_template={json.dumps(TEMPLATE)}"]
    assert main([str(tiny_recipe), f"run.name={NAME}", *words, *SHORT]) == 0
    return tiny_recipe.parent / "runs" / NAME


@pytest.fixture
def second(tiny_recipe: Path, tiny_recipe_text) -> Path:
    """A recipe of stage dpo on that run."""
    return write_pair_recipe(tiny_recipe.with_name("second.yaml"), tiny_recipe_text(f"runs/{NAME}"))


def test_pairs_are_preferred_on_a_merged_run_and_the_card_names_both_stages(
    first, second, said, capsys
) -> None:
    assert "recipes merge" in said("check", second, code=ExitCode.USAGE)
    said("merge", NAME)
    said("check", "--full", second)
    recipe = load_recipe(second)
    assert Path(recipe.model.name_or_path) == (first / "merged").resolve()
    assert main([str(second), "run.name=second", *SHORT]) == 0
    run = first.with_name("second")
    state = json.loads((run / "run.json").read_text())
    assert state["guard"]["base_weights"] == model_fingerprint(first / "merged")
    assert AutoTokenizer.from_pretrained(run / "adapter").chat_template == TEMPLATE
    card = (run / "adapter" / "README.md").read_text()
    assert "Preference tuning (DPO, loss sigmoid, beta 0.1), LoRA (r 4" in card
    assert f"begins with the weights of {NAME}: LoRA (r 4" in card and str(first.parent) not in card
    tags = yaml.safe_load(card.split("---")[1])["tags"]
    assert tags[:3] == ["sft", "dpo", "trl"]
    said("merge", "second")
    assert "Hello" not in said("chat", "second", "--prompt", "What is 2?", "--max-new-tokens", "3")

    file = first / "merged" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert main([str(second), "run.name=third", *SHORT]) == ExitCode.ENVIRONMENT
    assert "not what was merged" in capsys.readouterr().err


def test_a_fully_trained_run_is_a_base_as_it_is_and_an_unfinished_one_is_none(
    tiny_recipe, second
) -> None:
    run = tiny_recipe.parent / "runs" / NAME
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(RecipesError, match="holds no whole model"):
        load_recipe(second)
    (run / "run.json").unlink()
    full = ["lora=null", "train.learning_rate=1e-3"]
    assert main([str(tiny_recipe), f"run.name={NAME}", *full, *SHORT]) == 0
    assert main([str(second), "run.name=second", *full, *SHORT]) == 0
    resolved = yaml.safe_load((run.with_name("second") / "resolved.yaml").read_text())
    assert resolved["model"]["name_or_path"] == str((run / "model").resolve())
    assert resolved["stage"] == "dpo"
