"""What one micro-batch costs a GPU, counted without one: kernels launched, bytes that they read and
write, waits of the processor for the GPU, and logits of whole rows in float32.

    python benchmarks/step_budget.py [--operators] [--json FILE]

The trainer is the real one, around the recipe's model with two and with three layers; each of the
others costs the same again. The batch is real, so that what looks at it takes the branch it takes
in a training; weights and activations have shapes and no data. They lie on the processor, where
autograd runs without a GPU: `on_a_gpu` puts the operators in place that a GPU would be given. No
time is measured. Of a compiled block inductor's kernels are counted, as its scheduler for Triton
fuses them; no code is made of them.

Counted is the first micro-batch of a step: those after it add to gradients that are there, one
launch for each trained tensor. An operator is one kernel that reads its inputs once and writes its
results once, `_KERNELS` apart: what caches save, and what a kernel reads twice, is not seen.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

RECIPE = "llama2-7b-dolly/lora-bf16-r32"
#: what is written over the recipe for each stage
STAGES = {
    "padded": ("model.attn_implementation=sdpa",),
    "varlen": (),
    "compiled": ("train.torch_compile=true",),
    "fused": ("model.lora_implementation=fused",),
    "fused, compiled": ("model.lora_implementation=fused", "train.torch_compile=true"),
}
#: nearly equal, so that a padded micro-batch has a mask, and padding counts for nothing
LENGTHS = (1024, 1023, 1022, 1021)
_compile = torch.compile
# operators that launch nothing, beside views
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# those whose value or size the processor must know before it goes on
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_PRODUCTS = ("mm", "bmm", "addmm")
_NARROW = 256  # the ranks of adapters
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # wait where it is by a mask
# kernels of CUDA's, where it is not one: torch's code for the operator
_KERNELS = {
    "nonzero": 3,
    "masked_select": 4,
    "masked_scatter_backward": 4,
    "select_backward": 2,
    "slice_backward": 2,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_varlen_attn": 2,
    "_varlen_attn_backward": 3,
}


@dataclass
class Costs:
    """What was counted.

    Args:
        tokens: of the micro-batch, padding counted.
        products: bytes of matrix products without a narrow side: a GPU computes longer than it
            reads there. They are in `bytes` too.
        logits: the longest tensor of tokens x vocabulary in float32, in tokens.
        waits: where the processor waits.
    """

    tokens: int
    launches: int = 0
    bytes: int = 0
    products: int = 0
    logits: int = 0
    waits: list[str] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_per_token(self) -> float:
        """Bytes for each computed token."""
        return self.bytes / self.tokens

    def plus(self, more: Costs) -> Costs:
        """Return the costs with those of something else."""
        sums = {
            name: getattr(self, name) + getattr(more, name)
            for name in ("launches", "bytes", "products", "operators")
        }
        return replace(self, **sums)

    def with_layers(self, one_more: Costs, layers: int) -> Costs:
        """Return the costs with so many layers more, from those with one more."""

        def number(name: str) -> int:
            less = getattr(self, name)
            return less + layers * (getattr(one_more, name) - less)

        numbers = {name: number(name) for name in ("launches", "bytes", "products")}
        waits = self.waits + layers * one_more.waits[len(self.waits) :]
        each = {
            name: self.operators[name] + layers * (count - self.operators[name])
            for name, count in one_more.operators.items()
        }
        return Costs(
            self.tokens, **numbers, logits=self.logits, waits=waits, operators=Counter(each)
        )

    def launch(self, name: str, moved: int, sizes: Iterable[int], kernels: int = 1) -> None:
        """Count an operator that moves so many bytes.

        Args:
            sizes: of all sides of its tensors.
        """
        self.launches += kernels
        self.bytes += moved
        self.operators[name] += kernels
        self.products += moved if name.startswith(_PRODUCTS) and min(sizes) > _NARROW else 0


class Trace(TorchDispatchMode):
    """Counts the operators that run inside it.

    Args:
        fake: where tensors without data live.
        vocabulary: the width of logits.
    """

    def __init__(self, fake: FakeTensorMode, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.fake, self.vocabulary = fake, vocabulary
        self.costs = Costs(tokens)

    def launch(self, name: str, *tensors: torch.Tensor, kernels: int = 1) -> None:
        """Count what reads or writes these tensors."""
        moved = sum(
            one.element_size()
            * math.prod(size for size, step in zip(one.shape, one.stride(), strict=True) if step)
            for one in tensors
        )
        self.costs.launch(name, moved, [size for one in tensors for size in one.shape], kernels)

    def _wait(self, name: str) -> None:
        """Note where it is waited; in the backward pass no line of Python tells."""
        frames = [
            f"{Path(one.filename).name}:{one.lineno}"
            for one in traceback.extract_stack()
            if not one.filename.startswith((str(HERE), str(Path(torch.__file__).parent)))
        ]
        self.costs.waits.append(f"{name} ({frames[-1]})")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, schema = kwargs or {}, function._schema
        name = schema.name.rpartition("::")[2]
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        masks = [one for one in args[1] if _is_mask(one)] if name in _INDEXING else []
        looks = _WAITING & {*function.tags} and name not in _INDEXING
        if masks or looks or name == "masked_scatter_backward":  # which calls masked_select
            self._wait(name)
        if masks:  # what a GPU makes of it, with the number that the batch tells
            self.launch("nonzero", *masks, kernels=_KERNELS["nonzero"])
            args = (args[0], _positions(args[1]), *args[2:])
        result = self._run(function, name, inputs, args, kwargs)
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if not schema.returns:  # what it writes to
            made = tree_leaves(
                [args[at] for at, one in enumerate(schema.arguments) if one.alias_info]
            )
        views = any(one.alias_info and not one.alias_info.is_write for one in schema.returns)
        if made and not views and name not in _FREE:
            if name.endswith("copy_"):  # what is written over is not read
                inputs = [one for one in tree_leaves(args[1]) if isinstance(one, torch.Tensor)]
            kernels = _of_a_list(made) if "_foreach_" in name else _KERNELS.get(name, 1)
            self.launch(name, *inputs, *made, kernels=kernels)
            for one in made:
                if one.dtype == torch.float32 and one.shape[-1:] == (self.vocabulary,):
                    rows = one.numel() // self.vocabulary
                    self.costs.logits = max(self.costs.logits, rows)
        return result

    def _run(
        self, function: Any, name: str, inputs: Sequence[torch.Tensor], args: Any, kwargs: Any
    ) -> Any:
        """Compute what is known of the batch, and the shape of everything else."""
        if not inputs:  # a new tensor: whole numbers may be of the batch, others are large
            whole = name == "arange" or not (kwargs.get("dtype") or torch.float32).is_floating_point
            with ExitStack() as stack:
                if not whole:
                    stack.enter_context(self.fake)
                return function(*args, **kwargs)
        without_data = any(isinstance(one, FakeTensor) for one in inputs)
        if without_data and name in ("masked_select", "masked_scatter_backward"):
            grad, mask = args[:2]
            found = torch.ops.aten.index.Tensor(grad, _positions([mask]))
            return found if name == "masked_select" else found.new_empty(args[2])
        if without_data and function._schema.is_mutable and not isinstance(inputs[0], FakeTensor):
            return inputs[0]  # a count that activations are added to
        return function(*args, **kwargs)


def _of_a_list(tensors: Sequence[torch.Tensor]) -> int:
    """Return the kernels of an operator on a list and another.

    Source: torch's ATen/native/cuda/MultiTensorApply.cuh: 64 tensors of two lists, or 320 chunks of
        2**16 elements, for each.
    """
    chunks = sum(-(-one.numel() // 2**16) for one in tensors)
    return max(-(-len(tensors) // 64), -(-chunks // 320))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _positions(indices: Sequence[Any]) -> list[Any]:
    """Return indices without masks."""
    found: list[Any] = []
    for one in indices:
        found += one.nonzero().unbind(1) if _is_mask(one) else [one]
    return found


# ---- What a GPU would be given ----


class _Triton:
    """Stands for a Triton kernel, which `kernel[grid](...)` launches."""

    def __init__(self, name: str, launch: Callable[..., None]) -> None:
        self.name, self.launch = name, launch

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            tensors = [one for one in args if isinstance(one, torch.Tensor)]
            self.launch(self.name, *tensors)

        return run


def _dropout(
    values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return torch.ops.aten.native_dropout(values, p, True)[0] if training and p else values


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """The kernel that CUDA takes: flash without a mask, the memory-efficient one with it, which
    gets the mask as numbers.
    """
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -float("inf"))
    bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def on_a_gpu(launch: Callable[..., None]) -> Iterator[None]:
    """Let the trainer of a processor choose what it would choose on a GPU of the Ampere generation
    or newer.

    Args:
        launch: `Trace.launch` of the trace that runs.
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from recipes_lib.config.constraints import VARLEN
    from recipes_lib.training import build, fused_lora, loss, varlen

    def choose_attention(recipe: Any, args: Any, model: Any, half: Any) -> None:
        if recipe.model.attn_implementation in (None, VARLEN):
            varlen.use_varlen(model)

    def addmm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        launch("addmm_float32", total, left, right, total)

    instead = [
        (torch.nn.functional, "dropout", _dropout),
        (torch.nn.functional, "scaled_dot_product_attention", _sdpa),
        (build, "choose_attention", choose_attention),
        (fused_lora, "_has_kernels", lambda x: True),
        (torch, "compile", lambda function, **_: function),  # `_compiled` counts it
        (loss, "gradient_is_made_at_once", lambda device: False),
        (utils, "_use_triton", lambda device: True),
        (chunked_logprob, "_use_triton", lambda device: True),
        (chunked_logprob, "triton", SimpleNamespace(cdiv=lambda size, part: -(-size // part))),
        (chunked_logprob, "_forward_kernel", _Triton("head forward", launch)),
        (chunked_logprob, "_backward_kernel", _Triton("head backward", launch)),
        (chunked_logprob, "_addmm_fp32", addmm),
    ]
    with ExitStack() as stack:
        for where, name, value in instead:
            stack.enter_context(patch.object(where, name, value, create=True))
        yield


# ---- One micro-batch ----


def micro_batch_costs(
    words: Sequence[str],
    config: Mapping[str, Any] | None = None,
    lengths: Sequence[int] = LENGTHS,
    name: str = RECIPE,
) -> Costs:
    """Return what one micro-batch of a recipe costs, forward and backward.

    Args:
        words: what is written over the recipe.
        config: the model's config.json; absent, that of the recipe's model.
        lengths: tokens of the examples, half of which are learnt.
    """
    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.models.known import known_facts

    own = [f"train.per_device_train_batch_size={len(lengths)}", 'train.eval_strategy="no"']
    recipe = load_recipe(name, [*own, *words])
    config = config or known_facts()[recipe.model.name_or_path].config
    (two, block), (three, _) = (
        _traced(recipe, {**config, "num_hidden_layers": count}, lengths) for count in (2, 3)
    )
    layers = int(config["num_hidden_layers"])
    if block is None:
        return two.with_layers(three, layers - 2)
    around = two.with_layers(three, -2)
    return around.with_layers(around.plus(block), layers)


def _traced(
    recipe: Any, config: dict[str, Any], lengths: Sequence[int]
) -> tuple[Costs, Costs | None]:
    """Return the costs of a micro-batch with every operator launched by itself, and those of one
    block where the recipe has blocks compiled.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    traces: list[Trace] = []
    calls: list[tuple[Any, Any, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        on_a_gpu(lambda *args, **kwargs: traces[-1].launch(*args, **kwargs)),
    ):
        trainer, examples = _trainer(recipe, config, lengths, Path(folder))
        if recipe.quantization:  # as TRL does; what makes half precision of 4 bits is not here
            for parameter in trainer.model.parameters():
                parameter.data = parameter.data.bfloat16()
        if trainer.args.activation_checkpointing:  # as its `train` does
            trainer.model.activation_checkpointing_enable()
        model = trainer.accelerator.prepare(trainer.model).train()
        _replace_tensors(model, fake.from_tensor)
        for block in model.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
        batch = trainer.data_collator(examples)
        learnt = (batch["labels"][:, 1:] != -100).sum()
        traces.append(Trace(fake, batch["input_ids"].numel(), config["vocab_size"]))
        with traces[-1]:
            trainer.training_step(model, batch, learnt)
        costs = traces[-1].costs
        compiled = recipe.train.get("torch_compile")
        return costs, _compiled(*calls[1], costs.tokens) if compiled else None


def _compiled(block: Any, args: Any, kwargs: Any, tokens: int) -> Costs:
    """Return the costs of a block, compiled, forward and backward.

    Args:
        args: what the second block is called with; the first has nothing trained before it.
    """
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor import compile_fx, config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    costs = Costs(tokens)

    def count(graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        fake = detect_fake_mode(inputs)
        compile_fx.record_original_output_strides(graph)
        with V.set_fake_mode(fake), DebugContext():
            compile_fx._recursive_post_grad_passes(graph, is_inference=False)
            lowered = GraphLowering(
                graph,
                example_inputs=inputs,
                shape_env=fake.shape_env,
                is_backward=options.get("is_backward", False),
            )
            with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]):
                lowered.run(*inputs)
                lowered._update_scheduler()
                for node in lowered.scheduler.nodes:
                    name = "fused"
                    if isinstance(node, ExternKernelSchedulerNode):
                        called = getattr(node.node, "op_overload", None)
                        name = called._schema.name.rpartition("::")[2] if called else ""
                    if name and not isinstance(node, NopKernelSchedulerNode):
                        moved = node.get_read_write_buffers_sizes()
                        sizes = [
                            int(size)
                            for one in getattr(node.node, "inputs", ())
                            for size in (one.get_size() if name.startswith(_PRODUCTS) else ())
                        ]
                        costs.launch(name, moved, sizes, _KERNELS.get(name, 1))
        results = [
            one.meta["val"] if isinstance(one, torch.fx.Node) else one
            for one in graph.graph.output_node().args[0]
        ]

        def run(_: Any) -> Any:
            return [empty(one) for one in results]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def empty(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return torch.empty(one.shape, dtype=one.dtype)

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=count)

    torch._dynamo.reset()  # what was compiled for another length would make this one a variable
    block = _replace_tensors(block, empty)
    (hidden, *args), kwargs = tree_map(empty, (args, kwargs))
    trace = Trace(FakeTensorMode(), tokens, 0)
    with (
        patch.object(config, "cpu_backend", "triton"),
        patch.object(config, "force_pointwise_cat", True),
        patch.object(post_grad, "is_gpu", lambda _: True),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with trace:  # hooks are not compiled
            for hook in block._forward_pre_hooks.values():
                hook(block, (hidden, *args))
        result = _compile(block.forward, backend=backend)(hidden.requires_grad_(), *args, **kwargs)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    return costs.plus(trace.costs)


def _trainer(
    recipe: Any, config: dict[str, Any], lengths: Sequence[int], folder: Path
) -> tuple[Any, list[dict[str, Any]]]:
    """Return the trainer of a recipe, around a model whose weights nobody has written, and the
    examples of a micro-batch.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from recipes_lib.config.upstream import build_sft_config
    from recipes_lib.core.run_directory import RunDirectory
    from recipes_lib.data.preparation import PreparedData
    from recipes_lib.training.batches import ROW
    from recipes_lib.training.build import build_trainer
    from recipes_lib.training.stopping import StopRequest

    rows = [
        {"input_ids": [1] * size, "labels": [-100] * (size // 2) + [1] * (size - size // 2)}
        for size in lengths
    ]
    ids = [{"example_id": str(number)} for number in range(len(rows))]
    train = Dataset.from_list([row | one for row, one in zip(rows, ids, strict=True)])
    data = PreparedData(train, None, None, {}, {}, fingerprint="", prompt_format_hash="")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.to_empty(device="cpu")  # memory that nobody touches is never taken
    run = RunDirectory("budget", folder)
    args = build_sft_config(recipe, run.checkpoints, world_size=1)
    stop = StopRequest(folder / "STOP")
    trainer = build_trainer(recipe, args, model, tokenizer, data, run, stop, {})
    return trainer, [row | {ROW: number} for number, row in enumerate(rows)]


def _replace_tensors(model: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Put other tensors in place of a model's own."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = make(old).detach()
                module._parameters[name] = torch.nn.Parameter(new, old.requires_grad)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = make(old)
    return model


def main(argv: list[str] | None = None) -> int:
    """Count every stage, print the table, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", action="store_true", help="name the operators too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    from measuring import write_record

    print(f"{RECIPE}, one micro-batch, forward and backward; counted, nothing is measured")
    print(
        "| stage | tokens | launches | MB per token | of these products | waits | float32 logits |"
    )
    print("|---|---|---|---|---|---|---|")
    rows = []
    for stage, words in STAGES.items():
        costs = micro_batch_costs(words)
        moved, products = (one / costs.tokens / 1e6 for one in (costs.bytes, costs.products))
        print(
            f"| {stage} | {costs.tokens:,} | {costs.launches:,} | {moved:.1f} | {products:.1f}"
            f" | {len(costs.waits)} | {costs.logits:,} |",
            flush=True,
        )
        rows.append(
            {
                "stage": stage,
                "tokens": costs.tokens,
                "launches": costs.launches,
                "mb_per_token": moved,
                "waits": costs.waits,
                "float32_logits": costs.logits,
                "operators": dict(costs.operators.most_common()),
            }
        )
    for row in rows:
        print(f"{row['stage']} waits at: {', '.join(row['waits']) or 'nothing'}")
        if options.operators:
            print("  " + ", ".join(f"{name} {count:,}" for name, count in row["operators"].items()))
    if options.json:
        write_record(options.json, {"recipe": RECIPE, "lengths": LENGTHS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
