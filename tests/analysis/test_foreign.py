"""Results of lm-eval and alpaca_eval are compared as they are, and damage is named."""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.printed_commands import commands
from recipes_lib.analysis.readers import complete, read_results
from recipes_lib.analysis.runs import Run, arms_of
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.core.files import write_json
from recipes_lib.evals.log import write_lines


def lm_eval(
    folder: Path,
    values: list[float],
    stamp: str = "_2026-01-01T00-00-00.0",
    task: str = "arc_easy",
    model_folder: str = "some__model",
    name: str = "results",
    prompt: str = "p",
    **content: Any,
) -> Path:
    """Write what `lm_eval run --log_samples` leaves for one task."""
    place = folder / model_folder
    rows = [
        {"doc_id": n, "doc": {"question": f"q{n}"}, "filter": "none", "doc_hash": f"hash{n}"}
        | {"prompt_hash": f"{prompt}{n}", "acc": value}
        for n, value in enumerate(values)
    ]
    write_lines(place / f"samples_{task}{stamp}.jsonl", rows)
    mean = sum(values) / len(values)
    results = {
        "results": {task: {"alias": "arc", "acc,none": mean, "acc_stderr,none": 0.1}},
        "configs": {task: {}},
        "higher_is_better": {task: {"acc": True}},
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "config": {"model_args": f"pretrained={folder.name},dtype=bfloat16"},
        "model_name": folder.name,
        "lm_eval_version": "0.4.9",
    }
    write_json(place / f"{name}{stamp}.json", results | content)
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
    runs = [run for path in paths for run in read_results(path) or ()]
    assert len(runs) >= len(paths)
    return conclude(arms_of(complete(runs)))


def read_one(path: Path) -> Run:
    (run,) = read_results(path) or ()
    return run


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
    run = read_one(folder)
    assert run.evals[0].metrics[0].value == 0.0
    assert run.unread == ("results_2026-01-01T00-00-00.0.json: older results of arc_easy",)
    samples = folder / "some__model/samples_arc_easy_2026-01-01T00-00-00.0.jsonl"
    samples.write_text("damaged, and compared with nothing")
    assert read_one(folder) == run
    for file in (folder / "some__model").glob("samples*"):
        file.unlink()
    with pytest.raises(DataError, match="no samples"):
        read_results(folder)
    (folder / "some__model/results_2026-02-01T00-00-00.0.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_results(folder)


def test_annotations_have_the_library_s_win_rate_and_are_paired(tmp_path: Path) -> None:
    preferences: list[float | None] = [2, 2, 1, 0, 1.5, None, 1.75, 2]
    first = annotations(tmp_path / "a.json", "mine", preferences * 20)
    with pytest.raises(DataError, match="twice"):
        write_json(tmp_path / "c.json", json.loads(first.read_text())[:2] * 2)
        read_results(tmp_path / "c.json")
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
        with pytest.raises(DataError, match="no results that can be read"):
            read_results(other)
    assert read_results(tmp_path) is None and read_results(tmp_path / "gone") is None
    file = annotations(tmp_path / "two.json", "mine", [2.0])
    write_json(file, [*json.loads(file.read_text()), 3])
    with pytest.raises(DataError, match="annotation 2"):
        read_results(file)
    annotations(file, "mine", [3.0])
    with pytest.raises(DataError, match=r"annotation 1: preference.* 3 is not"):
        read_results(file)


def test_the_leaderboard_s_win_rate_is_met_to_four_digits(shared_data: Path) -> None:
    folder = shared_data / "alpaca_eval/llama-2-7b-chat-hf"
    run = read_one(folder / "alpaca_eval_gpt4.annotations.json")
    assert run.name == "llama-2-7b-chat-hf"
    assert run.evals[0].metrics[0].value == pytest.approx(0.7136645962732919)


LATER = "_2026-02-01T00-00-00.0"


def test_every_command_and_every_model_of_a_folder_of_lm_eval_is_read(tmp_path: Path) -> None:
    right, wrong = [1.0] * 10, [0.0] * 10
    folder = lm_eval(tmp_path / "a", right)
    lm_eval(tmp_path / "a", wrong, LATER, task="hellaswag")
    run = read_one(folder)
    tasks = {metric.task: metric.value for metric in run.metrics}
    assert tasks == {"arc_easy": 1.0, "hellaswag": 0.0} and not run.unread
    lm_eval(tmp_path / "a", wrong, model_folder="other", model_name="other")
    names = [run.name for run in read_results(folder) or ()]
    assert sorted(names) == ["a", "other"]
    assert compared(folder).claims[0].row.arms == ("a", "other")
    step = {"config": {"model_args": "pretrained=a,revision=step2,dtype=bfloat16"}}
    lm_eval(tmp_path / "b", right, model_name="m")
    lm_eval(tmp_path / "b", wrong, LATER, model_name="m", **step)
    names = [run.name for run in read_results(tmp_path / "b") or ()]
    assert names == ["m-pretrained-b", "m-pretrained-a-revision-step2"]


def test_an_output_path_that_is_a_file_is_read_by_its_folder_and_by_itself(tmp_path: Path) -> None:
    folder = lm_eval(tmp_path / "a", [1.0] * 10, model_folder="", name="res")
    file = folder / "res_2026-01-01T00-00-00.0.json"
    for path in (folder, file):
        assert read_one(path).evals[0].n == 10


def test_folders_of_one_basename_are_two_arms(tmp_path: Path) -> None:
    before = lm_eval(tmp_path / "before/org__A", [0.0] * 100, model_folder="", model_name="A")
    after = lm_eval(tmp_path / "after/org__A", [1.0] * 100, model_folder="", model_name="A")
    conclusion = compared(before, after)
    arms = {score.arm for score in conclusion.table.scores}
    assert arms == {"A-before-org__A", "A-after-org__A"}
    assert conclusion.claims[0].verdict != "no verdict"  # and not "are one run"
    with pytest.raises(RecipeError, match="compared with itself"):
        compared(before, before)
    lm_eval(tmp_path / "after/org__A", [1.0] * 100, LATER, model_folder="", model_name="A")
    files = sorted(after.glob("results*.json"))  # two commands of one model
    arms = {score.arm for score in compared(*files).table.scores}
    assert arms == {f"A-{file.name}" for file in files}


def test_a_task_that_only_one_model_has_says_nothing_about_the_others(tmp_path: Path) -> None:
    values = [1.0] * 200 + [0.0] * 100
    model_a = {"model_args": "pretrained=a,dtype=bfloat16"}
    first = lm_eval(tmp_path / "a", values)
    lm_eval(first, values, LATER, task="hellaswag", config={"limit": 300} | model_a)
    second = lm_eval(tmp_path / "b", values[::-1])
    codes = {finding.code for finding in compared(first, second).findings}
    assert not codes & {"evaluated-differently", "protocol-differs"}


def test_how_lm_eval_asked_is_compared_as_far_as_it_is_recorded(tmp_path: Path) -> None:
    values = [1.0] * 200 + [0.0] * 100
    first = lm_eval(tmp_path / "a", values)
    others = {
        "system instruction": {"system_instruction_sha": "abc"},
        "backend": {"config": {"model": "vllm", "model_args": "pretrained=b,dtype=bfloat16"}},
        "tokenizer": {"config": {"model_args": "pretrained=b,dtype=bfloat16,tokenizer=other"}},
        "few-shot seed": {"config": {"fewshot_seed": 7, "model_args": "dtype=bfloat16"}},
        "lm_eval": {"lm_eval_version": None},
        "prompts": {"prompt": "other"},
    }
    base = {"model": "hf", "fewshot_seed": 1234, "model_args": "pretrained=a,dtype=bfloat16"}
    first = lm_eval(tmp_path / "a", values, config=base)
    for name, content in others.items():
        config = base | content.get("config", {})
        second = lm_eval(tmp_path / name, values, **(content | {"config": config}))
        titles = [finding.title for finding in compared(first, second).findings]
        assert any(f"different {name} in lm_eval" in title for title in titles), (name, titles)


def test_questions_chosen_by_hand_have_no_verdict(tmp_path: Path) -> None:
    counts = {"n-samples": {"arc_easy": {"original": 300, "effective": 30}}}
    first = lm_eval(tmp_path / "a", [1.0] * 30, **counts)
    second = lm_eval(tmp_path / "b", [0.0] * 30, **counts)
    conclusion = compared(first, second)
    assert conclusion.claims[0].verdict == "no verdict"
    assert conclusion.findings[0].code == "chosen-questions"
    assert "30 of 300 questions of arc_easy" in conclusion.findings[0].evidence[0]
    whole = lm_eval(tmp_path / "c", [1.0] * 300)  # its other prompts are to other questions
    codes = {finding.code for finding in compared(first, whole).findings}
    assert "chosen-questions" in codes and "evaluated-differently" not in codes


def test_annotations_that_are_gone_count_both_ways_and_a_judge_has_a_name(tmp_path: Path) -> None:
    wins: list[float | None] = [2.0] * 100 + [1.0] * 100
    first = annotations(tmp_path / "a.json", "mine", wins)
    second = annotations(tmp_path / "b.json", "theirs", wins)
    rows = json.loads(first.read_text())
    write_json(first, [row for row in rows if row["preference"] == 2.0])  # the losses are gone
    conclusion = compared(first, second)
    assert conclusion.claims[0].row.test.unresolved == 100
    assert conclusion.claims[0].verdict not in ("higher", "lower")
    assert any(finding.code == "not-read" for finding in conclusion.findings)
    for row in rows:
        del row["annotator"]
    write_json(first, rows)
    with pytest.raises(DataError, match="names no annotator"):
        read_results(first)


def test_a_command_without_samples_is_named_beside_one_that_has_them(tmp_path: Path) -> None:
    folder = lm_eval(tmp_path / "a", [1.0] * 10)
    lm_eval(folder, [1.0] * 10, LATER, task="hellaswag")
    (folder / f"some__model/samples_hellaswag{LATER}.jsonl").unlink()
    run = read_one(folder)
    assert [metric.task for metric in run.metrics] == ["arc_easy"]
    (line,) = run.unread
    assert line.startswith(f"results{LATER}.json: no samples beside it")


def test_two_judgments_of_one_model_in_a_folder_are_not_compared_with_each_other(tmp_path) -> None:
    for judge in ("a", "b"):
        annotations(tmp_path / f"{judge}.annotations.json", "mine", [2.0] * 9)
    with pytest.raises(DataError, match=r"a\.annotations\.json, b\.annotations\.json"):
        read_results(tmp_path)
    files = [tmp_path / f"{judge}.annotations.json" for judge in ("a", "b")]
    arms = arms_of([read_one(file) for file in files])  # named, as the error advises
    assert [arm.name for arm in arms] == ["mine-a.annotations.json", "mine-b.annotations.json"]


def test_the_command_of_a_report_names_what_was_read(tmp_path: Path, monkeypatch) -> None:
    """Two files of one folder, and a folder of two models, are not the folder of their files."""
    monkeypatch.chdir(tmp_path)
    first = annotations(Path("annotations of r8.json"), "r8", [1.0, 2.0] * 30)
    second = annotations(Path("r32.json"), "r32", [2.0, 1.0] * 30)
    several = lm_eval(Path("out"), [1.0, 0.0] * 20, model_folder="one")
    lm_eval(Path("out"), [0.0, 1.0] * 20, model_folder="two", config={"model_args": "b"})
    for paths in ([first, second], [several]):
        runs = [run for path in paths for run in read_results(path) or ()]
        assert len(runs) == 2
        ((_, (line,)),) = commands(arms_of(runs), None, {})
        assert shlex.split(line) == ["recipes", "compare", *map(str, paths)]


def test_a_format_may_say_which_questions_of_another_file_a_run_lacks(monkeypatch) -> None:
    from recipes_lib.analysis import readers

    def complete_toy(runs: list[Run]) -> list[Run]:
        return [replace(run, unread=("q7 is missing",)) for run in runs]

    toy = SimpleNamespace(FORM="toy", matches=None, read=None, complete=complete_toy)
    monkeypatch.setattr(readers, "READERS", (*readers.READERS, toy))
    (run,) = complete([Run("toy", Path(), foreign=True)])
    assert run.unread == ("q7 is missing",)


def test_a_format_is_a_module_with_three_names(tmp_path: Path, monkeypatch) -> None:
    from recipes_lib.analysis import readers

    toy = SimpleNamespace(
        FORM="toy: a file that ends in .toy",
        matches=lambda path: path.suffix == ".toy",
        read=lambda path: [Run("toy", path.parent, foreign=True)],
    )
    monkeypatch.setattr(readers, "READERS", (*readers.READERS, toy))
    file = tmp_path / "x.toy"
    file.write_text("1")
    assert read_one(file).name == "toy"
    other = tmp_path / "x.txt"
    other.write_text("1")
    with pytest.raises(DataError, match="toy: a file that ends in"):
        read_results(other)
