from __future__ import annotations

import json
from pathlib import Path

from recipes_lib.generation.fingerprints import folder_fingerprint


def test_the_order_of_an_adapters_module_names_means_nothing(tmp_path: Path) -> None:
    """PEFT writes a set: two trainings with the same weights would otherwise be two models."""
    found = []
    for number, names in enumerate((["q_proj", "v_proj"], ["v_proj", "q_proj"], ["q_proj"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "target_modules": names}), encoding="utf-8")
        found.append(folder_fingerprint(folder))
    assert found[0] == found[1] != found[2]
