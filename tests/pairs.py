"""Pairs of answers to the shipped instructions, and a recipe that trains on them."""

import json
from pathlib import Path
from typing import Any

import yaml

ROWS = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "data"


def write_pairs(path: Path, count: int = 90) -> Path:
    """Write pairs: the shipped answer, or its first words in the opposite order."""
    lines = (ROWS / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    with path.open("w", encoding="utf-8") as file:
        for row in map(json.loads, lines):
            rejected = " ".join(reversed(row["response"].split()[:20]))
            pair = {"chosen": row["response"][:120], "rejected": rejected}
            file.write(json.dumps({"prompt": row["instruction"], **pair}) + "\n")
    return path


def write_pair_recipe(path: Path, tiny_recipe: str, **changes: dict[str, Any] | None) -> Path:
    """Write the tiny recipe in stage dpo, with changes of its sections."""
    values = yaml.safe_load(tiny_recipe)
    source = path.with_suffix(".jsonl")
    if not source.exists():
        write_pairs(source)
    values |= {"stage": "dpo", "data": {"source": str(source), "prompt_format": "chat"}}
    for section, keys in changes.items():
        values[section] = keys and {**(values.get(section) or {}), **keys}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
