"""Proof that the weights on the disk are the weights that were trained: each trained tensor equals
the file byte for byte, and PEFT and transformers find every name of the file in an empty model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import file_hash, read_object
from recipes_lib.core.ranks import on_main_rank, rank
from recipes_lib.weights.load import attach

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
# The files that decide what a model computes and how it reads text.
RECORDED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
NUM_NAMED = 3


class SavedWeights(BaseModel):
    """What run.json says of the weights of a finished training (key `weights_check`).

    Args:
        tensors: how many trained tensors were compared with the files.
        sha256: of each file in the folder that decides what the model answers.
        base_fingerprint: of the base's files.
        autocast: half precision that the training ran in (`bfloat16`, `float16`), None for none.
    """

    tensors: int = 0
    sha256: dict[str, str] = {}
    base: str | None = None
    base_fingerprint: str | None = None
    autocast: str | None = None


def check_saved(
    model: Any, folder: Path, *, base: str, may_change_nothing: bool = False, **known: str | None
) -> SavedWeights:
    """Prove that `folder` holds the trained model; every rank has to call.

    Args:
        base: what `adapter_config.json` has to name.
        may_change_nothing: whether the training had no step with a learning rate above 0.
        known: other fields of the result.
    """
    count, is_zero, problems = _compare_bytes(model, folder)

    def prove() -> SavedWeights:
        wrong = problems or list(_name_problems(model, folder, base))
        if wrong:
            more = f" (and {len(wrong) - NUM_NAMED} more)" if len(wrong) > NUM_NAMED else ""
            what = "; ".join(wrong[:NUM_NAMED]) + more
            raise RecipesError(f"the saved weights are not the trained ones: {what}")
        if is_zero and not may_change_nothing:
            what = f"the adapter in {folder} changes nothing: every trained tensor is zero"
            hint = "was the learning rate 0 at every step? train more, or lower train.warmup_steps"
            raise RecipesError(what, hint)
        sha256 = recorded_hashes(folder)
        return SavedWeights(tensors=count, sha256=sha256, base=base, **known)

    return on_main_rank(prove)


def _compare_bytes(model: Any, folder: Path) -> tuple[int, bool, list[str]]:
    """Compare every trained tensor with the files; return how many there are, whether all of them
    are zero, and the problems. The other ranks wait in the gathering: no error may cut it short.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    count, is_zero = 0, True
    problems: list[str] = []
    files: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")) if rank() == 0 else ():
        try:
            opened = safe_open(file, framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} cannot be read: {error}")
    aliases: dict[int, set[str]] = defaultdict(set)  # a file needs one name of a tied parameter
    for name, parameter in _named(model):
        aliases[id(parameter)].add(name)
    saved_as_another = {
        name for names in aliases.values() if names & files.keys() for name in names - files.keys()
    }
    for name, tensor in trained_tensors(model):
        if tensor is None:
            continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
        elif name in files:
            if not same_bytes(tensor, files[name].get_tensor(name)):
                problems.append(f"{name} differs from the trained one")
        elif name not in saved_as_another:
            problems.append(f"{name} was not saved")
        count += 1
        is_zero &= "lora_A" in name or not bool(tensor.any())
    return count, is_zero, problems


def _name_problems(model: Any, folder: Path, base: str) -> Iterator[str]:
    """Load the files onto a model without weights, and yield the names that do not fit."""
    import torch
    from peft import PeftModel
    from torch.distributed.fsdp import FSDPModule

    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    is_sharded = isinstance(plain, FSDPModule)  # it puts a class of its own in front
    kind: Any = type(plain).__mro__[2] if is_sharded else type(plain)
    if plain is model:
        _, info = kind.from_pretrained(
            folder, device_map="meta", dtype="auto", output_loading_info=True
        )
        missing = {*info["missing_keys"], *map(str, info["mismatched_keys"])}
        trained = {name for name, weight in _named(model) if weight.requires_grad}
        yield from (f"{name} is missing in the file" for name in trained & missing)
        yield from (f"{name} in the file belongs to no layer" for name in info["unexpected_keys"])
        return
    recorded = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if recorded != base:
        yield f"the adapter names the base '{recorded}', but '{base}' was trained"
        return
    config = copy.deepcopy(plain.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        empty = kind(config)
    try:
        attach(empty, {"default": folder}, without_base_weights=True)
    except RecipesError as error:
        yield error.what


def trained_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield each trained tensor under its name in the file, whole, one at a time.

    Every rank has to call (FSDP2 gathers the shards); only rank 0 gets the tensors, and all of them
    at once where names in the file are not those of parameters (experts, some with images).
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from torch.distributed.tensor import DTensor
    from transformers.core_model_loading import revert_weight_conversion

    def whole(tensor: torch.Tensor) -> torch.Tensor | None:
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return gathered.detach().cpu() if rank() == 0 else None

    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, state_dict=state)
    else:
        trained = {name for name, weight in _named(model) if weight.requires_grad}
        state = {name: value for name, value in state.items() if name in trained}
        shapes = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in state.items()
        }
        if {*revert_weight_conversion(model, shapes)} != state.keys():
            names = {name for name, _ in _named(model, once=True)}
            gathered = {name: whole(state[name]) for name in state if name in names}
            if rank() == 0:
                yield from revert_weight_conversion(model, gathered).items()
            return
    for name, tensor in state.items():
        yield name, whole(tensor)


def _named(model: Any, once: bool = False) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter, tied ones by each of their names unless only `once`."""
    for name, parameter in model.named_parameters(remove_duplicate=once):
        yield name.replace("_orig_mod.", ""), parameter


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes; `torch.equal` alone
    takes float32 for bfloat16, -0.0 for 0.0, and a NaN for unequal to itself.
    """
    import torch

    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in (first, second))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in flat))


def recorded_hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of every file that decides what a model answers. That of an adapter's
    settings leaves out the base's name and revision: it may be moved, and has its own check.
    """
    if names is None:
        names = sorted({file.name for pattern in RECORDED for file in folder.glob(pattern)})
    hashes = {name: file_hash(folder / name) for name in names}
    if ADAPTER_CONFIG in hashes:
        settings = read_object(folder / ADAPTER_CONFIG)
        for key in ("base_model_name_or_path", "revision"):
            settings.pop(key, None)
        text = json.dumps(settings, sort_keys=True)
        hashes[ADAPTER_CONFIG] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Return which of the recorded files are not what they were, those that are gone first."""
    gone = [name for name in recorded if not (folder / name).is_file()]
    now = recorded_hashes(folder, recorded.keys() - gone)
    return gone + [name for name in recorded if name in now and recorded[name] != now[name]]
