"""The loss of a micro-batch, scored where a label counts. Which places these are comes with the
batch: a device asked for them would have to be waited for, forward and backward.

On a GPU the scores are those of TRL's Triton kernels. On a CPU TRL computes the logits twice and
multiplies the gradient back in float32; here the gradient is made in the same pass.

The numbers are the same: the negative log-likelihood of the same tokens, in the same precision
(logits in the compute type, softmax in float32, the gradient of the logits in the compute type).
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from recipes_lib.models.architectures import has_plain_head

TOKENS_PER_TILE = (
    128  # measured: 32, 64, 256 and 1,000 are slower; a tile of logits should stay in the cache
)
VOCABULARY_PER_TILE = 32768  # of TRL's kernels, as its own head has it


class ScaledTokenLoss(torch.autograd.Function):
    """`scale * sum(-log p(target))` of `hidden @ weight.T`; the gradient is made beside the loss,
    tile by tile of tokens, whose logits exist one tile at a time.

    Shapes: N supervised tokens, H hidden, V vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (N, H)
        weight: torch.Tensor,  # (V, H)
        bias: torch.Tensor | None,  # (V,)
        targets: torch.Tensor,  # (N,)
        scale: float,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the number of tokens ranked first."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        weight_used = weight.to(dtype)
        needs = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=weight.device)
        grad_weight = zeros(weight.shape) if needs[1] else None
        grad_bias = zeros(weight.shape[:1]) if needs[2] else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        for rows in range(0, len(hidden), TOKENS_PER_TILE):
            tile = slice(rows, rows + TOKENS_PER_TILE)
            inputs, target = hidden[tile].to(dtype), targets[tile, None]
            logits = (
                torch.mm(inputs, weight_used.t())
                if bias is None
                else torch.addmm(bias.to(dtype), inputs, weight_used.t())
            )
            largest = logits.amax(-1, keepdim=True).float()
            at_target = logits.gather(1, target).float()
            exponentials = logits.float().sub_(largest).exp_()
            total = exponentials.sum(-1, keepdim=True)
            loss += (largest + total.log() - at_target).sum(dtype=torch.float64)
            first = (at_target >= largest)[
                :, 0
            ]  # half precision has ties, of which argmax names the first
            correct += (logits[first].argmax(-1) == target[first, 0]).sum()
            if not any(needs):
                continue
            gradient = exponentials.mul_(scale / total)
            gradient.scatter_add_(1, target, torch.full_like(at_target, -scale))
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden[tile] = torch.mm(gradient, weight_used)
            if grad_weight is not None:
                grad_weight += torch.mm(gradient.t(), inputs)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        return (loss * scale).float(), correct

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the forward pass, times what the loss was multiplied by since (1, or an
        fp16 loss scale).
        """
        gradients = [
            None
            if gradient is None
            else (gradient if upstream[0] == 1 else gradient * upstream[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = ()
        return (*gradients, None, None, None)


def can_score_itself(model: Any) -> bool:
    """Whether `add_token_loss` knows the model's loss: a plain head, and no router loss to add."""
    return (
        has_plain_head(model)
        and getattr(model.config.get_text_config(), "router_aux_loss_coef", None) is None
    )


def supervised_places(labels: torch.Tensor) -> torch.Tensor:
    """Return the places whose next token counts, in rows laid end to end.

    A GPU would be waited for here, because only it knows how many they are: to be called before a
    batch moves there.

    Args:
        labels: (examples, tokens), -100 where a token does not count.

    Example:
        >>> supervised_places(torch.tensor([[-100, 7, 8], [-100, -100, 9]]))
        tensor([0, 1, 4])
    """
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != -100
    return counted.flatten().nonzero().flatten()


def add_token_loss(model: Any) -> None:
    """Let `model(..., labels=labels, supervised=places, loss_scale=scale)` return scale times the
    sum of the negative log-likelihoods, and how many of the tokens the model ranks first.

    To be called on the causal language model inside a PEFT wrapper, before it is wrapped for
    several processes. The scale is a number, because FSDP2 rounds tensors that enter a module to
    its compute type.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: Any,
        *args: Any,
        loss_scale: float | None = None,
        supervised: Any = None,
        **kwargs: Any,
    ) -> Any:
        if loss_scale is None:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        weight, bias = (_whole(head.weight), None if head.bias is None else _whole(head.bias))
        chosen = hidden.flatten(0, 1).index_select(0, supervised)
        targets = labels.flatten().index_select(0, supervised + 1)
        if gradient_is_made_at_once(hidden.device):
            loss, correct = ScaledTokenLoss.apply(
                chosen, weight, bias, targets, loss_scale, torch.is_grad_enabled()
            )
        else:
            from trl.kernels import ChunkedLogProbFunction  # benchmarks run without TRL

            log_probs, *_, is_top1 = ChunkedLogProbFunction.apply(
                chosen, weight, bias, targets, 1.0, VOCABULARY_PER_TILE, None, 1.0, ("is_top1",)
            )
            loss, correct = -log_probs.sum() * loss_scale, is_top1.sum()
        return loss, correct

    model.forward = types.MethodType(forward, model)


def gradient_is_made_at_once(device: torch.device) -> bool:
    """Whether `ScaledTokenLoss` is the faster one: where Triton does not run."""
    return device.type == "cpu"


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
