"""Work that one rank does for all: the result, or the error, reaches every rank.

It goes through the store in which the processes met: a collective would end at `train.ddp_timeout`
while a large model is hashed, and before the recipe is read there is no group.
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

from recipes_lib.core.environment import importing
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.terminal import say

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
_POLL_S = 0.05
_LAST_WORDS_S = 60.0  # that a failing rank 0 waits for the others to read why

_working_alone = False
_calls = itertools.count()
_kept: list[object] = []  # the store first, which serves the other ranks


def rank() -> int:
    """Return this process's rank as the launcher set it; 0 without one. Needs no torch."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes as the launcher set it; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say_once(text: str) -> None:
    """Print from rank 0."""
    if rank() == 0:
        say(text)


def on_main_rank(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result, or raise its error, on every rank.

    Every rank must call this at the same points. Inside `work` a further call just runs: the other
    ranks wait for the outer result. An error of another library is its text on the other ranks.
    """
    global _working_alone
    store = None if _working_alone else shared_store()
    if store is None:
        return work()
    key = f"recipes/{next(_calls)}"
    if rank() != 0:
        _wait(lambda: store.check([key]))
        result, error = pickle.loads(store.get(key))
    else:
        result, error = None, None
        _working_alone = True
        try:
            result = work()
        except Exception as caught:
            error = caught
        finally:
            _working_alone = False
        is_ours = error is None or isinstance(error, RecipesError)
        sent = error if is_ours else RuntimeError(f"{type(error).__name__}: {error}")
        store.set(key, pickle.dumps((result, sent)))
    if error is not None:
        _let_all_read(store, key)
        raise of_every_rank(error)
    return result


def meet() -> None:
    """Wait until every rank is here, however long one of them reads or writes files."""
    store = None if _working_alone else shared_store()
    if store is not None:
        key = f"recipes/{next(_calls)}"
        store.add(key, 1)
        _wait(lambda: store.add(key, 0) == world_size())
        _let_all_read(store, key)


def of_every_rank(error: E) -> E:
    """Mark an error that every rank has, so that only rank 0 prints it, and return it."""
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def agree_on_largest(value: int) -> int:
    """Return the largest `value` of all ranks, on every rank."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    largest = torch.tensor(value, dtype=torch.int32, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def keep_alive(trainer: object) -> None:
    """Never free a model of several ranks: gloo's group waits for ever where a rank was faster."""
    if world_size() > 1:
        _kept.append(trainer)


def shared_store() -> Any:
    """Return the store of the rendezvous, which the process group uses later; None for one."""
    if world_size() == 1 or not {"LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        return None
    if not _kept:
        with importing():
            from torch.distributed.rendezvous import rendezvous

        _kept.append(next(rendezvous("env://"))[0])
    return _kept[0]


def _let_all_read(store: Any, key: str) -> None:
    """Rank 0 may end now, and the store with it: it waits until the others have read."""
    store.add(f"{key}/read", 1)
    if rank() == 0:
        _wait(lambda: store.add(f"{key}/read", 0) == world_size(), _LAST_WORDS_S)


def _wait(arrived: Callable[[], bool], seconds: float = float("inf")) -> None:
    """Ask again and again, so that signals are handled meanwhile."""
    end = time.monotonic() + seconds
    while not arrived() and time.monotonic() < end:
        time.sleep(_POLL_S)
