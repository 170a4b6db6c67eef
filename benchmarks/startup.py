"""CPU seconds (user + system, children included) of the verbs that must start at once.

    python benchmarks/startup.py [--repeats 5]

Prints a table and, with --json FILE, writes the numbers with the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from measuring import write_record

PROJECT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "--help": 0.3,
    "ls": 0.3,
    "status": 0.3,
    "check recipes/quickstart/lora-r8.yaml": 0.5,
    "check recipes": 2.0,
}


def cpu_seconds(words: str) -> float:
    """Run one command and return the CPU seconds it took."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "recipes_lib.cli", *words.split()],
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = os.times()
    return (
        after.children_user - before.children_user + after.children_system - before.children_system
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'recipes ...':<42}{'median s':>10}{'most s':>10}{'limit s':>10}")
    for words, limit in COMMANDS.items():
        seconds = [cpu_seconds(words) for _ in range(options.repeats)]
        rows[words] = {
            "median": statistics.median(seconds),
            "most": max(seconds),
            "limit": limit,
            "n": options.repeats,
        }
        print(
            f"{words:<42}{rows[words]['median']:>10.3f}{rows[words]['most']:>10.3f}{limit:>10.1f}"
        )
    if options.json:
        write_record(options.json, {"cpu_seconds": rows})


if __name__ == "__main__":
    main()
