"""How the report grows: statistics and report of made-up runs with many judgments, and what a browser takes to open it.

    python benchmarks/report_scale.py [--judgments 10000 100000 1000000]

Promised: 100,000 judgments, statistics and report together, in < 10 s; growth linear up to 1,000,000. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

from synthetic_runs import write_alpaca_eval, write_run

from recipes_lib.report.build import write_report
from recipes_lib.report.content import gather
from recipes_lib.studies.claims import compare_arms
from recipes_lib.studies.measurements import read_measurements
from recipes_lib.studies.validity import check_validity


def short_text(who: str, question: str) -> str:
    """An answer of about 300 characters."""
    return f"{who} answers {question}: " + "the point is explained in plain words. " * 7


def measure(judgments: int) -> tuple[float, float, int]:
    """Return CPU seconds of statistics and of the report, and the size of report.html in bytes.

    Three arms: two judged against the reference, one head to head; each item costs two judgments.
    """
    folder = Path(tempfile.mkdtemp())
    try:
        n = judgments // 6
        first, second = write_run(folder, "r8", rank=8), write_run(folder, "r32", rank=32)
        write_alpaca_eval(first, n, text=short_text)
        write_alpaca_eval(second, n, skill=0.52, text=short_text)
        write_alpaca_eval(second, n, against="r8", skill=0.51, text=short_text)
        begun = time.process_time()
        measurements = read_measurements({"r8": [first], "r32": [second]})
        comparison = compare_arms(measurements, check_validity(None, measurements))
        middle = time.process_time()
        write_report(folder / "report", gather("scale", measurements, comparison))
        return middle - begun, time.process_time() - middle, (folder / "report" / "report.html").stat().st_size
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measure each size and print it."""
    parser = argparse.ArgumentParser(description="Statistics and report by number of judgments.")
    parser.add_argument("--judgments", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    for judgments in parser.parse_args().judgments:
        statistics, report, size = measure(judgments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{judgments:>9,} judgments: statistics {statistics:6.2f} s, report {report:6.2f} s, together {statistics + report:6.2f} CPU s "
            f"(n = 1), {(statistics + report) / judgments * 1e6:5.1f} us per judgment, report.html {size / 1e6:.1f} MB, "
            f"peak {peak:.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
