"""The answering batch from free memory: given numbers of CUDA, this machine's memory, and an engine
that takes what it is told.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from recipes_lib.generation import transformers_engine
from recipes_lib.generation.transformers_engine import (
    LEAST_TOKENS,
    MOST_TOKENS,
    USUAL_TOKENS,
    free_bytes,
    token_bytes,
    tokens_for,
    tokens_per_batch,
)

GIB = 2**30


def model_of_7b(device: str, **changes):
    values = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
    }
    config = SimpleNamespace(**(values | changes))
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device(device))


@pytest.fixture
def card(monkeypatch):
    """A function that sets what CUDA says of its memory, in GiB: free, reserved by torch, and
    allocated of that.
    """

    def has(free: float, reserved: float = 15.0, allocated: float = 14.5) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(allocated * GIB))

    return has


def test_a_7b_model_on_an_80_gb_card_answers_in_batches_of_ninety_and_not_of_seven(card):
    card(free=63.0)
    tokens = tokens_for(model_of_7b("cuda:0"))
    assert tokens == tokens_per_batch(
        63.5 * GIB, token_bytes(2 * 32 * 1024, 4096, 14336, 2), on_gpu=True
    )
    assert 90 <= tokens // (60 + 1024) <= 120
    assert 8192 // (60 + 1024) == 7  # what it was


def test_a_fuller_card_gets_smaller_batches_and_never_none(card):
    card(free=63.0)
    roomy = tokens_for(model_of_7b("cuda:0"))
    card(free=6.0)
    assert LEAST_TOKENS < tokens_for(model_of_7b("cuda:0")) < roomy / 8
    card(free=0.0, reserved=0.0, allocated=0.0)
    assert tokens_for(model_of_7b("cuda:0")) == LEAST_TOKENS


def test_what_torch_holds_unused_is_free(card):
    card(free=1.0, reserved=9.0, allocated=4.0)
    assert free_bytes(torch.device("cuda:0")) == 6 * GIB


def test_a_processor_gets_no_more_than_the_usual_batch_and_less_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(transformers_engine, "available_gib", lambda: 64.0)
    assert tokens_for(model_of_7b("cpu")) == USUAL_TOKENS
    monkeypatch.setattr(transformers_engine, "available_gib", lambda: 2.0)
    assert LEAST_TOKENS < tokens_for(model_of_7b("cpu")) < USUAL_TOKENS


def test_a_model_of_another_kind_gets_the_usual_batch_and_a_tiny_one_a_bounded_one(card):
    card(free=63.0)
    assert tokens_for(model_of_7b("cuda:0", num_attention_heads=None)) == USUAL_TOKENS
    assert (
        tokens_for(model_of_7b("cuda:0", hidden_size=32, num_hidden_layers=1, intermediate_size=8))
        == MOST_TOKENS
    )
