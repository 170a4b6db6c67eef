"""Answers of models: what is asked and kept, and what will never be answered."""

import json
from pathlib import Path

import pytest
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.evals.log import UNRESOLVED, EvalLog, Sample, read_eval_log
from recipes_lib.evals.recipe import load_eval
from recipes_lib.evals.run import evaluate

TOO_LONG = b'400:{"message": "maximum context length is 128 tokens, requested 500"}'
FILTERED = b'400:{"error": {"code": "content_filter", "message": "no"}}'
WITHHELD = b'200:{"choices": [{"finish_reason": "content_filter", "text": "Here"}]}'
SUITES = {
    "alpaca_eval": [{"instruction": f"Question {n}?", "output": "A good answer."} for n in (1, 2)],
    "checks": [{"prompt": f"Question {n}?", "check": "exact", "expected": "5"} for n in (1, 2)],
    "mt_bench": [
        {"question_id": n, "category": "writing", "turns": [f"Question {n}?", "More?"]}
        for n in (1, 2)
    ],
}


@pytest.fixture
def evaluate_served(judge_file, make_run, tmp_path):
    """A function that evaluates a served run, whose second request has a fault."""
    make_run(MODEL, 1)

    def run(suite: str, fault: bytes | None) -> tuple[EvalLog, int]:
        judge_file()
        rows = "".join(json.dumps(row) + "\n" for row in SUITES[suite])
        (tmp_path / f"{suite}.jsonl").write_text(rows)
        with FaultyServer(answer="5") as server:
            server.faults = lambda number: fault if number == 2 else None
            path = tmp_path / f"{suite}-{len(list(tmp_path.iterdir()))}.yaml"
            judged = "extends: judge.yaml\nmetrics: {probe_pairs: 1}\n"
            path.write_text(
                ("" if suite == "checks" else judged) + f"suite: {{name: {suite}}}\n"
                f"data: {{questions: {suite}.jsonl}}\n"
                f"generation: {{engine: openai, base_url: '{server.url}', concurrency: 1}}\n"
            )
            (log,) = evaluate([load_eval(path)], [MODEL])
            return log, len(server.bodies)

    return run


def samples(log: EvalLog) -> list[Sample]:
    return sorted(log.metrics[0].samples, key=lambda sample: sample.key)


def test_an_answer_that_a_server_refuses_for_good_is_neither_right_nor_wrong(evaluate_served):
    for fault in (TOO_LONG, FILTERED, WITHHELD):
        for suite in ("alpaca_eval", "checks"):
            log, _ = evaluate_served(suite, fault)
            answered, refused = samples(log)
            assert answered.outcome != UNRESOLVED == refused.outcome, (suite, fault)
            assert refused.value is None and refused.answer is None
            assert log.metrics[0].n == 1
            assert any("has no answer to 1 of 2 requests" in note for note in log.notes)
            assert all(faulty == 0 for faulty, _ in log.faults.values())
            assert read_eval_log(log.file).metrics[0].samples == log.metrics[0].samples
            if log.audit:  # the judge was not asked, so it is not to blame
                assert not {"judgments without a verdict"} & {it.check for it in log.audit.failed}
    row = json.loads((Path(log.file).parent / "generations.jsonl").read_text().splitlines()[1])
    assert row["finish_reason"] == "refused" and "content_filter" in row["refusal"]


def test_a_turn_after_a_refused_one_is_not_asked_and_has_no_grade(evaluate_served):
    log, asked = evaluate_served("mt_bench", TOO_LONG)
    grades = {(sample.id, sample.turn): sample.answer for sample in samples(log)}
    assert asked == 3 and grades == {("1", 1): "5", ("1", 2): "5", ("2", 1): None, ("2", 2): None}
    assert "1 without the answer to an earlier turn" in log.notes[0]


def test_an_empty_answer_that_a_model_wrote_still_loses(evaluate_served):
    empty = b'200:{"choices": [{"finish_reason": "stop", "text": ""}]}'
    log, _ = evaluate_served("alpaca_eval", empty)
    assert samples(log)[1].outcome == "loss"
