"""What the model's files and upstream's classes say of a recipe before anything is loaded."""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.config import upstream
from recipes_lib.config.launch import WRAP_KEY, Active, Launch
from recipes_lib.config.recipe import A_MODEL, Recipe, no_model_at
from recipes_lib.core.errors import EnvironmentFault, RecipeError, one_line
from recipes_lib.core.files import cached_model, object_or_none
from recipes_lib.models import families
from recipes_lib.models.packaged import MODEL, packaged_folder

KEY = "model.name_or_path"
DEQUANTIZED = "mxfp4"  # gpt-oss has no other weights on the Hub; loaded as `model.dtype`
_TYPES_OF_SHARDS = ("bnb_4bit_quant_storage", "bnb_4bit_compute_dtype")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def planned_launch(launch: Launch) -> Active:
    """Return what the checks of a recipe ask about a launch before it starts."""
    return Active(
        world_size=launch.world_size,
        distributed_type=launch.config.distributed_type,
        device="cpu" if launch.config.use_cpu else "cuda",
        wrapped_classes=str(launch.config.fsdp_config.get(WRAP_KEY) or ""),
        source=launch.config.path.name,
    )


def check_upstream(
    recipe: Recipe,
    *,
    launch: Active,
    remote_code: bool | None = None,
    notes: list[RecipeError] | None = None,
) -> list[RecipeError]:
    """Return what upstream and the model's files have against a recipe and its launch.

    Args:
        launch: the launch that it is about.
        remote_code: whether the command line allowed the model's own code; None to load no model.
        notes: is given what could not be checked.
    """
    # it warns about optional kernels as soon as PEFT imports it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    errors: list[Any] = []
    folder = local_folder(recipe)
    checkable = recipe
    if not (launch.device == "cpu" or upstream.has_accelerator()):  # it is meant for a GPU
        train = {key: recipe.train[key] for key in recipe.train.keys() - {"fp16", "tf32"}}
        checkable = replace(recipe, train=train)
    for build in (
        lambda: upstream.build_train_config(checkable, "unused", launch.world_size),
        lambda: upstream.build_lora_config(recipe),
        lambda: upstream.build_quantization_config(recipe),
        lambda: upstream.check_packages(recipe),
    ):
        try:
            build()
        except (RecipeError, EnvironmentFault) as error:
            errors += getattr(error, "errors", [error])
    if launch.distributed_type.startswith("FSDP"):
        errors += _changed_by_shards(recipe)
    if folder is not None:
        errors += check_model_files(recipe, folder, remote_code=remote_code)
    if errors:
        return errors
    # of a Hub model, the cache may hold the config alone
    has_tokenizer = folder and any((folder / name).is_file() for name in TOKENIZER_FILES)
    is_absent = not (has_tokenizer or Path(recipe.model.name_or_path).is_dir())
    if folder is None or is_absent or recipe.model.trust_remote_code:
        if notes is not None:
            why = "model not on this machine" if is_absent else "the model brings its own code"
            what = f"note: not checked against {recipe.model.name_or_path}: {why}"
            notes.append(recipe.error(KEY, what))
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = list(check_names(recipe, folder, launch, notes))
    key = _joins_rows(recipe)
    if key is not None and notes is not None and not errors:
        what = f"note: {key}: before the first step the training tries on the loaded model whether"
        notes.append(recipe.error(key, f"{what} the examples of a row stay apart"))
    return errors


def _joins_rows(recipe: Recipe) -> str | None:
    """Return the key by which a recipe puts several whole examples into a row; None without."""
    train = recipe.train
    if train.get("packing") and train.get("packing_strategy") != "wrapped":
        return "train.packing"
    if train.get("padding_free") and not train.get("packing"):
        return "train.padding_free"
    return None


def _changed_by_shards(recipe: Recipe) -> Iterator[RecipeError]:
    """FSDP2 shards tensors of one type, and gathers packed 4-bit values too in the compute type."""
    if recipe.model.use_kernels:
        what = "model.use_kernels: under FSDP one rank alone has weights, by whose device kernels"
        hint = "remove the key, or launch with ddp"
        yield recipe.error("model.use_kernels", f"{what} are chosen", hint)
    section = recipe.quantization
    if not section:
        return
    is_packed = section.get("load_in_4bit") and not recipe.train.get("fp16")
    types = {section.get(key) for key in _TYPES_OF_SHARDS}
    if not is_packed or types != {"bfloat16"}:
        keys = " and ".join(_TYPES_OF_SHARDS)
        what = f"FSDP keeps 4-bit weights intact only if {keys} are bfloat16"
        yield recipe.error("quantization", what, "set both and train.bf16, or launch with ddp")


def local_folder(recipe: Recipe) -> Path | None:
    """Return the folder of the model's files, in the Hub's cache too; None: not on this machine."""
    name = recipe.model.name_or_path
    if name == MODEL:
        return packaged_folder()
    wrong = no_model_at(name)
    if wrong:
        raise recipe.error(KEY, *wrong)
    if Path(name).is_dir():
        return Path(name)
    return cached_model(name, recipe.model.revision)


def no_tokenizer(recipe: Recipe, error: Exception) -> RecipeError:
    """Return the error for a model whose tokenizer cannot be read, from that of transformers."""
    hint = f"its files belong beside the weights: {', '.join(TOKENIZER_FILES)}"
    return recipe.error(KEY, f"the tokenizer cannot be read: {one_line(error)}", hint)


def check_model_files(
    recipe: Recipe, folder: Path, *, remote_code: bool | None = None
) -> Iterator[RecipeError]:
    """Yield what is wrong with a model's files; `remote_code` as for `check_upstream`."""
    config = object_or_none(folder / "config.json")
    if config is None:
        yield recipe.error(KEY, f"{folder} has no readable config.json", A_MODEL)
        return
    names = [str(name) for name in config.get("architectures") or ()]
    needs = families.needs_of(str(config.get("model_type")))
    heads = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if names and not (heads or needs.images):
        what = f"{', '.join(names)} is not a causal language model (...ForCausalLM)"
        yield recipe.error(KEY, what, "choose a model that generates text")
    packed = config.get("quantization_config") or {}
    method = packed.get("quant_method") if isinstance(packed, dict) else packed
    if packed and not (method == DEQUANTIZED and recipe.quantization is None):
        hint = "use the original model, or for mxfp4 remove the quantization section"
        yield recipe.error(KEY, f"the model is already quantized ({method})", hint)
    may_run_code = recipe.model.trust_remote_code and remote_code is not False
    if "auto_map" in config and not may_run_code:
        hint = "read it; then set model.trust_remote_code: true and pass --trust-remote-code"
        yield recipe.error(KEY, "the model needs Python code that ships with it", hint)
    # of the Hub's files, which it checks, some may still be to come
    if Path(recipe.model.name_or_path).is_dir():
        for fault in weight_faults(folder):
            yield recipe.error(KEY, fault, "download the model again, with its *.safetensors")


def weight_faults(folder: Path) -> Iterator[str]:
    """Yield which of a model's weight files are missing or cut off, by their headers."""
    from safetensors import SafetensorError, safe_open

    index = object_or_none(folder / "model.safetensors.index.json") or {}
    weight_map = dict(index.get("weight_map") or {})  # weight -> its file
    names = set(weight_map.values()) or {"model.safetensors"}
    for shard in sorted(folder / str(name) for name in names):
        try:
            with safe_open(shard, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{shard} is damaged or missing: {one_line(error)}"


def check_names(
    recipe: Recipe, folder: Path, launch: Active, notes: list[RecipeError] | None = None
) -> Iterator[RecipeError]:
    """Yield names that a model lacks and what its class cannot do; `notes` gets warnings."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        auto = getattr(transformers, families.needs_of(config.model_type).auto_class)
        with torch.device("meta"):
            model = auto.from_config(config)
    except Exception as error:
        # transformers raises many types here; whatever it is, the user's model cannot be built
        yield recipe.error(KEY, f"transformers cannot build this model: {one_line(error)}")
        return
    key = _joins_rows(recipe)
    why = families.why_rows_apart(model)
    if key is not None and why is not None:
        what = f"{key}: {type(model).__name__} {why}"
        yield recipe.error(key, what, f"set {key}: false")
    classes = {type(module).__name__ for module in model.modules()}
    wrapped_classes = {name.strip() for name in launch.wrapped_classes.split(",")}
    for layer in wrapped_classes - {""} - classes:
        what = f"{WRAP_KEY} '{layer}' of {launch.source} is not in the model"
        hint = f"its layer classes: {', '.join(sorted(model._no_split_modules or classes))}"
        yield recipe.error("launch.accelerate", what, hint)
    experts = families.fused_experts(model)
    if experts and recipe.quantization and notes is not None:
        what = f"note: {experts:,} parameters are not quantized: {families.FUSED_EXPERTS}"
        notes.append(recipe.error("quantization", what, "recipes plan says what fits"))
    rows = model.get_input_embeddings().weight.shape[0]  # now: an adapter may wrap them
    try:
        if recipe.lora is not None:
            yield from _adapter(recipe, model)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:  # of PEFT
        if "meta" not in str(error):  # else it is about tensors without values
            yield upstream.refused(recipe, "lora", error)
    try:
        entries = len(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # as above: any failure to read it is the user's to know
        yield no_tokenizer(recipe, error)
        return
    if entries > rows and not recipe.model.resize_embeddings:
        what = f"the tokenizer has {entries:,} entries, the model embeds only {rows:,}"
        hint = "set model.resize_embeddings: true, or use the model's own tokenizer"
        yield recipe.error(KEY, what, hint)
        return
    untrained = families.untrained_rows(model, entries - rows)
    if untrained and notes is not None:
        key = "model.resize_embeddings"
        notes.append(recipe.error(key, f"note: {key}: {untrained}"))


def _adapter(recipe: Recipe, model: Any) -> list[RecipeError]:
    """Return names that match nothing, layers that take no adapter, and what PEFT refuses."""
    import torch
    from peft import get_peft_model
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    # PEFT finds former layers of experts, which are parameters now, by itself: names are looked for
    # in a converted config, and the adapter is made of one as it was written
    converted = upstream.build_lora_config(recipe)
    config = upstream.build_lora_config(recipe)
    assert config and converted
    convert_peft_config_for_transformers(converted, model, None)
    needs = families.needs_of(model.config.model_type)
    modules = dict(families.language_modules(model))
    linear = [path for path, module in modules.items() if isinstance(module, torch.nn.Linear)]
    layers = {path.rpartition(".")[2] for path in linear}
    hint = f"its layers: {', '.join(sorted(layers))}"
    errors: list[RecipeError] = []
    for key in ("lora.target_modules", "lora.modules_to_save"):
        names = getattr(converted, key.removeprefix("lora."))
        if not isinstance(names, set | list):  # a pattern, or nothing
            continue
        for name in names:
            if not any(f".{path}".endswith(f".{name}") for path in modules):
                errors.append(recipe.error(key, f"{key}: the model has no module '{name}'", hint))
            elif name in needs.left_out:
                what = f"{key}: '{name}' takes no adapter: {needs.because}"
                errors.append(recipe.error(key, what, "use all-linear"))
    if errors:
        return errors
    with torch.device("meta"):
        get_peft_model(model, families.settle_targets(config, model))
    if hasattr(model.get_output_embeddings(), "lora_A"):
        what = "the loss bypasses an adapter on the output layer"
        return [recipe.error("lora.target_modules", what, "leave it (lm_head) out")]
    return []
