"""How long an evaluation takes: answers written, verdicts read, benchmark items scored.

A judge's verdicts are bound by reading prompts, and where it writes feedback by writing. Lengths of
answers and feedback are assumed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from recipes_lib.core.project import project_root
from recipes_lib.generation.batch_memory import token_bytes, tokens_per_batch
from recipes_lib.generation.transformers_engine import MAX_ROWS
from recipes_lib.models.known import named_shape
from recipes_lib.models.shapes import ModelShape
from recipes_lib.planning.cards import DEFAULT, Card, card_named
from recipes_lib.planning.evaluations import (
    ANSWER_SHARE,
    NUM_QUESTIONS,
    EvalTime,
    pace,
    writing_seconds,
)
from recipes_lib.planning.machine import GENERATED_TOKENS_PER_SECOND, JUDGED_TOKENS_PER_SECOND
from recipes_lib.suites.recipe import EvalRecipe, load_eval

PROMPT_TOKENS = {"alpaca_eval": 60, "mt_bench": 150}
JUDGE_PROMPT, FEEDBACK = 900, 180  # tokens: rubric with both answers, and what Prometheus writes
PREFILL_MFU = 0.35
_START_S = {"cpu": 12.0, "gpu": 90.0}
# task -> items, requests per item, prompt tokens per request (at the task's own number of
# examples), tokens written per item
TASKS = {
    "mmlu": (14042, 4, 110, 0),
    "arc_challenge": (1172, 4, 45, 0),
    "arc_easy": (2376, 4, 45, 0),
    "gsm8k": (1319, 1, 900, 160),
    "truthfulqa_mc1": (817, 5, 180, 0),
    "truthfulqa_mc2": (817, 7, 180, 0),
    "hellaswag": (10042, 4, 100, 0),
    "winogrande": (1267, 2, 30, 0),
    "quickstart_multiple_choice": (60, 4, 40, 0),
    "quickstart_arithmetic": (20, 1, 60, 24),
}


def eval_time(recipe: EvalRecipe, shape: ModelShape, card: Card) -> EvalTime:
    """Return the time of one evaluation of a model on a card."""
    if recipe.suite.name == "lm_eval":
        return _harness(recipe, shape, card)
    suite, limit = recipe.suite.name, recipe.data.max_questions
    questions = min(NUM_QUESTIONS[suite] if _large(recipe) else _counted(recipe), limit or 10**9)
    turns = 2 if suite == "mt_bench" else 1
    answers = questions * turns
    written = recipe.generation.max_new_tokens * ANSWER_SHARE
    tokens = recipe.generation.batch_tokens or _batch_tokens(shape, card)
    batch = max(
        1, min(MAX_ROWS, tokens // (PROMPT_TOKENS[suite] + recipe.generation.max_new_tokens))
    )
    remote_engine = recipe.generation.engine == "openai"
    answering = writing_seconds(
        shape, card, answers, written, recipe.generation.max_new_tokens, batch, remote_engine
    )
    verdicts = answers * (2 if suite == "alpaca_eval" else 1) + (
        answers if recipe.metrics.absolute and suite == "alpaca_eval" else 0
    )
    verdicts += 12 * min(recipe.metrics.probe_pairs, questions) if suite == "alpaca_eval" else 0
    judging, remote = _judging(recipe, shape, card, verdicts)
    return EvalTime(recipe.name, _START_S[_kind(card)] + answering, judging, remote=remote)


def eval_times(recipes: Sequence[EvalRecipe], shape: ModelShape, card: Card) -> list[EvalTime]:
    """Return the time of each evaluation."""
    return [eval_time(recipe, shape, card) for recipe in recipes]


def _batch_tokens(shape: ModelShape, card: Card) -> int:
    """The padded tokens of a batch, as an answering engine will choose them beside weights of two
    bytes.
    """
    per_token = token_bytes(shape.layers, shape.kv_width, shape.hidden, shape.intermediate, 2)
    return tokens_per_batch(
        card.memory_gib * 2**30 - 2 * shape.parameters, per_token, on_gpu=card.name != "cpu"
    )


def _large(recipe: EvalRecipe) -> bool:
    """Whether the questions are the suite's own, not a file beside the eval recipe."""
    questions = recipe.data.questions or ""
    return (
        not questions
        or ":" in questions
        or not recipe.resolve("data.questions", questions).is_file()
    )


def _counted(recipe: EvalRecipe) -> int:
    """Return the number of questions in a local file."""
    text = recipe.resolve("data.questions", recipe.data.questions or "").read_text(
        encoding="utf-8", errors="replace"
    )
    try:
        rows = json.loads(text)
        return len(rows) if isinstance(rows, list) else 1
    except (ValueError, RecursionError):  # JSON lines, or a damaged file: the evaluation says where
        return sum(bool(line.strip()) for line in text.splitlines())


def _kind(card: Card) -> str:
    return "cpu" if card.name == "cpu" else "gpu"


def _judging(
    recipe: EvalRecipe, shape: ModelShape, card: Card, verdicts: int
) -> tuple[float, bool]:
    """Return seconds for the verdicts, and whether the judge is elsewhere."""
    if recipe.judge is None:
        return 0.0, False
    judge = recipe.judge.judge
    model = named_shape(judge.model) or shape
    remote = judge.engine == "openai"
    if card.name == "cpu" and not remote:
        seconds = verdicts * min(JUDGE_PROMPT, 480) / (JUDGED_TOKENS_PER_SECOND * pace(model, card))
        if judge.mode != "logits":
            seconds += verdicts * FEEDBACK / (GENERATED_TOKENS_PER_SECOND * pace(model, card))
        return seconds, remote
    gpu = card if card.name != "cpu" else card_named(DEFAULT)
    prefill = (
        verdicts * JUDGE_PROMPT * 2 * model.active_parameters / (gpu.tflops * 1e12 * PREFILL_MFU)
    )
    if judge.mode == "logits":
        return prefill, remote
    return prefill + writing_seconds(
        model, gpu, verdicts, FEEDBACK, judge.max_new_tokens, 8, server=remote
    ), remote


def _harness(recipe: EvalRecipe, shape: ModelShape, card: Card) -> EvalTime:
    """lm-eval: prompts are read once per request, some tasks also write."""
    seconds, unknown = _START_S[_kind(card)] + 15.0, []
    for task in recipe.suite.tasks or ():
        if task not in TASKS:
            unknown.append(task)
            continue
        items, requests, tokens, written = TASKS[task]
        limit = recipe.suite.limit
        if limit is not None:
            items = round(items * limit) if limit < 1 else min(items, int(limit))
        if card.name == "cpu":
            seconds += items * requests * tokens / (JUDGED_TOKENS_PER_SECOND * pace(shape, card))
        else:
            seconds += (
                items
                * requests
                * tokens
                * 2
                * shape.active_parameters
                / (card.tflops * 1e12 * PREFILL_MFU)
            )
        if written:
            seconds += writing_seconds(shape, card, items, written, 256, 8, server=False)
    return EvalTime(recipe.name, seconds, 0.0, tuple(unknown))


def usual_evals(on_cpu: bool) -> list[EvalRecipe]:
    """Return the project's eval recipes that go with a recipe: the quickstart's small ones on a
    CPU, the full suites elsewhere.
    """
    folder = project_root() / "evals" / ("quickstart" if on_cpu else "")
    return [
        load_eval(folder / f"{name}.yaml")
        for name in ("alpaca_eval", "mt_bench", "lm_eval")
        if (folder / f"{name}.yaml").is_file()
    ]
