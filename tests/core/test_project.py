import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib.core import project
from recipes_lib.core.errors import RecipeError

ROOT = project.project_root()


def test_a_run_name_is_a_safe_folder_name() -> None:
    for name in ("a", "lora-r8", "quickstart--lora-r8", "A.b_c-1", "9", "a" * 100):
        assert project.check_run_name(name) == name
    refused = ["", "../../etc", "/abs", "a/b", "a" * 101, "run\n", "ru\nn", "é", "a.", ".hidden"]
    for name in (*refused, "-flag", "a b", "\N{PARTY POPPER}"):
        with pytest.raises(RecipeError, match=r"run\.name"):
            project.check_run_name(name, "r.yaml", 3)


def test_places_follow_the_environment_and_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert project.runs_root() == tmp_path / "runs"
    assert project.cache_root() == ROOT / ".cache"
    monkeypatch.setenv("RECIPES_RUNS_ROOT", "/elsewhere")
    monkeypatch.setenv("RECIPES_CACHE", "/cache")
    assert (project.runs_root(), project.cache_root()) == (Path("/elsewhere"), Path("/cache"))
    shipped = ROOT / "recipes/quickstart/lora-r8.yaml"
    assert project.recipe_path("quickstart/lora-r8") == shipped
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("model: {}\n")
    assert project.recipe_path("mine") == Path("recipes/mine.yaml")
    assert project.recipe_path("nowhere.yaml") == Path("nowhere.yaml")
    assert project.shown_path(tmp_path / "a/b.yaml") == "a/b.yaml"
    assert project.shown_path(Path("a/../b.yaml")) == "b.yaml"
    assert project.shown_path(tmp_path.parent / "c.yaml") == str(tmp_path.parent / "c.yaml")


def test_an_installed_package_brings_its_recipes(monkeypatch, tmp_path):
    """A wheel has no checkout around it: what is shipped lies inside the package."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    package = tmp_path / "recipes_lib"
    shipped = package / "shipped"
    names = ("recipes/quickstart/lora-r8.yaml", "evals/quickstart/alpaca_eval.yaml")
    rows = "recipes/quickstart/data/instructions.jsonl"
    for name in (*names, rows, "accelerate_configs/ddp.yaml", "launch/with_judge.sh"):
        assert (shipped / name).is_file(), name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(project, "PACKAGE", package)
    assert project.project_root() == shipped
    assert project.recipe_path("quickstart/lora-r8") == shipped / "recipes/quickstart/lora-r8.yaml"
    assert project.cache_root() == Path.home() / ".cache/recipes"
