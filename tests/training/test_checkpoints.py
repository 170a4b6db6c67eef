"""A checkpoint is used only when it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.training import checkpoints

FILES = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def make_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_bytes(name.encode() * 10)
    if complete:
        checkpoints.mark_complete(checkpoint, step=step, world_size=1)
    return checkpoint


def test_the_newest_complete_checkpoint_is_used_by_step_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 100, 20):
        make_checkpoint(tmp_path, step)
    assert checkpoints.find_newest(tmp_path) == (tmp_path / "checkpoint-100", {})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_file_makes_the_checkpoint_incomplete_and_names_it(
    tmp_path: Path, name: str, damage: str
) -> None:
    good, bad = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    if damage == "missing":
        (bad / name).unlink()
    else:
        (bad / name).write_bytes((bad / name).read_bytes()[:-3])
    found, broken = checkpoints.find_newest(tmp_path)
    assert found == good and [*broken] == [bad] and name in broken[bad]
    assert bad.is_dir()


DAMAGED_MARKERS = [
    "",
    "{}",
    "[1]",
    '{"files": 3}',
    "[" * 100_000,
    '{"files": {}, "guard": {}, "sha257": {}}',
]


@pytest.mark.parametrize("content", [None, *DAMAGED_MARKERS], ids=lambda text: str(text)[:30])
def test_a_missing_or_torn_marker_makes_the_checkpoint_incomplete(
    tmp_path: Path, content: str | None
) -> None:
    checkpoint = make_checkpoint(tmp_path, 5, complete=False)
    if content is not None:
        (checkpoint / checkpoints.MARKER).write_text(content)
    assert checkpoints.what_is_missing(checkpoint)
    assert checkpoints.find_newest(tmp_path)[0] is None


def test_what_was_set_aside_twice_is_kept_twice(tmp_path: Path) -> None:
    for _ in range(2):
        checkpoints.set_aside(make_checkpoint(tmp_path, 5, complete=False), ".incomplete")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-5.incomplete",
        "checkpoint-5.incomplete-2",
    ]


def test_rotation_never_deletes_the_newest_the_best_or_an_incomplete_checkpoint(
    tmp_path: Path,
) -> None:
    for step in (2, 4, 6, 8):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 10, complete=False)
    checkpoints.rotate(tmp_path, keep=1, best=tmp_path / "checkpoint-4")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-4",
        "checkpoint-8",
    ]


def test_rotation_without_a_best_one_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-8").touch()  # a file of that name is none
    checkpoints.rotate(tmp_path, keep=2, best=None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_rotation_with_no_limit_keeps_everything(tmp_path: Path) -> None:
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    checkpoints.rotate(tmp_path, keep=None, best=None)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_missing_training_state_is_an_error_that_names_the_flag(
    tmp_path: Path, name: str
) -> None:
    checkpoint = make_checkpoint(tmp_path, 5, complete=False)
    (checkpoint / name).unlink()
    checkpoints.mark_complete(checkpoint, step=5, world_size=1)
    with pytest.raises(EnvironmentFault, match=name) as caught:
        checkpoints.check_resumable(checkpoint, world_size=1)
    assert "--allow-partial-resume" in str(caught.value)


def test_another_number_of_processes_lacks_random_states(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 5)
    with pytest.raises(EnvironmentFault, match=r"rng_state_1\.pth"):
        checkpoints.check_resumable(checkpoint, world_size=2)


def test_the_marker_lists_every_file_with_its_size(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 5)
    marker = json.loads((checkpoint / checkpoints.MARKER).read_text())
    assert marker["step"] == 5 and marker["files"] == {name: len(name) * 10 for name in FILES}


def test_a_flipped_byte_is_found_and_files_above_the_limit_are_known_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "HASHED_UP_TO", 200)
    checkpoint = make_checkpoint(tmp_path, 5)
    assert FILES[0] not in checkpoints.read_marker(checkpoint)["sha256"]  # 250 bytes
    optimizer = checkpoint / "optimizer.pt"
    optimizer.write_bytes(b"x" + optimizer.read_bytes()[1:])
    assert "optimizer.pt" in str(checkpoints.what_is_damaged(checkpoint))
