"""How the report grows: statistics and report of made-up runs with many judgments, and what a
browser takes to open it.

    python benchmarks/report_scale.py [--judgments 10000 100000 1000000] [--repeats 3] [--record]

Promised: 100,000 judgments, statistics and report together, in < 10 s; growth linear up to
1,000,000. CPU seconds of one thread, pdflatex among them where it is installed. `--record` writes
results/report_scale.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
from pathlib import Path

from measuring import spread, write_result
from synthetic_runs import write_alpaca_eval, write_run

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import read_measurements
from recipes_lib.compare.validity import check_validity
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report


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
        begun = spent()
        measurements = read_measurements({"r8": [first], "r32": [second]})
        comparison = compare_arms(measurements, check_validity(None, measurements))
        middle = spent()
        write_report(folder / "report", gather("scale", measurements, comparison))
        return middle - begun, spent() - middle, (folder / "report" / "report.html").stat().st_size
    finally:
        shutil.rmtree(folder)


def spent() -> float:
    """Return the CPU seconds of this process and of those that it waited for."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    """Measure each size and print it."""
    parser = argparse.ArgumentParser(description="Statistics and report by number of judgments.")
    parser.add_argument("--judgments", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for judgments in options.judgments:
        measured = [measure(judgments) for _ in range(options.repeats)]
        together = spread([statistics + report for statistics, report, _ in measured], 2)
        row = {
            "judgments": judgments,
            "statistics_cpu_s": spread([one[0] for one in measured], 2),
            "report_cpu_s": spread([one[1] for one in measured], 2),
            "together_cpu_s": together,
            "report_html_bytes": measured[0][2],
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        rows.append(row)
        apart = (
            f"statistics {row['statistics_cpu_s']['median']:6.2f} s, report"
            f" {row['report_cpu_s']['median']:6.2f} s"
        )
        whole = (
            f"together {together['median']:6.2f} [{together['min']:.2f}, {together['max']:.2f}] CPU"
            f" s (n = {together['n']})"
        )
        size = (
            f"{together['median'] / judgments * 1e6:5.1f} us each, page {measured[0][2] / 1e6:.1f}"
            f" MB, peak {row['peak_gib']:.1f} GiB"
        )
        print(f"{judgments:>9,} judgments: {apart}, {whole}, {size}", flush=True)
    if options.record:
        write_result(
            "report_scale",
            {"pdflatex": shutil.which("pdflatex") is not None, "sizes": rows},
            1,
            load,
        )


if __name__ == "__main__":
    main()
