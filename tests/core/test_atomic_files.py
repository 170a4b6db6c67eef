"""Whatever gets its name by a rename is on the disk before: by a model of a power cut for every
publisher, and with the user's umask.
"""

import json
import os
import re
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.cli import main as verb
from recipes_lib.core.files import publish, write_json, write_text
from recipes_lib.core.run_directory import run_lock

SOURCE = Path(__file__).resolve().parents[2] / "src" / "recipes_lib"
# nothing new, or a note that a cut makes pointless
ASIDE = (".incomplete", ".damaged", ".replaced", "lock.json")


class Disk:
    """Watches `os.fsync` and the renames of this process; native writers do not pass here, so what
    they wrote counts as not flushed.

    Attributes:
        lost: what a cut right after a rename would leave without its content, one line each.
        published: the names that renames gave to folders and files.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lost: list[str] = []
        self.published: list[str] = []
        self.renamed_in: set[Path] = set()
        self._flushed: dict[int, tuple[int, int]] = {}
        fsync = os.fsync

        def flush(handle: int) -> None:
            fsync(handle)
            facts = os.fstat(handle)
            self._flushed[facts.st_ino] = (facts.st_size, facts.st_mtime_ns)
            self.renamed_in.discard(Path(f"/proc/self/fd/{handle}").readlink())

        patch.setattr(os, "fsync", flush)
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            source, target = Path(source), Path(target)
            if not target.name.endswith(ASIDE) and ".incomplete" not in target.name:
                self.published.append(target.name)
                self._check(source, f"{target.name} was published")
                self._check_record(source, target)
            rename(source, target, **options)
            if target.name != "lock.json":
                self.renamed_in.add(target.parent.resolve())

        return renamed

    def _check_record(self, source: Path, target: Path) -> None:
        """A record vouches for other files: they must have been flushed before it appears."""
        if target.name == "COMPLETE.json":
            metrics = target.parent.parent.with_name("metrics.jsonl")
            for place in (target.parent, metrics):
                self._check(place, "the checkpoint was marked complete", but=source)
        if target.name == "run.json" and json.loads(source.read_text())["state"] == "finished":
            for name in ("adapter", "model", "metrics.jsonl"):
                self._check(target.parent / name, "the run was called finished")
            if target.parent.resolve() in self.renamed_in:
                self.lost.append("the run's folder was not flushed before it was called finished")

    def _check(self, place: Path, when: str, but: Path | None = None) -> None:
        for file in [place] if place.is_file() else place.rglob("*"):
            facts = file.stat()
            was_flushed = self._flushed.get(facts.st_ino) == (facts.st_size, facts.st_mtime_ns)
            if file.is_file() and file != but and not was_flushed:
                self.lost.append(f"{file.name} was not flushed before {when}")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_published_folder_is_on_the_disk_whole_before_it_gets_its_name(tmp_path, disk):
    place = folder_with(tmp_path / "final", old="o")
    folder_with(tmp_path / ".final.replaced", older="o")
    folder_with(tmp_path / "new", weights="w")
    folder_with(tmp_path / "new" / "deep", inner="i")
    publish(tmp_path / "new", place)
    assert disk.published == ["final"] and not disk.lost and not disk.renamed_in
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["final", "final/deep", "final/deep/inner", "final/weights"]


def test_the_model_of_a_power_cut_finds_a_rename_without_a_flush(tmp_path, disk):
    os.replace(folder_with(tmp_path / "new", weights="w"), tmp_path / "final")
    assert disk.lost == ["weights was not flushed before final was published"]
    (tmp_path / "final" / "weights").write_text("more")
    write_json(tmp_path / "final" / "COMPLETE.json", {})
    assert "weights was not flushed before the checkpoint was marked complete" in disk.lost


def test_nothing_else_renames_what_others_read() -> None:
    """A rename anywhere else would come before the bytes it names; what sets a folder aside makes
    nothing new.
    """
    renames = re.compile(r"os\.(?:replace|rename)\(|\.rename\(|shutil\.move\(|\.replace\([a-z_]+\)")
    files = [file for file in SOURCE.rglob("*.py") if renames.search(file.read_text("utf-8"))]
    names = {str(file.relative_to(SOURCE)) for file in files}
    assert names == {"core/files.py", "study/run.py", "training/resume_guard.py"}


def test_what_is_written_is_on_the_disk_and_as_private_as_umask_says(tiny_recipe, tmp_path, disk):
    from recipes_lib.evals.log import Store
    from recipes_lib.train import main

    runs, given = tmp_path / "runs", tmp_path / "given"
    before = os.umask(0o077)
    try:
        assert main([str(tiny_recipe), "train.learning_rate=3e-2"]) == 0
        assert disk.published.count("COMPLETE.json") == 4
        last_record = len(disk.published) - 1 - disk.published[::-1].index("run.json")
        assert disk.published.index("adapter") < last_record
        assert verb(["merge", "tiny"]) == 0
        assert verb(["export", "tiny", "--to", str(given)]) == 0
        Store(runs / "tiny" / "judgments.jsonl").append([{"key": "k"}])
        os.umask(0o002)
        write_json(tmp_path / "shared.json", {})
    finally:
        os.umask(before)
    assert not disk.lost and {"merged", "given"} <= set(disk.published)
    written = [*runs.rglob("*"), *given.rglob("*"), given]
    assert not [path for path in written if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    assert stat.S_IMODE((tmp_path / "shared.json").stat().st_mode) == 0o664


def test_a_write_that_fails_names_its_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "state.json", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*state\.json"):
            write_text(tmp_path / "state.json", "more than ten bytes")
        with pytest.raises(OSError, match=r"File too large.*lock\.json"), run_lock(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "state.json").read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "state.json"}
