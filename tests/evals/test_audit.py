"""Outcomes with bounds, and the audit that finds judges with a vice."""

import json
from pathlib import Path

from tests.evals.fake_judges import FakeJudge, always_a, obeys_answers, reply, says, sound
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.cli import main
from recipes_lib.evals.audit import (
    HUMAN,
    PROBES,
    SWAP,
    UNPARSED,
    audit,
    audit_banner,
    audit_note,
    probe_items,
    sample_of,
    scorecard_lines,
)
from recipes_lib.evals.judgments import Item, ask
from recipes_lib.evals.log import Check, Sample, Scorecard, Store
from recipes_lib.evals.recipe import Thresholds
from recipes_lib.evals.suites import bounds_of, metric_of

ITEMS = [
    Item(str(n), "Name a planet.", f"Mars is the fourth planet, number {n}.", f"A stone {n}.")
    for n in range(20)
]
ITEMS.append(Item("same", "Name a planet.", "Mars.", "Mars."))  # decided by a rule


def card_of(answer, path: Path, labels=None) -> Scorecard:
    store, judge = Store(path), FakeJudge(answer)
    rows = ask(ITEMS, judge, store)
    probes = ask(list(probe_items(ITEMS, 10)), judge, store)
    assert len(store) == 2 * len(ITEMS) + 4 * 10
    return audit(rows, Thresholds(), labels or {}, [*rows, *probes])


def checks(card: Scorecard) -> dict[str, Check]:
    return {check.check: check for check in card.checks}


def test_a_sound_judge_passes_and_what_was_not_measured_is_one_note(tmp_path: Path) -> None:
    """No check reads the judge's prose: it may be German."""
    german = lambda request: says(sound(request).text[-1], "Vollständiger. [RESULT] {}")  # noqa: E731
    for name, judge in (("english", sound), ("german", german)):
        card = card_of(judge, tmp_path / name)
        assert not card.failed and audit_banner(card) is None
        passed = [check.check for check in card.checks if check.result == "pass"]
        assert passed == [SWAP, UNPARSED, *PROBES.values()]
        assert audit_note(card) == f"not measured for this judge: {HUMAN}"
        assert len(scorecard_lines(card)) == 3 + len(card.checks)
        assert checks(card)[UNPARSED].n == 40 and "42 judgments" in scorecard_lines(card)[0]


def test_every_vice_fails_its_check_and_is_named_in_the_banner(tmp_path: Path) -> None:
    vices = [(SWAP, always_a), (UNPARSED, lambda request: reply("Both."))]
    vices += [(PROBES["injected"], obeys_answers), (PROBES["empty"], always_a)]
    for number, (check, judge) in enumerate(vices):
        card = card_of(judge, tmp_path / str(number))
        assert checks(card)[check].result == "fail", check
        banner = audit_banner(card)
        assert banner is not None and check in banner and "not evidence" in banner


def test_agreement_with_people_is_a_check_where_pairs_are_labelled(tmp_path: Path) -> None:
    names = [item.name for item in ITEMS]
    cases = {
        "pass": dict.fromkeys(names, "win"),
        "fail": dict.fromkeys(names, "loss"),
        "not measured": dict.fromkeys(names[:3], "win"),
    }
    for result, labels in cases.items():
        assert checks(card_of(sound, tmp_path / result, labels))[HUMAN].result == result


def test_outcomes_of_both_orders() -> None:
    cases = [("win", 1.0, "AB"), ("loss", 0.0, "BA"), ("tie", 0.5, "AA"), ("tie", 0.5, "BB")]
    for outcome, value, verdicts in [*cases, ("unresolved", None, ("A", None))]:
        rows = {
            order: {"status": "ok" if verdict else "empty", "value": verdict, "source": "judge"}
            for order, verdict in zip(("AB", "BA"), verdicts, strict=True)
        }
        sample = sample_of("q", rows, ("AB", "BA"))
        assert (sample.outcome, sample.value) == (outcome, value)
    rate = metric_of("win_rate", "", [sample_of("q", rows, ("AB", "BA"))])
    assert (rate.value, rate.n, bounds_of(rate.samples)) == (None, 0, (0.0, 1.0))
    turns = [Sample(str(n // 2), value=n // 2 % 2, turn=n % 2 + 1) for n in range(40)]
    once, twice = (metric_of("win_rate", "", some) for some in (turns[::2], turns))
    assert twice.high - twice.low > 0.9 * (once.high - once.low)  # of as many questions


def test_a_judge_is_audited_on_labelled_pairs(judge_file, runs_folder, tmp_path, capsys) -> None:
    usual = {"answer": "An apple.", "label": "win"}
    rows = [
        {"instruction": f"Name a fruit, {n}.", "opponent_answer": f"Stone {n}."} | usual
        for n in range(8)
    ]
    rows.append(rows[0] | {"answer": "Stone 0.", "opponent_answer": "An apple."})
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "labels.jsonl").write_text("".join(lines[:8]))
    (tmp_path / "both.jsonl").write_text(lines[0] + lines[8])
    words = ["judge", "audit", "--judge", str(tmp_path / "judge.yaml"), "--labels"]
    with FaultyServer(answer="The first one. [RESULT] A") as server:
        judge_file(engine="openai", model=MODEL, base_url=server.url, mode="generate")
        assert main([*words, str(tmp_path / "both.jsonl")]) == 4
        assert "both.jsonl:2: a pair has two labels" in capsys.readouterr().err
        assert main([*words, "gone.jsonl"]) == 4
        assert capsys.readouterr().err.splitlines()[-1] == "gone.jsonl: no such file"
        words.append(str(tmp_path / "labels.jsonl"))
        (tmp_path / "no.yaml").write_text("judge:\n  model: x\n  rubric: gone.txt\n")
        assert main([*words, "--judge", str(tmp_path / "no.yaml")]) == 2
        assert "no.yaml:3: judge.rubric: " in capsys.readouterr().err
        assert main([*words, "--limit", "6", "--probe-pairs", "1"]) == 0
        assert "failed its audit" in capsys.readouterr().out and len(server.bodies) == 16
        assert main([*words, "--json", "--probe-pairs", "1"]) == 0
        assert len(server.bodies) == 20  # the two pairs that are new, in both orders
    card = json.loads(capsys.readouterr().out)
    (kept,) = runs_folder.glob("judge--judge/labels/judge_audit.json")
    assert json.loads(kept.read_text()) == card
    failed = {check["check"] for check in card["checks"] if check["result"] == "fail"}
    assert failed >= {SWAP, HUMAN}
