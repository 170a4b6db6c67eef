"""Studies for the tests of this folder."""

from pathlib import Path

import pytest
from tests.evals.conftest import make_run, runs_folder  # noqa: F401
from tests.study.study_files import write_tiny_study


@pytest.fixture
def study_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tiny study, whose model is an empty folder; runs go to <tmp_path>/runs."""
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    (tmp_path / "no-model").mkdir()
    write_tiny_study(tmp_path / "study", tmp_path / "no-model")
    return tmp_path / "study"
