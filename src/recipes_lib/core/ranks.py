"""Work that one rank does for all: the result, or the error, reaches every rank.

It goes through the store in which the processes met: a collective would end at `train.ddp_timeout`
while a large model is hashed, and before the recipe is read there is no group.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from recipes_lib.core.errors import EnvironmentFault, RecipesError
from recipes_lib.core.terminal import say

T = TypeVar("T")
_POLL_S = 0.05

_working_alone = False
_calls = itertools.count()


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
        meet()
        error.on_every_rank = True  # so that only rank 0 prints it
        raise error
    return result


def meet() -> None:
    """Wait until every rank is here, however long one of them reads or writes files. Rank 0 leaves
    last, because the store may end with it.
    """
    store = None if _working_alone else shared_store()
    if store is not None:
        key, everybody = f"recipes/{next(_calls)}", world_size()
        store.add(key, 1)
        _wait(lambda: store.add(key, 0) >= everybody)
        store.add(key, 1)
        if rank() == 0:
            _wait(lambda: store.add(key, 0) == 2 * everybody)


def agree_on_largest(value: int) -> int:
    """Return the largest `value` of all ranks, on every rank."""
    if world_size() == 1:
        return value
    from torch import distributed, tensor

    largest = tensor(value, device="cpu" if distributed.get_backend() == "gloo" else "cuda")
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest.item())


def shared_store() -> Any:
    """Return the store of the rendezvous, which the process group uses later; None for one."""
    is_alone = world_size() == 1 or not {"LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()
    return None if is_alone else _rendezvous()


@functools.cache
def _rendezvous() -> Any:
    from torch.distributed.rendezvous import rendezvous

    store = next(rendezvous("env://"))[0]
    store.set(f"recipes/pid/{rank()}", str(os.getpid()))
    return store


def killed_rank() -> EnvironmentFault | None:
    """Return an error that names a rank of this machine whose process is gone, if there is one."""
    import psutil

    with suppress(Exception):  # one process, all are there, or the store has ended with rank 0
        first, local = rank() - int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        pids = {n: int(shared_store().get(f"recipes/pid/{n}")) for n in range(first, first + local)}
        time.sleep(1)  # until the launcher has seen its end
        gone = next(n for n, pid in pids.items() if not psutil.pid_exists(pid))
        return EnvironmentFault(f"rank {gone} was killed (out of memory?); recipes train resumes")
    return None


def _wait(arrived: Callable[[], bool]) -> None:
    """Ask again and again, so that signals are handled meanwhile."""
    while not arrived():
        time.sleep(_POLL_S)
