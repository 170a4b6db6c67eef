"""What a GPU would keep for the backward pass, against the plan, without a GPU: the forward pass of
Llama-2-7B's blocks through the shapes and types of the CUDA kernels (fake tensors: nothing is
computed, no memory is taken), live bytes at its end.

    python benchmarks/cuda_shapes.py [--layers 4] [--json benchmarks/results/cuda_shapes.json]

It needs a build of torch for CUDA, transformers and PEFT, and no GPU. Not seen this way: the
backward pass, the loss, the allocator's gaps.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
TOKENS, DTYPE = 4096, torch.bfloat16
#: name -> rows, LoRA's dropout (None: full fine-tuning), checkpointing
CASES: dict[str, tuple[int, float | None, bool]] = {
    "LoRA, padding-free": (1, 0.05, False),
    "LoRA, padding-free, dropout 0": (1, 0.0, False),
    "LoRA, padded": (4, 0.05, False),
    "LoRA, padded, dropout 0": (4, 0.0, False),
    "LoRA, checkpointing": (1, 0.05, True),
    "full": (1, None, False),
    "full, checkpointing": (1, None, True),
}


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive, those known before left out."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return result

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.sizes.values())


def register_kernels() -> None:
    """Attention that calls the kernels a GPU would choose: without one, sdpa itself would take the
    plain formula.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> Any:
        kernels = torch.ops.aten
        if mask is None:
            out = kernels._scaled_dot_product_flash_attention(
                query, key, value, 0.0, True, scale=scaling
            )[0]
        else:
            bias = (
                torch.zeros_like(mask, dtype=query.dtype)
                .masked_fill(~mask, -1e9)
                .expand(-1, query.shape[1], -1, -1)
            )
            out = kernels._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, 0.0, False, scale=scaling
            )[0]
        return out.transpose(1, 2).contiguous(), None

    for name, mask in {"causal_kernel": lambda *_, **__: None, "masked_kernel": sdpa_mask}.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)


def on_fake_gpu(model: Any) -> None:
    """Replace a model's meta weights by fake ones on a GPU; to be called inside a
    FakeTensorMode.
    """
    for module in model.modules():
        for kind, make in (
            (module._parameters, torch.nn.Parameter),
            (module._buffers, lambda tensor, _: tensor),
        ):
            for name, old in list(kind.items()):
                if old is not None:
                    kind[name] = make(
                        torch.empty(old.shape, dtype=old.dtype, device="cuda"), old.requires_grad
                    )


def build_model(config: dict[str, Any], dropout: float | None) -> Any:
    """Return Llama in bf16 on the meta device, with adapters in float32 on every linear layer.

    Args:
        dropout: LoRA's; None for no adapter.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).to(DTYPE)
        if dropout is None:
            return model.train()
        lora = LoraConfig(
            r=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def kept_bytes(
    config: dict[str, Any], rows: int, dropout: float | None, checkpointing: bool
) -> int:
    """Return the bytes alive after the forward pass of the blocks in bf16, under autocast, that the
    model did not hold before.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = build_model(config, dropout)
    base = model if dropout is None else model.get_base_model()
    base.set_attn_implementation("causal_kernel" if rows == 1 else "masked_kernel")
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_fake_gpu(model)
        ids = torch.zeros((rows, TOKENS // rows), dtype=torch.long, device="cuda")
        extra = (
            {"position_ids": ids.clone()} if rows == 1 else {"attention_mask": torch.ones_like(ids)}
        )
        live = LiveBytes([*model.parameters(), *model.buffers(), ids, *extra.values()])
        # torch.autocast would switch itself off where no GPU answers
        torch.set_autocast_dtype("cuda", DTYPE)
        torch.set_autocast_enabled("cuda", True)
        try:
            with live:
                hidden = base.model(ids, use_cache=False, **extra).last_hidden_state
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        return live.total if hidden.requires_grad else 0


def planned_bytes(
    config: dict[str, Any], rows: int, dropout: float | None, checkpointing: bool
) -> float:
    """Return the plan's figure for the same."""
    from recipes_lib.config.launch import plan_launch
    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.models.shapes import shape_of_config
    from recipes_lib.planning.activations import activations_of
    from recipes_lib.planning.settings import settings_of

    name = "full-bf16" if dropout is None else "lora-bf16-r32"
    words = [f"train.activation_checkpointing={str(checkpointing).lower()}"]
    words += [f"model.attn_implementation={'varlen' if rows == 1 else 'sdpa'}"]
    words += [] if dropout is None else [f"lora.lora_dropout={dropout}"]
    recipe = load_recipe(f"llama2-7b-dolly/{name}", words)
    launch = plan_launch(recipe.launch, "single_gpu", gpus=1)
    shape = shape_of_config({"model_type": "llama", **config}, "benchmark")
    settings = settings_of(recipe, launch, shape, on_cpu=False)
    return activations_of(settings).saved(TOKENS, TOKENS // rows, checkpointing)


def main(argv: list[str] | None = None) -> int:
    """Count, print the table, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="blocks of Llama-2-7B; each keeps the same"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not torch.backends.cuda.is_built():
        print(
            "this torch is built without CUDA, so it does not know what CUDA's kernels keep: take a"
            " CUDA build (no GPU is needed)",
            file=sys.stderr,
        )
        return 5
    from gpu_check import LLAMA_2_7B
    from measuring import write_record

    register_kernels()
    config, rows = LLAMA_2_7B | {"num_hidden_layers": options.layers}, []
    print("| case | kept GiB | plan GiB | plan / kept |\n|---|---|---|---|")
    for name, case in CASES.items():
        kept, planned = kept_bytes(config, *case), planned_bytes(config, *case)
        rows.append({"case": name, "kept_gib": kept / 2**30, "planned_gib": planned / 2**30})
        print(
            f"| {name} | {kept / 2**30:.3f} | {planned / 2**30:.3f} | {planned / kept:.3f} |",
            flush=True,
        )
    if options.json:
        write_record(options.json, {"layers": options.layers, "tokens": TOKENS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
