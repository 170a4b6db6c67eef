"""Work that one rank does for all: the result, or the error, reaches every rank.

It goes through the store in which the processes met: a collective would end at `train.ddp_timeout`
while a large model is hashed, and before the recipe is read there is no group.
"""

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


class AnotherRankFailed(RecipesError):
    """Why this rank ends, and not why the training does: that rank says it and records it."""


_POLL_S = 0.05
_LOOK_S = 1.0  # between two looks whether the other ranks are still there

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
    result: Any = None
    error: Exception | None = None
    if rank() != 0:
        _wait(lambda: store.check([key]))
        result, error = pickle.loads(store.get(key))
    else:
        _working_alone = True
        try:
            result = work()
            message = pickle.dumps((result, None))
        except Exception as caught:
            error = caught
            sent: Exception = caught
            if not isinstance(caught, RecipesError):  # the other ranks may not have its class
                sent = RuntimeError(f"{type(caught).__name__}: {caught}")
            message = pickle.dumps((None, sent))
        finally:
            _working_alone = False
        store.set(key, message)
    if error is not None:
        meet()
        error.on_every_rank = True  # type: ignore[attr-defined]  # so that only rank 0 prints it
        raise error
    return result


def meet() -> None:
    """Wait until every rank is here, however long one of them reads or writes files. Rank 0 leaves
    last, because the store may end with it.
    """
    store = None if _working_alone else shared_store()
    if store is not None:
        key = f"recipes/{next(_calls)}"
        everybody = world_size()
        store.add(key, 1)
        _wait(lambda: store.add(key, 0) >= everybody)
        store.add(key, 1)
        if rank() == 0:
            # a rank that has left may already report the error for which all met here
            _wait(lambda: store.add(key, 0) == 2 * everybody, unless_failed=False)


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
    store.set(_pid_key(rank()), str(os.getpid()))
    return store


def _pid_key(number: int) -> str:
    """Where a rank leaves the number of its process."""
    return f"recipes/pid/{number}"


def killed_rank() -> EnvironmentFault | None:
    """Return an error that names a rank of this machine whose process is gone, if there is one."""
    store = shared_store()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if store is None or local_world_size == 1:
        return None
    first = rank() - int(os.environ["LOCAL_RANK"])
    for number in range(first, first + local_world_size):
        with suppress(RuntimeError):  # the store has ended with rank 0
            key = _pid_key(number)
            if store.check([key]) and _has_ended(int(store.get(key))):
                what = f"rank {number} was killed (out of memory?); recipes train resumes"
                return EnvironmentFault(what)
    return None


def _has_ended(pid: int) -> bool:
    """Whether a process is gone; one that its parent has not reaped yet is."""
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def num_failed(more: int = 0) -> int:
    """Return how many ranks have reported a failure, after `more` were added.

    Raises:
        RuntimeError: the store has ended with the rank that holds it.
    """
    return int(shared_store().add("recipes/failed", more))


def _wait(arrived: Callable[[], bool], *, unless_failed: bool = True) -> None:
    """Ask again and again, so that signals are handled meanwhile.

    Raises:
        EnvironmentFault: a rank of this machine was killed, so that nobody will arrive.
        AnotherRankFailed: another rank has reported its failure, if `unless_failed`.
    """
    next_look = time.monotonic() + _LOOK_S
    while not arrived():
        time.sleep(_POLL_S)
        if time.monotonic() < next_look:
            continue
        next_look = time.monotonic() + _LOOK_S
        fault: RecipesError | None = killed_rank()
        if fault is None and unless_failed and num_failed():
            fault = AnotherRankFailed("another rank has failed")
        if fault is not None and not arrived():  # it may have ended after its arrival
            raise fault
