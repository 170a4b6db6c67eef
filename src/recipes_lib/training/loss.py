"""The LM head of a training on a CPU: supervised positions alone, their gradient in the same pass.
TRL 1.16's head scores every position, makes the logits twice and multiplies back in float32.
"""

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
        dtype = weight.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        weight_used = weight.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = None
        if with_gradient and needs_hidden:
            grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if with_gradient and needs_weight:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        log_probs = torch.empty(len(hidden))
        entropy = torch.empty(len(hidden))
        is_top1 = torch.zeros(len(hidden), dtype=torch.bool)
        for start in range(0, len(hidden), TOKENS_PER_TILE):
            tile = slice(start, start + TOKENS_PER_TILE)
            inputs = hidden[tile].to(dtype)
            target = targets[tile, None]
            logits = inputs @ weight_used.t()
            # less the largest one, so that no exponential overflows
            shifted = logits.float().sub_(logits.amax(-1, keepdim=True).float())
            at_target = shifted.gather(1, target)[:, 0]
            largest = at_target >= 0  # half precision has ties, of which argmax names the first
            is_top1[tile][largest] = shifted[largest].argmax(-1) == target[largest, 0]
            exponentials = shifted.exp()
            total = exponentials.sum(-1)
            log_probs[tile] = at_target - total.log()
            # H = -sum p log p = log(total) - sum p * shifted
            entropy[tile] = total.log() - torch.linalg.vecdot(exponentials, shifted) / total
            if grad_hidden is not None or grad_weight is not None:
                # of the log-probability with respect to the logits: one at the target, less p
                gradient = exponentials.div_(-total[:, None])
                gradient = gradient.scatter_add_(1, target, torch.ones(target.shape)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[tile] = gradient @ weight_used
            if grad_weight is not None:
                grad_weight += gradient.t() @ inputs
        ctx.grad_hidden = grad_hidden
        ctx.grad_weight = grad_weight
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Any, *_: Any) -> Any:
        """Scale the gradients; the weight's by one number, as `nll` weighs all tokens of a step."""
        grad_hidden = ctx.grad_hidden
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_log_probs[:, None]
        grad_weight = ctx.grad_weight
        if grad_weight is not None:
            scale = grad_log_probs[:1].sum()  # 0 without tokens
            grad_weight = grad_weight * scale
        return grad_hidden, grad_weight, None, None


def score_supervised_positions(model: Any) -> None:
    """Replace what TRL's head computes, where the head of a causal language model is a matrix."""
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        mask = labels != -100
        weight = self.get_output_embeddings().weight
        if isinstance(weight, DTensor):  # a shard of FSDP2
            weight = weight.full_tensor()
        log_probs, entropy, is_top1 = TokenLogProbs.apply(
            hidden[:, :-1][mask], weight, labels[mask], torch.is_grad_enabled()
        )
        return FusedCausalLMOutput(
            label_mask=mask, log_probs=log_probs, entropy=entropy, is_top1=is_top1
        )

    model.forward = types.MethodType(forward, model)
