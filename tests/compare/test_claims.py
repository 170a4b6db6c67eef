"""Sentences are templates over tested rows: each one here, and what stops it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from recipes_lib.compare.aims import Aims, Margin
from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.design import Arm, Study, load_study
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
from recipes_lib.compare.published import Published, PublishedNumber
from recipes_lib.compare.validity import check_validity
from recipes_lib.eval_files import with_groups
from recipes_lib.eval_log import EvalLog, Measure, Sample


def arm(name, measures, *, runs=1, folder=Path("runs"), **lora):
    """An arm whose runs have the given measures: one list for all runs, or one per run. `r8` is of
    rank 8 unless `lora` says otherwise.
    """
    rank = {"r": int(name[1:])} if re.fullmatch(r"r\d+", name) else {}
    lists = measures if measures and isinstance(measures[0], list) else [measures] * runs
    made = []
    for number, mine in enumerate(lists):
        run = name if len(lists) == 1 else f"{name}--seed{number}"
        placed = [
            dataclasses.replace(one, file=folder / run / "evals" / one.eval / "result.json")
            for one in mine
        ]
        results = tuple(
            EvalLog(
                eval=one.eval,
                suite=one.suite,
                against=one.opponent,
                file=one.file,
                measures=(one,),
            )
            for one in placed
        )
        resolved = (
            {"lora": {**rank, **lora}, "train": {"seed": 42 + number}} if rank or lora else {}
        )
        state = {"state": "finished"}
        made.append(
            RunMeasurements(
                run, folder / run, state, resolved, {}, {}, (), results, seed=42 + number
            )
        )
    return ArmMeasurements(name, tuple(made))


def rates(values, metric="acc", opponent=None, unit="share", label="arc acc"):
    """A measure of these values, one question each; None is an item without a verdict."""
    items = tuple(
        Sample(f"q{n}", 1, "all", None if value is None or np.isnan(value) else float(value), "x")
        for n, value in enumerate(values)
    )
    return Measure(
        "ev",
        "lm_eval" if unit == "share" else "mt_bench",
        metric,
        label,
        items,
        Path(),
        opponent,
        unit=unit,
    )


def of(*arms):
    return Measurements({one.name: one for one in arms})


def study(*names, trained=True, factors=("rank",)):
    arms = tuple(
        Arm(
            name=name,
            recipe=None,
            overrides=(),
            launch=None,
            seeds=(42,),
            published_only=not trained,
        )  # type: ignore[arg-type]
        for name in names
    )
    keys = dict.fromkeys(factors, ("lora",))
    return Study(Path("s.yaml"), "s", "Does rank matter?", keys, arms, (42,), True, (), None, {})


GOOD, BAD = [1.0] * 60 + [0.0] * 20, [1.0] * 30 + [0.0] * 50


def test_a_shown_difference_is_better_or_worse():
    (row,) = compare_arms(of(arm("a", [rates(BAD)]), arm("b", [rates(GOOD)]))).rows
    assert (row.first, row.second, row.verdict) == ("b", "a", "better")
    assert row.sentence.startswith(
        "b is better than a on arc acc: 75.0% against 37.5%, difference +37.5 points ["
    )
    assert "p < 0.001 (Holm), n = 80 questions." in row.sentence
    (row,) = compare_arms(of(arm("a", [rates(GOOD)]), arm("b", [rates(BAD)]))).rows
    assert row.verdict == "worse" and row.sentence.startswith("b is worse than a")


def test_lower_is_better_turns_the_verdict():
    lower = [dataclasses.replace(rates(values), higher_is_better=False) for values in (BAD, GOOD)]
    (row,) = compare_arms(of(arm("a", [lower[0]]), arm("b", [lower[1]]))).rows
    assert row.verdict == "worse" and row.difference > 0


def test_no_difference_shown_says_what_would_have_been_found():
    (row,) = compare_arms(of(arm("a", [rates(GOOD)]), arm("b", [rates([0.0] * 3 + GOOD[3:])]))).rows
    assert row.verdict == "no difference shown"
    assert row.sentence.startswith("No difference shown between b and a on arc acc:")
    assert (
        "A true difference of" in row.sentence
        and "would have been found with 80% probability" in row.sentence
    )
    assert "would need about" in row.sentence


def test_two_arms_that_agree_everywhere_show_no_difference():
    (row,) = compare_arms(of(arm("a", [rates(GOOD)]), arm("b", [rates(GOOD)]))).rows
    assert row.verdict == "no difference shown" and row.p_holm == 1.0 and row.difference == 0
    assert row.tested.low < 0 < row.tested.high


def test_items_that_all_differ_by_the_same_have_no_interval_and_so_no_claim():
    """A p alone is no claim: "better" needs an interval without zero too."""
    grades = [rates([value] * 10, "grade", unit="grade") for value in (4.0, 5.0)]
    (row,) = compare_arms(of(arm("a", [grades[0]]), arm("b", [grades[1]]))).rows
    assert row.tested.p < 0.01 and (row.tested.low, row.tested.high) == (None, None)
    assert row.verdict == "no difference shown" and "no interval, so no claim" in " ".join(
        row.flags
    )


@pytest.mark.parametrize(
    ("metric", "unit", "low", "high"), [("grade", "grade", 1, 5), ("grade_1_10", "number", 1, 10)]
)
def test_open_grades_are_filled_with_the_ends_of_the_scale(metric, unit, low, high):
    """None of the grades that were given is at an end of its scale."""
    values = {"a": [3.0, 4.0] * 10, "b": [4.0] * 18 + [None] * 2}
    comparison = compare_arms(
        of(*(arm(name, [rates(mine, metric, unit=unit)]) for name, mine in values.items()))
    )
    (row,), score = comparison.rows, next(score for score in comparison.scores if score.arm == "b")
    assert (score.lowest, score.highest) == (
        pytest.approx((72 + 2 * low) / 20),
        pytest.approx((72 + 2 * high) / 20),
    )
    assert row.tested.lowest == pytest.approx(
        (72 + 2 * low - 70) / 20
    ) and row.tested.highest == pytest.approx((72 + 2 * high - 70) / 20)


def test_few_items_cannot_be_tested():
    (row,) = compare_arms(of(arm("a", [rates([0.0] * 5)]), arm("b", [rates([1.0] * 5)]))).rows
    assert row.verdict == "cannot be tested" and row.p_holm is None
    assert (
        row.sentence
        == "b and a cannot be compared on arc acc: 5 questions cannot reach p <= 0.05, whatever"
        " they say."
    )


def test_totals_alone_cannot_be_tested():
    group = dataclasses.replace(rates([]), reported=0.4, reported_n=100)
    (row,) = compare_arms(
        of(arm("a", [group]), arm("b", [dataclasses.replace(group, reported=0.5)]))
    ).rows
    assert row.verdict == "cannot be tested" and row.difference == pytest.approx(0.1)
    assert "only totals are known" in row.sentence


def test_other_questions_cannot_be_tested():
    other = dataclasses.replace(
        rates([]), samples=tuple(Sample(f"z{n}", 1, "all", 1.0, "x") for n in range(80))
    )
    (row,) = compare_arms(of(arm("a", [rates(GOOD)]), arm("b", [other]))).rows
    assert "answered different questions" in row.sentence


def test_head_to_head_is_a_win_rate_and_both_directions_are_one_row():
    won = [1.0] * 60 + [0.5] * 10 + [0.0] * 10
    direct = rates(won, "win_rate", "a", label="AlpacaEval win rate")
    turned = rates([1 - value for value in won], "win_rate", "b", label="AlpacaEval win rate")
    reference = [
        rates(values, "win_rate", "reference", label="AlpacaEval win rate")
        for values in (BAD, GOOD)
    ]
    comparison = compare_arms(
        of(arm("a", [reference[0], turned]), arm("b", [reference[1], direct]))
    )
    head = [row for row in comparison.rows if row.head_to_head]
    assert len(head) == 1 and head[0].first_value == pytest.approx(0.8125)
    assert head[0].sentence.startswith(
        "b is better than a on AlpacaEval win rate, head to head: win rate 81.2% ["
    )
    assert [row.opponent for row in comparison.rows] == [None, "reference"]
    (flipped,) = [
        row
        for row in compare_arms(of(arm("a", [turned]), arm("b", [rates(GOOD)]))).rows
        if row.head_to_head
    ]
    assert flipped.first == "b" and flipped.first_value == pytest.approx(0.8125)


def test_unresolved_items_are_counted_both_ways_and_said():
    values = [1.0] * 60 + [0.0] * 10 + [None] * 10
    (row,) = compare_arms(
        of(arm("a", [rates([0.5] * 80)]), arm("b", [rates(values, "win_rate", "a")]))
    ).rows
    assert row.tested.unresolved == 10 and row.verdict == "better"
    assert "10 without a verdict counted both ways" in row.sentence
    many = [1.0] * 30 + [0.0] * 10 + [None] * 40
    (row,) = compare_arms(
        of(arm("a", [rates([0.5] * 80)]), arm("b", [rates(many, "win_rate", "a")]))
    ).rows
    assert row.verdict == "no difference shown" and row.p_holm == 1.0


def test_holm_covers_the_whole_table():
    weak = [1.0] * 48 + [0.0] * 32
    many = [rates(GOOD, f"m{n}", label=f"m{n}") for n in range(12)]
    other = [rates(GOOD, f"m{n}", label=f"m{n}") for n in range(11)] + [
        rates(weak, "m11", label="m11")
    ]
    alone = compare_arms(of(arm("a", [many[11]]), arm("b", [other[11]]))).rows[0]
    among = compare_arms(of(arm("a", many), arm("b", other))).rows
    assert (
        among[11].p_holm == pytest.approx(min(1.0, 12 * alone.p_holm)) and among[11].mde > alone.mde
    )


def seeded(values, count=3, seed=0):
    """One list of measures per seed: the values with a few of them turned, other ones for each
    seed.
    """
    rng = np.random.default_rng(seed)
    return [
        [rates(np.where(rng.random(len(values)) < 0.03, 1 - np.array(values), values))]
        for _ in range(count)
    ]


def test_a_cause_is_named_only_where_the_study_declares_it():
    measured = of(arm("r8", seeded(BAD)), arm("r32", seeded(GOOD, seed=1)))
    (row,) = compare_arms(measured, (), study("r8", "r32")).rows
    assert row.sentence.endswith(
        " Only lora.r (32 against 8) differs between them, so this is its effect over 3 training"
        " seeds."
    )
    for without in (None, study("r8", "r32", trained=False)):
        (row,) = compare_arms(measured, (), without).rows
        assert "effect" not in row.sentence and row.verdict == "better"
    (row,) = compare_arms(measured, (), study("r8", "r32", factors=())).rows
    assert row.sentence.endswith(" No cause is named: no factor declares lora.r.")


def test_one_training_of_each_arm_has_no_effect():
    (row,) = compare_arms(
        of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)])), (), study("r8", "r32")
    ).rows
    assert row.verdict == "better" and "effect" not in row.sentence
    assert row.sentence.endswith(
        " These two trainings differ, one of each arm; which of lora.r (32 against 8) and chance is"
        " the cause, two trainings cannot tell (where the seed moves a training by 1.0 points / 3.0"
        " points / 6.0 points (SD), chance alone takes two of one recipe this far apart in under 1%"
        " / under 1% / under 1% of the cases)."
    )


@pytest.mark.parametrize(("place", "deviation"), [(0, 0.01), (1, 0.03), (2, 0.06)])
def test_how_often_the_seed_alone_makes_such_a_difference_is_what_a_simulation_says(
    place, deviation
):
    rng = np.random.default_rng(3)
    known, unstable = (rng.random(805) < 0.6).astype(float), rng.random(805) < 0.3

    def training():
        chance = np.clip(0.5 + rng.normal(0, deviation) / 0.3, 0, 1)
        return np.where(unstable, rng.random(805) < chance, known)

    pairs = [(training(), training()) for _ in range(3000)]
    effects = np.array([(one - other).mean() for one, other in pairs])
    one, other = pairs[int(np.flatnonzero(abs(abs(effects) - 0.045) < 0.004)[0])]
    (row,) = compare_arms(
        of(arm("r8", [rates(one)]), arm("r32", [rates(other)])), (), study("r8", "r32")
    ).rows
    told = re.search(r"this far apart in ([^ ]+) / ([^ ]+) / ([^ ]+) of", row.sentence)
    often = 100 * (abs(effects) >= abs(row.difference) - 1e-9).mean()
    assert told and abs(float(told[place + 1].rstrip("%")) - often) <= 4


def test_every_key_that_changed_is_named_whatever_the_factor_is_called():
    arms = (
        arm("r8", seeded(BAD), lora_alpha=16, use_rslora=False),
        arm("r32", seeded(GOOD, seed=1), lora_alpha=64, use_rslora=True),
    )
    (row,) = compare_arms(of(*arms), (), study("r8", "r32")).rows
    assert row.sentence.endswith(
        " Only lora.r (32 against 8), lora.lora_alpha (64 against 16) and lora.use_rslora (true"
        " against false) differ between them, so this is their joint effect over 3 training seeds."
    )
    many = {f"x{n}": n for n in range(5)}
    (row,) = compare_arms(
        of(arm("r8", seeded(BAD)), arm("r32", seeded(GOOD, seed=1), **many)), (), study("r8", "r32")
    ).rows
    assert (
        "Only lora.r, lora.x0, lora.x1, lora.x2, lora.x3 and lora.x4 differ between them"
        in row.sentence
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_recipe_twice_has_no_cause_whatever_its_arms_are_called(seeds):
    pair = arm("r8", seeded(BAD, seeds)), arm("r8-again", seeded(GOOD, seeds, seed=1), r=8)
    comparison = compare_arms(of(*pair), (), study("r8", "r8-again"))
    (row,) = comparison.rows
    assert (
        row.verdict == "better"
        and row.stopped
        and "its effect" not in row.sentence
        and "Only" not in row.sentence
    )
    assert (
        comparison.answer[0]
        == "r8-again against r8, 1 comparison: no claim (one recipe, trained twice)."
    )
    assert (
        row.sentence.startswith("r8-again came out higher than r8 on arc acc: ")
        and "better" not in row.sentence
    )
    assert row.sentence.endswith(
        "No effect is claimed: both are trainings of one recipe, and this is how far apart chance"
        " alone took them."
    )


def test_one_recipe_twice_is_not_better_than_itself_outside_a_study_either():
    pair = of(arm("r8", [rates(BAD)]), arm("r8-again", [rates(GOOD)], r=8))
    (row,) = compare_arms(pair).rows
    assert (
        row.sentence.startswith("r8-again came out higher than r8") and "better" not in row.sentence
    )
    (row,) = compare_arms(of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)]))).rows
    assert row.sentence.startswith("r32 is better than r8")


def test_chance_alone_is_not_named_where_the_machine_differs_too():
    hardware = Finding(
        "confound-hardware",
        "warning",
        "They were trained on other devices",
        (),
        "",
        ("r8", "r8-again"),
    )
    for within in (None, study("r8", "r8-again")):
        (row,) = compare_arms(
            of(arm("r8", [rates(BAD)]), arm("r8-again", [rates(GOOD)], r=8)), (hardware,), within
        ).rows
        assert "chance" not in row.sentence and "its effect" not in row.sentence


def test_a_study_that_trains_one_recipe_twice_names_no_cause(study_folder):
    twice = load_study(study_folder / "twice.yaml")
    measured = of(arm("r4", [rates(BAD)]), arm("r4-again", [rates(GOOD)]))
    comparison = compare_arms(measured, check_validity(twice, measured), twice)
    assert [row.verdict for row in comparison.rows] == ["better"]
    said = " ".join(comparison.answer)
    assert (
        "both are trainings of one recipe" in said
        and "its effect" not in said
        and "Only" not in said
        and "better" not in said
    )


def test_beside_a_difference_inside_the_noise_floor_no_effect_is_claimed():
    inside = Finding(
        "inside-noise-floor",
        "warning",
        "r8 and r32 differ on ev/acc by no more than two trainings of one recipe do",
        (),
        "",
    )
    (row,) = compare_arms(
        of(arm("r8", seeded(BAD)), arm("r32", seeded(GOOD, seed=1))), (inside,), study("r8", "r32")
    ).rows
    assert row.sentence.endswith(
        " No cause is named: r8 and r32 differ on ev/acc by no more than two trainings of one"
        " recipe do."
    )


def test_a_measured_noise_floor_that_is_exceeded_allows_a_cause_for_one_training_of_each_arm():
    trainings = [1.0] * 30 + [0.0] * 50
    again = [trainings, [1.0] * 31 + [0.0] * 49, [1.0] * 29 + [0.0] * 51]
    floor = [arm("r4", [[rates(one)] for one in again])]
    far = of(*floor, arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)]))
    rows = compare_arms(far, (), study("r4", "r8", "r32")).rows
    row = next(row for row in rows if set(row.arms) == {"r32", "r8"})
    assert (
        row.tested.seeds == 1
        and "so this is its effect: two trainings of one recipe differ by no more than"
        in row.sentence
    )
    assert (
        "(estimated from 3 trainings of 1 recipe, at 5% over all tests of this table)."
        in row.sentence
    )
    near = of(*floor, arm("r8", [rates(BAD)]), arm("r32", [rates([1.0] * 38 + [0.0] * 42)]))
    rows = compare_arms(near, (), study("r4", "r8", "r32")).rows
    row = next(row for row in rows if set(row.arms) == {"r32", "r8"})
    assert row.verdict == "better" and "effect" not in row.sentence


def test_trainings_that_came_to_one_and_the_same_mean_are_no_noise_floor_of_zero():
    twice = [[rates(one)] for one in ([1.0] * 30 + [0.0] * 50, [0.0] * 50 + [1.0] * 30)]
    measured = of(arm("r4", twice), arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)]))
    rows = compare_arms(measured, (), study("r4", "r8", "r32")).rows
    row = next(row for row in rows if set(row.arms) == {"r32", "r8"})
    assert row.verdict == "better"
    assert "no more than 0.0 points" not in row.sentence and "cannot tell" in row.sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainings", "deviation"),
    [((1, 1, 1), 0.03), ((3, 1, 1), 0.03), ((2, 2, 2), 0.06), ((3, 3, 3), 0.06)],
)
def test_a_cause_is_rarely_named_where_there_is_none(trainings, deviation):
    rng = np.random.default_rng(7)

    def answers(known, unstable, count):
        chances = np.clip(0.5 + rng.normal(0, deviation, count) / 0.3, 0, 1)
        return [
            [rates(np.where(unstable, rng.random(len(known)) < chance, known))]
            for chance in chances
        ]

    named = different = 0
    for _ in range(100):
        known, unstable = (rng.random(805) < 0.6).astype(float), rng.random(805) < 0.3
        arms = [
            arm(name, answers(known, unstable, count))
            for name, count in zip(("r4", "r8", "r32"), trainings, strict=True)
        ]
        declared = study("r4", "r8", "r32")
        measured = of(*arms)
        findings = [
            one for one in check_validity(declared, measured) if one.code == "inside-noise-floor"
        ]
        rows = compare_arms(measured, findings, declared).rows
        named += any("effect" in row.sentence for row in rows)
        different += any(row.verdict in ("better", "worse") for row in rows)
    assert named <= (
        0 if trainings == (1, 1, 1) else 11
    )  # 5% with three standard errors of 100 studies
    if trainings == (1, 1, 1):
        assert (
            different > 50
        )  # what trainings of one recipe differ by, with a deviation of three points: no test over questions can know  # noqa: E501


def test_no_cause_is_named_for_a_base_model():
    measured = of(arm("base", [rates(BAD)]), arm("r8", [rates(GOOD)]))
    (row,) = compare_arms(measured, (), study("base", "r8")).rows
    assert row.sentence.startswith("r8 is better than base") and "effect" not in row.sentence


def test_a_confound_leaves_an_association():
    confound = Finding(
        "confound", "error", "The arms differ in train.learning_rate too", (), "", ("r8", "r32")
    )
    (row,) = compare_arms(
        of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)])), (confound,), study("r8", "r32")
    ).rows
    assert row.sentence.startswith("r32 scored higher than r8 on arc acc:")
    assert row.sentence.endswith(
        "This is an association, not an effect: the arms differ in train.learning_rate too."
    )
    assert row.verdict == "better" and row.stopped == (
        "The arms differ in train.learning_rate too",
    )


def test_no_cause_is_named_where_something_undeclared_differs_that_is_only_warned_of():
    hardware = Finding(
        "confound-hardware", "warning", "Hardware differs between r8 and r32", (), "", ("r8", "r32")
    )
    measured = of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)]))
    (row,) = compare_arms(measured, (hardware,), study("r8", "r32")).rows
    assert row.sentence.startswith("r32 is better than r8 on arc acc:") and row.stopped == ()
    assert row.sentence.endswith(" No cause is named: hardware differs between r8 and r32.")
    elsewhere = dataclasses.replace(hardware, arms=("r8", "r64"))
    measured = of(arm("r8", seeded(BAD)), arm("r32", seeded(GOOD, seed=1)))
    (row,) = compare_arms(measured, (elsewhere,), study("r8", "r32")).rows
    assert "so this is its effect" in row.sentence


def test_several_seeds_without_items_are_reported_and_not_tested():
    groups = [
        [dataclasses.replace(rates([]), reported=value, reported_n=10)] for value in (0.5, 0.7)
    ]
    comparison = compare_arms(of(arm("a", groups), arm("b", groups)))
    assert [score.value for score in comparison.scores] == pytest.approx([0.6, 0.6])
    assert comparison.rows[0].verdict == "cannot be tested"


def test_another_error_stops_the_claim_and_not_the_table():
    error = Finding("judge-audit", "error", "The judge failed its audit", (), "", (), ("ev/acc",))
    comparison = compare_arms(
        of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)])), (error,), study("r8", "r32")
    )
    (row,) = comparison.rows
    assert row.sentence == "No claim about r32 and r8 on arc acc: the judge failed its audit."
    assert row.verdict == "better" and row.p_holm < 0.001 and row.difference == pytest.approx(0.375)
    assert comparison.answer[0] == "r32 against r8, 1 comparison: no claim (an error was found)."


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (GOOD, "The judge preferred r32 more than r8 on arc acc: 72.5% against 37.5%"),
        (BAD, "The judge showed no preference between r32 and r8 on arc acc: 37.5% against 37.5%"),
    ],
)
def test_a_judge_whose_audit_is_not_whole_has_a_preference_and_proves_nothing(values, said):
    title = "The audit of the judge of ev did not measure agreement with human labels"
    gap = Finding("judge-not-audited", "error", title, (), "", (), ("ev/acc",))
    (row,) = compare_arms(
        of(arm("r8", seeded(BAD)), arm("r32", seeded(values))), (gap,), study("r8", "r32")
    ).rows
    assert row.sentence.startswith(said) and row.stopped == (title,)
    assert row.sentence.endswith(
        f"No claim about the answers follows: {title[0].lower()}{title[1:]}."
    )
    assert "better" not in row.sentence and "effect" not in row.sentence
    failed = Finding("order-flips", "error", "The judge turns with the order", (), "")
    (row,) = compare_arms(
        of(arm("r8", [rates(BAD)]), arm("r32", [rates(values)])), (gap, failed), study("r8", "r32")
    ).rows
    assert row.sentence == "No claim about r32 and r8 on arc acc: the judge turns with the order."


@pytest.mark.parametrize(
    "question",
    [
        "rank 32 beats rank 8 (p < 0.001)",
        "Rank 32 is better. Does it matter?",
        "Is rank 32, with p = 0.001, better?",
        "Is it better by 5 points [+3.8, +9.5]?",
        "Rank 32 is better!",
    ],
)
def test_a_question_that_states_something_is_marked_as_untested(question):
    measured = of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)]))
    asking = dataclasses.replace(study("r8", "r32"), question=question)
    assert (
        compare_arms(measured, (), asking).question
        == f"Question, in the words of the study and not tested: {question}"
    )
    assert compare_arms(measured, (), study("r8", "r32")).question == "Does rank matter?"


def test_an_error_about_another_metric_stops_nothing():
    error = Finding("judge-audit", "error", "The judge failed", (), "", (), ("other/metric",))
    (row,) = compare_arms(of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)])), (error,)).rows
    assert row.stopped == () and row.verdict == "better"


def test_warnings_stop_nothing():
    warning = Finding("weak-judge", "warning", "The judge is a weak one", (), "")
    (row,) = compare_arms(
        of(arm("r8", seeded(BAD)), arm("r32", seeded(GOOD, seed=1))), (warning,), study("r8", "r32")
    ).rows
    assert "so this is its effect" in row.sentence


def test_one_model_under_two_names_cannot_be_tested():
    same = Finding(
        "identical-answers", "error", "r8 and r32 gave the same answers", (), "", ("r8", "r32")
    )
    (row,) = compare_arms(of(arm("r8", [rates(BAD)]), arm("r32", [rates(GOOD)])), (same,)).rows
    assert row.verdict == "cannot be tested" and row.p_holm is None
    assert "r8 and r32 gave the same answers" in row.sentence


def test_one_thing_under_two_names_is_that_on_the_metrics_it_concerns_alone():
    same = Finding(
        "identical-answers",
        "error",
        "a and b gave the same answers",
        (),
        "",
        ("a", "b"),
        ("ev/win_rate",),
    )
    one, other = [
        [rates(values), rates(values, metric="win_rate", label="win rate")]
        for values in (BAD, GOOD)
    ]
    verdicts = {
        row.metric: row.verdict
        for row in compare_arms(of(arm("a", one), arm("b", other)), [same]).rows
    }
    assert verdicts == {"ev/acc": "better", "ev/win_rate": "cannot be tested"}


def test_where_nothing_is_compared_only_errors_between_two_arms_stand_against_their_losses():
    arms = of(
        arm("a", [rates(BAD)]),
        arm("b", [rates(GOOD, metric="f1")]),
        arm("c", [rates(GOOD, metric="bleu")]),
    )
    findings = [
        Finding("x-y", "error", "a and b differ", (), "", ("a", "b")),
        Finding("x-z", "warning", "a and c differ", (), "", ("a", "c")),
    ]
    assert compare_arms(arms, findings).answer == (
        "Nothing can be compared: no two arms have a metric in common.",
        "Losses and times of a and b are no comparison either: a and b differ.",
    )


@pytest.mark.parametrize(
    ("code", "words", "times"), [("judge-x", "No claim about", 1), ("confound-x", " scored ", 3)]
)
def test_an_answer_gives_a_reason_once_and_repeats_only_numbers(code, words, times):
    arms = of(
        arm("a", [rates(BAD)]), arm("b", [rates(GOOD)]), arm("c", [rates([1.0] * 50 + [0.0] * 30)])
    )
    answer = " ".join(
        compare_arms(arms, [Finding(code, "error", "This reason stands", (), "")]).answer
    )
    assert answer.count("this reason stands") == 1 and answer.count(words) == times
    assert answer.count("for the reasons above") == times - 1


def test_several_seeds_enter_the_interval_and_the_sentence():
    rng = np.random.default_rng(0)
    seeds = [[rates(rng.integers(0, 2, 80).astype(float))] for _ in range(3)]
    better = [
        [
            rates(
                np.minimum(
                    1.0, np.array([item.value for item in one[0].samples]) + (rng.random(80) < 0.6)
                )
            )
        ]
        for one in seeds
    ]
    (row,) = compare_arms(of(arm("r8", seeds), arm("r32", better)), (), study("r8", "r32")).rows
    assert row.tested.seeds == 3 and row.tested.test == "crossed t"
    assert "3 seeds" in row.sentence and "over 3 training seeds" in row.sentence


def test_a_missing_turn_is_unresolved_not_dropped():
    turns = tuple(Sample(f"q{n}", turn, "all", 3.0, "graded") for n in range(20) for turn in (1, 2))
    whole = dataclasses.replace(rates([], "grade", unit="grade", label="MT-Bench"), samples=turns)
    lacking = dataclasses.replace(whole, samples=turns[:-1])
    (row,) = compare_arms(of(arm("a", [whole]), arm("b", [lacking]))).rows
    assert (
        row.tested.n == 40
        and row.tested.unresolved == 1
        and row.tested.lowest < 0 < row.tested.highest
    )


def test_published_numbers_alone_are_shown_and_never_tested():
    numbers = tuple(
        PublishedNumber(name, "t", "m", "Acc", value, str(value), n=800, beside="ev/acc")
        for name, value in (("r8", 0.41), ("r32", 0.42))
    )
    published = Published(Path("p.yaml"), "a report", "somewhere", numbers, {"t": "table"})
    measured = of(arm("r8", [rates(BAD)]), ArmMeasurements("r32", ()))
    (row,) = compare_arms(measured, (), study("r8", "r32", trained=False), published).rows
    assert row.verdict == "cannot be tested" and row.tested is None
    assert row.published_first == "42.0% (n 800)" and row.published_second == "41.0% (n 800)"
    assert "cannot be compared" in row.sentence


def test_published_values_stand_beside_ours():
    published = Published(
        Path("p.yaml"),
        "x",
        "y",
        (PublishedNumber("a", "t", "m", "Acc", 41.0, "41.0", beside="ev/acc", factor=0.01),),
        {},
    )
    (row,) = compare_arms(
        of(arm("a", [rates(BAD)]), arm("b", [rates(GOOD)])), (), None, published
    ).rows
    assert (row.published_first, row.published_second) == (None, "41.0%")


def test_nothing_in_common_is_said():
    comparison = compare_arms(of(arm("a", [rates(BAD)]), arm("b", [])))
    assert comparison.rows == () and comparison.answer == (
        "Nothing can be compared: no two arms have a metric in common.",
    )


def test_the_answer_begins_with_the_arms_of_the_study_and_ends_with_the_base():
    base, first, second = (
        arm(name, [rates(values)]) for name, values in (("base", BAD), ("r8", GOOD), ("r32", GOOD))
    )
    answer = compare_arms(of(base, first, second), (), study("r8", "r32")).answer
    assert answer[0] == "r32 against r8, 1 comparison: no difference shown."
    assert answer[-2:] == (
        "r8 against base, 1 comparison: better.",
        "r32 against base, 1 comparison: better.",
    )


def test_the_first_sentence_counts_the_verdicts_of_all_comparisons():
    names = [f"m{n}" for n in range(4)]

    def answer(*values):
        rows = [rates(one, name, label=name) for name, one in zip(names, values, strict=True)]
        return compare_arms(
            of(arm("a", [rates(BAD, name, label=name) for name in names]), arm("b", rows))
        ).answer[0]

    assert answer(GOOD, GOOD, GOOD, GOOD) == "b against a: better on all 4 comparisons."
    assert (
        answer(BAD, BAD, BAD, BAD)
        == "b against a: no difference shown on any of the 4 comparisons."
    )
    assert (
        answer(GOOD, BAD, BAD, BAD)
        == "b against a: better on 1 of 4 comparisons, no difference shown on 3."
    )


def test_one_training_beside_several_is_compared_with_one_of_them():
    rng = np.random.default_rng(0)
    many = [[rates((rng.random(80) < 0.8).astype(float))] for _ in range(3)]
    one = [rates((rng.random(80) < 0.3).astype(float))]
    (row,) = compare_arms(of(arm("r8", one), arm("r32", many)), (), study("r8", "r32")).rows
    assert row.tested.seeds == 1 and row.flags == ("1 seed of 3 and 1",)
    assert (
        "two trainings of one recipe differ by no more than" in row.sentence
        and "training seeds" not in row.sentence
    )
    (row,) = compare_arms(of(arm("base--x", one), arm("r32", many))).rows
    assert (
        row.tested.seeds == 3 and row.flags == ()
    )  # a base has no other seed to have come out differently


def test_one_training_judged_against_several_counts_once():
    rng = np.random.default_rng(0)
    judged = [[rates(rng.choice([0.0, 1.0], 80, p=[0.2, 0.8]), "win_rate", "r8")] for _ in range(3)]
    (row,) = compare_arms(of(arm("r8", [rates(BAD)]), arm("r32", judged))).rows
    assert row.head_to_head and row.tested.seeds == 1 and row.flags == ("1 seed of 3",)
    (row,) = compare_arms(
        of(
            arm("base--x", [rates(BAD)]),
            arm("r32", [[dataclasses.replace(one, opponent="base--x")] for (one,) in judged]),
        )
    ).rows
    assert row.head_to_head and row.tested.seeds == 3 and row.flags == ()


def test_an_interval_that_holds_zero_shows_no_difference_whatever_p_says():
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    rng = np.random.default_rng(0)
    for _ in range(400):  # the permutation test and the bootstrap disagree at the edge now and then
        first = 3 + rng.choice(values, 150, p=[0.13, 0.17, 0.35, 0.2, 0.15])
        grades = [
            rates(one, "grade", unit="grade", label="grade") for one in (np.full(150, 3.0), first)
        ]
        (row,) = compare_arms(of(arm("a", [grades[0]]), arm("b", [grades[1]]))).rows
        if row.p_holm <= 0.05 and row.tested.low <= 0 <= row.tested.high:
            assert row.verdict == "no difference shown"
            break
    else:
        raise AssertionError("no such study was drawn")


def test_a_comparison_that_could_find_nothing_says_so():
    rng = np.random.default_rng(3)
    rows = [[rates(rng.integers(0, 2, 40).astype(float) * (number % 2))] for number in range(2)]
    (row,) = compare_arms(
        of(
            arm("r8", rows),
            arm("r32", [[rates(rng.integers(0, 2, 40).astype(float))] for _ in range(2)]),
        )
    ).rows
    assert row.mde > 1
    assert (
        "No difference, however large, would have been found with 80% probability." in row.sentence
    )
    assert "A true difference of" not in row.sentence


def test_plain_values_are_json():
    import json

    comparison = compare_arms(of(arm("a", [rates(BAD)]), arm("b", [rates(GOOD)])))
    value = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert value["rows"][0]["tested"]["n"] == 80 and "measures" not in value["rows"][0]


def test_no_interval_of_shares_or_grades_leaves_its_scale():
    """Where nearly all items agree the symmetric limits would lie beyond it: 97.5% [92.4,
    102.6].
    """
    won = [1.0] * 38 + [0.5, 0.5]
    mostly = [1.0] * 12 + [0.5] * 2
    grades = {"a": [1.0] * 20 + [2.0], "b": [5.0] * 21}
    arms = [
        arm(
            "a", [rates(mostly, "win_rate", "reference"), rates(grades["a"], "grade", unit="grade")]
        ),
        arm(
            "b",
            [
                rates(won, "win_rate", "a"),
                rates([*mostly[1:], 0.0], "win_rate", "reference"),
                rates(grades["b"], "grade", unit="grade"),
            ],
        ),
    ]
    comparison = compare_arms(of(*arms))
    head, grade = (
        next(row for row in comparison.rows if test(row))
        for test in (lambda row: row.head_to_head, lambda row: row.unit == "grade")
    )
    assert head.tested.high == 0.5 and "100.0]" in head.sentence and grade.tested.high == 4.0
    for score in comparison.scores:
        lowest, highest = (1, 5) if score.unit == "grade" else (0, 1)
        assert score.low is None or lowest <= score.low <= score.value <= score.high <= highest


def harness(values, metric="acc", task="arc", parts=(), reported=None):
    """A measure of one metric of an lm-eval task."""
    one = rates(values, metric, label=f"{task} {metric}")
    return dataclasses.replace(one, task=task, parts=tuple(parts), reported=reported)


def asking(primary=None, **aims):
    return dataclasses.replace(study("r8", "r32"), aims=Aims(primary, **aims))


def test_the_primary_metric_leads_its_pair_and_is_tested_before_the_rest():
    weak = [1.0] * 42 + [0.0] * 38
    many = [rates(BAD, f"m{n}", label=f"m{n}") for n in range(12)]
    other = [rates(weak, f"m{n}", label=f"m{n}") for n in range(12)]
    measured = of(arm("base", many), arm("r8", many), arm("r32", other))
    rows = compare_arms(measured, (), asking("m7")).rows
    lead = rows[0]
    assert (lead.arms, lead.metric, lead.primary) == (("r32", "r8"), "ev/m7", True)
    assert "primary question" in lead.flags and sum(row.primary for row in rows) == 3
    assert lead.p_holm == pytest.approx(3 * lead.tested.p / 0.8) and lead.verdict == "better"
    alone = compare_arms(measured, (), asking()).rows
    assert alone[0].p_holm == pytest.approx(36 * alone[0].tested.p)
    assert lead.mde < alone[0].mde  # the power of three tests, and not of 36


def test_the_answer_begins_with_the_primary_metric():
    first, second = [rates(BAD), rates(BAD, "m1")], [rates(BAD), rates(GOOD, "m1", label="rows")]
    answer = compare_arms(of(arm("r8", first), arm("r32", second)), (), asking("m1")).answer
    assert answer[1].startswith("r32 is better than r8 on rows")


def test_the_primary_metric_of_two_judged_arms_is_the_one_head_to_head():
    direct = rates([1.0] * 60 + [0.0] * 20, "win_rate", "r8")
    reference = [rates(values, "win_rate", "reference") for values in (BAD, GOOD)]
    rows = compare_arms(
        of(arm("r8", [reference[0]]), arm("r32", [reference[1], direct])), (), asking("win_rate")
    ).rows
    assert [(row.head_to_head, row.primary) for row in rows] == [(True, True), (False, False)]


def test_two_accuracies_of_one_task_are_one_question():
    measured = of(
        arm("r8", [harness(BAD), harness(BAD, "acc_norm"), harness(BAD, "acc,second")]),
        arm("r32", [harness(GOOD), harness(GOOD, "acc_norm"), harness(GOOD, "acc,second")]),
    )
    comparison = compare_arms(measured)
    assert comparison.tests == 1
    assert [row.verdict for row in comparison.rows] == ["not tested", "better", "not tested"]
    row = comparison.rows[0]
    assert row.p_holm is None and row.difference and row.claimed
    assert row.sentence == (
        "r32 and r8 are not tested on arc acc: acc_norm of the same task is tested in its place."
    )
    assert comparison.answer[0] == "r32 against r8, 1 comparison: better."
    named = compare_arms(measured, (), asking("arc/acc")).rows
    assert [row.metric for row in named if row.p_holm is not None] == ["ev/arc/acc"]


def test_a_group_is_tested_as_one_mean_and_its_tasks_are_shown():
    def group(values):
        tasks = [harness(values[:30], task="mmlu_law"), harness(values[30:], task="mmlu_art")]
        mean = sum(values) / len(values)
        return list(
            with_groups(
                [harness([], task="mmlu", parts=("mmlu_law", "mmlu_art"), reported=mean), *tasks]
            )
        )

    measured = of(arm("r8", group(BAD)), arm("r32", group(GOOD)))
    comparison = compare_arms(measured)
    assert comparison.tests == 1
    whole, *tasks = comparison.rows
    assert (whole.label, whole.verdict, whole.n) == ("mmlu acc", "better", 80)
    assert {row.verdict for row in tasks} == {"not tested"}
    assert "it is a part of mmlu, which is tested as one mean" in tasks[0].sentence
    assert compare_arms(measured, (), asking(subtasks=True)).tests == 3
    named = compare_arms(measured, (), asking("mmlu_law")).rows
    assert {row.label for row in named if row.p_holm is not None} == {"mmlu acc", "mmlu_law acc"}
    assert [row.label for row in named if row.primary] == ["mmlu_law acc"]


def test_a_group_of_equal_tasks_weighs_them_alike():
    tasks = [harness([1.0] * 30, task="a"), harness([0.0] * 10, task="b")]
    whole, *_ = with_groups([harness([], task="g", parts=("a", "b"), reported=0.5), *tasks])
    assert len(whole.samples) == 40
    assert sum(item.value for item in whole.samples) / 40 == pytest.approx(0.5)
    # a value that is no mean of the items stays alone
    whole, *_ = with_groups([harness([], task="g", parts=("a", "b"), reported=0.9), *tasks])
    assert not whole.samples


ALIKE = [1.0] * 480 + [0.0] * 320


def nearly(values, turned):
    """The values with as many turned in both directions."""
    changed = list(values)
    for number in range(turned):
        changed[number] = 1 - changed[number]
        changed[-1 - number] = 1 - changed[-1 - number]
    return changed


POINTS = Margin(0.05, points=True)


def within(size, values=None, margin=POINTS, **changes):
    """The row of two arms that differ on `size` items in each direction."""
    one, other = rates(ALIKE), rates(values or nearly(ALIKE, size))
    one, other = (dataclasses.replace(each, **changes) for each in (one, other))
    measured = of(arm("r8", [one]), arm("r32", [other]))
    aims = Aims(margins={"acc": margin} if margin else {})
    return compare_arms(measured, (), dataclasses.replace(study("r8", "r32"), aims=aims)).rows[0]


def test_an_interval_inside_the_margin_is_equivalence():
    row = within(40)
    assert (row.verdict, row.within) == ("no difference shown", "equivalent")
    assert row.sentence.startswith(
        "r32 and r8 are equivalent on arc acc, within 5.0 points: 60.0% against 60.0%, difference"
    )
    assert row.sentence.endswith(" This is of these two trainings, one of each arm.")
    assert abs(row.tested.low) < 0.05 and row.tested.high < 0.05 and row.p_not_worse <= 0.05
    assert row.shown_verdict == "no difference shown; equivalent within 5.0 points"


def test_an_interval_that_leaves_the_margin_shows_nothing_within_it():
    row = within(200, margin=Margin(0.04, points=True))
    assert row.within == "" and row.tested.low < -0.04 and row.tested.high > 0.04
    assert row.sentence.endswith(" Within 4.0 points nothing is shown.")
    assert row.shown_verdict == "no difference shown"


def test_without_a_margin_nothing_changes():
    plain, other = within(40, margin=None), within(40, margin=Margin(0.0001))
    assert plain.p_holm == other.p_holm and plain.mde == other.mde
    assert other.sentence.startswith(plain.sentence)
    assert (plain.margin, plain.p_not_worse, plain.within) == (None, None, "")


@pytest.mark.parametrize(("higher", "said"), [(True, "not worse"), (False, "not better")])
def test_not_worse_goes_by_the_direction_of_the_metric(higher, said):
    more = nearly(ALIKE, 150)
    more[500:526] = [1.0] * 26  # a little above, too uncertain to be better
    row = within(0, more, margin=Margin(0.04), higher_is_better=higher)
    assert (row.verdict, row.within) == ("no difference shown", said)
    first = "r32 is not worse than r8" if higher else "r8 is not worse than r32"
    assert row.sentence.startswith(f"{first} on arc acc, within 4.0 points: ")


def test_a_difference_inside_the_margin_is_both():
    row = within(0, [1.0] * 500 + [0.0] * 300)
    assert (row.verdict, row.within) == ("better", "equivalent")
    assert row.sentence.endswith(" The difference lies within the margin of 5.0 points.")


def test_items_that_never_differ_are_no_equivalence_where_they_are_few():
    """The sign flips of 20 equal items would call any margin shown."""
    measured = of(*(arm(name, [rates([1.0] * 20)]) for name in ("r8", "r32")))
    aims = Aims(margins={"acc": Margin(0.02)})
    assert compare_arms(measured, (), aims=aims).rows[0].within == ""
    aims = Aims(margins={"acc": Margin(0.2)})
    assert compare_arms(measured, (), aims=aims).rows[0].within == "equivalent"


def test_an_error_stops_a_claim_within_a_margin_too():
    error = Finding("judge-audit", "error", "The judge failed", (), "")
    one, other = rates(ALIKE), rates(nearly(ALIKE, 40))
    measured = of(arm("r8", [one]), arm("r32", [other]))
    aims = Aims(margins={"acc": Margin(0.05)})
    comparison = compare_arms(measured, (error,), aims=aims)
    assert "equivalent" not in " ".join(comparison.answer) and comparison.rows[0].stopped


def test_a_margin_that_is_none_of_its_metric_is_a_flag():
    row = within(40, margin=Margin(0.05, points=True), unit="number")
    assert row.margin is None and "has no points" in " ".join(row.flags)
