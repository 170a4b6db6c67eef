"""How long a recipe's examples are, and how many there are: counted in local data, else taken from
an earlier run or from Dolly.

Counting reads the rows and, where the model's tokenizer.json is here, tokenises up to `COUNTED` of
them: a second, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import runs_root
from recipes_lib.data.conversations import conversation_of
from recipes_lib.data.examples import BadRows, place
from recipes_lib.data.files import count_rows
from recipes_lib.data.prompts import prompt_and_completion
from recipes_lib.data.rows import first_in_hash_order, read_data
from recipes_lib.data.sources import find_path, is_on_hub, listed_sources, source_files
from recipes_lib.data.splits import split_rows
from recipes_lib.planning.dolly_lengths import characters_per_token, dolly_lengths

if TYPE_CHECKING:
    from recipes_lib.data.examples import Example
    from recipes_lib.data.rows import Rows

COUNTED = 2000
LARGEST_FILE = 20_000_000  # bytes; of larger data, the first rows are read and the others counted
DOLLY_DATASET = "databricks/databricks-dolly-15k"
TEMPLATE_TOKENS = 31  # what a chat template puts around one exchange


@dataclass(frozen=True)
class Lengths:
    """The examples as the loss will see them.

    Args:
        tokens: a length per example (or per counted example), not cut to `max_length`.
        train: training rows.
        validation: validation rows.
        source: where the numbers come from, for the reader.
        counted: whether they are this data's own.
    """

    tokens: tuple[int, ...]
    train: int
    validation: int
    source: str
    counted: bool


def lengths_of(recipe: Recipe, vocabulary: int) -> Lengths:
    """Return the lengths of a recipe's data; what cannot be counted here is assumed, and `source`
    says so.

    Args:
        vocabulary: of the recipe's model; it decides how many tokens a text becomes where the
            tokenizer is not here.

    Raises:
        RecipeError: a file or folder of the data is not here.
        DataError: the data are here and cannot be used, for example an empty folder.
    """
    try:
        _check_files(recipe)
        local = _counted(recipe, vocabulary)
    except DataError as error:
        raise place(recipe, error) from None
    if local is not None:
        return local
    tokens = dolly_lengths(vocabulary)
    if recipe.data.source == DOLLY_DATASET:
        return _split(
            recipe,
            tokens,
            len(tokens),
            f"Dolly's length histogram ({len(tokens):,} rows)",
            counted=True,
        )
    earlier = _from_run(recipe, tokens)
    if earlier is not None:
        return earlier
    named = recipe.data.source if isinstance(recipe.data.source, str) else "the mixture"
    return _split(
        recipe,
        tokens,
        len(tokens),
        f"assumed as long and as many as Dolly's: {named} is not on this machine",
        counted=False,
    )


def _check_files(recipe: Recipe) -> None:
    for source in listed_sources(recipe.data):
        if (
            not is_on_hub(source, (recipe.base_dir,))
            and find_path(source.source, (recipe.base_dir,)) is None
        ):
            hint = f"a relative path is meant from {recipe.base_dir}"
            raise recipe.error("data.source", f"no such file or folder: {source.source}", hint)


def _split(
    recipe: Recipe, tokens: Sequence[int], rows: int, source: str, *, counted: bool
) -> Lengths:
    """Apply the recipe's filters and split fractions to a number of rows."""
    limit, split = recipe.data.filters.max_tokens, recipe.data.split
    if limit is not None:
        kept = [length for length in tokens if length <= limit] or [min(tokens)]
        rows, tokens = round(rows * len(kept) / len(tokens)), kept
    rows = min(rows, recipe.data.max_examples or rows)
    if split.method == "none":
        train, validation = rows, 0
    elif split.method == "published":
        train = rows - math.ceil(rows * (split.validation + split.test) - 1e-9)
        validation = round(rows * split.validation)
    else:
        train, validation = (
            round(rows * (1 - split.validation - split.test)),
            round(rows * split.validation),
        )
    return Lengths(tuple(tokens), max(train, 1), validation, source, counted)


def _counted(recipe: Recipe, vocabulary: int) -> Lengths | None:
    """Count the rows of local data; None where a source is not a local file or folder."""
    section = recipe.data
    paths = [find_path(source.source, (recipe.base_dir,)) for source in listed_sources(section)]
    if None in paths:
        return None
    large = sum(_size(path) for path in paths if path) > LARGEST_FILE
    bad = BadRows()
    rows = read_data(section, (recipe.base_dir,), bad, max_rows=COUNTED if large else None)
    if bad.found and (section.on_bad_row == "error" or not len(rows)):
        raise bad.error(rows.num_read)
    if section.filters.categories:
        rows = rows.take(
            [
                index
                for index, kind in enumerate(rows.categories)
                if kind in section.filters.categories
            ]
        )
    some = rows.take(first_in_hash_order(rows, COUNTED, section.split.seed))
    tokens, how = _tokens(recipe, vocabulary, some)
    if large:
        total = round(
            _rows_in_files(recipe) * len(rows) / rows.num_read
        )  # as many filtered and skipped as among the first
        return _split(
            recipe, tokens, total, f"{how} in {len(some):,} of about {total:,} rows", counted=True
        )
    source_text = f"{how} in {len(some):,} of {len(rows):,} rows"
    if section.filters.max_tokens is not None:
        return _split(recipe, tokens, len(rows), source_text, counted=True)
    rows = rows.take(first_in_hash_order(rows, section.max_examples, section.split.seed))
    sides = split_rows(rows, section.split).rows
    return Lengths(
        tuple(tokens), len(sides["train"]), len(sides["validation"]), source_text, counted=True
    )


def needed_length(recipe: Recipe, vocabulary: int, share: float = 0.99) -> int | None:
    """Return the `max_length` that leaves nearly all of the first rows whole, in steps of 64; None
    where none can be read.

    Args:
        share: of the rows that are to stay whole.
    """
    rows = read_data(recipe.data, (recipe.base_dir,), BadRows(), max_rows=COUNTED)
    if not len(rows):
        return None
    tokens, _ = _tokens(recipe, vocabulary, rows)
    return math.ceil(sorted(tokens)[math.ceil(share * len(tokens)) - 1] / 64) * 64


def _tokens(recipe: Recipe, vocabulary: int, rows: Rows) -> tuple[list[int], str]:
    """Return the length of each row as the loss will see it, and how it was counted."""
    count, how = _counter(recipe, vocabulary)
    prompt_format = recipe.data.prompt_format
    tokens = count([_text(example, prompt_format) for example in rows.examples()])
    return [length + (TEMPLATE_TOKENS if prompt_format == "chat" else 1) for length in tokens], how


def _rows_in_files(recipe: Recipe) -> int:
    """The rows of all local sources, counted as lines where a format has one row per line."""
    total = 0
    for source in listed_sources(recipe.data):
        rows = sum(map(count_rows, source_files(source, (recipe.base_dir,))))
        total += min(rows, source.max_examples or rows)
    return total


def _size(path: Path) -> int:
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.glob("*") if file.is_file())
    )


def _text(example: Example, prompt_format: str) -> str:
    if prompt_format == "chat":
        return "\n".join(str(message["content"]) for message in conversation_of(example, None))
    prompt, completion = prompt_and_completion(example, prompt_format)
    return (prompt or "") + completion


def _counter(recipe: Recipe, vocabulary: int) -> tuple[Callable[[list[str]], list[int]], str]:
    """Return how texts are counted: by the model's tokenizer.json where it is here, else by their
    characters.
    """
    folder = local_folder(recipe)
    if folder is not None and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda texts: [
            len(item.ids) for item in tokenizer.encode_batch(texts, add_special_tokens=True)
        ], "tokens counted"
    size = characters_per_token(vocabulary)
    return lambda texts: [
        max(1, round(len(text) / size)) for text in texts
    ], "tokens estimated from characters"


def _from_run(recipe: Recipe, tokens: Sequence[int]) -> Lengths | None:
    """Return what an earlier run of this name and with the same `data` section found, in the shape
    of Dolly's lengths.
    """
    run = runs_root() / recipe.name
    try:
        if (
            yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8"))["data"]
            != recipe.to_dict()["data"]
        ):
            return None
        audit = json.loads((run / "supervision.json").read_text(encoding="utf-8"))
        used, total, longest = (
            audit["rows"]["used"],
            audit["tokens"]["total"],
            audit["tokens"]["max"],
        )
        train, validation = audit["rows"]["trained"], audit["rows"]["validation"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    if not used or not total:
        return None
    factor = total / used / (sum(tokens) / len(tokens))
    scaled = tuple(min(max(1, round(length * factor)), longest) for length in tokens)
    return Lengths(
        scaled,
        train,
        validation,
        f"rows and mean length of the earlier run {recipe.name}",
        counted=True,
    )
