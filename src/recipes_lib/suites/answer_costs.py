"""What a loaded model costs while it answers on one card: the batch that the engine will take and
its memory, and on a processor the seconds at the measured speeds of `eval_times`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipes_lib.generation.transformers_engine import (
    batch_rows,
    kept_per_token,
    token_bytes_of,
    tokens_with,
)
from recipes_lib.planning.cards import Card
from recipes_lib.planning.memory import CONTEXT_GIB, CPU_PROCESS_GIB, GIB, weight_gib
from recipes_lib.planning.settings import Settings
from recipes_lib.suites.eval_times import (
    GENERATED_TOKENS_PER_SECOND,
    JUDGED_TOKENS_PER_SECOND,
    pace,
)

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

    def memory(self, largest: AnswerBatch, logits: float) -> EvalMemory:
        """Return the memory of the largest batch.

        Args:
            logits: bytes of them.
        """
        shape, width = self.settings.shape, largest.width + largest.steps
        number = 2 if self.half else self.settings.weight_bytes  # bytes of a key or value
        kept = kept_per_token(shape) * largest.rows * width * number
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

    def reading_s(self, tokens: Ends) -> Ends | None:
        """Return the seconds of reading tokens, padding among them; None on a GPU, where no
        evaluation was measured.
        """
        return self._seconds(tokens, JUDGED_TOKENS_PER_SECOND)

    def writing_s(self, tokens: Ends) -> Ends | None:
        """Return the seconds of writing tokens; None on a GPU."""
        return self._seconds(tokens, GENERATED_TOKENS_PER_SECOND)

    def _seconds(self, tokens: Ends, measured: float) -> Ends | None:
        if self.on_gpu:
            return None
        speed = measured * pace(self.settings.shape, self.card)
        return Ends(tokens.low / speed, tokens.high / speed)


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
    while waiting:
        width = waiting[0][0]
        rows = batch_rows(width + max_new_tokens, batch_tokens)
        room = min(max_new_tokens, context - width)
        longest = max(answer for _, answer in waiting[:rows])
        yield AnswerBatch(len(waiting[:rows]), width, min(longest, room))
        waiting = waiting[rows:]


def loss_batches(lengths: Sequence[int], limit: int) -> Iterator[AnswerBatch]:
    """Yield the forward passes over rows whose loss is found, longest first."""
    waiting = sorted(lengths, reverse=True)
    while waiting:
        rows = batch_rows(waiting[0], limit, most=len(waiting))
        yield AnswerBatch(rows, waiting[0], 0)
        waiting = waiting[rows:]
