"""What only a card can show of a training. Every test here waits for one."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes_lib.train import main
from recipes_lib.training import attention, metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_A_GPU = ["launch={accelerate: single_gpu}", "train.bf16=true", "model.dtype=bfloat16"]
LOSSES = ("loss", "eval_loss")


def losses(recipe, name: str, *words: str) -> list[float]:
    assert main([str(recipe), *ON_A_GPU, f"run.name={name}", *words]) == 0
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row[key] for row in rows for key in LOSSES if key in row]


def test_joined_rows_give_the_losses_of_padded_ones(tiny_recipe, capsys) -> None:
    padded = losses(tiny_recipe, "padded", "train.padding_free=false")
    capsys.readouterr()
    joined = losses(tiny_recipe, "joined")
    said = capsys.readouterr().out
    kernel = "varlen" if torch.cuda.get_device_capability() >= (8, 0) else "sdpa"
    assert f"attention {kernel}" in said
    assert joined == pytest.approx(padded, rel=2e-2)


def test_varlen_keeps_examples_apart_and_gives_the_logits_of_each_alone(tiny_model_dir) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).cuda()
    device = torch.device("cuda")
    if attention.why_no_flash("varlen", model, torch.bfloat16, device) is not None:
        pytest.skip("this card has no varlen")
    attention.use_varlen(model)
    assert not attention.examples_are_read_by_others(model)


def test_a_validation_keeps_the_random_state_of_its_card_and_warns_of_nothing() -> None:
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with metrics.keep_random_state(device):
            torch.rand(3, device=device)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_stopped_run_resumes_to_the_same_bytes(tiny_recipe, monkeypatch) -> None:
    from tests.training.test_train import adapter, stop_at

    words = [*ON_A_GPU, "lora.lora_dropout=0.3"]
    assert main([str(tiny_recipe), *words, "run.name=whole"]) == 0
    stop_at(monkeypatch, 5, tiny_recipe, *words)
    assert main([str(tiny_recipe), *words]) == 0
    assert adapter(tiny_recipe, "whole") == adapter(tiny_recipe)


def test_compiled_blocks_give_the_losses_of_plain_ones(tiny_recipe) -> None:
    plain = losses(tiny_recipe, "plain")
    assert losses(tiny_recipe, "compiled", "train.torch_compile=true") == pytest.approx(
        plain, rel=2e-2
    )
