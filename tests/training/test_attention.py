"""Rows that hold several examples end to end: each is as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from tests.families import build_family
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.training import attention

EXAMPLES = [
    {"input_ids": ids, "labels": ids}
    for ids in ([5, 6, 7, 8, 9], [10], [*range(20, 43)], [*range(50, 57)])
]


def joined_and_alone(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of one row of all examples, and of each in a row of its own."""
    batch = DataCollatorForLanguageModeling(0, padding_free=True)(EXAMPLES)
    batch.pop("labels")
    with torch.no_grad():
        joined = model(**batch, use_cache=False).logits[0]
        alone = [
            model(input_ids=torch.tensor([one["input_ids"]]), use_cache=False).logits[0]
            for one in EXAMPLES
        ]
    return joined, torch.cat(alone)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("by_document", [True, False], ids=["by document", "sdpa"])
def test_examples_in_one_row_are_kept_apart(family, by_document, tiny_model_dir, tmp_path) -> None:
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if by_document:
        assert attention.use_document_attention(model)
    joined, alone = joined_and_alone(model)
    assert torch.allclose(joined, alone, atol=2e-5), (joined - alone).abs().max()


def test_varlen_hands_bounds_window_and_scale_to_torchs_kernel(monkeypatch) -> None:
    """No GPU here: the kernel's arguments, checked against a stand-in."""
    seen = {}

    def kernel(query, key, value, first, second, longest, also, **options):
        seen.update(options, longest=longest, shapes=(query.shape, key.shape), dtype=query.dtype)
        return torch.zeros_like(query)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    query, key = torch.zeros(1, 4, 12, 8), torch.zeros(1, 2, 12, 8)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        options = {"scaling": 0.5, "sliding_window": 4, "cu_seq_lens_q": bounds, "max_length_q": 7}
        output, _ = attention.varlen_attention(torch.nn.Module(), query, key, key, None, **options)
    assert output.shape == (1, 12, 4, 8)
    expected = {"scale": 0.5, "window_size": (3, 0), "enable_gqa": True, "longest": 7}
    assert seen == {**expected, "shapes": ((12, 4, 8), (12, 2, 8)), "dtype": torch.bfloat16}
