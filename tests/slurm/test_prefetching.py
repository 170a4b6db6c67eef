"""A model that `recipes prefetch` calls whole can be loaded on a node without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.slurm.prefetching import check_model, missing_models


def test_a_whole_model_is_told_with_its_size(tiny_model_dir: Path) -> None:
    section = ModelSection(name_or_path=str(tiny_model_dir))
    assert check_model(section).startswith("1 weight file, ") and missing_models([section]) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is not on this machine"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"a":' * 100_000 + "1" + "}" * 100_000
            ),
            "no readable config.json",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "no readable config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors"),
        (
            lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
            "has no tokenizer files",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_missing(
    damage: Callable[[Path], object], words: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    damage(folder)
    section = ModelSection(name_or_path=str(folder))
    with pytest.raises(EnvironmentFault) as caught:
        check_model(section)
    assert words in str(caught.value) and missing_models([section]) == [str(folder)]
