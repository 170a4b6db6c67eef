from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from recipes_lib import cli
from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import read_measurements, read_run
from recipes_lib.compare.validity import check_validity
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.foreign.files import CSV_COLUMNS
from recipes_lib.foreign.run import import_run
from recipes_lib.judging.audit import audit
from recipes_lib.judging.store import stored_rows

Row = Mapping[str, Any]


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


def lines(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def whole(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def original_csv(path: Path, rows: Sequence[tuple[str, str, int, str, str]]) -> Path:
    """Rows of (instruction, answer, score, preference, feedback)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(
            [one, answer, "theirs", score, preference, text]
            for one, answer, score, preference, text in rows
        )
    return path


PAIRS = [
    ("Name a river.", "The Rhine.", 5, "A", "Response A is better. [Overall] 5"),
    ("Name a tree.", "Oak", 2, "B", "Response B is better. [Overall] 2"),
    ("Name a bird.", "", 3, "Tie", "Neither."),
]


def single(
    question: int, turn: int, score: float, model: str = "m", text: str = "Rating: [[7]]"
) -> Row:
    return {
        "question_id": question,
        "model": model,
        "judge": ["gpt-4", "single-v1"],
        "user_prompt": "[Question]\nWhy?\n",
        "judgment": text,
        "score": score,
        "turn": turn,
        "tstamp": 1.0,
    }


def pair(question: int, first: str, second: str) -> Row:
    """Games 1 and 2 of the models a and b."""
    facts = {
        "question_id": question,
        "model_1": "a",
        "model_2": "b",
        "g1_winner": first,
        "g2_winner": second,
        "turn": 1,
        "tstamp": 1.0,
    }
    games = {
        "g1_user_prompt": "x",
        "g1_judgment": "game 1",
        "g2_user_prompt": "y",
        "g2_judgment": "game 2",
    }
    return {**facts, **games, "judge": ["gpt-4", "pair-v2"]}


def answer(question: int, *turns: str, model: str = "m") -> Row:
    return {
        "question_id": question,
        "answer_id": "x",
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": 1.0,
    }


def items(runs: Path, run: str, suite: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (
            (runs / run / "evals" / suite / "items.jsonl").read_text(encoding="utf-8").splitlines()
        )
    ]


# ---- what becomes of each format ----


def test_original_csv_keeps_one_order_and_never_counts_a_missing_verdict(tmp_path, runs):
    done = import_run([original_csv(tmp_path / "detailed_results.csv", PAIRS)], "r")
    wins = [item for item in items(runs, "r", "alpaca_eval") if item["metric"] == "win_rate"]
    assert [(item["value"], item["outcome"], item["verdicts"]) for item in wins] == [
        (1.0, "win", ["A"]),
        (0.0, "loss", ["B"]),
        (None, "unresolved", ["unparsed"]),
    ]
    rows = stored_rows(runs / "r/evals/alpaca_eval/judgments.jsonl")
    assert [(row["order"], row["status"], row["value"]) for row in rows] == [
        ("AB", "ok", "A"),
        ("AB", "ok", "B"),
        ("AB", "unparsed", None),
    ]
    assert any("second order was never judged" in lack for lack in done.lacks)
    answers = stored_rows(runs / "r/evals/alpaca_eval/generations.jsonl")
    assert [row["answer"] for row in answers] == ["The Rhine.", "Oak", ""]
    measured = read_run(runs / "r")
    assert measured.imported and {measure.name for measure in measured.measures()} == {
        "alpaca_eval/win_rate",
        "alpaca_eval/comparison_score",
    }
    assert audit(rows)["unparsed"]["estimate"] == pytest.approx(1 / 3)


def test_fastchat_single_keeps_its_scale_and_takes_whole_answers_from_model_answer(tmp_path, runs):
    judged = lines(
        tmp_path / "gpt-4_single.jsonl", [single(81, 1, 7), single(81, 2, -1), single(111, 1, 9.5)]
    )
    done = import_run(
        [
            judged,
            lines(tmp_path / "m.jsonl", [answer(81, "first", "second"), answer(111, "x", "y")]),
        ],
        "r",
    )
    found = items(runs, "r", "mt_bench")
    assert [
        (item["metric"], item["category"], item["value"], item["verdicts"]) for item in found
    ] == [
        ("grade_1_10", "writing", 7.0, ["7"]),
        ("grade_1_10", "writing", None, ["unparsed"]),
        ("grade_1_10", "math", 9.5, ["9.5"]),
    ]
    assert [item["answer"] for item in found] == ["first", "second", "x"] and found[0][
        "lengths"
    ] == [5]
    assert any("question 111 turn 2: no judgment" in lack for lack in done.lacks)
    assert not any("answers are not in a file" in lack for lack in done.lacks)
    assert len(stored_rows(runs / "r/evals/mt_bench/judgments.jsonl")) == 3


def test_fastchat_pairs_are_seen_from_the_model_that_is_meant(tmp_path, runs):
    file = lines(
        tmp_path / "gpt-4_pair.jsonl",
        [
            pair(81, "model_1", "model_1"),
            pair(82, "model_1", "model_2"),
            pair(83, "error", "model_1"),
        ],
    )
    for name in "ab":
        import_run([file], name, model=name)
    seen = {
        name: [(item["outcome"], item["verdicts"]) for item in items(runs, name, "mt_bench")]
        for name in "ab"
    }
    assert seen["a"] == [
        ("win", ["A", "B"]),
        ("tie", ["A", "A"]),
        ("unresolved", ["unparsed", "B"]),
    ]
    assert (
        seen["b"][:2] == [("loss", ["B", "A"]), ("tie", ["A", "A"])]
        and seen["b"][2][0] == "unresolved"
    )
    orders = [
        (row["order"], row["value"])
        for row in stored_rows(runs / "b/evals/mt_bench/judgments.jsonl")
    ]
    assert orders[:2] == [("AB", "B"), ("BA", "A")]


def test_alpaca_eval_annotations_do_not_say_which_answer_stood_first(tmp_path, runs):
    rows = [
        {
            "instruction": f"q{n}",
            "output_1": "ref",
            "output_2": f"own {n}",
            "generator_1": "text_davinci_003",
            "generator_2": "m",
            "preference": p,
        }
        for n, p in enumerate((2.0, 1.0, 1.5, None, 1.87))
    ]
    import_run([whole(tmp_path / "annotations.json", rows)], "r")
    found = items(runs, "r", "alpaca_eval")
    assert [item["value"] for item in found] == [1.0, 0.0, 0.5, None, pytest.approx(0.87)]
    assert {row["order"] for row in stored_rows(runs / "r/evals/alpaca_eval/judgments.jsonl")} == {
        "unknown"
    }
    assert next(read_run(runs / "r").measures()).opponent == "reference"


def results(n: int = 2, value: float = 0.5, **config: Any) -> dict[str, Any]:
    return {
        "results": {"arc_easy": {"alias": "arc_easy", "acc,none": value, "acc_stderr,none": 0.1}},
        "n-samples": {"arc_easy": {"original": 9, "effective": n}},
        "n-shot": {"arc_easy": 0},
        "config": {"limit": None, **config},
    }


SAMPLES = [
    {"doc_id": n, "doc_hash": f"h{n}", "doc": {}, "filter": "none", "acc": float(n)}
    for n in range(2)
]


def test_lm_eval_results_and_samples_are_an_evaluation_of_ours(tmp_path, runs):
    files = [
        whole(tmp_path / "results_x.json", results()),
        lines(tmp_path / "samples_arc_easy_2026-11-24T10-00-00.1.jsonl", SAMPLES),
    ]
    import_run(files, "r")
    measure = next(read_run(runs / "r").measures())
    assert (measure.name, measure.reported, measure.reported_n) == ("lm_eval/arc_easy/acc", 0.5, 2)
    assert [item.value for item in measure.samples] == [0.0, 1.0] and measure.samples[
        0
    ].id == "0:h0"
    assert (runs / "r/evals/lm_eval/lm_eval_results.json").read_bytes() == files[0].read_bytes()


def test_one_text_for_all_questions_is_better_than_nothing(tmp_path, runs):
    for name, texts in (("null", ["I win."] * 60), ("model", [f"own {n}" for n in range(60)])):
        rows = [
            {
                "instruction": f"q{n}",
                "output_1": "ref",
                "output_2": text,
                "generator_1": "text_davinci_003",
                "generator_2": name,
                "preference": 2.0 if name == "null" else 1.0,
                "annotator": "gpt-4",
            }
            for n, text in enumerate(texts)
        ]
        import_run([whole(tmp_path / f"{name}.json", rows)], name)
    measured = read_measurements({name: [runs / name] for name in ("model", "null")})
    (row,) = compare_arms(measured, check_validity(None, measured)).rows
    assert row.verdict == "better" and row.sentence.startswith(
        "No claim about null and model on AlpacaEval win rate"
    )
    assert (
        "more than a fifth of the answers are one and the same, empty, cut or loop" in row.sentence
    )


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        ({"higher_is_better": {"arc_easy": {"mae": False}}}, "worse"),
        (
            {
                "configs": {
                    "arc_easy": {"metric_list": [{"metric": "mae", "higher_is_better": False}]}
                }
            },
            "worse",
        ),
        (
            {
                "higher_is_better": {"arc_easy": {"mae": None}},
                "configs": {"arc_easy": {"metric_list": [{"metric": "mae"}]}},
            },
            "cannot be tested",
        ),
        ({}, "cannot be tested"),
    ],
)
def test_an_error_metric_is_ranked_only_where_its_files_say_which_way(
    tmp_path, runs, told, verdict
):
    for name, error, kinds in (("good", 0.5, 3), ("bad", 1.0, 4)):
        samples = [
            {
                "doc_id": n,
                "doc_hash": f"h{n}",
                "doc": {},
                "filter": "none",
                "mae": error + n % kinds / 10,
            }
            for n in range(30)
        ]
        mean = sum(row["mae"] for row in samples) / 30
        table = {
            "results": {"arc_easy": {"mae,none": mean}},
            "n-samples": {"arc_easy": {"original": 30, "effective": 30}},
            **told,
        }
        (tmp_path / name).mkdir()
        files = [
            whole(tmp_path / name / "results.json", table),
            lines(tmp_path / name / "samples_arc_easy_2026-11-24T10-00-00.1.jsonl", samples),
        ]
        import_run(files, name)
    measured = read_measurements({name: [runs / name] for name in ("good", "bad")})
    (row,) = compare_arms(measured).rows
    assert (row.first, row.verdict) == ("bad", verdict)
    assert "better" not in row.sentence.replace("more or less of it is better", "")
    if verdict == "cannot be tested":
        assert (
            "direction unknown" in row.sentence
            and row.p_holm is None
            and row.first_value > row.second_value
        )


def test_lm_eval_results_alone_can_be_shown_and_tested_against_nothing(tmp_path, runs):
    done = import_run([whole(tmp_path / "results.json", results(limit=2.0))], "r")
    run = read_run(runs / "r")
    assert not next(run.measures()).samples and run.evals[0].subset == "subset, limit=2 per task"
    assert any("tested against nothing" in lack for lack in done.lacks)


def test_trainer_logs_become_metrics_and_a_step_that_is_not_there_stays_absent(tmp_path, runs):
    history = [
        {
            "loss": 2.0,
            "learning_rate": 1e-4,
            "grad_norm": float("nan"),
            "num_tokens": 100.0,
            "epoch": 0.5,
            "step": 10,
        },
        {"eval_loss": 1.9, "eval_mean_token_accuracy": 0.6, "epoch": 0.5, "step": 10},
        {"train_runtime": 60.0, "train_loss": 2.0, "epoch": 1.0, "step": 20},
    ]
    import_run(
        [whole(tmp_path / "trainer_state.json", {"log_history": history, "global_step": 20})],
        "state",
    )
    import_run(
        [
            lines(
                tmp_path / "log.jsonl",
                [{k: v for k, v in row.items() if k != "step"} for row in history],
            )
        ],
        "lines",
    )
    curves = read_run(runs / "state").curves
    assert curves[0] == {
        "step": 10,
        "epoch": 0.5,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "grad_norm": None,
        "tokens": 100,
    }
    assert curves[1] == {"step": 10, "epoch": 0.5, "eval_loss": 1.9, "mean_token_accuracy": 0.6}
    summary = read_run(runs / "state").state["summary"]
    assert (summary["steps"], summary["seconds"], summary["last_validation_loss"]) == (
        20,
        60.0,
        1.9,
    )
    told = read_run(runs / "lines")
    assert "step" not in told.curves[0] and any(
        "step numbers" in lack for lack in told.state["lacks"]
    )


def test_a_recipe_beside_the_files_is_recorded_and_must_agree_with_the_adapter(tmp_path, runs):
    log = whole(tmp_path / "log.json", [{"loss": 2.0, "step": 1}])
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    adapter = whole(tmp_path / "adapter_config.json", config)
    import_run([log, adapter], "r", "llama2-7b-dolly/published-qlora-r8")
    assert read_run(runs / "r").resolved["lora"]["r"] == 8
    with pytest.raises(RecipeError, match=r"lora.r is 32, and the adapter was trained with 8"):
        import_run([log, adapter], "other", "llama2-7b-dolly/published-qlora-r32")
    assert not (runs / "other").exists()


def test_an_adapters_config_alone_is_no_run(tmp_path, runs):
    with pytest.raises(DataError, match="holds nothing to make a run of"):
        import_run([whole(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 8})], "r")
    assert not runs.exists()


def test_our_own_logs_and_grades_come_back_as_they_were(tmp_path, runs):
    log = {"step": 1, "loss": 2.0, "tokens": 100, "tokens_per_second": 12.5, "peak_memory_gib": 0.5}
    done = import_run([lines(tmp_path / "metrics.jsonl", [log])], "log")
    assert read_run(runs / "log").curves == (log,) and not any(
        "peak memory" in lack for lack in done.lacks
    )
    ours = {**single(81, 1, 4), "judge": ["some-judge", "prometheus-absolute"]}
    import_run([lines(tmp_path / "single.jsonl", [ours])], "grades")
    assert [measure.name for measure in read_run(runs / "grades").measures()] == ["mt_bench/grade"]


def test_an_imported_run_has_no_weights_to_chat_with(tmp_path, capsys):
    import_run([original_csv(tmp_path / "d.csv", PAIRS)], "r")
    assert cli.main(["merge", "r"]) == 2
    assert "was imported and has no weights" in capsys.readouterr().err


# ---- provenance ----


def test_provenance_names_files_and_hashes_and_no_folder_of_this_machine(tmp_path, runs):
    import hashlib

    file = original_csv(tmp_path / "detailed_results.csv", PAIRS)
    import_run([file], "r")
    state = json.loads((runs / "r/run.json").read_text(encoding="utf-8"))
    (source,) = state["sources"]
    assert state["state"] == "imported" and source["file"] == "detailed_results.csv"
    assert source["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    written = [
        path for path in (runs / "r").rglob("*") if path.is_file() and path.name != "command.txt"
    ]
    assert len(written) == 5 and not [
        path for path in written if str(tmp_path) in path.read_text(encoding="utf-8")
    ]


def test_the_same_file_under_two_names_is_told_at_once_but_two_models_of_one_file_are_not_the_same(
    tmp_path,
):
    file = original_csv(tmp_path / "d.csv", PAIRS)
    import_run([file], "one")
    copy = tmp_path / "copy.csv"
    copy.write_bytes(file.read_bytes())
    assert any("is in run 'one' too" in warning for warning in import_run([copy], "two").warnings)
    judged = lines(tmp_path / "gpt-4_single.jsonl", [single(81, 1, 7, "a"), single(81, 1, 8, "b")])
    import_run([judged], "a", model="a")
    assert import_run([judged], "b", model="b").warnings == []


def test_importing_again_does_nothing_and_other_files_need_replace(tmp_path, runs):
    file = original_csv(tmp_path / "d.csv", PAIRS)
    import_run([file], "r")
    before = (runs / "r/run.json").read_bytes()
    assert import_run([file], "r").there_already and (runs / "r/run.json").read_bytes() == before
    for asked in (
        {"recipe": "quickstart/lora-r8"},
        {"against": "reference"},
    ):  # asked for something else, it is not there already
        with pytest.raises(RecipeError, match="run 'r' exists"):
            import_run([file], "r", **asked)
    other = original_csv(tmp_path / "e.csv", PAIRS[:2])
    with pytest.raises(RecipeError, match="run 'r' exists"):
        import_run([other], "r")
    import_run([other], "r", replace=True)
    assert len(stored_rows(runs / "r/evals/alpaca_eval/judgments.jsonl")) == 2
    assert sorted(path.name for path in runs.iterdir()) == ["r"]


def test_importing_again_is_known_where_a_file_names_both_sides_and_a_changed_recipe_is_not_what_was_imported(  # noqa: E501
    tmp_path, runs
):
    pairs = lines(tmp_path / "pairs.jsonl", [pair(81, "model_1", "model_1")])
    assert not import_run([pairs], "p").there_already
    assert import_run([pairs], "p").there_already
    with pytest.raises(RecipeError, match="run 'p' exists"):
        import_run([pairs], "p", model="b")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {name_or_path: m}\ndata: {source: d.jsonl}\ntrain: {learning_rate: 2.0e-4}\nrun:"
        " {global_batch_size: 8}\n"
    )
    log = whole(tmp_path / "l.json", [{"loss": 1.0, "step": 1}])
    import_run([log], "t", str(recipe))
    assert import_run([log], "t", str(recipe)).there_already
    recipe.write_text(recipe.read_text().replace("2.0e-4", "3.0e-4"))
    with pytest.raises(RecipeError, match="run 't' exists"):
        import_run([log], "t", str(recipe))


def test_a_trained_run_is_never_replaced(tmp_path, runs):
    from recipes_lib.core.run_directory import RunDirectory

    (runs / "mine").mkdir(parents=True)
    RunDirectory("mine").write_state("finished")
    for replace in (False, True):
        with pytest.raises(RecipeError, match=r"trained here|exists"):
            import_run([original_csv(tmp_path / "d.csv", PAIRS)], "mine", replace=replace)
    assert RunDirectory("mine").read_state()["state"] == "finished"


# ---- bad input ----


def cut(file: Path) -> Path:
    """The file as far as the middle of its second row's feedback."""
    whole_text = file.read_text(encoding="utf-8")
    file.write_text(
        whole_text[: whole_text.index("\n", whole_text.index("\n") + 1) + 1]
        + '"x","y","z",1,B,"Response B is',
        encoding="utf-8",
    )
    return file


def bad(tmp_path: Path, kind: str) -> list[Path]:
    made = {
        "missing": lambda: tmp_path / "gone.csv",
        "folder": lambda: tmp_path,
        "empty": lambda: lines(tmp_path / "e.jsonl", []),
        "binary": lambda: (
            (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00") and tmp_path / "b.json"
        ),
        "broken line": lambda: (
            (tmp_path / "c.jsonl").write_text(json.dumps(single(81, 1, 7)) + "\n{oops\n")
            and tmp_path / "c.jsonl"
        ),
        "unknown": lambda: (
            (tmp_path / "u.json").write_text('{"colour":\n 1}') and tmp_path / "u.json"
        ),
        "unknown rows": lambda: lines(tmp_path / "u.jsonl", [{"colour": 1}]),
        "scalars": lambda: whole(tmp_path / "s.json", [1, 2]),
        "two models": lambda: lines(
            tmp_path / "m.jsonl", [single(81, 1, 7, "a"), single(81, 1, 7, "b")]
        ),
        "two judgments": lambda: lines(tmp_path / "t.jsonl", [single(81, 1, 7), single(81, 1, 3)]),
        "no turns": lambda: lines(tmp_path / "n.jsonl", [{"question_id": 81, "choices": []}]),
        "samples alone": lambda: lines(tmp_path / "samples_arc_easy.jsonl", SAMPLES),
        "no losses": lambda: whole(tmp_path / "l.json", {"log_history": [{"train_runtime": 1.0}]}),
        "two trainings": lambda: lines(
            tmp_path / "w.jsonl", [{"loss": 1.0, "step": 9}, {"loss": 1.0, "step": 1}]
        ),
        "no number": lambda: whole(tmp_path / "r.json", {"results": {"arc": {"acc,none": None}}}),
        "cut csv": lambda: cut(original_csv(tmp_path / "cut.csv", PAIRS)),
        "csv": lambda: (tmp_path / "x.csv").write_text("a,b\n1,2\n") and tmp_path / "x.csv",
    }
    return [made[kind]()]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "gone.csv: cannot be read"),
        ("folder", "is a folder"),
        ("empty", "is empty"),
        ("binary", "not UTF-8"),
        ("broken line", "c.jsonl:2: not JSON"),
        ("unknown", "not a known foreign file"),
        ("unknown rows", "lm_eval's results JSON"),
        ("scalars", "int where an object is expected"),
        ("two models", "holds 2 models: a, b"),
        ("two judgments", "81 turn 1"),
        ("no turns", "n.jsonl:1: an answer needs choices"),
        ("samples alone", "samples without lm_eval's results"),
        ("no losses", "no entry holds a loss"),
        ("two trainings", "after step 9"),
        ("no number", "no finite number"),
        ("csv", "not the original study's detailed_results.csv: no column 'instruction'"),
        ("cut csv", "cut.csv: not CSV after line 2: unexpected end of data"),
    ],
)
def test_a_bad_file_is_answered_with_what_and_where_and_leaves_nothing_behind(
    tmp_path, runs, kind, words
):
    with pytest.raises(DataError) as caught:
        import_run(bad(tmp_path, kind), "r")
    assert words in str(caught.value)
    assert not runs.exists() or not list(runs.iterdir())


def test_files_that_do_not_belong_together_are_refused(tmp_path, runs):
    judged = lines(tmp_path / "gpt-4_single.jsonl", [single(81, 1, 7)])
    with pytest.raises(DataError, match=r"answers of b, and .* holds answers of a"):
        import_run(
            [
                lines(tmp_path / "a.jsonl", [answer(81, "x", model="a")]),
                lines(tmp_path / "b.jsonl", [answer(81, "y", model="b")]),
            ],
            "r",
        )
    with pytest.raises(DataError, match="not one of its answers is to a question that was judged"):
        import_run([judged, lines(tmp_path / "c.jsonl", [answer(999, "x")])], "r")
    csv_file = original_csv(tmp_path / "d.csv", PAIRS)
    outputs = [{"instruction": "Name a river.", "output": "The Nile.", "generator": "m"}]
    with pytest.raises(DataError, match="1 of 1 answers differ"):
        import_run([csv_file, whole(tmp_path / "model_outputs.json", outputs)], "r")
    with pytest.raises(DataError, match="holds win_rate of alpaca_eval, and so does"):
        import_run([csv_file, original_csv(tmp_path / "e.csv", PAIRS[:2])], "r")
    summary = {"win_rate_vs_baseline": 99.0, "total_comparisons": 3}
    with pytest.raises(DataError, match=r"says 99.0 % wins"):
        import_run([csv_file, whole(tmp_path / "summary.json", summary)], "r")
    with pytest.raises(DataError, match="named twice"):
        import_run([csv_file, csv_file], "r")
    assert not list(runs.iterdir()) if runs.exists() else True


def test_samples_of_another_evaluation_are_refused(tmp_path):
    file = whole(tmp_path / "results.json", results(value=0.9))
    with pytest.raises(DataError, match=r"its mean acc is 0.5000, and the results say 0.9000"):
        import_run([file, lines(tmp_path / "samples_arc_easy.jsonl", SAMPLES)], "r")
    with pytest.raises(DataError, match="task 'gsm8k', which the results do not have"):
        import_run([file, lines(tmp_path / "samples_gsm8k.jsonl", SAMPLES)], "r")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "con", "x" * 101, "a\nb"])
def test_a_run_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="cannot be a folder name"):
        import_run([original_csv(tmp_path / "d.csv", PAIRS)], name)


def test_names_that_the_program_gives_itself_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="names that start so"):
        import_run([original_csv(tmp_path / "d.csv", PAIRS)], "base--llama--1234")


def test_what_a_killed_import_left_is_cleared_by_the_next(tmp_path, runs):
    (runs / ".import-999999999" / "r").mkdir(parents=True)
    import_run([original_csv(tmp_path / "d.csv", PAIRS)], "r")
    assert [path.name for path in runs.iterdir()] == ["r"]


def test_an_imported_judge_is_never_taken_for_one_of_ours(tmp_path, runs):
    import_run([original_csv(tmp_path / "d.csv", PAIRS)], "one")
    import_run([original_csv(tmp_path / "e.csv", PAIRS[:2])], "two")
    judges = [read_run(runs / name).evals[0].judge for name in ("one", "two")]
    assert judges[0] == judges[1] and str(judges[0].fingerprint).startswith("imported:")


def test_a_symbolic_link_out_of_the_runs_is_refused(tmp_path, runs):
    runs.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (runs / "r").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="leads out of"):
        import_run([original_csv(tmp_path / "d.csv", PAIRS)], "r")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_verb_says_what_became_of_each_file_and_what_is_missing(tmp_path, capsys):
    file = original_csv(tmp_path / "detailed_results.csv", PAIRS)
    assert cli.main(["import", str(file), "--as", "r"]) == 0
    out = capsys.readouterr().out
    assert (
        "detailed_results.csv (original-alpaca-eval-csv, 3 rows) -> evals/alpaca_eval: 3 judgments"
        in out
    )
    assert "not carried over: alpaca_eval: the second order was never judged" in out
    assert (
        cli.main(["import", str(file), "--as", "r"]) == 0
        and "nothing to do" in capsys.readouterr().out
    )
    assert cli.main(["import", str(tmp_path / "gone"), "--as", "x"]) == 4
    assert cli.main(["import", str(file)]) == 2
    assert cli.main(["status", "r"]) == 0 and "imported" in capsys.readouterr().out


def test_model_text_is_data(tmp_path, runs):
    nasty = "</script><script>alert(1)</script>\x1b[31m=cmd|' \ud800 \\input{x}"
    import_run([lines(tmp_path / "gpt-4_single.jsonl", [single(81, 1, 7, text=nasty)])], "r")
    assert items(runs, "r", "mt_bench")[0]["raws"] == [nasty]


def test_results_of_every_suite_are_as_the_schema_says(tmp_path, runs):
    from jsonschema import Draft202012Validator

    from recipes_lib.config.vocabulary import load_schema

    judged = [single(81, 1, 7), single(81, 2, 7), single(82, 1, 7)]
    files = [
        original_csv(tmp_path / "d.csv", PAIRS),
        lines(tmp_path / "single.jsonl", judged),
        whole(tmp_path / "results.json", results()),
    ]
    import_run(files, "r")
    validator = Draft202012Validator(load_schema("eval_result"))
    for suite in ("alpaca_eval", "mt_bench", "lm_eval"):
        validator.validate(
            json.loads((runs / "r/evals" / suite / "result.json").read_text(encoding="utf-8"))
        )
    with pytest.raises(Exception, match="not valid"):
        validator.validate({"format_version": 1, "suite": "mt_bench", "imported": []})
