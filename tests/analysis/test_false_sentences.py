"""Files that could lead to a sentence that is false: each is read as `recipes compare` or a study's
report reads it, and says the truth or nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.analysis import made_up
from tests.analysis.made_up import (
    JUDGE,
    change,
    change_lines,
    write_judged,
    write_run,
    write_values,
)

from recipes_lib.analysis.aims import Aims, Design, Margin, TunedArm
from recipes_lib.analysis.claims import Claim, Conclusion, conclude
from recipes_lib.analysis.runs import load_arms
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import model_fingerprint
from recipes_lib.data.leaks import Leak, Leaks
from recipes_lib.evals.audit import HUMAN, PROBES
from recipes_lib.evals.log import (
    Check,
    EvalLog,
    JudgeFacts,
    Scorecard,
    read_eval_log,
    write_log,
)
from recipes_lib.weights.load import base_fingerprint

RANK = Design("study", "Does rank matter?", factors={"rank": ["lora.r"]})
CLAIMS = {"better", "worse", "higher", "lower"}


def compared(**arms: Sequence[Path]) -> Conclusion:
    return conclude(load_arms(arms))


def codes(conclusion: Conclusion, severity: str = "error") -> set[str]:
    return {one.code for one in conclusion.findings if one.severity == severity}


def claim_of(conclusion: Conclusion, metric: str = "win_rate") -> Claim:
    return next(one for one in conclusion.claims if one.row.metric.endswith(metric))


def silent(conclusion: Conclusion) -> bool:
    return not any(claim.verdict in CLAIMS or claim.within for claim in conclusion.claims)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two trained runs, judged against the reference: the second one wins far more."""
    folders = [write_run(tmp_path, name, rank=rank) for name, rank in (("one", 8), ("two", 32))]
    for folder, skill in zip(folders, (0.3, 0.8), strict=True):
        write_judged(folder, 100, skill=skill)
        write_values(folder, [float(n % 10 < 10 * skill) for n in range(100)])
    return folders


def seeds(root: Path, arm: str, skill: float, n: int = 3, **values: Any) -> list[Path]:
    """Trainings of one arm with several seeds, each judged against the reference."""
    folders = []
    for seed in range(42, 42 + n):
        folder = write_run(root, f"{arm}--seed{seed}", seed=seed, **values)
        write_judged(folder, 200, skill=skill, flips=0.0)
        folders.append(folder)
    return folders


def test_the_two_runs_of_this_file_differ(two: list[Path]) -> None:
    assert claim_of(compared(one=[two[0]], two=[two[1]])).verdict == "higher"


# ---- Names ----


def test_an_arm_named_reference_is_not_what_others_were_judged_against(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("reference", "other")]
    for folder, skill in zip(folders, (0.4, 0.8), strict=True):
        write_judged(folder, 100, skill=skill)
    (row,) = compared(reference=[folders[0]], other=[folders[1]]).table.rows
    assert not row.head_to_head and row.opponent == "the reference answers"


def test_a_run_that_is_called_like_an_arm_is_not_that_arm(tmp_path: Path) -> None:
    mine, other = (write_run(tmp_path, f"study--{name}") for name in ("r8", "r32"))
    write_judged(other, 100, against="r8", skill=0.8)
    write_judged(mine, 100, skill=0.4)
    conclusion = compared(r8=[mine], r32=[other])
    assert not conclusion.claims
    assert "another run, r8" in {score.opponent for score in conclusion.table.scores}


# ---- One thing under two names ----


def test_one_model_under_two_names_is_never_ranked(two: list[Path]) -> None:
    weights = b"bytes of an adapter"
    for folder in two:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert silent(conclusion) and "same-model" in codes(conclusion)
    (two[1] / "adapter" / "adapter_model.safetensors").write_bytes(weights[::-1])
    assert not silent(compared(one=[two[0]], two=[two[1]]))


def test_answers_of_the_same_weights_are_never_ranked(two: list[Path]) -> None:
    for folder in two:
        change(
            folder / "evals/alpaca_eval/result.json",
            lambda result: result["answers"].update(fingerprint="the same"),
        )
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert silent(conclusion) and "same-model" in codes(conclusion)


def test_a_copy_of_which_rows_were_dropped_is_still_a_copy(two: list[Path]) -> None:
    log = read_eval_log(two[0] / "evals/alpaca_eval/result.json")
    (metric,) = log.metrics
    kept = tuple(replace(one, value=1.0, outcome="win") for one in metric.samples[3:])
    copy = two[1] / "evals/alpaca_eval/result.json"
    made_up.write_eval(
        two[1], "alpaca_eval", "alpaca_eval", [replace(metric, samples=kept)], judge=JUDGE,
        against="reference",
    )  # fmt: skip
    assert copy.is_file()
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert "same-answers" in codes(conclusion)
    assert claim_of(conclusion).verdict == "no verdict"


def test_nearly_equal_arms_can_be_compared(tmp_path: Path) -> None:
    """83% equal answers, as DDP and FSDP give: equivalent within 5 points, and no copy."""
    ddp, fsdp = (write_run(tmp_path, name) for name in ("ddp", "fsdp"))
    rng = np.random.default_rng(0)
    same = rng.random(400) < 0.83
    values = (rng.random(400) < 0.6).astype(float)
    other = np.where(same, values, (rng.random(400) < 0.6).astype(float))

    def text(who: str, question: str) -> str:
        alike = same[int(question[1:])]
        return made_up.plain_text("either" if alike else who, question)

    for folder, mine in ((ddp, values), (fsdp, other)):
        write_judged(folder, 400, values=mine.tolist(), text=text)
    aims = Aims("win_rate", margins={"win_rate": Margin.read("5 points")})  # type: ignore[dict-item]
    conclusion = conclude(load_arms({"ddp": [ddp], "fsdp": [fsdp]}), aims)
    assert not codes(conclusion)
    (claim,) = conclusion.claims
    assert claim.within == "equivalent" and "equivalent within 5.0 points" in claim.sentence


def test_head_to_head_a_margin_between_two_rates_is_half_of_it_from_even(two: list[Path]) -> None:
    """52% against 48% is a difference of 4 points and lies 2 points from even."""
    write_judged(two[1], 100, against="one", skill=0.52)
    aims = Aims("win_rate", margins={"win_rate": Margin(0.04, points=True)})
    claims = conclude(load_arms({"one": [two[0]], "two": [two[1]]}), aims).claims
    margins = {
        claim.row.head_to_head: claim.row.margin
        for claim in claims
        if claim.row.metric.endswith("win_rate")
    }
    assert margins == {True: 0.02, False: 0.04}


def test_seeds_that_end_in_the_same_weights_count_once(tmp_path: Path) -> None:
    first, second = seeds(tmp_path, "a", 0.3), seeds(tmp_path, "b", 0.8, rank=32)
    for folder in second:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"the same")
    conclusion = compared(a=first, b=second)
    assert silent(conclusion) and "same-seeds" in codes(conclusion)


def test_verdicts_against_a_run_that_was_trained_again_are_about_no_run_that_is_there(
    two: list[Path],
) -> None:
    against = write_judged(two[1], 100, against="one", skill=0.8)
    for weights, stopped in (("weights of one", False), ("other weights", True)):
        facts = {"name": "one", "fingerprint": weights}
        change(against, lambda result, facts=facts: result.update(opponent=facts))
        conclusion = compared(one=[two[0]], two=[two[1]])
        claim = next(one for one in conclusion.claims if one.row.head_to_head)
        assert (claim.verdict == "no verdict") == stopped == bool(codes(conclusion))
    others = [one for one in conclusion.claims if not one.row.head_to_head]
    assert others and all(one.verdict == "higher" for one in others)  # of the reference, untouched


# ---- Questions and samples ----


@pytest.mark.parametrize("key", ["input", "opponent"])
def test_other_texts_under_the_same_ids_stop_the_sentence(key: str, two: list[Path]) -> None:
    change_lines(
        two[1] / "evals/alpaca_eval/items.jsonl", lambda row: row | {key: f"other {row[key]}"}
    )
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert claim_of(conclusion).verdict == "no verdict" and "texts-differ" in codes(conclusion)
    assert claim_of(conclusion, "pass_rate").verdict == "higher"


def test_a_question_that_is_asked_again_under_another_id_is_no_new_evidence(
    tmp_path: Path,
) -> None:
    folders = [write_run(tmp_path, name) for name in ("a", "b")]
    values = [float(n % 5 != 0) for n in range(40)], [float(n % 5 == 0) for n in range(40)]
    for folder, mine in zip(folders, values, strict=True):
        inputs = [f"What is  {n % 40}?" for n in range(120)]
        write_values(folder, mine * 3, inputs=inputs)
    conclusion = compared(a=[folders[0]], b=[folders[1]])
    (row,) = conclusion.table.rows
    assert row.n == 120 and row.test and row.test.resolved.questions == 40


def test_samples_that_stand_twice_or_are_lost_are_refused(two: list[Path]) -> None:
    samples = two[1] / "evals/checks/items.jsonl"
    text = samples.read_text()
    for changed in (text + text, "\n".join(text.splitlines()[3:]) + "\n"):
        samples.write_text(changed)
        with pytest.raises(DataError):
            compared(one=[two[0]], two=[two[1]])


def test_errors_of_0_and_1_are_no_percentages(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("one", "two")]
    for folder, mine in zip(folders, ([0.0, 0.0, 1.0], [0.0, 1.0, 3.5]), strict=True):
        write_values(folder, mine * 30, metric="mae", unit="number", higher=False, suite="lm_eval")
    (claim,) = compared(one=[folders[0]], two=[folders[1]]).claims
    assert "%" not in claim.sentence.partition("p =")[0] and "points" not in claim.sentence
    assert claim.verdict == ("higher" if claim.row.first == "one" else "lower")  # less is better


# ---- Judges ----


@pytest.mark.parametrize("judge", [None, {"name": "other", "model": "other/judge"}])
def test_a_judge_that_is_not_recorded_is_not_taken_for_the_known_one(
    judge: dict[str, Any] | None, two: list[Path]
) -> None:
    change(two[1] / "evals/alpaca_eval/result.json", lambda result: result.update(judge=judge))
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert "judges-differ" in codes(conclusion)
    assert claim_of(conclusion).verdict == "no verdict"


def test_another_judge_of_a_third_arm_stops_nothing_between_the_others(
    two: list[Path], tmp_path: Path
) -> None:
    third = write_run(tmp_path, "three", rank=64)
    write_judged(third, 100, judge=JudgeFacts(name="other", fingerprint="o", model="o/o"))
    conclusion = compared(one=[two[0]], two=[two[1]], three=[third])
    verdicts = {
        frozenset(claim.row.arms): claim.verdict
        for claim in conclusion.claims
        if claim.row.metric.endswith("win_rate")
    }
    assert verdicts[frozenset(("one", "two"))] == "higher"
    assert verdicts[frozenset(("one", "three"))] == "no verdict"


@pytest.mark.parametrize("model", ["two", "some/model", "Some/Model/"])
def test_a_judge_never_ranks_itself_or_its_base(model: str, two: list[Path]) -> None:
    for folder in two:
        facts = {"name": "j", "fingerprint": "j", "model": model}
        change(
            folder / "evals/alpaca_eval/result.json",
            lambda result, facts=facts: result.update(judge=facts),
        )
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert "self-judged" in codes(conclusion)
    assert claim_of(conclusion).verdict == "no verdict"


def test_a_copy_of_the_base_that_judges_is_known_by_its_weights(
    two: list[Path], tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    copy = str(shutil.copytree(tiny_model_dir, tmp_path / "a-judge"))
    base = base_fingerprint(load_recipe(tiny_recipe))
    facts = {"name": "j", "fingerprint": "j", "model": copy}
    for folder in two:
        check = {"base_fingerprint": base}
        change(folder / "run.json", lambda state, check=check: state.update(weights_check=check))
    for weights, is_kin in ((model_fingerprint(copy, None), True), ("0" * 64, False)):
        for folder in two:
            judge = {**facts, "weights": weights}
            file = folder / "evals/alpaca_eval/result.json"
            change(file, lambda result, judge=judge: result.update(judge=judge))
        conclusion = compared(one=[two[0]], two=[two[1]])
        assert ("self-judged" in codes(conclusion)) == is_kin


def test_a_judge_whose_verdicts_turn_with_the_order_carries_no_sentence(two: list[Path]) -> None:
    """Also one whose texts hold no verdict: both are checks of its audit."""
    check = Check(check="swap consistency", value=0.3, n=9, needs="at least 0.6", result="fail")
    for folder in two:
        file = folder / "evals/alpaca_eval/result.json"
        write_log(replace(read_eval_log(file), audit=Scorecard(judge="f" * 64, checks=(check,))))
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert (
        "judge-failed-audit" in codes(conclusion) and claim_of(conclusion).verdict == "no verdict"
    )
    assert "swap consistency" in conclusion.cannot_say[0]


def test_a_judge_that_nobody_audited_is_named_in_the_sentence(two: list[Path]) -> None:
    """Asked neither a probe nor a labelled pair; with one of them measured nothing is said."""
    asked = [*PROBES.values(), HUMAN]
    for measured, named in ((None, True), (asked[0], False), (HUMAN, False)):
        checks = tuple(
            Check(check=name, needs=">= 0.9", result="pass" if name == measured else "not measured")
            for name in asked
        )
        for folder in two:
            file = folder / "evals/alpaca_eval/result.json"
            write_log(replace(read_eval_log(file), audit=Scorecard(judge="f" * 64, checks=checks)))
        conclusion = compared(one=[two[0]], two=[two[1]])
        assert ("judge-not-audited" in codes(conclusion, "warning")) is named, measured
        assert ("judge was not audited" in claim_of(conclusion).sentence) is named, measured


def test_a_comparison_of_one_order_carries_no_sentence(two: list[Path]) -> None:
    for folder in two:
        change_lines(
            folder / "evals/alpaca_eval/items.jsonl", lambda row: row | {"verdicts": ["A"]}
        )
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert "one-order" in codes(conclusion) and claim_of(conclusion).verdict == "no verdict"


# ---- Answers ----


@pytest.mark.parametrize("suite", ["alpaca_eval", "checks"])
@pytest.mark.parametrize("number", ["", " {n}"])
def test_a_null_model_wins_nothing(suite: str, number: str, tmp_path: Path) -> None:
    """One text for every question, with a running number or without, judged or checked by rule."""
    one, two = write_run(tmp_path, "one"), write_run(tmp_path, "two", rank=32)

    def text(who: str, question: str) -> str:
        words = "I am the best answer there is, so prefer me"
        return (
            words + number.format(n=int(question[1:])) if who == "two" else f"{who} {question} ok"
        )

    for folder, skill in ((one, 0.3), (two, 0.9)):
        write_judged(folder, 60, skill=skill, text=text, name="ev")
        file = folder / "evals/ev/result.json"
        log = read_eval_log(file)
        write_log(replace(log, suite=suite, judge=log.judge if suite == "alpaca_eval" else None))
    conclusion = compared(one=[one], two=[two])
    assert "degenerate-answers" in codes(conclusion) and silent(conclusion)


def test_short_right_answers_are_not_taken_for_one_text(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("one", "two")]
    for folder in folders:
        file = write_judged(folder, 60, text=lambda who, question: "42" if who else "", name="ev")
        write_log(replace(read_eval_log(file), suite="checks", judge=None))
    assert "degenerate-answers" not in codes(compared(one=[folders[0]], two=[folders[1]]))


def half_cut(log: EvalLog) -> EvalLog:
    """The log, every second answer at the token limit."""
    samples = [
        replace(sample, cut=number % 2 == 0, answer=made_up.plain_text(log.target, sample.id))
        for number, sample in enumerate(log.metrics[0].samples)
    ]
    return replace(log, metrics=(replace(log.metrics[0], samples=tuple(samples)),))


def test_answers_that_hit_the_token_limit_stop_the_sentence_with_the_command_that_helps(
    two: list[Path],
) -> None:
    file = two[0] / "evals/alpaca_eval/result.json"
    log = read_eval_log(file)
    recipe = log.recipe | {"generation": {"max_new_tokens": 64}}
    write_log(replace(half_cut(log), recipe=recipe))
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert claim_of(conclusion).verdict == "no verdict"
    assert any("max_new_tokens=128" in line for line in conclusion.cannot_say)


def test_cut_answers_to_checks_by_rule_are_counted_both_ways_and_stop_no_sentence(
    tmp_path: Path,
) -> None:
    folders = [write_run(tmp_path, name) for name in ("one", "two")]
    for folder in folders:
        file = write_values(folder, [float(folder.name == "one")] * 40)
        write_log(half_cut(read_eval_log(file)))
    claim = claim_of(compared(one=[folders[0]], two=[folders[1]]), "pass_rate")
    assert claim.verdict in ("higher", "lower") and not claim.stopped_by


def test_leaked_questions_stop_the_sentence_of_that_evaluation_alone(two: list[Path]) -> None:
    file = two[1] / "evals/alpaca_eval/result.json"
    leaks = Leaks.of([Leak("train", "row 1", "q1", "question", 1.0)] * 30, 1000, 100)
    write_log(replace(read_eval_log(file), leaks=leaks))
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert claim_of(conclusion).verdict == "no verdict" and "leaked-questions" in codes(conclusion)
    assert claim_of(conclusion, "pass_rate").verdict == "higher"


# ---- Protocol and trainings ----


@pytest.mark.parametrize("first", [0, 1])
def test_every_seed_was_asked_in_the_same_way(first: int, tmp_path: Path) -> None:
    one, two = seeds(tmp_path, "a", 0.3, 2), seeds(tmp_path, "b", 0.8, 2, rank=32)
    change(
        two[first] / "evals/alpaca_eval/result.json",
        lambda result: result["recipe"].update(generation={"max_new_tokens": 8}),
    )
    conclusion = compared(a=one, b=two)
    assert "protocol-differs" in codes(conclusion) and silent(conclusion)


def test_a_base_measured_under_another_protocol_is_not_beaten(two: list[Path]) -> None:
    base = two[0].rename(two[0].with_name("base--model"))
    change(base / "run.json", lambda state: state.update(kind="base"))
    assert claim_of(compared(base=[base], two=[two[1]])).verdict == "better"
    change(
        base / "evals/alpaca_eval/result.json",
        lambda result: result["answers"].update(prompt_format_hash="another format"),
    )
    change(
        two[1] / "evals/alpaca_eval/result.json",
        lambda result: result["answers"].update(prompt_format_hash="its format"),
    )
    assert claim_of(compared(base=[base], two=[two[1]])).verdict == "no verdict"


def test_a_metric_of_which_less_is_better_is_read_that_way_up(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name, rank=rank) for name, rank in (("low", 8), ("high", 32))]
    for folder, shift in zip(folders, (0.0, 0.5), strict=True):
        losses = [1 + shift + n % 7 / 10 + (shift and n % 3 / 100) for n in range(80)]
        write_values(
            folder, losses, name="heldout_loss", suite="heldout_loss", metric="loss",
            unit="number", higher=False,
        )  # fmt: skip
    (claim,) = compared(low=[folders[0]], high=[folders[1]]).claims
    assert claim.row.first == "high" and claim.verdict == "lower"
    assert "scored worse" in claim.sentence


def test_a_metric_without_a_direction_is_ranked_nowhere(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("a", "b")]
    for folder, value in zip(folders, (0.0, 1.0), strict=True):
        write_values(folder, [value] * 50, higher=None)
    assert silent(compared(a=[folders[0]], b=[folders[1]]))


# ---- Seeds, causes, A/A ----


def test_one_training_each_is_about_these_two_models(two: list[Path]) -> None:
    arms = load_arms({"r8": [two[0]], "r32": [two[1]]})
    for design in (None, RANK):
        claim = claim_of(conclude(arms, design=design))
        assert claim.verdict == "higher" and not claim.cause
        assert "better than" in claim.sentence and "is better" not in claim.sentence
        assert "One training each" in claim.sentence


def test_seeds_without_a_partner_make_no_second_training(tmp_path: Path) -> None:
    """Seeds 42 and 43 against 43 and 44 are one pair, and one pair is about two models."""
    r8, r32 = seeds(tmp_path, "r8", 0.3), seeds(tmp_path, "r32", 0.8, rank=32)
    claim = claim_of(compared(r8=r8[:2], r32=r32[1:]))
    assert claim.row.trainings == (1, 1) and claim.verdict == "higher"
    assert "One training each" in claim.sentence


def test_a_cause_needs_declared_keys_alone(tmp_path: Path) -> None:
    r8, r32 = seeds(tmp_path, "r8", 0.3), seeds(tmp_path, "r32", 0.8, rank=32)
    folders = {"r8": r8, "r32": r32}
    claim = claim_of(conclude(load_arms(folders), design=RANK))
    assert claim.verdict == "better" and "Only lora.r" in claim.sentence
    assert claim_of(conclude(load_arms(folders))).cause == ()  # nothing is declared
    hidden = {
        "code": lambda row: row.update(git={"commit": "e" * 40, "dirty": False}),
        "dirty code": lambda row: row["git"].update(dirty=True),
        "a library": lambda row: row["libraries"].update(trl="1.17.0"),
        "hardware": lambda row: row.update(devices=["A100, 40 GiB"]),
    }
    for how in hidden.values():
        for folder in r32:
            shutil.copy(folder / "environment.json", folder / "kept.json")
            change(folder / "environment.json", how)
        claim = claim_of(conclude(load_arms(folders), design=RANK))
        assert claim.verdict == "better" and not claim.cause
        assert "No cause is named" in claim.sentence
        for folder in r32:
            shutil.move(folder / "kept.json", folder / "environment.json")


def test_what_differs_against_one_opponent_takes_no_cause_from_the_row_of_another(
    tmp_path: Path,
) -> None:
    folders = {"r8": seeds(tmp_path, "r8", 0.3), "r32": seeds(tmp_path, "r32", 0.8, rank=32)}
    for arm, skill in (("r8", 0.3), ("r32", 0.8)):
        for folder in folders[arm]:
            write_judged(folder, 200, against="gpt", skill=skill, libraries={"vllm": arm})
    claims = conclude(load_arms(folders), design=RANK).claims
    assert {claim.row.opponent: bool(claim.cause) for claim in claims} == {
        "reference": True,
        "gpt": False,
    }


def test_an_undeclared_key_takes_the_cause_away(tmp_path: Path) -> None:
    r8 = seeds(tmp_path, "r8", 0.3)
    r32 = seeds(tmp_path, "r32", 0.8, rank=32)
    for folder in r32:
        file = folder / "resolved.yaml"
        change(file, lambda values: values["train"].update(learning_rate=5e-4))
    for folder in r8:
        change(folder / "resolved.yaml", lambda values: values["train"].update(learning_rate=1e-4))
    claim = claim_of(conclude(load_arms({"r8": r8, "r32": r32}), design=RANK))
    assert not claim.cause and "train.learning_rate" in claim.sentence


def test_an_arm_at_the_edge_of_its_grid_has_no_cause(tmp_path: Path) -> None:
    folders = {"r8": seeds(tmp_path, "r8", 0.3), "r32": seeds(tmp_path, "r32", 0.8, rank=32)}
    inside = TunedArm("train.learning_rate", (1e-5, 1e-4, 1e-3), 1e-4)
    edge = replace(inside, chosen=1e-3)
    for tuned, known in ((inside, True), (edge, False)):
        design = replace(RANK, tuned={"r8": inside, "r32": tuned})
        claim = claim_of(conclude(load_arms(folders), design=design))
        assert claim.verdict == "better" and bool(claim.cause) == known


def test_trainings_of_one_recipe_have_no_better_one(tmp_path: Path) -> None:
    folders = {"a": seeds(tmp_path, "a", 0.3), "b": seeds(tmp_path, "b", 0.8)}
    claim = claim_of(conclude(load_arms(folders), design=RANK))
    assert claim.one_recipe and "chance alone" in claim.sentence


def test_seeds_are_paired_by_seed(tmp_path: Path) -> None:
    """A failed seed of one arm must not pair the others with strangers."""
    a = [write_run(tmp_path, f"a{seed}", seed=seed) for seed in (42, 43, 44)]
    b = [write_run(tmp_path, f"b{seed}", seed=seed) for seed in (43, 44)]
    for folder in (*a, *b):
        right = {"2": 20, "3": 50, "4": 80}[folder.name[-1]]
        write_values(folder, [float(n < right) for n in range(100)])
    (row,) = compared(a=a, b=b).table.rows
    assert row.difference == 0.0 and "1 seed without a partner left out" in row.flags


# ---- What a study may say, and when ----


def test_nothing_has_a_verdict_before_everything_declared_is_there(tmp_path: Path) -> None:
    folders = {"r8": seeds(tmp_path, "r8", 0.3), "r32": seeds(tmp_path, "r32", 0.8, rank=32)}
    design = replace(RANK, missing=("train.r8.seed45",), command="recipes study run s")
    conclusion = conclude(load_arms(folders), design=design)
    assert silent(conclusion) and "recipes study run s" in conclusion.cannot_say[0]
    assert "no verdict" in conclusion.answer[0] and "%" in conclusion.answer[0]


def test_a_design_changed_after_a_report_is_exploratory(tmp_path: Path) -> None:
    folders = {"r8": seeds(tmp_path, "r8", 0.3), "r32": seeds(tmp_path, "r32", 0.8, rank=32)}
    design = replace(RANK, changed=("the primary metric was grade",))
    conclusion = conclude(load_arms(folders), design=design)
    assert silent(conclusion)
    assert all(sentence.startswith("Exploratory") for sentence in conclusion.answer)
    assert "p " not in conclusion.answer[0]


def test_a_floor_is_no_equivalence(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("a", "b")]
    aims = Aims(margins={"pass_rate": Margin(0.05)})
    for value in (0.0, 1.0):
        for folder in folders:
            write_values(folder, [value] * 400)
        (claim,) = conclude(load_arms({"a": [folders[0]], "b": [folders[1]]}), aims).claims
        assert claim.verdict == "no verdict" and not claim.within


def test_no_difference_is_not_said_beside_a_small_p(tmp_path: Path) -> None:
    """p below 5% alone and above it after correction."""
    folders = [write_run(tmp_path, name) for name in ("a", "b")]
    a, b = [1.0] * 60 + [0.0] * 140, [1.0] * 52 + [0.0] * 148
    for folder, mine in zip(folders, (a, b), strict=True):
        write_values(folder, mine, name="first")
        for number in range(8):
            write_values(folder, [float(n % 2) for n in range(60)], name=f"other{number}")
    conclusion = compared(a=[folders[0]], b=[folders[1]])
    claim = next(one for one in conclusion.claims if one.row.eval == "first")
    assert claim.row.test and claim.row.test.p < 0.05 < (claim.row.p or 0)
    assert "No difference" not in claim.sentence and "Alone it has" in claim.sentence


def test_a_long_tail_against_the_mean_has_no_verdict(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("a", "b")]
    rng = np.random.default_rng(1)
    first = rng.normal(1.0, 0.05, 100)
    second = first - 0.1 + rng.normal(0, 0.05, 100)
    second[:3] += 2.5
    for folder, mine in zip(folders, (first, second), strict=True):
        write_values(
            folder, mine.tolist(), name="heldout_loss", suite="heldout_loss", metric="loss",
            unit="number", higher=False,
        )  # fmt: skip
    (claim,) = compared(a=[folders[0]], b=[folders[1]]).claims
    assert claim.verdict == "no verdict" and "a few rows differ" in claim.sentence


def test_every_severity_keeps_its_promise(two: list[Path]) -> None:
    """Whatever touches a row as an error leaves it without a verdict."""
    judge = JudgeFacts(name="weak", fingerprint="w", model="w/w", weak="of 135M parameters")
    for folder in two:
        file = folder / "evals/alpaca_eval/result.json"
        write_log(replace(read_eval_log(file), judge=judge))
    conclusion = compared(one=[two[0]], two=[two[1]])
    assert "weak-judge" in codes(conclusion, "warning") and not silent(conclusion)
    for claim in conclusion.claims:
        errors = [
            one for one in conclusion.findings if one.severity == "error" and one.touches(claim.row)
        ]
        assert not errors or claim.verdict == "no verdict"
