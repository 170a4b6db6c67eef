"""The judgment store survives kills, torn tails and other processes, and names damage by
its line.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.files import valid_texts
from recipes_lib.evals.audit import audit
from recipes_lib.evals.store import Store, stored_rows, text_hash


def _row(index: int, **fields) -> dict:
    return {
        "key": text_hash(str(index)),
        "question_id": str(index),
        "raw": "Fine. [RESULT] A",
        **fields,
    }


def test_a_row_is_stored_once_and_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "judgments.jsonl")
    store.append([_row(1)])
    store.append([_row(1)])
    assert list(Store(store.path)) == [_row(1)] == stored_rows(store.path)
    assert _row(1)["key"] in store and store.get("nothing") is None


def test_missing_file_is_an_empty_store(tmp_path: Path) -> None:
    assert len(Store(tmp_path / "j.jsonl")) == 0
    assert stored_rows(tmp_path / "none.jsonl") == []


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_a_file_cut_anywhere_keeps_every_whole_line(
    tmp_path_factory, cut: int, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("store") / "j.jsonl"
    store = Store(path)
    for index, text in enumerate(texts):
        store.append([_row(index, raw=text)])
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    reopened = Store(path)
    assert len(reopened) == data[:cut].count(b"\n")
    for index, text in enumerate(texts):
        reopened.append([_row(index, raw=text)])
    assert path.read_bytes() == data


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2), st.binary(min_size=1, max_size=20).filter(lambda noise: b"\n" not in noise)
)
def test_a_damaged_line_is_named_by_its_number(tmp_path_factory, which: int, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("store") / "j.jsonl"
    store = Store(path)
    for index in range(4):
        store.append([_row(index)])
    lines = path.read_bytes().split(b"\n")
    lines[which] = noise + lines[which][len(noise) :]
    if lines[which] == _line_of(which):
        return
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        Store(path)
    assert (caught.value.line, caught.value.file) == (which + 1, path)


def _line_of(index: int) -> bytes:
    return json.dumps(_row(index), separators=(",", ":")).encode()


def test_a_repeated_key_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes((_line_of(1) + b"\n") * 2)
    with pytest.raises(DataError, match="twice") as caught:
        Store(path)
    assert caught.value.line == 2


def test_reading_leaves_the_torn_tail_alone_and_writing_cuts_it(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Store(path).append([_row(1)])
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    before = path.read_bytes()
    assert len(stored_rows(path)) == 1
    assert path.read_bytes() == before
    assert len(Store(path)) == 1
    assert path.read_bytes() == before[:-13]


@pytest.mark.parametrize(
    "text",
    ["line\u2028separator", "\ud800 lone surrogate", "\x00\x1b[31m", "🙂" * 1000, "a\nb\r\n"],
)
def test_any_text_survives_the_round_trip(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path / "j.jsonl")
    store.append([_row(1, raw=text)])
    assert stored_rows(store.path)[0]["raw"] == valid_texts(text)
    assert len(text_hash(text)) == 64


def test_two_stores_on_one_file_see_each_other(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "j.jsonl"), Store(tmp_path / "j.jsonl")
    first.append([_row(1)])
    second.append([_row(1)])
    second.append([_row(2)])
    first.append([_row(2)])
    assert len(first) == len(second) == len(stored_rows(first.path)) == 2


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "j.jsonl")
    store.append([_row(1)])
    before = store.path.read_bytes()
    real = os.write
    monkeypatch.setattr("recipes_lib.evals.store.os.write", lambda fd, data: real(fd, data[:10]))
    with pytest.raises(EnvironmentFault, match="10 of"):
        store.append([_row(2)])
    monkeypatch.undo()
    assert store.path.read_bytes() == before
    store.append([_row(2)])
    assert len(stored_rows(store.path)) == 2


def test_rows_that_arrive_together_are_synced_once_and_each_is_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced = Store(tmp_path / "j.jsonl"), []
    store.append([_row(1)])
    real = os.fsync
    monkeypatch.setattr(
        "recipes_lib.evals.store.os.fsync", lambda fd: (synced.append(fd), real(fd))[1]
    )
    store.append([_row(1), _row(2), _row(3), _row(2)])
    assert len(synced) == 1
    store.append([_row(3), _row(1)])
    store.append([])
    assert len(synced) == 1 and stored_rows(store.path) == list(store) and len(store) == 3


def test_a_disk_that_fills_between_two_rows_keeps_the_first_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "j.jsonl")
    real, count = os.write, []

    def full_at_the_second(fd: int, data: bytes) -> int:
        count.append(fd)
        return real(fd, data if len(count) == 1 else data[:7])

    monkeypatch.setattr("recipes_lib.evals.store.os.write", full_at_the_second)
    with pytest.raises(EnvironmentFault, match="7 of"):
        store.append([_row(1), _row(2), _row(3)])
    monkeypatch.undo()
    assert len(stored_rows(store.path)) == len(store) == 1
    store.append([_row(1), _row(2), _row(3)])
    assert len(stored_rows(store.path)) == 3


def test_a_store_that_shrinks_under_us_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "j.jsonl")
    store.append([_row(1)])
    store.path.write_bytes(b"")
    with pytest.raises(DataError, match="shortened"):
        store.append([_row(2)])


def test_a_held_lock_times_out_with_a_message(tmp_path: Path) -> None:
    holder = Store(tmp_path / "j.jsonl")
    with holder._locked(), pytest.raises(EnvironmentFault, match="lock"):
        Store(tmp_path / "j.jsonl", lock_timeout_s=0.1)


def _append_all(path: Path, seed: int, count: int) -> None:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    store = Store(path)
    for index in order:
        store.append([_row(index)])


def test_two_processes_write_each_row_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_all, args=(path, seed, 120)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(int(row["question_id"]) for row in stored_rows(path)) == list(range(120))


WRITER = """
import os, random, sys, time
from recipes_lib.evals import store as module
from recipes_lib.evals.store import Store, text_hash
path, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
real, draw = os.write, random.Random(seed)
def slow(descriptor, data):
    # half of the writes happen in two pieces, so that a kill can tear a line
    if draw.random() < 0.5:
        cut = draw.randrange(1, len(data))
        first = real(descriptor, data[:cut])
        time.sleep(0.004)
        return first + real(descriptor, data[cut:])
    return real(descriptor, data)
module.os.write = slow
store = Store(path)
for index in range(count):
    store.append([{"key": text_hash(str(index)), "question_id": index, "raw": "x" * draw.randrange(3000)}])
"""  # noqa: E501


@pytest.mark.slow
def test_writers_killed_at_any_moment_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """300 rows, two writers at a time, at least seven kills and one torn line: every row is there
    once.
    """
    path, draw = tmp_path / "j.jsonl", random.Random(11)
    command = [sys.executable, "-c", WRITER, str(path), "300"]
    kills = torn = 0
    for attempt in range(60):
        writers = [subprocess.Popen([*command, str(100 * attempt + i)]) for i in range(2)]
        grown = path.stat().st_size if path.exists() else 0
        deadline = time.monotonic() + 20
        if kills < 7 or torn == 0:
            while (
                time.monotonic() < deadline
                and (path.stat().st_size if path.exists() else 0) <= grown + 20_000
                and any(w.poll() is None for w in writers)
            ):
                time.sleep(0.002)
            time.sleep(draw.random() * 0.02)
            for writer in writers:
                if writer.poll() is None:
                    writer.send_signal(signal.SIGKILL)
                    kills += 1
        assert all(writer.wait(60) in (0, -signal.SIGKILL) for writer in writers)
        torn += path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        if kills >= 7 and all(writer.returncode == 0 for writer in writers):
            break
    assert kills >= 7 and torn >= 1
    assert sorted(row["question_id"] for row in stored_rows(path)) == list(range(300))


@pytest.mark.slow
def test_a_hundred_thousand_judgments_load_and_are_audited_within_six_seconds(
    tmp_path: Path,
) -> None:
    path = tmp_path / "j.jsonl"
    usual = {"kind": "relative", "status": "ok", "source": "judge", "judge": "j", "attempts": []}
    usual |= {"cut": False, "lengths": [1, 2], "meta": {}, "raw": "because " * 60 + "[RESULT] A"}
    with path.open("w") as file:
        for index in range(100_000):
            row = {"key": text_hash(str(index)), "question_id": str(index // 2)}
            row |= {"order": ("AB", "BA")[index % 2], "value": "AB"[index % 3 % 2]}
            file.write(json.dumps(row | usual) + "\n")
    start = time.process_time()
    card = audit(list(Store(path)))
    assert time.process_time() - start < 6
    assert card.judgments == 100_000
