"""Whatever happens to the weights of a finished run, it is found before they are used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.run_directory import RunDirectory, open_run
from recipes_lib.weights import load
from recipes_lib.weights.merge import merge
from recipes_lib.weights.runs import Family, check_base_run, finished_run, weights_damage

ADAPTER = "adapter/adapter_model.safetensors"


def flip(file: Path) -> None:
    """Change one bit of a file."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edit(file: Path, **values: object) -> None:
    """Change values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda run: flip(run / ADAPTER), "was changed"),
    "empty": (lambda run: (run / ADAPTER).write_bytes(b""), "was changed"),
    "gone": (lambda run: (run / ADAPTER).unlink(), "is gone"),
    "settings": (lambda run: edit(run / "adapter/adapter_config.json", lora_alpha=99), "changed"),
    "torn": (lambda run: (run / "adapter/adapter_config.json").write_text('{"r"'), "adapter_conf"),
    "tokenizer": (lambda run: flip(run / "adapter/tokenizer.json"), "tokenizer.json was changed"),
    "template": (lambda run: (run / "adapter/chat_template.jinja").unlink(), "is gone"),
    "folder": (lambda run: (run / "adapter").rename(run / "elsewhere"), "is gone"),
}


def test_every_kind_of_damage_is_found_and_named(runs) -> None:
    missed = []
    for name, (damage, words) in DAMAGE.items():
        run = runs("lora")
        directory = RunDirectory("lora")
        assert weights_damage(directory, full=False) is None
        damage(run)
        if words not in str(weights_damage(directory, full=False)):
            missed.append((name, weights_damage(directory, full=False)))
        shutil.rmtree(run)
    assert not missed


@pytest.mark.slow
def test_damaged_weights_are_refused_by_every_verb_that_reads_them(runs, recipes, tmp_path) -> None:
    flip(runs("lora") / ADAPTER)
    for words in (
        ("merge", "lora"),
        ("export", "lora", "--to", tmp_path / "out"),
        ("chat", "lora", "--prompt", "hi"),
    ):
        code, _, err = recipes(*words)
        assert code == 5 and "has no usable weights" in err and "rebuild them" in err, words
    assert not (tmp_path / "out").exists()
    model = runs("full") / "model"
    check_base_run(str(model))  # a training from it
    flip(model / "model.safetensors")
    with pytest.raises(EnvironmentFault, match="has no usable weights"):
        check_base_run(str(model))


def test_another_base_than_the_trained_one_is_refused(
    runs, recipes, tiny_model_dir, tmp_path
) -> None:
    run = runs("lora")
    state = json.loads((run / "run.json").read_text())
    state["weights_check"]["base_fingerprint"] = "0" * 64
    (run / "run.json").write_text(json.dumps(state))
    export = ("export", "lora", "--to", tmp_path / "out")
    for words in (("merge", "lora"), export, ("chat", "lora", "--prompt", "hi")):
        code, _, err = recipes(*words)
        assert code == 2 and "its weights differ" in err, words


def test_a_base_that_comes_from_the_hub_only_now_is_compared_once_it_is_here(
    runs, monkeypatch
) -> None:
    run = runs("lora")
    trained, honest = finished_run(open_run("lora")), load.load_model

    def fetched(*args: object, **keys: object) -> object:
        monkeypatch.setattr(load, "local_folder", lambda recipe: run / "other")
        return honest(*args, **keys)

    monkeypatch.setattr(load, "local_folder", lambda recipe: None)
    monkeypatch.setattr(load, "load_model", fetched)
    (run / "other").mkdir()
    (run / "other/model.safetensors").write_bytes(b"another base")
    for use in (lambda: Family([trained]), lambda: merge(trained, None)):
        with pytest.raises(RecipeError, match="its weights differ"):
            use()
        monkeypatch.setattr(load, "local_folder", lambda recipe: None)
