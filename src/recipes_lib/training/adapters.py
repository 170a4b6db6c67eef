"""An adapter folded into its base, and `merged/`, the whole model that `merging` makes of it.

A 4-bit base is loaded afresh and dequantised first. Afresh, because a forward pass on a CPU may
repack 4-bit weights in place, and dequantising the repacked ones gives noise without an error.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.json_files import read_object
from recipes_lib.core.terminal import shown_size
from recipes_lib.training.base_identity import (
    ADAPTER_WEIGHTS,
    changed_files,
    explain_peft_failure,
    weight_hashes,
)
from recipes_lib.training.trained import Family, TrainedRun, load_base
from recipes_lib.training.weights_check import reload

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "merge.json"
_SPARE = 1.2  # free space asked for, as a multiple of what is written


def merge_record(trained: TrainedRun) -> dict[str, Any] | None:
    """Return what is recorded of the run's `merged/`, or None where there is none."""
    file = trained.merged / RECORD
    return read_object(file, f"make it again: recipes merge {trained.run.name}") or None


def why_stale(
    trained: TrainedRun, record: dict[str, Any], dtype: str | None = None, contents: bool = False
) -> str | None:
    """Return why `merged/` is not what merging would give now, or None when it is.

    Args:
        trained: the run.
        record: what `merge_record` returned.
        dtype: the precision asked for; None for any.
        contents: whether to read the files and compare their hashes, not only their sizes.
    """
    if record["adapter_sha256"] != weight_hashes(trained.weights).get(ADAPTER_WEIGHTS):
        return "it was made from another adapter"
    if dtype is not None and record["dtype"] != dtype:
        return f"it is in {record['dtype']}, not in {dtype}"
    found = file_sizes(trained.merged)
    damaged = [name for name, size in record["files"].items() if found.get(name) != size]
    if damaged:
        return f"{damaged[0]} in it is missing or damaged"
    changed = changed_files(trained.merged, record["sha256"]) if contents else []
    return f"{changed[0]} in it was changed" if changed else None


def fold(trained: TrainedRun, family: Family, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Fold the adapter of the family's only run into its base, using up the family's model.

    Args:
        trained: the run.
        family: it, loaded; its model must not be used afterwards.
        dtype: precision of the result; None for that of the base in memory.

    Returns:
        A plain model, on the family's device.
    """
    wanted = dtype or family.model.dtype
    if trained.recipe.quantization is None:
        model = family.model
        family.model = None
    else:
        family.model = None
        free_memory()
        model = _on_plain_base(trained, family.tokenizer, wanted)
    if model.dtype.itemsize < wanted.itemsize:
        model = model.to(wanted)
    merged = with_transposed_layers(model.merge_and_unload(safe_merge=True))
    return merged if merged.dtype == wanted else merged.to(wanted)


def with_transposed_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Give a dequantised model the layers of its class: 4-bit ones become linear also where the
    class has them transposed (GPT-2).
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, layer in plain.named_modules():
        found = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(found, torch.nn.Linear):
            layer.weight, layer.bias = (
                torch.nn.Parameter(found.weight.data.T.contiguous()),
                found.bias,
            )
            model.set_submodule(name, layer)
    return model


def load_merged(
    folder: Path, trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> PreTrainedModel:
    """Load a merged model from its files alone."""
    recipe = trained.recipe
    section = dataclasses.replace(recipe.model, dtype=dtype, resize_embeddings=False)  # type: ignore[arg-type]
    return reload(
        folder,
        dataclasses.replace(recipe, model=section),
        full_finetuning=True,
        tokenizer=tokenizer,
    ).eval()


def unfolded_float32(trained: TrainedRun) -> Any:
    """Load the adapter on its base, dequantised where it is quantized, with all arithmetic in
    float32.
    """
    import torch
    from transformers import AutoTokenizer

    model = _on_plain_base(trained, AutoTokenizer.from_pretrained(trained.weights), torch.float32)
    return model.float().eval()


def free_memory() -> None:
    """Give memory of models that nobody refers to any more back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _on_plain_base(
    trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Any:
    """Return the adapter on a fresh copy of its base, which is dequantised to `dtype` where it is
    quantized.
    """
    from peft import PeftModel

    base: Any = load_base(trained.recipe, tokenizer)
    if trained.recipe.quantization is not None:
        states = [getattr(parameter, "quant_state", None) for parameter in base.parameters()]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states), (
            "repacked by a forward pass"
        )
        base = base.dequantize(dtype=dtype)
    try:
        return PeftModel.from_pretrained(base, str(trained.weights)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise explain_peft_failure(trained.weights, error) from error


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's weight files."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def check_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to write what will not fit.

    Args:
        needed: bytes.
        what: what is written, as the message names it.
        remedy: what else helps than to free some space.

    Raises:
        EnvironmentFault: too little is free for it and a fifth more.
    """
    free = shutil.disk_usage(folder).free
    if free < _SPARE * needed:
        raise EnvironmentFault(
            f"disk full: {what} needs {shown_size(needed)} (and 20% spare), {shown_size(free)} are"
            f" free in {folder}",
            f"free some space{remedy}; nothing was written",
        )
