"""THE evaluation script: eval recipes and runs (or models) -> answers, judgments and result.json in
each run.

    python -m recipes_lib.evaluate evals/quickstart/alpaca_eval.yaml my-run accelerate launch -m
    recipes_lib.evaluate evals/lm_eval.yaml my-run        # lm-eval on several GPUs

`recipes eval` calls the same function and prints tables. Everything is kept as it arrives: the same
command continues.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import load_document
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.faults import explain_fault
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.manifest import command_line, git_state, library_versions
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.ranks import leave_together
from recipes_lib.core.redaction import masked
from recipes_lib.generation.judges import opened
from recipes_lib.generation.subjects import grouped, loaded
from recipes_lib.generation.targets import distinct
from recipes_lib.suites.harness import Harness
from recipes_lib.suites.judged_suite import JudgedSuite
from recipes_lib.suites.lm_eval_flags import add_flags, overrides_of
from recipes_lib.suites.recipe import EvalRecipe, find_eval, load_eval
from recipes_lib.suites.registry import SUITES, say_results
from recipes_lib.training.process import end_process

_FORMAT_VERSION = 1


def evaluate(
    recipe: EvalRecipe,
    words: Sequence[str],
    against: str | None = None,
    *,
    allow_format_differences: bool = False,
    remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate targets with one eval recipe, as `evaluate_all` does with several."""
    return evaluate_all(
        [recipe],
        words,
        against,
        allow_format_differences=allow_format_differences,
        remote_code=remote_code,
    )


def evaluate_all(
    recipes: Sequence[EvalRecipe],
    words: Sequence[str],
    against: str | None = None,
    *,
    allow_format_differences: bool = False,
    remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate targets with every eval recipe and write runs/<run>/evals/<eval>/result.json for
    each pair.

    Each base is loaded once and does everything that is asked of it (answers, lm-eval); then each
    judge is loaded once. Wrong words, recipes and questions are refused before anything is loaded.

    Args:
        recipes: eval recipes.
        words: runs, models, `base` (of the runs beside it), or files with answers.
        against: the opponent (`reference`, `base`, another target) in the suites that compare; None
            for each recipe's.
        allow_format_differences: compare models that were asked in different prompt formats.
        remote_code: whether the command line allowed code that ships with a model.

    Returns:
        What the result files hold: the targets of the first recipe in the order of the words, then
            those of the next; empty on ranks other than the first.

    Raises:
        RecipeError: a word is no target, or formats differ.
        EvaluationIncomplete, GenerationIncomplete: something is missing (exit 6); the same command
            continues.
    """
    quiet_libraries()
    if against and all(recipe.suite.name == "lm_eval" for recipe in recipes):
        raise RecipeError(
            "--against has no meaning for lm_eval: it scores answers, it does not compare them",
            "recipes compare compares runs",
        )
    options = {"allow_format_differences": allow_format_differences, "remote_code": remote_code}
    suites = [SUITES[recipe.suite.name](recipe, words, against, **options) for recipe in recipes]
    _visit_models(suites)
    _ask_judges(suites)
    return [write_result(suite.recipe, result) for suite in suites for result in suite.results]


def _visit_models(suites: Sequence[Harness | JudgedSuite]) -> None:
    """Load base after base, and let every suite ask its targets on it; served models need no
    weights here.
    """
    for served in (True, False):
        mine = [suite for suite in suites if suite.served == served]
        for group in grouped(distinct(target for suite in mine for target in suite.targets)):
            with loaded(group, weights=not served) as subjects:
                for suite in mine:
                    wanted = {str(target.identity) for target in suite.targets}
                    for subject in subjects:
                        if str(subject.target.identity) in wanted:
                            suite.visit(subject)


def _ask_judges(suites: Sequence[Harness | JudgedSuite]) -> None:
    """Load judge after judge, and let it judge every suite that names it."""
    waiting = [suite for suite in suites if isinstance(suite, JudgedSuite)]
    while waiting:
        file = waiting[0].judge_file
        mine = [suite for suite in waiting if suite.judge_file == file]
        with opened(file) as judge:
            for suite in mine:
                suite.judge(judge)
            for suite in mine:
                suite.conclude(judge, [other for other in mine if other is not suite])
        waiting = [suite for suite in waiting if suite.judge_file != file]


def write_result(recipe: EvalRecipe, result: dict[str, Any]) -> dict[str, Any]:
    """Complete a result and write it into its run."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = {"format_version": _FORMAT_VERSION, "suite": recipe.suite.name, "eval": recipe.name}
    tail = {
        "recipe": recipe.to_dict(),
        "written": now,
        "command": command_line(),
        "git": git_state(),
        "libraries": library_versions(),
    }
    against = result["against"]
    name = "result.json" if against in (None, "reference") else f"result.against-{against}.json"
    path = runs_root() / result["target"] / "evals" / recipe.name / name
    whole = {**head, **result, **masked(tail)}
    write_json(path, whole)
    return {**whole, "file": shown_path(path)}


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
        leave_together()
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
