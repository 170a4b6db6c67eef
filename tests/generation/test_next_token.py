"""Next-token logits: what prompts share is computed once, and changes no verdict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from recipes_lib.generation.judges import NextToken, common_prefix


@pytest.fixture(scope="module")
def model(long_tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(long_tiny_model_dir, dtype=torch.float32).eval()


def rows_of(shared: int, lengths: list[int]) -> list[list[int]]:
    start = torch.Generator().manual_seed(1)
    head = torch.randint(10, 500, (shared,), generator=start).tolist()
    return [
        [*head, *torch.randint(10, 500, (length,), generator=start).tolist()] for length in lengths
    ]


def test_logits_after_a_shared_start_are_those_of_the_whole_prompt(model):
    rows = rows_of(40, [3, 17, 9])
    reader = NextToken(model, 0)
    reader.share(rows)
    assert len(reader._shared) == 40
    found = reader.logits(rows)
    with torch.inference_mode():
        alone = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert torch.allclose(found, alone, atol=1e-4)


def test_a_kept_start_serves_the_next_rows_and_a_shorter_or_other_one_replaces_it(model):
    rows = rows_of(64, [5, 6])
    reader = NextToken(model, 0)
    reader.share(rows)
    kept = reader._cache
    reader.share([[*rows[0], 11], [*rows[1], 12]])
    assert reader._cache is kept
    other = [[*rows[0][:50], 7, 8], [*rows[0][:50], 9]]
    reader.share(other)
    assert len(reader._shared) == 50
    with torch.inference_mode():
        alone = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in other])
    assert torch.allclose(reader.logits(other), alone, atol=1e-4)


@pytest.mark.parametrize(
    "rows", [rows_of(40, [5]), rows_of(8, [5, 9])], ids=["one row", "little in common"]
)
def test_where_nothing_is_saved_nothing_is_shared(model, rows):
    reader = NextToken(model, 0)
    reader.share(rows)
    assert reader._shared == ()
    with torch.inference_mode():
        alone = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert torch.allclose(reader.logits(rows), alone, atol=1e-4)


def test_a_head_that_scales_its_logits_is_the_models_own():
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = GraniteForCausalLM(
        GraniteConfig(**sizes, num_key_value_heads=2, logits_scaling=8.0)
    ).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([[3, 5, 7]])).logits[:, -1]
    assert torch.allclose(NextToken(model, 0).logits([[3, 5, 7]]), expected, atol=1e-6)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_common_start_is_common_and_leaves_a_token(rows):
    length = common_prefix(rows)
    assert all(row[:length] == rows[0][:length] and len(row) > length for row in rows)
    assert any(len(row) == length + 1 or row[length] != rows[0][length] for row in rows)
