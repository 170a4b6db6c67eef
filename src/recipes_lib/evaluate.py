"""THE evaluation script: an eval recipe and runs (or models) -> answers, judgments and result.json in each run.

    python -m recipes_lib.evaluate evals/quickstart/alpaca_eval.yaml my-run
    accelerate launch -m recipes_lib.evaluate evals/lm_eval.yaml my-run        # lm-eval on several GPUs

`recipes eval` calls the same function and prints tables. Everything is kept as it arrives: the same command continues.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from typing import Any

from recipes_lib.atomic_files import write_json
from recipes_lib.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.suites.recipe import EvalRecipe, load_eval

FORMAT_VERSION = 1


def evaluate(
    recipe: EvalRecipe, words: Sequence[str], against: str | None = None, *, allow_format_differences: bool = False
) -> list[dict[str, Any]]:
    """Evaluate targets and write runs/<run>/evals/<eval>/result.json for each.

    Args:
        recipe: the eval recipe.
        words: runs, models, or files with answers.
        against: the opponent (`reference`, `base`, another target); None for the recipe's.
        allow_format_differences: compare models that were asked in different prompt formats.

    Returns:
        What the result files hold, in the order of the words; empty on ranks other than the first.

    Raises:
        RecipeError: a word is no target, or formats differ.
        EvaluationIncomplete, GenerationIncomplete: something is missing (exit 6); the same command continues.
    """
    from recipes_lib.training.session import quiet_libraries

    quiet_libraries()
    if recipe.suite.name == "lm_eval":
        from recipes_lib.suites.harness import run_harness

        if against:
            raise RecipeError(
                "--against has no meaning for lm_eval: it scores answers, it does not compare them", "recipes compare compares runs"
            )
        results = run_harness(recipe, words)
    else:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError(
                f"{recipe.suite.name} runs in one process", "several GPUs: serve the models (launch/vllm_server.sh) and use engine openai"
            )
        results = _judged(recipe, words, against, allow_format_differences)
    return [_write(recipe, result) for result in results]


def _judged(recipe: EvalRecipe, words: Sequence[str], against: str | None, allow_format_differences: bool) -> list[dict[str, Any]]:
    """Answer, judge and summarise AlpacaEval or MT-Bench."""
    from recipes_lib.generation.judges import opened
    from recipes_lib.judging.store import JudgmentStore
    from recipes_lib.suites import alpaca_eval, mt_bench
    from recipes_lib.suites.answering import collect_answers
    from recipes_lib.suites.judged import Judged, ask_probes, banners, judge_facts, judgments_file, scorecard
    from recipes_lib.suites.questions import load_questions

    alpaca = recipe.suite.name == "alpaca_eval"
    against = against or (recipe.metrics.against if alpaca else None)
    if against == "reference" and not alpaca:
        raise RecipeError("mt_bench has no reference opponent", "compare with a model: --against base, or --against RUN")
    chosen = load_questions(recipe)
    questions = chosen.questions
    pairing = collect_answers(recipe, words, against, questions)
    if not allow_format_differences:
        _check_formats(pairing)
    assert recipe.judge is not None
    results = []
    with opened(recipe.judge) as judge:
        judged: dict[str, Judged] = {}
        probes: list[Any] = []
        for answers in pairing.targets:
            opponent = pairing.opponents.get(answers.name)
            if alpaca:
                assert opponent is not None
                judged[answers.name] = alpaca_eval.judge_answers(recipe, questions, answers, opponent, judge)
            else:
                judged[answers.name] = mt_bench.judge_answers(recipe, questions, answers, opponent, judge)
            if opponent is not None and not probes:
                pairs = (alpaca_eval if alpaca else mt_bench).pair_items(questions, answers, opponent)
                store = JudgmentStore(judgments_file(answers.folder(recipe.name), opponent.name))
                probes = ask_probes(pairs, judge, store, recipe.metrics.probe_pairs)
        for answers in pairing.targets:
            opponent = pairing.opponents.get(answers.name)
            mine = judged[answers.name]
            mine.probes = probes
            facts, card = answers.to_dict(recipe.metrics.max_identical_fraction), scorecard(judge, mine)
            result = {
                "target": answers.name,
                "against": opponent.name if opponent else None,
                "n": len(questions),
                "subset": chosen.subset,
                "banners": [
                    *banners(answers, opponent, judge, card, chosen.subset, facts["answers"]),
                    *_twins(answers, pairing.targets),
                    *_no_reference(chosen.missing_references),
                ],
                "answers": facts,
                "opponent": opponent.to_dict(recipe.metrics.max_identical_fraction) if opponent else None,
                "judge": judge_facts(judge),
                "audit": card,
                "missing_references": list(chosen.missing_references),
            }
            if alpaca:
                assert opponent is not None
                result |= alpaca_eval.summary(recipe, questions, answers, opponent, judge, mine.rows)
                lines = alpaca_eval.samples(questions, answers, opponent, mine.rows)
                _write_samples(alpaca_eval.sample_file(answers.folder(recipe.name), "samples.jsonl", opponent), lines)
            else:
                result |= mt_bench.summary(questions, mine.rows)
                mt_bench.write_fastchat(recipe, questions, answers, opponent, mine.rows, recipe.judge.path.stem)
            results.append(result)
    return results


def _check_formats(pairing: Any) -> None:
    """Refuse to compare models that were asked in different prompt formats.

    Raises:
        RecipeError: naming the formats.
    """
    for answers in pairing.targets:
        opponent = pairing.opponents.get(answers.name)
        if (
            opponent
            and opponent.prompt_format_hash
            and answers.prompt_format_hash
            and opponent.prompt_format_hash != answers.prompt_format_hash
        ):
            raise RecipeError(
                f"{answers.name} is asked in prompt format {answers.prompt_format}, {opponent.name} in {opponent.prompt_format}",
                "the difference would be part of the result; insist with --allow-format-differences (recorded)",
            )


def _no_reference(missing: Sequence[str]) -> list[str]:
    """The line about questions that should be graded against a reference and have none."""
    if not missing:
        return []
    return [f"{len(missing)} questions need a reference answer and have none, so they are graded without: {', '.join(missing[:8])}"]


def _twins(answers: Any, targets: Sequence[Any]) -> list[str]:
    same = [other.name for other in targets if other.name != answers.name and other.digest == answers.digest]
    return [f"{answers.name} and {same[0]} gave the same answers: they are one model here and cannot be ranked"] if same else []


def _write_samples(path: Any, lines: Sequence[dict[str, Any]]) -> None:
    import json

    from recipes_lib.atomic_files import write_text

    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _write(recipe: EvalRecipe, result: dict[str, Any]) -> dict[str, Any]:
    """Complete a result and write it into its run."""
    from recipes_lib.recipe.project import runs_root, shown_path
    from recipes_lib.runs.manifest import command_line, git_state, library_versions

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = {"format_version": FORMAT_VERSION, "suite": recipe.suite.name, "eval": recipe.name}
    tail = {"recipe": recipe.to_dict(), "written": now, "command": command_line(), "git": git_state(), "libraries": library_versions()}
    against = result["against"]
    name = "result.json" if against in (None, "reference") else f"result.against-{against}.json"
    path = runs_root() / result["target"] / "evals" / recipe.name / name
    whole = {**head, **result, **tail}
    write_json(path, whole)
    return {**whole, "file": shown_path(path)}


def main(argv: list[str] | None = None) -> int:
    """Evaluate without tables, for `accelerate launch`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="recipes_lib.evaluate", description="Evaluate runs and models.", allow_abbrev=False)
    parser.add_argument("words", nargs="+", metavar="EVAL TARGET...", help="an eval recipe, runs or models, section.key=value overrides")
    parser.add_argument("--against")
    options = parser.parse_args(argv)
    try:
        recipe, targets = split_words(options.words)
        evaluate(recipe, targets, options.against)
    except RecipesError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print_error(error)
        return int(error.exit_code)
    return int(ExitCode.DONE)


def split_words(words: Sequence[str], overrides: Sequence[str] = ()) -> tuple[EvalRecipe, list[str]]:
    """Return the eval recipe and the targets of a command line: its first word, and those that are no `section.key=value`.

    Raises:
        RecipeError: there is no target.
    """
    own = [word for word in words[1:] if _is_override(word)]
    targets = [word for word in words[1:] if word not in own]
    recipe = load_eval(words[0], [*own, *overrides])
    if not targets:
        raise RecipeError("nothing to evaluate", f"name runs or models: recipes eval {words[0]} RUN")
    return recipe, targets


def _is_override(word: str) -> bool:
    name, separator, _ = word.partition("=")
    return bool(separator) and "." in name and all(part.isidentifier() for part in name.removeprefix("--").split("."))


if __name__ == "__main__":
    sys.exit(main())
