"""The head that scores supervised positions on a CPU: TRL's numbers and TRL's gradients."""

import json
from pathlib import Path

import pytest
import torch
from tests.families import build_family
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from recipes_lib.train import main
from recipes_lib.training import sft
from recipes_lib.training.loss import TOKENS_PER_TILE, score_supervised_positions


def random_batch(rows: int = 3, tokens: int = 90) -> dict[str, torch.Tensor]:
    """Rows of unlike length, the first third of each without loss."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 512, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, tokens // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : tokens // 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("trained", ["adapters only", "every weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_gradients_and_counts_are_those_of_trls_head(tiny_model_dir, trained, dtype) -> None:
    found = []
    for ours in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
        model.get_output_embeddings().weight.requires_grad_(trained == "every weight")
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if ours:
            score_supervised_positions(model)
        outputs = model(**random_batch(), fused_lm_head=True)
        (-outputs.log_probs.sum() / 77).backward()
        grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        found.append((outputs, grads))
    (ours, our_grads), (trls, their_grads) = found
    exact = dtype == torch.float32
    assert int(ours.label_mask.sum()) == int(trls.label_mask.sum()) > TOKENS_PER_TILE
    assert not ours.log_probs._is_view()  # of a view FSDP2 warns on every rank
    for name in ("log_probs", "entropy", "is_top1"):
        first, second = (float(getattr(one, name).sum()) for one in (ours, trls))
        assert first == pytest.approx(second, rel=2e-6 if exact else 2e-3, abs=2), name
    total = [float(one.log_probs.detach().sum()) for one in (ours, trls)]
    assert total[0] == pytest.approx(total[1], rel=2e-6 if exact else 2e-5)
    assert our_grads.keys() == their_grads.keys()
    reference = gradients_in_float64(tiny_model_dir, dtype)
    largest = [
        max(
            float((gradient.double() - reference[name]).norm() / reference[name].norm())
            for name, gradient in grads.items()
        )
        for grads in (our_grads, their_grads)
    ]
    # a rounding more than TRL, because the scale of the loss comes after the products
    assert largest[0] < (1e-5 if exact else 1.1 * largest[1])


def gradients_in_float64(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the gradients of the same weights and loss, computed by autograd from all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).double()
    batch = random_batch()
    labels = batch.pop("labels")[:, 1:]
    log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    (-chosen[labels != -100].sum() / 77).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def test_a_batch_without_supervised_tokens_has_a_loss_and_gradients_of_zero(tiny_model_dir) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    add_fused_lm_head(model)
    score_supervised_positions(model)
    batch = random_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = -model(**batch, fused_lm_head=True).log_probs.sum()
    loss.backward()
    assert float(loss) == 0.0
    assert all(not one.grad.any() for one in model.parameters() if one.grad is not None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated")
def test_other_losses_are_trls(tiny_recipe, tiny_model_dir, tmp_path, monkeypatch) -> None:
    """Where the loss is not the plain one, the training is that of TRL's head."""
    experts = build_family("qwen3_moe", tmp_path / "experts", tiny_model_dir)
    losses = {
        "plain": [],
        "smoothed": ["train.label_smoothing_factor=0.2"],
        "dft": ["train.loss_type=dft"],
        "experts": [f"model.name_or_path={experts}", "train.router_aux_loss_coef=0.0"],
        "router": [f"model.name_or_path={experts}", "train.router_aux_loss_coef=0.5"],
    }
    short = ["train.max_steps=2", "train.eval_strategy='no'", "train.save_strategy='no'"]

    def series(run: str, words: list[str]) -> list[float]:
        assert main([str(tiny_recipe), *short, *words, f"run.name={run}"]) == 0
        lines = (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    ours = {name: series(name, words) for name, words in losses.items()}
    monkeypatch.setattr(sft, "score_supervised_positions", lambda model: None)
    trls = {name: series(f"trl-{name}", words) for name, words in losses.items()}
    assert ours == {name: pytest.approx(values, rel=1e-5) for name, values in trls.items()}
    assert len({values[0] for values in ours.values()}) == len(losses)
