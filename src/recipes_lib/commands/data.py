"""`recipes data RECIPE`: what the model will read and what the loss will see, before anything
trains.

Loads the tokenizer, not the model. The same audit runs before step 1 of every training and is
written to supervision.json.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipes_lib.commands import at_least
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.core.terminal import aligned, next_step, printable, say, use_color
from recipes_lib.data.leaks import NUM_KEPT
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.recipe import EvalRecipe, find_eval, load_eval
from recipes_lib.weights.load import load_tokenizer

if TYPE_CHECKING:
    from recipes_lib.data.audit import DataAudit
    from recipes_lib.data.supervision import DecodedSpan

GREY, GREEN, REVERSE, RESET = "\x1b[90m", "\x1b[32m", "\x1b[7m", "\x1b[0m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="path of a recipe")
    rows = "print N training rows as the model sees them (default: 3)"
    against = "evals whose questions and answers must not be in the rows that train"
    add("--against", nargs="+", default=[], metavar="EVAL", help=against)
    add("--show", type=at_least(0), default=3, metavar="N", help=rows)


def run(args: argparse.Namespace) -> int:
    """Prepare the recipe's data, print the audit and some rows.

    Raises:
        DataError: the data cannot be used; when it was read, its numbers are printed before.
        RecipeErrors: the rows hold questions or answers of an eval.
    """
    from recipes_lib.data.audit import RefusedData
    from recipes_lib.data.prepare import prepare_data

    # an override may follow the evals
    overrides = [*args.overrides, *(word for word in args.against if "=" in word)]
    recipe = load_recipe(args.recipe, overrides)
    evals = [load_eval(find_eval(word)) for word in args.against if "=" not in word]
    tokenizer = load_tokenizer(recipe)
    try:
        data = prepare_data(recipe, tokenizer)
    except RefusedData as error:
        say("\n".join(_summary(error.audit)))
        raise
    say("\n".join(_summary(data.audit, data.splits["method"])))
    _say_leaks(recipe, evals)
    for row in data.train.select(range(min(args.show, len(data.train)))):
        _show_row(row, tokenizer, color=use_color())
    say()
    next_step(shlex.join(["recipes", "train", str(args.recipe), *overrides]))
    return 0


def _say_leaks(recipe: Recipe, evals: Sequence[EvalRecipe]) -> None:
    """Print what the rows that train hold of each eval.

    Raises:
        RecipeErrors: it is too much.
    """
    errors = []
    for name, leaks in (search_recipe(recipe, evals, fetch=True) if evals else {}).items():
        if leaks.is_error:
            errors.append(leak_error(name, leaks, recipe, limit=NUM_KEPT))
        else:
            say(str(leak_error(name, leaks, recipe)) if leaks.found else leaks.summary(name))
    if errors:
        raise RecipeErrors(errors)


def _summary(audit: DataAudit, method: str | None = None) -> list[str]:
    """Return the audit as lines for the terminal."""
    rows = audit.rows
    filtered = "".join(f", {num} filtered by {name}" for name, num in rows["filtered"].items())
    split = f" (split: {method})" if method else ""
    lengths: list[Sequence[str]] = [("tokens", "total", "p5", "p50", "p95", "max")]
    for title, counts in (
        ("prompt", audit.prompt_tokens),
        ("row, as trained", audit.tokens),
        ("with loss", audit.supervised_tokens),
    ):
        total, *others = (f"{counts[key]:,}" for key in ("total", "p5", "p50", "p95", "max"))
        lengths.append((title, total, *others))
    return [
        f"{rows['read']} rows read{filtered}, {rows['used']} used",
        f"{rows['train']} train / {rows['validation']} validation / {rows['test']} test{split}",
        *_mixture(audit),
        f"prompt format {audit.prompt_format}, loss on the {audit.loss_on}",
        *audit.describe(),
        "",
        *aligned(lengths),
        *(f"note: {note}" for note in audit.warnings()),
    ]


def _mixture(audit: DataAudit) -> list[str]:
    """Return a table of what each source gives; nothing for a single source."""
    if len(audit.sources) < 2:
        return []
    total = sum(source.supervised for source in audit.sources) or 1
    rows: list[Sequence[str]] = [
        ("source", "rows", "weight", "used", "train", "validation", "test", "tokens with loss")
    ]
    for source in audit.sources:
        counts = (source.used, source.train, source.validation, source.test)
        share = f"{source.supervised:,} ({source.supervised / total:.1%})"
        rows.append(
            (
                *(source.source, f"{source.rows:,}", f"{source.weight:g}"),
                *(f"{count:,}" for count in counts),
                share,
            )
        )
    return ["", *aligned(rows), ""]


def _show_row(row: Mapping[str, Any], tokenizer: Any, *, color: bool) -> None:
    """Print one training row: prompt grey, text with loss green (or in [[...]]), the end token
    marked.
    """
    from recipes_lib.data.supervision import IGNORED, decoded_spans

    num_supervised = sum(label != IGNORED for label in row["labels"])
    say(f"\n-- {row['example_id']}: {len(row['input_ids'])} tokens, {num_supervised} with loss")
    spans = decoded_spans(tokenizer, row["input_ids"], row["labels"])
    if not spans[-1].text.strip():
        spans.pop()  # a newline that the template puts after the last turn
    print("".join(_painted(span, color) for span in spans), flush=True)


def _painted(span: DecodedSpan, color: bool) -> str:
    """Return a span for the terminal."""
    text, end = printable(span.text.removesuffix(span.end_token)), printable(span.end_token)
    if not span.supervised:
        return f"{GREY}{text}{RESET}" if color else text
    if color:
        return f"{GREEN}{text}{REVERSE}{end}{RESET}"
    return f"[[{text}]]" + (f"<EOS {end}>" if end else "")
