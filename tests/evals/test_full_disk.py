"""A disk that fills while answers or judgments are appended: nothing that was written is lost, the
fault is told and ends with exit code 5, and the same command asks only what is missing.

The disk is real, a small tmpfs; where mounting is not allowed these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.cli import main
from recipes_lib.core.files import Row
from recipes_lib.evals.log import Store

EVALS = Path(__file__).resolve().parents[2] / "evals"
ANSWER_TOKENS = 7  # a number that no judge is asked with
ANSWER = "A is fuller. " * 150 + "[RESULT] A"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that gives a disk of so many KiB, or gives the same one another size."""
    place = tmp_path / "small"
    place.mkdir()

    def mount(kib: int) -> Path:
        options = f"{'remount,' if os.path.ismount(place) else ''}size={kib}k"
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("this test mounts a disk, which is not allowed here")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


def stored(runs: Path) -> dict[str, Row]:
    """All answers and judgments by key."""
    files = runs.glob("*/evals/*/[gj]*.jsonl")
    return {row["key"]: row for path in files for row in Store(path)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kib", "told"),
    [
        (12, "generations.jsonl: rows could not be stored"),
        (40, "judgments.jsonl: rows could not be stored"),
        (88, "disk full: No space left on device (/"),  # while the files for reading are written
    ],
)
def test_what_was_written_stays_and_the_same_command_asks_the_rest(
    kib: int,
    told: str,
    disk: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FaultyServer(answer=ANSWER) as server:
        recipe = tmp_path / "served.yaml"
        recipe.write_text(
            "suite: {name: alpaca_eval}\n"
            f"data: {{questions: {EVALS}/quickstart/alpaca_eval/questions.json,"
            " max_questions: 6}\n"
            f"generation: {{engine: openai, base_url: '{server.url}',"
            f" max_new_tokens: {ANSWER_TOKENS}}}\n"
            f"judge: {{model: {MODEL}, engine: openai, base_url: '{server.url}',"
            f" relative_prompt: {EVALS}/prompts/prometheus-relative.txt,"
            f" rubric: {EVALS}/rubrics/helpfulness.txt}}\n"
            "metrics: {probe_pairs: 0}\n"
        )
        runs = disk(kib) / "runs"
        monkeypatch.setenv("RECIPES_RUNS_ROOT", str(runs))
        assert main(["eval", str(recipe), MODEL]) == 5
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if line and "%|" not in line]  # without progress bars
        assert told in said[0] and all(line.startswith("  ") for line in said[1:]), said
        kept, asked = stored(runs), len(server.bodies)
        disk(4096)
        assert main(["eval", str(recipe), MODEL]) == 0
        whole = stored(runs)
        assert len(whole) == 6 + 12 and kept.items() <= whole.items()
        assert len(server.bodies) - asked == len(whole) - len(kept)
