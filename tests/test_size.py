"""The size of the house and its surface are agreed on: what is new here fails until a person has
weighed it and changed this file.
"""

from __future__ import annotations

from pathlib import Path

from recipes_lib.cli import VERBS

PROJECT = Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "src" / "recipes_lib"

# Lines of Python, after the formatter, docstrings included: what each package may have.
LINES = {
    "commands": 1500,
    "core": 800,
    "config": 1900,
    "models": 450,
    "data": 1650,
    "training": 1700,
    "weights": 900,
    "plan": 750,
    "evals": 4300,
    "analysis": 3000,
    "study": 950,
    "slurm": 800,
}
# Modules beside the packages, counted with the one that they serve.
BESIDE = {"commands": ["cli.py"], "training": ["train.py"], "analysis": ["stats.py"]}
DOCTOR = SOURCE / "doctor.py"  # counted by itself
DOCTOR_LINES = 120
ALL_LINES, ALL_FILES, ALL_BYTES = 20_000, 95, 850_000
TEST_LINES, BENCHMARK_LINES = 16_000, 1_000
KNOWN_VERBS = {
    *("new", "ls", "show", "check", "migrate", "explain", "doctor"),
    *("data", "plan", "train", "status", "chat", "merge", "export"),
    *("eval", "judge", "study", "compare", "prefetch", "launch"),
}


def lines(*files: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def test_no_package_is_larger_than_it_may_be() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == LINES.keys()
    too_large = {}
    for package, most in LINES.items():
        files = [*(SOURCE / package).rglob("*.py")]
        files += [SOURCE / name for name in BESIDE.get(package, [])]
        if (size := lines(*files)) > most:
            too_large[package] = f"{size} of {most} lines"
    assert not too_large
    assert lines(DOCTOR) <= DOCTOR_LINES


def test_source_tests_and_benchmarks_do_not_grow() -> None:
    files = [*SOURCE.rglob("*.py")]
    assert lines(*files) <= ALL_LINES
    assert len(files) <= ALL_FILES
    assert sum(path.stat().st_size for path in files) <= ALL_BYTES
    assert lines(*(PROJECT / "tests").rglob("*.py")) <= TEST_LINES
    assert lines(*(PROJECT / "benchmarks").rglob("*.py")) <= BENCHMARK_LINES


def test_no_verb_is_new() -> None:
    assert {*VERBS} == KNOWN_VERBS
