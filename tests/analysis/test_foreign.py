"""Results of lm-eval and alpaca_eval are compared as they are, and damage is named."""

import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.analysis.made_up import change_lines, compared, read_one

from recipes_lib.analysis.printed_commands import commands
from recipes_lib.analysis.readers import read_results
from recipes_lib.analysis.runs import Run, arms_of
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.core.files import write_json
from recipes_lib.evals.log import items_file, write_lines


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
    half = lm_eval(tmp_path / "c", values[::-1], config={"model_args": "pretrained=c"})
    assert "different model arguments" in compared(first, half).claims[0].sentence
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
    assert read_one(folder / "res.json").evals == read_one(folder).evals
    assert read_results(folder / "gone.json") is None


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


def test_another_question_stops_the_verdict_and_another_computation_is_said(tmp_path) -> None:
    values = [1.0] * 200 + [0.0] * 100
    base: dict[str, Any] = {"system_instruction_sha": None, "chat_template_sha": None}
    base |= {"transformers_version": "5.0.0", "n-shot": {"arc_easy": 5}}
    config = {"model": "hf", "fewshot_seed": 1234, "model_args": "pretrained=a,dtype=bfloat16"}
    first = lm_eval(tmp_path / "a", values, config=config, **base)
    asked = {
        "system instruction": {"system_instruction_sha": "abc"},
        "chat template": {"chat_template_sha": "abc"},
        "few-shot seed": {"config": {"fewshot_seed": 7}},
        "prompts": {},
    }
    computed = {
        "backend": {"config": {"model": "vllm"}},
        "tokenizer": {"config": {"model_args": "pretrained=b,dtype=bfloat16,tokenizer=other"}},
        "model arguments": {"config": {"model_args": "pretrained=b,dtype=bfloat16,max_length=9"}},
        "precision of the answers": {"config": {"model_args": "pretrained=b,dtype=float16"}},
        "lm_eval": {"lm_eval_version": None},
    }

    def other(name: str, content: dict[str, Any], **more: Any) -> Any:
        content = base | content | {"config": config | content.get("config", {})} | more
        return compared(first, lm_eval(tmp_path / name, values[::-1], **content)).claims[0]

    for name, content in asked.items():
        claim = other(name, content, prompt="other")
        assert claim.verdict == "no verdict" and name in claim.sentence, claim.sentence
        if name != "prompts":  # which the equal prompts show to have had no effect
            claim = other(f"{name} in vain", content)
            assert "differently" not in claim.sentence and claim.row.is_tested
    for name, content in computed.items():
        claim = other(name, content)
        assert claim.row.is_tested and f"different {name}" in claim.sentence.replace(
            "different model arguments and ", "different "
        ), claim.sentence


def test_only_the_rows_of_a_task_that_was_asked_differently_are_stopped(tmp_path: Path) -> None:
    values = [1.0] * 200 + [0.0] * 100
    for name in ("a", "b"):
        folder = lm_eval(tmp_path / name, values)
        lm_eval(folder, values, LATER, task="hellaswag", prompt=name)
    claims = compared(tmp_path / "a", tmp_path / "b").claims
    stopped = {claim.row.metric: bool(claim.stopped_by) for claim in claims}
    assert stopped == {"lm_eval/hellaswag/acc": True, "lm_eval/arc_easy/acc": False}


def test_prompts_without_a_hash_on_one_side_are_compared_by_their_texts(tmp_path: Path) -> None:
    values = [1.0] * 200 + [0.0] * 100
    texts = {"a": "Which", "b": "What", "c": "Which"}
    for name, begins in texts.items():
        folder = lm_eval(tmp_path / name, values)
        (samples,) = folder.glob("*/samples*")
        asked = {"gen_args_0": {"arg_0": f"{begins} of the two is larger?"}}
        changed: dict[str, Any] = {"arguments": asked}
        if name != "a":
            changed["prompt_hash"] = None
        change_lines(samples, lambda row, changed=changed: row | changed)
    for name, codes in (("b", ["texts-differ"]), ("c", [])):
        (claim,) = compared(tmp_path / "a", tmp_path / name).claims
        assert [finding.code for finding in claim.stopped_by] == codes


def test_what_the_files_do_not_say_is_named(tmp_path: Path) -> None:
    values = [1.0] * 20 + [0.0] * 10
    conclusion = compared(lm_eval(tmp_path / "a", values), lm_eval(tmp_path / "b", values))
    (title,) = [each.title for each in conclusion.findings if each.code == "not-recorded"]
    assert "a and b" in title and "chat template" in title and "backend" in title


def test_questions_chosen_by_hand_have_no_verdict(tmp_path: Path) -> None:
    counts = {"n-samples": {"arc_easy": {"original": 300, "effective": 30}}}
    first = lm_eval(tmp_path / "a", [1.0] * 30, **counts)
    second = lm_eval(tmp_path / "b", [0.0] * 30, **counts)
    conclusion = compared(first, second)
    assert conclusion.claims[0].verdict == "no verdict"
    assert conclusion.findings[0].code == "chosen-questions"
    assert "30 of 300 questions of arc_easy" in conclusion.findings[0].evidence[0]
    for n in (29, 30):  # the first n of both, or of one
        for name in ("limited a", "limited b"):
            lm_eval(tmp_path / name, [1.0] * n, **counts, config={"limit": n})
        pair = [tmp_path / "limited a", tmp_path / "limited b"]
        codes = {finding.code for finding in compared(*pair).findings}
        assert ("other-subset" in codes) == (n == 29), n
    whole = lm_eval(tmp_path / "c", [1.0] * 300)  # its other prompts are to other questions
    assert "other-subset" in {finding.code for finding in compared(pair[0], whole).findings}
    codes = {finding.code for finding in compared(first, whole).findings}
    assert "chosen-questions" in codes and "evaluated-differently" not in codes


def test_annotations_that_are_gone_count_both_ways_and_a_judge_has_a_name(tmp_path: Path) -> None:
    wins: list[float | None] = [2.0] * 100 + [1.0] * 100
    first = annotations(tmp_path / "a.json", "mine", wins)
    second = annotations(tmp_path / "b.json", "theirs", wins)
    rows = json.loads(first.read_text())
    write_json(first, [row for row in rows if row["preference"] == 2.0])  # the losses are gone
    (claim,) = compared(first, second).claims
    assert claim.row.test.unresolved == 100 and claim.verdict not in ("higher", "lower")
    assert claim.row.flags == ("100 common questions of 200",)
    for row in rows:
        del row["annotator"]
    write_json(first, rows)
    with pytest.raises(DataError, match="names no annotator"):
        read_results(first)


def test_a_command_that_has_one_of_its_files_alone_is_named(tmp_path: Path) -> None:
    results, samples = f"results{LATER}.json", f"samples_hellaswag{LATER}.jsonl"
    whys = {results: "no samples beside it", samples: "its command has no results file here"}
    for gone, kept in ((samples, results), (results, samples)):
        folder = lm_eval(tmp_path / "a", [1.0] * 10)
        lm_eval(folder, [1.0] * 10, LATER, task="hellaswag")
        (folder / "some__model" / gone).unlink()
        run = read_one(folder)
        assert [metric.task for metric in run.metrics] == ["arc_easy"]
        (line,) = run.unread
        assert line.startswith(f"{kept}: {whys[kept]}")


def test_two_judgments_of_one_model_in_a_folder_are_not_compared_with_each_other(tmp_path) -> None:
    files = [tmp_path / f"{judge}.annotations.json" for judge in ("a", "b")]
    for file in files:
        annotations(file, "mine", [2.0] * 9)
    with pytest.raises(DataError, match=r"a\.annotations\.json, b\.annotations\.json"):
        read_results(tmp_path)
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


def change_rows(folder: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    for file in folder.rglob("samples*.jsonl"):
        change_lines(file, how)


def test_a_folder_of_samples_alone_is_compared_and_says_what_it_lacks(tmp_path: Path) -> None:
    values = [1.0] * 200 + [0.0] * 100
    for name in ("a", "b"):
        folder = lm_eval(tmp_path / name, values)
        change_rows(folder, lambda row: row | {"metrics": ["acc", "brier"], "brier": [0, [1.0]]})
        (results,) = folder.rglob("results*.json")
        results.unlink()
    conclusion = compared(tmp_path / "a", tmp_path / "b/some__model")
    (claim,) = conclusion.claims
    assert claim.row.test and claim.row.n == 300 and claim.row.first_value == 200 / 300
    assert claim.row.higher_is_better
    unread = next(each for each in conclusion.findings if each.code == "not-read")
    assert "brier" in unread.evidence[0]
    assert any("not recorded" in each.title.lower() for each in conclusion.findings)


def test_rows_of_lm_eval_that_are_gone_leave_no_verdict_and_the_file_is_named(tmp_path) -> None:
    counts = {"n-samples": {"arc_easy": {"original": 60, "effective": 60}}}
    whole = lm_eval(tmp_path / "b", [1.0] * 20 + [0.0] * 40, **counts)
    folder = lm_eval(tmp_path / "a", [1.0] * 30 + [0.0] * 30, **counts)
    (file,) = folder.rglob("samples*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    without_metric = lines[7].replace('"acc"', '"other"')
    without_losses = [line for line in lines if '"acc": 1.0' in line]
    damaged = [
        (59, [*lines[:7], without_metric, *lines[8:]]),
        (30, without_losses),
        (0, [lines[0].replace('"acc"', '"other"')]),
    ]
    file.write_text("".join(lines)[:-40])
    with pytest.raises(DataError, match="this line is damaged; restore or cut it") as cut:
        read_results(folder)
    assert cut.value.line == 60
    for found, kept in damaged:
        file.write_text("".join(kept))
        conclusion = compared(folder, whole)
        (claim,) = conclusion.claims
        assert claim.verdict == "no verdict", found
        (unread,) = [each for each in conclusion.findings if each.code == "not-read"]
        lines_read = f"{file.name}: {found} of the 60 rows of acc can be read"
        assert lines_read in unread.title


def test_one_model_with_and_without_a_chat_template_is_two_arms(tmp_path: Path) -> None:
    folder = lm_eval(tmp_path / "a", [1.0] * 10)
    lm_eval(folder, [0.0] * 10, LATER, chat_template_sha="abc")
    arms = arms_of(read_results(folder) or []).by_name
    assert list(arms) == ["a-pretrained-a", "a-pretrained-a-chat"]


def test_rows_that_one_side_lost_count_both_ways(tmp_path: Path) -> None:
    values = [1.0] * 100 + [0.0] * 100
    first = lm_eval(tmp_path / "a", values)
    second = lm_eval(tmp_path / "b", values)
    for folder in (first, second):
        next(folder.rglob("results*")).unlink()
        change_rows(folder, lambda row: row | {"metrics": ["acc"]})
    (samples,) = second.rglob("samples*")
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:100]))
    (claim,) = compared(first, second).claims
    assert claim.row.test.unresolved == 100 and claim.verdict == "not shown"


# Of every four questions the first arm won one, the second one, and both or neither the others.
FOUR = {"a": [1.0, 0.0, 1.0, 0.0], "b": [0.0, 1.0, 1.0, 0.0]}


def test_annotations_that_both_sides_lost_count_both_ways_by_the_leaderboard(tmp_path) -> None:
    for name, values in FOUR.items():
        file = tmp_path / name / "gpt4/annotations.json"
        annotations(file, name, [1 + value for value in values * 50])
        write_json(file, [row for n, row in enumerate(json.loads(file.read_text())) if n % 4])
        file.with_name("leaderboard.csv").write_text(f",n_total\n{name},200\n")
    claim = compared(tmp_path / "a", tmp_path / "b").claims[0]
    assert claim.verdict == "not shown" and claim.row.test.unresolved == 50
    assert claim.row.flags == ("150 common questions of 200",)


def test_rows_of_lm_eval_that_are_gone_are_counted_where_both_means_are_kept(tmp_path) -> None:
    counts = {"n-samples": {"arc_easy": {"original": 200, "effective": 200}}}
    for (name, values), gone in zip(FOUR.items(), ((0, 3), (0, 2)), strict=True):
        (samples,) = lm_eval(tmp_path / name, values * 50, **counts).rglob("samples*")
        rows = enumerate(samples.read_text().splitlines(keepends=True))
        samples.write_text("".join(row for n, row in rows if n % 4 not in gone))
    (claim,) = compared(tmp_path / "a", tmp_path / "b").claims
    assert claim.row.test.unresolved == 150 and claim.verdict == "not shown"
    assert claim.row.flags == ("50 common questions of 200",)


def test_questions_that_differ_in_digits_only_are_a_doubt_in_the_sentence(tmp_path: Path) -> None:
    folders = [lm_eval(tmp_path / name, [1.0, 0.0] * 40) for name in ("a", "b")]
    assert "no-texts" in {each.code for each in compared(*folders).findings}

    def with_text(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"arguments": {"gen_args_0": {"arg_0": f"Again ({row['doc_id']}): why?"}}}

    for folder in folders:
        change_rows(folder, with_text)
    conclusion = compared(*folders)
    assert "no-texts" not in {each.code for each in conclusion.findings}
    assert "79 of 80 questions of arc_easy differ" in conclusion.claims[0].sentence
    for folder in folders:
        change_rows(folder, lambda row: with_text(row | {"doc_id": 1}) | {"doc_id": row["doc_id"]})
    assert compared(*folders).claims[0].row.test.resolved.questions == 1


def test_the_length_controlled_rate_is_shown_as_alpaca_eval_computed_it(shared_data, tmp_path):
    source = shared_data / "alpaca_eval"
    board = (source / "alpaca_eval_gpt4_leaderboard.csv").read_text()
    (row,) = [line for line in board.splitlines() if line.startswith("llama-2-7b-chat-hf,")]
    text = (source / "llama-2-7b-chat-hf/alpaca_eval_gpt4.annotations.json").read_text()
    paths = []
    for model in ("llama-2-7b-chat-hf", "other"):
        folder = tmp_path / model / "alpaca_eval_gpt4"
        folder.mkdir(parents=True)
        (folder / "annotations.json").write_text(text.replace("llama-2-7b-chat-hf", model))
        (folder / "leaderboard.csv").write_text(board.replace("llama-2-7b-chat-hf,", f"{model},"))
        paths.append(tmp_path / model)
    conclusion = compared(*paths)
    rows = {each.row.metric.rpartition("/")[2]: each.row for each in conclusion.claims}
    shown = rows["length_controlled_winrate"]
    assert 100 * shown.first_value == pytest.approx(float(row.split(",")[-1]), abs=1e-12)
    assert shown.test is None and "totals" in shown.why_not
    assert not {each.code for each in conclusion.findings} & {"protocol-differs", "judges-differ"}


def test_another_configuration_of_the_annotator_stops_the_verdict(tmp_path: Path) -> None:
    for name, config in (("a", "gpt4"), ("b", "gpt4_fn")):
        (tmp_path / name / config).mkdir(parents=True)
        annotations(tmp_path / name / config / "annotations.json", name, [2.0, 1.0] * 50)
    (claim,) = compared(tmp_path / "a", tmp_path / "b").claims
    assert "annotator's config" in claim.sentence and claim.verdict == "no verdict"
    loose = annotations(tmp_path / "c.json", "c", [2.0, 1.0] * 50)
    conclusion = compared(tmp_path / "a", loose)
    assert conclusion.claims[0].row.is_tested
    (title,) = [each.title for each in conclusion.findings if each.code == "not-recorded"][:1]
    assert "chat template" in title


def test_results_of_another_shape_are_damaged_and_no_internal_error(tmp_path: Path) -> None:
    shapes: list[dict[str, Any]] = [{"n-samples": {"arc_easy": 5}}, {"config": "x"}]
    for content in [*shapes, {"group_subtasks": [1]}, {"results": {"arc_easy": []}}]:
        with pytest.raises(DataError, match="is damaged: "):
            read_results(lm_eval(tmp_path / "a", [1.0] * 10, **content))


def test_json_of_too_many_levels_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is damaged: RecursionError"):
        read_results(file)
    for name in ("an.json", "results_2026.json"):  # whose samples lie in no file beside it
        assert items_file(tmp_path / name) == tmp_path / name
