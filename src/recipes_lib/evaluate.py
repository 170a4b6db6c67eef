"""THE evaluation script: eval recipes and runs (or models) -> answers, judgments and result.json in
each run.

    python -m recipes_lib.evaluate evals/quickstart/alpaca_eval.yaml my-run
    # lm-eval on several GPUs
    accelerate launch -m recipes_lib.evaluate evals/lm_eval.yaml my-run

`recipes eval` calls the same function and prints tables. Everything is kept as it arrives: the same
command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.config.lm_eval import add_flags, overrides_of
from recipes_lib.config.loader import load_document
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.faults import explain_fault
from recipes_lib.core.json_files import utc_now
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.manifest import command_line, git_state, library_versions
from recipes_lib.core.project import shown_path
from recipes_lib.core.ranks import meet
from recipes_lib.core.redaction import masked
from recipes_lib.eval_files import write_log
from recipes_lib.eval_key import result_key
from recipes_lib.eval_log import REFERENCE, EvalLog
from recipes_lib.eval_recipe import EvalRecipe, find_eval, load_eval, no_opponent
from recipes_lib.generation.judges import OpenJudge, opened
from recipes_lib.generation.subjects import Subject, grouped, loaded
from recipes_lib.generation.targets import Target, distinct
from recipes_lib.suites.judged import JudgedSuite
from recipes_lib.suites.leaks import leaks_of_run
from recipes_lib.suites.registry import say_results, suite_of
from recipes_lib.suites.suite import Asker
from recipes_lib.training.process import end_process


@dataclass(frozen=True)
class Done:
    """What ended for one suite: a target answered, results were written, or an error stopped these
    targets.

    `targets` is empty where an error concerns the whole suite. `seconds` are for one result.
    """

    suite: Asker
    targets: tuple[Target, ...] = ()
    results: tuple[EvalLog, ...] = ()
    seconds: float = 0.0
    error: Exception | None = None


def evaluate(
    suites: Sequence[Asker], on_done: Callable[[Done], None] | None = None
) -> list[EvalLog]:
    """Load base after base and let every suite ask its targets on it, then judge after judge; write
    runs/<run>/evals/<eval>/result.json for each target as soon as its result is there.

    Args:
        suites: what is to be done. A target that fails a `gate` is left out of all the others.
        on_done: is told what ended. Where it takes an error without raising it, the targets of that
            error are left out and the others go on; None raises every error.

    Returns:
        The logs that were written, suite after suite.
    """
    order = [[str(target.identity) for target in suite.targets] for suite in suites]
    found: list[list[tuple[int, EvalLog]]] = [[] for _ in suites]

    def told(done: Done) -> None:
        number = suites.index(done.suite)
        place = order[number].index(str(done.targets[0].identity)) if done.targets else 0
        found[number] += [(place, result) for result in done.results]
        if on_done is not None:
            on_done(done)
        elif done.error is not None:
            raise done.error

    for served in (False, True):
        mine = [suite for suite in suites if suite.served == served]
        for group in grouped(distinct(target for suite in mine for target in suite.targets)):
            with _failures_told(mine, group, told), loaded(group, weights=not served) as subjects:
                for subject in subjects:
                    _visit(subject, mine, suites, told)
    waiting = [suite for suite in suites if isinstance(suite, JudgedSuite)]
    while waiting := [suite for suite in waiting if suite.words and suite.wanted != set()]:
        same = [suite for suite in waiting if suite.judge_file == waiting[0].judge_file]
        waiting = [suite for suite in waiting if suite not in same]
        with _failures_told(same, (), told), opened(same[0].judge_file) as judge:
            _judge(same, judge, told)
    return [result for results in found for _, result in sorted(results, key=lambda pair: pair[0])]


@contextmanager
def _failures_told(
    suites: Sequence[Asker], targets: Sequence[Target], told: Callable[[Done], None]
) -> Iterator[None]:
    """Tell an error for every suite that it concerns, and leave its targets out there."""
    try:
        yield
    except Exception as error:
        for suite in suites:
            mine = tuple(target for target in targets if suite.has(target))
            if mine or not targets:
                told(Done(suite, mine, error=error))
            for target in mine:
                suite.drop(target)


def _visit(
    subject: Subject,
    suites: Sequence[Asker],
    everywhere: Sequence[Asker],
    told: Callable[[Done], None],
) -> None:
    """Let every suite ask one loaded model, gates first."""
    target = subject.target
    for suite in sorted(suites, key=lambda suite: not suite.is_gate):
        if not suite.has(target):
            continue
        started = time.monotonic()
        with _failures_told([suite], [target], told):
            found = suite.visit(subject)
            seconds = time.monotonic() - started
            told(
                Done(
                    suite,
                    (target,),
                    tuple(write_result(suite.recipe, one) for one in found),
                    seconds,
                )
            )
        if suite.is_gate and not suite.has(target):
            for other in everywhere:
                other.drop(target)


def _judge(suites: Sequence[JudgedSuite], judge: OpenJudge, told: Callable[[Done], None]) -> None:
    """Ask one judge for every verdict, then write the results: each says where else this judge
    failed its audit.
    """
    judged: list[tuple[JudgedSuite, float]] = []
    for suite in suites:
        started = time.monotonic()
        with _failures_told([suite], (), told):
            suite.judge(judge)
            judged.append((suite, time.monotonic() - started))
    for suite, seconds in judged:
        with _failures_told([suite], (), told):
            results = suite.conclude(judge, [other for other, _ in judged if other is not suite])
            each = seconds / max(1, len(results))
            told(
                Done(
                    suite,
                    results=tuple(write_result(suite.recipe, one) for one in results),
                    seconds=each,
                )
            )


def evaluate_all(
    recipes: Sequence[EvalRecipe],
    words: Sequence[str],
    against: str | None = None,
    *,
    allow_format_differences: bool = False,
    remote_code: bool = False,
) -> list[EvalLog]:
    """Evaluate targets with every eval recipe. Wrong words, recipes and questions are refused
    before anything is loaded.

    Args:
        recipes: eval recipes.
        words: runs, models, `base` (of the runs beside it), or files with answers.
        against: the opponent (`reference`, `base`, another target) in the suites that compare; None
            for each recipe's.
        allow_format_differences: compare models that were asked in different prompt formats.
        remote_code: whether the command line allowed code that ships with a model.

    Returns:
        The logs that were written: the targets of the first recipe in the order of the words, then
            those of the next; empty on ranks other than the first.

    Raises:
        RecipeError: a word is no target, or formats differ.
        EvaluationIncomplete, GenerationIncomplete: something is missing (exit 6); the same command
            continues.
    """
    quiet_libraries()
    if against and not any(recipe.is_judged for recipe in recipes):
        raise no_opponent(list(dict.fromkeys(recipe.suite.name for recipe in recipes)))
    options = {"allow_format_differences": allow_format_differences, "remote_code": remote_code}
    return evaluate([suite_of(recipe, words, against, **options) for recipe in recipes])


def write_result(recipe: EvalRecipe, log: EvalLog) -> EvalLog:
    """Complete a log and write it into its run."""
    leaks = leaks_of_run(recipe, log)
    banners = [leaks.summary(recipe.name)] if leaks and leaks.is_error else []
    words = {
        "recipe": recipe.to_dict(),
        "written": utc_now(),
        "command": command_line(),
        "git": git_state(),
        "libraries": library_versions(),
    }
    banners += log.banners
    opponent = log.opponent.fingerprint if log.opponent and log.against != REFERENCE else None
    key = result_key(recipe, log.answers.fingerprint, opponent)
    log = dataclasses.replace(log, leaks=leaks, banners=banners, key=key, **masked(words))
    write_log(log)
    return log


def printed(log: EvalLog) -> dict[str, object]:
    """Return result.json as `recipes eval --json` prints it: with its place."""
    return log.to_dict() | {"file": shown_path(log.file)}


def main(argv: list[str] | None = None) -> int:
    """Evaluate as `recipes eval` does, for `accelerate launch`; the first rank prints the tables.
    Returns the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="recipes_lib.evaluate", description="Evaluate runs and models.", allow_abbrev=False
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="EVAL... TARGET...",
        help="eval recipes, runs or models, section.key=value overrides",
    )
    parser.add_argument("--against")
    parser.add_argument("--allow-format-differences", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    add_flags(parser)
    options = parser.parse_intermixed_args(argv)
    try:
        recipes, targets = split_words(options.words, lm_eval=overrides_of(options))
        results = evaluate_all(
            recipes,
            targets,
            options.against,
            allow_format_differences=options.allow_format_differences,
            remote_code=options.trust_remote_code,
        )
        if results:
            say_results(results)
        meet()
    except Exception as error:
        told = error if isinstance(error, RecipesError) else explain_fault(error)
        if told is None:
            raise
        if (
            int(os.environ.get("RANK", "0")) == 0 or told is not error
        ):  # a fault may be this rank's alone
            print_error(told)
        return int(told.exit_code)
    return int(ExitCode.DONE)


def split_words(
    words: Sequence[str], overrides: Sequence[str] = (), lm_eval: Sequence[str] = ()
) -> tuple[list[EvalRecipe], list[str]]:
    """Return the eval recipes and the targets of a command line.

    YAML files are eval recipes (without one, the first word names one of the project's:
    `quickstart/mt_bench`); `section.key=value` words override a value in each of them; what is left
    are targets.

    Args:
        overrides: further `section.key=value` words.
        lm_eval: such words for recipes of lm_eval alone (`--limit` and the like).

    Raises:
        RecipeError: there is no target, a recipe is named twice, or options of lm_eval stand
            without a recipe of it.
    """
    own = [word for word in words if _is_override(word)]
    rest = [word for word in words if word not in own]
    files = [word for word in rest if Path(word).suffix in (".yaml", ".yml")]
    if not files:
        files, rest = [str(find_eval(rest[0]))], rest[1:]
    targets = [word for word in rest if word not in files]
    harness = (
        {
            file
            for file in files
            if load_document(file).values.get("suite", {}).get("name") == "lm_eval"
        }
        if lm_eval
        else set()
    )
    if lm_eval and not harness:
        option = lm_eval[0].partition("=")[0].removeprefix("suite.")
        raise RecipeError(
            f"--{option} is an option of lm_eval", "fewer questions: data.max_questions=N"
        )
    recipes = [
        load_eval(file, [*own, *overrides, *(lm_eval if file in harness else ())])
        for file in dict.fromkeys(files)
    ]
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(
            f"two eval recipes are called '{twice}'",
            "their results would overwrite each other: rename one",
        )
    if not targets:
        raise RecipeError(
            "nothing to evaluate", f"name runs or models: recipes eval {' '.join(files)} RUN"
        )
    return recipes, targets


def _is_override(word: str) -> bool:
    name, separator, _ = word.partition("=")
    return (
        bool(separator)
        and "." in name
        and all(part.isidentifier() for part in name.removeprefix("--").split("."))
    )


if __name__ == "__main__":
    end_process(main())
