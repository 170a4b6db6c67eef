"""What a loaded model costs while it answers on one card: the batch that the engine will take, the
memory of that batch, and the seconds it reads and writes. No torch.

A step of writing is one forward pass for one token of each row: the weights pass through memory
once, with the keys and values of all rows, and no step is shorter than its kernels take to be
launched. `tests/suites/test_answer_costs.py` holds the kernels to a trace of the engine. On a
processor the speeds are the measured ones of `eval_times`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from recipes_lib.generation.transformers_engine import (
    batches,
    kept_per_token,
    token_bytes_of,
    tokens_with,
)
from recipes_lib.models.blocks import Block
from recipes_lib.planning.cards import Card
from recipes_lib.planning.duration import (
    BANDWIDTH_REACHED,
    LAUNCH_S,
    PRODUCTS_REACHED,
    READ_GIB_PER_S,
    START_S,
)
from recipes_lib.planning.memory import CONTEXT_GIB, CPU_PROCESS_GIB, GIB, weight_gib
from recipes_lib.planning.settings import Settings
from recipes_lib.suites.eval_times import (
    EVAL_START_S,
    GENERATED_TOKENS_PER_SECOND,
    JUDGED_TOKENS_PER_SECOND,
    pace,
)

# Kernels of a step, counted in a trace of the engine over a model like Llama, prompts of several
# lengths. By the precision of weights and products: as they are in half precision, as they are in
# float32, and float32 weights under autocast, which casts each of them in every step.
_HALF, _FULL, _CAST = (43, 59), (39, 54), (51, 56)  # of a block; around the blocks
_NORM_KERNELS = 8  # each further norm of a block
_DRAWING, _NUCLEUS = 5, 6  # a sampled answer, and with top_p; one more for each row
_DEQUANTISING = 3  # of a 4-bit matrix: scales of scales, scales, weights
# bytes of each row for each entry of the vocabulary: logits as the head makes them and in float32,
# and what a draw keeps beside them
_LOGITS, _DRAWS = 6, 24
# of a row's loss: logits, their copy in float32, their logarithms
_LOSS_LOGITS = 10
_LOSS_TOKENS = {False: 1024, True: 16384}


def loss_tokens(on_gpu: bool) -> int:
    """Return the padded tokens of a forward pass that finds the loss of rows. Their logits in
    float32 take four bytes for each token and entry of the vocabulary.
    """
    return _LOSS_TOKENS[on_gpu]


@dataclass(frozen=True)
class Ends:
    """From the least to the most."""

    low: float
    high: float

    def __add__(self, other: Ends) -> Ends:
        return Ends(self.low + other.low, self.high + other.high)


@dataclass(frozen=True, kw_only=True)
class EvalMemory:
    """GiB on the card at the worst moment.

    Args:
        weights: an adapter's among them.
        kept: keys and values of the largest batch.
        activations: one layer's, while its prompts are read.
        logits: of the vocabulary.
        outside: the CUDA context; on a processor Python with its libraries.
        card: what the card has.
    """

    weights: float
    kept: float
    activations: float
    logits: float
    outside: float
    card: float

    @property
    def needed(self) -> float:
        """All of it."""
        return self.weights + self.kept + self.activations + self.logits + self.outside

    @property
    def fits(self) -> bool:
        """Whether the card has as much."""
        return self.needed <= self.card


@dataclass(frozen=True)
class AnswerBatch:
    """Rows that are answered together.

    Args:
        width: tokens of the longest prompt.
        steps: tokens of the longest answer.
    """

    rows: int
    width: int
    steps: int

    @property
    def middle(self) -> tuple[int, float]:
        """Its rows, and what stands of each when half of the steps are done."""
        return self.rows, self.width + self.steps / 2


@dataclass(frozen=True)
class LoadedModel:
    """A model as it is loaded on one card to answer.

    Args:
        settings: how, on one process.
        half: the autocast type it answers under, None for none: that of a run's training.
    """

    settings: Settings
    card: Card
    half: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it answers on a GPU."""
        return self.settings.device == "gpu"

    @property
    def weights_gib(self) -> float:
        """Its weights, an adapter's among them."""
        adapter = self.settings.adapter
        own = adapter.parameters * self.settings.trained_bytes / GIB if adapter else 0.0
        return weight_gib(self.settings) + own

    @property
    def outside_gib(self) -> float:
        """What stands beside the weights before anything is asked."""
        return CONTEXT_GIB if self.on_gpu else CPU_PROCESS_GIB

    @property
    def free_bytes(self) -> float:
        """What the engine will find free."""
        return max(self.card.memory_gib - self.outside_gib - self.weights_gib, 0.0) * GIB

    def batch_tokens(self, written: int | None) -> int:
        """Return the padded tokens of a batch as the engine takes them.

        Args:
            written: the recipe's own number.
        """
        per_token = token_bytes_of(self.settings.shape, self.settings.weight_bytes)
        return written or tokens_with(per_token, self.free_bytes, self.on_gpu)

    @property
    def start_s(self) -> float:
        """Seconds until it is loaded: imports, and weights from disk."""
        if not self.on_gpu:
            return EVAL_START_S
        return START_S + self.weights_gib / READ_GIB_PER_S

    def memory(self, largest: AnswerBatch, logits: float) -> EvalMemory:
        """Return the memory of the largest batch.

        Args:
            logits: bytes of them.
        """
        shape, width = self.settings.shape, largest.width + largest.steps
        kept = kept_per_token(shape) * largest.rows * width * self._kept_bytes
        whole = token_bytes_of(shape, self.settings.weight_bytes) or 0
        one_layer = whole - kept_per_token(shape) * self.settings.weight_bytes
        return EvalMemory(
            weights=self.weights_gib,
            kept=kept / GIB if largest.steps else 0.0,
            activations=largest.rows * largest.width * one_layer / GIB,
            logits=logits / GIB,
            outside=self.outside_gib,
            card=self.card.memory_gib,
        )

    def answer_logits(self, rows: int, sampled: bool) -> float:
        """Return the bytes of the logits of a step."""
        return rows * self.settings.shape.vocabulary * (_LOGITS + sampled * _DRAWS)

    def loss_logits(self, tokens: int) -> float:
        """Return the bytes of the logits of rows whose loss is found."""
        return tokens * self.settings.shape.vocabulary * _LOSS_LOGITS

    @property
    def _kept_bytes(self) -> int:
        """Bytes of a number of a key or value."""
        return 2 if self.half else self.settings.weight_bytes

    @property
    def _memory_rate(self) -> float:
        """Bytes per second."""
        return self.card.bandwidth * 1e9 * BANDWIDTH_REACHED

    @property
    def _product_rate(self) -> float:
        """Operations per second; float32 goes without the half precision of tensor cores."""
        in_half = self.half or self.settings.weight_bytes == 2
        return self.card.tflops * 1e12 * PRODUCTS_REACHED * (1.0 if in_half else 0.25)

    @cached_property
    def _per_token(self) -> float:
        """Operations of a token in products with weights."""
        adapter = self.settings.adapter
        return 2 * (self.settings.shape.active_parameters + (adapter.parameters if adapter else 0))

    @cached_property
    def _per_pair(self) -> int:
        """Operations of a token for each token it looks at."""
        blocks = self.settings.shape.kinds
        return sum(count * 2 * (block.query + block.output) for block, count in blocks)

    @cached_property
    def _moved(self) -> float:
        """Bytes of the weights that a pass moves: those of linear layers once more where they are
        cast or unpacked for the product; of input embeddings a row.
        """
        settings, shape = self.settings, self.settings.shape
        looked_up = 0 if shape.tied else shape.vocabulary * shape.hidden * settings.weight_bytes
        again = 0.0
        if settings.bits:
            again = 4.0 * shape.linear_parameters
        elif self.half and settings.weight_bytes == 4:
            again = 4.0 * (shape.linear_parameters + shape.embedding_parameters / 2)
        return self.weights_gib * GIB - looked_up + again

    @cached_property
    def kernels(self) -> int:
        """Kernels of a step, greedy."""
        full = self.settings.weight_bytes == 4
        of_block, around = (_CAST if self.half else _FULL) if full else _HALF
        layers = self.settings.layers
        return around + sum(
            count * (of_block + self._further(block) + len(targets) * self._of_adapted)
            for block, targets, count in layers
        )

    def _further(self, block: Block) -> int:
        """Kernels of a block that Llama's has not: norms of queries and keys, 4-bit matrices."""
        unpacked = sum(one.linear for one in block.matrices) if self.settings.bits else 0
        return _NORM_KERNELS * max(len(block.norms) - 2, 0) + _DEQUANTISING * unpacked

    @property
    def _of_adapted(self) -> int:
        """Kernels that an adapter adds to its matrix: casts where it is in another precision."""
        own, base = self.settings.trained_bytes, self.settings.weight_bytes
        if self.half:
            return {(4, 2): 8, (4, 4): 7}.get((own, base), 4)
        return 4 if own == base else 6

    def launched(self, rows: int, sampled: bool, nucleus: bool) -> int:
        """Return the kernels of a step."""
        drawn = (_DRAWING + _NUCLEUS * nucleus + rows) if sampled else 0
        return self.kernels + drawn

    def step_s(
        self, rows: int, filled: float, sampled: bool = False, nucleus: bool = False
    ) -> float:
        """Return the seconds of one step.

        Args:
            rows: answers that are written together.
            filled: tokens of a row that are there.
        """
        if not self.on_gpu:
            speed = GENERATED_TOKENS_PER_SECOND * pace(self.settings.shape, self.card)
            return rows / speed
        operations = rows * (self._per_token + filled * self._per_pair)
        kept = kept_per_token(self.settings.shape) * self._kept_bytes * rows * filled
        seconds = max(operations / self._product_rate, self._moved / self._memory_rate)
        seconds += kept / self._memory_rate
        return max(seconds, self.launched(rows, sampled, nucleus) * LAUNCH_S)

    def bound(self, step: float, kernels: int) -> str:
        """Return what a step of so many seconds waits for."""
        launching = kernels * LAUNCH_S
        return "its launches" if step <= launching else "the card's memory and products"

    def reading_s(self, rows: int, width: int) -> float:
        """Return the seconds of one forward pass over prompts."""
        if not self.on_gpu:
            speed = JUDGED_TOKENS_PER_SECOND * pace(self.settings.shape, self.card)
            return rows * width / speed
        operations = rows * width * (self._per_token + width * self._per_pair)
        seconds = max(operations / self._product_rate, self._moved / self._memory_rate)
        return max(seconds, self.kernels * LAUNCH_S)


def answer_batches(
    prompts: Sequence[int],
    answers: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int,
    context: int,
) -> Iterator[AnswerBatch]:
    """Yield the batches that the engine makes of requests, longest prompts first; prompts that the
    context does not hold are left out, as it leaves them.

    Args:
        prompts: tokens of each.
        answers: tokens that each writes.
        context: the longest sequence of the model.
    """
    pairs = zip(prompts, answers, strict=True)
    waiting = sorted((pair for pair in pairs if pair[0] < context), key=lambda pair: -pair[0])
    for batch in batches(waiting, lambda pair: pair[0] + max_new_tokens, batch_tokens):
        width, longest = batch[0][0], max(answer for _, answer in batch)
        yield AnswerBatch(len(batch), width, min(longest, max_new_tokens, context - width))


def loss_batches(lengths: Sequence[int], limit: int) -> Iterator[AnswerBatch]:
    """Yield the forward passes over rows whose loss is found, longest first."""
    ordered = sorted(lengths, reverse=True)
    for batch in batches(ordered, int, limit, most=len(ordered)):
        yield AnswerBatch(len(batch), batch[0], 0)
