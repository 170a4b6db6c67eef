"""`evaluate`: eval recipes and words -> answers, judgments and result.json in each run.

What is finished is read. Else base after base is loaded once and every suite asks its models on it;
then judge after judge gives its verdicts.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from recipes_lib.core.environment import command_line, git_state, library_versions, quiet_libraries
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.files import Row, hash_of, utc_now
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import count, say
from recipes_lib.evals.answering import answer_all, answers_in_file, reference_answers
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.asking import NotAsked, ServerDown, ServerGone
from recipes_lib.evals.engines import Engines, answered_by, transformers
from recipes_lib.evals.engines.base import Target
from recipes_lib.evals.judge import Judge, JudgedSuite, judge_model, opened
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
from recipes_lib.evals.models import Model, base_of, loaded, resolve
from recipes_lib.evals.questions import QuestionSet, is_answer_file, load_questions
from recipes_lib.evals.recipe import SUITES, EvalRecipe, check_allowed, load_eval
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
        ordered = chain(*zip(*self.sides.values(), strict=True))
        return [side for side in ordered if isinstance(side, Model)]

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


@contextmanager
def _reported(
    on_error: OnError, tasks: Sequence[EvalTask], model: Model | None = None, word: str = ""
) -> Any:
    """Leave tasks, or a model or a word in them, out where something fails; the others go on."""
    try:
        yield
    except Exception as error:
        for task in tasks:
            if not (model or word):
                task.sides.clear()
            for each in task.words_with(model) if model else [word]:
                task.sides.pop(each, None)
                on_error(task, each, error)


def evaluate(
    recipes: Sequence[EvalRecipe],
    words: Sequence[str],
    against: str | None = None,
    **options: Any,
) -> list[EvalLog]:
    """Evaluate models with every eval recipe; return the logs, recipe after recipe.

    Args:
        words: runs, models, `base` or files with answers.
        against: the opponent in the suites that compare; None for each recipe's.
        options: of `evaluate_tasks`.
    """
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"two eval recipes are called '{twice}'", "rename one of them")
    if not any(recipe.opponent(None) for recipe in recipes):
        recipes[0].opponent(against)  # refuses one
    words = tuple(dict.fromkeys(words))
    tasks = [EvalTask(each, words, against if each.opponent(None) else None) for each in recipes]
    return evaluate_tasks(tasks, **options)


def evaluate_tasks(
    tasks: Sequence[EvalTask],
    *,
    remote_code: bool = False,
    on_error: OnError = _raised,
) -> list[EvalLog]:
    """Do every task; each base and each judge is loaded once, after all words were resolved.

    Args:
        remote_code: whether the command line allowed code that ships with a model.
        on_error: is called where a model, or all of a task, failed; the others go on.
    """
    for task in tasks:
        with _reported(on_error, [task]):
            _prepare(task, remote_code)
            _take_finished(task)
    if any(task.sides for task in tasks):
        quiet_libraries()
    models = {model.name: model for task in tasks for model in task.models()}
    down: dict[str, ServerDown] = {}
    for group in families(list(models.values())):
        _ask_group(group, tasks, down, on_error)
    waiting = [task for task in tasks if task.sides and task.recipe.judge]
    while waiting:
        section = waiting[0].recipe.judge
        assert section is not None
        same = [task for task in waiting if task.recipe.judge == section]
        waiting = [task for task in waiting if task not in same]
        with _reported(on_error, same), opened(section) as judge:
            for task in same:
                with _reported(on_error, [task]):
                    _judge(task, judge, on_error)
    return [task.logs[word] for task in tasks for word in task.words if word in task.logs]


def _prepare(task: EvalTask, remote_code: bool) -> None:
    """Resolve the words of a task, load its questions, and find who each is compared with."""
    recipe = task.recipe
    check_allowed([recipe], remote_code)
    chosen = load_questions(recipe) if SUITES[recipe.suite.name].row else QuestionSet((), 0)
    task.suite = suite_class(recipe.suite.name)(recipe, chosen)
    opponent = recipe.opponent(task.against)
    named = [*task.words, *([opponent] if opponent not in (None, REFERENCE, BASE) else [])]
    files = [*filter(is_answer_file, named)] if recipe.is_judged else []
    known: dict[str, Side] = {word: answers_in_file(Path(word), chosen.questions) for word in files}
    known |= resolve([word for word in named if word not in known], recipe, remote_code)
    if opponent == REFERENCE:
        known[REFERENCE] = reference_answers(chosen.questions)
    targets = [side for word in task.words if isinstance(side := known[word], Model)]
    for word in task.words:
        side, other = known[word], known.get(opponent or "")
        if opponent == BASE:
            other = base_of(side)
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
        with suppress(RecipesError):  # not there, or damaged
            log = read_eval_log(file)
            if not (log.leaks and log.leaks.why):
                logs[word] = log
    judge = Judge(recipe.judge).fingerprint if recipe.judge and logs else None
    logs = {word: log for word, log in logs.items() if log.key == _key(task, word, judge)}
    if not recipe.is_judged or len(logs) == len(task.sides):
        task.logs |= logs
        task.sides = {word: pair for word, pair in task.sides.items() if word not in logs}


def _key(task: EvalTask, word: str, judge: str | None = None) -> str:
    """The hash of all that decides a result."""
    target, opponent = task.sides[word]
    known = [
        [
            answered_by(task.recipe.generation, side.served_name, side.weights),
            side.prompt_hash,
        ]
        if isinstance(side, Model)
        else side and side.digest
        for side in (target, opponent)
    ]
    return hash_of(task.recipe.settings_key(), known, judge, task.suite.reads(target))


def _ask_group(
    group: Sequence[Model],
    tasks: Sequence[EvalTask],
    down: dict[str, ServerDown],
    on_error: OnError,
) -> None:
    """Load one base, and let every suite ask the models on it but those that fail.

    Args:
        down: addresses of servers that gave no reply, with what was said then.
    """
    usable = []
    for model in group:
        with _reported(on_error, tasks, model):
            if model.trained:
                check_weights(model.run, model.full)
            usable.append(model)
    with loaded(usable) as using:
        targets = {model.name: model.target(partial(using, model)) for model in usable}
        with Engines([*targets.values()]) as engines:
            for model in usable:
                for task in tasks:
                    with _reported(on_error, [task], model):
                        if task.words_with(model):
                            _ask(task, model, targets[model.name], engines, down)


def _ask(
    task: EvalTask,
    model: Model,
    target: Target,
    engines: Engines,
    down: dict[str, ServerDown],
) -> None:
    """Let a suite ask one model; what no judge decides is done then."""
    recipe, suite = task.recipe, task.suite
    if suite.chosen.questions:
        address = str(recipe.generation.base_url)
        engine = engines.engine(recipe.generation, target)
        if recipe.generation.is_served and address in down:
            engine = NotAsked(engine, down[address])
        try:
            answers = answer_all(recipe, model, engine, suite.chosen.questions)
        except ServerDown as error:
            down.setdefault(address, error)
            raise
        task.answers[model.name] = answers
        if recipe.is_judged:
            return
        log = suite.log(answers)
        notes = (*log.notes, *answers.notes)
        log = replace(log, subset=suite.chosen.subset, answers=answers.facts, notes=notes)
    else:
        model.record()
        facts = replace(model.facts(), **asdict(transformers.facts_of(model.recipe)))
        with run_lock(model.folder(recipe.name), wait=True), target.using() as network:
            log = replace(suite.measure(model, network), answers=facts)
    words = task.words_with(model)
    file = log_file(model.run.path, recipe.name, None)
    log = replace(log, target=model.name, key=_key(task, words[0]), file=file)
    task.logs |= dict.fromkeys(words, _written(recipe, log))


def _judge(task: EvalTask, judge: Judge, on_error: OnError) -> None:
    """Ask one judge for every verdict, and write the results but those that lack one."""
    suite, probes = task.suite, list[Row]()
    assert isinstance(suite, JudgedSuite)
    for word, sides in [*task.sides.items()]:
        with _reported(on_error, [task], word=word):
            answers, opponent = (
                task.answers[side.name] if isinstance(side, Model) else side for side in sides
            )
            assert answers
            try:
                log = judge_model(suite, answers, opponent, judge, probes)
            except ServerGone as error:
                judge.give_up(error)  # for the other words and tasks too
                raise
            log = replace(log, key=_key(task, word, judge.fingerprint))
            task.logs[word] = _written(task.recipe, log)


def _written(recipe: EvalRecipe, log: EvalLog) -> EvalLog:
    """Complete a log and write it into its run."""
    leaks = leaks_of_run(recipe, log)
    banners = [leaks.summary(recipe.name)] if leaks and leaks.is_error else []
    banners += log.banners
    for what, (faulty, n) in answer_faults(log).items():
        if faulty > (max(2, _MOST * n) if what == SAME else _MOST * n):
            banners.append(f"{faulty} of {n} answers {what}")
    banners += [log.subset] if log.subset else []
    place: Any = {"eval": log.eval, "suite": log.suite, "file": log.file}
    log = replace(
        log,
        metrics=tuple(replace(metric, **place) for metric in log.metrics),
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
        what = f"judge {judge.model} ({judge.mode})" if judge else suite.title
        lines = [f"{name}: {count(same[0].n, 'question')}, {what}", ""]
        for log in same:
            lines += [f"! {log.target}: {text}" for text in log.banners]
            lines += [f"  {log.target}: {text}" for text in log.notes]
        lines += ["", *suite.table(same)]
        lines += [f"$ {log.lm_eval_command}" for log in same if log.lm_eval_command]
        say(*lines, "")
    for log in logs:
        say(f"kept in {shown_path(log.file)}")


def split_words(
    words: Sequence[str], overrides: Sequence[str] = ()
) -> tuple[list[EvalRecipe], list[str]]:
    """Return the eval recipes and the models of a command line.

    YAML files are eval recipes; `section.key=value` words override a value in each of them; what is
    left are models.
    """
    own = [word for word in words if _OVERRIDE.match(word)]
    rest = [word for word in words if word not in own]
    files = [word for word in rest if Path(word).suffix in (".yaml", ".yml")]
    models = [word for word in rest if word not in files]
    recipes = [load_eval(file, [*own, *overrides]) for file in dict.fromkeys(files)]
    if not (recipes and models):
        what = "no model given" if recipes else "no eval recipe given"
        raise RecipeError(what, "for example: recipes eval evals/quickstart/alpaca_eval.yaml RUN")
    return recipes, models
