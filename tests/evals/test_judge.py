"""The loop asks in both orders, stores once, asks again with recorded seeds, and gives up
in time.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.evals.fake_judges import FakeJudge, reply

from recipes_lib.core.errors import ExitCode
from recipes_lib.evals.audit import pair_samples
from recipes_lib.evals.engine import Completion, EvaluationIncomplete
from recipes_lib.evals.judge import Item, JudgePlan, JudgeRequest, ask, build_requests
from recipes_lib.evals.outcomes import Rate, swap_consistency
from recipes_lib.evals.prompts import load_rubric, load_template
from recipes_lib.evals.store import Store, stored_rows

EVALS = Path(__file__).resolve().parents[2] / "evals"
RUBRIC = load_rubric(EVALS / "rubrics" / "helpfulness.txt")
RELATIVE, ABSOLUTE = (
    load_template(EVALS / "prompts" / f"prometheus-{kind}.txt") for kind in ("relative", "absolute")
)


def longer(request: JudgeRequest) -> Completion:
    first, second = request.answers
    return reply(f"The longer one. [RESULT] {'A' if len(first) >= len(second) else 'B'}")


def _plan(**options) -> JudgePlan:
    return JudgePlan(
        **{
            "template": RELATIVE,
            "rubric": RUBRIC,
        }
        | options
    )


def _pairs(count: int) -> list[Item]:
    return [
        Item(
            str(index),
            f"Question {index}",
            "long answer " * (index % 3 + 1),
            "short",
            meta={"turn": 1},
        )
        for index in range(count)
    ]


def test_each_pair_is_asked_in_both_orders_and_only_once(tmp_path: Path) -> None:
    judge, store = FakeJudge(longer), Store(tmp_path / "j.jsonl")
    run = ask(_pairs(10), judge, store, _plan())
    assert run.asked == len(store) == 20
    assert {(request.item.question_id, request.order) for request in judge.asked} == {
        (str(i), order) for i in range(10) for order in ("AB", "BA")
    }
    again = ask(_pairs(10), FakeJudge(longer), Store(store.path), _plan())
    assert (again.asked, again.stored_before) == (0, 20)
    assert swap_consistency(pair_samples(store)).estimate == 1.0


def test_candidate_stands_first_in_ab_and_second_in_ba() -> None:
    ab, ba = build_requests([Item("q", "x", "mine", "theirs")], _plan(), "j")
    assert (ab.order, ab.answers, ba.order, ba.answers) == (
        "AB",
        ("mine", "theirs"),
        "BA",
        ("theirs", "mine"),
    )
    assert ab.key != ba.key


def test_another_judge_prompt_or_answer_is_another_judgment() -> None:
    def keys(item: Item, plan: JudgePlan, fingerprint: str) -> set[str]:
        return {request.key for request in build_requests([item], plan, fingerprint)}

    plain = keys(Item("q", "x", "a", "b"), _plan(), "j")
    for changed in (
        keys(Item("q", "x", "a", "b"), _plan(), "k"),
        keys(Item("q", "x", "a", "c"), _plan(), "j"),
        keys(
            Item("q", "x", "a", "b"),
            _plan(rubric=load_rubric(EVALS / "rubrics" / "correctness.txt")),
            "j",
        ),
        keys(Item("q", "x", "a", "b", reference="r"), _plan(), "j"),
    ):
        assert not plain & changed


def test_empty_and_identical_answers_are_decided_without_the_judge(tmp_path: Path) -> None:
    judge, store = FakeJudge(longer), Store(tmp_path / "j.jsonl")
    items = [
        Item("empty", "x", " \n", "b"),
        Item("opponent", "x", "a", ""),
        Item("same", "x", "a ", "a"),
        Item("none", "x", "", ""),
    ]
    run = ask(items, judge, store, _plan())
    assert not judge.asked and run.by_rule == 8
    assert {item.id: item.outcome for item in pair_samples(store)} == {
        "empty": "loss",
        "opponent": "win",
        "same": "tie",
        "none": "tie",
    }
    absolute = Store(tmp_path / "absolute.jsonl")
    ask([Item("empty", "x", "")], judge, absolute, _plan(template=ABSOLUTE))
    assert next(iter(absolute))["value"] == 1


def test_self_comparison_gives_exactly_one_half(tmp_path: Path) -> None:
    store = Store(tmp_path / "j.jsonl")
    ask(
        [Item(str(i), "x", f"answer {i}", f"answer {i}") for i in range(50)],
        FakeJudge(longer),
        store,
        _plan(),
    )
    assert Rate.of(pair_samples(store)).value == 0.5


def test_malformed_verdicts_are_asked_again_with_new_seeds_and_all_attempts_are_stored(
    tmp_path: Path,
) -> None:
    def third_time(request: JudgeRequest) -> Completion:
        return reply("hm" if request.attempt < 3 else "Right. [RESULT] A")

    judge, store = FakeJudge(third_time), Store(tmp_path / "j.jsonl")
    run = ask(_pairs(3), judge, store, _plan(max_reasks=2))
    assert run.reasked == 12 and len(store) == 6
    row = next(iter(store))
    assert row["status"] == "ok" and [attempt["raw"] for attempt in row["attempts"]] == ["hm", "hm"]
    seeds = [attempt["seed"] for attempt in row["attempts"]] + [row["seed"]]
    assert len(set(seeds)) == 3 and row["temperature"] > 0 and judge.asked[0].temperature == 0
    repeat = FakeJudge(third_time)
    ask(_pairs(3), repeat, Store(tmp_path / "k.jsonl"), _plan(max_reasks=2))
    assert [request.seed for request in repeat.asked] == [request.seed for request in judge.asked]


def test_re_asks_are_bounded_and_the_item_stays_unparsed(tmp_path: Path) -> None:
    judge, store = (
        FakeJudge(lambda request: reply("no idea")),
        Store(tmp_path / "j.jsonl"),
    )
    ask(_pairs(1), judge, store, _plan(max_reasks=1))
    assert len(judge.asked) == 4
    assert [row["status"] for row in store] == ["unparsed", "unparsed"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (reply("I cannot judge this."), "refused"),
        (reply("so [RESULT] A", finish_reason="length"), "truncated"),
        (reply(""), "empty"),
    ],
)
def test_other_statuses_are_stored_as_they_are(
    tmp_path: Path, given: Completion, status: str
) -> None:
    store = Store(tmp_path / "j.jsonl")
    ask(_pairs(1), FakeJudge(lambda request: given), store, _plan())
    assert {row["status"] for row in store} == {status}
    assert {row["value"] for row in store} == {None}


def test_failures_in_a_row_end_the_run_and_the_same_command_continues_it(tmp_path: Path) -> None:
    path, calls = tmp_path / "j.jsonl", []

    def breaks(request: JudgeRequest) -> Completion:
        calls.append(request)
        return longer(request) if len(calls) <= 6 else reply(error="503: overloaded")

    with pytest.raises(EvaluationIncomplete, match="503") as caught:
        ask(_pairs(10), FakeJudge(breaks), Store(path), _plan(max_consecutive_failures=3))
    assert caught.value.exit_code is ExitCode.EVALUATION_INCOMPLETE
    assert len(Store(path)) == 6
    run = ask(_pairs(10), FakeJudge(longer), Store(path), _plan())
    assert (run.asked, run.stored_before, len(Store(path))) == (14, 6, 20)


def test_single_failures_leave_judgments_missing_and_say_so(tmp_path: Path) -> None:
    store, flip = Store(tmp_path / "j.jsonl"), iter([True, False] * 10)
    run = ask(
        _pairs(10),
        FakeJudge(lambda r: longer(r) if next(flip) else reply(error="timeout")),
        store,
        _plan(),
    )
    with pytest.raises(
        EvaluationIncomplete, match=r"10 judgments are missing: timeout \(10 times\)"
    ):
        run.check_complete()
    assert {item.outcome for item in pair_samples(store)} == {"unresolved"}


def test_a_refused_request_is_missing_and_the_same_command_asks_again(tmp_path: Path) -> None:
    path, refuses = tmp_path / "j.jsonl", reply(error="402: pay first", refused=True)
    run = ask(_pairs(4), FakeJudge(lambda request: refuses), Store(path), _plan())
    with pytest.raises(
        EvaluationIncomplete,
        match=r"8 judgments are missing: 402: pay first \(8 times\)\n.*change the recipe",
    ):
        run.check_complete()
    assert len(Store(path)) == 0
    again = ask(_pairs(4), FakeJudge(longer), Store(path), _plan())
    assert (again.asked, again.failed.total) == (8, 0)


def test_each_reply_is_stored_before_the_next_one_is_waited_for(tmp_path: Path) -> None:
    path, seen = tmp_path / "j.jsonl", []

    def answers(request: JudgeRequest) -> Completion:
        seen.append(len(stored_rows(path)))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return longer(request)

    with pytest.raises(KeyboardInterrupt):
        ask(_pairs(10), FakeJudge(answers), Store(path), _plan())
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_judge_that_leaves_a_request_without_a_reply_is_a_programming_error(
    tmp_path: Path,
) -> None:
    judge = FakeJudge(longer)
    judge.complete = lambda requests: (
        pair for pair in list(FakeJudge(longer).complete(requests))[1:]
    )  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="1 requests without a reply"):
        ask(_pairs(1), judge, Store(tmp_path / "j.jsonl"), _plan())


def test_probabilities_that_are_not_finite_are_no_verdict(tmp_path: Path) -> None:
    store = Store(tmp_path / "j.jsonl")
    nan = reply(probabilities={"A": float("nan"), "B": 0.5})
    ask(_pairs(1), FakeJudge(lambda request: nan), store, _plan())
    assert {(row["status"], row["mass"]) for row in Store(store.path)} == {("unparsed", 0.5)}


def test_verdicts_by_rule_are_stored_together_and_cost_no_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_tokens(text: str) -> int:
        raise AssertionError("a prompt that is not sent was counted")

    items = [Item(str(index), "Question", "same é" * 999, "same é" * 999) for index in range(1250)]
    store, syncs = Store(tmp_path / "j.jsonl"), []
    monkeypatch.setattr(os, "fsync", syncs.append)
    run = ask(
        items, FakeJudge(longer), store, _plan(count_tokens=count_tokens, max_prompt_tokens=100)
    )
    assert run.by_rule == 2500 and len(syncs) <= 4
    again = ask(
        items,
        FakeJudge(longer),
        Store(store.path),
        _plan(count_tokens=count_tokens, max_prompt_tokens=100),
    )
    assert (again.stored_before, again.by_rule, again.asked) == (2500, 0, 0)


def test_probabilities_give_the_verdict_and_their_mass_is_stored(tmp_path: Path) -> None:
    store = Store(tmp_path / "j.jsonl")
    ask(
        [Item("q", "x", "a")],
        FakeJudge(lambda r: reply(probabilities={"4": 0.3, "2": 0.1, "x": 0.6})),
        store,
        _plan(template=ABSOLUTE),
    )
    assert (next(iter(store))["value"], next(iter(store))["mass"]) == (4, pytest.approx(0.4))
    tied = Store(tmp_path / "tied.jsonl")
    ask(
        _pairs(1),
        FakeJudge(lambda r: reply(probabilities={"A": 0.2, "B": 0.2})),
        tied,
        _plan(),
    )
    assert {row["status"] for row in tied} == {"unparsed"}


def test_a_prompt_that_cannot_fit_is_truncated_and_never_sent(tmp_path: Path) -> None:
    judge, store = FakeJudge(longer), Store(tmp_path / "j.jsonl")
    ask(
        _pairs(2),
        judge,
        store,
        _plan(count_tokens=lambda text: len(text.split()), max_prompt_tokens=50),
    )
    assert not judge.asked and {row["status"] for row in store} == {"truncated"}
