"""What only the model's files and upstream's classes can say about a recipe, before anything is
loaded. The architecture is built on the meta device: no weights, no memory.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.config import upstream
from recipes_lib.config.documents import Values, did_you_mean
from recipes_lib.config.launch import STARTS_WITHOUT_WEIGHTS, AccelerateConfig, plan_launch
from recipes_lib.config.recipe import A_MODEL, Recipe, no_model_at
from recipes_lib.core.errors import EnvironmentFault, RecipeError, one_line
from recipes_lib.core.files import object_or_none
from recipes_lib.models import families
from recipes_lib.models.packaged import is_packaged, packaged_folder

KEY = "model.name_or_path"
DEQUANTIZED = "mxfp4"  # gpt-oss has no other weights on the Hub; loaded as `model.dtype`
_OF_GPUS = {"fp16", "fp16_full_eval", "tf32"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_upstream(
    recipe: Recipe, *, remote_code: bool | None = None, notes: list[RecipeError] | None = None
) -> list[RecipeError]:
    """Return what upstream, the model's files and the default launch have against a recipe.

    Args:
        remote_code: whether the command line allowed the model's own code; None to load no model.
        notes: is given what could not be checked.
    """
    # it warns about optional kernels as soon as PEFT imports it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    errors: list[Any] = []
    launch, folder = plan_launch(recipe.launch), local_folder(recipe)
    checkable = recipe
    if not (launch.config.use_cpu or upstream.has_accelerator()):  # it is meant for a GPU
        train = {key: recipe.train[key] for key in recipe.train.keys() - _OF_GPUS}
        checkable = replace(recipe, train=train)
    for build in (
        lambda: upstream.build_sft_config(checkable, "unused", launch.world_size),
        lambda: upstream.build_lora_config(recipe),
        lambda: upstream.build_quantization_config(recipe),
        lambda: upstream.check_packages(recipe),
    ):
        try:
            build()
        except (RecipeError, EnvironmentFault) as error:
            errors += getattr(error, "errors", [error])
    errors += _sharded_quantization(recipe, launch.config)
    wrong = list(check_model_files(recipe, folder, remote_code=remote_code)) if folder else []
    absent = folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES)
    absent &= not Path(recipe.model.name_or_path).is_dir()
    if errors or wrong or folder is None or absent or recipe.model.trust_remote_code:
        if notes is not None and not errors + wrong:
            why = "model not on this machine" if absent else "the model brings its own code"
            what = f"note: not checked against {recipe.model.name_or_path}: {why}"
            notes.append(recipe.error(KEY, what))
        return [*errors, *wrong]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(check_names(recipe, folder, launch.config))


def _sharded_quantization(recipe: Recipe, accelerate: AccelerateConfig) -> Iterator[RecipeError]:
    """FSDP2 shards tensors of one type, and gathers packed 4-bit values too in the compute type."""
    quantization = recipe.quantization
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if quantization is None or not (asked or accelerate.distributed_type == "FSDP"):
        return
    types = ("bnb_4bit_quant_storage", "bnb_4bit_compute_dtype")
    if quantization.get("load_in_8bit") or recipe.train.get("fp16"):
        key = "train.fp16" if recipe.train.get("fp16") else "quantization.load_in_8bit"
        what = f"{key}: FSDP would gather quantized weights in another type and change them"
        yield recipe.error(key, what, "use 4 bits and train.bf16: true, or launch with ddp")
    elif {quantization.get(key) for key in types} != {"bfloat16"}:
        what = f"QLoRA under FSDP: {' and '.join(types)} must both be bfloat16"
        yield recipe.error("quantization", what, "set both, or launch with ddp")


def local_folder(recipe: Recipe) -> Path | None:
    """Return the folder with the model's files: the recipe's, a packaged model's or one in the
    Hub's cache; None when it is not on this machine.
    """
    name = recipe.model.name_or_path
    if is_packaged(name):
        return packaged_folder()
    if wrong := no_model_at(name):
        raise recipe.error(KEY, *wrong)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    return Path(config).parent if isinstance(config, str) else None


def no_tokenizer(recipe: Recipe, error: Exception) -> RecipeError:
    """Return the error for a model whose tokenizer cannot be read, from that of transformers."""
    hint = f"its files are beside the weights: {', '.join(TOKENIZER_FILES)}"
    return recipe.error(KEY, f"the tokenizer cannot be read: {one_line(error)}", hint)


def attention_refused(recipe: Recipe, why: str) -> RecipeError:
    """Return the refusal of `model.attn_implementation`: a sentence that ends in `why`."""
    key = "model.attn_implementation"
    what = f"{key}: {recipe.model.attn_implementation} {why}"
    return recipe.error(key, what, "leave the key out: the fastest that the model has is taken")


def check_model_files(
    recipe: Recipe, folder: Path, *, remote_code: bool | None = None
) -> Iterator[RecipeError]:
    """Yield what is wrong with a model's files; `remote_code` as for `check_upstream`."""
    config = object_or_none(folder / "config.json")
    if config is None:
        yield recipe.error(KEY, f"{folder} has no readable config.json", A_MODEL)
        return
    names = [str(name) for name in config.get("architectures") or ()]
    kind = families.ARCHITECTURES.get(str(config.get("model_type")))
    is_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if names and not is_causal and not (kind and kind.images):
        what = f"{', '.join(names)} is not a causal language model (...ForCausalLM)"
        yield recipe.error(KEY, what, "choose a model that generates text")
    packed = config.get("quantization_config") or {}
    method = packed.get("quant_method") if isinstance(packed, dict) else packed
    if packed and not (method == DEQUANTIZED and recipe.quantization is None):
        hint = "give the original model, or for mxfp4 remove the quantization section"
        yield recipe.error(KEY, f"the model is already quantized ({method})", hint)
    if "auto_map" in config and not (recipe.model.trust_remote_code and remote_code is not False):
        hint = "read it; then set model.trust_remote_code: true and pass --trust-remote-code"
        yield recipe.error(KEY, "the model needs Python code that ships with it", hint)
    is_cached = not Path(recipe.model.name_or_path).is_dir()
    for fault in weight_faults(folder, to_be_fetched=is_cached):
        yield recipe.error(KEY, fault, "download the model again, with its *.safetensors")


def weight_faults(folder: Path, *, to_be_fetched: bool = False) -> Iterator[str]:
    """Yield what the headers of a model's weight files say is wrong: damaged, missing (unless the
    Hub has them still to send), or of a format that is not read.
    """
    from safetensors import SafetensorError, safe_open

    index = object_or_none(folder / "model.safetensors.index.json") or {}
    named = {folder / str(name) for name in dict(index.get("weight_map") or {}).values()}
    shards = named or {*folder.glob("*.safetensors")}
    for shard in sorted(shards):
        try:
            with safe_open(shard, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            if shard.is_file() or not to_be_fetched:
                yield f"{shard} is {'damaged' if shard.is_file() else 'missing'}: {one_line(error)}"
    if not shards and not to_be_fetched:
        yield f"{folder} has no weights (*.safetensors); *.bin is a pickle, which can run code"


def check_names(
    recipe: Recipe, folder: Path, accelerate: AccelerateConfig
) -> Iterator[RecipeError]:
    """Yield names that a model does not have, and what its class cannot do; no code of it runs."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        auto = getattr(transformers, families.auto_class(config.model_type))
        with torch.device("meta"):
            model = auto.from_config(config)
    except Exception as error:
        # transformers raises many types here; whatever it is, the user's model cannot be built
        yield recipe.error(KEY, f"transformers cannot build this model: {one_line(error)}")
        return
    packs = "packing" if recipe.train.get("packing") else "padding_free"
    wrapped = packs == "packing" and recipe.train.get("packing_strategy") == "wrapped"
    if recipe.train.get(packs) and not wrapped and (why := families.why_rows_apart(model)):
        what = f"train.{packs}: {type(model).__name__} {why}"
        yield recipe.error(f"train.{packs}", what, f"set train.{packs}: false")
    wrap = "fsdp_transformer_layer_cls_to_wrap"
    classes = {type(module).__name__ for module in model.modules()}
    asked = re.split(r"\s*,\s*", str(accelerate.fsdp_config.get(wrap) or ""))
    for layer in {*asked} - {""} - classes:
        what = f"{wrap} '{layer}' of {accelerate.path.name} is not in the model"
        hint = f"its layer classes: {', '.join(sorted(model._no_split_modules or classes))}"
        yield recipe.error("launch.accelerate", what, hint)
    try:
        yield from _adapter(recipe, recipe.lora, model) if recipe.lora is not None else ()
    except (ValueError, TypeError, NotImplementedError) as error:  # of PEFT
        if "meta" not in str(error):  # else it is about tensors without values
            yield upstream.refused(recipe, "lora", error)
    try:
        entries = len(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # as above: any failure to read it is the user's to know
        yield no_tokenizer(recipe, error)
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if entries > rows and not recipe.model.resize_embeddings:
        what = f"the tokenizer has {entries:,} entries, the model embeds only {rows:,}"
        hint = "set model.resize_embeddings: true, or use the model's own tokenizer"
        yield recipe.error(KEY, what, hint)


def _adapter(recipe: Recipe, lora: Values, model: Any) -> list[RecipeError]:
    """Return names that the model does not have (PEFT takes a list if one of them matches), targets
    that cannot work on it, and what PEFT says when it puts the adapters on it.
    """
    import torch
    from peft import get_peft_model

    modules = {name: module for name, module in families.language_modules(model) if name}
    last = {name.rpartition(".")[2]: module for name, module in modules.items()}
    linear = {name for name, module in last.items() if isinstance(module, torch.nn.Linear)}
    layers = f"it has {', '.join(sorted(linear - {'lm_head'}))}"
    needs, faults = families.needs_of(model.config), list[tuple[str, ...]]()
    config = upstream.build_lora_config(recipe)
    assert config is not None
    settled = families.settle_targets(config, model)
    # PEFT finds former layers of experts, which are parameters now, by itself
    known = families.converted(config, model)
    for key in ("lora.target_modules", "lora.modules_to_save"):
        names = getattr(known, key.removeprefix("lora."))
        for name in () if names is None or isinstance(names, str) else names:
            if not any(f".{module}".endswith(f".{name}") for module in modules):
                what = f"{key}: the model has no module '{name}'"
                faults.append((key, what, *did_you_mean(name, last), layers))
    key, given = "lora.target_modules", lora.get("target_modules")
    for name in {*needs.left_out} & {*(given if isinstance(given, list) else ())} & {*last}:
        faults.append((key, f"{key}: '{name}' takes no adapter: {needs.because}", "use all-linear"))
    start, settled.init_lora_weights = settled.init_lora_weights, False  # may need the weights
    if start not in STARTS_WITHOUT_WEIGHTS and families.converted(settled, model).target_parameters:
        key = "lora.init_lora_weights"
        what = f"{key}: {start} starts from weights of layers, and these are experts'"
        faults.append((key, what, "leave the key out, or adapt the attention alone"))
    if not faults:
        with torch.device("meta"):
            get_peft_model(model, settled)
        if hasattr(model.get_output_embeddings(), "lora_A"):
            what = f"{key}: the loss does not run through an adapter on the output layer"
            faults.append((key, what, "leave the output layer out"))
    return [recipe.error(*fault) for fault in faults]
