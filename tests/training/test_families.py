"""Each architecture of `tests/families.py` goes the whole way of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.families import (
    ALL_LINEAR,
    FAMILIES,
    METHODS,
    asked_to_stop,
    build_family,
    write_family_recipe,
    write_own_evals,
)
from tests.tiers import in_ci

from recipes_lib.core.errors import ExitCode
from recipes_lib.models.families import needs_of
from recipes_lib.train import main

Write = Callable[..., Path]


@pytest.fixture
def write_recipe(tiny_model_dir, tiny_recipe_text, tmp_path, monkeypatch) -> Write:
    """A function that writes a short recipe for a family's tiny model; its runs go to
    <tmp_path>/runs.
    """
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    # half of the time, and the same for every architecture
    monkeypatch.setattr("recipes_lib.weights.load.gc.collect", lambda: 0)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "this machine")

    def write(family: str, *changes: dict[str, Any]) -> Path:
        text = tiny_recipe_text(build_family(family, tmp_path / family, tiny_model_dir))
        return write_family_recipe(tmp_path / f"{family}.yaml", text, *changes)

    return write


def weights_of(run: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for folder in ("adapter", "model")
        for file in (run / folder).glob("*.safetensors")
    }


WHOLE_WAY = [(family, method) for family in FAMILIES for method in METHODS]
WHOLE_WAY_IN_CI = [
    (family, next(iter(METHODS)))
    for family in ("llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "falcon_h1")
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), in_ci(WHOLE_WAY, *WHOLE_WAY_IN_CI))
def test_each_family_goes_the_whole_way(
    family, method, write_recipe, recipes, tmp_path, monkeypatch
) -> None:
    from recipes_lib.training.trainer import RunCallback

    recipe, run = write_recipe(family, METHODS[method]), tmp_path / "runs" / "run"
    assert recipes("check", "--full", recipe)[0] == 0
    assert main([str(recipe), "run.name=whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", asked_to_stop(2, RunCallback.on_step_end))
        assert main([str(recipe), "run.name=run"]) == ExitCode.PREEMPTED
    assert main([str(recipe), "run.name=run"]) == 0
    assert weights_of(run) and weights_of(run) == weights_of(run.with_name("whole"))

    if (family, method) == ("gpt2", "qlora"):  # refused: its layers are transposed
        assert recipes("merge", "run")[0] == ExitCode.USAGE
        return
    given = [tmp_path / "given"]
    if method != "full":
        given.append(tmp_path / "given-merged")
        assert recipes("merge", "run")[0] == 0
        assert recipes("export", "run", "--merged", "--to", given[1])[0] == 0
    assert recipes("chat", "run", "--prompt", "What is gold?", "--max-new-tokens", "5")[0] == 0
    assert recipes("eval", *write_own_evals(tmp_path), "run", "--trust-remote-code")[0] == 0
    assert recipes("export", "run", "--to", given[0])[0] == 0
    assert_plain(given[-1], tmp_path / family)


def assert_plain(given: Path, base: Path) -> None:
    """What is given away answers two prompts at once in transformers alone, and its config says
    what the base's says.
    """
    import transformers
    from safetensors.torch import load_file

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        given, padding_side="left", pad_token="</s>"
    )
    prompts = tokenizer(
        ["What is gold?", "Name three metals, and say what each is used for."],
        return_tensors="pt",
        padding=True,
    )
    prompts.pop("token_type_ids", None)
    saved, original = (json.loads((folder / "config.json").read_text()) for folder in (given, base))
    model = getattr(transformers, needs_of(saved["model_type"]).auto_class).from_pretrained(given)
    assert len(model.generate(**prompts, max_new_tokens=3, do_sample=False)) == 2
    if saved["model_type"] != original["model_type"]:  # the text's class of a model for images
        assert saved["model_type"] == original["text_config"]["model_type"]
        return
    before, now = (load_file(folder / "model.safetensors") for folder in (base, given))
    for name in before:
        if {*needs_of(model.config.model_type).images} & {*name.split(".")}:
            assert now[name].equal(before[name].to(now[name].dtype)), name
    for part in ("text_config", "vision_config"):
        saved |= {f"{part}.{key}": value for key, value in saved.pop(part, {}).items()}
        original |= {f"{part}.{key}": value for key, value in original.pop(part, {}).items()}
    changed = {key.rpartition(".")[2] for key in original if saved.get(key) != original[key]}
    assert changed <= {"dtype", "tie_word_embeddings", "pad_token_id"}


BART = {"decoder_layers": 2, "decoder_ffn_dim": 96, "decoder_attention_heads": 4}
BART |= {"is_decoder": True, "is_encoder_decoder": False}


@pytest.mark.parametrize(("family", "sizes"), [("bart", BART), ("doge", {})])
def test_a_decoder_with_positions_of_its_own_and_one_without_its_experts_are_trained(
    family, sizes, write_recipe, tiny_model_dir, tmp_path
) -> None:
    """Bart counts positions through a whole row, examples end to end would leave its table; Doge's
    config names experts it may not have.
    """
    recipe = write_recipe(family, METHODS["lora"])
    build_family(family, tmp_path / family, tiny_model_dir, **sizes)
    assert main([str(recipe), "run.name=run"]) == 0


@pytest.mark.slow
def test_the_best_model_of_a_full_fine_tuning_has_its_own_experts(write_recipe, tmp_path) -> None:
    """In a file each expert has its matrices, in memory all share one: the Trainer finds none of
    them, and keeps those of the last step.
    """
    # the worst loss, so that it is not the last one
    best = {"load_best_model_at_end": True, "greater_is_better": True, "eval_steps": 2}
    recipe = write_recipe("mixtral", METHODS["full"], {"train": best})
    assert main([str(recipe), "run.name=run"]) == 0
    run = tmp_path / "runs" / "run"
    saved = {
        step: (run / f"checkpoints/checkpoint-{step}/model.safetensors").read_bytes()
        for step in (2, 4)
    }
    assert weights_of(run) == {"model.safetensors": saved[2]} != {"model.safetensors": saved[4]}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("qwen3_moe", {"target_modules": []}),
        ("gpt_oss", {"target_modules": ["q_proj"]}),
        ("granitemoe", {"target_modules": ["q_proj"], "target_parameters": ["router.weight"]}),
    ],
)
def test_experts_and_routers_that_are_asked_for_go_the_whole_way(
    family, lora, write_recipe, recipes, tmp_path
) -> None:
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    recipe = write_recipe(family, {"lora": {**ALL_LINEAR, **experts, **lora}})
    assert recipes("check", "--full", recipe)[0] == 0
    assert main([str(recipe), "run.name=run"]) == 0
    assert recipes("merge", "run")[0] == 0
    assert recipes("chat", "run", "--prompt", "What is gold?", "--max-new-tokens", "5")[0] == 0
    assert recipes("export", "run", "--merged", "--to", tmp_path / "given")[0] == 0
    assert_plain(tmp_path / "given", tmp_path / family)


@pytest.mark.slow
def test_the_routers_loss_is_trained_and_is_in_no_validation_loss(write_recipe, tmp_path) -> None:
    recipe = write_recipe("mixtral", METHODS["lora"], {"train": {"learning_rate": 1.0e-9}})
    found = {}
    for weight in (0.0, 10.0):
        words = [f"train.router_aux_loss_coef={weight}", f"run.name=run{weight:g}"]
        assert main([str(recipe), *words]) == 0
        lines = (tmp_path / f"runs/run{weight:g}/metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[weight] = {key: value for row in reversed(rows) for key, value in row.items()}
    plain, weighed = found.values()
    assert "aux_loss" not in plain and weighed["aux_loss"] > 1
    added = weighed["loss"] - plain["loss"]
    assert added == pytest.approx(10 * weighed["aux_loss"], rel=0.02)
    assert weighed["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


@pytest.mark.nightly
@pytest.mark.slow
def test_gpt_oss_trains_from_the_packed_experts_of_the_hub(write_recipe, recipes, tmp_path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    half = {"model": {"dtype": "bfloat16"}, "train": {"bf16": True}}
    recipe, file = write_recipe("gpt_oss", METHODS["lora"], half), tmp_path / "gpt_oss/config.json"
    weights = file.with_name("model.safetensors")
    tensors = load_file(weights)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, height = tensors.pop(name).shape
        shape = (experts, height, width // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(shape, 121, dtype=torch.uint8)
    save_file(tensors, weights, metadata={"format": "pt"})
    packed = {"quantization_config": {"quant_method": "mxfp4"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | packed))
    assert recipes("check", "--full", recipe)[0] == 0
    assert main([str(recipe), "run.name=run"]) == 0
    assert recipes("merge", "run")[0] == 0
    assert "quantization_config" not in (tmp_path / "runs/run/merged/config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_head_trained_apart_from_tied_embeddings_is_evaluated_as_it_was_trained(
    module, write_recipe, recipes, tmp_path
) -> None:
    """lm-eval ties the weights of what it is given; the merged model, which has nothing to tie,
    must get the same numbers.
    """
    recipe = write_recipe(
        "qwen3", {"lora": {"modules_to_save": [module], "target_modules": ["q_proj", "v_proj"]}}
    )
    assert main([str(recipe), "run.name=run"]) == 0
    assert recipes("merge", "run")[0] == 0
    merged = tmp_path / "given"
    assert recipes("export", "run", "--merged", "--to", merged)[0] == 0
    assert_plain(merged, tmp_path / "qwen3")
    words = ["run", merged, tmp_path / "qwen3", "--trust-remote-code"]
    assert recipes("eval", write_own_evals(tmp_path)[0], *words)[0] == 0
    of_adapter, of_merged, of_base = (
        likelihoods(tmp_path / "runs", name) for name in ("run", "base--given-*", "base--qwen3-*")
    )
    assert of_adapter == pytest.approx(of_merged, abs=1e-3)
    assert max(abs(here - there) for here, there in zip(of_adapter, of_base, strict=True)) > 0.1


def likelihoods(root: Path, run: str) -> list[float]:
    """The log-likelihoods that lm-eval recorded for the choices."""
    [file] = root.glob(f"{run}/evals/*/samples/samples_tiny_choice.jsonl")
    rows = sorted(
        (json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"]
    )
    return [float(answer[0][0]) for row in rows for answer in row["resps"]]
