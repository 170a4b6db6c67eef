"""How long writing answers takes, and the time of an evaluation as a plan shows it
(`suites.eval_times` computes it).

Writing is bound by reading the weights once per token and batch (and, in transformers, by launching
each block's kernels); an OpenAI-compatible server does the same with its own batching. On a CPU it
follows what was measured with SmolLM2-135M. Lengths of answers are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes_lib.models.shapes import ModelShape
from recipes_lib.planning.cards import Card
from recipes_lib.planning.duration import BANDWIDTH_REACHED
from recipes_lib.planning.machine import (
    GENERATED_TOKENS_PER_SECOND,
    MEASURED_PARAMETERS,
    two_threads_tflops,
)

NUM_QUESTIONS = {"alpaca_eval": 805, "mt_bench": 80}
ANSWER_SHARE = 0.45  # of max_new_tokens, on average
LAYER_TOKEN_S = 0.6e-3  # one block of transformers' generate per token
SERVER_LAYER_TOKEN_S = 0.05e-3


@dataclass(frozen=True)
class EvalTime:
    """Seconds of one evaluation of one model.

    Args:
        answering: the model's own work.
        judging: the judge's.
        unknown: tasks whose size is not known; they are not in the sum.
        remote: whether the judge stands behind a URL: its card is not this one's.
    """

    name: str
    answering: float
    judging: float
    unknown: tuple[str, ...] = ()
    remote: bool = False

    @property
    def total(self) -> float:
        """Everything."""
        return self.answering + self.judging


def writing_seconds(
    shape: ModelShape, card: Card, answers: int, mean: float, most: int, batch: int, server: bool
) -> float:
    """Seconds to write answers; a batch of transformers' generate goes on to its longest answer, a
    server refills its batch.
    """
    if card.name == "cpu":
        return answers * mean / (GENERATED_TOKENS_PER_SECOND * pace(shape, card))
    reading = 2 * shape.active_parameters / (card.bandwidth * 1e9 * BANDWIDTH_REACHED)
    if server:
        return answers * mean / 16 * (reading + shape.layers * SERVER_LAYER_TOKEN_S)
    return -(-answers // batch) * min(most, 1.8 * mean) * (reading + shape.layers * LAYER_TOKEN_S)


def pace(shape: ModelShape, card: Card) -> float:
    """How much faster than in the measurement this processor reads and writes: against its two
    threads, and its model's size.
    """
    return MEASURED_PARAMETERS / shape.parameters * card.tflops / two_threads_tflops()
