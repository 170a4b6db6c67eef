from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes_lib.core.fingerprints import folder_fingerprint


def test_the_order_of_an_adapters_module_names_means_nothing(tmp_path: Path) -> None:
    """PEFT writes a set: two trainings with the same weights would otherwise be two models."""
    found = []
    for number, names in enumerate((["q_proj", "v_proj"], ["v_proj", "q_proj"], ["q_proj"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter_config.json").write_text(
            json.dumps({"r": 8, "target_modules": names}), encoding="utf-8"
        )
        found.append(folder_fingerprint(folder))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("content", [b"", b"\0" * 90, b"\xff", b"[]", b"{}"])
def test_a_damaged_memory_of_a_hash_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    first = folder_fingerprint(tmp_path / "model")
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    whole = memory.read_bytes()
    memory.write_bytes(content)
    assert folder_fingerprint(tmp_path / "model") == first and memory.read_bytes() == whole
