"""A judge is asked about pairs that people labelled: both orders, probes, kept, resumed, and its
failure known elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tests.generation.conftest import (
    judge_file,  # noqa: F401
    long_tiny_model_dir,  # noqa: F401
    make_run,  # noqa: F401
    runs_folder,  # noqa: F401
)  # noqa: F401, RUF100

from recipes_lib.cli import main
from recipes_lib.core.errors import DataError
from recipes_lib.suites.judge_audit import audit_on_labels

PROJECT = Path(__file__).resolve().parents[2]
SCHEMA = Draft202012Validator(json.loads((PROJECT / "schema/judge_audit.schema.json").read_text()))


@pytest.fixture
def labels(tmp_path):
    """A PandaLM file with six pairs, and an LLMBar file with four."""
    pandalm = [
        {
            "instruction": f"Name fruit {n}",
            "input": "",
            "response1": f"An apple, {n}.",
            "response2": f"A stone, number {n}.",
            "annotator1": 1,
            "annotator2": n % 3,
            "annotator3": 1,
        }
        for n in range(6)
    ]
    llmbar = [
        {
            "input": f"Add {n} and 1",
            "output_1": str(n + 1),
            "output_2": str(n + 3),
            "label": 1 + n % 2,
        }
        for n in range(4)
    ]
    files = {"pandalm.json": pandalm, "llmbar/dataset.json": llmbar}
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(rows))
    return [str(tmp_path / name) for name in files]


def test_labelled_pairs_are_judged_in_both_orders_once_and_every_threshold_is_measured(
    judge_file,  # noqa: F811
    runs_folder,  # noqa: F811
    labels,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    file = judge_file()
    card = audit_on_labels(file, labels, limit=5, probe_pairs=2)
    SCHEMA.validate(card)
    assert card["labels"]["files"] == [
        "pandalm.json",
        "llmbar/dataset.json",
    ], "LLMBar's files are all called dataset.json"
    assert (card["labels"]["pairs"], card["labels"]["of"], card["judgments"]) == (5, 10, 10)
    assert (
        card["human"]["n"] == 5
        and card["human"]["kappa"]["n"] == card["human"]["outcome_accuracy"]["n"] == 5
    )
    assert set(card["probes"]) == {
        "empty",
        "identical",
        "swapped",
        "truncated",
        "injected",
        "repeated",
    }
    measured = {check["check"]: check["result"] for check in card["checks"]}
    assert [name for name, result in measured.items() if result == "not measured"] == [
        "verdicts against the judge's own words"
    ]
    folder = runs_folder / "judge--judge" / "pandalm+llmbar"
    assert str(folder) == card["folder"]
    stored = (folder / "judgments.jsonl").read_text().splitlines()
    assert len(stored) == 10 + 24
    more = audit_on_labels(file, labels, probe_pairs=2)
    again = (folder / "judgments.jsonl").read_text().splitlines()
    assert again[: len(stored)] == stored and more["labels"]["subset"] is None
    assert len({json.loads(line)["key"] for line in again}) == len(again)
    assert "| human labels, kappa |" in (folder / "judge_audit.md").read_text()


def test_an_audit_that_failed_stands_above_the_results_of_the_same_judge(
    judge_file,  # noqa: F811
    make_run,  # noqa: F811
    labels,
    tmp_path,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    from tests.results import results_of

    from recipes_lib.eval_recipe import load_eval

    file = judge_file()
    card = audit_on_labels(file, labels[:1], probe_pairs=1)
    assert card["banner"], "the tiny judge must fail for this test"
    make_run("one", 1)
    (tmp_path / "mt.yaml").write_text(
        "suite: {name: mt_bench}\ndata: {questions:"
        f" {PROJECT}/evals/quickstart/mt_bench/question.jsonl, max_questions: 1}}\ngeneration:"
        " {max_new_tokens: 4}\njudge: {file: judge.yaml}\n"
    )
    (result,) = results_of([load_eval(tmp_path / "mt.yaml")], ["one"])
    assert any("failed its audit on labelled pairs (pandalm)" in line for line in result["banners"])


def test_the_command_prints_the_scorecard_and_says_how_many_pairs_it_saw(
    judge_file,  # noqa: F811
    runs_folder,  # noqa: F811
    labels,
    tmp_path,
    capsys,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    judge_file()
    words = [
        "judge",
        "audit",
        "--judge",
        str(tmp_path / "judge.yaml"),
        "--labels",
        labels[0],
        "--limit",
        "2",
        "--probe-pairs",
        "0",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "2 of the 6 different labelled pairs in pandalm.json" in printed
        and "| truncated answer loses | not measured |" in printed
    )
    assert printed.strip().splitlines()[-1].endswith("--limit 4")
    assert main([*words, "--json", "--output", str(tmp_path / "out"), "--both-modes", "1"]) == 0
    card = json.loads(capsys.readouterr().out)
    SCHEMA.validate(card)
    assert (card["modes"]["other"], card["modes"]["asked"]) == ("generate", 2)
    assert all(
        (tmp_path / "out" / name).is_file()
        for name in ("judgments.jsonl", "judgments.generate.jsonl")
    )
    assert (
        "| same verdict in the other verdict mode | n/a"
        in (tmp_path / "out/judge_audit.md").read_text()
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to audit"),
        (["--labels", "x.json"], "nothing to audit"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--judge", "nowhere.yaml", "--labels", "x.json"], "nowhere.yaml"),
    ],
)
def test_incomplete_words_are_answered_with_the_whole_command(words, said, capsys):
    assert main(["judge", "audit", *words]) == 2
    assert said in capsys.readouterr().err


def test_one_pair_with_two_labels_is_refused(judge_file, runs_folder, labels, tmp_path):  # noqa: F811
    rows = json.loads(Path(labels[1]).read_text())
    Path(labels[1]).write_text(json.dumps([*rows, rows[0] | {"label": 3 - rows[0]["label"]}]))
    with pytest.raises(DataError, match="two labels"):
        audit_on_labels(judge_file(), labels[1:])


@pytest.mark.parametrize("option", ["--limit", "--both-modes"])
def test_options_for_asking_are_refused_beside_stored_judgments(option, tmp_path, capsys):
    (tmp_path / "judgments.jsonl").touch()
    assert main(["judge", "audit", str(tmp_path / "judgments.jsonl"), option, "3"]) == 2
    assert f"{option} is for asking a judge" in capsys.readouterr().err


def test_one_pair_with_two_labels_is_refused_beside_stored_judgments_too(labels, tmp_path, capsys):
    rows = json.loads(Path(labels[1]).read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps([rows[0] | {"label": 3 - rows[0]["label"]}]))
    (tmp_path / "judgments.jsonl").touch()
    assert (
        main(
            ["judge", "audit", str(tmp_path / "judgments.jsonl"), "--labels", labels[1], str(other)]
        )
        == 4
    )
    assert "two labels" in capsys.readouterr().err
