"""What one rank does for all reaches the others exactly once, however long it takes."""

import datetime
import os
import signal
import socket
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from recipes_lib.core import ranks
from recipes_lib.core.errors import ExitCode, RecipeError, RecipeErrors


def fork_ranks(work: Callable[[], str], *, die: int | None = None) -> list[tuple[int, str]]:
    """Run `work` on two ranks of one machine; rank `die` is killed after it has been seen. Return
    each rank's exit status and the text or the error that it ended with.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pipes = []
    children = []
    for rank in range(2):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
            try:
                ranks.meet()
                if rank == die:
                    os.kill(os.getpid(), signal.SIGKILL)
                text = work()
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)
        pipes.append(read)
        children.append(pid)
    texts = []
    for read in pipes:
        with os.fdopen(read) as file:
            texts.append(file.read())
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return list(zip(statuses, texts, strict=True))


def fork_two(work: Callable[[], str]) -> list[str]:
    """Run `work` on two ranks that end together, and return what each returns."""

    def work_and_meet() -> str:
        text = work()
        ranks.meet()
        return text

    ended = fork_ranks(work_and_meet)
    assert [status for status, _ in ended] == [0, 0]
    return [text for _, text in ended]


@pytest.mark.timeout(60)
def test_a_rank_that_waits_sees_that_another_was_killed() -> None:
    def wait_for_the_other() -> str:
        ranks.meet()
        return "met"

    (status, said), (killed, _) = fork_ranks(wait_for_the_other, die=1)
    assert killed == -signal.SIGKILL
    assert status == 0
    assert said.startswith("EnvironmentFault: rank 1 was killed (out of memory?)")


@pytest.mark.timeout(60)
def test_a_rank_that_waits_sees_that_another_has_failed() -> None:
    def fail_on_rank_1() -> str:
        if ranks.rank() == 1:
            ranks.num_failed(1)
            time.sleep(3)  # it is still there when rank 0 looks
            return "failed"
        ranks.meet()
        return "met"

    (_, said), _ = fork_ranks(fail_on_rank_1)
    assert said == "AnotherRankFailed: another rank has failed"


@pytest.mark.timeout(60)
def test_a_result_that_cannot_be_sent_is_an_error_of_every_rank() -> None:
    def unsendable() -> str:
        return str(ranks.on_main_rank(lambda: lambda: None))

    for _, said in fork_ranks(unsendable):
        assert "pickle" in said.lower()


def outcome(work: Callable[[], object]) -> str:
    """What `on_main_rank` gave, or the error it raised with its code."""
    try:
        return str(ranks.on_main_rank(work))
    except Exception as error:
        assert error.on_every_rank  # type: ignore[attr-defined]
        return f"{type(error).__name__}: {error} ({getattr(error, 'exit_code', None)!r})"


def fail(error: Exception) -> None:
    raise error


def test_results_and_errors_of_rank_0_reach_every_rank_before_there_is_a_group():
    def work() -> str:
        said = [
            outcome(lambda: f"made by rank {ranks.rank()}"),
            # a call within a call is not sent, or the other ranks take it for the outer result
            outcome(lambda: ranks.on_main_rank(lambda: "inner") + " and outer"),
            outcome(lambda: fail(RecipeErrors([RecipeError("b", line=2), RecipeError("a")]))),
            outcome(lambda: 1),
            outcome(lambda: fail(ValueError("the Hub said no"))),  # of another library: as text
        ]
        return "\n".join(said)

    first, second = fork_two(work)
    assert first.splitlines()[:-1] == second.splitlines()[:-1]
    assert first.splitlines()[:2] == ["made by rank 0", "inner and outer"]
    assert "RecipeErrors: a\nb" in first and repr(ExitCode.USAGE) in first
    assert first.splitlines()[-1].startswith("ValueError: the Hub said no")
    assert second.splitlines()[-1].startswith("RuntimeError: ValueError: the Hub said no")


@pytest.mark.slow
def test_ranks_wait_for_rank_0_longer_than_a_collective_may_take() -> None:
    """The collectives end after 1 s: what rank 0 does for 3 s, and the files it writes for 3 s, end
    nothing.
    """

    def work() -> str:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
        said = outcome(lambda: time.sleep(3) or "checked")
        time.sleep(3 * (ranks.rank() == 0))
        ranks.meet()
        return f"{said} {ranks.agree_on_largest(ranks.rank())}"

    assert fork_two(work) == ["checked 1", "checked 1"]
