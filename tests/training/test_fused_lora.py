"""Adapters computed in groups are PEFT's: the same losses and gradients where both drop the same
elements, over plain and NF4 bases, and the same trained adapter.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from recipes_lib.models.architectures import fp8_layers
from recipes_lib.models.fp8 import quantize_layers
from recipes_lib.training.fused_lora import DECISIONS, SHARED, fuse_lora, kept

IDS = torch.randint(120, (2, 17), generator=torch.Generator().manual_seed(0))
Measured = tuple[float, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **heads, **sizes))
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # else its norm enlarges rounding
    return model


@pytest.fixture
def adapted(base: Any) -> Callable[..., Any]:
    """A function that puts adapters on a copy of the base; `lora_B` is not zero."""

    def adapt(base: Any = base, **settings: Any) -> Any:
        torch.manual_seed(1)
        config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
        model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **config))
        return model.train()

    return adapt


@pytest.fixture(scope="module")
def nf4_base(base: Any) -> Any:
    """The base in 4 bits, quantized by bitsandbytes, the constants too."""
    model = copy.deepcopy(base).bfloat16()
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            quantized = bitsandbytes.nn.LinearNF4(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16
            )
            quantized.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4"
            )
            parent, _, last = name.rpartition(".")
            setattr(model.model.get_submodule(parent), last, quantized.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


class CountedDropout(torch.nn.Dropout):
    """PEFT's dropout, with the mask of the fused layers: one for all layers of a group."""

    def __init__(self, p: float, group: dict[Any, torch.Tensor]) -> None:
        super().__init__(p)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        if not self.group or self in self.group:  # the first layer of the group
            seed = torch.randint(2**62, (1,))
            self.group.clear()
        else:
            seed = next(iter(self.group.values()))
        self.group[self] = seed
        drop = round(self.p * DECISIONS)
        mask = kept(seed, x.shape[:-1].numel(), x.shape[-1], drop)
        return x * mask.view(x.shape) * (DECISIONS / (DECISIONS - drop))


def draw_the_same(model: Any) -> Any:
    """Let every dropout of a PEFT model draw as the fused layers do."""
    groups: dict[tuple[str, str], dict[Any, torch.Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(
            old := layer.lora_dropout["default"], torch.nn.Dropout
        ):
            parent, _, last = name.rpartition(".")
            first = next((names[0] for names in SHARED if last in names), last)
            group = groups.setdefault((parent, first), {})
            layer.lora_dropout["default"] = CountedDropout(old.p, group)
    return model


def measure(model: Any, half: torch.dtype | None = None) -> Measured:
    torch.manual_seed(2)
    with torch.autocast("cpu", half, enabled=half is not None):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: one.grad for name, one in named if one.grad is not None}


def distance(one: Measured, other: Measured) -> float:
    """How far apart gradients are, relative to the largest of their matrix."""
    assert one[1].keys() == other[1].keys()
    pairs = ((one[1][name].double(), other[1][name].double()) for name in one[1])
    return max(float((left - right).abs().max() / right.abs().max()) for left, right in pairs)


def rounding(one: Measured, exact: Measured) -> float:
    """How far apart all gradients are, as one vector, relative to its length."""
    left, right = (
        torch.cat([grad.flatten().double() for grad in each[1].values()]) for each in (one, exact)
    )
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_losses_and_gradients_are_pefts_where_both_drop_the_same(
    adapted: Callable[..., Any], dropout: float, recomputed: bool
) -> None:
    """Ranks and scales of the layers differ."""
    patterns = {"rank_pattern": {"k_proj": 7}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True}
    plain, fused = (adapted(lora_dropout=dropout, **patterns) for _ in range(2))
    assert fuse_lora(fused, None).line() == "lora: 14 layers fused in 8 groups"
    if recomputed:
        fused.gradient_checkpointing_enable({"use_reentrant": False})
        fused.enable_input_require_grads()
    expected, measured = measure(draw_the_same(plain)), measure(fused)
    assert measured[0] == pytest.approx(expected[0], rel=1e-6)
    assert distance(measured, expected) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["bf16", "NF4"])
def test_in_bf16_they_are_no_farther_from_float32_than_pefts(
    adapted: Callable[..., Any], base: Any, nf4_base: Any, kind: str, dropout: float
) -> None:
    """Every product is rounded to 8 bits; what matters is that none is rounded more often."""
    base = nf4_base if kind == "NF4" else copy.deepcopy(base).bfloat16()
    exact, plain, fused = (adapted(base, lora_dropout=dropout) for _ in range(3))
    for layer in [one for one in exact.modules() if isinstance(one, LoraLayer)]:
        weight = layer.get_base_layer().weight
        if kind == "NF4":
            weight = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        layer.base_layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
        layer.base_layer.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    expected = measure(draw_the_same(exact.float()))
    assert "14 layers fused" in fuse_lora(fused, torch.bfloat16).line()
    half = torch.bfloat16
    of_peft, measured = measure(draw_the_same(plain), half), measure(fused, half)
    assert measured[0] == pytest.approx(expected[0], rel=2e-3)
    assert rounding(measured, expected) < 1.1 * rounding(of_peft, expected) < 0.05
    assert {one.dtype for one in measured[1].values()} == {torch.float32}


def test_over_fp8_they_are_pefts(adapted: Callable[..., Any], base: Any) -> None:
    """In one layer of attention: through more, rounding moves inputs to the next FP8 number."""
    fp8 = copy.deepcopy(base).bfloat16()
    quantize_layers(fp8, fp8_layers(fp8))
    plain, fused = (adapted(fp8, lora_dropout=0.3).bfloat16() for _ in range(2))
    draw_the_same(plain)
    assert fuse_lora(fused, torch.bfloat16).line() == "lora: 14 layers fused in 8 groups"
    found: list[Measured] = []
    for model in (plain, fused):
        torch.manual_seed(2)
        x = torch.randn(2, 9, 64, dtype=torch.bfloat16, requires_grad=True)
        attention = model.base_model.model.model.layers[0].self_attn
        outputs = [getattr(attention, name)(x) for name in SHARED[0]]
        sum((one.float() ** 2).sum() for one in outputs).backward()
        gradients = {name: one.grad for name, one in attention.named_parameters() if "lora" in name}
        output = torch.cat([one.flatten() for one in outputs])
        parts = {"x": x.grad, "output": output.detach(), **gradients}
        found.append((0.0, {name: one for name, one in parts.items() if one is not None}))
    assert len(found[0][1]) == 8
    assert distance(found[1], found[0]) < 0.02  # a product in bf16 is within 0.4%, and sums of two


def test_a_layer_with_another_input_than_its_group_computes_alone(
    adapted: Callable[..., Any],
) -> None:
    """And one that nobody asks gets no gradient, as under PEFT."""
    plain, fused = adapted(), adapted()
    fuse_lora(fused, None)
    one, other = torch.randn(3, 64), torch.randn(3, 64)
    for model in (plain, fused):
        layer = model.base_model.model.model.layers[0].self_attn
        (layer.q_proj(one).sum() + (layer.k_proj(other) ** 2).sum()).backward()
    gradients = [
        {name: one.grad for name, one in model.named_parameters()} for model in (plain, fused)
    ]
    for name, expected in gradients[0].items():
        got = gradients[1][name]
        assert (got is None) is (expected is None), name
        if expected is not None:
            torch.testing.assert_close(got, expected)


def test_a_mask_is_that_of_philox_and_drops_its_share() -> None:
    """The first number for key and counter 0 is the known answer of Random123's own tests."""
    zero = torch.zeros(1, dtype=torch.long)
    halves = [0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73]
    for place, half in enumerate(halves):
        assert kept(zero, 1, 8, half)[0, place] and not kept(zero, 1, 8, half + 1)[0, place]
    mask, again = (kept(torch.tensor([seed]), 300, 203, 6554).float() for seed in (5, 2**61 + 5))
    assert mask.mean() == pytest.approx(0.9, abs=0.005)
    assert abs(torch.corrcoef(torch.stack([mask.flatten(), again.flatten()]))[0, 1]) < 0.02
    assert torch.equal(mask[:7, :9], kept(torch.tensor([5]), 7, 9, 6554).float())


@pytest.mark.parametrize(
    ("settings", "half", "line"),
    [
        ({"use_dora": True}, None, "lora: not fused; 14 as PEFT does: Dora"),
        ({"lora_bias": True, "bias": "none"}, None, "lora: not fused; 14 as PEFT does: a bias is"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            None,
            "lora: 2 layers fused in 2 groups; 1 as PEFT does: Embedding is no linear layer",
        ),
        (
            {"modules_to_save": ["lm_head"], "target_modules": ["up_proj"]},
            None,
            "lora: 2 layers fused in 2 groups",
        ),
    ],
)
def test_what_stays_pefts_is_said_with_the_reason_and_computes_as_before(
    adapted: Callable[..., Any], settings: dict[str, Any], half: Any, line: str
) -> None:
    plain, fused = adapted(**settings), adapted(**settings)
    assert fuse_lora(fused, half).line().startswith(line)
    assert distance(measure(fused), measure(plain)) < 1e-5


def test_a_block_casts_and_draws_once_for_all_its_groups_and_keeps_nothing(
    adapted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And casts again what an optimizer has changed since, whatever tells of it."""
    model = adapted(lora_dropout=0.3)
    fused, calls = fuse_lora(model, torch.bfloat16), Counter[str]()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "randint", counted("draws", torch.randint))
    monkeypatch.setattr(torch, "_foreach_copy_", counted("casts", torch._foreach_copy_))
    before = measure(model.bfloat16().float(), torch.bfloat16)[0]
    assert calls == {"draws": 2, "casts": 2}
    assert not [one for one in fused.groups if one.matrices or one.seed is not None]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)  # no version is counted up
    assert measure(model, torch.bfloat16)[0] != pytest.approx(before, rel=2e-3)


def test_two_precisions_are_left_to_peft(adapted: Callable[..., Any], base: Any) -> None:
    model = adapted(copy.deepcopy(base).bfloat16())
    why = "14 as PEFT does: the base computes in bfloat16, the adapter in float32"
    assert fuse_lora(model, None).line() == f"lora: not fused; {why}"


def test_after_the_training_every_layer_is_pefts_again(adapted: Callable[..., Any]) -> None:
    model = adapted(lora_dropout=0.5)
    before = measure(model.eval())
    fused = fuse_lora(model, None)
    with model.disable_adapter(), torch.no_grad():
        assert model(input_ids=IDS, labels=IDS).loss.item() != pytest.approx(before[0])
    fused.on_train_end(None, None, None)
    assert not [one for one in model.modules() if "forward" in vars(one)]
    assert not [one for one in model.modules() if one._forward_pre_hooks or one._forward_hooks]
    model.zero_grad()
    assert measure(model)[0] == before[0]


def trained(recipe: Path, name: str, *overrides: str) -> tuple[dict[str, Any], list[float], Any]:
    """Train; return run.json, the losses, and the adapter."""
    from recipes_lib.train import main

    assert main([str(recipe), f"run.name={name}", *overrides]) == 0
    run = recipe.parent / "runs" / name
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    return json.loads((run / "run.json").read_text()), losses, adapter


ALL = "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
FUSED = "model.lora_implementation=fused"


def test_a_training_with_dropout_is_pefts_where_both_drop_the_same(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, adapter, and the check of what was saved; run.json says what was fused."""
    from recipes_lib.training import build

    words = (ALL, "lora.lora_dropout=0.2", "train.eval_strategy='no'")
    state, losses, adapter = trained(tiny_recipe, "fused", FUSED, *words)
    line = "lora: 14 layers fused in 8 groups"
    assert state["lora_implementation"] == line and line in capsys.readouterr().out
    original = build.RecipeTrainer

    def trainer(**kwargs: Any) -> Any:
        made = original(**kwargs)
        draw_the_same(made.model)
        return made

    monkeypatch.setattr(build, "RecipeTrainer", trainer)
    plain, expected, its = trained(tiny_recipe, "plain", *words)
    assert "lora_implementation" not in plain
    assert losses == pytest.approx(expected, rel=1e-6)
    assert its.keys() == adapter.keys()
    assert max(float((its[name] - adapter[name]).abs().max()) for name in its) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_adapters_compile_without_a_break_and_recomputed_too(
    adapted: Callable[..., Any], nf4_base: Any, dropout: float, tmp_path: Path
) -> None:
    from recipes_lib.training.compiled import compile_blocks

    model = adapted(nf4_base, lora_dropout=dropout)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    fuse_lora(model, torch.bfloat16)
    plain = measure(model, torch.bfloat16)
    plain = plain[0], {name: one.clone() for name, one in plain[1].items()}
    report = compile_blocks(model, {"torch_compile_backend": "aot_eager"}, tmp_path)
    model.zero_grad()
    compiled = measure(model, torch.bfloat16)
    assert report.line().endswith("none of them broken")
    assert compiled[0] == plain[0] and distance(compiled, plain) == 0
