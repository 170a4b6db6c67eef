"""Who reads the weights of the base model.

Under FSDP2 each rank keeps a share of them: rank 0 reads alone, and accelerate hands its tensors to
the others, whose models have shapes and no weights until then (torch's meta device). Elsewhere, and
where `config.launch.why_each_rank_reads` has a reason, each rank reads, as each would in
transformers 5.24 in spite of `fsdp_cpu_ram_efficient_loading`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from recipes_lib.config.launch import (
    READS_ONCE_VARIABLE,
    Active,
    reads_once_is_asked,
    why_each_rank_reads,
)
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.ranks import meet, on_main_rank, rank, say_once
from recipes_lib.weights.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, active: Active
) -> PreTrainedModel:
    """Return the base model; under FSDP2 without weights on all ranks but the first, where they can
    be handed on. Every rank has to call, and waits until all have theirs.

    Raises:
        RecipesError: as `load_model`; what stops rank 0 stops all.
    """
    sharded = active.distributed_type == "FSDP"
    why = why_each_rank_reads(recipe, sharded, reads_once_is_asked(os.environ))
    if sharded:
        # the word that accelerate and transformers go by; transformers would fill what is empty
        os.environ[READS_ONCE_VARIABLE] = "false"
    if why is None:
        outcome: list[Any] = [None, None]
        try:
            outcome[0] = load_model(recipe, tokenizer, empty=rank() != 0)
        except Exception as error:
            outcome[1] = error
        on_main_rank(lambda: _raise(outcome[1]))  # the others would wait for what it does not send
        _raise(outcome[1])
        model = outcome[0]
        # accelerate 1.15 takes every entry of the state dict for a parameter
        loose = {name for name, _ in model.named_non_persistent_buffers()}
        kept = sorted(name for name, _ in model.named_buffers() if name not in loose)
        why = f"the model keeps buffers among its weights ({kept[0]})" if kept else None
    if why is None:
        _take_buffers(model)
        os.environ[READS_ONCE_VARIABLE] = "true"
    else:
        model = load_model(recipe, tokenizer, build_quantization_config(recipe))
    meet()
    if sharded:
        say_once(f"weights: {f'each rank reads them: {why}' if why else 'read by rank 0 alone'}")
    return model


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _take_buffers(model: PreTrainedModel) -> None:
    """Give every rank the buffers that rank 0 computed, such as RoPE's frequencies: neither a file
    nor the state dict has them.
    """
    own = dict(model.named_non_persistent_buffers())
    for name, value in on_main_rank(lambda: own).items():
        parent, _, local = name.rpartition(".")
        if rank() != 0:
            model.get_submodule(parent).register_buffer(local, value, persistent=False)
