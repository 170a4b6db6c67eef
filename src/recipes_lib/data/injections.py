"""Special tokens and template headings that stand in the data themselves.

A row whose text contains `</s>` or `### Response:` can end a turn or open a false one. Special tokens are disarmed in the
plain formats (`data.special_tokens: text`); all of them are counted and the rows are named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from recipes_lib.data.examples import Example
from recipes_lib.data.prompts import FOREIGN_MARKERS, MARKERS

BATCH_ROWS = 1000


def find_injections(examples: Sequence[Example], tokenizer: Any, prompt_format: str) -> dict[str, Any]:
    """Count what the texts contain of special tokens and of template markers.

    Returns:
        `special_tokens` and `markers`, each with `count` (text -> occurrences) and `rows` (id -> list of texts).
    """
    special = special_tokens(tokenizer)
    markers = tuple(dict.fromkeys((*MARKERS[prompt_format], *FOREIGN_MARKERS)))
    return {
        "special_tokens": _search(examples, special),
        "markers": _search(examples, tuple(marker for marker in markers if marker not in special)),
    }


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts that the tokenizer turns into a special token, one-character ones left out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = dict.fromkeys([*tokenizer.all_special_tokens, *(str(token) for token in added if getattr(token, "special", False))])
    return tuple(name for name in names if len(name) > 1)


def _search(examples: Sequence[Example], needles: Sequence[str]) -> dict[str, Any]:
    """Look for needles, first by their common beginnings in many rows at once: most data has none."""
    beginnings: dict[str, list[str]] = defaultdict(list)
    for needle in needles:
        beginnings[needle[:3]].append(needle)
    count: Counter[str] = Counter()
    rows: dict[str, list[str]] = {}
    for start in range(0, len(examples), BATCH_ROWS):
        batch = examples[start : start + BATCH_ROWS]
        texts = [texts_of(example) for example in batch]
        whole = "\0".join(texts)
        present = [needle for beginning, group in beginnings.items() if beginning in whole for needle in group if needle in whole]
        for example, text in zip(batch, texts, strict=True) if present else ():
            if found := {needle: times for needle in present if (times := text.count(needle))}:
                count.update(found)
                rows[example.id] = sorted(found)
    return {"count": dict(sorted(count.items())), "rows": rows}


def texts_of(example: Example) -> str:
    """All texts of an example, joined by NUL."""
    parts: list[str] = []
    for value in example.fields.values():
        parts.extend([value] if isinstance(value, str) else [message["content"] for message in value])
    return "\0".join(parts)
