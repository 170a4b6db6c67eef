"""Real prompts to compare logits on, and what the trained model answered to some of them at the end
of its training.

`weights_check.json` lies beside the weights: the tokens of a few validation rows, the most likely
next token at each position and its logit, the weights' hashes and the base's. With it a later
process can tell whether a folder still holds what was trained, also after the data has gone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.training.base_identity import base_fingerprint, weight_hashes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from recipes_lib.config.recipe import Recipe
    from recipes_lib.training.trained import TrainedRun

CHECK_FILE = "weights_check.json"
NUM_PROMPTS, MAX_TOKENS, MIN_TOKENS = 8, 128, 16
MAX_LOGITS = 2**26  # values of one comparison: 256 MiB in float32
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write three short tips for someone who starts a new job.",
    "What is the capital of Australia, and why is it not Sydney?",
    "List the steps to make a cup of tea.",
)


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare models on, and where they come from."""

    rows: list[list[int]]
    source: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))

    def __str__(self) -> str:
        return f"{len(self.rows)} {self.source} ({self.num_tokens} tokens)"


@dataclass(frozen=True)
class RecordedCheck:
    """What was recorded beside the weights when they were trained."""

    tokens: list[list[int]]
    top_tokens: list[int]
    top_logits: list[float]
    largest_logit: float
    autocast: str | None
    base_fingerprint: str | None
    sha256: dict[str, str]


def record_check(
    folder: Path,
    recipe: Recipe,
    probes: list[list[int]],
    logits: torch.Tensor,
    autocast: str | None,
) -> None:
    """Write `weights_check.json` into a folder of weights.

    Args:
        folder: the saved weights.
        recipe: the run's recipe, for its base.
        probes: token ids of real rows.
        logits: the trained model's on all of them, shape (sum of lengths, vocabulary).
        autocast: the half precision the logits were computed in, or None.
    """
    top = logits.float().max(dim=-1)
    record = RecordedCheck(
        tokens=[list(map(int, probe)) for probe in probes],
        top_tokens=top.indices.tolist(),
        top_logits=[round(value, 5) for value in top.values.tolist()],
        largest_logit=float(logits.abs().max()),
        autocast=autocast,
        base_fingerprint=base_fingerprint(recipe),
        sha256=weight_hashes(folder),
    )
    write_text(folder / CHECK_FILE, json.dumps(record.__dict__) + "\n")


def read_check(folder: Path) -> RecordedCheck | None:
    """Return what `record_check` wrote, or None for weights of a version that recorded nothing."""
    record = read_object(folder / CHECK_FILE)
    try:
        return RecordedCheck(**record) if record else None
    except TypeError:
        raise DamagedFile(
            "is not what was recorded at the end of the training", file=folder / CHECK_FILE
        ) from None


def real_prompts(
    trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, count: int = NUM_PROMPTS
) -> Prompts:
    """Return prompts of the run's own kind: validation rows, prepared as its recipe says.

    Where the data is not there any more they are the rows that were recorded beside the weights,
    and without those four questions in the recipe's prompt format.

    Args:
        trained: a finished run.
        tokenizer: the run's.
        count: number of rows.
    """
    limit = min(MAX_TOKENS, max(MIN_TOKENS, MAX_LOGITS // (max(count, 1) * len(tokenizer))))
    try:
        return _validation_rows(trained, tokenizer, count, limit)
    except (RecipesError, OSError, ConnectionError):
        recorded = read_check(trained.weights)
        if recorded is not None:
            return Prompts(
                [ids[:limit] for ids in recorded.tokens],
                "recorded validation rows; the data is not readable now",
            )
        return _questions(trained, tokenizer, limit)


def _validation_rows(trained: TrainedRun, tokenizer: Any, count: int, limit: int) -> Prompts:
    from recipes_lib.data.preparation import prepare_data

    data = prepare_data(trained.recipe, tokenizer)
    rows = data.validation if data.validation is not None else data.train
    kind = (
        "validation rows"
        if data.validation is not None
        else "training rows; the run has no validation rows"
    )
    return Prompts([list(ids[:limit]) for ids in rows[:count]["input_ids"]], kind)


def _questions(trained: TrainedRun, tokenizer: Any, limit: int) -> Prompts:
    from recipes_lib.data.supervision import prompt_ids

    section = trained.prompt_section
    texts = [generation_prompt(section, tokenizer, instruction=question) for question in QUESTIONS]
    return Prompts(
        [prompt_ids(section, tokenizer, text)[:limit] for text in texts],
        "general questions; the data is not readable now",
    )
