"""Work that one rank does for all: the result, or the error, reaches every rank, so that all go on or all stop."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")
_working_alone = False
_kept: list[object] = []


def rank() -> int:
    """This process's rank as the launcher set it; 0 without a launcher. Needs no torch."""
    return int(os.environ.get("RANK", "0"))


def note_error(error: BaseException) -> None:
    """Leave what stopped this rank, named by its time, in the folder RECIPES_RANK_ERRORS where a cluster job asks for it.

    The launcher ends the other ranks, and what they say then hides the cause: the job shows the earliest note first.
    """
    folder = os.environ.get("RECIPES_RANK_ERRORS")
    if folder and getattr(error, "exit_code", 1) not in (75, 130):
        text = f"rank {rank()} on {socket.gethostname()}: {error if str(error) else type(error).__name__}\n"
        with suppress(OSError):
            Path(folder, f"{time.time_ns()}-rank{rank()}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def on_main_rank(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank.

    Inside `work` a further call just runs: the other ranks wait for the outer result and would take the inner one for it.

    Raises:
        Exception: what `work` raised on rank 0, on every rank, with `on_every_rank` set.
    """
    import torch.distributed as dist

    global _working_alone
    if _working_alone or not (dist.is_available() and dist.is_initialized()):
        return work()
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        _working_alone = True
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
        finally:
            _working_alone = False
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], Exception):
        outcome[1].on_every_rank = True  # type: ignore[attr-defined]
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


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


def leave_together(keep: object) -> None:
    """Wait until every rank is done, and keep `keep` (what holds the model) from being freed.

    Freeing a DDP model takes its gloo process group apart, which waits for ever when the other rank was faster (seen in one of three
    stops on two ranks). By now everything is on the disk, so `end_process` ends the process without it.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        _kept.append(keep)
        dist.barrier()


def end_process(code: int) -> NoReturn:
    """End this process: as usual alone; as one of several ranks without taking the process group apart."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # trackers send their last lines there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
