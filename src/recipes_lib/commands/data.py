"""`recipes data`: what the model reads, and which tokens carry loss."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from recipes_lib.commands import RecipeWord
from recipes_lib.commands.check import refuse_faults
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.core.terminal import aligned, next_step, say
from recipes_lib.data.leaks import NUM_KEPT
from recipes_lib.data.rows import PAIR
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.recipe import load_eval
from recipes_lib.weights.load import load_tokenizer


def run_data(
    recipe: RecipeWord,
    overrides: Sequence[str] = (),
    *,
    show: Annotated[int, "print N training rows as the model sees them (default 3)", 0] = 3,
    against: Annotated[list[str], "evals whose questions must not be in the training rows"] = [],
) -> int:
    """Prepare the recipe's data, print the audit and some rows."""
    from recipes_lib.data.encoding import IGNORED, decoded_spans
    from recipes_lib.data.prepare import prepare_data

    # `--against` takes every word that follows it, an override of the recipe too
    late_overrides = [word for word in against if "=" in word]
    eval_names = [word for word in against if "=" not in word]
    words = list(overrides) + late_overrides
    loaded = load_recipe(recipe, words)
    evals = [load_eval(name) for name in eval_names]
    refuse_faults(loaded)
    quiet_libraries()
    tokenizer = load_tokenizer(loaded)
    data = prepare_data(loaded, tokenizer)
    audit = data.audit
    rows = audit.rows
    filtered = ""
    if rows["too_long"]:
        filtered = f", {rows['too_long']} filtered by max_tokens"
    say(f"{rows['read']} rows read{filtered}, {rows['used']} used")
    sides = f"{rows['train']} train / {rows['validation']} validation / {rows['test']} test"
    say(f"{sides} (split: {data.splits['method']})")
    say(f"prompt format {audit.prompt_format}, loss on the {audit.loss_on}", *audit.notes)
    table = [["tokens", "total", "median", "max"]]
    for title, numbers in audit.tokens.items():
        table.append([title] + [f"{numbers[column]:,}" for column in table[0][1:]])
    say("", *aligned(table))
    for note in audit.warnings:
        say(f"note: {note}")
    errors = []
    for name, leaks in search_recipe(loaded, evals, fetch=True).items():
        if leaks.found:
            say(str(leak_error(name, leaks, loaded)))
        else:
            say(leaks.summary(name))
        if leaks.is_error:
            errors.append(leak_error(name, leaks, loaded, limit=NUM_KEPT))
    if errors:
        raise RecipeErrors(errors)
    for row in data.train.select(range(min(show, len(data.train)))):
        for title, ids, labels in _shown_sides(row):
            # text with loss in [[...]], the end token marked
            num_supervised = sum(label != IGNORED for label in labels)
            say(f"\n-- {title}: {len(ids)} tokens, {num_supervised} with loss")
            line = ""
            for text, has_loss in decoded_spans(tokenizer, ids, labels):
                line += f"[[{text}]]" if has_loss else text
            say(line.rstrip())
    say()
    return next_step("train", recipe, *words)


def _shown_sides(row: dict[str, Any]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield a title, the tokens and their labels of a row, or of both answers of a pair."""
    from recipes_lib.data.encoding import IGNORED

    if "labels" in row:
        yield row["example_id"], row["input_ids"], row["labels"]
        return
    prompt = row["prompt_ids"]
    for name in PAIR:
        answer = row[f"{name}_ids"]
        yield f"{row['example_id']}, {name}", prompt + answer, [IGNORED] * len(prompt) + answer
