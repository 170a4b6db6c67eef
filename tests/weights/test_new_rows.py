"""A tokenizer with more tokens than its model has rows: the new rows are trained or named, saved
once, and the same wherever the run is used.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.conftest import NF4
from tests.families import build_family

from recipes_lib.core.run_directory import open_run
from recipes_lib.train import main as train
from recipes_lib.weights.merge import logits_on
from recipes_lib.weights.runs import Family, finished_run

WHOLE = "lora.modules_to_save=[embed_tokens, lm_head]"
TOKENS = "lora.trainable_token_indices=[512, 530]"
NUM_NEW = 20
ROWS = [[1, 20, 512, 530, 80], [1, 9, 531, 7]]  # 512 to 531 are new tokens


@pytest.fixture
def more_tokens(tiny_model_dir, tmp_path) -> Path:
    """The folder of the tiny model, whose tokenizer has 20 tokens more than it has rows."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "more-tokens"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(NUM_NEW)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tiny_recipe, more_tokens) -> Callable[..., int]:
    """A function that trains a run `grown` for two steps and returns the exit code."""

    def start(*words: str) -> int:
        fixed = ["model.resize_embeddings=true", "train.max_steps=2", "run.name=grown"]
        return train([str(tiny_recipe), *fixed, f"model.name_or_path={more_tokens}", *words])

    return start


def answers() -> torch.Tensor:
    """Return the logits of the run for texts with new tokens."""
    family = Family([finished_run(open_run("grown"))])
    with family.answering("grown") as model:
        return logits_on(model, ROWS)


def tensors_in(file: Path) -> dict[str, list[int]]:
    """Return the shapes of what is no adapter of a block, by name."""
    with safe_open(file, framework="pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return {name: shape for name, shape in shapes.items() if ".layers." not in name}


@pytest.mark.parametrize("word", ["lora.r=4", WHOLE, "lora.modules_to_save=[lm_head]", TOKENS])
def test_new_rows_are_proven_saved_once_merged_and_answer(
    word, trained, recipes, more_tokens, tmp_path
) -> None:
    assert trained(word) == 0
    run = tmp_path / "runs/grown"
    saved = tensors_in(run / "adapter/adapter_model.safetensors")
    assert sorted(saved.values()).count([512 + NUM_NEW, 64]) == 2, saved  # embeddings and head
    assert recipes("merge", "grown")[0] == 0
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype="float32")
    torch.testing.assert_close(logits_on(merged, ROWS), answers(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("word", [WHOLE, TOKENS])
def test_new_rows_of_tied_embeddings_are_proven(
    word, trained, recipes, more_tokens, tmp_path
) -> None:
    folder = build_family("qwen3", tmp_path / "qwen3", more_tokens)
    assert trained(word, f"model.name_or_path={folder}") == 0
    assert recipes("chat", "grown", "--prompt", "a <new3>", "--max-new-tokens", "2")[0] == 0


def test_new_rows_are_saved_where_the_config_is_inside_another(
    trained, more_tokens, tmp_path
) -> None:
    folder = build_family("gemma3", tmp_path / "gemma3", more_tokens)
    assert trained(f"model.name_or_path={folder}") == 0
    saved = tensors_in(tmp_path / "runs/grown/adapter/adapter_model.safetensors")
    assert len(saved) == 2, saved


@pytest.mark.parametrize("word", ["lora.r=4", WHOLE, TOKENS])
def test_the_code_on_the_card_gives_the_runs_answers(
    word, trained, recipes, tmp_path, monkeypatch
) -> None:
    assert trained(word) == 0
    export = tmp_path / "give"
    assert recipes("export", "grown", "--to", export)[0] == 0
    expected = answers()
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)  # the base is ./more-tokens, as the card says
    names: dict[str, object] = {}
    torch.manual_seed(7)
    exec(code.replace("<this folder>", str(export)), names)
    model = names["model"]
    torch.testing.assert_close(logits_on(model.eval(), ROWS), expected, atol=1e-6, rtol=0)


def test_rows_that_stay_untrained_are_named_when_checked_and_when_trained(
    trained, recipes, tiny_recipe, more_tokens, capsys
) -> None:
    said = f"{NUM_NEW} new tokens have random rows that the adapter does not train"
    for words, is_said in ((["lora.r=4"], True), ([WHOLE], False), (["lora=null"], False)):
        assert trained(*words) == 0
        output = capsys.readouterr()
        assert (said in output.out + output.err) == is_said, words
        shutil.rmtree(open_run("grown").path)
    text = tiny_recipe.read_text().replace("dtype: float32", "resize_embeddings: true")
    model = re.search(r"name_or_path: ([^,]+)", text)
    assert model is not None
    tiny_recipe.write_text(text.replace(model[1], str(more_tokens)))
    code, _, err = recipes("check", tiny_recipe, "--full")
    assert code == 0 and said in err and "lora.modules_to_save: [embed_tokens, lm_head]" in err


def test_a_base_with_new_rows_is_the_same_in_every_process(tiny_recipe, more_tokens) -> None:
    from transformers import AutoTokenizer

    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.weights.load import load_model

    words = [f"model.name_or_path={more_tokens}", "model.resize_embeddings=true"]
    recipe = load_recipe(tiny_recipe, words)
    tokenizer = AutoTokenizer.from_pretrained(more_tokens)
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_model(recipe, tokenizer)
        rows.append(model.get_output_embeddings().weight[512:])
        assert torch.initial_seed() == seed
    assert torch.equal(*rows)


@pytest.mark.slow
def test_new_rows_of_a_4_bit_base_are_trained_and_merged(trained, recipes) -> None:
    half = ["model.dtype=bfloat16", "train.bf16=true"]
    assert trained(WHOLE, NF4, *half) == 0
    assert recipes("merge", "grown", "--dtype", "float32")[0] == 0
    assert recipes("chat", "grown", "--prompt", "a <new3>", "--max-new-tokens", "2")[0] == 0
