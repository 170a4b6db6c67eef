"""The disk contract: what is written is read, what was changed by hand is found, and what was
appended survives kills, torn ends and full disks.
"""

import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.files import valid_texts
from recipes_lib.evals.audit import audit
from recipes_lib.evals.log import (
    AnswerFacts,
    Check,
    EvalLog,
    JudgeFacts,
    JudgmentRow,
    Metric,
    Sample,
    Scorecard,
    Store,
    is_current,
    items_file,
    log_file,
    read_eval_log,
    read_eval_logs,
    text_hash,
    write_log,
)
from recipes_lib.evals.recipe import Thresholds


def log_of(run: Path, answer: str = "x") -> EvalLog:
    usual = {"verdicts": ("A", "B"), "input": "Wie spät?", "opponent": "y"}
    usual |= {"answer": answer, "raws": ("[RESULT] A", None)}
    samples = [Sample("q0", value=1.0, outcome="win", **usual)]
    samples += [Sample(f"q{n}", value=0.0, outcome="loss", **usual) for n in range(1, 4)]
    samples += [Sample("q9", verdicts=("A", "unparsed"))]
    place = {"eval": "support", "suite": "alpaca_eval", "file": log_file(run, "support", "base--x")}
    known = {"opponent": "base--x", "value": 0.25, "n": 4} | place
    return EvalLog(
        target=run.name,
        against="base--x",
        key="k" * 64,
        metrics=(Metric("win_rate", "win rate on support", tuple(samples), **known),),
        answers=AnswerFacts(name=run.name, models=("m",)),
        judge=JudgeFacts(name="prometheus", fingerprint="f", model="m"),
        audit=Scorecard(judge="f", checks=(Check(check="swap consistency", value=0.5, n=3),)),
        **place,
    )


def test_a_log_is_read_as_it_was_written(tmp_path):
    log = log_of(tmp_path / "run")
    write_log(log)
    assert read_eval_log(log.file) == log
    assert read_eval_logs(tmp_path / "run") == ((log,), ())
    write_log(log_of(tmp_path / "run", answer="half an emoji \ud83d"))
    assert read_eval_log(log.file).metrics[0].samples[0].answer == "half an emoji \ufffd"


def test_a_result_is_current_for_its_own_answers_opponent_and_judge_alone(tmp_path):
    answers = AnswerFacts(name="run", fingerprint="a")
    opponent = AnswerFacts(name="base--x", fingerprint="o")
    log = replace(log_of(tmp_path / "run"), settings="s", answers=answers, opponent=opponent)
    write_log(log)
    assert is_current(log.file, "s", "a", "o", "f")
    assert is_current(log.file, "s", None, None, None)
    for key, *fingerprints in (
        ("another", "a", "o", "f"),
        ("s", "another", "o", "f"),
        ("s", "a", "another", "f"),
        ("s", "a", "o", "another"),
    ):
        assert not is_current(log.file, key, *fingerprints), (key, fingerprints)


def test_changed_files_are_found(tmp_path):
    log = log_of(tmp_path / "run")
    changes = {
        "a line less": lambda text: "".join(text.splitlines(keepends=True)[1:]),
        "another value": lambda text: text.replace('"value": 1.0', '"value": 0.75'),
        "a line twice": lambda text: text + text.splitlines(keepends=True)[0],
        "an outcome that is none": lambda text: text.replace('"win"', '"wim"'),
        "an outcome of another value": lambda text: text.replace('"win"', '"tie"'),
        "no number": lambda text: text.replace('"value": 1.0', '"value": "one"'),
    }
    for what, change in changes.items():
        write_log(log)
        items = items_file(log.file)
        items.write_text(change(items.read_text("utf-8")), "utf-8")
        with pytest.raises(DataError):
            read_eval_log(log.file)
            pytest.fail(what)
    write_log(log)
    result = json.loads(log.file.read_text("utf-8"))
    log.file.write_text(json.dumps({**result, "metrics": 3}), "utf-8")
    with pytest.raises(DataError, match="metrics"):
        read_eval_log(log.file)
    log.file.write_text(json.dumps({**result, "format_version": 1}), "utf-8")
    with pytest.raises(DataError, match="another version"):
        read_eval_logs(tmp_path / "run")


def test_items_that_are_gone_are_named_in_one_line(tmp_path):
    log = log_of(tmp_path / "run")
    write_log(log)
    items_file(log.file).unlink()
    with pytest.raises(DataError, match="is missing, though result"):
        read_eval_log(log.file)


def test_a_key_in_a_result_is_never_a_path(tmp_path):
    log = log_of(tmp_path / "run")
    for number, key in enumerate([str(tmp_path / "x"), "../../../y", "k" * 64]):
        write_log(log)
        stored = json.loads(log.file.read_text("utf-8"))
        log.file.write_text(json.dumps({**stored, "key": key}), "utf-8")
        write_log(log)
        kept = list((log.file.parent / "earlier").glob("*/result*.json"))
        assert len(kept) == number + (key != "k" * 64)
        log.file.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def judgment(**changes) -> dict:
    row = {"key": "1", "question_id": "q", "question": "q", "order": "AB", "probe": ""}
    row |= {"judge": "j", "source": "judge", "cut": False, "status": "ok", "value": "A"}
    return row | {"reason": None, "raw": "[RESULT] A"} | changes


IMPOSSIBLE = [
    {"value": "C"},
    {"value": "D"},
    {"value": 11, "order": "single"},
    {"value": 0, "order": "single"},
    {"value": 3},
    {"value": None},
    {"status": "fine"},
    {"status": "empty"},
    {"order": "AC"},
    {"source": "nobody"},
    {"cut": "no"},
    {"question_id": None},
    {"question": None},
]


def test_a_judgment_that_cannot_be_is_named_by_its_line(tmp_path):
    path = tmp_path / "judgments.jsonl"
    damaged = [judgment(**changes) for changes in IMPOSSIBLE]
    for name in judgment():
        damaged.append({key: value for key, value in judgment().items() if key != name})
    for row in damaged[:-2]:  # the last two names may be absent
        lines = [json.dumps(judgment(key="0")), json.dumps(row)]
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(DataError, match="damaged") as caught:
            Store(path, JudgmentRow)
            pytest.fail(str(row))
        assert caught.value.line == 2 and "delete this line" in str(caught.value)
    path.write_text(json.dumps(judgment(order="single", value=5)) + "\n")
    assert len(Store(path, JudgmentRow)) == 1  # of an earlier version: no checksum


def test_a_letter_that_was_changed_in_a_store_is_noticed(tmp_path):
    path = tmp_path / "judgments.jsonl"
    Store(path, JudgmentRow).append([judgment(), judgment(key="2", raw="half \ud83d")])
    assert Store(path, JudgmentRow)["1"] == judgment()
    text = path.read_text("utf-8", "surrogatepass")
    for old, new in (('"value": "A"', '"value": "B"'), ("[RESULT] A", "[RESULT] B")):
        path.write_text(text.replace(old, new, 1), "utf-8", "surrogatepass")
        with pytest.raises(DataError, match="changed after it was written") as caught:
            Store(path, JudgmentRow)
        assert caught.value.line == 1


def test_an_opponent_is_no_evaluation_that_was_begun(tmp_path):
    for run, file in (("opponent", "generations"), ("begun", "judgments.against-opponent")):
        Store(tmp_path / run / f"evals/support/{file}.jsonl").append([row(1)])
    assert read_eval_logs(tmp_path / "opponent") == ((), ())
    assert read_eval_logs(tmp_path / "begun") == ((), ("support",))


def row(index: int, raw: str = "Fine.") -> dict:
    return {"key": text_hash(str(index)), "question_id": index, "raw": raw}


def test_a_row_is_stored_once_and_read_back(tmp_path):
    store = Store(tmp_path / "deep" / "judgments.jsonl")
    assert len(store) == 0 and not store.path.exists()
    texts = ["line\u2028separator", "\ud800 surrogate", "\x1b[31m", "🙂" * 1000, "a\nb\r\n"]
    rows = [row(n, text) for n, text in enumerate(texts)]
    store.append([*rows, rows[0]])
    store.append(rows[:1])
    read = Store(store.path)
    assert [stored["raw"] for stored in read.values()] == [valid_texts(text) for text in texts]
    assert rows[1]["key"] in read and read.get("nothing") is None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_a_file_cut_anywhere_keeps_every_whole_line(tmp_path_factory, cut, texts):
    path = tmp_path_factory.mktemp("store") / "j.jsonl"
    rows = [row(index, text) for index, text in enumerate(texts)]
    Store(path).append(rows)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    reopened = Store(path)
    assert len(reopened) == data[:cut].count(b"\n")
    assert path.read_bytes() == data[:cut]  # reading changes nothing
    reopened.append(rows)
    assert path.read_bytes() == data


def test_a_damaged_or_repeated_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "j.jsonl"
    Store(path).append([row(index) for index in range(4)])
    lines = path.read_bytes().splitlines(keepends=True)
    for number, wrong in ((1, b"nonsense\n"), (2, b'{"raw": "no key"}\n'), (3, lines[0])):
        path.write_bytes(b"".join([*lines[: number - 1], wrong, *lines[number:]]))
        with pytest.raises(DataError) as caught:
            Store(path)
        assert (caught.value.line, caught.value.file) == (number, path)


def test_a_disk_that_fills_leaves_nothing_half_written(tmp_path):
    store = Store(tmp_path / "j.jsonl")
    store.append([row(1)])
    before = store.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for left in (0, 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + left, hard))
        try:
            with pytest.raises(EnvironmentFault, match=r"j\.jsonl: rows could not be stored"):
                store.append([row(2), row(3)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.path.read_bytes() == before and len(store) == 1
    store.append([row(2), row(3)])
    assert len(Store(store.path)) == 3


@pytest.mark.slow
def test_a_hundred_thousand_judgments_are_audited_within_six_seconds(tmp_path):
    path = tmp_path / "j.jsonl"
    usual = {"status": "ok", "source": "judge", "judge": "j", "cut": False}
    usual |= {"probe": "", "raw": "because " * 60 + "[RESULT] A"}
    with path.open("w") as file:
        for index in range(100_000):
            judged = {
                "key": str(index),
                "value": "AB"[index % 3 % 2],
                "order": "ABA"[index % 2 :][:2],
            }
            judged |= dict.fromkeys(("question_id", "question"), str(index // 2))
            file.write(json.dumps(judged | usual) + "\n")
    start = time.process_time()
    card = audit(list(Store(path).values()), Thresholds(), {}, [])
    assert time.process_time() - start < 6
    assert card.judgments == 100_000
