"""Whether rows that are trained on hold questions or answers of an evaluation. Needs no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from recipes_lib.config.recipe import DPO, RECIPE_FILE, SFT, Recipe, load_recipe
from recipes_lib.core.errors import DataError, RecipeError, RecipeErrors, RecipesError
from recipes_lib.core.files import hash_of, read_object, read_rows
from recipes_lib.core.project import shown_path
from recipes_lib.data.errors import BadRows
from recipes_lib.data.leaks import EvalText, Leaks, find_leaks
from recipes_lib.data.reading import read_data, train_rows
from recipes_lib.data.rows import PAIR, answer_row, conversation_of
from recipes_lib.data.sources import needs_hub
from recipes_lib.evals.log import EvalLog
from recipes_lib.evals.questions import load_questions, local_questions
from recipes_lib.evals.recipe import HELD_OUT, ROW_SUITES, EvalRecipe

_OF_HUB = "on the Hub, so the search runs before the first training"
_QUESTION_KEYS = ("question", "query", "prompt", "instruction", "problem")
_LONG = 12  # spaces: a text of more is known by its 13-grams
# arms that differ in anything but their rows are searched once
_SEARCHED: dict[tuple[str, str], Leaks] = {}


def is_searched(suite: str, questions: str | None) -> bool:
    """Return whether the questions are looked for in training rows, as a split's need not be."""
    return suite not in ROW_SUITES or questions not in (None, *HELD_OUT)


def search_recipe(
    recipe: Recipe, evals: Sequence[EvalRecipe], fetch: bool = False
) -> dict[str, Leaks]:
    """Return what the rows that a recipe trains on hold of each eval, fetched if they may be."""
    texts: dict[str, list[EvalText]] = {}
    leaks: dict[str, Leaks] = {}
    for evaluation in evals:
        if is_searched(evaluation.suite.name, evaluation.data.questions):
            try:
                texts[evaluation.name] = _texts_of(evaluation, recipe, fetch)
            except RecipesError as error:
                leaks[evaluation.name] = Leaks(why=error.what)
    if not texts:
        return leaks
    try:
        if not fetch and needs_hub(recipe.data):
            raise DataError(f"the rows are {_OF_HUB}")
        return leaks | find_leaks(train_rows(recipe), texts)
    except RecipesError as error:
        return leaks | dict.fromkeys(texts, Leaks(why=error.what))


def leak_error(name: str, leaks: Leaks, recipe: Recipe, limit: int = 10) -> RecipeError:
    """Return the error about an eval whose questions are in training rows, or a warning."""
    what = leaks.summary(name)
    remedy = "remove these rows from the data, or these questions from the eval"
    if not leaks.is_error:
        what = f"warning: {what}"
        share = leaks.leaked_questions / leaks.questions
        remedy = f"few questions, all short: they decide at most {share:.1%} of the result"
    return RecipeError(what, *leaks.lines(limit), remedy, file=shown_path(recipe.path))


def refuse_leaks_of(recipe: Recipe, evals: Sequence[EvalRecipe]) -> None:
    """Refuse to train on rows that hold questions or answers of evals, as far as they are here."""
    by_eval = search_recipe(recipe, evals)
    errors = [leak_error(name, leaks, recipe) for name, leaks in by_eval.items() if leaks.is_error]
    if errors:
        raise RecipeErrors(errors)


def leaks_of_run(recipe: EvalRecipe, log: EvalLog) -> Leaks | None:
    """Return what the rows that a model was trained on hold of its questions, if that is known."""
    folder = log.file.parents[2]
    state = read_object(folder / "run.json")
    fingerprint = (state.get("guard") or {}).get("data_fingerprint")
    if fingerprint is None or not is_searched(log.suite, recipe.data.questions):
        return None
    try:
        trained = load_recipe(folder / RECIPE_FILE)
        texts = _texts_of(recipe, trained, True, log.file.parent / "samples")
        key = str(fingerprint), hash_of([[text.question, text.part, text.text] for text in texts])
        if key not in _SEARCHED:
            rows = train_rows(trained, state.get("data_files", {}))
            _SEARCHED[key] = find_leaks(rows, {"": texts})[""]
    except RecipesError as error:
        return Leaks(why=error.what)
    return _SEARCHED[key]


def _texts_of(
    recipe: EvalRecipe, trained: Recipe, fetch: bool, samples: Path | None = None
) -> list[EvalText]:
    """The texts of an evaluation that no training row may hold (of lm-eval, those in the folder
    `samples`); an error says why there are none.
    """
    if recipe.suite.name in ROW_SUITES:
        return list(_row_texts(recipe, trained))
    if recipe.suite.name == "lm_eval":
        if samples is None:
            raise DataError("lm-eval reads them, so the search runs with each evaluation")
        return list(_harness_texts(samples))
    chosen = load_questions(recipe) if fetch else local_questions(recipe)
    if chosen is None:
        raise DataError(f"they are {_OF_HUB}")
    texts = []
    for question in chosen.questions:
        answers = list(question.reference or ())
        for rule in question.checks:
            if rule.check == "exact":
                answers += rule.expected_texts
        texts += [EvalText(question.id, "question", turn) for turn in question.turns]
        texts += [EvalText(question.id, "answer", answer) for answer in answers]
    return texts


def _row_texts(recipe: EvalRecipe, trained: Recipe) -> Iterator[EvalText]:
    """The answers of a file's rows; their questions are often alike by chance. Of a pair both
    answers.
    """
    file = str(recipe.path_of("data.questions"))
    stage = DPO if recipe.suite.name == "preference" else SFT
    for row in read_data(trained.reading(file, stage).data, BadRows(), stage).rows:
        if stage == DPO:
            for name in PAIR:
                answer = conversation_of(answer_row(row, name), None)[-1]
                yield EvalText(row.id, "answer", answer["content"])
            continue
        if "text" in row.fields:
            yield EvalText(row.id, "answer", row.fields["text"])
            continue
        for message in conversation_of(row, None):
            if message["role"] == "assistant":
                yield EvalText(row.id, "answer", message["content"])


def _harness_texts(samples: Path) -> Iterator[EvalText]:
    """The texts of lm-eval's documents: what is called a question, and every long text."""
    for file in sorted(samples.glob("samples_*.jsonl")):
        task = file.stem.removeprefix("samples_")
        for sample in read_rows(file):
            name = f"{task} {sample.get('doc_id')}"
            target = str(sample.get("target"))
            for key, text in (sample.get("doc") or {}).items():
                if isinstance(text, str) and (key in _QUESTION_KEYS or text.count(" ") >= _LONG):
                    yield EvalText(name, "question", text)
            if target.count(" ") >= _LONG:
                yield EvalText(name, "answer", target)
