"""The base model: fetched, loaded as the recipe says, known by its files; and adapters on it."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config import preflight
from recipes_lib.config.launch import Active
from recipes_lib.config.preflight import check_upstream, local_folder
from recipes_lib.config.recipe import VARLEN, ModelSection, Recipe
from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors, one_line
from recipes_lib.core.files import model_fingerprint
from recipes_lib.core.ranks import on_main_rank, say_once
from recipes_lib.models.families import add_rows, needs_of, not_quantized
from recipes_lib.models.packaged import MODEL, materialise

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = "*.safetensors"
_ROOM = 1.1  # what a model takes on a GPU, over its weights: buffers, and a small answer


def model_path(section: ModelSection) -> str:
    """Return what `from_pretrained` takes: a Hub id or a folder."""
    if section.name_or_path == MODEL:
        return str(on_main_rank(materialise))
    return section.name_or_path


def base_fingerprint(recipe: Recipe) -> str | None:
    """Return `model_fingerprint` of the base; None where its weights are not on this machine."""
    folder = local_folder(recipe)
    if folder is None or not any(folder.glob(_WEIGHTS)):
        return None
    return model_fingerprint(folder)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer; without a padding token it pads with the end token, as in TRL."""
    from transformers import AutoTokenizer

    local_folder(recipe)
    path = model_path(recipe.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_source(recipe.model))
    except OSError as error:
        raise explain_load_failure(recipe.model, error) from None
    except Exception as error:  # of many types; whatever it is, the files are at fault
        raise preflight.no_tokenizer(recipe, error) from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_checked_tokenizer(
    recipe: Recipe, active: Active, remote_code: bool
) -> PreTrainedTokenizerBase:
    """Load the tokenizer after upstream's check of the recipe under the launch that runs."""
    unchecked: list[RecipeError] = []
    errors = check_upstream(recipe, launch=active, remote_code=remote_code, notes=unchecked)
    if not errors:
        tokenizer = load_tokenizer(recipe)
        if unchecked:  # files that came only now
            errors = check_upstream(recipe, launch=active, remote_code=remote_code)
    if errors:
        raise RecipeErrors(errors)
    return tokenizer


def load_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    quantization_config: Any = None,
    *,
    empty: bool = False,
    device: str | None = None,
) -> PreTrainedModel:
    """Load the base model in the recipe's precision and attention kernel.

    Args:
        tokenizer: decides how many rows the embeddings need.
        quantization_config: bitsandbytes', for a base in 4 or 8 bits.
        empty: leave the weights out (meta device), but those of a checkpoint that is quantized.
        device: where a quantized base goes; without it, on this rank's GPU if there is one.
    """
    import torch
    import transformers

    section = recipe.model
    path = model_path(section)
    attention = section.attn_implementation
    folder = local_folder(recipe)
    if folder is None or not any(folder.glob(_WEIGHTS)):
        say_once(f"fetching {path} from the Hub ...")
    # else transformers 5.24 takes a bot's conversion of pickles, from another revision
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    options = _source(section) | {"dtype": section.dtype}
    # said also where it is false: transformers 5.25 takes kernels of the Hub by itself
    options["use_kernels"] = bool(section.use_kernels) and not empty
    if attention:  # a training switches to varlen; answers are sdpa's
        options["attn_implementation"] = "sdpa" if attention == VARLEN else attention
    try:
        config = transformers.AutoConfig.from_pretrained(path, **_source(section))
        loader = getattr(transformers, needs_of(config.model_type).auto_class)
        packed = getattr(config, "quantization_config", None) or {}
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
            if device is None and torch.cuda.is_available():
                device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            if device is not None and device != "cpu":
                options["device_map"] = {"": device}
            plain = not_quantized(config)
            if plain:
                plain += quantization_config.llm_int8_skip_modules or ()
                quantization_config.llm_int8_skip_modules = sorted(set(plain))
        elif isinstance(packed, dict) and packed.get("quant_method") == preflight.DEQUANTIZED:
            # without a GPU, or with its kernels, transformers would decide otherwise
            options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        if empty and not packed:
            options["device_map"] = {"": "meta"}
        model = loader.from_pretrained(path, use_safetensors=True, **options)
    except OSError as error:
        raise explain_load_failure(section, error) from None
    except (ImportError, ValueError) as error:
        key, value = "model.attn_implementation", attention
        if section.use_kernels and "ernels are not available" in str(error):
            key, value = "model.use_kernels", "true"
        if value is None:
            raise
        what = f"{key}: {value} cannot be used: {one_line(error)}"
        raise recipe.document.fault(key, what, "leave the key out") from None
    for module in model.modules():
        # bitsandbytes 0.50 repacks 4-bit weights for AVX512-BF16 processors in the first
        # evaluation, and outputs differ from then on (2% of the largest logit of a 135M model)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if section.resize_embeddings and not empty:
        add_rows(model, entries=len(tokenizer))
    return model


def load_base(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, merged_in: str | None = None
) -> PreTrainedModel:
    """Load the base as its recipe says, on the GPU where one has room. `merged_in` is the type, not
    quantized, that the caller converts it into, and that needs the room; "auto" is the base's own.
    """
    import torch

    dtype = None
    if merged_in not in (None, "auto"):
        dtype = getattr(torch, str(merged_in))
    quantization = build_quantization_config(recipe)
    if quantization is None:
        base = load_model(recipe, tokenizer)
        return base.to(device_with_room(base, dtype, required=merged_in is None))
    if not torch.cuda.is_available():
        return load_model(recipe, tokenizer, quantization)
    # transformers quantizes on the device where the layers are to be
    device = torch.device("cuda", torch.cuda.current_device())
    if merged_in is not None:
        device = device_with_room(load_model(recipe, tokenizer, empty=True), dtype)
    return load_model(recipe, tokenizer, quantization, device=str(device))


def load_saved(
    folder: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str | None = None,
    *,
    on_cpu_if_full: bool = False,
) -> PreTrainedModel:
    """Load a whole model (a full fine-tuning, or a merged one) from its folder alone; on the CPU
    where the GPU has no room, if so asked, else that is an error.
    """
    values = {"name_or_path": str(folder), "revision": None, "resize_embeddings": False}
    if dtype is not None:
        values["dtype"] = dtype
    section = recipe.model.model_copy(update=values)
    model = load_model(dataclasses.replace(recipe, model=section), tokenizer)
    return model.to(device_with_room(model, required=not on_cpu_if_full))


def device_with_room(
    model: PreTrainedModel, dtype: torch.dtype | None = None, *, required: bool = False
) -> torch.device:
    """Return this process's GPU, or the CPU where there is none with room for the model, in `dtype`
    where it is converted there. `required`: refuse a GPU without room, beside which a model of
    billions of parameters would answer for days on the CPU.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    needed = float(model.get_memory_footprint())
    if dtype is not None:
        needed = float(sum(weight.numel() * dtype.itemsize for weight in model.parameters()))
    needed *= _ROOM
    free, total = torch.cuda.mem_get_info()
    if needed < free:
        return torch.device("cuda", torch.cuda.current_device())
    if not required:
        return torch.device("cpu")
    gib = 2**30
    room = f"{free / gib:.1f} GiB of {total / gib:.1f} GiB is free"
    raise EnvironmentFault(
        f"the model needs {needed / gib:.1f} GiB of GPU memory; {room}",
        "end what else uses the GPU (nvidia-smi), a judge's server among it; or choose another"
        " with CUDA_VISIBLE_DEVICES=1, or the CPU with CUDA_VISIBLE_DEVICES=",
    )


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attach(
    base: PreTrainedModel, adapters: Mapping[str, Path], *, without_base_weights: bool = False
) -> PeftModel:
    """Return the base with adapters on it, each in the precision it was trained in. `adapters` maps
    PEFT's names for them to folders; `without_base_weights`: the base is on the meta device.
    """
    from peft import PeftConfig, get_peft_model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model: Any = None
    hint = "it was trained on another base model, or its files are damaged"
    options: dict[str, Any] = {"low_cpu_mem_usage": without_base_weights}
    for name, folder in adapters.items():
        try:
            dtypes = {tensor.dtype for tensor in load_file(folder / ADAPTER_WEIGHTS).values()}
            if model is None:
                config = PeftConfig.from_pretrained(str(folder), inference_mode=True)
                model = get_peft_model(base, config, name, **options)
            device = "cpu" if without_base_weights else None
            loaded = model.load_adapter(str(folder), name, torch_device=device, **options)
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            what = f"{folder} does not load on its base: {one_line(error)}"
            raise RecipeError(what, hint) from error
        names = sorted(set(loaded.missing_keys) | set(loaded.unexpected_keys))
        if names:
            what = f"{folder} does not fit its base: {len(names)} weights differ ({names[0]}, ...)"
            raise RecipeError(what, hint)
        # PEFT raises them to float32; those of a quantized base are bfloat16, and round differently
        if len(dtypes) == 1:
            for key, parameter in model.named_parameters():
                if "lora_" in key and name in key.split("."):
                    parameter.data = parameter.data.to(*dtypes)
    return model


def _source(section: ModelSection) -> dict[str, Any]:
    return {"revision": section.revision or "main", "trust_remote_code": section.trust_remote_code}


def explain_load_failure(section: ModelSection, error: Exception) -> EnvironmentFault:
    """Return in one line why a model cannot be loaded, and what to do."""
    from huggingface_hub import errors

    name = section.name_or_path
    causes: set[type] = set()
    cause: BaseException | None = error
    while cause is not None:
        causes.update(type(cause).__mro__)
        cause = cause.__cause__ or cause.__context__
    what = f"cannot load '{name}': {one_line(error)}"
    hint = "check the name and model.revision (private: hf auth login); a folder needs safetensors"
    if errors.GatedRepoError in causes:
        what = f"'{name}' is gated: no access with the current token"
        hint = f"accept its licence on the Hub page of {name}, then: hf auth login"
    elif causes & {errors.LocalEntryNotFoundError, ConnectionError} and not Path(name).exists():
        what = f"offline, and '{name}' is not in the local cache"
        hint = f"with a network: hf download {name}; or choose a local folder, or {MODEL}"
    elif errors.RepositoryNotFoundError in causes:
        what = f"the Hub has no model '{name}', or it is private"
    return EnvironmentFault(what, hint)
