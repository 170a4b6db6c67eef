"""Who reads the weights of the base model.

Under FSDP2 each rank keeps a share of them, so rank 0 reads alone and accelerate hands its tensors
to the others while it shards. Until then the model of every other rank has shapes and no weights
(torch's meta device). Elsewhere, and where `config.launch.why_each_rank_reads` has a reason, each
rank reads, as it would in transformers 5.24 in spite of `fsdp_cpu_ram_efficient_loading`.
"""

from __future__ import annotations

import functools
import os
import zlib
from typing import TYPE_CHECKING, Any

from recipes_lib.config.launch import (
    READS_ONCE_VARIABLE,
    Active,
    reads_once_is_asked,
    why_each_rank_reads,
)
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.ranks import (
    agree_on_largest,
    meet,
    of_every_rank,
    on_main_rank,
    rank,
    say_once,
)
from recipes_lib.weights.base import load_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, active: Active
) -> PreTrainedModel:
    """Return the base model; under FSDP2 without weights on all ranks but the first, where they can
    be handed on. Every rank has to call, and waits until all have theirs, however slow a file
    server is.

    Raises:
        RecipesError: as `load_model`; what stops rank 0 stops all.
    """
    sharded = active.distributed_type == "FSDP"
    why = why_each_rank_reads(recipe, sharded, reads_once_is_asked(os.environ))
    if sharded:
        # the word that accelerate and transformers go by; transformers would fill what is empty
        os.environ[READS_ONCE_VARIABLE] = "false"
    if why is None:
        model = _read_once(recipe, tokenizer)
        why = _why_not_handed_on(model)
    if why is not None:
        model = load_model(recipe, tokenizer, build_quantization_config(recipe))
    meet()
    if why is None:
        _take_buffers(model)
        os.environ[READS_ONCE_VARIABLE] = "true"
    if sharded:
        say_once(f"weights: {f'each rank reads them: {why}' if why else 'read by rank 0 alone'}")
    return model


def _read_once(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """What stops rank 0 stops all: the others would wait for ever for what it does not send."""
    model: Any = None
    failure: Exception | None = None
    try:
        model = load_model(recipe, tokenizer, empty=rank() != 0)
    except Exception as error:
        failure = error

    def pass_on() -> None:
        if failure is not None:
            raise failure

    on_main_rank(pass_on)
    pass_on()
    return model


def _why_not_handed_on(model: PreTrainedModel) -> str | None:
    """accelerate 1.15 takes every entry of the state dict for a parameter."""
    loose = {name for name, _ in model.named_non_persistent_buffers()}
    kept = sorted(name for name, _ in model.named_buffers() if name not in loose)
    return f"the model keeps buffers among its weights ({kept[0]})" if kept else None


def _take_buffers(model: PreTrainedModel) -> None:
    """Give every rank the buffers that rank 0 computed, such as RoPE's frequencies: neither a file
    nor the state dict has them.
    """
    own = dict(model.named_non_persistent_buffers())
    for name, value in on_main_rank(lambda: own).items():
        parent, _, local = name.rpartition(".")
        if rank() != 0:
            model.get_submodule(parent).register_buffer(local, value, persistent=False)


def prepare_to_share(model: torch.nn.Module) -> None:
    """Let accelerate share a model out from rank 0, and check that it is everywhere the same: ranks
    that hand on other tensors wait for ever. Every rank has to call.

    accelerate puts shards into the optimizer by the address of what they were made of, and tensors
    without memory all have address 0: every rank but the first would train one parameter only.

    Raises:
        EnvironmentFault: the ranks have unlike models.
    """
    if not reads_once_is_asked(os.environ):
        return
    named = list(model.named_parameters())
    tensors = [(name, *one.shape, one.dtype) for name, one in model.state_dict().items()]
    mark = zlib.crc32(repr((tensors, [(name, one.requires_grad) for name, one in named])).encode())
    mark >>= 1  # they agree on 31 bits
    if agree_on_largest(mark) != -agree_on_largest(-mark):
        raise of_every_rank(
            EnvironmentFault(
                "the model is not the same on all ranks: names, shapes or precisions differ",
                "give every machine the same model files and library versions, or set"
                " fsdp_cpu_ram_efficient_loading: false in the accelerate config",
            )
        )
    for number, (_, one) in enumerate(named, 1):
        if one.is_meta:
            setattr(one, "data_ptr", functools.partial(int, -number))  # noqa: B010
