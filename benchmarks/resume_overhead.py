"""What a stop and a resume cost, and what a checkpoint costs.

    python benchmarks/resume_overhead.py [--repeats 5] [--json FILE]
        [RECIPE] [section.key=value ...]

A run of 6 steps without a stop, beside the same run stopped after step 3 (a STOP file; exit code
75) and continued by the same command. The adapters must come out byte for byte the same. CPU
seconds are user + system of the processes, one thread; the overhead is the second start (importing,
loading, preparing the data), restoring the state, and saving it. RECIPE is the quickstart's lora-r8
if none is given.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import write_record

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "src"))
STEPS, STOP_AFTER = 6, 3


def cpu_seconds() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(
    root: Path, name: str, words: list[str], stop_after: int | None = None
) -> tuple[int, float]:
    """Run the training script once; return its exit code and CPU seconds."""
    before = cpu_seconds()
    own = [
        f"run.name={name}",
        f"train.max_steps={STEPS}",
        "train.eval_strategy='no'",
        f"train.save_steps={STEPS}",
        "train.logging_steps=1",
    ]
    environment = {
        **os.environ,
        "RECIPES_RUNS_ROOT": str(root),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PROJECT / "src"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes_lib.train", words[0], *own, *words[1:]],
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    while process.poll() is None:
        time.sleep(0.05)
        metrics = root / name / "metrics.jsonl"
        if (
            stop_after
            and metrics.is_file()
            and metrics.read_text(encoding="utf-8").count("\n") >= stop_after
        ):
            (root / name / "STOP").touch()
            stop_after = None
    return process.wait(), cpu_seconds() - before


def adapter_hash(folder: Path) -> str:
    """SHA-256 of the adapter's weights."""
    return hashlib.sha256(
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def seconds_of_saving(folder: Path) -> dict[str, float]:
    """The size of a checkpoint and the time to write as many bytes: what a save must cost at least
    on this disk.
    """
    checkpoint = max((folder / "checkpoints").glob("checkpoint-*"))
    data = b"".join(path.read_bytes() for path in sorted(checkpoint.rglob("*")) if path.is_file())
    started = time.perf_counter()
    with (folder / "copy").open("wb") as stream:
        stream.write(data)
        os.fsync(stream.fileno())
    return {
        "checkpoint_mib": len(data) / 2**20,
        "seconds_to_write_and_sync": time.perf_counter() - started,
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options, words = parser.parse_known_args()
    if not words or "=" in words[0]:
        words = [str(PROJECT / "recipes/quickstart/lora-r8.yaml"), *words]
    rounds: list[dict[str, Any]] = []
    for number in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            whole, plain = train(root, "whole", words)
            stopped, first = train(root, "parts", words, STOP_AFTER)
            finished, second = train(root, "parts", words)
            if (whole, stopped, finished) != (0, 75, 0):
                print(
                    f"exit codes {whole}, {stopped}, {finished}; expected 0, 75, 0", file=sys.stderr
                )
                return 1
            same = adapter_hash(root / "whole") == adapter_hash(root / "parts")
            rounds.append(
                {"whole": plain, "stopped": first, "resumed": second, "same_adapter": same}
                | seconds_of_saving(root / "parts")
            )
        print(
            f"{number + 1}: whole {plain:.1f}, stopped {first:.1f} + resumed {second:.1f} CPU s,"
            f" same adapter: {same}",
            flush=True,
        )
    overhead = [one["stopped"] + one["resumed"] - one["whole"] for one in rounds]
    low, median, high = min(overhead), statistics.median(overhead), max(overhead)
    print(
        f"one stop and resume costs {median:.1f} CPU s [{low:.1f}, {high:.1f}], n = {len(rounds)};"
        " adapters the same in all: ",
        end="",
    )
    print(all(one["same_adapter"] for one in rounds))
    if options.json:
        write_record(
            options.json,
            {
                "rounds": rounds,
                "overhead_cpu_s": {"median": median, "range": [low, high], "n": len(rounds)},
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
