"""How the report grows: statistics and report of made-up runs with many judgments, and what a
browser takes to open it.

    python benchmarks/report_scale.py [--judgments 10000 100000 1000000] [--repeats 3] [--record]

Promised: 100,000 judgments, statistics and report together, in < 10 s; growth linear up to
1,000,000. Copies of a study of five arms and 805 questions, relabelled and with a planted
difference, 1,000 each: < 20 s. CPU seconds of one thread, pdflatex among them where it is
installed. `--record` writes results/report_scale.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import spread, write_result
from numpy.typing import NDArray
from synthetic_runs import write_alpaca_eval, write_run

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import (
    ArmMeasurements,
    Measurements,
    RunMeasurements,
    read_measurements,
)
from recipes_lib.compare.relabelling import relabelled
from recipes_lib.compare.validity import check_validity
from recipes_lib.eval_log import EvalLog, Measure, Sample
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report

KINDS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "right or wrong": lambda skill: (skill > 0.5).astype(float),
    "grades": lambda skill: np.clip(np.rint(1 + 4 * skill), 1, 5),
    "plain scores": lambda skill: skill,
}
UNITS = {"right or wrong": "share", "grades": "grade", "plain scores": "number"}


def study(kind: str, seeds: int, labels: int = 0, arms: int = 5, n: int = 805) -> Measurements:
    """Return made-up measurements of arms that are alike, on one metric; people labelled some
    answers of each, and agree with four in five.
    """
    rng = np.random.default_rng(0)
    questions = rng.random(n)

    def run(arm: str, seed: int) -> RunMeasurements:
        values = KINDS[kind](questions + rng.normal(0, 0.3, n) + (seeds > 1) * rng.normal(0, 0.02))
        told: list[float | None] = [None] * n
        for number in rng.permutation(n)[:labels]:
            told[number] = float(values[number] if rng.random() < 0.8 else 1 - values[number])
        samples = tuple(
            Sample(str(number), value=float(value), outcome="graded", human=human)
            for number, (value, human) in enumerate(zip(values, told, strict=True))
        )
        file = Path(arm, f"seed{seed}", "evals", "made-up", "result.json")
        measure = Measure("made-up", "checks", "score", kind, samples, file, unit=UNITS[kind])
        log = EvalLog(eval="made-up", suite="checks", against=None, file=file, measures=(measure,))
        return RunMeasurements(f"{arm}-{seed}", file, {}, {}, {}, {}, (), (log,), seed=seed)

    names = [f"arm{number}" for number in range(arms)]
    made = {arm: tuple(run(arm, seed) for seed in range(seeds)) for arm in names}
    return Measurements({arm: ArmMeasurements(arm, runs) for arm, runs in made.items()})


def measure_copies(kind: str, seeds: int, labels: int) -> float:
    """Return the CPU seconds that copies of a study take."""
    measurements = study(kind, seeds, labels)
    begun = spent()
    comparison = compare_arms(measurements, relabel=relabelled)
    assert comparison.relabelling is not None
    return spent() - begun


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
    copies = []
    right = "right or wrong"
    for kind, seeds, labels in (*((kind, 1, 0) for kind in KINDS), (right, 3, 0), (right, 1, 100)):
        seconds = spread([measure_copies(kind, seeds, labels) for _ in range(options.repeats)], 2)
        copies.append({"kind": kind, "seeds": seeds, "labels": labels, "cpu_s": seconds})
        print(
            f"copies of 5 arms, 805 questions, {kind}, seeds {seeds}, human labels {labels}:"
            f" {seconds['median']:.2f}"
            f" [{seconds['min']:.2f}, {seconds['max']:.2f}] CPU s (n = {seconds['n']})",
            flush=True,
        )
    if options.record:
        write_result(
            "report_scale",
            {
                "pdflatex": shutil.which("pdflatex") is not None,
                "sizes": rows,
                "copies_of_5_arms_and_805_questions": copies,
            },
            1,
            load,
        )


if __name__ == "__main__":
    main()
