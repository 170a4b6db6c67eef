"""`evaluate`: eval recipes and words -> answers, judgments and result.json in each run.

What is finished is read. Else base after base is loaded once and every suite asks its models on it;
then judge after judge gives its verdicts. Everything is stored as it arrives: the same command
continues.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import read
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.environment import command_line, git_state, library_versions, quiet_libraries
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.files import hash_of, utc_now
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import say
from recipes_lib.evals.answers import Answers, answer_all, answers_in_file, reference_answers
from recipes_lib.evals.engine import HFEngine
from recipes_lib.evals.engine_openai import Engine, OpenAIEngine, served_fingerprint
from recipes_lib.evals.judge import Judge, JudgedSuite, judge_models, opened
from recipes_lib.evals.leaks import leaks_of_run
from recipes_lib.evals.log import (
    REFERENCE,
    SAME,
    EvalLog,
    answer_faults,
    log_file,
    read_eval_log,
    write_log,
)
from recipes_lib.evals.models import Model, base_of, is_run, loaded, resolve
from recipes_lib.evals.questions import QuestionSet, is_answer_file, load_questions
from recipes_lib.evals.recipe import (
    SUITES,
    EvalRecipe,
    check_allowed,
    load_eval,
)
from recipes_lib.evals.suites import Suite
from recipes_lib.weights.runs import BASE, check_weights, families

_OVERRIDE = re.compile(r"(?:--)?[^\W\d]\w*(?:\.[^\W\d]\w*)+=")
_MOST = 0.1  # share of the answers that may have a fault without a banner
Side = Model | Answers  # a model that is asked, or answers that are there


@dataclass(eq=False)
class EvalTask:
    """What `evaluate_tasks` is asked for: one eval recipe, the words of its models, and their
    opponent (`reference`, `base`, another model; None for the recipe's own).
    """

    recipe: EvalRecipe
    words: tuple[str, ...]
    against: str | None = None
    suite: Suite = field(init=False)
    # by word: who answers, and with whom that is compared
    sides: dict[str, tuple[Side, Side | None]] = field(init=False, default_factory=dict)
    answers: dict[str, Answers] = field(init=False, default_factory=dict)  # by the model's name
    logs: dict[str, EvalLog] = field(init=False, default_factory=dict)  # by word

    def models(self) -> list[Model]:
        """Return every model that is to be asked: targets first, then opponents."""
        ordered = [*zip(*self.sides.values(), strict=True)]
        return [side for sides in ordered for side in sides if isinstance(side, Model)]

    def words_with(self, model: Model) -> list[str]:
        """Return the words that need a model, as a target or as an opponent."""
        return [
            word
            for word, sides in self.sides.items()
            if any(isinstance(side, Model) and side.name == model.name for side in sides)
        ]


def suite_class(name: str) -> type[Suite]:
    """Return the class of a suite; nothing else imports it."""
    module = importlib.import_module(f"recipes_lib.evals.suites.{name}")
    suite: type[Suite] = getattr(module, SUITES[name].class_name)
    return suite


OnError = Callable[[EvalTask, str, Exception], None]  # the model's word, empty for all of the task


def _raised(task: EvalTask, word: str, error: Exception) -> None:
    raise error


def evaluate(
    recipes: Sequence[EvalRecipe],
    words: Sequence[str],
    against: str | None = None,
    **options: Any,
) -> list[EvalLog]:
    """Evaluate models with every eval recipe; return the logs, recipe after recipe.

    Args:
        words: runs, models, `base` (of the runs beside it), or files with answers.
        against: the opponent in the suites that compare; None for each recipe's.
        options: of `evaluate_tasks`.
    """
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"two eval recipes are called '{twice}'", "rename one of them")
    if not any(recipe.is_judged for recipe in recipes):
        recipes[0].opponent(against)  # refuses one
    words = tuple(dict.fromkeys(words))
    tasks = [EvalTask(recipe, words, against if recipe.is_judged else None) for recipe in recipes]
    return evaluate_tasks(tasks, **options)


def evaluate_tasks(
    tasks: Sequence[EvalTask],
    *,
    remote_code: bool = False,
    on_error: OnError = _raised,
) -> list[EvalLog]:
    """Do every task. Wrong words, recipes and questions are refused before anything is loaded.

    Args:
        tasks: each base and each judge is loaded once for all of them.
        remote_code: whether the command line allowed code that ships with a model.
        on_error: is called where a model, or all of a task, failed; if it does not raise the error,
            the others go on.
    """
    for task in tasks:
        try:
            _prepare(task, remote_code)
            _take_finished(task)
        except Exception as error:
            task.sides.clear()
            on_error(task, "", error)
    if any(task.sides for task in tasks):
        quiet_libraries()
    models = {model.name: model for task in tasks for model in task.models()}
    for group in families(list(models.values())):
        _ask_group(group, tasks, on_error)
    waiting = [task for task in tasks if task.sides and task.recipe.judge]
    while waiting:
        section = waiting[0].recipe.judge
        assert section is not None
        same = [task for task in waiting if task.recipe.judge == section]
        waiting = [task for task in waiting if task not in same]
        try:
            with opened(section) as judge:
                for task in same:
                    try:
                        _judge(task, judge)
                    except Exception as error:
                        on_error(task, "", error)
        except Exception as error:  # the judge cannot be had
            for task in same:
                on_error(task, "", error)
    return [task.logs[word] for task in tasks for word in task.words if word in task.logs]


def _prepare(task: EvalTask, remote_code: bool) -> None:
    """Resolve the words of a task, load its questions, and find who each is compared with."""
    recipe = task.recipe
    has_questions = bool(SUITES[recipe.suite.name].row)
    check_allowed([recipe], remote_code)
    if not has_questions and recipe.generation.engine == "openai":
        what = f"{recipe.suite.name} needs the weights in this process"
        raise recipe.error("generation.engine", what, "set generation.engine: transformers")
    chosen = load_questions(recipe) if has_questions else QuestionSet((), 0)
    task.suite = suite_class(recipe.suite.name)(recipe, chosen)
    opponent = recipe.opponent(task.against)
    named = [*task.words, *([opponent] if opponent not in (None, REFERENCE, BASE) else [])]
    files = [*filter(is_answer_file, named)]
    if files and not recipe.is_judged:
        what = f"{files[0]} is a file of answers; {recipe.suite.name} asks a model"
        raise RecipeError(what, "answers in files: alpaca_eval and mt_bench")
    known: dict[str, Side] = {word: answers_in_file(Path(word), chosen.questions) for word in files}
    known |= resolve([word for word in named if word not in known], recipe, remote_code)
    if opponent == REFERENCE:
        known[REFERENCE] = reference_answers(chosen.questions)
    targets = [side for word in task.words if isinstance(side := known[word], Model)]
    for word in task.words:
        side, other = known[word], known.get(opponent or "")
        if opponent == BASE:
            other = base_of(word, side if isinstance(side, Model) else None, targets)
        task.sides[word] = side, other
    task.suite.prepare(targets)


def _take_finished(task: EvalTask) -> None:
    """Take the results that are there already: no model, tokenizer or judge is loaded for them.
    Those of a judge are taken together or not at all, as its audit is about all of them.
    """
    recipe, logs = task.recipe, dict[str, EvalLog]()
    for word, (target, opponent) in task.sides.items():
        assert target.run is not None
        file = log_file(target.run.path, recipe.name, opponent.name if opponent else None)
        try:
            log = read_eval_log(file)
        except RecipesError:
            continue  # not there, or damaged
        is_searched = not (log.leaks and log.leaks.why)
        if is_searched and log.recipe == recipe.to_dict():
            logs[word] = log
    if recipe.is_judged and len(logs) < len(task.sides):
        return
    judge = Judge(recipe.judge).fingerprint if recipe.judge and logs else None
    logs = {word: log for word, log in logs.items() if log.key == _key(task, word, judge)}
    answers = {tuple(sample.answer for sample in log.metrics[0].samples) for log in logs.values()}
    # of models with the same answers each result says so
    if recipe.is_judged and len(answers) < len(task.sides):
        return
    task.logs |= logs
    task.sides = {word: pair for word, pair in task.sides.items() if word not in logs}


def _key(task: EvalTask, word: str, judge: str | None = None) -> str:
    """The hash of all that decides a result."""
    target, opponent = task.sides[word]
    known = [
        [_fingerprint(task.recipe, side), side.prompts.hash]
        if isinstance(side, Model)
        else side and side.digest
        for side in (target, opponent)
    ]
    return hash_of(task.recipe.settings_key(), known, judge, task.suite.reads(target))


# ---- answers ----


def _ask_group(group: Sequence[Model], tasks: Sequence[EvalTask], on_error: OnError) -> None:
    """Load one base, and let every suite ask the models on it but those that fail."""

    def leave_out(model: Model, error: Exception, tasks: Sequence[EvalTask]) -> None:
        for task in tasks:
            for word in task.words_with(model):
                del task.sides[word]
                on_error(task, word, error)

    for model in group:
        try:
            if model.trained:
                check_weights(model.trained.run, model.trained.full)
        except Exception as error:
            leave_out(model, error, tasks)
    usable = [model for model in group if any(task.words_with(model) for task in tasks)]
    with loaded(usable) as using:
        for model in usable:
            for task in tasks:
                try:
                    if task.words_with(model):
                        _ask(task, model, partial(using, model))
                except Exception as error:
                    leave_out(model, error, [task])


def _ask(task: EvalTask, model: Model, using: Callable[[], AbstractContextManager[Any]]) -> None:
    """Let a suite ask one model; what no judge decides is done then."""
    recipe, suite = task.recipe, task.suite
    if suite.chosen.questions:
        engine = _engine(recipe, model, using)
        answers = answer_all(recipe, model, engine, suite.chosen.questions)
        task.answers[model.name] = answers
        if recipe.is_judged:
            return
        log = replace(suite.log(answers), subset=suite.chosen.subset)
        facts = answers.facts
    else:
        model.record()
        with run_lock(model.folder(recipe.name), wait=True), using() as network:
            log, facts = suite.measure(model, network), model.facts()
    words = task.words_with(model)
    file = log_file(model.run.path, recipe.name, None)
    log = replace(log, target=model.name, key=_key(task, words[0]), answers=facts, file=file)
    task.logs |= dict.fromkeys(words, _written(recipe, log))


def _served_name(recipe: EvalRecipe, model: Model) -> str:
    return recipe.generation.served_name or (model.name if model.trained else model.word)


def _fingerprint(recipe: EvalRecipe, model: Model) -> str:
    """What the answers of a model are known by."""
    if recipe.generation.engine != "openai":
        return model.fingerprint
    weights = None if model.served_only else model.fingerprint
    return served_fingerprint(recipe.generation, _served_name(recipe, model), weights)


def _engine(
    recipe: EvalRecipe, model: Model, using: Callable[[], AbstractContextManager[Any]]
) -> Engine:
    """What answers for a model: a server, or the weights in this process."""
    section, fingerprint = recipe.generation, _fingerprint(recipe, model)
    if section.engine == "openai":
        return OpenAIEngine(section, _served_name(recipe, model), fingerprint)
    return HFEngine(using, model.prompts.tokenizer, fingerprint, section.batch_tokens)


# ---- results ----


def _judge(task: EvalTask, judge: Judge) -> None:
    """Ask one judge for every verdict, and write the results."""
    assert isinstance(task.suite, JudgedSuite)

    def answers_of(side: Side) -> Answers:
        return task.answers[side.name] if isinstance(side, Model) else side

    pairs = [
        (answers_of(target), answers_of(opponent) if opponent else None)
        for target, opponent in task.sides.values()
    ]
    logs = judge_models(task.suite, pairs, judge)
    for word, log in zip(task.sides, logs, strict=True):
        log = replace(log, key=_key(task, word, judge.fingerprint))
        task.logs[word] = _written(task.recipe, log)


def _written(recipe: EvalRecipe, log: EvalLog) -> EvalLog:
    """Complete a log and write it into its run."""
    leaks = leaks_of_run(recipe, log)
    banners = [leaks.summary(recipe.name)] if leaks and leaks.is_error else []
    banners += log.banners
    for what, (count, n) in answer_faults(log).items():
        if count > (max(2, _MOST * n) if what == SAME else _MOST * n):
            banners.append(f"{count} of {n} answers {what}")
    banners += [log.subset] if log.subset else []
    metrics = (
        replace(metric, eval=log.eval, suite=log.suite, file=log.file) for metric in log.metrics
    )
    log = replace(
        log,
        metrics=tuple(metrics),
        leaks=leaks,
        banners=tuple(banners),
        settings=recipe.settings_key(),
        written=utc_now(),
        git=dict(git_state()),
        libraries=library_versions(),
        recipe=recipe.to_dict(),
        command=command_line(),
    )
    write_log(log)
    return log


def say_results(logs: Sequence[EvalLog]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(log.eval for log in logs):
        same = [log for log in logs if log.eval == name]
        suite, judge = suite_class(same[0].suite), same[0].judge
        what = suite.title
        if judge is not None:
            what = f"{same[0].n} questions, judge {judge.model} ({judge.mode})"
        remarks: dict[tuple[str, str], list[str]] = {}  # what must be read first, of which models
        for mark, attribute in (("! ", "banners"), ("  ", "notes")):
            for log in same:
                for text in getattr(log, attribute):
                    remarks.setdefault((mark, text), []).append(log.target)
        lines = [f"{name}: {what}", ""]
        for (mark, text), models in remarks.items():
            named = "" if len(models) == len(same) else f"{', '.join(models)}: "
            lines.append(f"{mark}{named}{text}")
        lines += [*([""] if remarks else []), *suite.table(same)]
        lines += [f"$ {log.lm_eval_command}" for log in same if log.lm_eval_command]
        say("\n".join([*lines, ""]))
    for log in logs:
        say(f"kept in {shown_path(log.file)}")


# ---- words ----


def split_words(
    words: Sequence[str], overrides: Sequence[str] = ()
) -> tuple[list[EvalRecipe], list[str]]:
    """Return the eval recipes and the models of a command line.

    YAML files are eval recipes; `section.key=value` words override a value in each of them; what is
    left are models.
    """
    own = [word for word in words if _OVERRIDE.match(word)]
    rest = [word for word in words if word not in own]
    for word in rest:
        path = recipe_path(word)
        is_file = path.suffix in (".yaml", ".yml") and path.is_file()
        is_model = is_run(word) or Path(word).is_dir()
        if is_file and not is_model and read(path).kind == "recipe":
            hint = f"name its run, {load_recipe(path).name}; train it first: recipes train {word}"
            raise RecipeError(f"{word} is a training recipe; runs are evaluated", hint)
    files = [word for word in rest if Path(word).suffix in (".yaml", ".yml")]
    if not files:
        hint = "name its file first: recipes eval evals/quickstart/alpaca_eval.yaml RUN"
        raise RecipeError("no eval recipe is named", hint)
    models = [word for word in rest if word not in files]
    recipes = [load_eval(file, [*own, *overrides]) for file in dict.fromkeys(files)]
    if not models:
        hint = f"name runs or models: recipes eval {' '.join(files)} RUN"
        raise RecipeError("nothing to evaluate", hint)
    return recipes, models
