"""All evaluations of a study in one process, with the real libraries: what is loaded, what is asked again, and which arm fails alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from study_files import PROJECT, write_tiny_study
from tests.generation.conftest import make_run, runs_folder  # noqa: F401
from tests.test_evaluate_all import loads  # noqa: F401

from recipes_lib.errors import ExitCode
from recipes_lib.runs.directory import RunDirectory
from recipes_lib.studies import steps
from recipes_lib.studies.measurements import read_run
from recipes_lib.studies.runner import run_study
from recipes_lib.studies.steps import build_graph
from recipes_lib.studies.study import load_study


@pytest.fixture
def trained(make_run: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The tiny study, its two arms trained by somebody else."""
    make_run("tiny--r4", 1, "chat"), make_run("tiny--r8", 2, "chat")
    return write_tiny_study(tmp_path / "study", tiny_model_dir)


def rows_of(kind: str) -> dict[str, int]:
    """Lines of every store of a kind."""
    root = RunDirectory("x").root
    return {
        str(file.relative_to(root)): len(file.read_text(encoding="utf-8").splitlines()) for file in root.glob(f"*/evals/*/{kind}.jsonl")
    }


def test_one_base_serves_both_adapters_and_all_evals_and_one_judge_judges_everything(trained: Path, loads: list[str]) -> None:  # noqa: F811
    loads.clear()
    said: list[str] = []
    assert run_study(load_study(trained), said.append) == ExitCode.DONE, said[-3:]
    assert loads == ["tiny-llama", "tiny-llama"]  # the base, then the judge, which has the same weights here
    assert all(state.fresh for state in build_graph(load_study(trained)).survey().values())
    run_study(load_study(trained), said.append)
    assert len(loads) == 2


def test_an_arm_whose_weights_are_damaged_takes_no_other_along(trained: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = RunDirectory("tiny--r4").path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)] *= torch.nan
    save_file(tensors, file, {"format": "pt"})
    said: list[str] = []
    assert run_study(load_study(trained), said.append) == ExitCode.FAILED
    state = build_graph(load_study(trained)).survey()
    failure = state["check.r4"].failure
    assert failure is not None and "not finite" in failure["error"], failure
    done = {name for name, one in state.items() if one.fresh}
    assert {"judgments.study--mt_bench.r8", "comparison.study--alpaca_eval.r8-vs-base", "lm_eval.study--lm_eval.base"} <= done
    assert not {name for name in done if ".r4" in name} - {"train.r4"}
    assert (RunDirectory("tiny").path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_a_rubric_changed_and_changed_back_gives_the_first_result_and_asks_nothing_again(trained: Path) -> None:
    def grades() -> list[float | None]:
        return [item.value for one in read_run(RunDirectory("tiny--r8").path).measures() if one.metric == "grade" for item in one.items]

    judge, rubric = trained.with_name("judge.yaml"), trained.with_name("mine.txt")
    first = (PROJECT / "evals/rubrics/helpfulness.txt").read_text(encoding="utf-8")
    judge.write_text(judge.read_text(encoding="utf-8").replace(f"{PROJECT}/evals/rubrics/helpfulness.txt", rubric.name), encoding="utf-8")
    seen, rows = [], []
    for text in (first, first.replace("?", ", and funny?", 1), first):
        rubric.write_text(text, encoding="utf-8")
        assert run_study(load_study(trained), lambda line: None) == ExitCode.DONE
        seen.append(grades())
        rows.append((rows_of("judgments"), rows_of("generations")))
    assert seen[0] == seen[2] and rows[0][1] == rows[2][1]
    assert rows[1][0] == rows[2][0] and sum(rows[1][0].values()) > sum(rows[0][0].values())
    questions = trained.with_name("mt_bench.yaml")
    questions.write_text(questions.read_text(encoding="utf-8").replace("data: {", "data: {max_questions: 2, "), encoding="utf-8")
    assert run_study(load_study(trained), lambda line: None) == ExitCode.DONE
    assert len(grades()) == 4 and rows_of("judgments") == rows[2][0]


@pytest.mark.slow
def test_what_older_code_answered_and_judged_is_asked_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(load_study(trained), lambda line: None)
    before = rows_of("generations"), rows_of("judgments")
    monkeypatch.setitem(steps.VERSIONS, "judgments", 2)
    said: list[str] = []
    assert run_study(load_study(trained), said.append) == ExitCode.DONE
    assert any("made by older code" in line for line in said)
    assert (rows_of("generations"), rows_of("judgments")) == before
    kept = RunDirectory("tiny").path / "replaced" / "tiny--r8" / "evals" / "study--mt_bench" / "judgments.jsonl"
    assert all(json.loads(line)["key"] for line in kept.read_text(encoding="utf-8").splitlines())
