"""Results of lm-eval and alpaca_eval are compared as they are, and damage is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.runs import Run, arms_of, read_foreign
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import write_json
from recipes_lib.evals.log import write_lines


def lm_eval(
    folder: Path, values: list[float], stamp: str = "_2026-01-01T00-00-00.0", **content: Any
) -> Path:
    """Write what `lm_eval run --log_samples` leaves for one task."""
    place = folder / "some__model"
    rows = [
        {"doc_id": n, "doc": {"question": f"q{n}"}, "filter": "none", "doc_hash": f"hash{n}"}
        | {"prompt_hash": f"p{n}", "acc": value}
        for n, value in enumerate(values)
    ]
    write_lines(place / f"samples_arc_easy{stamp}.jsonl", rows)
    mean = sum(values) / len(values)
    results = {
        "results": {"arc_easy": {"alias": "arc", "acc,none": mean, "acc_stderr,none": 0.1}},
        "configs": {"arc_easy": {}},
        "higher_is_better": {"arc_easy": {"acc": True}},
        "versions": {"arc_easy": 1.0},
        "n-shot": {"arc_easy": 0},
        "config": {"model_args": f"pretrained={folder.name},dtype=bfloat16"},
        "model_name": folder.name,
        "lm_eval_version": "0.4.9",
    }
    write_json(place / f"results{stamp}.json", results | content)
    return folder


def annotations(file: Path, model: str, preferences: list[float | None]) -> Path:
    """Write annotations of alpaca_eval."""
    rows = [
        {"instruction": f"Do {n}", "output_1": f"reference {n}", "generator_1": "davinci"}
        | {"output_2": f"{model} {n}", "generator_2": model, "annotator": "gpt4"}
        | {"preference": preference}
        for n, preference in enumerate(preferences)
    ]
    write_json(file, rows)
    return file


def compared(*paths: Path) -> Any:
    runs = [read_foreign(path) for path in paths]
    assert all(runs)
    return conclude(arms_of([run for run in runs if run]))


def test_two_folders_of_lm_eval_are_compared_in_pairs(tmp_path: Path) -> None:
    rng = random.Random(0)
    first = [float(rng.random() < 0.5) for _ in range(300)]
    second = [value if rng.random() < 0.7 else 1.0 for value in first]
    conclusion = compared(lm_eval(tmp_path / "a", first), lm_eval(tmp_path / "b", second))
    (claim,) = conclusion.claims
    assert claim.verdict == "higher" and claim.row.first == "b" and claim.row.n == 300
    assert claim.sentence.startswith("b scored better than a in ")
    assert claim.sentence.endswith("about these two models; another seed may differ.")
    assert claim.row.metric == "lm_eval/arc_easy/acc" and claim.row.unit == "share"
    runs = [Run("llama", tmp_path / name) for name in ("a", "b")]  # told apart by their folders
    assert list(arms_of(runs).by_name) == ["llama-a", "llama-b"]


def test_other_few_shots_stop_the_verdict_and_other_arguments_are_named(tmp_path: Path) -> None:
    values = [1.0] * 200 + [0.0] * 100
    first = lm_eval(tmp_path / "a", values)
    shots = lm_eval(tmp_path / "b", values[::-1], **{"n-shot": {"arc_easy": 5}})
    conclusion = compared(first, shots)
    assert conclusion.claims[0].verdict == "no verdict"
    assert any("few-shot" in line for line in conclusion.findings[0].evidence)
    half = lm_eval(tmp_path / "c", values, config={"model_args": "pretrained=c"})
    assert any("model arguments" in each.title for each in compared(first, half).findings)
    sampled = lm_eval(tmp_path / "d", values, config={"gen_kwargs": {"temperature": 1}})
    assert "gen_kwargs" in compared(first, sampled).claims[0].sentence


def test_the_newest_results_are_read_and_damage_is_named(tmp_path: Path) -> None:
    folder = lm_eval(tmp_path / "a", [1.0] * 10)
    lm_eval(tmp_path / "a", [0.0] * 10, stamp="_2026-02-01T00-00-00.0")
    run = read_foreign(folder)
    assert run is not None and run.evals[0].metrics[0].value == 0.0
    for file in (folder / "some__model").glob("samples*"):
        file.unlink()
    with pytest.raises(DataError, match="no samples"):
        read_foreign(folder)
    (folder / "some__model/results_2026-02-01T00-00-00.0.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_foreign(folder)


def test_annotations_have_the_library_s_win_rate_and_are_paired(tmp_path: Path) -> None:
    preferences: list[float | None] = [2, 2, 1, 0, 1.5, None, 1.75, 2]
    first = annotations(tmp_path / "a.json", "mine", preferences * 20)
    with pytest.raises(DataError, match="twice"):
        write_json(tmp_path / "c.json", json.loads(first.read_text())[:2] * 2)
        read_foreign(tmp_path / "c.json")
    second = annotations(tmp_path / "b.json", "theirs", [1.0] * 160)
    conclusion = compared(first, second)
    (claim,) = conclusion.claims
    rate = (1 + 1 + 0 + 0.5 + 0.5 + 0.75 + 1) / 7
    score = next(each for each in conclusion.table.scores if each.arm == "mine")
    assert score.value == pytest.approx(rate) and score.unresolved == 20
    assert claim.row.opponent == "davinci" and claim.row.test.unresolved == 20


def test_a_folder_named_like_the_judge_beside_annotations_is_not_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt4").mkdir()
    files = [annotations(Path(f"{name}.json"), name, [2.0] * 9) for name in ("mine", "theirs")]
    assert "self-judged" not in {finding.code for finding in compared(*files).findings}


def test_what_is_no_result_of_theirs_is_refused_in_a_line(tmp_path: Path) -> None:
    other = tmp_path / "x.json"
    for content in ({"a": 1}, [], [{"instruction": "x"}]):
        write_json(other, content)
        with pytest.raises(DataError, match="neither"):
            read_foreign(other)
    assert read_foreign(tmp_path) is None and read_foreign(tmp_path / "gone") is None
    file = annotations(tmp_path / "two.json", "mine", [2.0])
    write_json(file, [*json.loads(file.read_text()), 3])
    with pytest.raises(DataError, match="annotation 2"):
        read_foreign(file)
    annotations(file, "mine", [3.0])
    with pytest.raises(DataError, match=r"annotation 1: preference.* 3 is not"):
        read_foreign(file)


def test_the_leaderboard_s_win_rate_is_met_to_four_digits(shared_data: Path) -> None:
    folder = shared_data / "alpaca_eval/llama-2-7b-chat-hf"
    run = read_foreign(folder / "alpaca_eval_gpt4.annotations.json")
    assert run is not None and run.name == "llama-2-7b-chat-hf"
    assert run.evals[0].metrics[0].value == pytest.approx(0.7136645962732919)
