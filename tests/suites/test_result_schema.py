"""The schema of result.json refuses numbers that a suite could not have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.suites.test_replay_numbers import rows

from recipes_lib.config.kinds import at
from recipes_lib.config.vocabulary import load_schema
from recipes_lib.eval_log import AnswerFacts, AnswerFaults, EvalLog, JudgeFacts, TaskScore
from recipes_lib.eval_recipe import SUITE_FACTS
from recipes_lib.judging.audit import audit
from recipes_lib.judging.outcomes import pair_samples, summarise
from recipes_lib.statistics.intervals import mean_interval, wilson
from recipes_lib.suites.judged import JudgedSuite, replay_numbers
from recipes_lib.suites.mt_bench import summary
from recipes_lib.suites.questions import Question
from recipes_lib.suites.suite import suite_class

VALIDATOR = Draft202012Validator(load_schema("eval_result"))
STORED = rows({"1": "AB", "2": "BA", "3": "AA", "4": ("A", "unparsed")})
GRADES = [
    {"kind": "absolute", "question_id": f"1:{turn}", "status": "ok", "value": 4} for turn in (1, 2)
]
LIBRARY = ("win_rate", "standard_error", "n", "n_total", "n_wins", "n_wins_base", "n_draws")
RATE = wilson(3, 4).to_dict() | {"unresolved": 0}
NUMBERS: dict[str, dict[str, Any]] = {
    "alpaca_eval": {
        "pairs": summarise(pair_samples(STORED)).to_dict(),
        "alpaca_eval": dict.fromkeys(LIBRARY, 1) | {"by_order": {}},
        **dict.fromkeys(("length_controlled", "mean_score", "mean_length", "by_category")),
    },
    "mt_bench": {"judgment_keys": [], **summary([Question("1", ("a", "b"), "math")], GRADES)},
    "lm_eval": {"lm_eval_results": "lm_eval_results.json"},
    "checks": {"pass_rate": RATE, "by_category": {"sums": RATE}},
    "heldout_loss": {
        "loss": mean_interval([1.0, 2.0, 3.0]).to_dict(),
        "perplexity": 7.4,
        "bits_per_byte": None,  # of rows whose supervised tokens are all special
        "rows": {"n": 3, "tokens": 30, "hash": "0"},
    },
}


def result(suite: str) -> Any:
    """A result of a suite as its file holds it, or an imported one."""
    if suite == "imported":
        names = ("eval", "target", "against", "subset", "answers")
        file = {"file": "x.json", "sha256": "0", "format": "fastchat-single"}
        told = {"format_version": 1, "suite": "mt_bench", "imported": [file]}
        told |= {"missing": [{"question_id": "81", "turn": 1}], "replays": [{}]}
        told |= {"measures": [{"metric": "grade", "label": "MT-Bench mean grade"}]}
        return told | dict.fromkeys(names) | {key: [] for key in ("banners", "flags", "lacks")}
    numbers, card = NUMBERS[suite], audit(STORED)
    judged: dict[str, Any] = {}
    if suite in ("alpaca_eval", "mt_bench"):
        answers = AnswerFaults.of(["a"], cut=0)
        judged = {"n": 4, "judge": JudgeFacts(), "audit": card}
        judged["answers"] = AnswerFacts(answers=answers)
        numbers = numbers | replay_numbers({"pairs": None} | numbers, card)
    task = TaskScore(task="arc_easy", metric="acc", value=0.5, n=4)
    log = EvalLog(
        suite=suite, eval=suite, numbers=numbers, tasks=(task,), file=Path("result.json"), **judged
    )
    return json.loads(json.dumps(log.to_dict()))


@pytest.mark.parametrize("suite", [*NUMBERS, "imported"])
def test_a_result_is_as_its_schema_says(suite: str) -> None:
    VALIDATOR.validate(result(suite))


@pytest.mark.parametrize(
    ("suite", "place", "wrong"),
    [
        ("alpaca_eval", "pairs.win", "two"),
        ("alpaca_eval", "pairs.statuses.ok", 0.5),
        ("alpaca_eval", "pairs.score.n", -1),
        ("alpaca_eval", "pairs.score.estimate", "half"),
        ("alpaca_eval", "pairs.win_rate.method", None),
        ("alpaca_eval", "alpaca_eval.standard_error", ...),
        ("alpaca_eval", "answers.answers", None),
        ("alpaca_eval", "answers.answers.cut", None),
        ("alpaca_eval", "answers.answers.empty", ...),
        ("alpaca_eval", "answers.answers.identical.share", ...),
        ("alpaca_eval", "recorded.win", 101),
        ("alpaca_eval", "recorded.mean_score_interval", ...),
        ("alpaca_eval", "unparsed.share", 2),
        ("alpaca_eval", "contradictions.direction", ...),
        ("alpaca_eval", "order.judged", "once"),
        ("alpaca_eval", "bounds.of", "win"),
        ("mt_bench", "score.scale", ...),
        ("mt_bench", "score.low", "1"),
        ("mt_bench", "by_turn.1.turns", ...),
        ("mt_bench", "by_category.math.all.n", -1),
        ("mt_bench", "bounds.all_lost", "1"),
        ("lm_eval", "tasks.0.stderr", ...),
        ("lm_eval", "tasks.0.filter", ...),
        ("alpaca_eval", "pairs.score_bounds.tie", {}),
        ("alpaca_eval", "pairs.win_bounds.all_won", "1"),
        ("alpaca_eval", "pairs.other", 1),
        ("mt_bench", "score.bounds.all_1", ...),
        ("mt_bench", "score.other", 1),
        ("checks", "pass_rate.unresolved", ...),
        ("checks", "pass_rate.low", "0"),
        ("checks", "by_category.sums.unresolved", -1),
        ("heldout_loss", "loss.n", ...),
        ("heldout_loss", "perplexity", None),
        ("heldout_loss", "bits_per_byte", "1"),
        ("heldout_loss", "rows.hash", ...),
        ("lm_eval", "tasks.0.parts", [1]),
        ("imported", "suite", "checks"),
        ("imported", "missing.0.turn", ...),
        ("imported", "replays.0", 1),
        ("imported", "measures.0.label", ...),
        ("imported", "imported", []),
        ("imported", "imported.0.sha256", ...),
        ("imported", "imported.0.other", 1),
    ],
)
def test_a_number_that_no_suite_writes_is_refused(suite: str, place: str, wrong: Any) -> None:
    whole = result(suite)
    *path, last = [int(word) if word == "0" else word for word in place.split(".")]
    inner = whole
    for word in path:
        inner = inner[word]
    if wrong is ...:
        del inner[last]
    else:
        inner[last] = wrong
    assert not VALIDATOR.is_valid(whole)


def test_what_is_known_of_a_suite_before_it_is_run_is_what_its_class_says() -> None:
    for name, facts in SUITE_FACTS.items():
        kind = suite_class(name)
        assert facts.judged == issubclass(kind, JudgedSuite), name
        assert facts.metrics or name == "lm_eval", name
        assert not facts.question or callable(at(facts.question)), name
        assert kind.HELP and kind.TITLE and kind.NUMBERS, name
