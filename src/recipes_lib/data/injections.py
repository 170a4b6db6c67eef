"""Special tokens and template headings that stand in the data themselves.

A row whose text contains `</s>` or `### Response:` can end a turn or open a false one. Special
tokens are disarmed in the plain formats (`data.special_tokens: text`); all of them are counted and
the rows are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes_lib.data.examples import Example
from recipes_lib.data.prompts import FOREIGN_MARKERS, MARKERS

Found = dict[str, dict[str, int]]


class Injections:
    """Counts what the texts contain of special tokens and of template markers, batch by batch.

    Args:
        special_tokens, markers: what was found, id of a row -> text -> occurrences.
    """

    def __init__(self, tokenizer: Any, prompt_format: str) -> None:
        special = special_tokens(tokenizer)
        markers = dict.fromkeys((*MARKERS[prompt_format], *FOREIGN_MARKERS))
        self._needles = (special, tuple(marker for marker in markers if marker not in special))
        self.special_tokens: Found = {}
        self.markers: Found = {}

    def search(self, batch: Sequence[Example]) -> None:
        """Look for all of them, first by their common beginnings in all texts at once: most data
        has none.
        """
        texts = [texts_of(example) for example in batch]
        whole = "\0".join(texts)
        for needles, found in zip(self._needles, (self.special_tokens, self.markers), strict=True):
            present = [needle for needle in needles if needle[:3] in whole and needle in whole]
            for example, text in zip(batch, texts, strict=True) if present else ():
                if here := {needle: times for needle in present if (times := text.count(needle))}:
                    found[example.id] = here

    def keep(self, ids: Sequence[str]) -> None:
        """Forget the rows that a filter left out."""
        if self.special_tokens or self.markers:
            kept = set(ids)
            self.special_tokens = {
                id: texts for id, texts in self.special_tokens.items() if id in kept
            }
            self.markers = {id: texts for id, texts in self.markers.items() if id in kept}


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts that the tokenizer turns into a special token, one-character ones left out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = dict.fromkeys(
        [
            *tokenizer.all_special_tokens,
            *(str(token) for token in added if getattr(token, "special", False)),
        ]
    )
    return tuple(name for name in names if len(name) > 1)


def texts_of(example: Example) -> str:
    """All texts of an example, joined by NUL."""
    parts: list[str] = []
    for value in example.fields.values():
        parts.extend(
            [value] if isinstance(value, str) else [message["content"] for message in value]
        )
    return "\0".join(parts)
