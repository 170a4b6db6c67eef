"""What autograd keeps of a forward pass, in bytes per token, counted tensor by tensor and held
against `torch.autograd.graph.saved_tensors_hooks` by `tests/planning/test_activations.py`.

Per block: the float32 copy that each RMSNorm takes; queries, keys, values and attention's output;
gate, up and their product in the MLP; and for each LoRA layer its input and its rank-wide output. A
frozen linear layer keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from recipes_lib.models.blocks import Block, Matrix
from recipes_lib.planning.settings import Settings
from recipes_lib.planning.targets import Adapted

# norms that multiply by their weights in float32, and blocks without a norm before attention
_FLOAT_NORMS = ("gemma", "olmo", "cohere", "qwen3_5", "qwen3_next")
_NORMED_BEHIND = {"olmo2", "olmo3", "exaone4"}
# tiles of TRL's fused LM head, and of `training.loss`
CHUNK_VOCABULARY, CHUNK_TOKENS, CPU_TILE = 32768, 4096, 128
CHUNK = 64  # tokens of a chunk of linear attention


@dataclass(frozen=True)
class Kept:
    """Bytes of blocks for each token: by itself, for each token of its row (sdpa's masks), and of a
    row that is filled up to whole chunks; and whatever the tokens: copies of weights that autocast
    made, and experts with their adapter added.
    """

    alone: float
    of_row: float
    chunked: float
    constant: float

    def of(self, tokens: int, row: int) -> float:
        """Return the bytes for so many tokens, padding counted, in rows of `row`."""
        filled = math.ceil(row / CHUNK) * CHUNK / row
        each = self.alone + self.of_row * row + self.chunked * filled
        return tokens * each + self.constant


@dataclass(frozen=True)
class Activations:
    """What stays until the backward pass.

    Args:
        whole: of all blocks, norms and the head's input, without recomputation.
        block: of the largest block, which recomputation brings back for a moment.
        checkpointed: bytes per token when only the inputs of the blocks are kept, and what their
            attention returned where checkpointing is selective.
    """

    whole: Kept
    block: Kept
    checkpointed: float

    @property
    def per_token(self) -> float:
        """Bytes of a token, without what grows with its row."""
        return self.whole.alone + self.whole.chunked

    def saved(self, tokens: int, row: int, checkpointing: bool) -> float:
        """Return the bytes kept of a micro-batch in rows of `row`."""
        return tokens * self.checkpointed if checkpointing else self.whole.of(tokens, row)


def activations_of(settings: Settings) -> Activations:
    """Return what the forward pass of these settings keeps."""
    shape, s, w = settings.shape, settings.compute_bytes, settings.weight_bytes
    adapter = settings.adapter
    # of each RMSNorm its input and the root mean square of each token; and what its weights are
    # multiplied by, where they are trained
    per_norm = 4 if adapter else 8 if shape.family.startswith(_FLOAT_NORMS) else 4 + w
    total, largest = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for layer, targets, count in settings.layers:
        norms = sum(many * (4 + width * per_norm) for many, width in layer.norms)
        kept = norms + _attention(settings, layer) + s * layer.inner + layer.routing
        kept += _linear_inputs(settings, layer, targets)
        before, chunked = _delta(settings, layer)
        for index, number in enumerate((kept + before, _row_bytes(settings, layer), chunked)):
            total[index] += count * number
            largest[index] = max(largest[index], number)
    first = 0.0
    if adapter and not settings.checkpointing:
        # nothing before the first block is trained: its norm and masks are not kept
        noisy = sum(matrix.reads == "attention" for matrix, _ in adapter.targets[0])
        noise = noisy * _noise_bytes(settings)
        first = shape.hidden * (noise if shape.family in _NORMED_BEHIND else 4 + noise)
    # PEFT adds an adapter of experts to their whole parameter, and the sum is kept
    sums = [
        w * sum(matrix.parameters for matrix, _ in layer if matrix.experts)
        for layer in (adapter.targets if adapter else ())
    ]
    # on a CPU the gradient of the head is made beside the loss
    head = 4 + shape.hidden * (per_norm + (w if settings.device == "gpu" else 0))
    attended = sum(
        count * (s * layer.output + 4 * layer.heads) for layer, _, count in settings.layers
    )
    alone, of_row, chunked = total
    constant = _autocast_copies(settings) + sum(sums)
    return Activations(
        whole=Kept(alone - first + head, of_row, chunked, constant),
        block=Kept(largest[0], largest[1], largest[2], max(sums, default=0.0)),
        checkpointed=shape.layers * shape.hidden * w + head + settings.selective * attended,
    )


def reference_per_token(settings: Settings) -> float:
    """Return bytes per token as the meta device shows them: attention by its plain formula without
    what grows with the row, adapters in the base's precision, dropout's mask as a number.
    """
    w, adapter = settings.weight_bytes, settings.adapter
    total = 0.0
    for layer, targets, count in settings.layers:
        norms = sum(many * width for many, width in layer.norms)
        kept = (4 if adapter else 4 + w) * norms + 3 * 4 * layer.query + w * layer.inner
        trained = [matrix for matrix, _ in targets] if adapter else layer.matrices
        each, shared = _widths(trained)
        inputs = w * (2 * each if adapter and adapter.dropout else shared)
        ranks = sum(rank * matrix.active for matrix, rank in targets)
        total += count * (kept + inputs + w * ranks + sum(_delta(settings, layer)))
    return total


def _attention(settings: Settings, layer: Block) -> float:
    """Queries, keys, values and output of one block; a mask repeats keys and values per head."""
    if not layer.heads:
        return 0.0
    eager = settings.attention == "eager"
    repeated = settings.masks(layer)
    keys = layer.query + layer.output if repeated else layer.key + layer.value
    sums = 0 if eager else 4 * layer.heads
    gated = 2 * layer.gate  # the gate after its sigmoid, and what it is multiplied with
    return settings.compute_bytes * (layer.query + layer.output + keys + gated) + sums


def _delta(settings: Settings, layer: Block) -> tuple[float, float]:
    """Return the bytes per token that linear attention keeps, of a token and of one of a row in
    whole chunks, in transformers' own torch; kernels of flash-linear-attention keep less.
    """
    if layer.delta is None:
        return 0.0, 0.0
    s, heads = settings.compute_bytes, layer.delta.heads
    key, value, within = layer.delta.key, layer.delta.value, heads * CHUNK
    weights = 0 if settings.adapter else s * value + 4 * heads  # of its norm and its decay
    kept = 2 * s * layer.delta.convolved + heads * (s + 4) + 8 * (key + heads)
    kept += 12 * value + s * value + 4 * heads + weights
    # beta, decays and what they multiply, in float32; the system of a chunk and its two solutions
    chunked: float = 4 * (4 * heads + 4 * key + 2 * value + 2 * within)
    # products of keys with keys and with queries, and what they are multiplied with
    chunked += s * (4 * key + 2 * within)
    # from chunk to chunk: the state and its copies, and copies for the products
    casts = 2 * s if settings.half else 0
    chunked += (4 + casts) * layer.state / CHUNK + s * (3 * key + 2 * value + within)
    return kept, chunked


def _row_bytes(settings: Settings, layer: Block) -> float:
    """Bytes for each token of a row, per token: sdpa's mask, one copy per block; the scores of all
    heads where attention is written out.
    """
    s, family = settings.compute_bytes, settings.shape.family
    if not layer.heads or not settings.masks(layer):
        return 0.0
    if settings.attention != "eager":
        return s
    if family == "gpt_oss":  # softmax in the precision of the scores
        return layer.heads * s
    scores = s if s == 4 else s + 4
    return layer.heads * (scores + s if family == "gemma2" else scores)


def _widths(matrices: Iterable[Matrix]) -> tuple[int, int]:
    """Return the numbers that matrices read of a token, and those where each input counts once."""
    widths = [(one.reads, one.inputs * one.active) for one in matrices]
    return sum(width for _, width in widths), sum(dict(widths).values())


def _linear_inputs(settings: Settings, layer: Block, targets: Adapted) -> float:
    """Inputs of linear layers that something is trained in, and outputs of LoRA's first matrix."""
    s, adapter = settings.compute_bytes, settings.adapter
    casts = settings.half is not None and settings.weight_bytes != 2
    # example by example, and put together again; else attention's output is kept already
    copied = settings.attention == "documents"
    trained = [matrix for matrix, _ in targets] if adapter else layer.matrices
    kept, shared = _widths([one for one in trained if copied or one.reads != "output"])
    if adapter is None:
        # each layer casts its own copy; what attention and MLP made is in the autocast type already
        return s * (kept if casts else shared)
    ranks = s * sum(rank for one, rank in targets if not one.experts)
    widths, _ = _widths(trained)
    if noise := _noise_bytes(settings):
        return ranks + widths * (s + noise)
    other_half = settings.weight_bytes == 2 and settings.half not in (None, settings.dtype)
    if settings.trained_bytes == s and not casts and not other_half:
        widths = shared
    # else cast to the adapter's type and back: a copy for each layer
    return ranks + s * widths


def _noise_bytes(settings: Settings) -> int:
    """Bytes per element of dropout's mask: CUDA's kernel keeps booleans, the CPU's a number of the
    adapter's type.
    """
    if settings.adapter is None or not settings.adapter.dropout:
        return 0
    return 1 if settings.device == "gpu" else settings.trained_bytes


def _autocast_copies(settings: Settings) -> float:
    """Half-precision copies of float32 weights that the backward pass needs."""
    if settings.half is None:
        return 0.0
    cast = settings.weight_bytes != 2 and not settings.bits
    copies = settings.shape.linear_parameters if cast else 0
    if settings.adapter is not None and settings.trained_bytes != 2:
        copies += settings.trained_parameters - settings.adapter.extra_parameters
    return 2.0 * copies


def head_bytes(settings: Settings, tokens: int) -> float:
    """Return what the fused LM head takes for a moment: one tile of logits, and in float32 the
    gradient of its input and, in full fine-tuning (under FSDP2 see `memory`), its own.
    """
    shape, rows = settings.shape, tokens
    if settings.adapter is None and not settings.sharded:
        rows += shape.vocabulary
    if settings.device == "cpu":
        tile = CPU_TILE * shape.vocabulary * (settings.compute_bytes + 8)
    else:
        tile = min(tokens, CHUNK_TOKENS) * CHUNK_VOCABULARY * settings.compute_bytes
    return tile + 4 * rows * shape.hidden


def backward_bytes(settings: Settings, tokens: int) -> float:
    """Return the gradients that are alive at once inside one block: of the MLP's inner tensors, the
    residual stream, and adapted experts as a whole, in the weights' precision and the adapter's.
    """
    shape, adapter = settings.shape, settings.adapter
    inner = settings.compute_bytes * max(block.inner for block, _ in shape.kinds)
    experts = max(
        (
            matrix.parameters
            for layer in (adapter.targets if adapter else ())
            for matrix, _ in layer
            if matrix.experts
        ),
        default=0,
    )
    whole = experts * (settings.weight_bytes + settings.trained_bytes)
    return tokens * (inner + (4 + 2 * settings.weight_bytes) * shape.hidden) + whole
