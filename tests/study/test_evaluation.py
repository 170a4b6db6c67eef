"""All evaluations of a study in one process, with the real libraries: what is loaded, what is asked
again, and which arm fails alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.generation.conftest import make_run, runs_folder  # noqa: F401
from tests.study.study_files import PROJECT, write_tiny_study
from tests.test_evaluate_all import loads  # noqa: F401

from recipes_lib.cli import main
from recipes_lib.compare.design import load_study
from recipes_lib.compare.measurements import read_run
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import steps
from recipes_lib.study.runner import run_study
from recipes_lib.study.steps import build_graph


@pytest.fixture
def trained(make_run: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The tiny study, its two arms trained by somebody else."""
    make_run("tiny--r4", 1, "chat"), make_run("tiny--r8", 2, "chat")
    return write_tiny_study(tmp_path / "study", tiny_model_dir)


def rows_of(kind: str) -> dict[str, int]:
    """Lines of every store of a kind."""
    root = RunDirectory("x").root
    return {
        str(file.relative_to(root)): len(file.read_text(encoding="utf-8").splitlines())
        for file in root.glob(f"*/evals/*/{kind}.jsonl")
    }


def test_one_base_serves_both_adapters_and_all_evals_and_one_judge_judges_everything(
    trained: Path,
    loads: list[str],  # noqa: F811
) -> None:  # noqa: F811, RUF100
    loads.clear()
    said: list[str] = []
    assert run_study(load_study(trained), said.append) == ExitCode.DONE, said[-3:]
    assert loads == [
        "tiny-llama",
        "tiny-llama",
    ]  # the base, then the judge, which has the same weights here
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
    assert failure is not None and "not finite" in failure.error, failure
    done = {name for name, one in state.items() if one.fresh}
    assert {
        "judgments.study--mt_bench.r8",
        "comparison.study--alpaca_eval.r8-vs-base",
        "lm_eval.study--lm_eval.base",
    } <= done
    assert not {name for name in done if ".r4" in name} - {"train.r4"}
    assert (RunDirectory("tiny").path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_a_rubric_changed_and_changed_back_gives_the_first_result_and_asks_nothing_again(
    trained: Path,
) -> None:
    def grades() -> list[float | None]:
        return [
            item.value
            for one in read_run(RunDirectory("tiny--r8").path).measures()
            if one.metric == "grade"
            for item in one.samples
        ]

    judge, rubric = trained.with_name("judge.yaml"), trained.with_name("mine.txt")
    first = (PROJECT / "evals/rubrics/helpfulness.txt").read_text(encoding="utf-8")
    judge.write_text(
        judge.read_text(encoding="utf-8").replace(
            f"{PROJECT}/evals/rubrics/helpfulness.txt", rubric.name
        ),
        encoding="utf-8",
    )
    seen, rows = [], []
    for text in (first, first.replace("?", ", and funny?", 1), first):
        rubric.write_text(text, encoding="utf-8")
        assert run_study(load_study(trained), lambda line: None) == ExitCode.DONE
        seen.append(grades())
        rows.append((rows_of("judgments"), rows_of("generations")))
    assert seen[0] == seen[2] and rows[0][1] == rows[2][1]
    assert rows[1][0] == rows[2][0] and sum(rows[1][0].values()) > sum(rows[0][0].values())
    questions = trained.with_name("mt_bench.yaml")
    questions.write_text(
        questions.read_text(encoding="utf-8").replace("data: {", "data: {max_questions: 2, "),
        encoding="utf-8",
    )
    assert run_study(load_study(trained), lambda line: None) == ExitCode.DONE
    assert len(grades()) == 4 and rows_of("judgments") == rows[2][0]


@pytest.mark.slow
def test_what_older_code_answered_and_judged_is_asked_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(load_study(trained), lambda line: None)
    before = rows_of("generations"), rows_of("judgments")
    monkeypatch.setitem(steps.VERSIONS, "judgments", 2)
    said: list[str] = []
    assert run_study(load_study(trained), said.append) == ExitCode.DONE
    assert any("made by older code" in line for line in said)
    assert (rows_of("generations"), rows_of("judgments")) == before
    kept = (
        RunDirectory("tiny").path
        / "replaced"
        / "tiny--r8"
        / "evals"
        / "study--mt_bench"
        / "judgments.jsonl"
    )
    assert all(json.loads(line)["key"] for line in kept.read_text(encoding="utf-8").splitlines())


@pytest.fixture
def two_studies(
    make_run: Callable[..., Path],  # noqa: F811
    tiny_model_dir: Path,
    tmp_path: Path,  # noqa: F811, RUF100
) -> tuple[Path, Path]:  # noqa: F811, RUF100
    """Two studies in one folder, an arm each, with the same base and evals; both arms are
    trained.
    """
    make_run("a--r4", 1, "chat"), make_run("b--r8", 2, "chat")
    file = write_tiny_study(tmp_path / "study", tiny_model_dir)
    text = file.read_text(encoding="utf-8")
    for name, other in (("a", "r8"), ("b", "r4")):
        file.with_name(f"{name}.yaml").write_text(
            text.replace(f"  {other}: {other}.yaml\n", ""), encoding="utf-8"
        )
    return file.with_name("a.yaml"), file.with_name("b.yaml")


def not_fresh(study: Path) -> dict[str, str]:
    return {
        name: state.why
        for name, state in build_graph(load_study(study)).survey().items()
        if not state.fresh
    }


def test_studies_that_share_a_base_leave_each_other_fresh_and_so_does_a_plain_eval_of_the_base(
    two_studies: tuple[Path, Path],
) -> None:
    first, second = two_studies
    for study in two_studies:
        assert run_study(load_study(study), lambda line: None) == ExitCode.DONE
    assert (not_fresh(first), not_fresh(second)) == ({}, {})
    base = next(path for path in RunDirectory("x").root.glob("base--*"))
    written = {file: file.read_text(encoding="utf-8") for file in base.glob("evals/*/result.json")}
    for name in ("alpaca_eval", "mt_bench", "lm_eval"):
        assert (
            main(
                [
                    "eval",
                    str(first.with_name(f"{name}.yaml")),
                    base.name,
                    "b--r8",
                    "generation.batch_tokens=512",
                ]
            )
            == ExitCode.DONE
        )
    assert (
        all(file.read_text(encoding="utf-8") != text for file, text in written.items())
        and len(written) == 3
    )
    assert (
        main(["eval", str(first.with_name("alpaca_eval.yaml")), "a--r4", "--against", "base"])
        == ExitCode.DONE
    )
    assert (not_fresh(first), not_fresh(second)) == ({}, {})
    file = base / "evals" / "study--mt_bench" / "result.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**result, "n": result["n"] - 1}), encoding="utf-8")
    assert "judgments.study--mt_bench.base" in not_fresh(first)


@pytest.mark.slow
def test_studies_that_share_a_base_can_run_at_the_same_time(two_studies: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "recipes_lib.cli", "study", "run"]
    running = [
        subprocess.Popen(
            [*command, str(study)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for study in two_studies
    ]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [not_fresh(study) for study in two_studies] == [{}, {}]
    for kind in ("generations", "judgments"):
        assert {name.split("/")[0][:4] for name in rows_of(kind)} == {"a--r", "b--r", "base"}


@pytest.mark.slow
def test_an_evaluation_that_another_process_makes_is_waited_for_and_not_made_twice(
    two_studies: tuple[Path, Path],
) -> None:
    first, second = two_studies
    assert (
        run_study(load_study(first), lambda line: None, only=["train", "check", "answers"])
        == ExitCode.DONE
    )
    before = rows_of("generations")
    base = next(path for path in RunDirectory("x").root.glob("base--*"))
    hold = "import sys, time\nfrom pathlib import Path\nfrom recipes_lib.core.run_lock import run_lock\n"  # noqa: E501
    hold += "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    folder = base / "evals" / "study--alpaca_eval"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    command = [
        sys.executable,
        "-m",
        "recipes_lib.cli",
        "study",
        "run",
        str(second),
        "--only",
        "train",
        "check",
        "answers",
    ]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    said = ""
    while "waiting for it" not in said:
        line = waiting.stdout.readline()
        assert line, said
        said += line
    assert f"{base.name}/evals/study--alpaca_eval is in use by process {other.pid}" in said
    other.communicate("")
    waiting.communicate(timeout=120)
    assert waiting.returncode == ExitCode.DONE
    after = rows_of("generations")
    assert {name: after[name] for name in before} == before and len(after) == 6


@pytest.mark.slow
def test_two_real_trainings_at_the_same_time_record_a_gpu_each(
    tiny_model_dir: Path,
    runs_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine has none, so that they train on the CPU; what they were given stands in
    environment.json.
    """
    study = write_tiny_study(tmp_path / "study", tiny_model_dir, steps=2)
    study.write_text(
        study.read_text(encoding="utf-8") + "accelerate: single_gpu\n", encoding="utf-8"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert (
        main(["study", "run", str(study), "--jobs", "2", "--only", "train", "--no-plan"])
        == ExitCode.DONE
    )
    recorded = [
        read_run(runs_folder / f"tiny--{arm}").environment["variables"]["CUDA_VISIBLE_DEVICES"]
        for arm in ("r4", "r8")
    ]
    assert recorded == ["0", "1"]
