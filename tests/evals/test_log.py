"""The disk contract: what is written is read, and what was changed by hand is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes_lib.core.errors import DataError
from recipes_lib.core.files import DamagedFile
from recipes_lib.evals.log import (
    AnswerFacts,
    AnswerFaults,
    Check,
    EvalLog,
    JudgeFacts,
    Metric,
    Sample,
    Scorecard,
    items_file,
    log_file,
    read_eval_log,
    read_eval_logs,
    write_log,
)


def log_of(
    run: Path, key: str = "k" * 64, values: tuple[float, ...] = (1.0, 0.0, 0.5), answer: str = "x"
) -> EvalLog:
    names = {1.0: "win", 0.0: "loss", 0.5: "tie"}
    samples = tuple(
        Sample(
            f"q{number}",
            value=value,
            outcome=names[value],
            verdicts=("A", "B"),
            lengths=(3, 4),
            input="Wie spät?",
            answer=answer,
            opponent="y",
            raws=("[RESULT] A", None),
        )
        for number, value in enumerate(values)
    )
    open_one = Sample("q9", verdicts=("A", "unparsed"))
    metric = Metric(
        "win_rate",
        "win rate on support",
        (*samples, open_one),
        opponent="base--x",
        value=sum(values) / len(values),
        n=len(values),
        eval="support",
        suite="alpaca_eval",
        file=log_file(run, "support", "base--x"),
    )
    return EvalLog(
        suite="alpaca_eval",
        eval="support",
        target=run.name,
        against="base--x",
        key=key,
        n=4,
        metrics=(metric,),
        answers=AnswerFacts(name=run.name, faults=AnswerFaults(n=4, cut=1)),
        judge=JudgeFacts(name="prometheus", fingerprint="f", model="m"),
        audit=Scorecard(judge="f", checks=(Check(check="swap consistency", value=0.5, n=3),)),
        file=log_file(run, "support", "base--x"),
    )


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    log = log_of(tmp_path / "run")
    write_log(log)
    assert read_eval_log(log.file) == log
    assert read_eval_logs(tmp_path / "run") == ((log,), ())


def test_text_that_is_not_unicode_is_readable_afterwards(tmp_path: Path) -> None:
    log = log_of(tmp_path / "run", answer="half an emoji \ud83d")
    write_log(log)
    assert read_eval_log(log.file).metrics[0].samples[0].answer == "half an emoji \ufffd"


def test_a_result_of_other_settings_is_kept_beside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_log(log_of(run, "a" * 64))
    write_log(log_of(run, "b" * 64, (0.0, 0.0)))
    file = log_file(run, "support", "base--x")
    assert read_eval_log(file).metrics[0].value == 0.0
    (earlier,) = file.parent.glob("earlier/*/result*.json")
    assert read_eval_log(earlier).metrics[0].value == 0.5
    assert len(read_eval_logs(run)[0]) == 1


def test_changed_files_are_found(tmp_path: Path) -> None:
    log = log_of(tmp_path / "run")
    changes = {
        "a line less": lambda text: "".join(text.splitlines(keepends=True)[1:]),
        "another value": lambda text: text.replace('"value": 0.5', '"value": 0.75'),
        "a line twice": lambda text: text + text.splitlines(keepends=True)[0],
        "no number": lambda text: text.replace('"value": 0.5', '"value": "half"'),
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
    with pytest.raises(DamagedFile, match="metrics"):
        read_eval_log(log.file)
    log.file.write_text(json.dumps({**result, "format_version": 1}), "utf-8")
    found: list[DamagedFile] = []
    assert read_eval_logs(tmp_path / "run", found.append) == ((), ("support",))
    assert len(found) == 1
