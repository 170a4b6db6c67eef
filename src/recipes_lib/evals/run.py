"""`evaluate`: eval recipes and words -> answers, judgments and result.json in each run.

What is finished is read. Else base after base is loaded once and every suite asks its models on it;
then judge after judge gives its verdicts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from recipes_lib.core.environment import command_line, git_state, library_versions, quiet_libraries
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.files import Row, hash_of, utc_now
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import count, say
from recipes_lib.evals.answers import Answers, answer_all, answers_in_file, reference_answers
from recipes_lib.evals.asking import ServerDown, ServerGone
from recipes_lib.evals.engines import Engines, answered_by, transformers
from recipes_lib.evals.engines.base import Target
from recipes_lib.evals.faults import SAME
from recipes_lib.evals.judge import Judge, opened
from recipes_lib.evals.judged import JudgedSuite, judge_model
from recipes_lib.evals.leaks import leaks_of_run
from recipes_lib.evals.log import REFERENCE, EvalLog, log_file, read_eval_log, write_log
from recipes_lib.evals.models import Model, base_of, loaded, resolve
from recipes_lib.evals.questions import QuestionSet, is_answer_file, load_questions
from recipes_lib.evals.recipe import SUITES, EvalRecipe, check_allowed, load_eval
from recipes_lib.evals.suites import Suite, suite_class
from recipes_lib.weights.runs import BASE, check_weights, families

_OVERRIDE = re.compile(r"(?:--)?[^\W\d]\w*(?:\.[^\W\d]\w*)+=")
_MOST_FAULTY = 0.1  # share of the answers that may have a fault without a banner
Side: TypeAlias = Model | Answers  # a model that is asked, or answers that are there


class Sides(NamedTuple):
    """Who answers, and with whom that is compared."""

    target: Side
    opponent: Side | None = None


@dataclass(eq=False)
class EvalTask:
    """What `evaluate_tasks` is asked for: one eval recipe, the words of its models, and their
    opponent (`reference`, `base`, another model; None for the recipe's own).
    """

    recipe: EvalRecipe
    words: tuple[str, ...]
    against: str | None = None
    suite: Suite = field(init=False)
    sides: dict[str, Sides] = field(init=False, default_factory=dict)  # by word, what is left to do
    answers: dict[str, Answers] = field(init=False, default_factory=dict)  # by the model's name
    logs: dict[str, EvalLog] = field(init=False, default_factory=dict)  # by word

    def models(self) -> list[Model]:
        """Return every model that is to be asked: targets first, then opponents."""
        targets = [sides.target for sides in self.sides.values()]
        opponents = [sides.opponent for sides in self.sides.values()]
        return [side for side in targets + opponents if isinstance(side, Model)]

    def words_with(self, model: Model) -> list[str]:
        """Return the words that need a model, as a target or as an opponent."""
        words = []
        for word, sides in self.sides.items():
            if model.name in [side.name for side in sides if isinstance(side, Model)]:
                words.append(word)
        return words


OnError = Callable[[EvalTask, str, Exception], None]  # the model's word, empty for all of the task


@contextmanager
def _reported(
    on_error: OnError | None, tasks: Sequence[EvalTask], model: Model | None = None, word: str = ""
) -> Iterator[None]:
    """On an error drop the affected task, model or word, report it, and continue."""
    try:
        yield
    except Exception as error:
        if on_error is None:
            raise
        for task in tasks:
            affected = [word]
            if model:
                affected = task.words_with(model)
            elif not word:
                task.sides.clear()
            for dropped in affected:
                task.sides.pop(dropped, None)
                on_error(task, dropped, error)


def evaluate(
    recipes: Sequence[EvalRecipe], words: Sequence[str], against: str | None = None, **options: Any
) -> list[EvalLog]:
    """Evaluate models with every eval recipe; return the logs, recipe after recipe.

    Args:
        words: runs, models, `base` or files with answers.
        against: the opponent in the suites that compare; None for each recipe's.
        options: of `evaluate_tasks`.
    """
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two eval recipes are called '{name}'", "rename one of them")
    if not any(recipe.opponent(None) for recipe in recipes):
        recipes[0].opponent(against)  # refuses one
    words = tuple(dict.fromkeys(words))
    tasks = []
    for recipe in recipes:
        has_opponent = recipe.opponent(None) is not None
        tasks.append(EvalTask(recipe, words, against if has_opponent else None))
    return evaluate_tasks(tasks, **options)


def evaluate_tasks(
    tasks: Sequence[EvalTask], *, remote_code: bool = False, on_error: OnError | None = None
) -> list[EvalLog]:
    """Do every task; each base and each judge is loaded once, after all words were resolved.

    Args:
        remote_code: whether the command line allowed code that ships with a model.
        on_error: is called where a model, or all of a task, failed; the others go on. None: raised.
    """
    for task in tasks:
        with _reported(on_error, [task]):
            _prepare(task, remote_code)
            _take_finished(task)
    if any(task.sides for task in tasks):
        quiet_libraries()
    models: dict[str, Model] = {}
    for task in tasks:
        models |= {model.name: model for model in task.models()}
    down: dict[str, ServerDown] = {}
    for group in families(list(models.values())):
        _ask_group(group, tasks, down, on_error)
    _judge_all(tasks, on_error)
    return [task.logs[word] for task in tasks for word in task.words if word in task.logs]


# ---- before a model is loaded ----


def _prepare(task: EvalTask, remote_code: bool) -> None:
    """Resolve the words of a task, load its questions, and find who each is compared with."""
    recipe = task.recipe
    check_allowed([recipe], remote_code)
    chosen = QuestionSet((), 0)
    if SUITES[recipe.suite.name].row:
        chosen = load_questions(recipe)
    task.suite = suite_class(recipe.suite.name)(recipe, chosen)
    opponent = recipe.opponent(task.against)
    words = list(task.words)
    if opponent not in (None, REFERENCE, BASE):
        words.append(str(opponent))
    side_of: dict[str, Side] = {}
    if recipe.is_judged:
        for word in filter(is_answer_file, words):
            side_of[word] = answers_in_file(Path(word), chosen.questions)
    models = resolve([word for word in words if word not in side_of], recipe, remote_code)
    side_of |= models
    if opponent == REFERENCE:
        side_of[REFERENCE] = reference_answers(chosen.questions)
    for word in task.words:
        target = side_of[word]
        other = side_of.get(opponent or "")
        if opponent == BASE:
            other = base_of(target)
        task.sides[word] = Sides(target, other)
    task.suite.prepare([models[word] for word in task.words if word in models])


def _take_finished(task: EvalTask) -> None:
    """Take the results that are there already: no model, tokenizer or judge is loaded for them.
    Those of a judge are taken together or not at all, as its audit is about all of them.
    """
    recipe = task.recipe
    stored: dict[str, EvalLog] = {}
    for word, sides in task.sides.items():
        assert sides.target.run is not None
        against = sides.opponent.name if sides.opponent else None
        with suppress(RecipesError):  # not there, or damaged
            log = read_eval_log(log_file(sides.target.run.path, recipe.name, against))
            if not (log.leaks and log.leaks.why):
                stored[word] = log
    judge = None
    if recipe.judge and stored:
        judge = Judge(recipe.judge).fingerprint
    current = {word: log for word, log in stored.items() if log.key == _key(task, word, judge)}
    if recipe.is_judged and len(current) < len(task.sides):
        return
    task.logs |= current
    for word in current:
        del task.sides[word]


def _key(task: EvalTask, word: str, judge: str | None = None) -> str:
    """The hash of all that decides a result."""
    sides = task.sides[word]
    identities: list[object] = []
    for side in sides:
        if isinstance(side, Model):
            answers_of = answered_by(task.recipe.generation, side.served_name, side.weights)
            identities.append([answers_of, side.prompt_hash])
        else:
            identities.append(side.digest if side else None)
    reads = task.suite.reads(sides.target)
    return hash_of(task.recipe.settings_key(), identities, judge, reads)


# ---- answers ----


def _ask_group(
    group: Sequence[Model],
    tasks: Sequence[EvalTask],
    down: dict[str, ServerDown],
    on_error: OnError | None,
) -> None:
    """Load one base, and let every suite ask the models on it but those that fail.

    Args:
        down: addresses of servers that gave no reply, with what was said then.
    """
    usable = []
    for model in group:
        with _reported(on_error, tasks, model):
            # damaged weights are found before hours of answers, and cost their own model alone
            if model.trained:
                check_weights(model.run, model.full)
            usable.append(model)
    with loaded(usable) as using:
        targets = {model.name: model.target(partial(using, model)) for model in usable}
        with Engines(list(targets.values())) as engines:
            for model in usable:
                for task in tasks:
                    with _reported(on_error, [task], model):
                        if task.words_with(model):
                            _ask(task, model, targets[model.name], engines, down)


def _ask(
    task: EvalTask, model: Model, target: Target, engines: Engines, down: dict[str, ServerDown]
) -> None:
    """Let a suite ask one model; what no judge decides is done then."""
    recipe = task.recipe
    suite = task.suite
    section = recipe.generation
    if suite.chosen.questions:
        engine = engines.engine(section, target)
        gone = down.get(section.address) if section.is_served else None
        try:
            answers = answer_all(recipe, model, engine, suite.chosen.questions, gone)
        except ServerDown as error:
            down.setdefault(section.address, error)
            raise
        task.answers[model.name] = answers
        if recipe.is_judged:
            return
        log = suite.log(answers)
        log = replace(
            log,
            subset=suite.chosen.subset,
            answers=answers.facts,
            notes=(*log.notes, *answers.notes),
        )
    else:
        model.record()
        facts = replace(model.facts(), **asdict(transformers.facts_of(model.recipe)))
        with run_lock(model.folder(recipe.name), wait=True), target.using() as network:
            log = replace(suite.measure(model, network), answers=facts)
    words = task.words_with(model)
    log = replace(
        log,
        target=model.name,
        key=_key(task, words[0]),
        file=log_file(model.run.path, recipe.name, None),
    )
    task.logs |= dict.fromkeys(words, write_result(recipe, log))


# ---- verdicts ----


def _judge_all(tasks: Sequence[EvalTask], on_error: OnError | None) -> None:
    """Open one judge after another, and write the results of all tasks that want it."""
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


def _judge(task: EvalTask, judge: Judge, on_error: OnError | None) -> None:
    """Ask one judge for every verdict, and write the results but those that lack one."""
    assert isinstance(task.suite, JudgedSuite)
    probes: list[Row] = []
    for word, sides in list(task.sides.items()):
        with _reported(on_error, [task], word=word):
            target, opponent = [
                task.answers[side.name] if isinstance(side, Model) else side for side in sides
            ]
            assert target
            try:
                log = judge_model(task.suite, target, opponent, judge, probes)
            except ServerGone as error:
                judge.gone = error  # for the other words and tasks too
                raise
            log = replace(log, key=_key(task, word, judge.fingerprint))
            task.logs[word] = write_result(task.recipe, log)


# ---- results ----


def write_result(recipe: EvalRecipe, log: EvalLog) -> EvalLog:
    """Complete a log with what is the same for every suite, and write it into its run."""
    leaks = leaks_of_run(recipe, log)
    banners: list[str] = []
    if leaks and leaks.is_error:
        banners.append(leaks.summary(recipe.name))
    banners += log.banners
    for fault, (faulty, n) in log.faults.items():
        limit = _MOST_FAULTY * n
        if fault == SAME:
            # two answers that are alike say nothing, however few there are
            limit = max(2.0, limit)
        if faulty > limit:
            banners.append(f"{faulty} of {n} answers {fault}")
    if log.subset:
        banners.append(log.subset)
    metrics = []
    for metric in log.metrics:
        metrics.append(replace(metric, eval=log.eval, suite=log.suite, file=log.file))
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
        logs_of_eval = [log for log in logs if log.eval == name]
        first = logs_of_eval[0]
        suite = suite_class(first.suite)
        decided_by = suite.title
        if first.judge:
            decided_by = f"judge {first.judge.model} ({first.judge.mode})"
        lines = [f"{name}: {count(first.n, 'question')}, {decided_by}", ""]
        for log in logs_of_eval:  # what must be read before the numbers
            lines += [f"! {log.target}: {text}" for text in log.banners]
            lines += [f"  {log.target}: {text}" for text in log.notes]
        lines += ["", *suite.table(logs_of_eval)]
        lines += [f"$ {log.lm_eval_command}" for log in logs_of_eval if log.lm_eval_command]
        say(*lines, "")
    for log in logs:
        say(f"kept in {shown_path(log.file)}")


# ---- words of a command line ----


def split_words(
    words: Sequence[str], overrides: Sequence[str] = ()
) -> tuple[list[EvalRecipe], list[str]]:
    """Return the eval recipes and the models of a command line.

    YAML files are eval recipes; `section.key=value` words override a value in each of them; what is
    left are models.
    """
    values = [word for word in words if _OVERRIDE.match(word)]
    rest = [word for word in words if word not in values]
    files = [word for word in rest if Path(word).suffix in (".yaml", ".yml")]
    models = [word for word in rest if word not in files]
    recipes = [load_eval(file, [*values, *overrides]) for file in dict.fromkeys(files)]
    if not (recipes and models):
        what = "no model given" if recipes else "no eval recipe given"
        named = [recipe_path(f"evals/{word}") for word in models]
        near = [f"did you mean {shown_path(file)}?" for file in named if file.is_file()]
        raise RecipeError(
            what, *near, "for example: recipes eval evals/quickstart/alpaca_eval.yaml RUN"
        )
    return recipes, models
