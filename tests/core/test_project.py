from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib.core import project
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import (
    cache_root,
    check_run_name,
    project_root,
    recipe_path,
    runs_root,
    shown_path,
)


def test_a_run_name_is_a_safe_folder_name() -> None:
    for name in ("a", "lora-r8", "quickstart--lora-r8", "A.b_c-1", "9", "a" * 100):
        assert check_run_name(name) == name
    refused = ["", "../../etc", "/abs", "a/b", "a" * 101, "run\n", "ru\nn", "é", "a.", ".hidden"]
    for name in (*refused, "-flag", "a b", "\N{PARTY POPPER}"):
        with pytest.raises(RecipeError, match=r"run\.name"):
            check_run_name(name, "r.yaml", 3)


def test_places_follow_the_environment_and_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert runs_root() == tmp_path / "runs"
    assert cache_root() == project_root() / ".cache"
    monkeypatch.setenv("RECIPES_RUNS_ROOT", "/elsewhere")
    monkeypatch.setenv("RECIPES_CACHE", "/cache")
    assert (runs_root(), cache_root()) == (Path("/elsewhere"), Path("/cache"))
    assert recipe_path("quickstart/lora-r8") == project_root() / "recipes/quickstart/lora-r8.yaml"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("model: {}\n")
    assert recipe_path("mine") == Path("recipes/mine.yaml")
    assert recipe_path("nowhere.yaml") == Path("nowhere.yaml")
    assert shown_path(tmp_path / "a/b.yaml") == "a/b.yaml"
    assert shown_path(Path("a/../b.yaml")) == "b.yaml"
    assert shown_path(tmp_path.parent / "c.yaml") == str(tmp_path.parent / "c.yaml")


def test_an_installed_package_brings_its_recipes(monkeypatch, tmp_path):
    """A wheel has no checkout around it: what is shipped lies inside the package."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=project_root(), check=True, capture_output=True, timeout=120)
    package = tmp_path / "recipes_lib"
    shipped = package / "shipped"
    names = ("recipes/quickstart/lora-r8.yaml", "evals/quickstart/alpaca_eval.yaml")
    rows = "recipes/quickstart/data/instructions.jsonl"
    for name in (*names, rows, "accelerate_configs/ddp.yaml", "launch/with_judge.sh"):
        assert (shipped / name).is_file(), name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(project, "PACKAGE", package)
    assert project_root() == shipped
    assert recipe_path("quickstart/lora-r8") == shipped / "recipes/quickstart/lora-r8.yaml"
    assert cache_root() == Path.home() / ".cache/recipes"
