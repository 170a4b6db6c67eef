"""The LM head of a training on a CPU: supervised positions alone, their gradient in the same pass.
TRL 1.16's head scores every position, makes the logits twice and multiplies back in float32.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from trl.trainer.utils import FusedCausalLMOutput

TOKENS_PER_TILE = 128  # measured: 32, 64, 256 and 1,000 are slower


class TokenLogProbs(torch.autograd.Function):
    """Log-probability, entropy and rank-one flag of N targets; hidden is (N, H), weight (V, H)."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, with_gradient: bool) -> Any:
        """Return the three, and keep the gradients of the first; logits exist tile by tile."""
        half = torch.is_autocast_enabled("cpu")
        weight_used = weight.to(torch.get_autocast_dtype("cpu") if half else weight.dtype)
        dtype = weight_used.dtype
        for_hidden, for_weight = (with_gradient and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        log_probs, entropy = torch.empty(len(hidden)), torch.empty(len(hidden))
        is_top1 = torch.zeros(len(hidden), dtype=torch.bool)
        for start in range(0, len(hidden), TOKENS_PER_TILE):
            tile = slice(start, start + TOKENS_PER_TILE)
            inputs, target = hidden[tile].to(dtype), targets[tile, None]
            logits = inputs @ weight_used.t()
            shifted = logits.float().sub_(logits.amax(-1, keepdim=True).float())
            at_target = shifted.gather(1, target)[:, 0]
            largest = at_target >= 0  # half precision has ties, of which argmax names the first
            is_top1[tile][largest] = shifted[largest].argmax(-1) == target[largest, 0]
            exponentials = shifted.exp()
            total = exponentials.sum(-1)
            log_probs[tile] = at_target - total.log()
            entropy[tile] = total.log() - torch.linalg.vecdot(exponentials, shifted) / total
            if for_hidden or for_weight:
                gradient = exponentials.div_(-total[:, None])  # of the log-probability
                gradient = gradient.scatter_add_(1, target, torch.ones(target.shape)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[tile] = gradient @ weight_used
            if grad_weight is not None:
                grad_weight += gradient.t() @ inputs
        ctx.gradients = grad_hidden, grad_weight
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, each: Any, *_: Any) -> Any:
        """Scale the gradients; the weight's by one number, as `nll` weighs all tokens of a step."""
        hidden, weight = ctx.gradients
        hidden = None if hidden is None else hidden * each[:, None]
        weight = None if weight is None else weight * each[:1].sum()  # no tokens: 0
        return hidden, weight, None, None


def score_supervised_positions(model: Any) -> None:
    """Replace what TRL's head computes, where the head of a causal language model is a matrix."""
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        mask, weight = labels != -100, self.get_output_embeddings().weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        tokens, grad = hidden[:, :-1][mask], torch.is_grad_enabled()
        log_p, entropy, top1 = TokenLogProbs.apply(tokens, whole, labels[mask], grad)
        return FusedCausalLMOutput(label_mask=mask, log_probs=log_p, entropy=entropy, is_top1=top1)

    model.forward = types.MethodType(forward, model)
