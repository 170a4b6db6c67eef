"""Verdicts from next-token logits: which tokens mean a verdict, and their logits after a prompt in
one forward pass.

A judge's prompts start alike, up to the fence's code: half of a short prompt. What they share is
computed once and kept, and every batch continues from it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.generation.transformers_engine import left_padded

if TYPE_CHECKING:
    import torch

LEAST_SHARED_TOKENS = 32  # below it the extra forward pass saves nothing


class NextToken:
    """The logits after prompts, read from one model.

    Args:
        model: a causal language model in eval mode.
        pad: id that fills up shorter rows.
    """

    def __init__(self, model: Any, pad: int) -> None:
        from recipes_lib.models.architectures import has_plain_head

        self.model, self.pad = model, pad
        self._plain_head = has_plain_head(model)
        self._cache_name = (
            "cache"
            if "cache" in inspect.signature(model.get_decoder().forward).parameters
            else "past_key_values"
        )
        self._shared: tuple[int, ...] = ()
        self._cache: Any = None

    def share(self, rows: Sequence[Sequence[int]]) -> None:
        """Compute what these rows start with alike, unless it is there already; rows given to
        `logits` must start with it.
        """
        if self._shared and all(
            tuple(row[: len(self._shared)]) == self._shared and len(row) > len(self._shared)
            for row in rows
        ):
            return
        alike = common_prefix(rows)
        if len(rows) < 2 or alike < LEAST_SHARED_TOKENS or not self._plain_head:
            self._shared, self._cache = (), None
            return
        import torch
        from transformers import DynamicCache

        self._shared = tuple(rows[0][:alike])
        ids = torch.tensor([self._shared], device=self.model.device)
        with torch.inference_mode():
            done = self.model.get_decoder()(input_ids=ids, use_cache=True)
        self._cache = getattr(done, self._cache_name)
        if (
            type(self._cache) is not DynamicCache
        ):  # another kind of state (Mamba and the like) may not be continued in a padded batch
            self._shared, self._cache = (), None

    def logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits after each row's last token, shape (rows, vocabulary), in float32.

        The head is applied in float32: in half precision the logits of two verdicts are often
        exactly equal.
        """
        import torch

        known = len(self._shared)
        ids, mask = left_padded([row[known:] for row in rows], self.pad)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        positions = known + (mask.cumsum(-1) - 1).clamp(min=0)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with torch.inference_mode():
            if self._cache is not None:
                cache = copy.deepcopy(self._cache)
                cache.batch_repeat_interleave(len(rows))
                inputs |= {self._cache_name: cache, "use_cache": True}
                mask = torch.cat([mask.new_ones(len(rows), known), mask], dim=1)
            inputs["attention_mask"] = mask
            if not self._plain_head:
                return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
            head = self.model.get_output_embeddings()
            hidden = self.model.get_decoder()(**inputs).last_hidden_state[:, -1]
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows start with alike; at least one token of each is left over.

    Example:
        >>> common_prefix([[1, 2, 3], [1, 2, 4]]), common_prefix([[1, 2], [1, 2, 3]])
        (2, 1)
    """
    least, most = min(map(tuple, rows)), max(map(tuple, rows))  # what these two share, all share
    shortest = min(map(len, rows)) - 1
    return next((place for place in range(shortest) if least[place] != most[place]), shortest)


def verdict_tokens(
    tokenizer: Any, lead_in: str, allowed: Sequence[str]
) -> tuple[list[int], dict[str, set[int]]]:
    """Return the lead-in's token ids and, per verdict, the ids of the tokens that mean it.

    A verdict may follow with or without a space. Where the tokenizer makes the space a token of its
    own, as some do before digits, it becomes part of the lead-in.

    Raises:
        EnvironmentFault: two verdicts start with the same token, so that the next token cannot tell
            them apart.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    bare = encode(lead_in)
    spaced = {verdict: encode(f"{lead_in} {verdict}") for verdict in allowed}
    common = 0
    while (
        common + 1 < min(map(len, spaced.values()))
        and len({ids[common] for ids in spaced.values()}) == 1
    ):
        common += 1
    tokens: dict[str, set[int]] = {verdict: {ids[common]} for verdict, ids in spaced.items()}
    lead_ids = next(iter(spaced.values()))[:common]
    if lead_ids == bare:
        for verdict in allowed:
            tight = encode(f"{lead_in}{verdict}")
            if tight[:common] == bare:
                tokens[verdict].add(tight[common])
    if not _distinct(tokens):  # some verdicts merge with the space and some do not
        lead_ids, tokens = (
            encode(f"{lead_in} "),
            {verdict: {encode(verdict)[0]} for verdict in allowed},
        )
    if not _distinct(tokens):
        raise EnvironmentFault(
            f"this judge's tokenizer cannot tell {', '.join(allowed)} apart by one token",
            "set judge.mode: generate",
        )
    return lead_ids, tokens


def _distinct(tokens: dict[str, set[int]]) -> bool:
    """Whether no token stands for two verdicts."""
    return sum(map(len, tokens.values())) == len(set().union(*tokens.values()))
