"""Outcomes with bounds, and the audit that finds judges with a vice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.evals.fake_judges import (
    FakeJudge,
    always_a,
    coin,
    mumbles,
    obeys_answers,
    reply,
    says,
    sound,
)
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.cli import main
from recipes_lib.core.errors import DataError
from recipes_lib.evals.audit import (
    FIRST,
    HUMAN,
    LONGER_WINS,
    PROBES,
    SWAP,
    UNPARSED,
    audit,
    audit_banner,
    audit_note,
    first_position,
    pair_samples,
    probe_items,
    scorecard_lines,
    swap_consistency,
)
from recipes_lib.evals.engine import Completion
from recipes_lib.evals.judge import Item, JudgeRequest, ask
from recipes_lib.evals.log import Sample, Scorecard, Store
from recipes_lib.evals.verdicts import Rate

ITEMS = [
    Item(
        str(n),
        "Name a planet.",
        f"Mars is the fourth planet from the Sun, number {n}.",
        f"A stone {n}.",
    )
    for n in range(20)
]


def card_of(answer, tmp_path: Path, labels=None, items=ITEMS) -> Scorecard:
    store, judge = Store(tmp_path / "j.jsonl"), FakeJudge(answer, max_reasks=0)
    ask(items, judge, store)
    ask(list(probe_items(items, 10)), judge, store, rules=False)
    assert len(store) == 2 * len(items) + 4 * min(10, len(items))
    return audit(list(store), None, labels)


def results(card: Scorecard) -> dict[str, str]:
    return {check.check: check.result for check in card.checks}


def test_a_sound_judge_passes_and_what_was_not_measured_is_one_note(tmp_path: Path) -> None:
    card = card_of(sound, tmp_path)
    assert not card.failed and audit_banner(card) is None
    assert results(card)[SWAP] == results(card)[PROBES["empty"]] == "pass"
    assert results(card)[PROBES["injected"]] == "pass"
    assert audit_note(card) == f"not measured of this judge: {HUMAN}"
    (length,) = (check for check in card.checks if check.check == LONGER_WINS)
    assert (length.value, length.result) == (1.0, "described")
    assert len(scorecard_lines(card)) == 3 + len(card.checks)


VICES = {
    SWAP: always_a,
    UNPARSED: mumbles,
    PROBES["injected"]: obeys_answers,
    PROBES["empty"]: always_a,
}


def test_every_vice_fails_its_check_and_is_named_in_the_banner(tmp_path: Path) -> None:
    for number, (check, judge) in enumerate(VICES.items()):
        card = card_of(judge, tmp_path / str(number))
        assert results(card)[check] == "fail", check
        banner = audit_banner(card)
        assert banner is not None and check in banner and "not evidence" in banner
    random = card_of(coin(3), tmp_path / "coin")
    assert random.failed


def test_agreement_with_people_is_a_check_where_pairs_are_labelled(tmp_path: Path) -> None:
    win = {item.name: "win" for item in ITEMS}
    assert results(card_of(sound, tmp_path / "a", win))[HUMAN] == "pass"
    lost = dict.fromkeys(win, "loss")
    assert results(card_of(sound, tmp_path / "b", lost))[HUMAN] == "fail"
    few = dict.fromkeys(list(win)[:3], "win")
    assert results(card_of(sound, tmp_path / "c", few))[HUMAN] == "not measured"


def test_a_judge_of_a_german_or_wordless_text_is_audited_all_the_same(tmp_path: Path) -> None:
    """No check reads the judge's prose."""

    def german(request: JudgeRequest) -> Completion:
        return reply(f"Die Antwort ist vollständiger. [RESULT] {sound(request).text[-1]}")

    card = card_of(german, tmp_path)
    assert not card.failed and {check.result for check in card.checks if check.n} <= {
        "pass",
        "described",
    }


def test_judgments_of_two_judges_or_of_another_program_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "j.jsonl")
    ask(ITEMS[:1], FakeJudge(sound), store)
    rows = [dict(row) for row in store]
    with pytest.raises(DataError, match="2 judges"):
        audit([rows[0], rows[1] | {"judge": "another"}])
    with pytest.raises(DataError, match="no field"):
        audit([{"key": "x"}])


def test_outcomes_of_both_orders(tmp_path: Path) -> None:
    verdicts = {"win": ("A", "B"), "loss": ("B", "A"), "tie": ("A", "A"), "unresolved": ("A", "?")}
    for outcome, (first, second) in verdicts.items():
        store = Store(tmp_path / f"{outcome}.jsonl")
        both = {"AB": first, "BA": second}
        judge = FakeJudge(lambda request, both=both: says(both[request.order]))
        ask(ITEMS[:3], judge, store)
        samples = pair_samples(store)
        assert {one.outcome for one in samples} == {outcome}
        rate = Rate.of(samples)
        json.dumps(rate.value, allow_nan=False)
        if outcome == "unresolved":
            assert (rate.value, rate.n, rate.lowest, rate.highest) == (None, 0, 0.0, 1.0)
    assert Rate.of([]).value is None


def pair(question: str, draw: int, value: float, lengths: tuple[int, int]) -> Sample:
    outcome = {1.0: "win", 0.0: "loss", 0.5: "tie"}[value]
    verdicts = {1.0: ("A", "B"), 0.0: ("B", "A"), 0.5: ("A", "A")}[value]
    return Sample(
        question, draw=draw, value=value, outcome=outcome, verdicts=verdicts, lengths=lengths
    )


def test_draws_of_one_question_are_one_observation_of_every_interval() -> None:
    """Four identical draws a question know as much as one."""
    once = [
        pair(f"q{n}", 1, (1.0, 0.0, 0.5)[n % 3], (100 + 37 * n % 90, 100 + 11 * n % 70))
        for n in range(60)
    ]
    four = [
        pair(one.id, draw, one.value or 0.0, one.lengths) for one in once for draw in (1, 2, 3, 4)
    ]
    for measure in (swap_consistency, first_position, Rate.of):
        single, many = measure(once), measure(four)
        widths = [found.high - found.low for found in (single, many)]
        assert widths[1] > 0.9 * widths[0], measure
    assert first_position(once).value != 0.5 and FIRST


def test_a_judge_is_audited_on_labelled_pairs_and_the_scorecard_is_kept(
    judge_file, runs_folder, tmp_path, capsys
) -> None:
    rows = [
        {
            "instruction": f"Name a fruit, {n}.",
            "answer": "An apple.",
            "opponent_answer": f"Stone {n}.",
            "label": "win",
        }
        for n in range(8)
    ]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["judge", "audit", "--judge", str(tmp_path / "judge.yaml"), "--labels", str(labels)]
    with FaultyServer(answer="The first one. [RESULT] A") as server:
        keys = {"engine": "openai", "model": MODEL, "base_url": server.url, "mode": "generate"}
        judge_file(**keys)
        assert main([*words, "--limit", "6", "--probe-pairs", "1"]) == 0
        assert "failed its audit" in capsys.readouterr().out and len(server.bodies) == 16
        assert main([*words, "--json", "--probe-pairs", "1"]) == 0
        assert len(server.bodies) == 20  # the two pairs that are new, in both orders
    card = json.loads(capsys.readouterr().out)
    (kept,) = runs_folder.glob("judge--judge/labels/judge_audit.json")
    assert json.loads(kept.read_text()) == card
    results = {check["check"]: check["result"] for check in card["checks"]}
    assert results[SWAP] == results[HUMAN] == "fail"
    assert main(["judge", "audit", str(kept.with_name("judgments.jsonl"))]) == 0
