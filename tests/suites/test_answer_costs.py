"""What a plan says of a model that answers, held to the engine that does: the batch it takes from
the same free memory, the keys and values it keeps, and the kernels of a step.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES, family_config
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

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
from recipes_lib.planning.duration import LAUNCH_S
from recipes_lib.planning.settings import Adapter, Settings, adapter_of, settings_of
from recipes_lib.suites.answer_costs import LoadedModel, answer_batches

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


# ---- Steps ----


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU: all but views and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result, schema = function(*args, **(kwargs or {})), function._schema
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if not schema.returns:
            made = [args[place] for place, one in enumerate(schema.arguments) if one.alias_info]
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        known = {one.untyped_storage().data_ptr() for one in given}
        view = any(one.alias_info and not one.alias_info.is_write for one in schema.returns)
        view = view and bool(made) and made[0].untyped_storage().data_ptr() in known
        name = schema.name.rpartition("::")[2]
        if made and not view and not name.startswith(("empty", "new_empty")):
            self.counted[name] += 1
        return result

    def attention(self, query: Any, key: Any, value: Any, attn_mask: Any = None, **kw: Any) -> Any:
        """As CUDA has it: one kernel, to which a mask comes as numbers."""
        if attn_mask is not None:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                ~attn_mask, -float("inf")
            )
        with _disable_current_modes():
            result = _SDPA(query, key, value, attn_mask=attn_mask, **kw)
        self.counted["attention"] += 1
        return result


_SDPA = torch.nn.functional.scaled_dot_product_attention


def counted_step(
    layers: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    lora: tuple[str, ...] = (),
    bf16_adapter: bool = False,
    half: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> int:
    """Return the launches of one step of the engine: an answer of twelve tokens less one of
    eleven.
    """
    found = []
    for tokens in (11, 12):
        engine = tiny_engine(layers, family)
        engine.model.to(dtype)
        if lora:
            from peft import LoraConfig, get_peft_model

            tuned = get_peft_model(engine.model, LoraConfig(r=4, target_modules=list(lora))).eval()
            for name, one in tuned.named_parameters():
                if "lora_" in name:
                    one.data = one.data.to(torch.bfloat16 if bf16_adapter else torch.float32)
        if half:
            engine._using = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        launches = Launches()
        with monkeypatch.context() as patched, launches:
            patched.setattr(torch.nn.functional, "scaled_dot_product_attention", launches.attention)
            decoding = Decoding(max_new_tokens=tokens, temperature=temperature, top_p=top_p)
            answers = list(engine.complete(asked([8, 9, 10]), decoding))
        assert {one.finish_reason for one in answers} == {"length"}
        found.append(launches.counted.total())
    return found[1] - found[0]


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"half": True},
        {"lora": ("q_proj", "v_proj")},
        {"lora": ("q_proj", "v_proj"), "half": True},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "half": True},
        {"dtype": torch.float32, "lora": ("q_proj",)},
        {"dtype": torch.float32, "lora": ("q_proj",), "half": True},
        {"family": "qwen3"},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.9},
    ],
    ids=lambda case: ", ".join(case) or "plain",
)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_launches_the_kernels_that_a_plan_counts(
    layers: int, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_engine(layers, case.get("family", "llama")).model.config
    lora = {"r": 4, "target_modules": list(case["lora"])} if case.get("lora") else None
    dtype = str(case.get("dtype", torch.bfloat16)).removeprefix("torch.")
    half = "bfloat16" if case.get("half") else None
    model = planned(config, card_named("h100"), dtype, lora, half)
    sampled, nucleus = case.get("temperature", 0) > 0, case.get("top_p", 1) < 1
    assert model.launched(3, sampled, nucleus) == counted_step(layers, monkeypatch, **case)


def test_an_adapter_in_the_bases_precision_launches_no_casts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of a 4-bit base is, which no processor here loads."""
    with_one, without = (
        counted_step(1, monkeypatch, half=True, **case)
        for case in ({"lora": ("q_proj",), "bf16_adapter": True}, {})
    )
    config = tiny_engine(1).model.config
    settings = settings_on(config, "bfloat16", "gpu", {"r": 4, "target_modules": ["q_proj"]})
    quantized = Settings(**{**vars_of(settings), "bits": 4})
    model = LoadedModel(quantized, card_named("h100"), "bfloat16")
    assert with_one - without == model._of_adapted == 4


# ---- Seconds ----


def test_a_step_takes_its_launches_or_its_bytes_whichever_is_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from recipes_lib.models.known import known_facts

    facts = known_facts()["meta-llama/Llama-2-7b-hf"].config
    shape = shape_of_config(facts, "llama")
    recipe = stand_in_recipe("meta-llama/Llama-2-7b-hf")
    launch = plan_launch(recipe.launch, "single_gpu", 1, None)
    model = LoadedModel(settings_of(recipe, launch, shape, on_cpu=False), card_named("h100"))
    assert model.kernels == 43 * 32 + 59
    assert model.step_s(1, 64) == model.kernels * LAUNCH_S
    weights = shape.parameters * 2 - shape.vocabulary * shape.hidden * 2
    kept = 2 * 32 * 4096 * 2  # bytes of a token's keys and values
    rate = 3350e9 * 0.9
    assert model.step_s(100, 1000) == pytest.approx((weights + 100 * 1000 * kept) / rate, rel=1e-3)
    assert model.bound(model.step_s(1, 64), model.kernels) == "its launches"
    assert "memory" in model.bound(model.step_s(100, 1000), model.kernels)
    assert model.step_s(200, 64, sampled=True) >= (model.kernels + 205) * LAUNCH_S
    # 14 operations for each billion of parameters: a prompt of 8,192 tokens at 742 TFLOP/s
    assert model.reading_s(8, 1024) == pytest.approx(8192 * 2 * 6.74e9 / 742e12, rel=0.05)
