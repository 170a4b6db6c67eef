"""How long a recipe's examples are, and how many there are: counted in local data, else taken from
an earlier run or from databricks-dolly-15k.

Dolly's histogram was counted over all 15,011 rows in the `dolly` prompt format with the tokenizer
of SmolLM2 (49,152 entries), prompt, completion and end token together, nothing cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.data.conversations import conversation_of
from recipes_lib.data.files import count_rows
from recipes_lib.data.prompts import prompt_and_completion
from recipes_lib.data.rows import BadRows, message_texts, place
from recipes_lib.data.sources import find_path, is_on_hub, listed_sources, source_files
from recipes_lib.data.splits import Rows, first_in_hash_order, read_data, select_rows, split_rows

COUNTED = 2000
LARGEST_FILE = 20_000_000  # bytes; of larger data, the first rows are read and the others counted
DOLLY_DATASET = "databricks/databricks-dolly-15k"
TEMPLATE_TOKENS = 31  # what a chat template puts around one exchange
TURN_TOKENS = 5  # around each further message
TOOLS_TOKENS = 120  # what it says about the use of tools, where a row has some

# Entries of a vocabulary -> mean tokens of a row: the tokenizers of Mistral-7B-v0.1 (Llama-2's is
# of the same kind and size), SmolLM2 and Mistral-Nemo. The original study's logs have 205 tokens a
# row for Llama-2 cut at 1,024; the first of these gives 199.
_MEAN_TOKENS = {32_000: 210.9, 49_152: 194.8, 131_072: 188.0}
_MEAN_CHARACTERS = 820.3

# Dolly's mean length x rows, one entry per bin
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


@dataclass(frozen=True)
class Lengths:
    """The examples as the loss will see them, and the rows of each split.

    Args:
        tokens: a length per (counted) example, not cut to `max_length`.
        source: where the numbers come from, for the reader.
        counted: whether they are this data's own.
    """

    tokens: tuple[int, ...]
    train: int
    validation: int
    source: str
    counted: bool
    test: int = 0


def lengths_of(recipe: Recipe, vocabulary: int, *, tokenize: bool = True) -> Lengths:
    """Return the lengths of a recipe's data; what cannot be counted here is assumed, and `source`
    says so.

    Args:
        vocabulary: of the recipe's model, whose tokenizer may not be here.
        tokenize: false estimates from characters where it is: loading one takes 0.3 s.

    Raises:
        RecipeError: a file or folder of the data is not here.
        DataError: the data are here and cannot be used, for example an empty folder.
    """
    try:
        for source in listed_sources(recipe.data):
            if not is_on_hub(source) and find_path(source.source) is None:
                path = Path(source.source)
                hint = f"a relative path is meant from {path.parent}"
                what = f"no such file or folder: {shown_path(path)}"
                raise recipe.error("data.source", what, hint)
        local = _counted(recipe, vocabulary, tokenize)
    except DataError as error:
        raise place(recipe, error) from None
    if local is not None:
        return local
    tokens = dolly_lengths(vocabulary)
    dolly = recipe.data.source == DOLLY_DATASET
    if not dolly and (earlier := _from_run(recipe, tokens)):
        return earlier
    written = recipe.to_dict()["data"]["source"]
    named = written if isinstance(written, str) else "the mixture"
    source_text = (
        f"Dolly's length histogram ({len(tokens):,} rows)"
        if dolly
        else f"assumed as long and as many as Dolly's: {named} is not on this machine"
    )
    return _split(recipe, tokens, len(tokens), source_text, counted=dolly)


def _split(
    recipe: Recipe,
    tokens: Sequence[int],
    rows: int,
    source: str,
    *,
    counted: bool,
    times: float = 1,
) -> Lengths:
    """Apply the recipe's filters and split fractions to a number of rows.

    Args:
        times: how often an epoch has a training row, on average.
    """
    limit, split = recipe.data.filters.max_tokens, recipe.data.split
    if limit is not None:
        kept = [length for length in tokens if length <= limit] or [min(tokens)]
        rows, tokens = round(rows * len(kept) / len(tokens)), kept
    rows = min(rows, recipe.data.max_examples or rows)
    train, validation, test = rows, 0, 0
    if split.method != "none":
        validation, test = round(rows * split.validation), round(rows * split.test)
        train = round(rows * (1 - split.validation - split.test))
    if split.method == "published":
        train = rows - math.ceil(rows * (split.validation + split.test) - 1e-9)
    train = max(round(train * times), 1)
    return Lengths(tuple(tokens), train, validation, source, counted, test)


def _counted(recipe: Recipe, vocabulary: int, tokenize: bool) -> Lengths | None:
    """Count the rows of local data; None where a source is not a local file or folder."""
    section = recipe.data
    sources = listed_sources(section)
    if any(find_path(source.source) is None for source in sources):
        return None
    files = [source_files(source) for source in sources]
    large = sum(file.stat().st_size for some in files for file in some) > LARGEST_FILE
    bad = BadRows()
    rows = read_data(section, bad, max_rows=COUNTED if large else None)
    if bad.found and section.on_bad_row == "error":
        raise bad.error(rows.num_read)
    rows, _ = select_rows(rows, section, bad)
    some = rows.take(first_in_hash_order(rows.rows, COUNTED, section.split.seed))
    tokens, how = _tokens(recipe, vocabulary, some, tokenize)
    total, about = len(rows), ""
    if large:  # as many are filtered and skipped as among the first
        in_files = sum(
            source.num_taken(sum(map(count_rows, one)))
            for source, one in zip(sources, files, strict=True)
        )
        read = sum(source.num_taken(num) for source, num in rows.sources) + len(bad.found)
        total, about = round(in_files * len(rows) / read), "about "
    source_text = f"{how} in {len(some):,} of {about}{total:,} rows"
    if large or section.filters.max_tokens is not None:
        times = len(rows.repeated(range(len(rows)), section.split.seed)) / len(rows)
        return _split(recipe, tokens, total, source_text, counted=True, times=times)
    sides = split_rows(rows.rows, section.split)
    train = len(rows.repeated(sides["train"], section.split.seed))
    held_out = len(sides["validation"]), len(sides["test"])
    return Lengths(tuple(tokens), train, held_out[0], source_text, True, held_out[1])


def needed_length(recipe: Recipe, vocabulary: int) -> int | None:
    """Return the `max_length` that leaves 99% of the first rows whole, in steps of 64, if any."""
    rows = read_data(recipe.data, BadRows(), max_rows=COUNTED)
    if not len(rows):
        return None
    tokens, _ = _tokens(recipe, vocabulary, rows, True)
    return math.ceil(sorted(tokens)[math.ceil(0.99 * len(tokens)) - 1] / 64) * 64


def _tokens(recipe: Recipe, vocabulary: int, rows: Rows, tokenize: bool) -> tuple[list[int], str]:
    """Return the length of each row as the loss will see it, and how it was counted."""
    texts, around = [], []
    for row in rows.rows:
        if recipe.data.prompt_format == "chat":
            messages, tools = conversation_of(row, None), row.fields.get("tools")
            texts.append("\n".join(text for one in messages for text in message_texts(one)))
            around.append(TEMPLATE_TOKENS + TURN_TOKENS * max(len(messages) - 2, 0))
            if tools:
                texts[-1] += str(tools)
                around[-1] += TOOLS_TOKENS
        else:
            parts = prompt_and_completion(row, recipe.data.prompt_format)
            texts.append("".join(part or "" for part in parts))
            around.append(1)
    tokens, how = text_tokens(recipe, vocabulary, texts, tokenize=tokenize)
    return [length + more for length, more in zip(tokens, around, strict=True)], how


def text_tokens(
    recipe: Recipe, vocabulary: int, texts: Sequence[str], *, tokenize: bool = True
) -> tuple[list[int], str]:
    """Return the tokens of each text, and how they were counted: by the tokenizer.json of the
    recipe's model where it is here and wanted, else by characters.
    """
    folder = local_folder(recipe) if tokenize else None
    if folder is not None and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=True)
        return [len(item.ids) for item in encoded], "tokens counted"
    size = characters_per_token(vocabulary)
    return [max(1, round(len(text) / size)) for text in texts], "tokens estimated from characters"


def _from_run(recipe: Recipe, tokens: Sequence[int]) -> Lengths | None:
    """Return what an earlier run of this name and data found, in the shape of Dolly's lengths."""
    run = runs_root() / recipe.name
    try:
        resolved = yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8"))
        if resolved["data"] != recipe.to_dict()["data"]:
            return None
        audit = json.loads((run / "supervision.json").read_text(encoding="utf-8"))
        rows, found = audit["rows"], audit["tokens"]
        factor = found["total"] / rows["used"] / (sum(tokens) / len(tokens))
        scaled = [min(max(1, round(length * factor)), found["max"]) for length in tokens]
        source = f"rows and mean length of the earlier run {recipe.name}"
        held_out = rows["validation"], rows.get("test", 0)
        return Lengths(tuple(scaled), rows["trained"], held_out[0], source, True, held_out[1])
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError, yaml.YAMLError):
        return None


@lru_cache(maxsize=4)
def dolly_lengths(vocabulary: int = 49_152) -> tuple[int, ...]:
    """Return one length per row, shortest first, by a tokenizer with about that many entries.

    Example:
        >>> len(dolly_lengths()), sum(dolly_lengths(32_000)) / sum(dolly_lengths()) > 1.08
        (15011, True)
    """
    factor = _mean_tokens(vocabulary) / _MEAN_TOKENS[49_152]
    bins = (entry.split("x") for entry in _BINS.split())
    return tuple(round(int(size) * factor) for size, rows in bins for _ in range(int(rows)))


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
