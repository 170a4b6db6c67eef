"""The generated files: what the installed TRL and PEFT have, and the schemas of editors."""

import dataclasses
import json

from recipes_lib.config import schema
from recipes_lib.config.recipe import TRAIN_DEFAULTS, LoraSection, RecipeFile, TrainSection
from recipes_lib.core.project import project_root


def test_the_committed_files_are_those_of_the_installed_versions():
    """Else: make schema."""
    texts = schema.generated_files()
    assert not [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    assert not [path for path, text in texts.items() if "%%" in text]  # argparse's


def test_every_upstream_field_can_be_written_or_is_refused_with_a_reason():
    from peft import LoraConfig
    from trl import SFTConfig

    for cls, model in ((SFTConfig, TrainSection), (LoraConfig, LoraSection)):
        names = {field.name for field in dataclasses.fields(cls)}
        assert names - model.gone.keys() == {*model.model_fields}


def test_defaults_are_upstreams_and_project_defaults_differ_from_them():
    from trl import SFTConfig

    upstream = SFTConfig(output_dir="unused", use_cpu=True)
    for key in ("per_device_train_batch_size", "max_length", "save_steps", "learning_rate"):
        assert TrainSection.model_fields[key].default == getattr(upstream, key)
    for key, value in TRAIN_DEFAULTS.items():
        assert getattr(upstream, key) != value == TrainSection.model_fields[key].default


def test_an_editor_accepts_every_shipped_recipe_and_refuses_a_wrong_key():
    from jsonschema import Draft202012Validator

    from recipes_lib.config.documents import read

    found = json.loads((project_root() / "schema/recipe.schema.json").read_text())
    validator = Draft202012Validator(found)
    for path in (project_root() / "recipes/llama2-7b-dolly").glob("*.yaml"):
        assert not list(validator.iter_errors(read(path).values)), path
    assert list(validator.iter_errors({"train": {"learning_rte": 1}}))
    assert not list(validator.iter_errors({"extends": "a.yaml"}))
    assert RecipeFile.model_fields.keys() < found["properties"].keys()
