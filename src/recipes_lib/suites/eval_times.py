"""How long an evaluation takes on a processor: answers written, verdicts read, benchmark items
scored, at the speeds measured with SmolLM2-135M. Lengths of answers and feedback are assumed. No
evaluation was measured on a GPU, or with a judge behind a URL: there is no number for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from recipes_lib.core.errors import DataError
from recipes_lib.core.project import project_root
from recipes_lib.data.files import read_file
from recipes_lib.eval_recipe import EvalRecipe, load_eval
from recipes_lib.models.known import named_shape
from recipes_lib.models.shapes import ModelShape
from recipes_lib.planning.cards import MEASURED_PARAMETERS, SCALING, Card, core_tflops
from recipes_lib.planning.duration import EvalTime

GENERATED_TOKENS_PER_SECOND = 95.0  # SmolLM2-135M, batched, two idle threads: 75-116
JUDGED_TOKENS_PER_SECOND = 774.0  # the same, prompts of 480 tokens in 0.62 s
NUM_QUESTIONS = {"alpaca_eval": 805, "mt_bench": 80}
ANSWER_SHARE = 0.45  # of max_new_tokens, on average
JUDGE_PROMPT, FEEDBACK = 480, 180  # tokens: rubric with both answers, and what Prometheus writes
EVAL_START_S = 12.0
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

# tasks of the project's eval recipes of which the requests are known, and not their lengths
REQUESTS = {
    "gsm8k_cot_llama": 1319,
    "gsm8k_metamath": 1319,
    "ifeval": 541,
    "minerva_math500": 500,
    "mmlu_pro": 12032,
}


def eval_times(recipes: Sequence[EvalRecipe], shape: ModelShape, card: Card) -> list[EvalTime]:
    """Return the time of each evaluation of a model; none on a GPU."""
    return [eval_time(recipe, shape, card) for recipe in recipes] if card.name == "cpu" else []


def eval_time(recipe: EvalRecipe, shape: ModelShape, card: Card) -> EvalTime:
    """Return the time of one evaluation of a model on a processor."""
    suite, speed = recipe.suite.name, pace(shape, card)
    if suite == "lm_eval":
        return _harness(recipe, speed)
    if suite == "heldout_loss":
        return EvalTime(recipe.name, 0.0, 0.0, ("the loss on held-out rows",))
    known = _num_questions(recipe)
    if known is None:
        return EvalTime(recipe.name, 0.0, 0.0, ("the answers to questions that are not here",))
    questions = min(known, recipe.data.max_questions or 10**9)
    answers = questions * (2 if suite == "mt_bench" else recipe.generation.samples)
    written = answers * recipe.generation.max_new_tokens * ANSWER_SHARE
    answering = EVAL_START_S + written / (GENERATED_TOKENS_PER_SECOND * speed)
    verdicts = answers
    if suite == "alpaca_eval":
        verdicts *= 3 if recipe.metrics.absolute else 2
        verdicts += 12 * min(recipe.metrics.probe_pairs, questions)
    if recipe.judge is None:
        return EvalTime(recipe.name, answering, 0.0)
    judge = recipe.judge.judge
    if judge.engine == "openai":
        return EvalTime(recipe.name, answering, 0.0, (f"the judge {judge.model}",))
    judges_pace = pace(named_shape(judge.model) or shape, card)
    seconds = verdicts * JUDGE_PROMPT / (JUDGED_TOKENS_PER_SECOND * judges_pace)
    if judge.mode != "logits":
        seconds += verdicts * FEEDBACK / (GENERATED_TOKENS_PER_SECOND * judges_pace)
    return EvalTime(recipe.name, answering, seconds)


def pace(shape: ModelShape, card: Card) -> float:
    """Return how much faster than in the measurement this processor reads and writes: against its
    two threads, and its model's size.
    """
    threads = 2**SCALING * core_tflops("bf16")
    return MEASURED_PARAMETERS / shape.parameters * card.tflops / threads


def _num_questions(recipe: EvalRecipe) -> int | None:
    """Return the number of questions: of a local file, or the suite's own, which not every suite
    has.
    """
    questions = recipe.data.questions or ""
    file = recipe.resolve("data.questions", questions)
    if not questions or ":" in questions or not file.is_file():
        return NUM_QUESTIONS.get(recipe.suite.name)
    with contextlib.suppress(DataError):  # of a damaged file the evaluation says where
        return len(read_file(file).rows)
    return None


def _harness(recipe: EvalRecipe, speed: float) -> EvalTime:
    """lm-eval: prompts are read once per request, some tasks also write."""
    seconds, unknown = EVAL_START_S + 15.0, []
    for task in recipe.suite.tasks or ():
        if task not in TASKS:
            unknown.append(task)
            continue
        items, requests, tokens, written = TASKS[task]
        items = limited(items, recipe.suite.limit)
        seconds += items * requests * tokens / (JUDGED_TOKENS_PER_SECOND * speed)
        seconds += items * written / (GENERATED_TOKENS_PER_SECOND * speed)
    return EvalTime(recipe.name, seconds, 0.0, tuple(unknown))


def limited(items: int, limit: float | None) -> int:
    """Return the items of a task that are asked; a limit below 1 is a share of them."""
    if limit is None:
        return items
    return round(items * limit) if limit < 1 else min(items, int(limit))


def usual_evals(on_cpu: bool) -> list[EvalRecipe]:
    """Return the project's eval recipes that go with a recipe: the quickstart's small ones on a
    CPU, the full suites elsewhere.
    """
    folder = project_root() / "evals" / ("quickstart" if on_cpu else "")
    files = [folder / f"{name}.yaml" for name in ("alpaca_eval", "mt_bench", "lm_eval")]
    return [load_eval(file) for file in files if file.is_file()]
