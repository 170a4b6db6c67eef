"""`evaluate`: eval recipes and words -> answers, judgments and result.json in each run.

Base after base is loaded once and every suite asks its models on it; then judge after judge gives
its verdicts. Everything is stored as it arrives: the same command continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes_lib.core.environment import command_line, git_state, library_versions, quiet_libraries
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of, utc_now
from recipes_lib.core.lock import waiting_lock
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import masked, say
from recipes_lib.evals.answers import Answers, answer_all, answers_in_file, reference_answers
from recipes_lib.evals.engine import Engine, HFEngine
from recipes_lib.evals.engine_openai import OpenAIEngine
from recipes_lib.evals.judge import Judge, opened
from recipes_lib.evals.judged import JudgedSuite, check_formats, judge_models
from recipes_lib.evals.leaks import leaks_of_run
from recipes_lib.evals.log import REFERENCE, AnswerFaults, EvalLog, log_file, write_log
from recipes_lib.evals.models import Loaded, Model, base_of, grouped, loaded, resolve
from recipes_lib.evals.questions import QuestionSet, check_allowed, is_answer_file, load_questions
from recipes_lib.evals.recipe import SUITES, EvalRecipe, find_eval, load_eval, no_opponent
from recipes_lib.evals.suites import Suite, suite_class
from recipes_lib.weights.runs import BASE, check_weights


@dataclass(frozen=True, eq=False)
class EvalTask:
    """What `evaluate` is asked for: one eval recipe, the words of its models, and their opponent
    (`reference`, `base`, another model; None for the recipe's own).
    """

    recipe: EvalRecipe
    words: tuple[str, ...]
    against: str | None = None


OnError = Callable[[EvalTask, str, Exception], None]  # the model's word, empty for all of the task


@dataclass
class _Job:
    """A task with its models, and who each is compared with."""

    task: EvalTask
    suite: Suite
    models: dict[str, Model]  # by word
    opponents: dict[str, Model]  # by word
    files: dict[str, Answers]  # by word
    words: list[str]
    against: str | None
    answers: dict[str, Answers] = field(default_factory=dict)  # by name of the model
    logs: dict[str, EvalLog] = field(default_factory=dict)  # by word

    @property
    def recipe(self) -> EvalRecipe:
        """Its eval recipe."""
        return self.task.recipe

    @property
    def is_served(self) -> bool:
        """Whether a server answers."""
        return self.recipe.generation.engine == "openai"

    def asked(self) -> list[Model]:
        """Every model that is to be asked, opponents included."""
        return [*self.models.values(), *self.opponents.values()]

    def wants(self, model: Model) -> bool:
        """Whether a model is to be asked."""
        return any(other.name == model.name for other in self.asked())

    def drop(self, model: Model) -> list[str]:
        """Leave a model out, and those that are compared with it; return their words."""
        pairs = {word: (self.models.get(word), self.opponents.get(word)) for word in self.words}
        lost = [
            word
            for word, pair in pairs.items()
            if any(other is not None and other.name == model.name for other in pair)
        ]
        for word in lost:
            self.words.remove(word)
            self.models.pop(word, None)
            self.opponents.pop(word, None)
        return lost


def evaluate(
    recipes: Sequence[EvalRecipe],
    words: Sequence[str],
    against: str | None = None,
    *,
    allow_format_differences: bool = False,
    remote_code: bool = False,
) -> list[EvalLog]:
    """Evaluate models with every eval recipe; see `evaluate_tasks`.

    Args:
        recipes: eval recipes.
        words: runs, models, `base` (of the runs beside it), or files with answers.
        against: the opponent (`reference`, `base`, another model) in the suites that compare; None
            for each recipe's.
        allow_format_differences: compare models that were asked in different prompt formats.
        remote_code: whether the command line allowed code that ships with a model.

    Returns:
        The logs that were written: recipe after recipe, each in the order of the words.
    """
    if against and not any(recipe.is_judged for recipe in recipes):
        raise no_opponent(list(dict.fromkeys(recipe.suite.name for recipe in recipes)))
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"two eval recipes are called '{twice}'", "rename one")
    tasks = [
        EvalTask(recipe, tuple(dict.fromkeys(words)), against if recipe.is_judged else None)
        for recipe in recipes
    ]
    return evaluate_tasks(
        tasks, allow_format_differences=allow_format_differences, remote_code=remote_code
    )


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
        allow_format_differences: as for `evaluate`.
        remote_code: as for `evaluate`.
        on_error: is called where a model, or all of a task, failed; the others go on. None raises
            every error.

    Raises:
        RecipeError: a word is no model, or formats differ.
        EvaluationIncomplete: answers or judgments are missing (exit 6).
    """
    quiet_libraries()
    failed = on_error or _raise
    jobs: list[_Job] = []
    for task in tasks:
        with _reported(failed, task):
            jobs.append(_job(task, remote_code))
    for group in grouped([model for job in jobs for model in job.asked()]):
        _ask_group(group, jobs, failed)
    judged = [job for job in jobs if job.recipe.is_judged and job.words]
    while judged:
        file = judged[0].recipe.judge
        assert file is not None
        same = [job for job in judged if job.recipe.judge == file]
        judged = [job for job in judged if job not in same]
        try:
            with opened(file) as judge:
                for job in same:
                    with _reported(failed, job.task):
                        _judge(job, judge, allow_format_differences)
        except Exception as error:  # the judge cannot be had
            for job in same:
                failed(job.task, "", error)
    return [job.logs[word] for job in jobs for word in job.task.words if word in job.logs]


def _raise(task: EvalTask, word: str, error: Exception) -> None:
    raise error


@contextmanager
def _reported(failed: OnError, task: EvalTask) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failed(task, "", error)


def _job(task: EvalTask, remote_code: bool) -> _Job:
    """Resolve the words of a task, load its questions, and find who each is compared with."""
    recipe, words = task.recipe, list(task.words)
    check_allowed(recipe, remote_code)
    has_questions = bool(SUITES[recipe.suite.name].row)
    chosen = load_questions(recipe) if has_questions else QuestionSet((), 0)
    suite = suite_class(recipe.suite.name)(recipe, chosen)
    opponent = recipe.opponent(task.against)
    files = {
        word: answers_in_file(Path(word), chosen.questions)
        for word in (*words, opponent or "")
        if recipe.is_judged and is_answer_file(word)
    }
    named = [word for word in words if word not in files]
    other = opponent if opponent not in (None, REFERENCE, BASE, *files, *named) else None
    resolved = resolve([*named, *([other] if other else [])], recipe, remote_code)
    models = {word: resolved[word] for word in named}
    opponents: dict[str, Model] = {}
    if opponent == BASE:
        if lost := next((word for word in words if word in files), None):
            hint = "name the opponent: --against RUN"
            raise RecipeError(f"'{lost}' is a file of answers and has no base", hint)
        opponents = {word: base_of(model, list(models.values())) for word, model in models.items()}
    elif opponent in resolved:
        opponents = dict.fromkeys(words, resolved[opponent])
    suite.prepare(list(models.values()))
    return _Job(task, suite, models, opponents, files, words, opponent)


# ---- answers ----


def _ask_group(group: Sequence[Model], jobs: Sequence[_Job], failed: OnError) -> None:
    """Load one base, and let every suite ask the models on it."""

    def lose(model: Model, job: _Job, error: Exception) -> None:
        for word in job.drop(model):
            failed(job.task, word, error)

    def ask(subject: Loaded, served: bool) -> None:
        for job in jobs:
            if job.is_served == served and job.wants(subject.model):
                try:
                    _ask(job, subject)
                except Exception as error:
                    lose(subject.model, job, error)

    for model in group:
        try:
            if model.trained:
                check_weights(model.trained)
        except Exception as error:
            for job in jobs:
                lose(model, job, error)
        ask(Loaded(model), served=True)
    wanted = [
        model for model in group if any(job.wants(model) for job in jobs if not job.is_served)
    ]
    with ExitStack() as stack:
        try:
            subjects = stack.enter_context(loaded(wanted)) if wanted else []
        except Exception as error:  # the base, or an adapter on it, cannot be loaded
            subjects = []
            for model in wanted:
                for job in jobs:
                    lose(model, job, error)
        while subjects:
            ask(subjects.pop(0), served=False)


def _ask(job: _Job, subject: Loaded) -> None:
    """Let a suite ask one model; what no judge decides is done then."""
    recipe, model, suite = job.recipe, subject.model, job.suite
    if suite.chosen.questions:
        engine = engine_for(recipe, subject)
        answers = answer_all(recipe, model, engine, suite.chosen.questions)
        job.answers[model.name] = answers
        if recipe.is_judged:
            return
        answers = answers.with_faults()
        log = replace(suite.log(answers), subset=suite.chosen.subset)
        facts = answers.facts
    else:
        model.record()
        with waiting_lock(model.folder(recipe.name)), subject.using():
            log, facts = suite.measure(subject), model.facts()
    key = hash_of(recipe.settings_key(), model.fingerprint, model.prompts.hash)
    file = log_file(model.run.path, recipe.name, None)
    log = _written(recipe, replace(log, target=model.name, key=key, answers=facts, file=file))
    job.logs |= {word: log for word, other in job.models.items() if other.name == model.name}


def engine_for(recipe: EvalRecipe, subject: Loaded) -> Engine:
    """Return what answers for a model: a server, or the weights in this process."""
    section, model = recipe.generation, subject.model
    if section.engine == "openai":
        name = section.served_name or (model.name if model.trained else model.word)
        return OpenAIEngine(section, name, None if model.served_only else model.fingerprint)
    return HFEngine(
        subject.network,
        model.prompts.tokenizer,
        model.fingerprint,
        section.batch_tokens,
        subject.using,
    )


# ---- results ----


def _judge(job: _Job, judge: Judge, allow_format_differences: bool) -> None:
    """Ask one judge for every verdict, and write the results."""
    suite = job.suite
    assert isinstance(suite, JudgedSuite)
    reference = reference_answers(suite.chosen.questions) if job.against == REFERENCE else None
    pairs: dict[str, tuple[Answers, Answers | None]] = {}
    for word in job.words:
        answers = job.files.get(word) or job.answers[job.models[word].name]
        opponent = reference or job.files.get(str(job.against))
        if opponent is None and word in job.opponents:
            opponent = job.answers[job.opponents[word].name]
        pairs[word] = answers, opponent
    if not allow_format_differences:
        check_formats(pairs.values())
    logs = judge_models(suite, list(pairs.values()), judge)
    for word, log in zip(pairs, logs, strict=True):
        job.logs[word] = _written(job.recipe, log)


def _written(recipe: EvalRecipe, log: EvalLog) -> EvalLog:
    """Complete a log and write it into its run."""
    leaks = leaks_of_run(recipe, log)
    banners = [leaks.summary(recipe.name)] if leaks and leaks.is_error else []
    banners += log.banners
    if log.answers.faults:
        banners += fault_banners(log.answers.faults, recipe.metrics.max_identical_fraction)
    banners += [log.subset] if log.subset else []
    words = masked({"recipe": recipe.to_dict(), "command": command_line()})
    known: dict[str, Any] = {"eval": log.eval, "suite": log.suite, "file": log.file}
    log = replace(
        log,
        metrics=tuple(replace(metric, **known) for metric in log.metrics),
        leaks=leaks,
        banners=tuple(banners),
        settings=recipe.settings_key(),
        written=utc_now(),
        git=dict(git_state()),
        libraries=library_versions(),
        **words,
    )
    write_log(log)
    return log


def fault_banners(faults: AnswerFaults, max_identical_fraction: float) -> list[str]:
    """Return the lines about the answers themselves: one answer for many questions, cut, empty and
    looping ones.
    """
    lines = []
    if faults.identical > max(2, max_identical_fraction * faults.n):
        lines.append(f"{faults.identical} of {faults.n} prompts got one and the same answer")
    for count, text in (
        (faults.empty, "are empty"),
        (faults.cut or 0, "reached max_new_tokens and are cut"),
        (faults.loops, "end in a loop, one phrase three times"),
    ):
        if count > 0.1 * faults.n:
            lines.append(f"{count} of {faults.n} answers {text}")
    return lines


def say_results(logs: Sequence[EvalLog]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(log.eval for log in logs):
        same = [log for log in logs if log.eval == name]
        say(table_of(same))
        for log in same:
            if log.lm_eval_command:
                say(f"$ {log.lm_eval_command}")
        say()
    for log in logs:
        say(f"kept in {shown_path(log.file)}")


def table_of(logs: Sequence[EvalLog]) -> str:
    """Return the table of the logs of one eval, with what must be read before it."""
    suite, judge = suite_class(logs[0].suite), logs[0].judge
    what = suite.title
    if judge is not None:
        what = f"{logs[0].n} questions, judge {judge.name} ({judge.model}, {judge.mode})"
    said: dict[str, list[str]] = {}  # what is said, and of which models
    for log in logs:
        for text in (*(f"! {text}" for text in log.banners), *(f"  {text}" for text in log.notes)):
            said.setdefault(text, []).append(log.target)
    lines = [f"{logs[0].eval}: {what}", ""]
    for text, models in sorted(said.items(), key=lambda item: not item[0].startswith("!")):
        named = "" if len(models) == len(logs) else f"{', '.join(models)}: "
        lines.append(f"{text[:2]}{named}{text[2:]}")
    lines += [""] if said else []
    return "\n".join([*lines, *suite.table(logs)])


# ---- words ----


def split_words(
    words: Sequence[str], overrides: Sequence[str] = ()
) -> tuple[list[EvalRecipe], list[str]]:
    """Return the eval recipes and the models of a command line.

    YAML files are eval recipes (without one, the first word names one of the project's:
    `quickstart/mt_bench`); `section.key=value` words override a value in each of them; what is left
    are models.

    Raises:
        RecipeError: there is no model, or a recipe is named twice.
    """
    own = [word for word in words if _is_override(word)]
    rest = [word for word in words if word not in own]
    files = [word for word in rest if Path(word).suffix in (".yaml", ".yml")]
    if not files:
        files, rest = [str(find_eval(rest[0]))], rest[1:]
    models = [word for word in rest if word not in files]
    recipes = [load_eval(file, [*own, *overrides]) for file in dict.fromkeys(files)]
    if not models:
        hint = f"name runs or models: recipes eval {' '.join(files)} RUN"
        raise RecipeError("nothing to evaluate", hint)
    return recipes, models


def _is_override(word: str) -> bool:
    name, separator, _ = word.partition("=")
    parts = name.removeprefix("--").split(".")
    return bool(separator) and len(parts) > 1 and all(part.isidentifier() for part in parts)
