"""Disks that fill, turn read-only, run out of inodes, and lose power: nothing that was complete is
lost, and the same command goes on.

The disks are real: a small tmpfs, an ext4 image on a loop device. They need root and the right to
mount; without it these tests are skipped, and `tests/test_atomic_files.py` has the model of a power
cut alone.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.tiers import in_ci

pytestmark = pytest.mark.slow

MIB = 2**20
ADAPTER = "adapter_model.safetensors"


def mounted(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def tmpfs(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a tmpfs with these options (or gives the same one others) and returns
    its folder.
    """
    place = tmp_path / "small"
    place.mkdir()

    def mount(options: str) -> Path:
        again = "remount," if os.path.ismount(place) else ""
        if not mounted("-t", "tmpfs", "-o", again + options, "tmpfs", str(place)):
            pytest.skip("this test mounts a disk, which is not allowed here")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def whole(launcher) -> Path:
    """A run that nothing happened to."""
    launcher.train("run.name=whole")
    return launcher.run("whole")


def assert_told(said: str) -> None:
    """One line says what happened, and none calls it a bug."""
    assert "internal error" not in said and "Traceback" not in said, said[-3000:]


def loss_series(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    assert (run / "adapter" / ADAPTER).read_bytes() == (whole / "adapter" / ADAPTER).read_bytes()
    assert loss_series(run) == loss_series(whole)


def room(whole: Path) -> dict[str, str]:
    """Options of a disk that is full when a part of a run is about to be written."""
    one = sum(file.stat().st_size for file in (whole / "checkpoints" / "checkpoint-2").rglob("*"))
    records = sum(file.stat().st_size for file in whole.iterdir() if file.is_file())
    sizes = {
        "the first record": 8 * 1024,
        "the first checkpoint": records + one // 3,
        "the tokenizer of a checkpoint": records + one - 20 * 1024,
        "a later checkpoint": records + 2 * one + one // 2,
        "the final weights": records + 4 * one + 30 * 1024,
    }
    full = {part: f"size={size // 4096 * 4096},nr_inodes=9999" for part, size in sizes.items()}
    return full | {"no inode": "size=64m,nr_inodes=40"}


PARTS = (
    *("the first record", "the first checkpoint", "the tokenizer of a checkpoint"),
    *("a later checkpoint", "the final weights", "no inode"),
)


@pytest.mark.parametrize("part", in_ci(PARTS, "a later checkpoint"))
def test_a_disk_that_fills_ends_in_one_line_and_loses_nothing(launcher, whole, tmpfs, part) -> None:
    runs = tmpfs(room(whole)[part])
    name = "run.name=small"
    code, said = launcher.start(name, RECIPES_RUNS_ROOT=str(runs)).wait()
    assert code == 5, said[-3000:]
    assert_told(said)
    tmpfs("size=64m,nr_inodes=9999")
    launcher.train(name, RECIPES_RUNS_ROOT=str(runs))
    assert_same(runs / "small", whole)


LIMITS = {
    "ulimit -f": (resource.RLIMIT_FSIZE, 20 * 1024),
    "out of memory": (resource.RLIMIT_AS, 3 * 10**8),
}


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("reason", LIMITS)
def test_a_limit_of_the_system_ends_in_one_line_and_loses_nothing(launcher, whole, reason) -> None:
    """A fresh process sets it on itself: a fork of this large one could not start under it."""
    limit, value = LIMITS[reason]
    name = f"limit-{limit}"
    script = f"resource.setrlimit({limit}, ({value}, {value})); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", f"import os, resource, sys; {script}"]
    command += launcher.command(f"run.name={name}")
    code, said = launcher.wait(launcher.start_really(command))
    assert code == 5, said[-3000:]
    assert_told(said)
    launcher.train(f"run.name={name}")
    assert_same(launcher.run(name), whole)


class Ext4:
    """A file system in a file. A copy of the file is what a power cut would leave: what was not
    written to the disk is not in it.
    """

    def __init__(self, folder: Path) -> None:
        self.image, self.place, self.copies = folder / "disk.img", folder / "disk", 0
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(192 * MIB)
        command = ["mkfs.ext4", "-q", str(self.image)]
        made = shutil.which(command[0]) and not subprocess.run(command, check=False).returncode
        # no flush of its own on a rename: other file systems have none
        if not made or not mounted("-o", "loop,noauto_da_alloc", str(self.image), str(self.place)):
            pytest.skip("this test mounts a disk, which is not allowed here")
        self.mounts = [self.place]

    def cut(self) -> Path:
        """Return what the disk holds when the power goes now, mounted again (its journal is
        replayed).
        """
        self.copies += 1
        place = self.place.with_name(f"cut-{self.copies}")
        image = place.with_suffix(".img")
        shutil.copyfile(self.image, image)
        place.mkdir()
        assert mounted("-o", "loop", str(image), str(place))
        self.mounts.append(place)
        return place

    def close(self) -> None:
        for place in self.mounts:
            subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.fixture
def ext4(tmp_path) -> Iterator[Ext4]:
    disk = Ext4(tmp_path)
    yield disk
    disk.close()


def test_the_cut_of_a_disk_loses_what_was_not_flushed(ext4) -> None:
    (ext4.place / "kept").write_bytes(b"k" * 9000)
    with (ext4.place / "kept").open("rb") as file:
        os.fsync(file.fileno())
    (ext4.place / "lost").write_bytes(b"l" * 9000)
    after = ext4.cut()
    assert (after / "kept").read_bytes() == b"k" * 9000
    assert not (after / "lost").is_file() or (after / "lost").read_bytes() != b"l" * 9000


@pytest.mark.nightly
def test_a_power_cut_after_the_end_leaves_a_finished_run_with_its_weights(launcher, whole, ext4):
    launcher.train("run.name=cut", RECIPES_RUNS_ROOT=str(ext4.place / "runs"))
    run = ext4.cut() / "runs" / "cut"
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert_same(run, whole)
    written = ext4.place / "runs" / "cut" / "adapter"
    for file in (run / "adapter").iterdir():
        assert file.read_bytes() == (written / file.name).read_bytes(), file.name


@pytest.mark.parametrize("step", in_ci((2, 6), 6))
def test_a_power_cut_after_a_checkpoint_loses_no_line_and_no_file(launcher, whole, ext4, step):
    child = launcher.start("run.name=cut", RECIPES_RUNS_ROOT=str(ext4.place / "runs"))
    launcher.wait_for_checkpoint(child, step, ext4.place / "runs" / "cut")
    child.signal(signal.SIGSTOP)  # the image is copied piece by piece; a cut is one moment
    place = ext4.cut()
    child.signal(signal.SIGCONT)
    launcher.wait(child)
    said = launcher.train("run.name=cut", RECIPES_RUNS_ROOT=str(place / "runs"))
    if "already finished" not in said:
        resumed = int(said.split("resuming checkpoint-")[1].split()[0])
        # the marker's rename may not be on the disk yet; the checkpoint before it is
        assert resumed >= step - 2, said
    assert_same(place / "runs" / "cut", whole)


@pytest.mark.nightly
def test_a_disk_that_turns_read_only_ends_in_one_line_and_loses_nothing(launcher, whole, ext4):
    root = ext4.place / "runs"
    child = launcher.start("run.name=ro", RECIPES_RUNS_ROOT=str(root))
    launcher.wait_for_checkpoint(child, 2, root / "ro")
    if not mounted("-o", "remount,abort", str(ext4.place)):
        pytest.skip("this kernel cannot abort a file system")
    code, said = launcher.wait(child)
    assert code == 5, said[-3000:]
    assert_told(said)
    place = ext4.cut()
    launcher.train("run.name=ro", RECIPES_RUNS_ROOT=str(place / "runs"))
    assert_same(place / "runs" / "ro", whole)
