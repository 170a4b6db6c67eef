from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from recipes_lib.compare.published import load_published
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.core.project import project_root

FILE = project_root() / "recipes/studies/published/llama2-7b-dolly.yaml"
MINIMAL = """\
publication: p
source: s
tables:
  t:
    title: a table
    n: 10
    metrics: {win: {label: "win, %", beside: alpaca_eval/win_rate, factor: 0.01, places: 2}}
    arms:
      a: {win: 50}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def table_of(readme: str, first_cell: str) -> list[list[str]]:
    """The cells of the Markdown table whose header starts with a text."""
    lines = readme.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_cell}"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def readme(shared_data):
    return (shared_data / "README.md").read_text(encoding="utf-8")


def value(arm: str, table: str, metric: str) -> float:
    found = [
        number
        for number in load_published(FILE).of(arm)
        if (number.table, number.metric) == (table, metric)
    ]
    assert len(found) == 1, (arm, table, metric)
    return found[0].value


def test_every_number_of_the_four_published_tables_stands_in_the_file(readme):
    published = load_published(FILE)
    compared = set()
    arms = {
        "Llama-2-7B base (rank-8 job)": "base",
        "LoRA r=8": "r8",
        "Llama-2-7B base (rank-32 job)": "base-r32-job",
        "LoRA r=32": "r32",
    }
    for row in table_of(readme, "AlpacaEval")[1:]:
        for metric, cell in zip(("win", "loss", "tie", "mean_score"), row[1:], strict=True):
            assert value(arms[row[0]], "alpaca_eval", metric) == float(cell)
            compared.add((arms[row[0]], "alpaca_eval", metric))
    for row in table_of(readme, "MT-Bench")[1:]:
        number = next(
            number for number in published.of(row[0].replace("=", "")) if number.table == "mt_bench"
        )
        assert (number.value, list(number.interval or ())) == (float(row[1]), json.loads(row[2]))
        compared.add((number.arm, "mt_bench", "mean"))
    names = {
        "MMLU": "mmlu",
        "ARC-Challenge": "arc_challenge",
        "ARC-Easy": "arc_easy",
        "GSM8K": "gsm8k",
    }
    for row in table_of(readme, "lm-eval")[1:]:
        for arm, cell in zip(("base", "r8", "r32"), row[2:], strict=True):
            assert value(arm, "lm_eval", names[row[0]]) == float(cell)
            compared.add((arm, "lm_eval", names[row[0]]))
    metrics = ("seconds", "samples_per_second", "train_loss", "validation_loss")
    for metric, row in zip(metrics, table_of(readme, "2 GPUs")[1:], strict=True):
        for arm, cell in zip(("ddp-qlora", "fsdp-bf16"), row[1:], strict=True):
            assert value(arm, "two_gpus", metric) == float(cell.replace(",", ""))
            compared.add((arm, "two_gpus", metric))
    assert {
        (number.arm, number.table, number.metric)
        for number in published.numbers
        if number.table not in ("one_gpu", "two_gpus")
    } == {entry for entry in compared if entry[1] != "two_gpus"}


def test_every_number_of_the_published_section_stands_somewhere_in_the_file(readme):
    section = readme[
        readme.index("Published numbers of the original report") : readme.index("Acceptance band")
    ]
    text = FILE.read_text(encoding="utf-8").replace(",", "")
    numbers = set(
        re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\d)", section.replace(",", ""))
    )
    flat = {float(found) for found in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    # The first 6,371 rows of the copy are in the Hub's order: a fact of the copy, not of the
    # report.
    missing = {number for number in numbers if float(number) not in flat} - {"6371"}
    assert len(numbers) > 80
    assert not missing


def test_the_numbers_are_those_of_the_original_files(shared_data):
    folder = shared_data / "original_study"
    for arm, name in (("base", "baseline"), ("r8", "finetuned")):
        summary = json.loads((folder / f"alpaca_eval_rank_8/{name}/summary.json").read_text())
        assert value(arm, "alpaca_eval", "win") == pytest.approx(
            summary["win_rate_vs_baseline"], abs=0.005
        )
        assert value(arm, "alpaca_eval", "mean_score") == pytest.approx(
            summary["average_score"], abs=0.0051
        )
        with (folder / f"alpaca_eval_rank_8/{name}/detailed_results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == next(
            number.n for number in load_published(FILE).of(arm) if number.table == "alpaca_eval"
        )
    found = json.loads((folder / "lm_eval/extended_eval_results_rank_8.json").read_text())
    for task, metric in (
        ("mmlu", "acc,none"),
        ("arc_challenge", "acc_norm,none"),
        ("gsm8k", "exact_match,flexible-extract"),
    ):
        number = next(number for number in load_published(FILE).of("r8") if number.metric == task)
        assert number.value == pytest.approx(found["results"][task][metric], abs=0.00005)
        if "n-samples" in found:
            assert number.n == found["n-samples"][task]["original"]


def test_a_number_stands_beside_our_metric_in_our_unit():
    published = load_published(FILE)
    win = published.beside("r8", "alpaca_eval/win_rate")
    grade = published.beside("r32", "mt_bench/grade")
    assert win is not None and (win.shown, win.ours, win.n) == ("85.00", 0.85, 800)
    assert any("always Response A" in note for note in win.protocol)
    assert (
        grade is not None
        and grade.ours == pytest.approx(3.0185)
        and grade.our_interval == pytest.approx((2.809, 3.2285))
    )
    assert grade.notes and published.beside("r8", "lm_eval/winogrande/acc") is None
    assert list(dict.fromkeys(number.arm for number in published.numbers)) == [
        "base",
        "r8",
        "base-r32-job",
        "r32",
        "ddp-qlora",
        "fsdp-bf16",
    ]


# (what is replaced in the minimal file, by what, line of the answer, words of the answer)
BAD_NUMBERS = [
    ("win: 50", "wins: 50", 9, ["no metric 'wins'", "did you mean win?"]),
    ("win: 50", "win: fifty", 9, ["must be a number", "'fifty'"]),
    ("win: 50", "win: .nan", 9, ["must be a number", ".nan"]),
    (
        "win: 50",
        "win: {value: 50, interval: [60, 70]}",
        9,
        ["50 is not within its interval [60, 70]"],
    ),
    ("win: 50", "win: {value: 50, interval: [60]}", 9, ["interval"]),
    ("win: 50", "win: {value: 50, ci: [40, 60]}", 9, ["unknown key", "ci"]),
    ("n: 10", "n: 0", 6, ["whole number >= 1"]),
    ("n: 10", "n: 10.5", 6, ["whole number >= 1"]),
    ("beside: alpaca_eval/win_rate", "beside: win rate", 7, ["'win rate' is no metric of ours"]),
    ("title: a table", "titel: a table", 5, ["unknown key", "did you mean"]),
    ("win: 50", "win: true", 9, ["must be a number"]),
    ("n: 10", "circumstances: {ab: {hardware: x}}", 6, ["table 't' has no arm 'ab'"]),
    ("n: 10", "circumstances: {a: {hardware: 7}}", 6, ["must be text, got 7"]),
]


@pytest.mark.parametrize(("old", "new", "line", "words"), BAD_NUMBERS)
def test_a_wrong_file_is_answered_with_file_and_line(tmp_path, old, new, line, words):
    with pytest.raises(RecipeErrors) as caught:
        load_published(written(tmp_path, MINIMAL.replace(old, new)))
    errors = [error for error in caught.value.errors if error.line == line]
    assert errors and all(any(word in str(error) for error in errors) for word in words), str(
        caught.value
    )


def test_no_table_is_an_error(tmp_path):
    with pytest.raises(RecipeErrors, match="3: tables is empty"):
        load_published(written(tmp_path, "publication: p\nsource: s\ntables: {}\n"))


def test_two_numbers_beside_one_metric_are_refused(tmp_path):
    text = MINIMAL.replace("    arms:", "    arms:\n      b: {win: 4}").replace(
        "metrics: {win:", "metrics: {again: {label: w, beside: alpaca_eval/win_rate}, win:"
    )
    published = load_published(written(tmp_path, text))
    assert [number.arm for number in published.numbers] == ["b", "a"]
    with pytest.raises(RecipeErrors, match="two numbers beside alpaca_eval/win_rate"):
        load_published(written(tmp_path, text.replace("a: {win: 50}", "a: {win: 50, again: 51}")))


def test_a_recipe_is_no_file_of_published_numbers():
    with pytest.raises(Exception, match="is a study, not published numbers"):
        load_published(project_root() / "recipes/studies/quickstart.yaml")


def test_a_published_loss_stands_beside_a_held_out_loss_whatever_its_tokens_are():
    sweep = load_published(FILE.with_name("tinker-tulu3.yaml"))
    number = sweep.beside("1b-r64-lr1e-3", "heldout_loss/tokens-1a2b3c4d/loss")
    assert number is not None and (number.shown, number.n) == ("0.7802", 1024)
    assert sweep.beside("1b-r64-lr1e-3", "heldout_loss/tokens-1a2b3c4d/bits_per_byte") is None
    assert sweep.beside("1b-r64-lr1e-3", "other/tokens-1a2b3c4d/loss") is None


def test_the_borrowed_numbers_are_those_of_the_published_tables(shared_data):
    folder = shared_data / "published"
    if not folder.is_dir():
        pytest.skip("the published tables are not here")
    with (folder / "tinker_sft_sweep.csv").open(encoding="utf-8") as file:
        cells = {
            f"{row['model']} {row['lora_rank']} {float(row['learning_rate']):g}": row
            for row in reversed(list(csv.DictReader(file)))  # the first of two trainings
        }
    sweep = load_published(FILE.with_name("tinker-tulu3.yaml"))
    models = {"1b": "meta-llama/Llama-3.2-1B", "8b": "meta-llama/Llama-3.1-8B"}
    columns = {"test_nll": "test_nll", "train_nll": "train_nll", "minutes": "wall_minutes"}
    assert len(sweep.numbers) == 2 * 16 * 3
    for one in sweep.numbers:
        size, rank, rate = one.arm.split("-", 2)
        row = cells[f"{models[size]} {rank[1:]} {float(rate[2:]):g}"]
        assert one.value == float(row[columns[one.metric]]), one.arm
    names = {
        "lora-r32": "rank32",
        "lora-r64": "rank64",
        "rslora-r64": "rank64-rslora",
        "lora-r10-mlp": "rank10-target-mlp",
        "dora-r32": "rank32-dora",
        "full": "lr_0.00001",
    }
    with (folder / "peft_metamathqa.csv").open(encoding="utf-8") as file:
        rows = {row["experiment"]: row for row in csv.DictReader(file)}
    told = {
        "accuracy": ("gsm8k_test_accuracy", 4),
        "seconds": ("train_seconds", 0),
        "peak_memory": ("peak_memory_gib", 1),
        "trainable": ("trainable_parameters", 0),
        "train_loss": ("train_loss", 4),
    }
    for one in load_published(FILE.with_name("peft-metamathqa.yaml")).numbers:
        method = "full-finetuning" if one.arm == "full" else "lora"
        row, (column, places) = rows[f"{method}/llama-3.2-3B-{names[one.arm]}"], told[one.metric]
        assert abs(one.value - float(row[column])) <= 0.5001 * 10**-places, (one.arm, one.metric)
