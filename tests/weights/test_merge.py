"""Merging and verifying runs: what comes out equals the adapter on its base, and whatever is not
what was trained is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes_lib.core.errors import ExitCode
from recipes_lib.weights.base import weight_hashes

Verb = Callable[..., tuple[int, str, str]]
Runs = Callable[..., Path]
ADAPTER = "adapter_model.safetensors"
IDS = torch.arange(20, 80)[None]


def change_tensors(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Rewrite a safetensors file with every tensor changed."""
    save_file(
        {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def base_of(run: Path, tmp_path: Path) -> Path:
    """Move a run's base to a copy that a test may change; the run is as if it had been trained on
    the copy.
    """
    original = Path(
        json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    copy = tmp_path / "base" / original.name
    shutil.copytree(original, copy)
    for file in (run / "recipe.json", run / "adapter" / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(original), str(copy)))
    return copy


# ---- Merging ----


def test_a_merged_lora_is_a_plain_model_with_the_logits_of_peft_itself(
    runs: Runs, recipes: Verb
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = runs("lora")
    code, out, _ = recipes("merge", "lora")
    assert (
        code == 0
        and "merged:" in out
        and "float32" in out
        and "23 validation" not in out
        and "8 validation rows" in out
    )
    merged = run / "merged"
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"]), run / "adapter"
    )
    reference, found = logits(peft), logits(AutoModelForCausalLM.from_pretrained(merged))
    bare = logits(peft.unload())
    assert (
        (found - reference).abs().max()
        < 1e-5 * reference.abs().max()
        < (bare - reference).abs().max()
    )
    assert (
        AutoTokenizer.from_pretrained(merged).chat_template
        == AutoTokenizer.from_pretrained(run / "adapter").chat_template
    )
    files = {file.name for file in merged.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "merge.json",
        "README.md",
    } <= files
    assert "adapter_config.json" not in files
    card = (merged / "README.md").read_text()
    assert (
        "library_name: transformers" in card
        and "PeftModel" not in card
        and "folded into the base" in card
    )
    assert json.loads((merged / "merge.json").read_text())["check"]["lost_share"] < 1e-4


def test_a_merged_model_is_asked_as_its_run_is_and_answers_alike(runs: Runs, recipes: Verb) -> None:
    from recipes_lib.engine import Decoding, Request
    from recipes_lib.generation.subjects import loaded
    from recipes_lib.generation.targets import Asking, find_targets
    from recipes_lib.generation.transformers_engine import TransformersEngine

    run = runs("lora")
    assert recipes("merge", "lora")[0] == 0
    (adapter,) = find_targets(["lora"])
    asking = Asking(prompt_format=adapter.recipe.data.prompt_format, dtype="float32")
    said = []
    for target in (adapter, *find_targets([str(run / "merged")], asking)):
        with loaded([target]) as (subject,):
            assert subject.model is not None
            _, ids = subject.prompts.render([{"role": "user", "content": "Name a river."}])
            tokenizer = subject.prompts.tokenizer
            engine = TransformersEngine(subject.model, tokenizer, "", using=subject.using)
            done = engine.complete([Request(key="q", ids=ids)], Decoding(max_new_tokens=12))
            said.append((subject.prompts.hash, next(iter(done)).text))
    assert said[0] == said[1] and said[0][1]


def test_a_merged_qlora_is_dequantised_first_and_says_what_is_lost(
    runs: Runs, recipes: Verb
) -> None:
    from transformers import AutoModelForCausalLM

    run = runs("qlora")
    code, out, _ = recipes("merge", "qlora")
    assert (
        code == 0
        and "dequantised the 4-bit base first" in out
        and "stays lost" in out
        and "in bfloat16" in out
    )
    config = json.loads((run / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    check = json.loads((run / "merged" / "merge.json").read_text())["check"]
    assert 0 < check["lost_share"] < 0.05 and check["difference"]["largest"] > 0
    assert not any(
        "Linear4bit" in type(module).__name__
        for module in AutoModelForCausalLM.from_pretrained(run / "merged").modules()
    )


def test_a_4_bit_adapter_belongs_on_the_dequantised_base_not_on_the_original(
    runs: Runs, recipes: Verb
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from recipes_lib.core.run_directory import open_run
    from recipes_lib.weights.finished_run import Family, finished_run

    run = runs("qlora")
    assert recipes("merge", "qlora")[0] == 0
    family = Family([finished_run(open_run("qlora"))])
    with family.using("qlora") as model:
        trained = logits(model)
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    naive = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), run / "adapter"
    )
    ours = (logits(AutoModelForCausalLM.from_pretrained(run / "merged")) - trained).abs().mean()
    assert ours < 0.2 * (logits(naive.merge_and_unload()) - trained).abs().mean()


def test_merging_again_does_nothing_and_says_so(runs: Runs, recipes: Verb) -> None:
    run = runs("lora")
    recipes("merge", "lora")
    written = (run / "merged" / "model.safetensors").stat().st_mtime_ns
    code, out, _ = recipes("merge", "lora")
    assert code == 0 and "already merged, nothing to do" in out
    assert (run / "merged" / "model.safetensors").stat().st_mtime_ns == written


def test_merging_in_another_precision_replaces_the_model_and_json_is_alone_on_stdout(
    runs: Runs, recipes: Verb
) -> None:
    run = runs("lora")
    recipes("merge", "lora")
    code, out, err = recipes("merge", "lora", "--dtype", "bfloat16", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["dtype"] == "bfloat16" and not answer["already"]
    assert "making merged/ again: it is in float32, not in bfloat16" in err
    assert load_file(run / "merged" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert {path.name for path in run.glob("merged*")} == {"merged"}


@pytest.mark.parametrize("left", ["merged.unchecked", ".merged.replaced"])
def test_what_a_killed_merge_left_behind_is_in_nobodys_way(
    runs: Runs, recipes: Verb, left: str
) -> None:
    run = runs("lora")
    (run / left).mkdir()
    (run / left / "model.safetensors").write_bytes(b"half")
    assert recipes("merge", "lora")[0] == 0
    assert {path.name for path in run.iterdir() if "merged" in path.name} == {"merged"}


def test_a_full_fine_tuning_has_nothing_to_merge_and_is_told_what_to_do(
    runs: Runs, recipes: Verb
) -> None:
    run = runs("full")
    code, _, err = recipes("merge", "full")
    assert code == ExitCode.USAGE and "its model is whole" in err and "recipes export full" in err
    assert not list(run.glob("merged*"))


def test_a_merge_that_lost_the_adapter_is_rejected_and_kept(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes_lib.weights import merge as merging

    def forgetful(trained: Any, family: Any, dtype: Any = None) -> Any:
        return family.model.unload()

    run = runs("lora")
    monkeypatch.setattr(merging, "fold", forgetful)
    code, _, err = recipes("merge", "lora")
    assert (
        code == ExitCode.FAILED
        and "is not the adapter on its base" in err
        and "merged.rejected" in err
    )
    assert {path.name for path in run.glob("merged*")} == {"merged.rejected"}


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs("lora")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    code, _, err = recipes("merge", "lora")
    assert code == ExitCode.ENVIRONMENT and "disk full" in err and not list(run.glob("merged*"))


def test_a_disk_that_fills_during_the_merge_leaves_nothing(
    runs: Runs, recipes: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def full(self: Any, folder: Any, **kwargs: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = runs("lora")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    code, _, err = recipes("merge", "lora")
    assert code == ExitCode.ENVIRONMENT and "No space left" in err and not list(run.glob("merged*"))


def test_a_run_that_another_process_holds_is_not_merged(runs: Runs, recipes: Verb) -> None:
    from recipes_lib.core.run_lock import run_lock

    run = runs("lora")
    with run_lock(run):
        code, _, err = recipes("merge", "lora")
    assert code == ExitCode.ENVIRONMENT and "is in use by process" in err


def test_an_unfinished_run_has_no_weights_to_merge(runs: Runs, recipes: Verb) -> None:
    run = runs("lora")
    edit_json(run / "run.json", state="preempted")
    for verb in (
        ["merge", "lora"],
        ["verify", "lora"],
        ["export", "lora", "--to", "x"],
        ["chat", "lora", "--prompt", "hi"],
    ):
        code, _, err = recipes(*verb)
        assert code == ExitCode.USAGE and "preempted, not finished" in err


@pytest.mark.parametrize(
    "verb", [["merge"], ["verify"], ["chat", "--prompt", "hi"]], ids=["merge", "verify", "chat"]
)
def test_code_that_ships_with_a_model_runs_only_if_the_command_line_says_so_too(
    runs: Runs, recipes: Verb, verb: list[str]
) -> None:
    recipe = runs("lora") / "recipe.json"
    recipe.write_text(
        recipe.read_text().replace('"trust_remote_code": false', '"trust_remote_code": true')
    )
    code, _, err = recipes(verb[0], "lora", *verb[1:])
    assert code == ExitCode.USAGE and "pass --trust-remote-code" in err
    assert recipes(verb[0], "lora", *verb[1:], "--trust-remote-code")[0] == 0


# ---- The wrong base ----


def test_an_adapter_that_names_another_base_is_refused_by_every_verb(
    runs: Runs, recipes: Verb, tmp_path: Path
) -> None:
    run = runs("lora")
    edit_json(
        run / "adapter" / "adapter_config.json", base_model_name_or_path="meta-llama/Llama-2-7b-hf"
    )
    for verb, *more in (
        ["merge"],
        ["verify"],
        ["export", "--to", tmp_path / "x"],
        ["chat", "--prompt", "hi"],
    ):
        code, _, err = recipes(verb, "lora", *more)
        assert (
            code == ExitCode.USAGE
            and "was trained on 'meta-llama/Llama-2-7b-hf', not on" in err
            and "Traceback" not in err
        )


def test_a_base_of_the_same_name_with_other_weights_is_refused(
    runs: Runs, recipes: Verb, tmp_path: Path
) -> None:
    run = runs("lora")
    base = base_of(run, tmp_path)
    assert recipes("verify", "lora")[0] == 0
    change_tensors(base / "model.safetensors", lambda name, tensor: tensor * 1.001)
    for verb in ("merge", "verify"):
        code, _, err = recipes(verb, "lora")
        assert (
            code == ExitCode.USAGE
            and "is not the one that run 'lora' was trained on: its weights differ" in err
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "has in_features 32, the adapter 64"),
        ({"num_hidden_layers": 1}, "layers.1.self_attn.q_proj, a layer the base does not have"),
        (
            {"num_hidden_layers": 3},
            "has no weights for 2 layers of the base, model.layers.2.self_attn.q_proj first",
        ),
        ({"num_key_value_heads": 4}, "v_proj has out_features 64, the adapter 32"),
        ({"vocab_size": 300}, "the tokenizer has 512 entries, the embeddings 300 rows"),
    ],
    ids=["width", "fewer layers", "more layers", "heads", "vocabulary"],
)
def test_a_base_of_another_shape_is_refused_where_peft_would_only_warn(
    runs: Runs, recipes: Verb, tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    run = runs("lora")
    (
        run / "adapter" / "weights_check.json"
    ).unlink()  # a run of a version that recorded nothing of its base
    base = base_of(run, tmp_path)
    config = LlamaConfig.from_pretrained(base, **changes, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(base)
    code, _, err = recipes("merge", "lora")
    assert code == ExitCode.USAGE and words in err and not (run / "merged").exists()


def test_a_pickled_adapter_is_refused(runs: Runs, recipes: Verb) -> None:
    run = runs("lora")
    torch.save(load_file(run / "adapter" / ADAPTER), run / "adapter" / "adapter_model.bin")
    (run / "adapter" / ADAPTER).unlink()
    code, _, err = recipes("merge", "lora")
    assert code == ExitCode.USAGE and "adapter_model.bin is a pickle" in err


def test_a_truncated_adapter_is_named_with_both_sizes(runs: Runs, recipes: Verb) -> None:
    run = runs("lora")
    whole = (run / "adapter" / ADAPTER).read_bytes()
    (run / "adapter" / ADAPTER).write_bytes(whole[:-100])
    code, _, err = recipes("verify", "lora")
    assert (
        code == ExitCode.ENVIRONMENT
        and f"is truncated: {len(whole) - 100:,} bytes, expected {len(whole):,}" in err
    )


def test_a_missing_shard_is_named(runs: Runs, recipes: Verb) -> None:
    run = runs("full")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (run / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = recipes("verify", "full")
    assert (
        code == ExitCode.ENVIRONMENT
        and "model-00002-of-00002.safetensors is missing; model.safetensors.index.json names it"
        in err
    )


# ---- Verifying ----


def test_an_index_that_names_no_weights_is_a_damaged_file_of_that_name(
    runs: Runs, recipes: Verb
) -> None:
    index = runs("full") / "model" / "model.safetensors.index.json"
    index.write_text("{}")
    code, _, err = recipes("verify", "full")
    assert code == ExitCode.DATA and f"{index.name}: names no weights" in err


@pytest.mark.parametrize("name", ["lora", "lora.chat", "qlora", "full"])
def test_every_kind_of_run_verifies_against_what_was_recorded_when_it_was_trained(
    runs: Runs, recipes: Verb, name: str
) -> None:
    runs(name)
    code, out, err = recipes("verify", name, "--json")
    found = json.loads(out)
    assert code == 0 and found["passed"] and not found["problems"], err
    assert (
        found["numbers"]["as_trained"]["agrees"]
        and found["numbers"]["as_trained"]["same_top_token"] > 0.98
    )
    assert any("sha256 as recorded" in fact for fact in found["facts"])
    if name == "full":
        assert "merged" not in found["numbers"]
    else:
        assert (
            "in memory" in found["numbers"]["merged"]["compared"]
            and found["numbers"]["merged"]["lost_share"] < 0.05
        )


def test_a_merged_model_is_verified_from_its_files(runs: Runs, recipes: Verb) -> None:
    run = runs("qlora")
    recipes("merge", "qlora")
    code, out, _ = recipes("verify", "qlora", "--prompts", "3")
    assert code == 0 and "against merged/ in bfloat16" in out and "3 validation rows" in out
    assert out.splitlines()[-2].startswith("verified:")
    change_tensors(
        run / "merged" / "model.safetensors",
        lambda name, tensor: tensor * 0.8 if "o_proj" in name else tensor,
    )
    code, out, _ = recipes("verify", "qlora")
    assert (
        code == ExitCode.FAILED
        and "FAILED: merged/ is out of date: model.safetensors in it was changed" in out
        and "next:" not in out
    )
    change_tensors(
        run / "merged" / "model.safetensors",
        lambda name, tensor: tensor * 0.5 if "v_proj" in name else tensor,
    )
    edit_json(run / "merged" / "merge.json", sha256=weight_hashes(run / "merged"))
    code, out, _ = recipes("verify", "qlora")
    assert code == ExitCode.FAILED and "FAILED: merged/:" in out


@pytest.mark.parametrize("name", ["lora", "full"])
def test_weights_that_changed_after_the_training_fail(runs: Runs, recipes: Verb, name: str) -> None:
    run = runs(name)
    file = run / "adapter" / ADAPTER if name == "lora" else run / "model" / "model.safetensors"
    change_tensors(file, lambda name, tensor: tensor * 1.01)
    code, out, _ = recipes("verify", name)
    assert (
        code == ExitCode.FAILED
        and f"FAILED: {file.parent.name}/{file.name} changed after the training" in out
    )


def test_weights_that_changed_behind_a_changed_record_still_answer_otherwise(
    runs: Runs, recipes: Verb
) -> None:
    run = runs("lora")
    change_tensors(run / "adapter" / ADAPTER, lambda name, tensor: tensor * 1.01)
    hashes = weight_hashes(run / "adapter")
    edit_json(run / "adapter" / "weights_check.json", sha256=hashes)
    checked = json.loads((run / "run.json").read_text())["weights_check"]
    edit_json(run / "run.json", weights_check={**checked, "sha256": hashes})
    code, out, _ = recipes("verify", "lora")
    assert code == ExitCode.FAILED and "does not answer as it did when it was trained" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, tensor: tensor * float("nan"), "not finite"),
        (lambda name, tensor: tensor * 0, "changes nothing"),
    ],
    ids=["nan", "zero"],
)
def test_weights_that_are_not_finite_or_change_nothing_fail(
    runs: Runs, recipes: Verb, change: Any, words: str
) -> None:
    run = runs("lora")
    change_tensors(run / "adapter" / ADAPTER, change)
    code, out, _ = recipes("verify", "lora", "--json")
    assert code == ExitCode.FAILED and words in json.loads(out)["problems"][0]


def test_another_number_of_tensors_than_run_json_recorded_fails(runs: Runs, recipes: Verb) -> None:
    run = runs("full")
    state = json.loads((run / "run.json").read_text())
    edit_json(run / "run.json", weights_check={**state["weights_check"], "parameters": 7})
    code, out, _ = recipes("verify", "full")
    assert code == ExitCode.FAILED and "run.json recorded 7" in out


def test_a_merged_model_of_an_older_adapter_is_out_of_date(runs: Runs, recipes: Verb) -> None:
    run = runs("lora")
    recipes("merge", "lora")
    edit_json(run / "merged" / "merge.json", adapter_sha256="0" * 64)
    code, out, _ = recipes("verify", "lora")
    assert (
        code == ExitCode.FAILED
        and "merged/ is out of date: it was made from another adapter; make it again: recipes merge lora"  # noqa: E501
        in out
    )


def test_without_its_data_a_run_is_verified_on_the_rows_it_recorded(
    runs: Runs, recipes: Verb, tmp_path: Path
) -> None:
    run = runs("lora")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["values"]["data"]["source"] = str(tmp_path / "gone.jsonl")
    edit_json(run / "recipe.json", values=recipe["values"])
    code, out, _ = recipes("verify", "lora")
    assert code == 0 and "recorded validation rows; the data is not readable now" in out
    forget_check(run)
    code, out, _ = recipes("verify", "lora")
    assert (
        code == 0
        and "general questions; the data is not readable now" in out
        and "recorded no hashes" in out
    )


def forget_check(run: Path) -> None:
    """Leave of the check what the first versions wrote: nothing beside the weights, and no hashes
    in run.json.
    """
    (run / "adapter" / "weights_check.json").unlink()
    checked = json.loads((run / "run.json").read_text())["weights_check"]
    edit_json(
        run / "run.json",
        weights_check={key: value for key, value in checked.items() if key != "sha256"},
    )


def weaken(run: Path, factor: float) -> None:
    change_tensors(
        run / "adapter" / ADAPTER,
        lambda name, tensor: tensor * factor if "lora_B" in name else tensor,
    )
    forget_check(run)


def test_an_adapter_too_weak_for_half_precision_arithmetic_is_compared_in_float32(
    runs: Runs, recipes: Verb
) -> None:
    run = runs("qlora")
    weaken(run, 0.002)
    code, out, _ = recipes("merge", "qlora")
    assert code == 0 and "computed in float32" in out and "(bfloat16)" in out


def test_an_adapter_that_half_precision_weights_cannot_hold_is_refused_and_merges_in_float32(
    runs: Runs, recipes: Verb
) -> None:
    run = runs("qlora")
    weaken(run, 0.00005)
    code, _, err = recipes("merge", "qlora")
    assert (
        code == ExitCode.FAILED
        and "its effect is lost in rounding (try --dtype float32)" in err
        and "merged.rejected" in err
    )
    code, out, _ = recipes("merge", "qlora", "--dtype", "float32", "--json")
    check = json.loads(out)["check"]
    assert code == 0 and check["computed_in"] == "float32" and check["lost_share"] < 0.01
    assert not (run / "merged.rejected").exists()


def test_a_number_of_prompts_below_one_is_a_usage_error(runs: Runs, recipes: Verb) -> None:
    runs("lora")
    assert recipes("verify", "lora", "--prompts", "0")[0] == ExitCode.USAGE


# ---- Several adapters on one base ----


def test_one_loaded_base_serves_the_base_and_every_adapter_unchanged(runs: Runs) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from recipes_lib.core.run_directory import open_run
    from recipes_lib.weights.finished_run import Family, families, finished_run

    run = runs("lora", "lora.chat")
    shutil.copytree(
        run, run.with_name("lora_chat")
    )  # differs from lora.chat only by what PEFT forbids in a name
    change_tensors(
        run.with_name("lora_chat") / "adapter" / ADAPTER,
        lambda name, tensor: -tensor if "lora_B" in name else tensor,
    )
    forget_check(run.with_name("lora_chat"))
    names = ["lora", "lora.chat", "lora_chat"]
    [group] = families([finished_run(open_run(name)) for name in names])
    family = Family(group)
    assert family.names == ["base", *names]
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    expected = {"base": logits(AutoModelForCausalLM.from_pretrained(base))}
    for name in names:
        alone = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), run.parent / name / "adapter"
        )
        expected[name] = logits(alone)
    for name in ["lora", "base", "lora_chat", "lora.chat", "base", "lora"]:
        with family.using(name) as model:
            assert torch.equal(logits(model), expected[name]), name
    assert not torch.equal(expected["lora.chat"], expected["lora_chat"])


def test_runs_with_another_precision_or_method_are_families_of_their_own(runs: Runs) -> None:
    from recipes_lib.core.run_directory import open_run
    from recipes_lib.weights.finished_run import families, finished_run

    runs("lora", "lora.chat", "qlora", "full")
    grouped = families(
        [finished_run(open_run(name)) for name in ("lora", "qlora", "full", "lora.chat")]
    )
    assert [[one.run.name for one in group] for group in grouped] == [
        ["lora", "lora.chat"],
        ["qlora"],
        ["full"],
    ]
