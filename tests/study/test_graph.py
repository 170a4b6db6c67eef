"""A step is fresh exactly as long as its inputs, its upstream results and its files are what they
were.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.study.study_files import PROJECT

from recipes_lib.compare.design import load_study
from recipes_lib.eval_recipe import load_eval
from recipes_lib.study import steps
from recipes_lib.study.graph import (
    Failure,
    Graph,
    Step,
    changed_inputs,
    content_of,
    file_record,
    result_digest,
)
from recipes_lib.study.steps import build_graph, judgment_inputs


def chain(folder: Path, **inputs: object) -> Graph:
    """Three steps in a row and one beside them."""
    first = Step("first", "train", {"x": 1, **inputs})
    return Graph(
        folder / "study" / "steps",
        [
            first,
            Step("second", "check", {}, ("first",)),
            Step("third", "report", {}, ("second",)),
            Step("beside", "train", {"y": 1}),
        ],
    )


def finish_all(graph: Graph, outputs: dict[str, str] | None = None) -> None:
    for step in graph:
        graph.finish(step, (outputs or {}).get(step.name, f"result of {step.name}"), [])


def states(graph: Graph) -> dict[str, str]:
    return {name: freshness.state for name, freshness in graph.survey().items()}


def test_nothing_is_done_at_first_and_everything_afterwards(tmp_path: Path) -> None:
    graph = chain(tmp_path)
    assert set(states(graph).values()) == {"missing"}
    finish_all(graph)
    assert set(states(graph).values()) == {"fresh"}


def test_a_changed_input_makes_exactly_the_steps_below_stale_and_is_named(tmp_path: Path) -> None:
    finish_all(chain(tmp_path))
    graph = chain(tmp_path, x=2)
    assert states(graph) == {
        "first": "stale",
        "second": "stale",
        "third": "stale",
        "beside": "fresh",
    }
    assert graph.survey()["first"].why == "x 1 -> 2"
    assert graph.survey()["second"].why == "first is stale"


def test_a_step_done_again_with_the_same_result_leaves_the_ones_below_fresh(tmp_path: Path) -> None:
    finish_all(chain(tmp_path))
    graph = chain(tmp_path, x=2)
    graph.finish(graph.steps["first"], "result of first", [])
    assert set(states(graph).values()) == {"fresh"}
    graph.finish(graph.steps["first"], "another result", [])
    assert graph.survey()["second"].why == "first gave another result"


def test_raised_code_makes_a_step_stale(tmp_path: Path) -> None:
    finish_all(chain(tmp_path))
    steps = [Step("first", "train", {"x": 1}, version=2)]
    assert Graph(tmp_path / "study" / "steps", steps).survey()["first"].why == "code 1 -> 2"


def test_touching_a_file_is_no_change_and_one_byte_is(tmp_path: Path) -> None:
    file = tmp_path / "run" / "weights.bin"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    graph = chain(tmp_path)
    for step in graph:
        graph.finish(step, "r", [file] if step.name == "first" else [])
    os.utime(file, (1, 1))
    assert graph.survey()["first"].fresh
    file.write_bytes(b"Weights")
    assert graph.survey()["first"].why == "run/weights.bin changed"
    file.unlink()
    assert graph.survey()["first"].why == "run/weights.bin is gone"


def test_lines_appended_to_a_store_are_no_change_and_a_changed_line_is(tmp_path: Path) -> None:
    store = tmp_path / "run" / "judgments.jsonl"
    store.parent.mkdir()
    store.write_text('{"a": 1}\n', encoding="utf-8")
    graph = chain(tmp_path)
    graph.finish(graph.steps["beside"], "r", [store])
    store.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert graph.survey()["beside"].fresh
    store.write_text('{"a": 3}\n{"a": 2}\n', encoding="utf-8")
    assert graph.survey()["beside"].why == "run/judgments.jsonl changed"


def test_a_result_written_again_is_the_same_result(tmp_path: Path) -> None:
    result = {
        "n": 8,
        "written": "monday",
        "git": {"commit": "a"},
        "answers": {"generated_now": {"seconds": 1}, "n": 8},
    }
    again = {
        "n": 8,
        "written": "tuesday",
        "git": {"commit": "b"},
        "answers": {"generated_now": None, "n": 8},
    }
    assert result_digest(result) == result_digest(again) != result_digest({**again, "n": 7})
    for name, value in (("result.json", result), ("result.against-x.json", again)):
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    assert (
        file_record(tmp_path / "result.json").sha256
        == file_record(tmp_path / "result.against-x.json").sha256
    )


def test_a_content_that_cannot_be_known_is_not_compared(tmp_path: Path) -> None:
    finish_all(chain(tmp_path, **{"content.base model": None}))
    assert chain(tmp_path, **{"content.base model": "abc"}).survey()["first"].fresh
    finish_all(chain(tmp_path, **{"content.base model": "abc"}))
    assert (
        chain(tmp_path, **{"content.base model": "def"}).survey()["first"].why
        == "base model changed"
    )


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 99}', "[]"])
def test_a_torn_or_foreign_record_counts_as_never_done(tmp_path: Path, text: str) -> None:
    graph = chain(tmp_path)
    finish_all(graph)
    (tmp_path / "study" / "steps" / "first" / "done.json").write_text(text, encoding="utf-8")
    assert graph.survey()["first"].state == "missing"


def test_a_failure_is_remembered_until_the_step_is_done_and_takes_no_earlier_result_away(
    tmp_path: Path,
) -> None:
    graph = chain(tmp_path)
    finish_all(graph)
    graph.fail(graph.steps["first"], "out of memory", 5)
    assert graph.survey()["first"].fresh
    changed = chain(tmp_path, x=2)
    noted = json.loads((graph.folder / "first" / "failed.json").read_text(encoding="utf-8"))
    assert changed.survey()["first"].failure == Failure(**noted)
    changed.finish(changed.steps["first"], "r", [])
    assert not (graph.folder / "first" / "failed.json").exists()


def test_the_content_of_a_folder_is_its_files_and_their_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("1", encoding="utf-8")
    before = content_of(tmp_path / "a")
    (tmp_path / "a" / ".hidden").write_text("2", encoding="utf-8")
    assert content_of(tmp_path / "a") == before
    (tmp_path / "a" / "x.txt").rename(tmp_path / "a" / "y.txt")
    assert content_of(tmp_path / "a") != before
    assert content_of(tmp_path / "nowhere") is None


# ---- The inputs of a real study: what is changed, and the steps that become stale by themselves
# ----


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text, name
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return edit


ALL_MODELS = ("base", "r4", "r8")
TRAININGS = ["train.r4", "train.r8"]
ASKED = [f"answers.study--alpaca_eval.{model}" for model in ALL_MODELS]
JUDGED = [
    f"judgments.study--{suite}.{model}"
    for suite in ("alpaca_eval", "mt_bench")
    for model in ALL_MODELS
]
COMPARED = [
    f"comparison.study--alpaca_eval.{pair}" for pair in ("r4-vs-base", "r8-vs-base", "r8-vs-r4")
]
CHANGES = [
    ("a comment in a recipe", change("r4.yaml", "train:", "# nothing changes here\ntrain:"), []),
    ("a logging key", change("r4.yaml", "logging_steps: 1", "logging_steps: 7"), []),
    ("a saving key", change("r4.yaml", "save_steps: 2", "save_steps: 4"), []),
    ("notes and tags", change("r4.yaml", "run: {", "run: {tags: [new], notes: a note, "), []),
    (
        "the speed of generation",
        change("alpaca_eval.yaml", "max_new_tokens: 12", "max_new_tokens: 12, batch_tokens: 100"),
        [],
    ),
    (
        "the learning rate of one arm",
        change("r4.yaml", "learning_rate: 1.0e-2", "learning_rate: 2.0e-2"),
        ["train.r4"],
    ),
    ("the rank of one arm", change("r8.yaml", "r: 8", "r: 6"), ["train.r8"]),
    ("one byte of the training data", change("rows.jsonl", "What", "what"), TRAININGS),
    (
        "an override",
        change("tiny.yaml", "seeds: [42]", "seeds: [42]\noverrides: [train.max_steps=3]"),
        TRAININGS,
    ),
    (
        "the prompt format",
        change("r8.yaml", "prompt_format: chat", "prompt_format: dolly"),
        ["train.r8"],
    ),
    ("a question", change("questions.json", "instruction", "instructiom"), ASKED),
    ("decoding", change("alpaca_eval.yaml", "max_new_tokens: 12", "max_new_tokens: 13"), ASKED),
    (
        "a threshold of the judge",
        change("judge.yaml", "judge:\n", "thresholds: {unparsed_max: 0.01}\njudge:\n"),
        [*JUDGED, *COMPARED],
    ),
    (
        "the judge's context",
        change("judge.yaml", "max_context_tokens: 1024", "max_context_tokens: 512"),
        [*JUDGED, *COMPARED],
    ),
    (
        "the tasks",
        change("lm_eval.yaml", "limit: 12", "limit: 13"),
        [f"lm_eval.study--lm_eval.{model}" for model in ALL_MODELS],
    ),
    (
        "the question of the study",
        change("tiny.yaml", "Does rank 8 beat rank 4?", "Is 8 better?"),
        ["statistics"],
    ),
    ("a factor", change("tiny.yaml", "[lora.r, lora.lora_alpha]", "[lora]"), ["statistics"]),
]


@pytest.mark.parametrize(
    ("edit", "expected"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES]
)
def test_each_kind_of_input_makes_its_own_steps_stale(
    edit: Callable[[Path], None], expected: list[str], study_folder: Path
) -> None:
    file = study_folder / "tiny.yaml"
    finish_all(build_graph(load_study(file)))
    edit(study_folder)
    survey = build_graph(load_study(file)).survey()
    by_themselves = [
        name
        for name, state in survey.items()
        if any(not why.endswith(("is stale", "is not done")) for why in state.reasons)
    ]
    assert sorted(by_themselves) == sorted(expected)
    if not expected:
        assert all(state.fresh for state in survey.values())


def test_the_number_of_processes_alone_makes_a_training_stale(study_folder: Path) -> None:
    file = study_folder / "tiny.yaml"
    change("r4.yaml", "{accelerate: cpu}", "{accelerate: ddp_cpu, gpus: 2}")(study_folder)
    change("r4.yaml", "per_device_train_batch_size: 4", "per_device_train_batch_size: 1")(
        study_folder
    )
    finish_all(build_graph(load_study(file)))
    change("r4.yaml", "gpus: 2", "gpus: 4")(study_folder)
    assert build_graph(load_study(file)).survey()["train.r4"].reasons == (
        "launch.world_size 2 -> 4",
    )


def test_a_rubric_is_known_by_its_text_and_a_judge_by_its_weights(study_folder: Path) -> None:
    file, judge = study_folder / "tiny.yaml", study_folder / "judge.yaml"
    weights = study_folder / "judge" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(9000))
    before = judge.read_text(encoding="utf-8")
    judge.write_text(
        re.sub(r"model: .*", "model: " + str(weights.parent), before), encoding="utf-8"
    )
    finish_all(build_graph(load_study(file)))
    rubric = study_folder / "mine.txt"
    rubric.write_bytes((PROJECT / "evals/rubrics/helpfulness.txt").read_bytes())
    change("judge.yaml", f"{PROJECT}/evals/rubrics/helpfulness.txt", "mine.txt")(study_folder)
    assert all(state.fresh for state in build_graph(load_study(file)).survey().values())
    rubric.write_text("Is it short?\n1: no\n5: yes\n", encoding="utf-8")
    assert build_graph(load_study(file)).survey()[JUDGED[0]].why == "judge rubric changed"
    weights.write_bytes(b"\0" * 8 + b"\1" * 8992)
    assert (
        build_graph(load_study(file)).survey()[JUDGED[0]].why
        == "judge model changed, judge rubric changed"
    )


def test_a_new_arm_leaves_the_others_as_they_are(study_folder: Path) -> None:
    file = study_folder / "tiny.yaml"
    finish_all(build_graph(load_study(file)))
    change(
        "tiny.yaml",
        "  r8: r8.yaml",
        "  r8: r8.yaml\n  r2: {recipe: r4.yaml, overrides: [lora.r=2, lora.lora_alpha=4]}",
    )(study_folder)
    survey = build_graph(load_study(file)).survey()
    assert {name for name, state in survey.items() if state.state == "missing"} == {
        "train.r2",
        "check.r2",
        "answers.study--alpaca_eval.r2",
        "judgments.study--alpaca_eval.r2",
        "answers.study--mt_bench.r2",
        "judgments.study--mt_bench.r2",
        "lm_eval.study--lm_eval.r2",
        "comparison.study--alpaca_eval.r2-vs-base",
        "comparison.study--alpaca_eval.r2-vs-r4",
        "comparison.study--alpaca_eval.r2-vs-r8",
    }
    assert {name for name, state in survey.items() if state.state == "stale"} == {
        "statistics",
        "report",
    }


def test_a_new_seed_leaves_the_trainings_and_evaluations_of_the_first_as_they_are(
    study_folder: Path,
) -> None:
    file = study_folder / "tiny.yaml"
    finish_all(build_graph(load_study(file)))
    change("tiny.yaml", "seeds: [42]", "seeds: [42, 43]")(study_folder)
    survey = build_graph(load_study(file)).survey()
    assert {name for name, state in survey.items() if state.state == "stale"} == {
        "statistics",
        "report",
    }
    missing = {name for name, state in survey.items() if state.state == "missing"}
    assert (
        all(".seed43" in name for name in missing)
        and {"train.r4.seed43", "train.r8.seed43"} <= missing
    )


def test_the_code_that_reads_results_is_part_of_the_version_of_the_statistics(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()

    def digest(folder: Path, files: list[Path]) -> str:
        read.update(file.relative_to(folder).as_posix() for file in files)
        return "0" * 64

    monkeypatch.setattr(steps, "digest_of_files", digest)
    steps.source_version.cache_clear()
    build_graph(load_study(study_folder / "tiny.yaml"))
    steps.source_version.cache_clear()
    assert {"compare/claims.py", "eval_log.py", "eval_files.py", "study/conclusion.py"} <= read


def test_moving_the_checkout_makes_nothing_stale(study_folder: Path, tmp_path: Path) -> None:
    finish_all(build_graph(load_study(study_folder / "tiny.yaml")))
    (tmp_path / "elsewhere").mkdir()
    moved = study_folder.rename(tmp_path / "elsewhere" / "study")
    assert all(
        state.fresh for state in build_graph(load_study(moved / "tiny.yaml")).survey().values()
    )


def test_judgments_are_summed_up_anew_when_labels_come_and_when_they_change(tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"

    def inputs(*words: str) -> dict[str, object]:
        return dict(
            judgment_inputs(load_eval(PROJECT / "evals/quickstart/alpaca_eval.yaml", words))
        )

    known = [inputs()]
    for text in ("first", "second"):
        labels.write_text(text)
        known.append(inputs(f"data.labels={labels}"))
    for before, now in itertools.pairwise(known):
        (change,) = changed_inputs(before, now)
        assert change.startswith("data.labels ")
