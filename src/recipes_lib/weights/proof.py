"""The proof that what lies on the disk is what was trained: every tensor byte for byte, and every
name in the files.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import read_object
from recipes_lib.core.ranks import on_main_rank, rank
from recipes_lib.weights.load import attach
from recipes_lib.weights.runs import ADAPTER_CONFIG, recorded_hashes

if TYPE_CHECKING:
    import torch


def check_saved(
    model: Any, folder: Path, *, base: str, may_change_nothing: bool = False, **recorded: str | None
) -> dict[str, Any]:
    """Prove that `folder` holds the trained model, and that its adapter names `base`; return what
    run.json says of the weights. Every rank has to call. An adapter `may_change_nothing` where no
    step had a learning rate above 0.
    """
    import torch
    from safetensors import safe_open

    files: dict[str, Any] = {}  # rank 0: the open file of each tensor
    if rank() == 0:
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
    aliases: dict[int, set[str]] = defaultdict(set)  # a file needs one name of a tied parameter
    for name, parameter in _named(model):
        aliases[id(parameter)].add(name)
    saved_as_another: set[str] = set()
    for names in aliases.values():
        if not names.isdisjoint(files):
            saved_as_another |= names - files.keys()

    problems: list[str] = []
    num_tensors = 0
    is_zero = True  # all are, but lora_A, which PEFT fills at random
    # the other ranks wait in the gathering: no error may cut it short
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
        num_tensors += 1
        if "lora_A" not in name and tensor.any():
            is_zero = False

    def prove() -> dict[str, Any]:
        wrong = problems or list(_name_problems(model, folder, base))
        if wrong:
            what = f"{wrong[0]} ({len(wrong)} in all)"
            raise RecipesError(f"the saved weights are not the trained ones: {what}")
        if is_zero and not may_change_nothing:
            what = f"the adapter in {folder} changes nothing: every trained tensor is zero"
            hint = "was the learning rate 0 at every step? train more, or lower train.warmup_steps"
            raise RecipesError(what, hint)
        hashes = recorded_hashes(folder)
        return {"tensors": num_tensors, "sha256": hashes, "base": base, **recorded}

    return on_main_rank(prove)


def _name_problems(model: Any, folder: Path, base: str) -> Iterator[str]:
    """Load the files onto a model without weights, and yield the names that do not fit."""
    import torch
    from peft import PeftModel
    from torch.distributed.fsdp import FSDPModule

    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    kind: Any = type(plain)
    if isinstance(plain, FSDPModule):  # FSDP2 puts a class of its own in front
        kind = kind.__mro__[2]
    if plain is model:
        _, info = kind.from_pretrained(
            folder, device_map="meta", dtype="auto", use_kernels=False, output_loading_info=True
        )
        missing = set(info["missing_keys"]) | set(map(str, info["mismatched_keys"]))
        for name in sorted(_trained_names(model) & missing):
            yield f"{name} is missing in the file"
        for name in info["unexpected_keys"]:
            yield f"{name} in the file belongs to no layer"
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
    if model.active_peft_config.trainable_token_indices:
        # peft 0.21 moves a copy of their rows beside loaded embeddings, and cannot without memory
        for layer in (empty.get_input_embeddings(), empty.get_output_embeddings()):
            layer.to_empty(device="cpu")
    try:
        attach(empty, {"default": folder}, without_base_weights=True)
    except RecipesError as error:
        yield error.what


def trained_tensors(model: Any) -> "Iterator[tuple[str, torch.Tensor | None]]":
    """Yield each trained tensor under its name in the file, whole, one at a time.

    Every rank has to call (FSDP2 gathers the shards); only rank 0 gets the tensors, and all of them
    at once where names in the file are not those of parameters (experts, some with images).
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from torch.distributed.tensor import DTensor
    from transformers.core_model_loading import revert_weight_conversion

    def whole(tensor: "torch.Tensor") -> "torch.Tensor | None":
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.detach().cpu() if rank() == 0 else None

    # torch.compile puts _orig_mod into the names
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    if isinstance(model, PeftModel):
        with_rows = bool(getattr(model, "rows_added", 0)) or "auto"
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=with_rows)
    else:
        trained = _trained_names(model)
        state = {name: value for name, value in state.items() if name in trained}
        empty = {}
        for name, value in state.items():
            empty[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        if revert_weight_conversion(model, empty).keys() != state.keys():
            names = {name for name, _ in _named(model, once=True)}
            gathered = {name: whole(state[name]) for name in state if name in names}
            if rank() == 0:
                yield from revert_weight_conversion(model, gathered).items()
            return
    for name, tensor in state.items():
        yield name, whole(tensor)


def _trained_names(model: Any) -> set[str]:
    return {name for name, parameter in _named(model) if parameter.requires_grad}


def _named(model: Any, once: bool = False) -> "Iterator[tuple[str, torch.nn.Parameter]]":
    """Yield every parameter, tied ones by each of their names unless only `once`."""
    for name, parameter in model.named_parameters(remove_duplicate=once):
        yield name.replace("_orig_mod.", ""), parameter


def same_bytes(first: "torch.Tensor", second: "torch.Tensor") -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes."""
    import torch

    # torch.equal alone takes float32 for bfloat16, -0.0 for 0.0, and a NaN for unequal to itself
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in (first, second)]
    return torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))
