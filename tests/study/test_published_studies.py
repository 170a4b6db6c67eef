"""The original study's own files, imported, through the whole of validity, claims and report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recipes_lib import cli
from recipes_lib.compare.claims import Comparison, compare_arms
from recipes_lib.compare.design import Study, load_study
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.measurements import Measurements, read_measurements, read_run
from recipes_lib.compare.validity import check_validity
from recipes_lib.foreign.run import import_run
from recipes_lib.study.arms import run_names
from recipes_lib.study.steps import report_inputs

RECIPES = "llama2-7b-dolly/published-"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A runs root with the original study imported as the headers of the published studies say."""
    root, study = tmp_path_factory.mktemp("original") / "runs", shared_data / "original_study"
    before = os.environ.get("RECIPES_RUNS_ROOT")
    os.environ["RECIPES_RUNS_ROOT"] = str(root)
    try:
        judged = study / "alpaca_eval_rank_8"
        (base,), (tuned,) = (
            list((study / "mt_bench").glob(f"*{name}_raw.jsonl")) for name in ("Base", "Finetuned")
        )
        import_run([*sorted((judged / "baseline").iterdir()), base], "original-base")
        training = sorted((study / "training").glob("rank_8*"))
        lm_eval = list((study / "lm_eval").iterdir())
        import_run(
            [*sorted((judged / "finetuned").iterdir()), tuned, *lm_eval, *training],
            "original-r8",
            f"{RECIPES}qlora-r8",
        )
        import_run(
            [study / "training/ddp_qlora_training_logs.json"],
            "original-ddp-qlora-r32",
            f"{RECIPES}ddp-qlora-r32",
        )
        import_run(
            [study / "training/fsdp_metrics.derived.jsonl"],
            "original-fsdp-bf16-r32",
            f"{RECIPES}fsdp-bf16-r32",
        )
        import_run([tuned], "original-mt-bench-r32")
    finally:
        os.environ.pop("RECIPES_RUNS_ROOT") if before is None else os.environ.update(
            RECIPES_RUNS_ROOT=before
        )
    return root


@pytest.fixture(autouse=True)
def root(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(runs))


def measured(study: Study, runs: Path) -> Measurements:
    return read_measurements(
        {arm: [runs / name for name in names] for arm, names in run_names(study).items()}
    )


def examined(name: str, runs: Path) -> tuple[Study, list[Finding], Comparison]:
    study = load_study(name)
    measurements = measured(study, runs)
    findings = check_validity(study, measurements)
    return study, findings, compare_arms(measurements, findings, study)


def of_code(findings: list[Finding], code: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.code == code)
    return finding


@pytest.mark.parametrize(
    ("run", "win", "loss", "tie", "unparsed", "score"),
    [
        ("original-base", 79.0, 14.75, 6.25, 27, 4.0925),
        ("original-r8", 85.0, 9.875, 5.125, 9, 4.205),
    ],
)
def test_imported_judgments_give_the_published_numbers_and_keep_what_was_no_verdict_apart(
    runs, run, win, loss, tie, unparsed, score
):
    (report,) = json.loads((runs / run / "evals/alpaca_eval/result.json").read_text())["replays"]
    recorded = report["recorded"]
    assert [recorded[name] for name in ("win", "loss", "tie", "mean_score")] == pytest.approx(
        [win, loss, tie, score]
    )
    measure = next(
        measure for measure in read_run(runs / run).measures() if measure.metric == "win_rate"
    )
    outcomes = [item.outcome for item in measure.samples]
    counts = [outcomes.count(name) for name in ("win", "loss", "tie", "unresolved")]
    assert counts == [8 * win, 8 * loss, 8 * tie - unparsed, unparsed]
    assert all(len(item.verdicts) == 1 for item in measure.samples)


def test_the_missing_turn_stays_missing(runs):
    for run, missing in (("original-base", ("131", 1)), ("original-r8", ("86", 2))):
        measure = next(
            measure for measure in read_run(runs / run).measures() if measure.suite == "mt_bench"
        )
        assert len(measure.samples) == 159 and missing not in {item.key for item in measure.samples}
        assert sum(item.value or 0 for item in measure.samples) / 159 == pytest.approx(
            {"131": 2.786, "86": 3.013}[missing[0]], abs=0.03
        )


def test_every_difference_of_the_rank_recipes_is_a_confound(runs):
    study, findings, _ = examined("published-lora-rank", runs)
    values = {name: study.arm(name).resolved() for name in ("r8", "r32")}
    differing = {
        key
        for key in values["r8"].keys() | values["r32"].keys()
        if values["r8"].get(key) != values["r32"].get(key)
    }
    confound = of_code(findings, "confound")
    listed = {line.partition(":")[0] for line in confound.evidence}
    assert confound.severity == "error" and confound.arms == ("r8", "r32")
    assert listed == differing - {"lora.r", "lora.lora_alpha"}
    assert {"train.learning_rate", "data.split.test", "train.train_sampling_strategy"} <= listed
    assert "train.learning_rate: r8 0.0002, r32 0.0001" in confound.evidence


def test_what_was_wrong_with_the_original_judging_is_found(runs):
    _, findings, _ = examined("published-lora-rank", runs)
    contradictions = of_code(findings, "contradictory-verdicts")
    assert contradictions.severity == "error"
    rates = [float(line.split("own words ")[1].split(",")[0]) for line in contradictions.evidence]
    assert len(rates) == 2 and all(0.55 <= rate <= 0.72 for rate in rates)
    ties = of_code(findings, "unparsed-as-tie")
    assert ["27 judgments" in ties.evidence[0], "9 judgments" in ties.evidence[1]] == [True, True]
    missing = [finding for finding in findings if finding.code == "missing-turn"]
    assert {finding.arms for finding in missing} == {
        ("base",),
        ("r8",),
    } and "question 131 turn 1" in missing[0].title
    assert {
        "one-order-judging",
        "turn-without-context",
        "empty-answer-wins",
        "subset",
        "imported",
    } <= {finding.code for finding in findings}


def test_rank_32_has_published_numbers_alone_and_no_claim_is_made_about_it(runs):
    _, findings, comparison = examined("published-lora-rank", runs)
    assert {finding.arms for finding in findings if finding.code == "published-only"} == {
        ("r32",),
        ("base-r32-job",),
    }
    rows = [row for row in comparison.rows if "r32" in row.arms]
    assert rows and {row.verdict for row in rows} == {"cannot be tested"}
    assert any(
        row.metric == "alpaca_eval/win_rate" and "83.8%" in str(row.published_first) for row in rows
    )
    said = " ".join(comparison.answer)
    assert " better " not in said.replace("better on", "") and "cannot be" in said


def test_published_numbers_are_compared_with_published_numbers(runs):
    _, _, comparison = examined("published-lora-rank", runs)
    (wins,) = (
        row
        for row in comparison.rows
        if set(row.arms) == {"r32", "r8"} and row.metric == "alpaca_eval/win_rate"
    )
    assert (wins.first_value, wins.second_value) == pytest.approx(
        (0.8375, 0.85)
    )  # ours of r8 counts ties as half a win
    (mmlu,) = (
        row
        for row in [row for row in comparison.rows if set(row.arms) == {"r8", "base"}]
        if row.metric == "lm_eval/mmlu/acc"
    )
    assert (mmlu.first_value, mmlu.second_value, mmlu.verdict) == (
        0.4127,
        0.4084,
        "cannot be tested",
    )


def test_hardware_and_checkpointing_that_no_recipe_can_say_are_confounds(runs):
    _, findings, _ = examined("published-lora-rank", runs)
    hardware = of_code(findings, "confound-published")
    assert (
        hardware.arms == ("r8", "r32")
        and "A100-40" in hardware.evidence[0]
        and "H100" in hardware.evidence[0]
    )
    _, findings, comparison = examined("published-ddp-vs-fsdp", runs)
    assert "activation checkpointing" in of_code(findings, "confound-published").title
    assert "strategy is confounded with precision" in comparison.answer[-1]


def test_one_total_time_of_each_strategy_is_no_test_of_their_speed(runs):
    _, _, comparison = examined("published-ddp-vs-fsdp", runs)
    (row,) = comparison.rows
    assert row.metric == "training_speed" and row.verdict == "cannot be tested"
    assert "(8,777 s) and original-ddp-qlora-r32 (2,877 s) is known" in row.sentence
    assert row.sentence in comparison.answer


def test_what_was_published_of_an_arm_that_is_trained_here_is_no_confound(runs):
    _, findings, _ = examined("lora-rank", runs)
    assert "confound-published" not in {finding.code for finding in findings}


def test_no_claim_rests_on_the_original_judgments(runs):
    _, _, comparison = examined("published-lora-rank", runs)
    judged = [
        row
        for row in [row for row in comparison.rows if set(row.arms) == {"r8", "base"}]
        if row.metric.startswith("alpaca_eval")
    ]
    assert len(judged) == 2 and all(
        row.sentence.startswith("No claim about") and row.stopped for row in judged
    )


def test_strategy_is_confounded_with_precision(runs):
    study, findings, _ = examined("published-ddp-vs-fsdp", runs)
    confounded = of_code(findings, "confound-factors")
    assert (
        confounded.severity == "error"
        and "strategy is confounded with precision" in confounded.title
    )
    lines = "\n".join((*confounded.evidence, *of_code(findings, "confound").evidence))
    values = [study.arm(name).resolved() for name in ("ddp-qlora", "fsdp-bf16")]
    for key in values[0].keys() | values[1].keys():
        if values[0].get(key) != values[1].get(key):
            assert f"{key}:" in lines, key
    assert "train.optim: ddp-qlora paged_adamw_32bit, fsdp-bf16 adamw_torch" in lines
    assert len(of_code(findings, "missing-cell").evidence) == 2
    loss = of_code(findings, "loss-in-other-precision")
    assert (
        loss.metrics == ("validation_loss",)
        and "quantization: ddp-qlora 4 bit, fsdp-bf16 none" in loss.evidence
    )


def test_the_imported_logs_are_the_published_training(runs):
    ddp, fsdp = (read_run(runs / f"original-{name}") for name in ("ddp-qlora-r32", "fsdp-bf16-r32"))
    assert (ddp.state["summary"]["steps"], round(ddp.state["summary"]["seconds"], 1)) == (
        564,
        2877.4,
    )
    assert (
        round(fsdp.state["summary"]["seconds"], 1) == 8776.9
        and fsdp.state["summary"]["steps"] is None
    )
    last = [
        round(next(line["eval_loss"] for line in reversed(run.curves) if "eval_loss" in line), 3)
        for run in (ddp, fsdp)
    ]
    assert last == [1.308, 1.296]


def test_one_mt_bench_file_under_two_names_is_an_error(runs):
    measurements = read_measurements(
        {"r8": [runs / "original-r8"], "r32": [runs / "original-mt-bench-r32"]}
    )
    findings = check_validity(None, measurements)
    same = of_code(findings, "identical-imported-file")
    assert (
        same.severity == "error"
        and same.arms == ("r8", "r32")
        and same.metrics == ("mt_bench/grade",)
    )
    (row,) = compare_arms(measurements, findings).rows
    assert row.verdict == "cannot be tested" and "same file" in row.sentence


def test_real_annotations_give_the_leaderboards_win_rate(runs, shared_data):
    import_run([*(shared_data / "alpaca_eval/llama-2-7b-chat-hf").iterdir()], "chat", replace=True)
    values = [item.value for item in next(read_run(runs / "chat").measures()).samples]
    assert len(values) == 805 and 100 * sum(values) / 805 == pytest.approx(71.366, abs=0.001)


def test_the_same_files_imported_anew_make_no_report_stale_and_another_file_does(runs, shared_data):
    def content() -> object:
        return report_inputs(load_study("published-ddp-vs-fsdp"))[
            "content.imported run original-fsdp-bf16-r32"
        ]

    file, before = shared_data / "original_study/training/fsdp_metrics.derived.jsonl", content()
    words = ["original-fsdp-bf16-r32", f"{RECIPES}fsdp-bf16-r32"]
    import_run([file], *words, replace=True)
    assert content() == before
    import_run(
        [shared_data / "original_study/training/ddp_qlora_training_logs.json"], *words, replace=True
    )
    assert content() != before
    import_run([file], *words, replace=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "published-lora-rank",
            ["r32 against r8", "cannot be tested", "train.learning", "is imported"],
        ),
        pytest.param(
            "published-ddp-vs-fsdp",
            ["strategy is confounded with precision", "is imported"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_published_study_is_reported_end_to_end(runs, name, words):
    assert cli.main(["study", "report", name]) == 0
    page = (runs / name / "report/report.md").read_text(encoding="utf-8")
    assert "## Findings" in page and all(word in page.replace("\\", "") for word in words)


def test_the_report_names_all_ten_flaws_of_the_original_study(runs):
    _, ranks, rank_table = examined("published-lora-rank", runs)
    _, strategies, _ = examined("published-ddp-vs-fsdp", runs)
    twice = check_validity(
        None,
        read_measurements({"r8": [runs / "original-r8"], "r32": [runs / "original-mt-bench-r32"]}),
    )

    def told(findings: list[Finding], code: str, arm: str = "") -> str:
        """What the findings of a code say, those about an arm alone where one is named."""
        mine = [one for one in findings if one.code == code and (not arm or one.arms == (arm,))]
        assert mine, (code, arm)
        return "\n".join(line for one in mine for line in (one.title, *one.evidence))

    # 1. rank 8 and rank 32 have one MT-Bench file, where it is imported and where it is published
    assert "imported from the same file" in told(twice, "identical-imported-file")
    published = told(ranks, "published-only", "r32")
    assert "the judgments behind it are rank 8's file, byte for byte" in published
    # 2. verdicts against the judge's text
    assert "450 of 723 decidable" in told(ranks, "contradictory-verdicts")
    # 3. texts without a verdict as ties
    assert "27 judgments without a verdict" in told(ranks, "unparsed-as-tie")
    # 4. rank 8 above rank 32
    wins = [
        row
        for row in rank_table.rows
        if set(row.arms) == {"r8", "r32"} and row.metric == "alpaca_eval/win_rate"
    ]
    assert [row.verdict for row in wins] == ["cannot be tested"]
    assert wins[0].sentence in rank_table.answer
    # 5. six confounds: split, learning rate, order of rows, and when a checkpoint could be chosen
    # and saved; and the hardware
    keys = ("data.split.test", "train.learning_rate", "train.train_sampling_strategy")
    both = told(ranks, "confound") + told(ranks, "confound-published")
    assert all(f"{key}: r8 " in both for key in (*keys, "train.eval_steps", "train.save_steps"))
    assert "hardware: r8 an A100-40" in both
    # 6. strategy with precision
    assert "strategy is confounded with precision" in told(strategies, "confound-factors")
    # 7. the sharded run lost its model
    assert "recorded a training and has no weights" in told(strategies, "lost-weights", "fsdp-bf16")
    # 8. second turns without the first, and a turn that is missing
    assert "79 second turns were judged without" in told(ranks, "turn-without-context")
    assert "question 86 turn 2" in told(ranks, "missing-turn", "r8")
    # 9. GSM8K without examples
    assert "asked 0-shot, the task's own is 5-shot" in published
    # 10. the base again
    again = told(ranks, "published-only", "base-r32-job")
    assert "522 of its 800 verdicts are those of base" in again
