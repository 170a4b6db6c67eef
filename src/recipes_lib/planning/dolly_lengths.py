"""How long the examples of databricks-dolly-15k are: the histogram that plans and benchmarks use
where no other data is at hand.

Counted over all 15,011 rows in the `dolly` prompt format with the tokenizer of SmolLM2 (49,152
entries), prompt, completion and end token together, nothing cut. A smaller vocabulary makes more
tokens of the same text, a larger one fewer: counted on the same rows.
"""

from __future__ import annotations

import math

# Entries of a vocabulary -> mean tokens of a row: the tokenizers of Mistral-7B-v0.1 (Llama-2's is
# of the same kind and size), SmolLM2 and Mistral-Nemo. The original study's logs have 205 tokens a
# row for Llama-2 cut at 1,024; the first of these gives 199.
_MEAN_TOKENS = {32_000: 210.9, 49_152: 194.8, 131_072: 188.0}
_MEAN_CHARACTERS = 820.3

# mean length x rows, one entry per bin
_BINS = """
14x2 18x28 22x161 26x345 29x357 34x455 37x600 41x445 45x365 49x341 53x293 58x281 62x312 65x310
69x315 73x280 77x312 82x316 86x316 90x268 94x224 97x232 101x236 105x221 110x241 114x217 118x205
122x199 125x185 131x338 139x309 148x270 156x281 164x238 172x235 180x251 187x198 195x255 203x234
211x214 219x204 228x176 235x165 243x143 252x154 264x275 279x229 296x236 311x220 327x169 344x169
359x147 375x145 391x116 408x113 423x114 439x81 455x79 472x56 488x68 503x59 527x117 560x110 590x88
624x71 653x61 687x45 720x49 749x45 783x40 813x33 848x28 880x23 911x28 938x13 977x11 1008x17 1076x57
1211x43 1334x27 1467x18 1609x10 1718x10 1862x19 1986x6 2167x13 2753x11 3290x2 3826x3 4537x4 5398x2
5840x2 6271x1 8768x1
"""


def dolly_histogram() -> list[tuple[int, int]]:
    """Return (tokens, rows) per bin, shortest first.

    Example:
        >>> sum(rows for _, rows in dolly_histogram())
        15011
    """
    pairs = (entry.split("x") for entry in _BINS.split())
    return [(int(tokens), int(rows)) for tokens, rows in pairs]


def dolly_lengths(vocabulary: int = 49_152) -> list[int]:
    """Return one length per row, shortest first, as a tokenizer with about that many entries makes
    it.

    Example:
        >>> sum(dolly_lengths(32_000)) / sum(dolly_lengths()) > 1.08
        True
    """
    factor = _mean_tokens(vocabulary) / _MEAN_TOKENS[49_152]
    return [round(tokens * factor) for tokens, rows in dolly_histogram() for _ in range(rows)]


def characters_per_token(vocabulary: int) -> float:
    """Return the characters of Dolly's text that become one token.

    Example:
        >>> [round(characters_per_token(size), 1) for size in (32_000, 49_152, 151_936)]
        [3.9, 4.2, 4.4]
    """
    return _MEAN_CHARACTERS / _mean_tokens(vocabulary)


def _mean_tokens(vocabulary: int) -> float:
    """Return the mean of the vocabulary that is nearest in size, in ratio."""
    return _MEAN_TOKENS[min(_MEAN_TOKENS, key=lambda size: abs(math.log(vocabulary / size)))]
