"""Ways around bugs of torch 2.13, transformers 5.24, trl 1.16, peft 0.21, accelerate 1.15, each
with its place upstream. One is deleted when its test (test_upstream_fixes.py) passes without it.
"""

import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, save_and_load
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import configuration_utils

_embedding_layer_name = save_and_load.get_embedding_layer_name


def prepare_head(model: Any, *, sharded: bool) -> None:
    """Let the loss read the weight of a head that PEFT has wrapped.

    TRL's fused head (trl/trainer/utils.py) reads `lm_head.bias`, which PEFT's wrapper of trained
    tokens does not have (`lora.trainable_token_indices` on tied embeddings). Under FSDP2 nothing
    calls and gathers a trained head (`lora.modules_to_save`), and the gradient of its
    `full_tensor()` would be each rank's own. Delete when TRL calls the head.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None

    def gather(*_: Any) -> None:
        head = model.get_output_embeddings()
        is_trained = any(weight.requires_grad for weight in head.parameters())
        if isinstance(head, FSDPModule) and is_trained:
            head.unshard()

    if sharded:
        model.base_model.register_forward_hook(gather)


def save_new_rows(model: Any) -> None:
    """Have an adapter on a base with new rows (`add_rows`) saved with the embeddings, once.

    peft 0.21 (utils/save_and_load.py: `get_peft_model_state_dict`) finds out that a base has new
    rows by reading its config again: not without a network, and not where the config is inside
    another. It also writes embeddings of `lora.modules_to_save` three times, and those of tied
    `lora.trainable_token_indices` twice, some under names that it cannot read. Delete when neither
    is so.
    """
    if not getattr(model, "rows_added", 0):
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=True)
    save_and_load.get_embedding_layer_name = _name_unless_saved


def _name_unless_saved(model: Any, layer: Any, *options: Any) -> str | None:
    is_trained_whole = isinstance(layer, ModulesToSaveWrapper)
    has_twin = isinstance(layer, TrainableTokensWrapper) and layer.token_adapter.tied_adapter
    if is_trained_whole or has_twin:
        return None  # the file has it already
    return _embedding_layer_name(model, layer, *options)


def reduce_in_float32(accelerator: Any) -> None:
    """Have FSDP2 sum gradients in float32, and leave the layers' outputs and the loss as they are:
    accelerate's `set_mixed_precision` casts all to the autocast type. Delete when a launch can set
    the policy's types one by one.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, torch.float32)


def reshard(model: torch.nn.Module) -> None:
    """Let go of what a validation gathered, before loading shards. Delete when the Trainer does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def restore_precision(model: torch.nn.Module, before: Mapping[str, torch.dtype]) -> None:
    """Give trained weights the precision they had before they were loaded: PEFT's `load_adapter`
    makes every adapter float32 (https://github.com/huggingface/peft/pull/1706). Delete when
    transformers' Trainer passes `autocast_adapter_dtype=False`.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])


def load_whole(model: Any, folder: Path) -> None:
    """Load what transformers' Trainer left out when it loaded a fully trained model's checkpoint by
    names: it passes over experts, one parameter in memory and a matrix each in the file. A model
    whose tensors are all in the file was loaded, and is not read again. Delete with
    https://github.com/huggingface/transformers/issues/48805.
    """
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:  # reads its header only
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                shapes[name] = tensors.get_slice(name).get_shape()
    by_name = model.state_dict(keep_vars=True)
    loaded = set()
    for name, tensor in by_name.items():
        if shapes.get(name) == list(tensor.shape):
            loaded.add(id(tensor))
    # of tied tensors a file has one name, under which all are loaded
    if all(id(tensor) in loaded for tensor in by_name.values()):
        return
    saved = type(model).from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, use_kernels=False
    )
    model.load_state_dict(saved.state_dict())


def tell_empty_parameters_apart(model: torch.nn.Module) -> None:
    """Give parameters without memory addresses of their own: accelerate puts shards into the
    optimizer by the address of what they were made of (since
    https://github.com/huggingface/accelerate/pull/3394), and on the meta device all have address 0,
    so that every rank but the first would train one parameter only. Delete when it goes by names.
    """
    for number, parameter in enumerate(model.parameters(), 1):
        if parameter.is_meta:
            address = functools.partial(int, -number)
            setattr(parameter, "data_ptr", address)  # noqa: B010


def let_fsdp_run_on_cpus() -> None:
    """Let accelerate shard over CPU processes: it turns `distributed_type` into FSDP only for
    accelerators, so that under gloo an FSDP config silently becomes DDP. Delete when its
    `AcceleratorState` does so for MULTI_CPU; until then its `_mixed_precision` and `_shared_state`
    are used here.
    """
    original = state.AcceleratorState.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        first_time = state.AcceleratorState._shared_state == {}
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if not first_time or plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
            return
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin
        # one spelling of the device: some checks compare "cpu" with "cpu:0" and refuse
        self.device = torch.device("cpu")
        state.PartialState._shared_state.update(
            device=self.device, distributed_type=DistributedType.FSDP
        )

    state.AcceleratorState.__init__ = initialise


def name_experts(config: Any) -> None:
    """Let trl 1.16's `add_fused_lm_head` find the number of experts, which it reads as
    `num_experts` (https://github.com/huggingface/trl/issues/5754). On the class, because an entry
    of the config would be saved with the model. Delete when Granite's configs have it.
    """
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        type(config).num_experts = property(operator.attrgetter("num_local_experts"))


def let_checkpoints_name_layers(config: Any) -> None:
    """Let the Trainer of transformers 5.24 read the config of a full checkpoint, whose kinds of
    layers it holds against a fixed list: DeepSeek-V4's "hash_moe" and "moe" are not in it. Delete
    when it reads the config with the class of the model.
    """
    for kind in getattr(config, "mlp_layer_types", None) or ():
        if kind not in configuration_utils.ALLOWED_MLP_LAYER_TYPES:
            configuration_utils.ALLOWED_MLP_LAYER_TYPES += (kind,)
