"""A minimal recipe that passes every check, whole or with a line added to a section."""

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


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file into the working directory, beside the good recipe's rows; return its name."""
    monkeypatch.chdir(tmp_path)
    row = '{"instruction": "a", "response": "b"}\n'
    Path("rows.jsonl").write_text(row * 20, encoding="utf-8")

    def write_file(text: str | bytes = GOOD, name: str = "r.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write_file


@pytest.fixture
def write_with(write: Callable[..., Path]) -> Callable[..., Path]:
    """Write the good recipe with a line on top of a section, or in one that it lacks."""

    def write_recipe(section: str, line: str) -> Path:
        head = f"{section}:\n"
        more = f"{head}  {line}\n"
        return write(GOOD.replace(head, more) if head in GOOD else f"{GOOD}{more}")

    return write_recipe
