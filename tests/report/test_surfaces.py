"""A grid of arms is reported as a surface: each metric over the numbers that the arms differ in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.compare.conftest import study_folder  # noqa: F401
from tests.compare.test_claims import arm, of, rates

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.design import Study, load_study
from recipes_lib.compare.validity import check_validity
from recipes_lib.compare.validity.grid import grid_of
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report

GRID = {
    f"r{rank}-lr{rate}": (rank, float(rate)) for rank in (4, 8) for rate in ("1e-4", "2e-4", "4e-4")
}


def grid_study(folder: Path, words: dict[str, str]) -> Study:
    """A study of the tiny model whose arms are one recipe with these overrides."""
    file = folder / "tiny.yaml"
    arms = "".join(
        f"  {name}: {{recipe: r4.yaml, overrides: [{mine}]}}\n" for name, mine in words.items()
    )
    text = file.read_text(encoding="utf-8").replace("  r4: r4.yaml\n  r8: r8.yaml\n", arms)
    file.write_text(text, encoding="utf-8")
    return load_study(file)


@pytest.fixture
def rank_by_rate(study_folder: Path) -> Study:  # noqa: F811
    """Two ranks at three learning rates."""
    return grid_study(
        study_folder,
        {
            name: f"lora.r={rank}, lora.lora_alpha={2 * rank}, train.learning_rate={rate}"
            for name, (rank, rate) in GRID.items()
        },
    )


def test_a_rank_by_rate_grid_is_drawn_and_its_best_cell_is_called_flattered(
    rank_by_rate: Study, tmp_path: Path
) -> None:
    right = dict(zip(GRID, (30, 40, 35, 33, 60, 50), strict=True))
    made = of(
        *(
            arm(name, [rates([1.0] * right[name] + [0.0] * (80 - right[name]))], r=rank)
            for name, (rank, _) in GRID.items()
        )
    )
    findings = check_validity(rank_by_rate, made)
    comparison = compare_arms(made, findings, rank_by_rate)
    content = gather("tiny", made, comparison, rank_by_rate)
    (surface,) = content.surfaces
    assert (surface.key, surface.second) == ("train.learning_rate", "lora.r")
    write_report(tmp_path / "report", content)
    assert (tmp_path / "report" / "figures" / "grid_1.svg").is_file()
    for name in ("report.html", "report.md", "report.tex"):
        text = " ".join((tmp_path / "report" / name).read_text(encoding="utf-8").split())
        assert "one line per lora" in text and "flattered by having been chosen" in text
        assert "Arc acc, by train.learning" in text.replace("\\", "")
    numbers = json.loads((tmp_path / "report" / "numbers.json").read_text("utf-8"))["numbers"]
    cells = {one["arm"]: one for one in numbers if one["kind"] == "grid"}
    assert cells["r8-lr2e-4"]["group"] == "train.learning_rate=0.0002, lora.r=8"
    assert cells["r8-lr2e-4"]["value"] == 0.75 and cells["r8-lr2e-4"]["n"] == 80
    assert [name for name, one in cells.items() if one.get("verdict") == "best"] == ["r8-lr2e-4"]


def test_the_best_cell_of_a_grid_of_two_factors_is_flattered_too(rank_by_rate: Study) -> None:
    file = rank_by_rate.path
    text = file.read_text(encoding="utf-8")
    factors = "factors:\n  rate: [train.learning_rate]\n"
    for name, (rank, rate) in GRID.items():
        text = text.replace(
            f"  {name}: {{", f"  {name}: {{cell: {{rank: r{rank}, rate: '{rate}'}}, "
        )
    file.write_text(text.replace("factors:\n", factors), encoding="utf-8")
    study = load_study(file)
    assert len(study.factors) == 2
    made = of(*(arm(name, [rates([1.0] * 40)]) for name in GRID))
    assert "best-of-many" in [one.code for one in check_validity(study, made)]


@pytest.mark.parametrize(
    ("words", "axes"),
    [
        ({f"a{n}": f"train.learning_rate={n}e-4" for n in (1, 2, 4)}, ("train.learning_rate",)),
        # two arms are a comparison and no curve; words are no axis; three keys are no surface
        ({f"a{n}": f"lora.r={n}" for n in (4, 8)}, None),
        ({f"a{n}": f"train.lr_scheduler_type={n}" for n in ("linear", "cosine", "constant")}, None),
        (
            {
                f"a{n}": f"lora.r={4 + n % 2}, train.warmup_steps={n // 2 % 2},"
                f" train.weight_decay={n // 4}"
                for n in range(8)
            },
            None,
        ),
        # the alpha follows from the rank
        ({f"a{n}": f"lora.r={n}, lora.lora_alpha={2 * n}" for n in (4, 8, 16)}, ("lora.r",)),
    ],
)
def test_the_axes_of_a_grid_are_found_in_the_values_of_the_arms(
    study_folder: Path,  # noqa: F811
    words: dict[str, str],
    axes: tuple[str, ...] | None,
) -> None:
    grid = grid_of(grid_study(study_folder, words))
    assert axes == (grid and tuple(filter(None, (grid.key, grid.second))))


def test_the_shipped_grid_of_learning_rates_is_one() -> None:
    grid = grid_of(load_study("learning-rate"))
    assert grid is not None and grid.key == "train.learning_rate" and grid.second is None
    assert sorted(grid.places.values()) == [(rate, None) for rate in (5e-5, 1e-4, 2e-4, 4e-4)]
