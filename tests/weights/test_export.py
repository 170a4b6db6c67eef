"""`recipes export`: what leaves this machine loads with PEFT and transformers alone, and says
nothing of it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from recipes_lib.train import main as train

Verb = Callable[..., tuple[int, str, str]]
ALONE = """
import sys, transformers, peft
kind, folder = sys.argv[1:]
name = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
model = getattr(peft if kind == "adapter" else transformers, name).from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = tokenizer("Hi", return_tensors="pt").input_ids
print(model(input_ids=ids).logits.shape[-1], "recipes_lib" in sys.modules)
"""


def export(recipes: Verb, name: str, to: Path, *words: str) -> dict[str, Path]:
    """Export a run and return its files by name."""
    assert recipes("export", name, "--to", to, *words)[0] == 0
    return {file.name: file for file in to.iterdir()}


def test_nothing_of_this_machine_is_in_an_export(runs, recipes, tmp_path) -> None:
    for name in ("lora", "qlora", "full"):
        run = runs(name)
        weights = run / ("model" if name == "full" else "adapter")
        (weights / "training_args.bin").write_bytes(b"pickle")
        files = export(recipes, name, tmp_path / f"out-{name}")
        assert "training_args.bin" not in files and "weights_check.json" not in files
        for file in files.values():
            assert file.stat().st_mode & 0o777 == 0o644, file
            content = file.read_bytes()
            for trace in (*map(str, (tmp_path, Path.home(), Path.cwd())), "recipes_lib"):
                assert trace.encode() not in content, (file, trace)
        assert (tmp_path / f"out-{name}").stat().st_mode & 0o777 == 0o755


def test_an_exported_tokenizer_has_its_tokens_that_begin_like_a_path(
    tiny_recipe, tiny_model_dir, recipes, tmp_path
) -> None:
    from transformers import AutoTokenizer

    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["/nothink"]})
    tokenizer.save_pretrained(model)
    words = [f"model.name_or_path={model}", "model.resize_embeddings=true", "train.max_steps=2"]
    assert train([str(tiny_recipe), *words]) == 0
    export(recipes, "tiny", tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("say nothink", "/nothink now"):
        assert exported(text).input_ids == tokenizer(text).input_ids, text


def test_an_exported_adapter_names_the_hub_id_of_a_base_that_says_where_it_is_from(
    runs, recipes, tmp_path, monkeypatch
) -> None:
    runs("qlora")
    with monkeypatch.context() as patch:
        patch.setattr("recipes_lib.weights.card.VLLM_RANKS", (2,))  # less than the adapter's
        files = export(recipes, "qlora", tmp_path / "plain")
    config = json.loads(files["adapter_config.json"].read_text())
    assert config["base_model_name_or_path"] == "./tiny-llama"  # nobody's id on the Hub
    card = files["README.md"].read_text()
    assert "base_model:" not in card and "load_in_4bit=True" in card
    assert "--max-lora-rank" not in card and "first merge it: recipes merge qlora" in card
    assert "last validation loss" in card and "rows.jsonl" in card
    source = {"hub_id": "org/tiny", "license": "apache-2.0"}
    monkeypatch.setattr("recipes_lib.weights.card.base_file", lambda recipe, name: source)
    files = export(recipes, "qlora", tmp_path / "known")
    config = json.loads(files["adapter_config.json"].read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    card = files["README.md"].read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "org/tiny" and header["license"] == "apache-2.0"
    for line in (
        "vllm serve org/tiny --enable-lora",
        "--lora-modules qlora=",
        "--max-lora-rank 8 ",  # of rank 4: vLLM does not take that
        "convert_lora_to_gguf.py <this folder> --base ",
        "ADAPTER ./qlora.gguf",
        'from_pretrained("org/tiny"',
    ):
        assert line in card, line


@pytest.mark.slow
def test_what_is_exported_loads_with_peft_and_transformers_alone(
    runs, recipes, tmp_path, tiny_model_dir
) -> None:
    runs("lora", "full")
    assert recipes("merge", "lora")[0] == 0
    export(recipes, "lora", tmp_path / "adapter")
    export(recipes, "lora", tmp_path / "merged", "--merged")
    export(recipes, "full", tmp_path / "full")
    assert "convert_hf_to_gguf.py" in (tmp_path / "merged" / "README.md").read_text()
    (tmp_path / "tiny-llama").symlink_to(tiny_model_dir)  # ./tiny-llama, where the card says so
    for kind in ("adapter", "merged", "full"):
        command = [sys.executable, "-c", ALONE, kind, str(tmp_path / kind)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.split() == ["512", "False"], done.stderr[-2000:]


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(runs, recipes, tmp_path) -> None:
    runs("lora", "full")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("")
    for words, said in (
        (("lora", "--to", tmp_path / "used"), "not empty"),
        (("lora", "--to", tmp_path / "used/mine.txt"), "is a file"),
        (("lora", "--to", tmp_path / "new", "--merged"), "recipes merge lora"),
        (("full", "--to", tmp_path / "new", "--merged"), "recipes merge full"),
    ):
        code, _, err = recipes("export", *words)
        assert code == 2 and said in err, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "used"]


def test_a_push_goes_to_a_private_repository_and_its_failure_is_one_line(
    runs, recipes, monkeypatch, tmp_path
) -> None:
    """The Hub is the only thing that is not real: what would be uploaded is looked at."""
    import huggingface_hub

    calls: list[object] = []

    class Api:
        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append({path.name for path in folder_path.iterdir()})

    run, words = runs("lora"), ("export", "lora", "--push-to-hub")
    (run / "adapter/optimizer.pt").write_bytes(b"pickle")
    code, _, err = recipes(*words, "ada/first", "--to", tmp_path / "off")
    assert code == 5 and "could not push" in err
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    code, out, _ = recipes(*words, "ada/first", "--to", tmp_path / "private")
    assert code == 0 and "pushed: https://hub/ada/first" in out
    assert calls[0] == ("ada/first", True) and "adapter_model.safetensors" in calls[1]
    assert "optimizer.pt" not in calls[1]
    assert recipes(*words, "ada/first", "--public", "--to", tmp_path / "public")[0] == 0
    assert calls[2] == ("ada/first", False)
