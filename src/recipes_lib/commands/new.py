"""recipes new: a recipe of your own that starts from an existing one, or is made for a model, your
rows and a card.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import load_document
from recipes_lib.config.new_recipe import Setup, batch_and_epochs, new_recipe, recipe_for_model
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import DataError, ExitCode, RecipeError, RecipesError
from recipes_lib.core.project import check_run_name, project_root, recipe_path, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.columns import look_at
from recipes_lib.data.examples import place
from recipes_lib.data.rows import check_local_rows
from recipes_lib.models.known import named_shape
from recipes_lib.planning.cards import DEFAULT, Card, card_named, cards_here, cpu_card
from recipes_lib.planning.lengths import needed_length
from recipes_lib.planning.plan import plan_recipe
from recipes_lib.planning.text import clock

_CHANGED = (
    "name_or_path:",
    "source:",
    "encoding:",
    "chat_template:",
    "r:",
    "learning_rate:",
    "num_train_epochs:",
    "max_steps:",
    "max_length:",
    "eval_steps:",
    "save_steps:",
    "global_batch_size:",
)
VOCABULARY, POSITIONS = 50_000, 4096  # where nothing is known of the model
# What is tried for a card, the fastest and most exact first.
_WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": True},
    {"checkpointing": True, "per_device": 1},
    {"checkpointing": True, "quantized": True},
    {"checkpointing": True, "quantized": True, "per_device": 1},
    *(
        {"checkpointing": True, "per_device": 1, "accelerate": name, "gpus": gpus, **more}
        for gpus in (2, 4, 8)
        for name, more in (("fsdp", {}), ("fsdp_qlora", {"quantized": True}))
    ),
)
SHORTEST = 512  # max_length: costs nothing where all rows are shorter
_TUNED = re.compile(r"instruct|chat|\bit\b|-it$|thinking|reasoning|sft|dpo", re.I)
# Family of a base model: the template that its tokenizer lacks, and what ends a turn. Qwen's bases
# have the template, and a token of their own that ends a document.
_TEMPLATES: dict[str, tuple[str | None, str]] = {
    "llama3": ("trl:llama3", "<|eot_id|>"),
    "gemma3": ("trl:gemma3", "<end_of_turn>"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_5", "qwen3_moe"), (None, "<|im_end|>")),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("name", metavar="NAME", help="name of the recipe and of its run")
    origin = "the recipe to start from, for example quickstart/lora-r8"
    add("--from", dest="origin", metavar="RECIPE", help=origin)
    model = (
        "in place of --from: a recipe for this model (a Hub id or a folder) and your rows, with"
        " template, targets, learning rate, batch, length and launch that fit"
    )
    add("--model", metavar="MODEL", help=model)
    gpu = "with --model: the card it must fit, for example h100; default: this machine's, else h100"
    add("--gpu", metavar="CARD", help=gpu)
    data = (
        "your rows: jsonl, json, csv, tsv, parquet, arrow, or a folder of them; the first row says"
        " how they are read"
    )
    add("--data", metavar="FILE", type=Path, help=data)
    output = "where to write it; default recipes/NAME.yaml"
    add("--output", metavar="PATH", type=Path, help=output)


def run(args: argparse.Namespace) -> int:
    """Write the recipe and point at the lines people change.

    Raises:
        RecipeError: the name cannot be a run's name, or the file exists.
        DataError: the rows cannot be read, or their columns are not understood. When a row is the
            reason, the recipe was written, so that the key the error names can be set in it.
    """
    check_run_name(args.name)
    if bool(args.origin) == bool(args.model):
        what = "--from and --model exclude each other" if args.model else "nothing to start from"
        raise RecipeError(what, "--from RECIPE, or --model ORG/ID --data FILE; recipes: recipes ls")
    if args.model and not args.data:
        raise RecipeError("--model needs your rows", "--data FILE")
    if args.gpu and not args.model:
        raise RecipeError(
            "--gpu goes with --model", "recipes plan RECIPE --gpu CARD plans a recipe"
        )
    target = args.output or _recipes_folder() / f"{args.name}.yaml"
    if target.exists():
        raise RecipeError(
            "exists already", "choose another name, or --output PATH", file=shown_path(target)
        )
    text = _for_model(args, target) if args.model else _from_origin(args, target)
    write_text(target, text)
    file = shown_path(target)
    say(f"wrote {file}; the lines people change:")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip().startswith(_CHANGED):
            say(f"  {file}:{number}: {line.strip()}")
    if args.data:
        recipe = load_recipe(target)
        try:
            check_local_rows(recipe.data)
        except DataError as error:
            raise place(recipe, error) from None
    next_step(f"recipes check {file}")
    return ExitCode.DONE


def _from_origin(args: argparse.Namespace, target: Path) -> str:
    origin, rows = load_recipe(recipe_path(args.origin)), look_at(args.data) if args.data else None
    text = new_recipe(args.name, target, origin, rows)
    write_text(target, text)
    if rows is not None and (length := _needed_length(target)):
        text = new_recipe(args.name, target, origin, replace(rows, max_length=length))
    return text


def _for_model(args: argparse.Namespace, target: Path) -> str:
    """Return a recipe for a model: the first of LoRA, LoRA with activations computed twice, QLoRA,
    and a model shared by several cards, that a plan says fits.

    Raises:
        RecipeError: no such card.
    """
    rows = look_at(args.data)
    card = cpu_card() if args.gpu == "cpu" else card_named(args.gpu) if args.gpu else _card_here()
    template, eos = _template_of(args.model)
    setup = Setup(chat_template=template, eos_token=eos)
    if card.name == "cpu":
        setup = replace(setup, accelerate="cpu")

    def written(setup: Setup) -> Recipe:
        write_text(target, recipe_for_model(args.name, target, args.model, rows, setup))
        return load_recipe(target)

    written(setup)
    setup = replace(setup, length=max(_needed_length(target) or 0, SHORTEST))
    try:
        lengths = plan_recipe(written(setup), gpu=card.name).lengths
        batch, epochs = batch_and_epochs(lengths.train)
        for changes in _WAYS[:1] if card.name == "cpu" else _WAYS:
            chosen = replace(setup, batch=batch, epochs=epochs, **changes)
            plan = plan_recipe(written(chosen), gpu=card.name, gpus=chosen.gpus)
            if plan.fits:
                break
    except RecipesError as error:  # what the model is, is not known here, or the rows are not read
        say(f"not planned, so LoRA on one card: {error.what.removeprefix('no plan: ')}")
        return recipe_for_model(args.name, target, args.model, rows, setup)
    told = (
        f"On {chosen.gpus} x {card.title} it {'needs' if plan.fits else 'DOES NOT FIT: it needs'}"
        f" {plan.needed:.1f} of {card.memory_gib:.1f} GiB, and {clock(plan.duration.total)}"
        " (planned)."
    )
    say(told)
    return recipe_for_model(args.name, target, args.model, rows, replace(chosen, plan=told))


def _card_here() -> Card:
    return next(iter(cards_here()), card_named(DEFAULT))


def _template_of(model: str) -> tuple[str | None, str | None]:
    """Return chat template and end of a turn for a base model that has none: as a recipe of the
    project for this model says, else by its family; neither for a model that was tuned to chat.
    """
    for file in sorted((project_root() / "recipes").glob("*/_base.yaml")):
        values = load_document(file).values
        if values.get("model", {}).get("name_or_path") == model:
            template = values.get("data", {}).get("chat_template")
            return template, values.get("train", {}).get("eos_token")
    folder = Path(model)
    tuned = _TUNED.search(model.rpartition("/")[2]) or (folder / "chat_template.jinja").exists()
    return _TEMPLATES.get(_family(model), (None, None)) if not tuned else (None, None)


def _family(model: str) -> str:
    """Return llama3, gemma3, or another model's own name for what it is."""
    shape = named_shape(model)
    if shape is None:
        return ""
    llama3 = shape.family == "llama" and shape.vocabulary == 128_256
    return "llama3" if llama3 else shape.family.removesuffix("_text")


def _needed_length(target: Path) -> int | None:
    """Return the max_length that the rows of a new recipe need, as far as its model goes; None
    where they cannot be read, which is said afterwards.
    """
    try:
        recipe = load_recipe(target)
        shape = named_shape(recipe.model.name_or_path)
        length = needed_length(recipe, shape.vocabulary if shape else VOCABULARY)
    except RecipesError:
        return None
    return length and min(length, shape.positions if shape else POSITIONS)


def _recipes_folder() -> Path:
    """Return recipes/ of the working directory if there is one, else the project's."""
    return Path("recipes") if Path("recipes").is_dir() else project_root() / "recipes"
