"""The loss that is computed here instead of TRL's on a CPU: the same numbers, the same
gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from recipes_lib.training.loss import (
    TOKENS_PER_TILE,
    ScaledTokenLoss,
    add_token_loss,
    can_score_itself,
    supervised_places,
)
from recipes_lib.training.trainer import gather_trained_head


def random_batch(rows: int = 3, tokens: int = 90, vocabulary: int = 512) -> dict[str, torch.Tensor]:
    """Rows of unlike length, the first third of each without loss."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, tokens // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : tokens // 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained", ["adapters only", "every weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_gradients_and_counts_are_those_of_trls_head(
    tiny_model_dir: Path, trained: str, dtype: torch.dtype
) -> None:
    ours, trls = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype) for _ in range(2)
    )
    for model in (ours, trls):
        model.get_output_embeddings().weight.requires_grad_(trained == "every weight")
    add_token_loss(ours)
    add_fused_lm_head(trls, outputs=("log_probs", "is_top1"))
    batch = random_batch()
    scale = torch.tensor(1 / 77)
    outputs = trls(**batch, fused_lm_head=True)
    expected = -outputs.log_probs.sum() * scale
    places = supervised_places(batch["labels"])
    loss, correct = ours(**batch, supervised=places, loss_scale=float(scale))

    exact = dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(
        float(expected.detach()), rel=2e-6 if exact else 2e-5
    )
    assert len(places) == int(outputs.label_mask.sum()) > TOKENS_PER_TILE
    assert int(correct) == int(outputs.is_top1.sum())
    ours_by_name, trls_by_name = gradients(ours, loss), gradients(trls, expected)
    assert ours_by_name.keys() == trls_by_name.keys()
    for name, gradient in trls_by_name.items():
        error = (ours_by_name[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < (1e-5 if exact else 8e-3), name


def test_the_gradient_is_no_further_from_float64_than_trls() -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).bfloat16()
    weight = (torch.randn(2000, 64, generator=generator) * 0.1).bfloat16()
    targets = torch.randint(0, 2000, (300,), generator=generator)

    def error(kind: str) -> float:
        inputs = (hidden.double() if kind == "exact" else hidden.clone()).requires_grad_()
        if kind == "ours":
            loss = ScaledTokenLoss.apply(inputs, weight, None, targets, 1 / 300, True)[0]
        elif kind == "trl":
            loss = (
                -ChunkedLogProbFunction.apply(
                    inputs, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",)
                )[0].sum()
                / 300
            )
        else:
            loss = torch.nn.functional.cross_entropy(inputs @ weight.double().t(), targets)
        loss.backward()
        return (
            inputs.grad.double()
            if kind == "exact"
            else (inputs.grad.double() - exact).norm() / exact.norm()
        )

    exact = error("exact")
    assert error("ours") <= 1.05 * error("trl")


def test_a_batch_without_loss_gives_zero_and_gradients_of_zero(tiny_model_dir: Path) -> None:
    """A rank that has fewer pieces than another computes such a batch, and its backward pass has to
    meet the others'.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    add_token_loss(model)
    batch = random_batch()
    batch["labels"].fill_(-100)
    places = supervised_places(batch["labels"])
    loss, correct = model(**batch, supervised=places, loss_scale=1.0)
    assert (float(loss.detach()), len(places), int(correct)) == (0, 0, 0)
    assert all(float(gradient.abs().sum()) == 0 for gradient in gradients(model, loss).values())


def test_of_tokens_that_share_the_first_place_only_the_one_that_argmax_names_is_a_hit() -> None:
    """In bf16 2.5% of positions have such ties; TRL's kernels count as argmax does, and so must a
    CPU.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 16, generator=generator).bfloat16()
    weight = (
        torch.randn(40, 16, generator=generator).bfloat16().repeat(2, 1)
    )  # token t + 40 scores as token t does
    first = (hidden @ weight.t()).argmax(-1)
    for targets, hits in ((first, 500), (first + 40, 0)):
        _, correct = ScaledTokenLoss.apply(hidden, weight, None, targets, 1.0, False)
        assert int(correct) == hits


def test_a_bias_and_a_loss_scale_are_followed_by_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((5, 8), (11, 8), (11,))
    ]
    targets = torch.tensor([1, 10, 3, 3, 0])
    loss, _ = ScaledTokenLoss.apply(*parts, targets, 0.2, True)
    ours = torch.autograd.grad(loss * 1024, parts)
    reference = (
        torch.nn.functional.cross_entropy(torch.nn.functional.linear(*parts), targets) * 1024
    )
    assert float(loss.detach()) * 1024 == pytest.approx(float(reference.detach()), rel=1e-6)
    for mine, theirs in zip(ours, torch.autograd.grad(reference, parts), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_without_a_scale_the_forward_pass_is_the_models_own(tiny_model_dir: Path) -> None:
    plain, patched = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
        for _ in range(2)
    )
    add_token_loss(patched)
    batch = random_batch()
    assert torch.equal(plain(**batch).logits, patched(**batch).logits)


def test_a_head_that_caps_or_scales_its_logits_is_left_to_trl() -> None:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    assert can_score_itself(model)
    model.config.router_aux_loss_coef = 0.01  # the loss of the routers would be left out
    assert not can_score_itself(model)
    del model.config.router_aux_loss_coef
    model.config.final_logit_softcapping = 30.0
    assert not can_score_itself(model)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_trained_head_with_a_shard_group_of_its_own_is_gathered_before_the_loss_reads_it(
    tiny_model_dir: Path, trained: bool
) -> None:
    """Else its gradient is each rank's own: 0.995 of the right one away on two ranks; on one rank
    only the kind of tensor tells.
    """
    from peft import LoraConfig, get_peft_model

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        saved = ["lm_head"] if trained else None
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        model = get_peft_model(
            model,
            LoraConfig(
                r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM"
            ),
        )
        base = model.get_base_model()
        add_fused_lm_head(base)
        gather_trained_head(base)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*base.model.layers, [base.get_output_embeddings()], model):
            fully_shard(part, mesh=mesh)
        loss = -model(**random_batch(), fused_lm_head=True).log_probs.sum()
        assert isinstance(base.get_output_embeddings().weight, DTensor) is not trained
        loss.backward()
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert all(
            parameter.grad is not None
            for parameter in model.parameters()
            if parameter.requires_grad
        )
    finally:
        dist.destroy_process_group()
