"""Trainings as processes of their own, forked from one that has imported everything.

Two FSDP2 ranks take 16 CPU seconds under `accelerate launch` and 4 when they are forked. Their
environment is made by accelerate's own functions from the same config file; only the fork replaces
torch's launcher. A test asks the fixture `forks` (tests/conftest.py):

    child = forks.start(["recipe.yaml", "run.name=a"], config="ddp_cpu")  # two ranks
    code, output = child.wait(timeout=120)       # kills all ranks after that, and fails the test
    os.kill(child.ranks()[1], signal.SIGTERM)    # the process id of rank 1
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]
TIME_LIMIT_S = 150


class Child:
    """A launch that is running: its process, what it writes and how it ends."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it is running."""
        status = self.log.with_suffix(".exit")
        return int(status.read_text()) if status.exists() else None

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, in their order."""
        return json.loads(self.log.with_suffix(".ranks").read_text())

    def signal(self, number: int) -> None:
        """Send a signal to the launch and to all its ranks, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout: float = TIME_LIMIT_S) -> tuple[int, str]:
        """Return exit code and output; after `timeout` seconds end all ranks and fail the test."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                pytest.fail(f"no end after {timeout} s:\n{self.output()[-3000:]}")
            time.sleep(0.02)
        self.signal(signal.SIGKILL)  # no rank is left behind
        return code, self.output()


class Forks:
    """The process that has imported everything. It ends with the test session."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.server: subprocess.Popen[str] | None = None

    def start(
        self,
        arguments: Sequence[str | Path],
        config: str | Path | None = None,
        *,
        script: Path | None = None,
        **environment: str,
    ) -> Child:
        """Start a training with an accelerate config (a file, or the name of a shipped one; None is
        no launcher), or a script in place of `recipes_lib.train`.
        """
        if self.server is None or self.server.poll() is not None:
            self.server = self._serve()
        self.count += 1
        log = self.folder / f"launch-{self.count}.log"
        log.touch()
        if config is not None and not isinstance(config, Path):
            config = PROJECT / "accelerate_configs" / f"{config}.yaml"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "config": config and str(config),
            "script": script and str(script),
            "environment": {**os.environ, **environment},
            "directory": str(Path.cwd()),
            "log": str(log),
        }
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Child(int(self.server.stdout.readline()), log)

    def _serve(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def close(self) -> None:
        """End the server and whatever still runs below it."""
        if self.server is not None and self.server.stdin:
            # an empty line: processes that a test forked hold the pipe open too
            self.server.stdin.write("\n")
            self.server.stdin.close()
            self.server.wait(timeout=30)


def serve() -> None:
    """Fork a launch for each line of standard input, and write down how each ends."""
    import_everything()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    running: dict[int, Path] = {}
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        if wake_read in ready:
            os.read(wake_read, 4096)
            reap(running)
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line.strip():
                break
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                end_with(lambda request=request: launch(request))
            running[pid] = Path(request["log"]).with_suffix(".exit")
            print(pid, flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)  # what the libraries do at the end of a process may take as long as a test


def import_everything() -> None:
    """Import what a training imports; nothing may be computed: threads do not survive a fork."""
    import accelerate.commands.launch
    import accelerate.test_utils  # noqa: F401  # accelerate's launcher looks for it
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    import recipes_lib.train
    import recipes_lib.training.build  # noqa: F401


def reap(running: dict[int, Path]) -> None:
    """Write the exit code of each launch that has ended."""
    while running:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        path = running.pop(pid)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(str(os.waitstatus_to_exitcode(status)))
        unfinished.rename(path)


def end_with(work: Callable[[], int]) -> None:
    """Do `work` in this forked process and end it, whatever happens."""
    code: Any = 1
    try:
        code = work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def launch(request: Mapping[str, Any]) -> int:
    """Be a launcher: fork the ranks, end all when a rank fails, and return 1 as torch's does."""
    log = Path(request["log"])
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    if request["config"] is None:
        log.with_suffix(".ranks").write_text(json.dumps([os.getpid()]))
        return train(request)
    environment, world = environment_of(request)
    os.environ.clear()
    os.environ.update(environment)
    waiting: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            end_with(lambda: train(request))
        waiting[pid] = rank
    log.with_suffix(".ranks").write_text(json.dumps(list(waiting)))
    failed = False
    while waiting:
        pid, status = os.wait()
        waiting.pop(pid, None)
        if os.waitstatus_to_exitcode(status) and not failed:
            failed = True
            for other in waiting:
                os.kill(other, signal.SIGTERM)
            signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
            signal.alarm(30)  # as torch's launcher: a rank that does not listen is killed
    return int(failed)


def environment_of(request: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    """Return what accelerate's launcher sets for this config, and the number of processes."""
    from accelerate.commands import launch as accelerate_launch
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    words = ["--config_file", request["config"], "-m", "recipes_lib.train"]
    args = accelerate_launch.launch_command_parser().parse_args(words)
    args, *_ = accelerate_launch._validate_launch_command(args)
    if args.cpu or not (args.multi_gpu or args.use_fsdp):
        return prepare_simple_launcher_cmd_env(args)[1], 1
    world = int(args.num_processes)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | prepare_multi_gpu_env(args)
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment, world


def train(request: Mapping[str, Any]) -> int:
    """Run the training, or the script that was asked for, in this process."""
    import runpy

    from recipes_lib.train import main
    from recipes_lib.training.stopping import end_process

    if request["script"]:
        sys.argv = [request["script"], *request["arguments"]]
        sys.path[0] = str(Path(request["script"]).parent)
        runpy.run_path(request["script"], run_name="__main__")
        return 0
    sys.argv = ["recipes_lib.train", *request["arguments"]]
    return end_process(main(request["arguments"]))


if __name__ == "__main__":
    serve()
