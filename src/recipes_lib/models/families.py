"""What particular families need beyond the common path, in one table with reasons and sources; and
a model without its weights.
"""

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.files import read_object, read_rows
from recipes_lib.core.project import project_root

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The needs of one family."""

    left_out: tuple[str, ...] = ()  # last names of modules that take no adapter
    because: str = ""
    without_adapter: tuple[str, ...] = ()  # parts whose layers take none, named by a user or not
    images: tuple[str, ...] = ()  # parts that text gives no gradient, and that are not trained
    auto_class: str = "AutoModelForCausalLM"  # of transformers, which loads the model for text


_READS_WEIGHT = "the layer's kernel reads the weights directly, bypassing an adapter"
# transformers 5.24 modeling_mamba.py: mamba_inner_fn(x_proj.weight, dt_proj.weight,
# out_proj.weight); modeling_mamba2.py: mamba_split_conv1d_scan_combined(outproj_weight=...); peft
# 0.21 _check_lora_target_modules_mamba forbids them for some of these
_MAMBA_1 = Architecture(left_out=("out_proj", "x_proj", "dt_proj"), because=_READS_WEIGHT)
_MAMBA_2 = Architecture(left_out=("out_proj",), because=_READS_WEIGHT)
# transformers 5.24 modeling_llama4.py: Llama4Router; modeling_phimoe.py: PhimoeTopKRouter
_ROUTED = Architecture(left_out=("router",), because="it returns tensors, a LoRA layer one")
# transformers 5.24 Gemma3Model, Gemma4Model, Mistral3Model; modeling_auto.py has no causal language
# model for Mistral 3; those of Llama 4 and Qwen3.5 do not load what reads images at all
_PROJECTED = ("vision_tower", "multi_modal_projector")
_QWEN = Architecture(images=("visual",))
ARCHITECTURES: dict[str, Architecture] = {
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "jamba": _MAMBA_1,
    "mamba2": _MAMBA_2,
    "bamba": _MAMBA_2,
    "falcon_h1": _MAMBA_2,
    "nemotron_h": _MAMBA_2,
    "zamba2": _MAMBA_2,
    "granitemoehybrid": _MAMBA_2,
    "llama4_text": _ROUTED,
    "phimoe": _ROUTED,
    "llama4": replace(_ROUTED, images=("vision_model", "multi_modal_projector")),
    "gemma3": Architecture(images=_PROJECTED),
    "gemma4": Architecture(images=("vision_tower", "embed_vision", "audio_tower", "embed_audio")),
    "mistral3": Architecture(images=_PROJECTED, auto_class="AutoModelForImageTextToText"),
    # transformers 5.24 conversion_mapping.py renames by "mlp.shared_expert.", whose last dot
    # matches the "s" of a name that is right already: PEFT would load no adapter of these layers
    "laguna": Architecture(without_adapter=("shared_experts",)),
    # transformers 5.24 modeling_deepseek_v4.py: DeepseekV4GroupedLinear
    "deepseek_v4": Architecture(
        left_out=("o_a_proj",),
        because="it multiplies its inputs group by group, a LoRA layer does not",
    ),
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
}
_NO_VARLEN = ("attention_dropout", "attn_pdrop", "attn_logit_softcapping", "v_head_dim")
# layers that know where one example of a row ends; chunks of attention do not
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
FUSED_EXPERTS = "experts in one tensor, while bitsandbytes quantizes linear layers"
# peft 0.21 puts it into all-linear where experts became parameters: it was a linear layer once
ROUTER = "gate.weight"
_LOGITS_CHANGED_BY = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)
_TRAINING_ONLY = ("output_router_logits", "router_aux_loss_coef", "use_cache")


def needs_of(model_type: str) -> Architecture:
    """Return what a model's architecture needs beyond the common path."""
    return ARCHITECTURES.get(model_type, Architecture())


def language_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Return names and modules, those that read images left out."""
    images = set(needs_of(model.config.model_type).images)
    for name, module in model.named_modules():
        if images.isdisjoint(name.split(".")):
            yield name, module


def not_quantized(config: Any) -> list[str]:
    """Return the layers that quantization must leave alone: those whose weight is read by a kernel,
    and those that read images; then the head too, which bitsandbytes spares only without names.
    """
    needs = needs_of(config.model_type)
    left_alone = [rf".*\.{part}" for part in needs.images]
    if needs.because == _READS_WEIGHT:
        left_alone = list(needs.left_out) + left_alone
    return ["lm_head"] + left_alone if left_alone else []


def fused_experts(model: Any) -> int:
    """Return the parameters of experts that stand in one tensor, not in linear layers."""
    experts = 0
    for name, weight in model.named_parameters():
        if ".experts." in name and weight.ndim == 3 and "lora_" not in name:
            experts += weight.numel()
    return experts


# ---- rows, kernels and the head ----


def why_rows_apart(model: Any) -> str | None:
    """Return why several examples must not share a row of this model, as the end of a sentence
    about it; None where they may: attention goes by positions, which begin again with each.
    """
    import torch

    # all layers that carry a state have a convolution over time
    if any(isinstance(module, torch.nn.Conv1d) for _, module in language_modules(model)):
        return "has layers that carry a state from one example of a row into the next"
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if any("compressed" in kind for kind in layer_types):  # DeepSeek-V4: 4 or 128 tokens
        return "compresses tokens into one, without regard to where an example ends"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "takes no positions, and cannot see where an example in a row ends"
    return None


def why_not_varlen(model: Any) -> str | None:
    """Return why torch's variable-length attention does not compute a model, as the end of a
    sentence that begins with the kernel's name; None where it does.
    """
    name = type(model).__name__
    why = why_rows_apart(model)
    if why:
        return f"cannot be used by {name}, which {why}"
    config = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    has_other_heads = any(getattr(config, key, None) for key in _NO_VARLEN)
    if has_other_heads or other_layers or not model._supports_flash_attn:
        return f"needs full or sliding attention in heads of one size, which {name} does not have"
    return None


def has_plain_head(model: Any) -> bool:
    """Return whether a linear layer's products are the logits (Gemma caps, Granite scales them)."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    is_changed = any(getattr(config, name, None) is not None for name in _LOGITS_CHANGED_BY)
    return type(head).__name__ == "Linear" and not (is_changed or hasattr(head, "base_layer"))


# ---- adapters ----


def settle_targets(config: "LoraConfig", model: Any) -> "LoraConfig":
    """Return a LoRA config without what reads images, routers and what takes no adapter."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    settled = copy.deepcopy(config)
    needs = needs_of(model.config.model_type)
    left_out = [rf"{part}\..*" for part in needs.images + needs.without_adapter]
    if config.target_modules == "all-linear":
        convert_peft_config_for_transformers(settled, model, None)  # experts become parameters
        left_out += needs.left_out
        experts = set(settled.target_parameters or ()) - {ROUTER}
        named_by_user = set(config.target_parameters or ())  # the router too
        settled.target_parameters = sorted(experts | named_by_user) or None
    if left_out:
        # PEFT takes one regular expression over whole names, or a list of their ends
        excluded = settled.exclude_modules
        pattern = ""
        if isinstance(excluded, str):
            pattern = f"(?:{excluded})|"
        else:
            left_out = list(map(re.escape, excluded or ())) + left_out
        settled.exclude_modules = rf"{pattern}(?:.*\.)?(?:{'|'.join(left_out)})"
    return settled


def describe_targets(model: Any) -> str:
    """Return which layers, and parameters of experts, of a PEFT model have adapters."""
    names = [f"{name}.weight" for name in model.targeted_module_names]
    names += sorted(model.targeted_parameter_names)
    return f"adapters on {', '.join(dict.fromkeys(map(short_name, names)))}"


def short_name(parameter: str) -> str:
    """Return the layer of a weight, or the parameter of an expert, without its place."""
    parent, key = parameter.replace(".base_layer", "").split(".")[-2:]
    return parent if key == "weight" else f"{parent}.{key}"


# ---- rows for new tokens ----


def add_rows(model: Any, entries: int) -> None:
    """Grow the embeddings of a model to the entries of a tokenizer that has more. `rows_added` of
    the model says by how many. transformers draws the new rows from the distribution of the others;
    here from a seed, so that a base has the same rows in every process that loads it.
    """
    import torch

    weight = model.get_input_embeddings().weight
    missing = entries - weight.shape[0]
    if missing <= 0:
        return
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        model.resize_token_embeddings(entries)
    model.rows_added = missing


def untrained_rows(model: Any, missing: int) -> str | None:
    """Return what a user should know about a model, with its adapter, whose tokenizer has `missing`
    tokens more than the base has rows; None where their rows are trained, or there are none.
    """
    embeddings = model.get_input_embeddings()
    if missing <= 0 or any(weight.requires_grad for weight in embeddings.parameters()):
        return None
    names = []
    for name, module in model.named_modules():
        if module in (embeddings, model.get_output_embeddings()):
            names.append(name.rpartition(".")[2])
    return (
        f"{missing} new tokens have random rows that the adapter does not train: for answers that"
        f" depend on them set lora.modules_to_save: [{', '.join(names)}]"
    )


# ---- what a training changes in a model ----


def prepare_for_training(model: Any) -> None:
    """Give TRL what it looks for in a model: the model without its head, the number of experts.
    Freeze what reads images: processes would wait for gradients that text does not give. Name only
    blocks that are there: accelerate refuses to shard a model whose class lists others.
    """
    from recipes_lib.models import upstream_fixes  # torch, which `recipes check` does without

    images = needs_of(model.config.model_type).images
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = present.intersection(model._no_split_modules or ())
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in images:
            module.requires_grad_(False)
    if not hasattr(model, model.base_model_prefix):  # Llama4ForCausalLM of transformers 5.24
        model.base_model_prefix = "model"
    upstream_fixes.name_experts(model.config.get_text_config())
    upstream_fixes.let_checkpoints_name_layers(model.config.get_text_config())


def adds_router_loss(model: Any, lora: Any) -> bool:
    """Whether the loss that spreads tokens over experts belongs to a training that does not set it:
    where the model's config says so, or routers are trained with all else. TRL 1.16 adds it
    wherever the config has a coefficient, as gpt-oss's beside `output_router_logits: false`.
    """
    config = model.config.get_text_config()
    # a class that may have experts, made without any; Doge has a number of experts all the same
    has_experts = getattr(config, "is_moe", True) and getattr(config, "num_local_experts", True)
    return bool(has_experts) and (not lora or getattr(config, "output_router_logits", False))


def ready_to_answer(model: Any) -> Any:
    """Return a model in eval mode without the loss of its routers, which ends a generation."""
    model.config.get_text_config().output_router_logits = False
    return model.eval()


def training_settings(model: Any) -> dict[str, object]:
    """Return the values of a config that a trainer changes for itself."""
    config = model.config.get_text_config()
    return {name: getattr(config, name) for name in _TRAINING_ONLY if hasattr(config, name)}


# ---- a model without its weights ----


def known_config(name: str) -> Any:
    """Return the configuration of a model that people fine-tune (`recipes/` shipped and of the
    working directory: each `model.json`, and `models.jsonl`); else None.
    """
    import transformers

    for folder in (project_root() / "recipes", Path("recipes")):
        models = [read_object(file) for file in sorted(folder.glob("*/model.json"))]
        models += read_rows(folder / "models.jsonl")
        for model in reversed(models):  # a later line replaces an earlier one of its name
            if name in model["names"]:
                values = model["config"]
                return transformers.AutoConfig.for_model(values.pop("model_type", ""), **values)
    return None


def on_meta(
    config: Any, dtype: "torch.dtype", lora: "LoraConfig | None" = None, attention: str = "eager"
) -> Any:
    """Return the model that a recipe trains, without weights; ValueError where it cannot be."""
    import peft
    import torch
    import transformers

    loader = getattr(transformers, needs_of(config.model_type).auto_class)
    config = copy.deepcopy(config)  # transformers writes into it
    with torch.device("meta"):
        model = loader.from_config(config, dtype=dtype, attn_implementation=attention)
        prepare_for_training(model)
        if lora is None:
            return model
        lora = settle_targets(lora, model)
        lora.init_lora_weights = True
        return peft.get_peft_model(model, lora)


def text_decoder(model: Any) -> "torch.nn.Module":
    """Return the part of a model that reads text, without its head."""
    if hasattr(model, "get_base_model"):  # PEFT's
        model = model.get_base_model()
    decoder = model.get_decoder()
    if not hasattr(decoder, "get_output_embeddings"):
        # ModernBertDecoderForCausalLM has a linear layer of this name before its head
        return getattr(model, model.base_model_prefix)
    if decoder.get_output_embeddings() is not None:  # Llama 4 returns a model with its head
        return decoder.model
    return decoder


def layers(model: Any) -> "list[torch.nn.Module]":
    """Return the blocks of a model's text part, in their order."""
    parts = text_decoder(model).modules()
    return list(next(part for part in parts if type(part).__name__ == "ModuleList"))
