"""What `recipes study run` costs when every step is done: the check of all fingerprints, and
nothing else.

    python benchmarks/study_noop.py [--repeats 5] [--json FILE]

A study of two arms and three suites with the two-layer Llama of the tests is run once, then again.
CPU seconds are user + system of the command; the second run must do nothing, import no torch and
write no step. `status` is timed beside it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import write_record

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "src"), str(PROJECT / "tests"), str(PROJECT / "tests" / "study")]


def recipes(*words: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a verb; return its CPU seconds and what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "recipes_lib.cli", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done


def stamps(root: Path) -> dict[str, int]:
    """Modification times of all steps that are done."""
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("done.json")}


def main() -> int:
    """Run the study, run it again, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from conftest import build_tiny_model
    from study_files import write_tiny_study

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {
            "RECIPES_RUNS_ROOT": str(folder / "runs"),
            "PYTHONPATH": str(PROJECT / "src"),
            "OMP_NUM_THREADS": "1",
        }
        build_tiny_model(folder / "model")
        study = str(write_tiny_study(folder / "study", folder / "model"))
        first, done = recipes("study", "run", study)
        steps = stamps(folder / "runs")
        if done.returncode or not steps:
            print(
                done.stdout[-1500:],
                [line for line in done.stderr.splitlines() if not line.startswith("import time")][
                    -15:
                ],
                sep="\n",
            )
            return 1
        again, status = [], []
        for _ in range(options.repeats):
            seconds, done = recipes("study", "run", study)
            if done.returncode or stamps(folder / "runs") != steps:
                print(
                    "the second run did something:", done.stdout[-1500:], sep="\n", file=sys.stderr
                )
                return 1
            assert not any(
                line.endswith((" torch", " transformers")) for line in done.stderr.splitlines()
            ), "the second run imported torch"
            again.append(seconds)
            status.append(recipes("study", "status", study)[0])
    print(f"first run: {first:.1f} CPU s, {len(steps)} steps")
    for what, seconds_of in {"run, nothing to do": again, "status": status}.items():
        low, median, high = min(seconds_of), statistics.median(seconds_of), max(seconds_of)
        print(f"{what}: {median:.2f} CPU s [{low:.2f}, {high:.2f}], n = {len(seconds_of)}")
    if options.json:
        write_record(
            options.json,
            {"steps": len(steps), "cpu_s": {"first": first, "again": again, "status": status}},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
