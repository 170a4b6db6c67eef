"""`evaluate`: eval recipes and words -> answers, judgments and result.json in each run.

Base after base is loaded once and every suite asks its models on it; then judge after judge gives
its verdicts. Everything is stored as it arrives: the same command continues.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import read
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.environment import command_line, git_state, library_versions, quiet_libraries
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of, utc_now
from recipes_lib.core.lock import waiting_lock
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import masked, say
from recipes_lib.evals.answers import Answers, answer_all, answers_in_file, reference_answers
from recipes_lib.evals.engine import HFEngine
from recipes_lib.evals.engine_openai import Engine, OpenAIEngine
from recipes_lib.evals.judge import Judge, opened
from recipes_lib.evals.judged import JudgedSuite, check_formats, judge_models
from recipes_lib.evals.leaks import leaks_of_run
from recipes_lib.evals.log import REFERENCE, SAME, EvalLog, answer_faults, log_file, write_log
from recipes_lib.evals.models import Loaded, Model, base_of, grouped, is_run, loaded, resolve
from recipes_lib.evals.questions import QuestionSet, check_allowed, is_answer_file, load_questions
from recipes_lib.evals.recipe import SUITES, EvalRecipe, find_eval, load_eval, no_opponent
from recipes_lib.evals.suites import Suite
from recipes_lib.evals.suites.alpaca_eval import AlpacaEval
from recipes_lib.evals.suites.checks import Checks
from recipes_lib.evals.suites.heldout_loss import HeldoutLoss
from recipes_lib.evals.suites.lm_eval import LMEval
from recipes_lib.evals.suites.mt_bench import MTBench
from recipes_lib.weights.runs import BASE, check_weights


@dataclass(frozen=True, eq=False)
class EvalTask:
    """What `evaluate` is asked for: one eval recipe, the words of its models, and their opponent
    (`reference`, `base`, another model; None for the recipe's own).
    """

    recipe: EvalRecipe
    words: tuple[str, ...]
    against: str | None = None


SUITE_CLASSES: dict[str, type[Suite]] = {
    "alpaca_eval": AlpacaEval,
    "mt_bench": MTBench,
    "lm_eval": LMEval,
    "checks": Checks,
    "heldout_loss": HeldoutLoss,
}
_OVERRIDE = re.compile(r"(?:--)?[^\W\d]\w*(?:\.[^\W\d]\w*)+=")
OnError = Callable[[EvalTask, str, Exception], None]  # the model's word, empty for all of the task
Side = Model | Answers  # a model that is asked, or answers that are there


@dataclass
class _Job:
    """A task, who answers for each word, and with whom that is compared."""

    task: EvalTask
    suite: Suite
    sides: dict[str, tuple[Side, Side | None]]
    answers: dict[str, Answers] = field(default_factory=dict)  # by name of the model
    logs: dict[str, EvalLog] = field(default_factory=dict)  # by word

    @property
    def recipe(self) -> EvalRecipe:
        """The eval recipe of the task."""
        return self.task.recipe

    def asked(self) -> list[Model]:
        """Every model that is to be asked: targets first, then opponents."""
        ordered = [*zip(*self.sides.values(), strict=True)]
        return [side for sides in ordered for side in sides if isinstance(side, Model)]

    def words_with(self, model: Model) -> list[str]:
        """The words that need a model, as a target or as an opponent."""
        return [
            word
            for word, sides in self.sides.items()
            if any(isinstance(side, Model) and side.name == model.name for side in sides)
        ]


def evaluate(
    recipes: Sequence[EvalRecipe],
    words: Sequence[str],
    against: str | None = None,
    **options: Any,
) -> list[EvalLog]:
    """Evaluate models with every eval recipe, and return the logs: recipe after recipe, each in the
    order of the words.

    Args:
        recipes: eval recipes.
        words: runs, models, `base` (of the runs beside it), or files with answers.
        against: the opponent in the suites that compare; None for each recipe's.
        options: of `evaluate_tasks`.
    """
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"two eval recipes are called '{twice}'", "rename one of them")
    compares = [recipe.is_judged or not against for recipe in recipes]
    if not any(compares):
        raise no_opponent(list(dict.fromkeys(recipe.suite.name for recipe in recipes)))
    tasks = [
        EvalTask(recipe, tuple(dict.fromkeys(words)), against if compared else None)
        for recipe, compared in zip(recipes, compares, strict=True)
    ]
    return evaluate_tasks(tasks, **options)


def evaluate_tasks(
    tasks: Sequence[EvalTask],
    *,
    allow_format_differences: bool = False,
    remote_code: bool = False,
    on_error: OnError | None = None,
) -> list[EvalLog]:
    """Do every task. Wrong words, recipes and questions are refused before anything is loaded.

    Args:
        tasks: what is to be done; each base and each judge is loaded once for all of them.
        allow_format_differences: compare models that were asked in different prompt formats.
        remote_code: whether the command line allowed code that ships with a model.
        on_error: is called where a model, or all of a task, failed; the others go on. None raises
            every error.

    Raises:
        RecipeError: a word is not a model, or formats differ.
        EvaluationIncomplete: answers or judgments are missing (exit 6).
    """

    def failed(task: EvalTask, word: str, error: Exception) -> None:
        if on_error is None:
            raise error
        on_error(task, word, error)

    quiet_libraries()
    jobs: list[_Job] = []
    for task in tasks:
        try:
            jobs.append(_job(task, remote_code))
        except Exception as error:
            failed(task, "", error)
    for group in grouped([model for job in jobs for model in job.asked()]):
        _ask_group(group, jobs, failed)
    by_judge: dict[str, list[_Job]] = {}
    for job in jobs:
        if job.recipe.is_judged and job.sides:
            by_judge.setdefault(str(job.recipe.judge), []).append(job)
    for same in by_judge.values():
        file = same[0].recipe.judge
        assert file is not None
        try:
            with opened(file) as judge:
                for job in same:
                    try:
                        _judge(job, judge, allow_format_differences)
                    except Exception as error:
                        failed(job.task, "", error)
        except Exception as error:  # the judge cannot be had
            for job in same:
                failed(job.task, "", error)
    return [job.logs[word] for job in jobs for word in job.task.words if word in job.logs]


def _job(task: EvalTask, remote_code: bool) -> _Job:
    """Resolve the words of a task, load its questions, and find who each is compared with."""
    recipe = task.recipe
    check_allowed(recipe, remote_code)
    has_questions = bool(SUITES[recipe.suite.name].row)
    if not has_questions and recipe.generation.engine == "openai":
        what = f"{recipe.suite.name} needs the weights in this process"
        raise recipe.error("generation.engine", what, "set generation.engine: transformers")
    chosen = load_questions(recipe) if has_questions else QuestionSet((), 0)
    suite = SUITE_CLASSES[recipe.suite.name](recipe, chosen)
    opponent = recipe.opponent(task.against)
    named = [*task.words, *([opponent] if opponent not in (None, REFERENCE, BASE) else [])]
    known: dict[str, Side] = {}
    files = [*filter(is_answer_file, named)]
    if recipe.is_judged:
        known |= {word: answers_in_file(Path(word), chosen.questions) for word in files}
    elif files:
        what = f"{files[0]} is a file of answers; {recipe.suite.name} asks a model"
        raise RecipeError(what, "answers in files: alpaca_eval and mt_bench")
    known |= resolve([word for word in named if word not in known], recipe, remote_code)
    targets = [side for word in task.words if isinstance(side := known[word], Model)]
    reference = reference_answers(chosen.questions) if opponent == REFERENCE else None
    sides: dict[str, tuple[Side, Side | None]] = {}
    for word in task.words:
        other: Side | None = reference or known.get(opponent or "")
        side = known[word]
        if opponent == BASE:
            other = base_of(word, side if isinstance(side, Model) else None, targets)
        sides[word] = side, other
    suite.prepare(targets)
    return _Job(task, suite, sides)


# ---- answers ----


def _ask_group(group: Sequence[Model], jobs: Sequence[_Job], failed: OnError) -> None:
    """Load one base, and let every suite ask the models on it."""

    @contextmanager
    def losing(model: Model, *losers: _Job) -> Iterator[None]:
        """Leave a model that fails out of jobs, and what is compared with it."""
        try:
            yield
        except Exception as error:
            for job in losers:
                for word in job.words_with(model):
                    del job.sides[word]
                    failed(job.task, word, error)

    for model in group:
        with losing(model, *jobs):
            if model.trained:
                check_weights(model.trained)
    usable = [model for model in group if any(job.words_with(model) for job in jobs)]
    with loaded(usable) as subjects:
        for subject in subjects:
            for job in jobs:
                if job.words_with(subject.model):
                    with losing(subject.model, job):
                        _ask(job, subject)


def _ask(job: _Job, subject: Loaded) -> None:
    """Let a suite ask one model; what no judge decides is done then."""
    recipe, model, suite = job.recipe, subject.model, job.suite
    if suite.chosen.questions:
        answers = answer_all(recipe, model, _engine(recipe, subject), suite.chosen.questions)
        job.answers[model.name] = answers
        if recipe.is_judged:
            return
        log = replace(suite.log(answers), subset=suite.chosen.subset)
        facts = answers.facts
    else:
        model.record()
        with waiting_lock(model.folder(recipe.name)), subject.using() as network:
            log, facts = suite.measure(model, network), model.facts()
    key = hash_of(recipe.settings_key(), model.fingerprint, model.prompts.hash)
    file = log_file(model.run.path, recipe.name, None)
    log = _written(recipe, replace(log, target=model.name, key=key, answers=facts, file=file))
    job.logs |= dict.fromkeys(job.words_with(model), log)


def _engine(recipe: EvalRecipe, subject: Loaded) -> Engine:
    """What answers for a model: a server, or the weights in this process."""
    section, model = recipe.generation, subject.model
    if section.engine == "openai":
        name = section.served_name or (model.name if model.trained else model.word)
        return OpenAIEngine(section, name, None if model.served_only else model.fingerprint)
    tokenizer, batch_tokens = model.prompts.tokenizer, section.batch_tokens
    return HFEngine(subject.using, tokenizer, model.fingerprint, batch_tokens)


# ---- results ----


def _judge(job: _Job, judge: Judge, allow_format_differences: bool) -> None:
    """Ask one judge for every verdict, and write the results."""
    assert isinstance(job.suite, JudgedSuite)

    def answers_of(side: Side) -> Answers:
        return job.answers[side.name] if isinstance(side, Model) else side

    pairs = [
        (answers_of(target), answers_of(opponent) if opponent else None)
        for target, opponent in job.sides.values()
    ]
    if not allow_format_differences:
        check_formats(pairs)
    logs = judge_models(job.suite, pairs, judge)
    for word, log in zip(job.sides, logs, strict=True):
        job.logs[word] = _written(job.recipe, log)


def _written(recipe: EvalRecipe, log: EvalLog) -> EvalLog:
    """Complete a log and write it into its run."""
    leaks = leaks_of_run(recipe, log)
    banners = [leaks.summary(recipe.name)] if leaks and leaks.is_error else []
    banners += log.banners
    for what, (count, n) in answer_faults(log).items():
        most = max(2, recipe.metrics.max_identical_fraction * n) if what == SAME else 0.1 * n
        if count > most:
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
        **masked({"recipe": recipe.to_dict(), "command": command_line()}),
    )
    write_log(log)
    return log


def say_results(logs: Sequence[EvalLog]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(log.eval for log in logs):
        same = [log for log in logs if log.eval == name]
        suite, judge = SUITE_CLASSES[same[0].suite], same[0].judge
        what = suite.title
        if judge is not None:
            what = f"{same[0].n} questions, judge {judge.name} ({judge.model}, {judge.mode})"
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

    YAML files are eval recipes (without one, the first word names one of the project's:
    `quickstart/mt_bench`); `section.key=value` words override a value in each of them; what is left
    are models.

    Raises:
        RecipeError: there is no model, or a word is a training recipe.
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
        files, rest = [str(find_eval(rest[0]))], rest[1:]
    models = [word for word in rest if word not in files]
    recipes = [load_eval(file, [*own, *overrides]) for file in dict.fromkeys(files)]
    if not models:
        hint = f"name runs or models: recipes eval {' '.join(files)} RUN"
        raise RecipeError("nothing to evaluate", hint)
    return recipes, models
