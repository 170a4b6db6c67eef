from __future__ import annotations

from pathlib import Path

import pytest

from recipes_lib.config.loader import load_document
from recipes_lib.planning import quick_plan as planner
from recipes_lib.planning.plan_cache import UNKNOWN, quick_plans


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The recipes that were really planned; a plan is 2 GiB and 90 s, or not known for a recipe
    called odd.
    """
    done: list[Path] = []

    def quick_plan(document):
        done.append(document.path)
        return None if document.path.stem == "odd" else (2.0, 90.0)

    monkeypatch.setattr(planner, "quick_plan", quick_plan)
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    return done


def test_a_recipe_is_planned_once_and_again_when_it_or_its_rows_change(planned, tmp_path):
    rows, recipe, odd = tmp_path / "rows.jsonl", tmp_path / "r.yaml", tmp_path / "odd.yaml"
    rows.write_text("{}\n")
    for file in (recipe, odd):
        file.write_text("model: {name_or_path: a/b}\ndata: {source: rows.jsonl}\n")

    def look() -> list[tuple[str, str]]:
        return quick_plans([load_document(recipe), load_document(odd)])

    assert look() == look() == [("2.0 GiB", "90 s"), UNKNOWN]
    assert planned == [recipe, odd]
    rows.write_text("{}\n{}\n")
    look()
    assert planned[2:] == [recipe, odd]
    recipe.write_text(recipe.read_text() + "train: {max_length: 64}\n")
    look()
    assert planned[4:] == [recipe]
    (tmp_path / "cache" / "glances.json").write_text("{torn")
    assert look() == [("2.0 GiB", "90 s"), UNKNOWN]
    assert planned[5:] == [recipe, odd]
    (tmp_path / "cache" / "glances.json").write_text("[3]")
    assert look() == [("2.0 GiB", "90 s"), UNKNOWN]


def test_an_earlier_run_of_the_recipe_makes_its_plan_anew(planned, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {name_or_path: a/b}\ndata: {source: c/d}\nrun: {name: mine}\n")
    quick_plans([load_document(recipe)])
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "supervision.json").write_text("{}")
    quick_plans([load_document(recipe)])
    assert len(planned) == 2
