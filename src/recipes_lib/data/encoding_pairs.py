"""From a pair of answers to the tokens of one prompt and of both answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes_lib.data.encoding import IGNORED, Encoded, Supervision, encode
from recipes_lib.data.errors import BadRow
from recipes_lib.data.rows import PAIR, DataRow, answer_row

if TYPE_CHECKING:
    from datasets import Dataset

_TWO_PROMPTS = (
    "the chat template renders the prompt in another way before the rejected answer",
    "choose a template that renders a prompt in one way, whatever follows (data.chat_template)",
)


@dataclass(slots=True)
class EncodedPair:
    """The tokens of a pair."""

    chosen: Encoded
    rejected: Encoded
    prompt_tokens: int  # that both begin with

    @property
    def sides(self) -> list[Encoded]:
        """Both rows of tokens."""
        return [self.chosen, self.rejected]

    @property
    def supervised(self) -> int:
        """Number of tokens of the shorter answer."""
        return min(side.supervised for side in self.sides)

    @property
    def tokens_before(self) -> int:
        """Of the longer row, before truncation."""
        return max(side.tokens_before for side in self.sides)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The prompt, and each answer to its last token with loss."""
        columns = {"prompt_ids": self.chosen.ids[: self.prompt_tokens]}
        for name, side in zip(PAIR, self.sides, strict=True):
            end = int(np.flatnonzero(side.labels != IGNORED)[-1]) + 1
            columns[f"{name}_ids"] = side.ids[self.prompt_tokens : end]
        return columns

    @property
    def lengths(self) -> dict[str, int]:
        """How many tokens the audit counts, by title."""
        return {name.removesuffix("_ids"): len(ids) for name, ids in self.columns.items()}


def encode_pair(
    row: DataRow, settings: Supervision, tokenizer: Any, template: str | None = None
) -> EncodedPair:
    """Tokenise each answer behind the prompt as a row of its own, as in SFT with loss on the last
    turn; a `BadRow` says why the pair cannot be used.
    """
    chosen, rejected = (
        encode(answer_row(row, name), settings, tokenizer, template) for name in PAIR
    )
    starts = []
    for side in (chosen, rejected):
        if not side.supervised:
            what = f"train.max_length: {settings.max_length} leaves no token of an answer"
            hint = "raise train.max_length, or set data.filters.max_tokens"
            raise BadRow(f"{what}: the prompt has {side.prompt_tokens}", hint)
        starts.append(int(np.flatnonzero(side.labels != IGNORED)[0]))
    # a token across the border to an answer, where one has it, is part of both answers
    pair = EncodedPair(chosen, rejected, prompt_tokens=min(starts))
    start = pair.prompt_tokens
    if not np.array_equal(chosen.ids[:start], rejected.ids[:start]):
        raise BadRow(*_TWO_PROMPTS)
    columns = pair.columns
    if np.array_equal(columns["chosen_ids"], columns["rejected_ids"]):
        what = "chosen and rejected have the same tokens"
        cut = chosen.tokens_before > len(chosen.ids)
        raise BadRow(f"{what} up to train.max_length" if cut else what)
    return pair


def pair_lengths(rows: "Dataset") -> list[int]:
    """Return the tokens of each pair as it trains: two rows, padded to the longer one."""
    import pyarrow.compute

    columns = rows.with_format("arrow")[:]
    sizes = []
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        sizes.append(pyarrow.compute.list_value_length(columns[name]).to_numpy())
    prompt, chosen, rejected = sizes
    longest = prompt + np.maximum(chosen, rejected)
    return [2 * int(length) for length in longest]
