"""What a plan says of a model that answers, held to the engine that does: the batch it takes from
the same free memory, and the keys and values it keeps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, family_config

from recipes_lib.config.launch import plan_launch
from recipes_lib.engine import Decoding, Request
from recipes_lib.generation import transformers_engine
from recipes_lib.generation.targets import stand_in_recipe
from recipes_lib.generation.transformers_engine import (
    LEAST_TOKENS,
    USUAL_TOKENS,
    TransformersEngine,
    kept_per_token,
    token_bytes_of,
    tokens_for,
)
from recipes_lib.models.shapes import shape_of_config
from recipes_lib.planning.cards import Card, card_named
from recipes_lib.planning.settings import Adapter, Settings, adapter_of, settings_of
from recipes_lib.suites.answer_costs import LoadedModel, answer_batches, loss_batches
from recipes_lib.suites.heldout_loss import _batches

GIB = 2**30
END = 96  # a token that no tiny model chooses here
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": None,
}


class Tokenizer:
    """As much of one as the engine asks for."""

    eos_token_id, pad_token_id, chat_template = END, 0, None

    def decode(self, tokens: Any, **_: Any) -> str:
        return " ".join(map(str, tokens))


def settings_on(config: Any, dtype: str, device: str, lora: dict[str, Any] | None) -> Settings:
    recipe = stand_in_recipe("tiny/tiny", dtype=dtype)
    shape = shape_of_config(config.to_dict(), "tiny/tiny")
    on_cpu = device == "cpu"
    launch = plan_launch(recipe.launch, "cpu" if on_cpu else "single_gpu", 1, None)
    settings = settings_of(recipe, launch, shape, on_cpu=on_cpu)
    adapter: Adapter | None = adapter_of(lora, shape) if lora else None
    return Settings(**{**vars_of(settings), "adapter": adapter})


def vars_of(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def planned(
    config: Any, card: Card, dtype: str = "bfloat16", lora: Any = None, half: str | None = None
) -> LoadedModel:
    device = "cpu" if card.name == "cpu" else "gpu"
    return LoadedModel(settings_on(config, dtype, device, lora), card, half)


def tiny_engine(layers: int = 2, family: str = "llama", **changes: Any) -> TransformersEngine:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, "num_hidden_layers": layers, **changes})
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    model.generation_config.eos_token_id = END
    return TransformersEngine(model, Tokenizer(), "tiny")  # type: ignore[arg-type]


def asked(lengths: list[int]) -> list[Request]:
    return [Request(key=str(n), ids=(5,) * size, seed=n) for n, size in enumerate(lengths)]


# ---- Batches ----


@pytest.mark.parametrize(
    "mib", [1, 6, 12, 4096], ids=["the least", "some", "more", "a processor's most"]
)
def test_a_plan_takes_the_batch_that_the_engine_takes_from_the_same_memory(
    mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_engine, "available_gib", lambda: mib / 1024)
    engine = tiny_engine()
    weights = planned(engine.model.config, Card("cpu", "", 9.0, 1, 1, 1)).weights_gib
    assert weights * GIB == sum(one.numel() * 2 for one in engine.model.parameters())
    card = Card("cpu", "", mib / 1024 + weights + 0.8, 1, 1, 1)  # beside the weights and Python
    model = planned(engine.model.config, card)
    assert model.free_bytes == pytest.approx(mib * 2**20)
    budget = model.batch_tokens(None)
    assert budget == pytest.approx(engine.batch_tokens, abs=1)
    assert {1: budget == LEAST_TOKENS, 4096: budget == USUAL_TOKENS}.get(mib, True)
    assert mib not in (6, 12) or LEAST_TOKENS < budget < USUAL_TOKENS
    taken: list[tuple[int, int]] = []

    def generate(batch: Any, decoding: Decoding) -> list[Any]:
        taken.append((len(batch), len(batch[0].ids)))
        return []

    monkeypatch.setattr(engine, "_generate", generate)
    lengths = [17 * n % 400 + 3 for n in range(300)]
    list(engine.complete(asked(lengths), Decoding(max_new_tokens=100)))
    context = engine.model.config.max_position_embeddings
    batches = list(answer_batches(lengths, [100] * 300, 100, engine.batch_tokens, context))
    assert [(one.rows, one.width) for one in batches] == taken
    assert len(taken) > 1 and {one.steps for one in batches} == {100}


def test_a_gpus_batch_is_that_of_the_engine_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card = card_named("a100-40gb")
    config = tiny_engine(num_key_value_heads=4).model.config
    model = planned(config, card)
    from types import SimpleNamespace

    free = int(model.free_bytes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    loaded = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda:0"))
    assert model.batch_tokens(None) == tokens_for(loaded)
    assert model.batch_tokens(777) == 777


def test_prompts_that_the_context_does_not_hold_are_left_out_and_answers_end_with_it() -> None:
    batches = list(answer_batches([10, 90, 100, 300], [50] * 4, 50, 4096, context=100))
    assert [(one.rows, one.width, one.steps) for one in batches] == [(2, 90, 10)]


def test_rows_whose_loss_is_found_make_the_passes_of_the_suite() -> None:
    lengths = [31 * n % 700 + 5 for n in range(90)]
    order = sorted(range(90), key=lambda row: -lengths[row])
    real = [
        (len(rows), lengths[rows[0]])
        for rows in _batches(order, [[0] * size for size in lengths], 2048)
    ]
    assert [(one.rows, one.width) for one in loss_batches(lengths, 2048)] == real


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "gpt2", "phi3", "gemma4_text", "mixtral", "qwen3_moe", "deepseek_v3"],
)
def test_the_width_that_is_kept_of_a_token_is_that_of_the_models_own_cache(family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = family_config(family)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) / 3
    shape = shape_of_config(config.to_dict(), family)
    assert kept_per_token(shape) == kept
    assert (token_bytes_of(shape, 2) or 0) > 2 * kept


def test_every_family_with_attention_has_a_batch() -> None:
    without = set()
    for family in FAMILIES:
        shape = shape_of_config(family_config(family).to_dict(), family)
        if token_bytes_of(shape, 2) is None:
            without.add(family)
    assert without == {"mamba", "mamba2"}
