"""Prepared rows that are kept: whatever happens to their files, the right ones are trained."""

import errno
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.core.test_ranks import fork_two

from recipes_lib.core.errors import DataError, ExitCode
from recipes_lib.data import cache as caching
from recipes_lib.data import prepare as preparing
from recipes_lib.data.encoding import Supervision
from recipes_lib.data.prepare import prepare_data


@pytest.fixture
def start(recipe_for, tiny_tokenizer, write_jsonl, tasks, tmp_path, monkeypatch):
    """Prepare the same rows as every other start of this test."""
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    recipe = recipe_for(write_jsonl(tasks(16)), split={"validation": 0.2, "test": 0.1})
    return lambda: prepare_data(recipe, tiny_tokenizer)


def content(data):
    """All that a training takes from prepared rows."""
    parts = [part.to_list() for part in (data.train, data.validation, data.test)]
    return parts, data.audit, data.splits, data.fingerprint, data.tokens_hash


def the_folder(tmp_path: Path) -> Path:
    [folder] = (tmp_path / "cache" / "rows").glob("*/data")
    return folder


def flip(file: Path, at: int, bit: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1 << bit
    file.write_bytes(damaged)


def test_a_flipped_bit_in_any_file_of_the_cache_makes_the_rows_again(start, tmp_path, capfd):
    right = content(start())
    dice = random.Random(1)
    names = [
        path.relative_to(the_folder(tmp_path)).as_posix()
        for path in the_folder(tmp_path).rglob("*")
        if path.is_file()
    ]
    assert {"prepared.json", "files.json", "train/data-00000-of-00001.arrow"} <= {*names}
    for name in names:
        size = (the_folder(tmp_path) / name).stat().st_size
        for at in (0, size // 2, dice.randrange(size)):
            flip(the_folder(tmp_path) / name, at, dice.randrange(8))
            capfd.readouterr()
            assert content(start()) == right, (name, at)
            said = capfd.readouterr().err
            # white space and the letters of an escape in files.json may change without harm
            if name != "files.json" or said:
                assert f"prepared rows were damaged ({name}); they were made again" in said
                assert said.count("\n") == 1
            assert not caching.find_damage(the_folder(tmp_path)) or name == "files.json"


def test_a_cut_a_missing_and_an_emptied_file_make_the_rows_again(start, tmp_path, capfd):
    right = content(start())
    for name in ("train/data-00000-of-00001.arrow", "prepared.json", "files.json"):
        for damage in (
            lambda file: os.truncate(file, file.stat().st_size // 2),
            lambda file: os.truncate(file, 0),
            Path.unlink,
            lambda file: file.write_text("[1]"),
        ):
            damage(the_folder(tmp_path) / name)
            capfd.readouterr()
            assert content(start()) == right
            assert f"damaged ({name})" in capfd.readouterr().err


def test_a_damaged_record_with_another_hash_of_tokens_is_not_believed(start, tmp_path):
    right = content(start())
    file = the_folder(tmp_path) / "prepared.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokens_hash": "0" * 64}))
    assert content(start()) == right


def test_whole_rows_of_a_read_only_cache_are_used_and_damaged_ones_refused(
    start, tmp_path, monkeypatch
):
    right = content(start())

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(caching, "FileLock", refuse)
    assert content(start()) == right
    flip(the_folder(tmp_path) / "train" / "data-00000-of-00001.arrow", 999, 3)
    with pytest.raises(DataError, match=r"damaged .*Read-only file system") as caught:
        start()
    assert caught.value.exit_code == ExitCode.DATA
    assert str(caught.value.file).endswith("/data")
    assert "delete this folder" in caught.value.hints[0]


def test_two_starts_that_find_the_same_damage_make_the_rows_once(start, tmp_path, monkeypatch):
    right = content(start())
    flip(the_folder(tmp_path) / "prepared.json", 9, 1)
    prepare, times = preparing._prepare, []

    def slowly(*args):
        times.append(args)
        time.sleep(0.5)
        return prepare(*args)

    monkeypatch.setattr(preparing, "_prepare", slowly)
    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(start) for _ in range(3)]
        assert all(content(other.result()) == right for other in starts)
    assert len(times) == 1


def test_what_a_killed_process_left_is_cleared(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(caching, "publish", lambda scratch, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start()
    data = start()
    assert len(data.train) > 8
    assert {path.name for path in the_folder(tmp_path).parent.iterdir()} == {"lock", "data"}


def test_each_machine_checks_its_own_cache(
    recipe_for, tiny_tokenizer, write_jsonl, tasks, tmp_path, monkeypatch, capfd
):
    path = write_jsonl(tasks(20))

    def on_a_machine() -> str:
        """Two ranks, each the first of its machine, which has a disk of its own."""
        number = os.environ["RANK"]
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ["RECIPES_CACHE"] = str(tmp_path / f"cache-{number}")
        data = prepare_data(recipe_for(path), tiny_tokenizer)
        return data.tokens_hash + str(data.train.to_list())

    first, second = fork_two(on_a_machine)
    assert first == second
    [folder] = (tmp_path / "cache-1" / "rows").glob("*/data")
    flip(folder / "train" / "data-00000-of-00001.arrow", 2_000, 1)
    assert fork_two(on_a_machine) == [first, second]
    assert "data-00000-of-00001.arrow" in capfd.readouterr().err


def test_a_machine_with_other_rows_than_rank_0_is_refused(
    recipe_for, tiny_tokenizer, write_jsonl, tasks
):
    recipe = recipe_for(write_jsonl(tasks(4)))
    settings = Supervision.of(recipe.data, recipe.train, tiny_tokenizer)
    with pytest.raises(DataError, match="would not be those of rank 0's"):
        preparing._keep(recipe, settings, tiny_tokenizer, expected="another key")
