"""Examples end to end in one row see only themselves, and give what they give alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.training.cpu import attention
from recipes_lib.training.cpu.attention import NAME, use_document_attention

ROWS = [[5, 9, 11, 7, 300], [8], [20, 21, 22, 23, 24, 25, 26]]


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def flattened() -> dict[str, torch.Tensor]:
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": row} for row in ROWS]
    )


def test_each_example_of_a_row_has_the_logits_and_gradients_it_has_alone(
    tiny_model_dir: Path,
) -> None:
    model, alone = load(tiny_model_dir), load(tiny_model_dir)
    use_document_attention(model)
    assert model.config._attn_implementation == NAME
    logits = model(**flattened(), use_cache=False).logits[0]
    expected = torch.cat([alone(torch.tensor([row])).logits[0] for row in ROWS])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for one in (logits, expected):
        one.square().mean().backward()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_it_computes_by_document_only_where_the_bounds_are_known(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = load(tiny_model_dir), load(tiny_model_dir)
    use_document_attention(model)
    calls = []
    original = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    batch = flattened()
    model(**batch, use_cache=False)
    assert len(calls) == 2 * len(ROWS)  # two layers
    calls.clear()
    positions_alone = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    assert len(calls) == 2
    reference = plain(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    assert torch.equal(positions_alone, reference)


def test_generation_with_padding_and_a_cache_is_unchanged(tiny_model_dir: Path) -> None:
    model, plain = load(tiny_model_dir), load(tiny_model_dir)
    use_document_attention(model)
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 9], [4, 8, 15, 16]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    written = [
        one.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for one in (model, plain)
    ]
    assert torch.equal(*written)


def test_models_with_other_layers_or_another_kernel_keep_theirs(tiny_model_dir: Path) -> None:
    mixed = load(tiny_model_dir)
    mixed.config.layer_types = ["full_attention", "linear_attention"]
    use_document_attention(mixed)
    eager = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager")
    use_document_attention(eager)
    assert (mixed.config._attn_implementation, eager.config._attn_implementation) == (
        "sdpa",
        "eager",
    )


def test_a_saved_model_does_not_ask_for_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_model_dir)
    use_document_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
