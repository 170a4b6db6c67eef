"""A model that `recipes prefetch` calls whole can be loaded on a node without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib import cli
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


def test_the_rows_of_a_data_set_are_counted_without_holding_them_all(
    tmp_path: Path, tiny_model_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, rows = tmp_path / "big.yaml", tmp_path / "rows.jsonl"
    recipe.write_text(f"model: {{name_or_path: {tiny_model_dir}}}\ndata: {{source: rows.jsonl}}\n")
    rows.write_text('{"instruction": "a", "response": "b"}\n' * 3)
    held = property(lambda table: pytest.fail("every row at once"))
    monkeypatch.setattr("recipes_lib.data.files.Table.rows", held)
    assert cli.main(["prefetch", str(recipe), "--check"]) == 0
    assert "rows.jsonl: 3 rows" in capsys.readouterr().out
    rows.write_text('{"instruction": "a", "response": "b"}\n{torn\n')
    assert cli.main(["prefetch", str(recipe), "--check"]) == 5
    assert "rows.jsonl:2: not a JSON object" in capsys.readouterr().err
