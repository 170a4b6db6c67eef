"""`recipes data RECIPE`: what the model will read and what the loss will see.

Loads the tokenizer, not the model. The same audit runs before step 1 of every training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from recipes_lib.commands import RecipeWord
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.core.terminal import aligned, next_step, say
from recipes_lib.data.leaks import NUM_KEPT
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.recipe import load_eval
from recipes_lib.weights.load import load_tokenizer

if TYPE_CHECKING:
    from recipes_lib.data.audit import DataAudit


def run(
    recipe: RecipeWord,
    overrides: Sequence[str] = (),
    *,
    show: Annotated[int, "print N training rows as the model sees them (default 3)", 0] = 3,
    against: Annotated[list[str], "evals whose questions must not be in the rows that train"] = [],  # noqa: B006 (it is not changed)
) -> int:
    """Prepare the recipe's data, print the audit and some rows."""
    from recipes_lib.data.audit import RefusedData
    from recipes_lib.data.prepare import prepare_data

    # an override may follow the evals
    words = [*overrides, *(word for word in against if "=" in word)]
    loaded = load_recipe(recipe, words)
    evals = [load_eval(word) for word in against if "=" not in word]
    tokenizer = load_tokenizer(loaded)
    try:
        data = prepare_data(loaded, tokenizer)
    except RefusedData as error:
        _say_audit(error.audit)
        raise
    _say_audit(data.audit, f" (split: {data.splits['method']})")
    errors = []
    for name, leaks in (search_recipe(loaded, evals, fetch=True) if evals else {}).items():
        if leaks.is_error:
            errors.append(leak_error(name, leaks, loaded, limit=NUM_KEPT))
        else:
            say(str(leak_error(name, leaks, loaded)) if leaks.found else leaks.summary(name))
    if errors:
        raise RecipeErrors(errors)
    for row in data.train.select(range(min(show, len(data.train)))):
        _show_row(row, tokenizer)
    say()
    return next_step("recipes", "train", recipe, *words)


def _say_audit(audit: DataAudit, split: str = "") -> None:
    rows = audit.rows
    filtered = "".join(f", {num} filtered by {name}" for name, num in rows["filtered"].items())
    say(f"{rows['read']} rows read{filtered}, {rows['used']} used")
    say(f"{rows['train']} train / {rows['validation']} validation / {rows['test']} test{split}")
    names = ("rows", "weight", "used", "train", "validation", "test")
    if len(audit.sources) > 1:
        sources = [[source["source"], *_numbers(source, names)] for source in audit.sources]
        say("\n".join(["", *aligned([("source", *names), *sources]), ""]))
    say(f"prompt format {audit.prompt_format}, loss on the {audit.loss_on}")
    for line in audit.notes:
        say(line)
    keys = ("total", "p5", "p50", "p95", "max")
    cells = [[title, *_numbers(counts, keys)] for title, counts in audit.tokens.items()]
    say("\n".join(["", *aligned([("tokens", *keys), *cells])]))
    for note in audit.warnings:
        say(f"note: {note}")


def _numbers(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{values[key]:,}" for key in keys]


def _show_row(row: Mapping[str, Any], tokenizer: Any) -> None:
    """Print one training row: text with loss in [[...]], the end token marked."""
    from recipes_lib.data.supervision import IGNORED, decoded_spans

    num_supervised = sum(label != IGNORED for label in row["labels"])
    say(f"\n-- {row['example_id']}: {len(row['input_ids'])} tokens, {num_supervised} with loss")
    spans = decoded_spans(tokenizer, row["input_ids"], row["labels"])
    if not spans[-1].text.strip():
        spans.pop()  # a newline that the template puts after the last turn
    shown = ""
    for span in spans:
        if span.supervised:
            end = f"<EOS {span.end_token}>" if span.end_token else ""
            shown += f"[[{span.text.removesuffix(span.end_token)}]]{end}"
        else:
            shown += span.text
    say(shown)
