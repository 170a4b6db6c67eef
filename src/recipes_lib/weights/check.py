"""Proof that the weights on the disk are the weights that were trained: each trained tensor equals
the file byte for byte, and PEFT and transformers find every name of the file in a model without
weights. No second copy of the base is loaded, and nothing is compared within a tolerance.

The hashes of the files go into run.json, and whoever reads weights compares with them
(`changed_files`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import DamagedFile, file_hashes, read_object
from recipes_lib.core.ranks import on_main_rank, rank

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# The files that decide what a model computes and how it reads text.
RECORDED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    ADAPTER_CONFIG,
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
NUM_NAMED = 3


@dataclass(frozen=True)
class SavedWeights:
    """What run.json says of the weights of a finished training (key `weights_check`).

    Args:
        tensors: how many trained tensors were compared with the files.
        parameters: how many numbers they hold.
        sha256: of each file in the folder that decides what the model answers.
        base: name of the base, and base_fingerprint: of its files (`load.base_fingerprint`).
        autocast: half precision that the training ran in (`bfloat16`, `float16`), None for none.
    """

    tensors: int = 0
    parameters: int = 0
    sha256: dict[str, str] = field(default_factory=dict)
    base: str | None = None
    base_fingerprint: str | None = None
    autocast: str | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> SavedWeights:
        """Read them from the content of run.json; of a run without them, all is empty."""
        recorded = state.get("weights_check") or {}
        return cls(**{name: recorded[name] for name in cls.__annotations__ if name in recorded})

    def to_dict(self) -> dict[str, Any]:
        """Return them for run.json."""
        return asdict(self)


def check_saved(
    model: Any,
    folder: Path,
    *,
    base: str,
    base_fingerprint: str | None = None,
    autocast: str | None = None,
    may_change_nothing: bool = False,
) -> SavedWeights:
    """Prove that `folder` holds what was trained; every rank has to call.

    Args:
        model: the trained model (`trainer.model`), sharded by FSDP2 or not.
        folder: where `trainer.save_model` wrote it.
        base: what `adapter_config.json` has to name.
        base_fingerprint, autocast: see `SavedWeights`; only kept.
        may_change_nothing: whether the training had no step with a learning rate above 0.

    Raises:
        RecipesError: a tensor is not in the file, differs from it, is not finite, or training
            changed nothing; a name in the file is not one that PEFT or transformers reads.
    """
    comparison = _compare_bytes(model, folder)

    def prove() -> SavedWeights:
        problems = comparison.problems or [*_name_problems(model, folder, base)]
        if problems:
            more = f" (and {len(problems) - NUM_NAMED} more)" if len(problems) > NUM_NAMED else ""
            raise RecipesError(
                f"the saved weights are not the trained ones: {'; '.join(problems[:NUM_NAMED])}"
                + more
            )
        if not (comparison.changes_something or may_change_nothing):
            raise RecipesError(
                f"the adapter in {folder} changes nothing: every trained tensor is zero",
                "was the learning rate 0 at every step? train more steps, or lower"
                " train.warmup_steps",
            )
        return SavedWeights(
            tensors=comparison.tensors,
            parameters=comparison.parameters,
            sha256=recorded_hashes(folder),
            base=base,
            base_fingerprint=base_fingerprint,
            autocast=autocast,
        )

    return on_main_rank(prove)


def trained_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield each trained tensor under its name in the file, whole, one at a time.

    Every rank has to call (FSDP2 gathers the shards); only rank 0 gets the tensors. Where one name
    in the file stands for several parameters or the other way round (experts, some families that
    read images), rank 0 holds all of them at once.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from transformers.core_model_loading import revert_weight_conversion

    state = {name.replace("_orig_mod.", ""): one for name, one in model.state_dict().items()}
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, state_dict=state)
        for name, tensor in state.items():
            yield name, _whole(tensor)
        return
    trained = {name for name, one in _parameters(model) if one.requires_grad}
    state = {name: one for name, one in state.items() if name in trained}
    shapes = {name: _meta_like(one) for name, one in state.items()}
    if set(revert_weight_conversion(model, shapes)) == set(state):
        for name, tensor in state.items():
            yield name, _whole(tensor)
        return
    once = {name.replace("_orig_mod.", "") for name, _ in model.named_parameters()}
    gathered = {name: _whole(one) for name, one in state.items() if name in once}
    if rank() == 0:
        yield from revert_weight_conversion(model, gathered).items()


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes.

    `torch.equal` is no proof: it calls float32 and bfloat16 equal, and -0.0 and 0.0, and a NaN
    unequal to itself.
    """
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def recorded_hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of the weights and of every other file that decides what a model answers.

    That of an adapter's settings leaves out the base's name and revision: a base may be moved, and
    has a check of its own.
    """
    if names is None:
        names = sorted({file.name for pattern in RECORDED for file in folder.glob(pattern)})
    found = file_hashes(folder, names)
    if ADAPTER_CONFIG in found:
        settings = adapter_config(folder)
        for key in ("base_model_name_or_path", "revision"):
            settings.pop(key, None)
        text = json.dumps(settings, sort_keys=True)
        found[ADAPTER_CONFIG] = hashlib.sha256(text.encode()).hexdigest()
    return found


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Return which of the recorded files are not what they were, those that are gone first."""
    gone = [name for name in recorded if not (folder / name).is_file()]
    found = recorded_hashes(folder, [name for name in recorded if name not in gone])
    return gone + [name for name, sha256 in found.items() if recorded[name] != sha256]


def adapter_config(adapter: Path) -> dict[str, Any]:
    """Return the settings of an adapter.

    Raises:
        DamagedFile: they are not readable, or name no base.
    """
    settings = read_object(adapter / ADAPTER_CONFIG)
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise DamagedFile("does not name its base model", file=adapter / ADAPTER_CONFIG)
    return settings


@dataclass
class _Comparison:
    """What the comparison of bytes found on rank 0."""

    tensors: int = 0
    parameters: int = 0
    changes_something: bool = False
    problems: list[str] = field(default_factory=list)


def _compare_bytes(model: Any, folder: Path) -> _Comparison:
    """Compare every trained tensor with the files. An error on rank 0 is kept until all tensors
    are gathered: the other ranks wait in the gathering.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    found, absent = _Comparison(), list[str]()
    files: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")) if rank() == 0 else ():
        try:
            opened = safe_open(file, framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
        except (SafetensorError, OSError) as error:
            found.problems.append(f"{file.name} cannot be read: {error}")
    for name, tensor in trained_tensors(model):
        if tensor is None:
            continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            found.problems.append(f"{name} has values that are not finite")
        elif name not in files:
            absent.append(name)
        else:
            saved = files[name].get_tensor(name)
            if not same_bytes(tensor, saved):
                what = f"{name} differs ({tensor.dtype} trained, {saved.dtype} saved)"
                found.problems.append(what.replace("torch.", ""))
        found.tensors, found.parameters = found.tensors + 1, found.parameters + tensor.numel()
        found.changes_something |= "lora_A" not in name and bool(tensor.any())
    aliases = _tied_names(model)
    lost = [name for name in absent if not files.keys() & aliases.get(name, set())]
    found.problems += [f"{name} was not saved" for name in lost]
    return found


def _name_problems(model: Any, folder: Path, base: str) -> Iterator[str]:
    """Load the files onto a model without weights, and yield the names that do not fit."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        recorded = adapter_config(folder)["base_model_name_or_path"]
        if recorded != base:
            yield f"the adapter names the base '{recorded}', but '{base}' was trained"
            return
        missing, unexpected = _load_adapter_names(model.get_base_model(), folder)
    else:
        _, info = _model_class(model).from_pretrained(
            folder, device_map="meta", dtype="auto", output_loading_info=True
        )
        trained = {name for name, one in _parameters(model) if one.requires_grad}
        missing = sorted(trained & {*info["missing_keys"], *map(str, info["mismatched_keys"])})
        unexpected = sorted(info["unexpected_keys"])
    yield from (f"{name} is missing in the file" for name in missing)
    yield from (f"{name} in the file is of no layer of the model" for name in unexpected)


def _load_adapter_names(base: Any, folder: Path) -> tuple[list[str], list[str]]:
    """Return the missing and unexpected names of an adapter, of which PEFT itself only warns."""
    import torch
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    config = copy.deepcopy(base.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        empty = _model_class(base)(config)
    wrapped = get_peft_model(empty, PeftConfig.from_pretrained(folder), low_cpu_mem_usage=True)
    own = {name for name, _ in wrapped.named_parameters() if ".default" in name}
    tensors = load_peft_weights(str(folder), device="cpu")
    try:
        found = set_peft_model_state_dict(wrapped, tensors, low_cpu_mem_usage=True)
    except RuntimeError as error:  # a tensor of another shape
        raise RecipesError(f"{folder} does not load on its base: {error}") from error
    return sorted(own & set(found.missing_keys)), sorted(found.unexpected_keys)


def _model_class(model: Any) -> Any:
    """Return the class of a model; FSDP2 puts one of its own in front."""
    from torch.distributed.fsdp import FSDPModule

    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)


def _parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter by each of its names: tied ones have several."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name.replace("_orig_mod.", ""), parameter


def _tied_names(model: Any) -> dict[str, set[str]]:
    """Return the other names of each tied parameter, of which a file needs only one."""
    names: dict[int, set[str]] = {}
    for name, parameter in _parameters(model):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group - {name} for group in names.values() for name in group}


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor, gathered where it is sharded, on rank 0; None on the others."""
    from torch.distributed.tensor import DTensor

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if rank() == 0 else None
