"""Work that one rank does for all: the result, or the error, reaches every rank, so that all go on
or all stop.
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.libraries import importing
from recipes_lib.core.terminal import say

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
STAGE_FILE = "RECIPES_STAGE_FILE"  # where `recipes train` reads how far the training is
STEPS, CLOSING = "steps", "closing"
SEEN = {  # what a first Ctrl-C is answered, by stage
    STEPS: (
        "stopping in a checkpoint after this step or validation batch (Ctrl-C again ends it at"
        " once) ..."
    ),
    CLOSING: (
        "all steps are done: the weights are being saved and checked (Ctrl-C again ends it at"
        " once) ..."
    ),
}
LAST_WORDS_S = 60.0  # that a failing rank 0 waits for the others to read why

_working_alone = False
_meetings = itertools.count()
_kept: list[object] = []


def rank() -> int:
    """Return this process's rank as the launcher set it; 0 without one. Needs no torch."""
    return int(os.environ.get("RANK", "0"))


def tell_stage(stage: str) -> None:
    """Leave a word for `recipes train`: a Ctrl-C before the first step has nothing to save, one
    after the last has nothing to stop.
    """
    file = os.environ.get(STAGE_FILE)
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            write_text(
                Path(file), stage
            )  # whole whenever it is read: an empty one would say that nothing can be saved


def on_main_rank(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank, however long it takes.

    The result goes through the store that the processes met in: `train.ddp_timeout` would end a
    collective while a large model is hashed or reloaded. Inside `work` a further call just runs:
    the other ranks wait for the outer result.

    Raises:
        Exception: what `work` raised on rank 0, on every rank, with `on_every_rank` set.
    """
    import torch.distributed as dist

    if _working_alone or not (dist.is_available() and dist.is_initialized()):
        return work()
    return _hand_out(work, *_meeting(), dist.get_rank(), dist.get_world_size())


def on_first_rank(work: Callable[[], T]) -> T:
    """As `on_main_rank`, before there is a process group, which can be made only with what the
    recipe says (`train.ddp_timeout`): through the store in which the processes meet to make it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not {"LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        return work()
    with importing():
        from torch.distributed.rendezvous import rendezvous

    store, *_ = next(rendezvous("env://"))
    _kept.append(store)  # of a launch without torch's launcher it serves the others
    return _hand_out(work, store, "recipes/first", rank(), size)


def _hand_out(work: Callable[[], T], store: Any, key: str, here: int, size: int) -> T:
    global _working_alone
    if here == 0:
        _working_alone = True
        try:
            outcome: tuple[T | None, Exception | None] = (work(), None)
        except Exception as error:
            outcome = (None, of_every_rank(error))
        finally:
            _working_alone = False
        store.set(key, _pickled(outcome))
        if outcome[1] is not None:  # this process ends now, and the store perhaps with it
            _wait(lambda: store.add(f"{key}/read", 0) == size - 1, LAST_WORDS_S)
    else:
        _wait(lambda: store.check([key]))
        outcome = pickle.loads(store.get(key))
        store.add(f"{key}/read", 1)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def of_every_rank(error: E) -> E:
    """Mark an error that every rank has, so that only rank 0 prints it, and return it."""
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def meet() -> None:
    """Wait until every rank is here, however long one of them reads or writes files: a barrier
    would end after `train.ddp_timeout`.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and not _working_alone:
        store, key = _meeting()
        store.add(key, 1)
        _wait(lambda: store.add(key, 0) == dist.get_world_size())


def _meeting() -> tuple[Any, str]:
    """Return the store that all processes share, and this meeting's name: every rank counts its
    calls.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store(), f"recipes/{next(_meetings)}"


def _wait(arrived: Callable[[], bool], seconds: float = float("inf")) -> None:
    """Ask again and again, so that signals are handled meanwhile."""
    end, pause = time.monotonic() + seconds, 0.001
    while not arrived() and time.monotonic() < end:
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


def _pickled(outcome: tuple[Any, Exception | None]) -> bytes:
    """Return what the other ranks can read: an error that cannot be made again there becomes its
    text.
    """
    error = outcome[1]
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
    except Exception:
        if error is None:
            raise
        text = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((None, of_every_rank(text)))
    return data


def agree_on_largest(value: int) -> int:
    """Return the largest `value` of all ranks, on every rank."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    largest = torch.tensor(value, dtype=torch.int32, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def keep_alive(trainer: object) -> None:
    """Keep what holds the model from ever being freed, where there are several ranks.

    Freeing a DDP model takes its gloo process group apart, which waits for ever when the other rank
    was faster (seen in one of three stops on two ranks). `process.end_process` ends without it.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        _kept.append(trainer)


def leave_together() -> None:
    """Wait until every rank is done; by now everything is on the disk."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def say_once(text: str) -> None:
    """Print from rank 0."""
    if rank() == 0:
        say(text)
