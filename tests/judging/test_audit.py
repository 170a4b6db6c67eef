"""The audit tells a sound judge from one with a known vice, and says what it could not measure."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_judges import (
    FakeJudge,
    always_a,
    coin,
    contradicts_itself,
    mumbles,
    obeys_answers,
    reply,
    sound,
)

from recipes_lib.cli import main
from recipes_lib.core.errors import DataError, RecipeErrors
from recipes_lib.judging.audit import PROBES, audit, probe_requests, scorecard_markdown, self_judged
from recipes_lib.judging.human_labels import load_labelled_pairs, load_labels
from recipes_lib.judging.judge import Item, JudgePlan, ask, judge_items
from recipes_lib.judging.judge_file import Thresholds, load_judge_file
from recipes_lib.judging.prometheus import PROMETHEUS_PACKAGE, load_rubric, load_template
from recipes_lib.judging.store import JudgmentStore, stored_rows

ROOT = Path(__file__).resolve().parents[2]
EVALS = ROOT / "evals"
DATA = (
    Path(os.environ.get("RECIPES_SHARED_DATA") or ROOT.parent / "shared" / "data") / "human_labels"
)
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="real data not present (RECIPES_SHARED_DATA)"
)
PLAN = {
    "template": load_template(EVALS / "prompts" / "prometheus-relative.txt"),
    "rubric": load_rubric(EVALS / "rubrics" / "helpfulness.txt"),
}


def _items(count: int = 40) -> list[Item]:
    return [
        Item(
            str(i),
            f"Question {i}",
            " ".join(f"w{n}" for n in range(30 + i % 7)),
            " ".join(f"v{n}" for n in range(22 + 2 * (i % 9))),
        )
        for i in range(count)
    ]


def _card(
    tmp_path: Path,
    answer,
    labels: dict[str, str] | None = None,
    probes: bool = True,
    items: list[Item] | None = None,
) -> dict:
    judge, store = FakeJudge(answer), JudgmentStore(tmp_path / "judgments.jsonl")
    judge_items(items or _items(), judge, store, JudgePlan(**PLAN, max_reasks=0))
    if probes:
        plan = JudgePlan(**PLAN, max_reasks=0, rules=False)
        ask(probe_requests(items or _items(), plan, judge.fingerprint), judge, store, plan)
    return audit(stored_rows(store.path), labels=labels)


def _result(card: dict, name: str) -> str:
    return next(check["result"] for check in card["checks"] if check["check"] == name)


def test_a_sound_judge_passes_every_check_that_was_measured(tmp_path: Path) -> None:
    card = _card(tmp_path, sound)
    assert {check["result"] for check in card["checks"]} == {"pass", "not measured"}
    assert _result(card, "agreement with human labels") == "not measured"
    assert card["banner"] is None
    assert card["probes"]["truncated"]["share"]["estimate"] == 1.0
    assert card["probes"]["repeated"]["share"]["estimate"] == 0.0
    assert set(card["probes"]) == set(PROBES)
    json.dumps(card)


def test_a_judge_that_always_says_a_fails_on_consistency_and_empty_answers(tmp_path: Path) -> None:
    card = _card(tmp_path, always_a)
    assert _result(card, "swap consistency") == _result(card, "empty answer loses") == "fail"
    assert card["first_position"]["estimate"] == 1.0
    assert "failed its audit" in card["banner"] and card["banner"] in scorecard_markdown(card)


def test_a_judge_that_contradicts_its_own_words_fails_that_check(tmp_path: Path) -> None:
    card = _card(tmp_path, contradicts_itself)
    assert _result(card, "verdicts against the judge's own words") == "fail"
    assert card["contradictions"]["rate"] == 1.0 and card["contradictions"]["direction"]
    assert _result(card, "swap consistency") == "pass"


def test_a_judge_that_obeys_an_answer_fails_the_injection_probe_and_the_item_is_flagged(
    tmp_path: Path,
) -> None:
    card = _card(tmp_path, obeys_answers)
    assert _result(card, "injected verdict flips") == "fail"
    rows = [
        row
        for row in stored_rows(tmp_path / "judgments.jsonl")
        if row["meta"].get("probe") == "injected"
    ]
    assert rows and all(row["marker_in_answer"] for row in rows)


def test_a_judge_without_verdicts_fails_and_divides_by_nothing(tmp_path: Path) -> None:
    card = _card(tmp_path, mumbles)
    assert _result(card, "judgments without a verdict") == "fail"
    assert (
        _result(card, "swap consistency") == _result(card, "empty answer loses") == "not measured"
    )
    assert card["statuses"] == {"unparsed": 80}
    assert "n/a" in scorecard_markdown(card)


@pytest.mark.parametrize(("pairs", "result"), [(3, "not measured"), (12, "pass")])
def test_three_labels_that_a_judge_got_right_are_no_proof(
    tmp_path: Path, pairs: int, result: str
) -> None:
    def first_wins(request):
        return reply(f"[RESULT] {'A' if request.order == 'AB' else 'B'}")

    labels = {str(n): "win" for n in range(pairs)}
    card = _card(tmp_path, first_wins, labels, probes=False, items=_items(pairs))
    assert card["human"]["verdict_accuracy"]["estimate"] == 1.0
    assert _result(card, "agreement with human labels") == result


def test_a_judge_that_never_looks_is_not_above_chance(tmp_path: Path) -> None:
    labels = {str(n): "win" if n % 2 else "loss" for n in range(40)}
    card = _card(tmp_path, always_a, labels, probes=False, items=_items(40))
    assert _result(card, "agreement with human labels") == "fail"


def test_a_coin_is_inconsistent_noisy_and_no_better_than_chance_on_labels(tmp_path: Path) -> None:
    labels = {str(i): "win" if i % 2 else "loss" for i in range(200)}
    card = _card(tmp_path, coin(3), labels, items=_items(200))
    assert _result(card, "swap consistency") == "fail"
    assert _result(card, "agreement with human labels") == "fail"
    assert card["probes"]["repeated"]["share"]["low"] > 0.35
    assert card["probes"]["identical"]["share"]["n"] == 200


def test_without_probes_or_rows_the_checks_are_not_measured_and_nothing_crashes(
    tmp_path: Path,
) -> None:
    card = _card(tmp_path, sound, probes=False)
    assert _result(card, "empty answer loses") == "not measured" and card["probes"] == {}
    empty = audit([])
    assert {check["result"] for check in empty["checks"]} == {"not measured"} and empty[
        "banner"
    ] is None
    assert scorecard_markdown(empty).startswith("# Judge audit")


def test_length_bias_counts_the_longer_answer(tmp_path: Path) -> None:
    items = [Item(str(i), "x", "short", "a much longer answer " * 3) for i in range(20)] + [
        Item("same", "x", "aaaa", "bbbb")
    ]
    card = _card(tmp_path, sound, probes=False, items=items)
    assert (card["length"]["longer_wins"]["estimate"], card["length"]["longer_wins"]["n"]) == (
        1.0,
        20,
    )


def test_probes_leave_out_pairs_that_cannot_carry_them_and_never_enter_a_win_rate(
    tmp_path: Path,
) -> None:
    plan = JudgePlan(**PLAN, rules=False)
    degenerate = [Item("e", "x", "", "b"), Item("s", "x", "a", "a"), Item("one", "x", "a")]
    assert list(probe_requests(degenerate, plan, "j")) == []
    requests = list(probe_requests(_items(2), plan, "j"))
    assert len(requests) == 2 * 2 * len(PROBES) and len(
        {request.key for request in requests}
    ) == len(requests)
    assert _card(tmp_path, sound)["judgments"] == 80


def test_logits_judgments_report_their_mass(tmp_path: Path) -> None:
    card = _card(tmp_path, lambda request: reply(probabilities={"A": 0.2, "B": 0.1}), probes=False)
    assert card["mean_mass"] == pytest.approx(0.3)
    assert _result(card, "verdicts against the judge's own words") == "not measured"


def test_judgments_of_two_judges_or_without_fields_are_refused() -> None:
    base = {
        "kind": "relative",
        "question_id": "1",
        "order": "AB",
        "status": "ok",
        "value": "A",
        "source": "judge",
        "judge": "j",
    }
    row = base | {
        "lengths": [1, 2],
        "marker_in_answer": False,
        "cut": False,
        "attempts": [],
        "meta": {},
    }
    with pytest.raises(DataError, match="2 judges"):
        audit([row, row | {"judge": "k"}])
    with pytest.raises(DataError, match="lengths"):
        audit([base])


def test_self_preference_is_warned_about() -> None:
    assert self_judged("org/Judge", ["other", "org/judge/"])
    assert self_judged("org/judge", ["org/model"]) is None


@needs_data
def test_human_label_files_load_with_their_published_sizes() -> None:
    pandalm = load_labelled_pairs(DATA / "pandalm_testset-v1.json")
    assert len(pandalm) == 999 and {label for _, label in pandalm} == {"win", "loss", "tie"}
    llmbar = [
        pair
        for path in sorted((DATA / "llmbar").rglob("dataset.json"))
        for pair in load_labelled_pairs(path)
    ]
    assert len(llmbar) == 419 and {label for _, label in llmbar} == {"win", "loss"}


@needs_data
def test_a_judge_that_knows_the_labels_agrees_with_them(tmp_path: Path) -> None:
    pairs = load_labelled_pairs(DATA / "llmbar" / "Natural" / "dataset.json")
    labels = {item.question_id: label for item, label in pairs}

    def oracle(request):
        better = (
            "A" if (labels[request.item.question_id] == "win") == (request.order == "AB") else "B"
        )
        return reply(f"[RESULT] {better}")

    card = _card(tmp_path, oracle, labels, probes=False, items=[item for item, _ in pairs])
    assert (
        card["human"]["outcome_accuracy"]["estimate"] == card["human"]["kappa"]["estimate"] == 1.0
    )
    assert card["human"]["above_chance"] and _result(card, "agreement with human labels") == "pass"


OWN = {"instruction": "i", "answer": "a", "opponent_answer": "b", "label": "win"}


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("mine.json", [], ": 0 labelled pairs"),
        (
            "mine.json",
            [{"input": "x", "label": 1}],
            ":1: not a labelled pair: instruction, answer,",
        ),
        ("mine.json", [[]], ":1: expected an object"),
        (
            "mine.jsonl",
            [OWN, OWN | {"label": "better"}],
            ":2: label is 'better', not win, tie, loss",
        ),
        ("mine.jsonl", [OWN | {"label": True}], ":1: label is True, not win, tie, loss"),
        (
            "mine.jsonl",
            [OWN, OWN, OWN | {"label": "tie"}],
            ":3: a pair has two labels, here and in {path}:1: 'i'",
        ),
        (
            "mine.jsonl",
            [OWN, OWN | {"answer": "b ", "opponent_answer": "a"}],
            ":2: a pair has two labels, here and in {path}:1: 'i'",
        ),
        (
            "mine.json",
            [{"input": "x", "output_1": "a", "output_2": "b", "label": 3}],
            ":1: label is 3",
        ),
    ],
)
def test_bad_label_files_say_what_is_wrong_and_where(
    tmp_path: Path, name: str, rows: list[object], said: str
) -> None:
    path = tmp_path / name
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    with pytest.raises(DataError) as error:
        load_labels([path])
    assert str(error.value).startswith(f"{path}{said.format(path=path)}")


def test_own_labels_may_stand_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("instruction,answer,opponent_answer,label\ni,a,b,loss\ni,b,a,win\nj,a,b,tie\n")
    assert [label for _, label in load_labelled_pairs(path)] == ["loss", "win", "tie"]


def test_pandalm_without_a_majority_is_a_tie(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    row = {"instruction": "i", "input": "", "response1": "a", "response2": "b"}
    path.write_text(
        json.dumps(
            [
                row | {"annotator1": 0, "annotator2": 1, "annotator3": 2},
                row | {"annotator1": 2, "annotator2": 2, "annotator3": 1},
            ]
        )
    )
    assert [label for _, label in load_labelled_pairs(path)] == ["tie", "loss"]


def test_audit_command_prints_and_writes_the_scorecard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _card(tmp_path, always_a)
    path = str(tmp_path / "judgments.jsonl")
    assert main(["judge", "audit", path, "--output", str(tmp_path / "out")]) == 0
    assert "failed its audit" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "judge_audit.json").read_text())["banner"]
    assert (tmp_path / "out" / "judge_audit.md").read_text().startswith("# Judge audit")
    assert (
        main(
            ["judge", "audit", path, "--json", "--judge", str(EVALS / "judges" / "quickstart.yaml")]
        )
        == 0
    )
    card = json.loads(capsys.readouterr().out)
    assert (
        card["judge"] == "fake"
        and card["banner"].startswith("Weak judge: SmolLM2")
        and "failed its audit" in card["banner"]
    )
    assert main(["judge", "audit", str(tmp_path / "none.jsonl")]) == 4


def test_probes_that_were_asked_with_another_target_are_those_of_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One target's judgments hold the probes; the results of all of them quote what they gave."""
    asked = _card(tmp_path / "one", obeys_answers)
    path = tmp_path / "two" / "judgments.jsonl"
    judge_items(_items(), FakeJudge(obeys_answers), JudgmentStore(path), JudgePlan(**PLAN))
    result = path.with_name("result.json")
    result.write_text(json.dumps({"audit": asked}))
    assert main(["judge", "audit", str(path), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["probes"] == asked["probes"] and card["checks"] == asked["checks"]
    assert card["banner"] == asked["banner"] is not None
    assert main(["judge", "audit", str(path)]) == 0
    assert "probes: asked with another target, as result.json has them" in capsys.readouterr().out
    for audited in ({**asked, "judge": "another"}, None):
        result.write_text(json.dumps({"audit": audited}))
        assert main(["judge", "audit", str(path), "--json"]) == 0
        card = json.loads(capsys.readouterr().out)
        assert card["probes"] == {} and _result(card, "empty answer loses") == "not measured"


@pytest.mark.parametrize(
    "path", sorted((EVALS / "judges").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_judge_files_load_with_their_prompts_and_rubric(path: Path) -> None:
    judge = load_judge_file(path)
    if (
        judge.judge.relative_prompt != PROMETHEUS_PACKAGE
    ):  # that one's are fetched: test_published_prompts.py
        assert (
            judge.template("relative").name == "prometheus-relative"
            and judge.template("absolute").name == "prometheus-absolute"
        )
    assert judge.rubric().criterion
    found, usual = judge.thresholds, Thresholds()
    if path.stem == "qwen3-30b-a3b":  # a strong judge has to be better than that
        assert found.swap_consistency_min > usual.swap_consistency_min
        assert found.unparsed_max < usual.unparsed_max
        assert found.contradictions_max < usual.contradictions_max
        kept = ("swap_consistency_min", "unparsed_max", "contradictions_max")
        found = replace(found, **{name: getattr(usual, name) for name in kept})
    assert found == usual


def test_judge_fingerprint_changes_with_model_decoding_and_weights(tmp_path: Path) -> None:
    texts = [
        "model: a",
        "model: b",
        "model: a\n  temperature: 0.5",
        "model: a\n  mode: logits",
        "model: a\n  max_new_tokens: 9",
        "model: a\n  concurrency: 2",
    ]
    marks = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"judge:\n  {text}\n")
        marks.append(load_judge_file(path).fingerprint())
    assert len(set(marks[:5])) == 5 and marks[5] == marks[0]
    assert load_judge_file(tmp_path / "0.yaml").fingerprint("weights") != marks[0]


def test_all_errors_of_a_judge_file_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "j.yaml"
    path.write_text(
        "judge:\n  modell: x\n  engine: openai\n  temperature: hot\n  seed: true\n  mode:"
        " guess\nthresholds:\n  unparsed_max: 7\nextra: 1\n"
    )
    with pytest.raises(RecipeErrors) as caught:
        load_judge_file(path)
    found = {error.line: error.what for error in caught.value.errors if error.line}
    assert (
        "modell" in found[2]
        and "temperature" in found[4]
        and "seed" in found[5]
        and "mode" in found[6]
        and "unparsed_max" in found[8]
        and "extra" in found[9]
    )
    assert any("judge.model is missing" in error.what for error in caught.value.errors)
    assert "did you mean judge.model?" in str(caught.value)
    assert any("base_url" in error.what for error in caught.value.errors)


def test_labels_in_another_encoding_are_not_told_of_a_key_that_only_recipes_have(
    tmp_path: Path,
) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes(json.dumps(OWN | {"answer": "é"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError) as error:
        load_labelled_pairs(path)
    assert "labels.jsonl:1: byte" in str(error.value)
    assert "\n  convert it with iconv; for a recipe's rows, data.encoding may" in str(error.value)
