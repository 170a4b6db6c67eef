"""A study's report holds the study's own, current results: nothing out of date, nothing that was
evaluated beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from recipes_lib.study.graph import Graph, Step
from recipes_lib.study.steps import build_graph

from recipes_lib.compare.design import load_study
from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
from recipes_lib.compare.relabelling import Relabelling
from recipes_lib.compare.row import TableRow
from recipes_lib.core.atomic_files import write_json
from recipes_lib.eval_log import EvalLog
from recipes_lib.study import conclusion
from recipes_lib.study.arms import base_record
from recipes_lib.study.conclusion import conclude, measured_runs, of_study

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def measured(name: str, *evals: tuple[str, str | None]) -> ArmMeasurements:
    results = tuple(
        EvalLog(eval=eval, suite="alpaca_eval", against=against, file=Path("result.json"))
        for eval, against in evals
    )
    run = RunMeasurements(name, Path(name), {"state": "finished"}, {}, {}, {}, (), results)
    return ArmMeasurements(name, (run,))


def test_results_out_of_date_and_results_of_other_evals_are_left_out(study_folder: Path) -> None:
    study = load_study(study_folder / "tiny.yaml")
    write_json(base_record(study), {"run": "base--x"})
    graph = build_graph(study)
    for step in graph:
        if step.name not in (
            "judgments.study--mt_bench.r4",
            "comparison.study--alpaca_eval.r8-vs-r4",
        ):
            graph.finish(step, "r", [])
    suite = "study--alpaca_eval"
    found = Measurements(
        {
            "base": measured(
                "base--x", (suite, "reference"), ("study--mt_bench", None), ("study--lm_eval", None)
            ),
            "r4": measured(
                "tiny--r4",
                (suite, "reference"),
                (suite, "base--x"),
                ("study--mt_bench", None),
                ("somebody_elses", "reference"),
            ),
            "r8": measured(
                "tiny--r8",
                (suite, "reference"),
                (suite, "tiny--r4"),
                (suite, "base--x"),
                (suite, "another-run"),
            ),
        }
    )
    kept = {
        name: [(one.eval, one.against) for one in arm.runs[0].evals]
        for name, arm in of_study(found, study, graph).arms.items()
    }
    assert kept == {
        "base": [(suite, "reference"), ("study--mt_bench", None), ("study--lm_eval", None)],
        "r4": [(suite, "reference"), (suite, "base--x")],
        "r8": [(suite, "reference"), (suite, "base--x")],
    }
    unfinished = {
        name: arm.runs[0].unfinished for name, arm in of_study(found, study, graph).arms.items()
    }
    assert unfinished == {"base": (), "r4": ("study--mt_bench",), "r8": (suite,)}


def test_a_run_of_an_earlier_state_of_the_study_is_not_measured(study_folder: Path) -> None:
    study = load_study(study_folder / "tiny.yaml")
    graph = build_graph(study)
    graph.finish(graph.steps["train.r4"], "weights", [])
    assert [path.name for runs in measured_runs(study, graph).values() for path in runs] == [
        "tiny--r4"
    ]
    recipe = study_folder / "r4.yaml"
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("1.0e-2", "2.0e-2"), encoding="utf-8"
    )
    changed = load_study(study_folder / "tiny.yaml")
    assert not [
        path for runs in measured_runs(changed, build_graph(changed)).values() for path in runs
    ]


def test_statistics_that_are_done_are_not_done_again_for_a_report_that_is_missing(
    study_folder: Path,
) -> None:
    study = load_study(study_folder / "tiny.yaml")
    graph = build_graph(study)
    for step in graph:
        if step.kind not in ("statistics", "report"):
            graph.finish(step, "r", [])
    conclude(study, graph)
    done = graph.folder / "statistics" / "done.json"
    write_json(done, {**json.loads(done.read_text(encoding="utf-8")), "seconds": 99})
    (graph.folder / "report" / "done.json").unlink()
    conclude(study, graph)
    assert json.loads(done.read_text(encoding="utf-8"))["seconds"] == 99
    assert graph.survey()["report"].fresh


def test_copies_of_a_study_are_measured_once_and_again_when_its_data_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    own = Relabelling(1_000, 40, None, False, ("speed",))

    def anew(rows: object, judge: object) -> Relabelling:
        calls.append(rows)
        return own

    monkeypatch.setattr(conclusion, "relabelled", anew)
    row = TableRow(
        metric="m", label="m", first="a", second="b", unit="share", first_value=1, second_value=0
    )
    file = tmp_path / "statistics" / "relabelling.json"

    def asked(version: str, *rows: TableRow, keep: bool = True) -> Relabelling | None:
        graph = Graph(tmp_path, [Step("statistics", "statistics", {}, version=version)])
        return conclusion.relabelled_once(graph, rows, lambda row: row, keep=keep)

    assert asked("1", row, keep=False) == own and not file.exists()
    calls.clear()

    assert asked("1", row) == asked("1", row) == own and len(calls) == 1
    assert asked("2", row) == own and len(calls) == 2
    assert asked("2", row, row) == own and len(calls) == 3
    file.write_text("{torn", encoding="utf-8")
    assert asked("2", row, row) == own and len(calls) == 4
