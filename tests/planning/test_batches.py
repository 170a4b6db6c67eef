"""Steps and padding: the arithmetic of TRL's batches on Dolly's lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from recipes_lib.config.recipe import load_recipe
from recipes_lib.planning.batches import validations
from recipes_lib.planning.lengths import dolly_lengths, lengths_of
from recipes_lib.planning.plan import Plan, plan_recipe


def plan(name: str, *overrides: str, **options: object) -> Plan:
    return plan_recipe(load_recipe(name, overrides), **{"gpu": "h100", **options})  # type: ignore[arg-type]


# Rows, steps per epoch and steps that the original study and the recipes' own comments state.
STATED = {
    "published-qlora-r8": (10_507, 329, 987),
    "published-qlora-r32": (12_008, 376, 1_128),
    "published-ddp-qlora-r32": (12_008, 188, 564),
    "published-fsdp-bf16-r32": (12_008, 188, 564),
    "qlora-r8": (13_510, 212, 636),
}


@pytest.mark.parametrize(("name", "stated"), STATED.items())
def test_rows_and_steps_are_the_stated_ones(name: str, stated: tuple[int, int, int]) -> None:
    batches = plan(f"llama2-7b-dolly/{name}").batches
    assert (batches.rows, batches.steps_per_epoch, batches.steps) == stated


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["train.num_train_epochs=1.5"], (39, 59)),  # half an epoch is rounded up
        # 305 rows make 12 steps of 24, and 17 rows are left out
        (
            [
                "train.dataloader_drop_last=true",
                "train.per_device_train_batch_size=4",
                "run.global_batch_size=24",
            ],
            (12, 12),
        ),
    ],
    ids=["half an epoch", "drop_last"],
)
def test_a_plan_counts_steps_as_the_training_does(words: list[str], steps: tuple[int, int]) -> None:
    batches = plan_recipe(load_recipe("quickstart/lora-r8", words)).batches
    assert (batches.rows, batches.steps_per_epoch, batches.steps) == (305, *steps)


# Measured on the real rows: tokens computed for each real one. Random batches of 4 and 32; batches
# grouped by length.
@pytest.mark.parametrize(
    ("size", "grouped", "measured"), [(4, False, 2.07), (32, False, 4.2), (4, True, 1.005)]
)
def test_padding_wastes_what_was_measured_on_dolly(
    size: int, grouped: bool, measured: float
) -> None:
    order = "group_by_length" if grouped else "random"
    words = [f"train.per_device_train_batch_size={size}", f"train.train_sampling_strategy={order}"]
    words.append("model.attn_implementation=sdpa")
    assert plan("llama2-7b-dolly/lora-bf16-r32", *words).batches.padding == pytest.approx(
        measured, rel=0.06
    )


def test_packing_fills_rows_and_padding_free_pads_nothing() -> None:
    packed = plan("llama2-7b-dolly/lora-bf16-r32", "train.packing=true").batches
    assert packed.padding == pytest.approx(1.0, abs=0.001)
    assert packed.rows == pytest.approx(13_510 * 198.5 / 1024, rel=0.01)
    free = plan("llama2-7b-dolly/lora-bf16-r32", "train.padding_free=true").batches
    assert free.padding == 1.0
    assert free.steps == 636


def test_the_histogram_is_dollys(shared_data: Path) -> None:
    rows = [
        json.loads(line)
        for file in sorted((shared_data / "dolly").glob("databricks*.jsonl"))
        for line in file.open(encoding="utf-8")
    ]
    assert len(dolly_lengths()) == len(rows) == 15_011
    characters = sum(
        len(row["instruction"]) + len(row["context"]) + len(row["response"]) for row in rows
    )
    assert 3.5 < characters / sum(dolly_lengths()) < 5  # characters per token, headings included


def test_a_small_vocabulary_makes_the_tokens_of_the_original_studys_logs() -> None:
    """Llama-2: 7,398,213 tokens in three epochs of 12,008 rows (its prompt also named an empty
    context in rows that have none).
    """
    batches = plan("llama2-7b-dolly/published-fsdp-bf16-r32").batches
    assert batches.tokens * batches.steps == pytest.approx(7_398_213, rel=0.05)
    sizes = [sum(dolly_lengths(vocabulary)) for vocabulary in (32_000, 49_152, 128_256)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] / sizes[2] == pytest.approx(
        210.9 / 188.0, rel=0.01
    )


def test_local_rows_are_counted() -> None:
    lengths = lengths_of(load_recipe("quickstart/lora-r8"), 49_152)
    assert (lengths.train, lengths.validation) == (305, 23)
    assert lengths.counted
    assert sum(lengths.tokens) / len(lengths.tokens) == pytest.approx(
        91.3, rel=0.15
    )  # `recipes data` counts 91.3


def test_rows_that_the_filters_leave_out_are_not_counted(tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "completion": "a" * (number % 2)} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"data.source={tmp_path}/rows.jsonl", "data.prompt_format=raw"]
    words += ["data.filters.drop_empty_completions=true"]
    lengths = lengths_of(load_recipe("quickstart/lora-r8", words), 49_152)
    assert lengths.train + lengths.validation + lengths.test == 50


def test_data_that_is_not_here_is_assumed_and_said_so() -> None:
    lengths = lengths_of(
        load_recipe("quickstart/lora-r8", ["data.source=somebody/something"]), 49_152
    )
    assert not lengths.counted
    assert "assumed" in lengths.source


def test_an_earlier_run_tells_its_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    recipe = load_recipe("quickstart/lora-r8", ["data.source=somebody/something"])
    audit = {
        "rows": {"used": 100, "trained": 90, "validation": 10},
        "tokens": {"total": 5000, "max": 400},
    }
    (tmp_path / recipe.name).mkdir()
    (tmp_path / recipe.name / "supervision.json").write_text(json.dumps(audit))
    (tmp_path / recipe.name / "resolved.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    lengths = lengths_of(recipe, 49_152)
    assert (lengths.train, lengths.validation, max(lengths.tokens)) == (90, 10, 400)
    assert sum(lengths.tokens) / len(lengths.tokens) == pytest.approx(50, rel=0.1)
    fewer = load_recipe(
        "quickstart/lora-r8", ["data.source=somebody/something", "data.max_examples=40"]
    )
    assert (
        lengths_of(fewer, 49_152).train < 40 and not lengths_of(fewer, 49_152).counted
    )  # other data than that run's


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, 0),
        ({"eval_strategy": "epoch"}, 3),
        ({"eval_strategy": "steps", "eval_steps": 50}, 6),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, 2),
        ({"eval_strategy": "steps", "eval_steps": 299, "eval_on_start": True}, 3),
    ],
)
def test_validations_are_counted(train: dict[str, object], expected: int) -> None:
    assert validations(300, 100, train) == expected
