"""torch's variable-length attention is handed what keeps the examples of a row apart, and is chosen
only for models and machines that it computes.

The kernel itself runs on GPUs alone. Here a few lines of float32 stand for it that read the same
arguments; that the installed torch takes these is asked of torch, with tensors that have no data.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import build_family
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.config.recipe import load_recipe
from recipes_lib.config.upstream import build_sft_config
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.models.architectures import why_not_varlen
from recipes_lib.planning.plan import Plan
from recipes_lib.train import main
from recipes_lib.training import loss, varlen
from recipes_lib.training.build import (
    attention_is_kept,
    choose_attention,
    padding_costs_nothing_to_drop,
)
from recipes_lib.training.cpu import attention as cpu_attention
from recipes_lib.training.stopping import StopRequest
from recipes_lib.training.trainer import RecipeTrainer

GENERATOR = torch.Generator().manual_seed(3)
ROWS = [
    torch.randint(3, 500, (length,), generator=GENERATOR).tolist() for length in (41, 1, 70, 33)
]
COMPUTED = ["llama", "qwen3", "gemma3_text", "olmo3", "smollm3", "ministral3", "phi3", "qwen3_moe"]


DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waits(TorchDispatchMode):
    """Notes the operators whose result a processor has to read before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        masks = [
            one
            for one in (args[1] if func.overloadpacket in INDEXING else ())
            if one is not None and one.dtype in (torch.bool, torch.uint8)
        ]
        looks = DEPENDENT & {*func.tags} and func.overloadpacket not in INDEXING
        if masks or looks:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
INDEXING |= {torch.ops.aten._unsafe_index, torch.ops.aten._index_put_impl_}


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, with a mask over all pairs of tokens."""
    assert torch.equal(bounds, key_bounds) and bounds.dtype == torch.int32
    assert longest == longest_key == int(bounds.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    example = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff().long())
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
    seen = (example[:, None] == example[None]) & (-distance <= right)
    if left >= 0:
        seen &= distance <= left
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhc,khc->hqk", query.float(), key.float()) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khc->qhc", weights, value.float()).to(query.dtype)


@pytest.mark.parametrize("family", COMPUTED)
def test_each_example_of_a_row_has_the_logits_that_it_has_alone(
    family: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    model, alone = (
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        for _ in range(2)
    )
    assert why_not_varlen(model) is None
    monkeypatch.setattr(varlen, "varlen_attn", masked_attention)
    varlen.use_varlen(model)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": row} for row in ROWS]
    )
    logits = model(**batch, use_cache=False).logits[0]
    expected = torch.cat([alone(torch.tensor([row]), use_cache=False).logits[0] for row in ROWS])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", "takes the place of sdpa, which GptOssForCausalLM does not have"),
        ("mamba2", "takes the place of sdpa"),
        ("qwen3_5_text", "layers that carry a state from one example of a row into the next"),
        ("lfm2", "layers that carry a state"),
        ("llama4_text", "does not compute chunked_attention"),
        ("deepseek_v3", "has keys and values of one size, DeepseekV3ForCausalLM has two"),
    ],
)
def test_models_that_the_kernel_does_not_compute_are_told_so(
    family: str, reason: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert reason in (why_not_varlen(model) or "")


def test_what_a_config_says_of_attention_is_looked_at(tiny_model_dir: Path) -> None:
    def why(**settings: Any) -> str | None:
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model_dir, attn_implementation="sdpa", **settings
        )
        return why_not_varlen(model)

    assert why() is None
    assert "no dropout" in (why(attention_dropout=0.1) or "")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="sdpa")
    model.config.attn_pdrop = 0.1  # GPT-2's name, and its default
    assert "no dropout" in (why_not_varlen(model) or "")
    del model.config.attn_pdrop
    model.config.attn_logit_softcapping = 50.0
    assert "no cap on scores" in (why_not_varlen(model) or "")
    del model.config.attn_logit_softcapping
    model.config.head_dim = 320
    assert "up to 256 channels" in (why_not_varlen(model) or "")


def test_the_installed_torch_takes_the_arguments_and_goes_back_through_them() -> None:
    with FakeTensorMode():
        query = torch.empty(1, 8, 90, 64, dtype=torch.float32, requires_grad=True)
        key, value = (
            torch.empty(1, 2, 90, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
        )
        bounds = torch.empty(4, dtype=torch.int32)
        out, _ = varlen.varlen_attention(
            torch.nn.Module(),
            query,
            key,
            value,
            None,
            scaling=0.125,
            sliding_window=32,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=41,
            max_length_k=41,
        )
        assert out.shape == (1, 90, 8, 64) and out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert query.grad.shape == query.shape and query.grad.dtype == torch.float32


def test_a_window_without_bounds_is_an_error_and_not_attention_over_everything() -> None:
    rows = [torch.zeros(1, 2, 9, 8) for _ in range(3)]
    with pytest.raises(ValueError, match="needs the bounds of the examples"):
        varlen.varlen_attention(torch.nn.Module(), *rows, None, scaling=1.0, sliding_window=4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_kernel_that_fails_or_computes_something_else_is_found_before_the_training(
    family: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        build_family(family, tmp_path / family, tiny_model_dir), attn_implementation="sdpa"
    )

    def tried(kernel: Any) -> str | None:
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        return varlen.why_it_fails(model, torch.bfloat16, torch.device("cpu"))

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution")

    def forgets_windows(*args: Any, **kwargs: Any) -> Any:
        return masked_attention(*args, **kwargs | {"window_size": (-1, 0)})

    def sees_other_examples(q: Any, k: Any, v: Any, bounds: Any, *args: Any, **kwargs: Any) -> Any:
        one = bounds[[0, -1]]
        return masked_attention(q, k, v, one, one, len(q), len(q), **kwargs)

    def has_twice_the_gradient(*args: Any, **kwargs: Any) -> Any:
        out = masked_attention(*args, **kwargs)
        return 2 * out - out.detach()

    assert tried(masked_attention) is None
    assert tried(fails) == "fails on this machine: no kernel image is available"
    for wrong in (forgets_windows, sees_other_examples, has_twice_the_gradient):
        assert "computes something else than sdpa" in (tried(wrong) or ""), wrong


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "why_not_here", lambda half: None)
    monkeypatch.setattr(varlen, "why_it_fails", lambda model, half, device: None)


def chosen(recipe_file: Path, folder: Path, *overrides: str) -> tuple[str, bool]:
    """Return the attention that a training on a GPU would take, and whether padding goes."""
    recipe = load_recipe(recipe_file, list(overrides))
    built = build_sft_config(recipe, "unused", world_size=1)
    args = types.SimpleNamespace(
        device=torch.device("cuda"),
        packing=built.packing,
        packing_strategy=built.packing_strategy,
        padding_free=built.padding_free,
        per_device_train_batch_size=built.per_device_train_batch_size,
        gradient_accumulation_steps=built.gradient_accumulation_steps,
    )
    loaded = recipe.model.attn_implementation
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa" if loaded == "varlen" else loaded
    )
    choose_attention(recipe, args, model, torch.bfloat16)  # type: ignore[arg-type]
    name = model.config._attn_implementation
    return name, padding_costs_nothing_to_drop(recipe, args, model, name)  # type: ignore[arg-type]


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("varlen", True)),
        (["model.attn_implementation=varlen"], ("varlen", True)),
        (["model.attn_implementation=sdpa"], ("sdpa", False)),
        (["model.attn_implementation=eager"], ("eager", False)),
        (["train.padding_free=false"], ("sdpa", False)),
        # rows of several micro-batches share a pass
        (["train.per_device_train_batch_size=1"], ("varlen", True)),
        (["train.per_device_train_batch_size=1", "run.global_batch_size=1"], ("sdpa", False)),
        (
            ["train.per_device_train_batch_size=1", "model.attn_implementation=varlen"],
            ("varlen", True),
        ),
        (["train.packing=true"], ("varlen", False)),  # packed rows have no padding to drop
        (["train.packing=true", "train.packing_strategy=wrapped"], ("sdpa", False)),
    ],
)
def test_a_gpu_takes_it_by_itself_where_rows_hold_several_examples(
    overrides: list[str], expected: tuple[str, bool], tiny_recipe: Path, tiny_model_dir: Path
) -> None:
    assert chosen(tiny_recipe, tiny_model_dir, *overrides) == expected


def test_selective_checkpointing_keeps_what_the_kernel_returned() -> None:
    kept = torch.ops.torch_attn._varlen_attn.default
    assert attention_is_kept(None, kept) == CheckpointPolicy.MUST_SAVE
    assert attention_is_kept(None, torch.ops.aten.mm.default) != CheckpointPolicy.MUST_SAVE


def test_what_was_asked_for_and_cannot_be_had_is_refused_and_not_replaced(
    tiny_recipe: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(RecipeError, match="varlen needs a GPU of the Ampere generation or newer"):
        chosen(tiny_recipe, tiny_model_dir, "model.attn_implementation=varlen")
    assert chosen(tiny_recipe, tiny_model_dir) == ("sdpa", False)  # not asked for


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process take the attention and the head of a GPU, with a few lines in place
    of the two kernels.
    """

    def by_bounds(*args: Any, **options: Any) -> torch.Tensor:
        query, key, value, bounds = args[:4]
        assert type(args[5]) is int and options["window_size"] == (-1, 0)
        example = torch.bucketize(torch.arange(len(query)), bounds, right=True)
        seen = (example[:, None] == example[None]).tril()
        rows = (one.transpose(0, 1)[None] for one in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            *rows, seen, scale=options["scale"], enable_gqa=options["enable_gqa"]
        )
        return out[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", by_bounds)
    monkeypatch.setattr(cpu_attention, "use_document_attention", varlen.use_varlen)
    monkeypatch.setattr(loss, "gradient_is_made_at_once", lambda device: False)


def test_nothing_inside_a_micro_batch_waits_for_the_gpu(
    as_on_a_gpu: None, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, in a whole training."""
    train, waits, losses = RecipeTrainer.training_step, [], []

    def watched(self: RecipeTrainer, *args: Any) -> torch.Tensor:
        with Waits() as here:
            losses.append(train(self, *args))
        waits.append(here.found)
        return losses[-1]

    monkeypatch.setattr(RecipeTrainer, "training_step", watched)
    words = ["train.max_steps=2", "train.eval_strategy='no'", "train.save_strategy='no'"]
    assert main([str(tiny_recipe), *words]) == 0
    assert waits == [[]] * 4 and all(float(one) > 0 for one in losses)


def test_passes_are_filled_as_the_free_memory_allows_and_a_resumed_run_keeps_to_them(
    as_on_a_gpu: None,
    tiny_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said, recorded, and with the same losses as micro-batches."""
    compute, passes = RecipeTrainer.compute_loss, [0]

    def counted(self: RecipeTrainer, *args: Any, **options: Any) -> Any:
        passes[-1] += 1
        return compute(self, *args, **options)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", counted)
    words = [str(tiny_recipe), "train.eval_strategy='no'", "train.max_steps=4"]
    words += ["train.per_device_train_batch_size=1", "train.save_steps=2"]
    losses, state = {}, {}
    for name, cap, again in (("plain", None, None), ("filled", 500, 90)):
        monkeypatch.setattr(Plan, "tokens_per_pass", cap)
        run = tiny_recipe.parent / "runs" / name
        passes.append(0)
        if again:
            with monkeypatch.context() as stopping:
                asked = iter([0, 2])  # at the end of each step
                stopping.setattr(
                    StopRequest, "_asked_by_file", lambda self, asked=asked: next(asked)
                )
                assert main([*words, f"run.name={name}"]) == ExitCode.INTERRUPTED
            monkeypatch.setattr(Plan, "tokens_per_pass", again)
        assert main([*words, f"run.name={name}"]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
        state[name] = json.loads((run / "run.json").read_text())
    assert losses["filled"] == pytest.approx(losses["plain"], rel=1e-6)
    assert passes[1] == 4 * 8 and passes[2] < 4 * 4
    assert "tokens_per_pass" not in state["plain"] and state["filled"]["tokens_per_pass"] == 500
    said = "up to 500 tokens a pass (what the GPU has room for)"
    assert capsys.readouterr().out.count(said) == 2
