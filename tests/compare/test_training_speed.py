"""Rows of how fast two arms trained, and why there may be none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.compare.test_claims import study
from tests.compare.test_validity import ENVIRONMENT, arms, changed, check_validity, run

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.measurements import Measurements, RunMeasurements
from recipes_lib.compare.row import TableRow
from recipes_lib.core.atomic_files import write_json

Line = dict[str, Any]


def lines(faster: float = 1.0, steps: int = 120, seed: int = 1, **load: Any) -> tuple[Line, ...]:
    """The lines of a training that logs every five steps; it starts slowly, and every third line
    has a step beside a save.
    """
    rng = np.random.default_rng(seed)
    made = []
    for last in range(5, steps + 1, 5):
        tokens = rng.integers(900, 1100, 5)
        seconds = [round(float(one), 6) for one in tokens / 1000 / faster * rng.normal(1, 0.05, 5)]
        if last <= 10:
            seconds = [9.0] * 5
        times: list[float | None] = [*seconds]
        if last % 15 == 5:
            times[0] = None
        made.append(
            {
                "step": last,
                "loss": 2.0,
                "tokens": 5000 * last // 5,
                "step_seconds": times,
                "step_tokens": [int(one) for one in tokens],
                "others_cpu": 0.02,
                **load,
            }
        )
    return tuple(made)


def trained(
    root: Path, name: str, curves: tuple[Line, ...], world_size: int = 1, **parts: Any
) -> RunMeasurements:
    summary = {"seconds": 130.0, "tokens_per_second": 900.0, "world_size": world_size}
    state = {"summary": summary, **parts.pop("state", {})}
    environment = {**ENVIRONMENT, "processor": "EPYC", **parts.pop("environment", {})}
    return run(root, name, curves=curves, state=state, environment=environment, **parts)


def row_of(measurements: Measurements) -> TableRow:
    comparison = compare_arms(measurements, check_validity(None, measurements))
    (row,) = comparison.rows
    assert row.metric == "training_speed" and row.sentence in comparison.answer
    return row


def test_a_faster_training_is_said_as_a_ratio_in_tokens_per_second_and_gpu(tmp_path: Path) -> None:
    row = row_of(
        arms(
            a=trained(tmp_path, "a", lines()),
            b=trained(tmp_path, "b", lines(1.5, seed=2), resolved=changed(lora={"r": 32})),
        )
    )
    assert row.sentence.startswith("b trains 1.5")
    assert (
        "] times as fast as a (tokens per second and GPU): p < 0.001 (Holm), n = " in row.sentence
    )
    assert row.verdict == "better" and row.verdict_words == "faster"
    assert row.first_value == pytest.approx(1500, rel=0.03)
    assert "better" not in row.sentence


def test_gpus_share_the_speed_of_a_training(tmp_path: Path) -> None:
    both = {"environment": {"devices": ["NVIDIA H100, 80 GiB"] * 2}, "world_size": 2}
    row = row_of(
        arms(
            a=trained(tmp_path, "a", lines(), **both),
            b=trained(tmp_path, "b", lines(seed=2), **both),
        )
    )
    assert row.first_value == pytest.approx(500, rel=0.03)
    assert row.verdict == "no difference shown" and "speed ratio" in row.sentence
    assert "A true difference of " in row.sentence and "% would have been found" in row.sentence


def test_only_steps_of_the_last_attempt_after_its_warm_up_count(tmp_path: Path) -> None:
    slow = tuple({**line, "step_seconds": [50.0] * 5} for line in lines()[:12])
    resumed = {"resumed": [{"from": "checkpoint-60"}]}
    later = tuple({**line, "step": line["step"] + 60} for line in lines())
    row = row_of(
        arms(
            a=trained(tmp_path, "a", slow + later, state=resumed),
            b=trained(tmp_path, "b", lines(seed=2)),
        )
    )
    assert row.second_value == pytest.approx(1000, rel=0.03)
    assert row.n == 120 - 10 - 7  # without warm-up, and without the steps beside a save after it


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"curves": ()}, "only the total time of b (130 s) is known"),
        (
            {"curves": tuple({**line, "step_seconds": 1.0} for line in lines())},
            "only the total time of b (130 s) is known",
        ),
        (
            {"environment": {"devices": ["NVIDIA A100, 80 GiB"]}},
            "they trained on different hardware (1 x NVIDIA A100, 80 GiB against 1 x NVIDIA H100",
        ),
        ({"environment": {"devices": None}}, "what b trained on was not recorded"),
        ({"world_size": 2}, "different hardware (2 x"),
        ({"curves": lines(others_cpu=0.4)}, "while b trained, other programs took 40%"),
        ({"curves": lines(others_cpu=None)}, "how busy the machine of b was is not recorded"),
        ({"curves": lines(other_gpu_processes=1)}, "while b trained, 1 other process used its"),
        ({"curves": lines(steps=25)}, "independent ones, and 40 are needed"),
    ],
)
def test_unequal_or_unknown_circumstances_make_no_comparison(
    tmp_path: Path, other: dict[str, Any], reason: str
) -> None:
    made = trained(tmp_path, "b", **{"curves": lines(1.5, seed=2), **other})
    row = row_of(arms(a=trained(tmp_path, "a", lines()), b=made))
    assert row.verdict == "cannot be tested" and row.tested is None
    assert row.sentence.startswith("b and a cannot be compared on training speed")
    assert reason in row.sentence


def test_processes_with_the_same_threads_in_all_are_equal_hardware(tmp_path: Path) -> None:
    def on(threads: int) -> dict[str, Any]:
        devices = [f"CPU, 8 cores, {threads} threads"]
        return {"environment": {"devices": devices}, "world_size": 4 // threads}

    row = row_of(
        arms(
            a=trained(tmp_path, "a", lines(), **on(4)),
            b=trained(tmp_path, "b", lines(1.5, seed=2), resolved=changed(lora={"r": 32}), **on(2)),
        )
    )
    assert "times as fast as a (tokens per second):" in row.sentence
    assert row.first_value == pytest.approx(1500, rel=0.03)


def test_runs_of_an_earlier_release_have_no_row(tmp_path: Path) -> None:
    old = ({"step": 5, "loss": 2.0, "tokens": 100, "tokens_per_second": 50.0},)
    made = arms(a=trained(tmp_path, "a", old), b=trained(tmp_path, "b", old))
    assert compare_arms(made).rows == ()


@pytest.mark.parametrize(
    ("declared", "seeds", "ends"),
    [
        (
            ("lora.r", "train.per_device_train_batch_size"),
            2,
            " Only lora.r (32 against 8) and train.per_device_train_batch_size (4 against 2) differ"
            " between them, so this is their joint effect over 2 training seeds.",
        ),
        (
            ("lora.r",),
            2,
            " No cause is named: no factor declares train.per_device_train_batch_size.",
        ),
        (
            ("lora.r", "train.per_device_train_batch_size"),
            1,
            " and chance is the cause, two trainings cannot tell.",
        ),
    ],
)
def test_the_cause_of_speed_is_sought_among_keys_that_change_no_result_too(
    tmp_path: Path, declared: tuple[str, ...], seeds: int, ends: str
) -> None:
    def runs(number: int, rank: int, batch: int) -> tuple[RunMeasurements, ...]:
        train = {"per_device_train_batch_size": batch, "logging_steps": 5 * batch}
        return tuple(
            trained(
                tmp_path,
                f"r{rank}-{seed}",
                lines(1 + number / 2, seed=number + 2 * seed),
                resolved=changed(lora={"r": rank}, train={**train, "seed": seed}),
            )
            for seed in range(seeds)
        )

    made = dataclasses.replace(
        study("r8", "r32", factors=()), factors={key: (key,) for key in declared}
    )
    measured = arms(r8=runs(0, 8, 2), r32=runs(1, 32, 4))
    (row,) = compare_arms(measured, (), made).rows
    assert row.sentence.startswith("r32 trains 1.") and row.sentence.endswith(ends)


def test_what_a_speed_is_confounded_with_leaves_an_association(tmp_path: Path) -> None:
    measured = arms(a=trained(tmp_path, "a", lines()), b=trained(tmp_path, "b", lines(1.5, seed=2)))
    error = Finding("confound", "error", "They also differ in data, which no factor declares")
    (row,) = compare_arms(measured, (error,)).rows
    assert row.sentence.startswith("b trained 1.5") and row.verdict_words == "faster"
    assert "This is an association, not an effect: they also differ in data" in row.sentence


def test_two_trained_runs_are_compared_without_any_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    for name, faster in (("a", 1.0), ("b", 1.5)):
        resolved = changed(lora={"r": int(8 * faster)})
        made = trained(tmp_path, name, lines(faster, seed=int(2 * faster)), resolved=resolved)
        write_json(made.folder / "run.json", {"format_version": 1, **made.state})
        (made.folder / "resolved.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
        write_json(made.folder / "environment.json", made.environment)
        text = "".join(json.dumps(line) + "\n" for line in made.curves)
        (made.folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    code, out, err = recipes("compare", "a", "b")
    assert code == 0, err
    assert "b trains 1.5" in out and "faster" in out.split("verdict")[1]
