"""Whether the rows that a recipe trains on, or a run was trained on, hold questions or answers of
an evaluation. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import RECIPE_FILE, Recipe
from recipes_lib.core.errors import RecipeError, RecipeErrors, RecipesError
from recipes_lib.core.files import hash_of, read_object, read_rows
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import conversation_of
from recipes_lib.data.leaks import EvalText, Leaks, find_leaks
from recipes_lib.data.rows import NUM_LISTED, BadRows
from recipes_lib.data.sources import is_on_hub, listed_sources
from recipes_lib.data.splits import read_data, recorded_rows, training_rows
from recipes_lib.evals.log import EvalLog
from recipes_lib.evals.questions import Question, load_questions, local_questions
from recipes_lib.evals.recipe import HELD_OUT, EvalRecipe

_OF_HUB = "on the Hub, so that is done before the first training"
_QUESTION_KEYS = ("question", "query", "prompt", "instruction", "problem")


def is_searched(suite: str, questions: str | None) -> bool:
    """Return whether the questions of an evaluation are looked for in training rows. The rows of
    heldout_loss are where they come from a file: those of a split are apart from the training's.
    """
    return suite != "heldout_loss" or questions not in (None, *HELD_OUT)


def search_recipe(
    recipe: Recipe, evals: Sequence[EvalRecipe], fetch: bool = False
) -> dict[str, Leaks]:
    """Return what the rows that a recipe trains on hold of each eval, by its name.

    Args:
        fetch: whether rows and questions may be fetched from the Hub; else those that are not here
            are reported as not searched.
    """
    texts: dict[str, Sequence[EvalText]] = {}
    found: dict[str, Leaks] = {}
    for one in evals:
        if one.suite.name == "lm_eval":
            found[one.name] = Leaks(why="lm-eval reads them, so that is done with each evaluation")
            continue
        if not is_searched(one.suite.name, one.data.questions):
            continue
        try:
            if one.suite.name == "heldout_loss":
                texts[one.name] = list(_row_texts(one, recipe))
                continue
            chosen = load_questions(one) if fetch else local_questions(one)
            if chosen is None:
                found[one.name] = Leaks(why=f"they are {_OF_HUB}")
            else:
                texts[one.name] = list(_texts(chosen.questions))
        except RecipesError as error:  # the evaluation's own error, when it is its turn
            found[one.name] = Leaks(why=error.what)
    try:
        away = not fetch and any(map(is_on_hub, listed_sources(recipe.data)))
        if away or not texts:
            why = f"the rows are {_OF_HUB}"
            return found | {name: Leaks(why=why) for name in texts}
        return found | find_leaks(training_rows(recipe.data), texts)
    except RecipesError as error:  # the training's own error
        return found | {name: Leaks(why=error.what) for name in texts}


def leak_error(
    name: str, leaks: Leaks, recipe: Recipe, whose: str = "", limit: int = NUM_LISTED
) -> RecipeError:
    """Return the error about an eval whose questions are in training rows, or the warning about a
    few short ones.
    """
    remedy = (
        "take these rows out of the data, or these questions out of the eval: a model that was"
        " trained on them is not tested by them"
    )
    if leaks.accidental:
        remedy = (
            f"fewer than 1% of the questions, and all are short: at most"
            f" {leaks.leaked_questions / leaks.questions:.1%} of the result is theirs"
        )
    what = ": ".join(filter(None, ["warning" * leaks.accidental, whose, leaks.summary(name)]))
    return RecipeError(what, *leaks.lines(limit), remedy, file=shown_path(recipe.path))


def refuse_leaks_of(recipe: Recipe, evals: Sequence[EvalRecipe]) -> None:
    """Refuse to train on rows that hold questions or answers of evals, as far as they are here.

    Raises:
        RecipeErrors: one error for each eval, with the rows.
    """
    found = search_recipe(recipe, evals).items()
    errors = [leak_error(name, one, recipe) for name, one in found if one.is_error]
    if errors:
        raise RecipeErrors(errors)


def leaks_of_run(recipe: EvalRecipe, log: EvalLog) -> Leaks | None:
    """Return what the rows that a model was trained on hold of the questions it was asked; None for
    a model that nobody trained here, and for suites that are not searched.
    """
    folder = log.file.parents[2]
    state = read_object(folder / "run.json")
    fingerprint = (state.get("guard") or {}).get("data_fingerprint")
    if fingerprint is None or not is_searched(log.suite, recipe.data.questions):
        return None
    try:
        if log.suite == "lm_eval":
            found = _harness_texts(log.file.parent / "samples")
        elif log.suite == "heldout_loss":
            found = _row_texts(recipe, Recipe.read(folder / RECIPE_FILE))
        else:
            found = _texts(load_questions(recipe).questions)
        texts = list(found)
        key = str(fingerprint), hash_of([[one.question, one.part, one.text] for one in texts])
        if key not in _FOUND:
            _FOUND[key] = _search_run(folder, str(fingerprint), texts)
    except RecipesError as error:
        return Leaks(why=error.what)
    return _FOUND[key]


# Arms that differ in anything but their rows are searched once.
_FOUND: dict[tuple[str, str], Leaks] = {}


def _search_run(folder: Path, fingerprint: str, texts: Sequence[EvalText]) -> Leaks:
    section = Recipe.read(folder / RECIPE_FILE).data
    rows = recorded_rows(section, read_object(folder / "splits.json"), fingerprint)
    if rows is None:
        return Leaks(why="the data is not what it was when the run was trained")
    return find_leaks(rows, {"": texts})[""]


def _texts(questions: Sequence[Question]) -> Iterator[EvalText]:
    """Yield the texts of questions: every turn, reference answers, and what `exact` expects."""
    for one in questions:
        for turn in one.turns:
            yield EvalText(one.id, "question", turn)
        for answer in one.reference or ():
            yield EvalText(one.id, "answer", answer)
        for rule in (rule for rule in one.checks if rule.name == "exact"):
            expected = rule.expected if isinstance(rule.expected, list) else [rule.expected]
            for answer in expected:
                yield EvalText(one.id, "answer", answer)


def _row_texts(one: EvalRecipe, recipe: Recipe) -> Iterator[EvalText]:
    """Yield what the loss is measured on: the answers of the rows of a file. Their questions are
    often alike ("Summarize this text.") without being a sign of anything.
    """
    file = str(one.path_of("data.questions"))
    for row in read_data(recipe.reading(file).data, BadRows()).rows:
        if "text" in row.fields:
            yield EvalText(row.id, "answer", row.fields["text"])
            continue
        for message in conversation_of(row, None):
            if message["role"] == "assistant":
                yield EvalText(row.id, "answer", message["content"])


def _harness_texts(samples: Path) -> Iterator[EvalText]:
    """Yield the texts of lm-eval's documents: what stands under a name for questions, and every
    text that is long enough to be known by its 13-grams.
    """
    for file in sorted(samples.glob("samples_*.jsonl")):
        task = file.stem.removeprefix("samples_")
        for sample in read_rows(file):
            name = f"{task} {sample.get('doc_id')}"
            for key, text in _strings(sample.get("doc") or {}):
                if key in _QUESTION_KEYS or text.count(" ") >= 12:
                    yield EvalText(name, "question", text)
            if isinstance(target := sample.get("target"), str) and target.count(" ") >= 12:
                yield EvalText(name, "answer", target)


def _strings(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, one in value.items():
        for text in one if isinstance(one, list) else [one]:
            if isinstance(text, str):
                yield key, text
            elif isinstance(text, dict):
                yield from _strings(text)
