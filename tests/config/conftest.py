"""A minimal recipe that passes every check, written into a fresh working directory, whole or with
lines added to a section.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

# The keys stand on lines 2, 4, 6 and 8; a line added to a section stands at 2, 4, 6 or 8 too.
GOOD = """\
model:
  name_or_path: meta-llama/Llama-2-7b-hf
data:
  source: rows.jsonl
lora:
  r: 8
train:
  seed: 1
"""


def good_with(section: str, line: str) -> str:
    """Return the good recipe with `line` added to a section (on top of it), or at the end for a
    section it lacks.
    """
    head = f"{section}:\n"
    return GOOD.replace(head, f"{head}  {line}\n") if head in GOOD else f"{GOOD}{head}  {line}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file into the working directory, beside the rows that the good recipe names, and
    return its name, as a user would type it.
    """
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n', encoding="utf-8")

    def write_file(text: str | bytes = GOOD, name: str = "r.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write_file


@pytest.fixture
def write_with(write: Callable[..., Path]) -> Callable[..., Path]:
    """Write the good recipe with a line added to a section."""
    return lambda section, line, name="r.yaml": write(good_with(section, line), name)
