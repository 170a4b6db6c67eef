"""Names a recipe uses that only the model knows: LoRA targets, layers, the FSDP layer class, the
tokenizer's size.

The architecture is built on the meta device from the model's config: no weights, no memory, about a
second.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.accelerate_config import AccelerateConfig
from recipes_lib.config.combinations import rank_too_large
from recipes_lib.config.constraints import VARLEN
from recipes_lib.config.model_files import no_tokenizer
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import MAX_LENGTH
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.upstream import build_lora_config, refused
from recipes_lib.core.errors import RecipeError, one_line
from recipes_lib.models.architectures import (
    auto_class,
    converted,
    language_modules,
    needs_of,
    settle_targets,
    why_not_varlen,
    why_rows_apart,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POSITIONS = re.compile(
    r"(?:^|\.)(?:wpe|embed_positions|position_embeddings?)$"
)  # tables; rotary positions go on beyond what was trained
_STARTS_OF_PARAMETERS = ("gaussian",)
_ATTENTION_ALONE = (
    "or adapt the attention alone: lora.target_modules: [q_proj, k_proj, v_proj, o_proj]"
)


def check_names(
    recipe: Recipe, folder: Path, accelerate: AccelerateConfig
) -> Iterator[RecipeError]:
    """Yield names in the recipe or its accelerate config that the model does not have."""
    try:
        model = architecture(folder)
    except Exception as error:
        # transformers raises many types here; whatever it is, the user's model cannot be built
        yield recipe.error(
            "model.name_or_path", f"transformers cannot build this model: {one_line(error)}"
        )
        return
    yield from _check_causal(recipe, model)
    yield from _check_attention(recipe, model)
    if recipe.lora is not None:
        named = list(_check_lora(recipe, model))
        yield from named or _check_injection(recipe, model)
    yield from _check_packing(recipe, model)
    wrapped = accelerate.fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    if wrapped:
        classes = {type(module).__name__ for module in model.modules()}
        stacks = [module for module in model.modules() if type(module).__name__ == "ModuleList"]
        layers = sorted({type(child).__name__ for stack in stacks for child in stack})
        for name in re.split(r"\s*,\s*", str(wrapped)):
            if name not in classes:
                key = "fsdp_transformer_layer_cls_to_wrap"
                what = f"{key} '{name}' of {accelerate.path.name} is not in the model"
                hint = f"its layer classes: {', '.join(layers)}"
                yield recipe.error("launch.accelerate", what, hint)
    yield from _check_tokenizer(recipe, folder, model)


@lru_cache(maxsize=4)
def architecture(folder: Path) -> PreTrainedModel:
    """Return the model of a folder without weights. Code that ships with a model is not run."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return getattr(transformers, auto_class(config.model_type)).from_config(config)


@lru_cache(maxsize=4)
def _tokenizer_size(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _check_causal(recipe: Recipe, model: Any) -> Iterator[RecipeError]:
    """Yield an error for an encoder, which sees the tokens that it should predict, and for rows
    longer than a table of positions.
    """
    import torch

    key = "model.name_or_path"
    # GPT-NeoX has the key and is causal whatever it says: only the classes that ask for it depend
    # on it
    asks_for_it = "add `is_decoder=True" in inspect.getsource(type(model))
    if asks_for_it and not model.config.is_decoder:
        what = (
            f"{type(model).__name__} is an encoder here (is_decoder: false): it sees the tokens"
            " that it should predict"
        )
        yield recipe.error(key, what, "choose a causal language model")
    # transformers 5.24 modeling_doge.py says so itself
    if model.config.model_type == "doge" and model.config.is_moe:
        what = f"{type(model).__name__} with experts routes each token by tokens that come after it"
        hint = "choose a causal language model, or one of Doge without experts"
        yield recipe.error(key, what, hint)
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = recipe.train.get("max_length", MAX_LENGTH)
    has_table = any(
        isinstance(module, torch.nn.Embedding) and _POSITIONS.search(name)
        for name, module in language_modules(model)
    )
    if has_table and positions and (longest is None or longest > positions):
        what = f"train.max_length {longest:,}" if longest is not None else "train.max_length: null"
        what += f": the model has a table of {positions:,} positions and fails beyond"
        hint = f"set train.max_length: {positions} or less"
        yield recipe.error("train.max_length", what, hint)


def _check_attention(recipe: Recipe, model: Any) -> Iterator[RecipeError]:
    """Yield an error where the model's class does not have the attention asked for; flash attention
    is left to the machine that has it.
    """
    import torch
    import transformers

    asked = recipe.model.attn_implementation
    if asked in ("sdpa", "eager", "flex_attention", VARLEN):
        loaded = "sdpa" if asked == VARLEN else asked
        try:
            with torch.device("meta"):
                config = copy.deepcopy(model.config)
                loader = getattr(transformers, auto_class(config.model_type))
                tried = loader.from_config(config, attn_implementation=loaded)
        except (ValueError, ImportError) as error:
            yield attention_refused(recipe, error)
        else:
            if asked == VARLEN and (why := why_not_varlen(tried)):
                yield varlen_refused(recipe, why)


def varlen_refused(recipe: Recipe, why: str) -> RecipeError:
    """Return the refusal of torch's variable-length attention.

    Args:
        why: the end of a sentence that begins with the kernel's name.
    """
    key = "model.attn_implementation"
    hint = "leave the key out: the fastest that the model has is taken"
    return recipe.error(key, f"{key}: {VARLEN} {why}", hint)


def attention_refused(recipe: Recipe, error: Exception) -> RecipeError:
    """Return transformers' refusal of `model.attn_implementation` in one line."""
    key = "model.attn_implementation"
    reason = (
        str(error).strip().splitlines()[0].partition(". Please request")[0].partition(" yet. ")[0]
    )
    what = f"{key}: {recipe.model.attn_implementation} is not for this model: {reason}"
    return recipe.error(key, what, "leave the key out: the fastest that the model has is taken")


def _check_packing(recipe: Recipe, model: Any) -> Iterator[RecipeError]:
    """Yield an error where several examples would share a row of a model whose layers do not know
    where one ends.
    """
    packed = recipe.train.get("packing") and recipe.train.get("packing_strategy") != "wrapped"
    packs = "packing" if packed else "padding_free"
    if recipe.train.get(packs) and (why := why_rows_apart(model)):
        what = f"train.{packs}: {type(model).__name__} {why}"
        yield recipe.error(f"train.{packs}", what, f"set train.{packs}: false")


def _check_injection(recipe: Recipe, model: Any) -> Iterator[RecipeError]:
    """Yield what PEFT has against these adapters on this model: they are put on a copy without
    weights.
    """
    import torch
    from peft import get_peft_model

    try:
        config = build_lora_config(recipe)
        assert config is not None
        start = config.init_lora_weights
        config.init_lora_weights = False  # the initial values of some kinds need the weights
        settled = settle_targets(config, model)
        with torch.device("meta"):
            get_peft_model(copy.deepcopy(model), settled)
        needs_weights = isinstance(start, str) and start not in _STARTS_OF_PARAMETERS
        if needs_weights and converted(settled, model).target_parameters:
            key = "lora.init_lora_weights"
            what = (
                f"{key}: {start} starts from the weights of linear layers, and"
                " these adapters are on parameters of experts"
            )
            yield recipe.error(key, what, "leave the key out", _ATTENTION_ALONE)
    except RecipeError:  # of the config itself, which is reported where it is built
        return
    except (ValueError, TypeError, NotImplementedError) as error:
        if "meta" in str(error):
            return  # says something about tensors without values, nothing about the recipe
        hints = []
        if "ParamWrapper" in str(error):
            hints += ["that is how PEFT adapts experts: leave the setting out", _ATTENTION_ALONE]
        yield refused(recipe, "lora", error, *hints)


def _check_lora(recipe: Recipe, model: Any) -> Iterator[RecipeError]:
    """Yield LoRA names that match nothing, and names of layers that cannot be adapted."""
    import torch

    lora = recipe.lora or {}
    modules = {name: module for name, module in language_modules(model) if name}
    yield from _unadaptable(recipe, model, modules)
    layers_of = {
        name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)
    }
    linear = sorted({name.rpartition(".")[2] for name in layers_of} - {"lm_head"})
    named = sorted({name.rpartition(".")[2] for name in modules})
    for key, existing in (("target_modules", linear), ("modules_to_save", named)):
        given = lora.get(key)
        for name in _unmatched(given, modules):
            if key == "target_modules" and name in _former_layers(recipe, model):
                continue
            place = f"lora.{key}.{given.index(name)}" if isinstance(given, list) else f"lora.{key}"
            hints = did_you_mean(name, existing)
            if key == "target_modules":
                hints.append(f"it has {', '.join(existing)}")
            yield recipe.error(place, f"lora.{key}: the model has no module '{name}'", *hints)
    widths = [max(module.in_features, module.out_features) for module in layers_of.values()]
    if widths and lora.get("r", 8) > max(widths):
        yield recipe.error("lora.r", *rank_too_large(lora["r"], max(widths)))
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    wanted = lora.get("layers_to_transform")
    for layer in [wanted] if isinstance(wanted, int) else wanted or []:
        if layers is not None and not 0 <= layer < layers:
            key, count = "lora.layers_to_transform", f"it has layers 0 to {layers - 1}"
            yield recipe.error(key, f"{key}: the model has no layer {layer}", count)


def _unadaptable(recipe: Recipe, model: Any, modules: dict[str, Any]) -> Iterator[RecipeError]:
    """Yield targets that PEFT would accept or refuse, and that cannot work on this architecture in
    either case.
    """
    needs, given = needs_of(model), (recipe.lora or {}).get("target_modules")
    num_given = len(given) if isinstance(given, list) else 1
    for name in needs.left_out:
        existing = [module for module in modules if module.rpartition(".")[2] == name]
        missed = len(_unmatched(given, dict.fromkeys(existing)))
        experts_alone = given is None and (recipe.lora or {}).get("target_parameters")
        if given == "all-linear" or experts_alone or not existing or missed == num_given:
            continue
        what = f"lora.target_modules: '{name}' of this model takes no adapter: {needs.because}"
        hint = "leave it out, or say all-linear, which does"
        yield recipe.error("lora.target_modules", what, hint)


def _former_layers(recipe: Recipe, model: Any) -> set[str]:
    """Return the targets that PEFT takes for layers which are parameters of the experts now; what
    it refuses `_check_injection` says.
    """
    config = build_lora_config(recipe)
    try:
        left = converted(config, model).target_modules if config else ()
    except ValueError:
        left = ()
    return set((recipe.lora or {}).get("target_modules") or ()) - set(left or ())


def _unmatched(names: Any, modules: dict[str, Any]) -> list[str]:
    """Return the names that PEFT would find nowhere: a list matches ends of module names, a text is
    a regular expression.
    """
    if names is None or names == "all-linear":
        return []
    if isinstance(names, str):
        return [] if any(re.fullmatch(names, module) for module in modules) else [names]
    return [
        name
        for name in names
        if not any(module == name or module.endswith(f".{name}") for module in modules)
    ]


def _check_tokenizer(recipe: Recipe, folder: Path, model: Any) -> Iterator[RecipeError]:
    try:
        entries = _tokenizer_size(folder)
    except Exception as error:  # as above: any failure to read it is the user's to know
        yield no_tokenizer(recipe, error)
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if entries > rows and not recipe.model.resize_embeddings:
        what = f"the tokenizer has {entries:,} entries, the model embeds only {rows:,}"
        yield recipe.error(
            "model.name_or_path",
            what,
            "set model.resize_embeddings: true, or use the tokenizer the model was trained with",
        )
