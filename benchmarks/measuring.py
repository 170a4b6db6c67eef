"""What the benchmarks share: CPU seconds, medians with their range, and result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return user and system seconds of this process, all threads, that a piece of work takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Return median, range and n."""
    low, median, high = min(values), statistics.median(values), max(values)
    return {
        "median": round(median, digits),
        "min": round(low, digits),
        "max": round(high, digits),
        "n": len(values),
    }


def machine(threads: int | None = None) -> dict[str, Any]:
    """Return what a number depends on: processor, cores, load, versions."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    facts = {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
    }
    return facts | {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def write_result(
    name: str, result: dict[str, Any], threads: int | None, started_load: float
) -> None:
    """Write results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    whole = {
        "written": now,
        "machine": machine(threads) | {"load_average_at_start": round(started_load, 1)},
        **result,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def write_record(path: Path, facts: dict[str, Any]) -> None:
    """Write what was measured to the file that `--json` names, after date, command, load, devices
    and versions.
    """
    from recipes_lib.core.manifest import describe_devices, library_versions

    whole = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "load_average": os.getloadavg(),
        "devices": describe_devices(),
        "libraries": library_versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole | facts, indent=1) + "\n", encoding="utf-8")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
