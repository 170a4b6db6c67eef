"""The memory of a plan: parts that are known exactly, and what a CPU training really keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.families import build_family
from tests.pairs import write_pair_recipe
from tests.plan.kept import bytes_of, counting_what_is_kept
from transformers import AutoConfig

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.plan.advice import advise, changed_plans, rows_shown
from recipes_lib.plan.plan import Plan, launch_and_card, plan_of
from recipes_lib.plan.steps import RowLengths
from recipes_lib.train import main

FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "granite", "qwen3_moe")


def plan(
    recipe: str | Path, *words: str, gpu: str = "h100", gpus: int | None = None, rows: Any = None
) -> Plan:
    loaded = load_recipe(recipe, words)
    accelerate = next((word.partition("=")[2] for word in words if "accelerate" in word), None)
    return plan_of(loaded, *launch_and_card(loaded, gpu, gpus=gpus, accelerate=accelerate), rows)


def kept_in_a_step(recipe: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, int]:
    """Train one step; return the tokens of its first micro-batch and the bytes autograd kept."""
    from transformers import Trainer

    passes: list[tuple[int, int]] = []
    original = Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        with counting_what_is_kept(model.parameters()) as kept:
            loss = original(self, model, inputs, *args, **options)
        passes.append((inputs["input_ids"].numel(), bytes_of(kept)))
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        assert main([str(recipe), "train.max_steps=1", *words]) == 0
    return passes[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_cpu_training_keeps_what_is_planned(
    stage, tiny_recipe, tiny_recipe_text, tiny_model_dir, tmp_path, monkeypatch
):
    """A micro-batch has 8 rows of tokens, which are 8 rows of the data, or 4 pairs."""
    recipe, size = tiny_recipe, 8
    if stage == "dpo":
        text = tiny_recipe_text(tiny_model_dir)
        recipe, size = write_pair_recipe(tiny_recipe.with_name("pairs.yaml"), text), 4
    wrong = []
    for family in FAMILIES:
        folder = build_family(family, tmp_path / family, tiny_model_dir)
        words = [f"model.name_or_path={folder}", "model.dtype=bfloat16", "train.bf16=true"]
        words += ["lora.target_modules=all-linear", "train.eval_strategy='no'"]
        words += [f"train.per_device_train_batch_size={size}", f"run.name={family}"]
        tokens, kept = kept_in_a_step(recipe, monkeypatch, *words)
        rows = RowLengths((tokens // size,) * 300, 300, 0, "like these", counted=True)
        made = plan(recipe, *words, gpu="cpu", rows=rows)
        if stage == "dpo":
            assert (made.steps.largest, made.steps.row) == (tokens, tokens // 8)
        planned = made.memory["activations"] * 2**30
        if kept != pytest.approx(planned, rel=0.1):
            wrong.append(f"{family}: {tokens} tokens keep {kept}, planned {planned:.0f}")
    assert not wrong


LLAMA = ("llama3.2-1b-tulu3/lora-r64", "train.max_length=1024")


@pytest.fixture(scope="module")
def llama():
    """A small known model with LoRA, on one card."""
    return plan(*LLAMA, "train.activation_checkpointing=false")


def test_known_parts_are_exact_shared_out_by_fsdp_and_copied_by_ddp(llama):
    memory, trained, gib = llama.memory, llama.trace.trained, 2**30
    assert llama.trace.parameters == 1_235_814_400
    assert memory["weights"] == pytest.approx(2 * 1_235_814_400 / gib)
    assert memory["trained"] == memory["gradients"] == pytest.approx(4 * trained / gib)
    assert memory["optimizer"] == pytest.approx(8 * trained / gib)
    words = (*LLAMA, "train.activation_checkpointing=false")
    launches = [f"launch.accelerate={name}" for name in ("ddp", "fsdp")]
    ddp, sharded = (plan(*words, launch, gpus=2).memory for launch in launches)
    for part in ("weights", "optimizer"):
        assert sharded[part] == pytest.approx(ddp[part] / 2)
    assert sharded["gathered"] > 0 == ddp["gathered"]
    assert ddp["gradients"] == 2 * memory["gradients"]


def test_every_change_that_saves_memory_saves_it_in_the_plan(llama):
    changes = (
        "train.activation_checkpointing=true",
        "train.per_device_train_batch_size=1",
        "train.max_length=256",
        "quantization={load_in_4bit: true}",
        "train.optim=adamw_8bit",
    )
    words = (*LLAMA, "train.activation_checkpointing=false")
    needed = {change: plan(*words, change).needed for change in changes}
    assert not [change for change, gib in needed.items() if gib >= llama.needed]


def test_the_state_of_an_optimizer_is_counted_as_it_is_kept(llama):
    full = plan(*LLAMA, "lora=null", "train.optim=adamw_8bit")
    embeddings = full.trace.vocabulary * full.trace.hidden  # in float32
    kept = [(full, 8 * embeddings + 2.1 * (full.trace.trained - embeddings))]
    for name, of_each in (("ademamix", 12), ("lion_32bit", 4), ("rmsprop_bnb", 4), ("sgd", 0.1)):
        kept.append((plan(*LLAMA, f"train.optim={name}"), of_each * llama.trace.trained))
    for made, expected in kept:
        assert made.memory["optimizer"] * 2**30 == pytest.approx(expected, rel=0.01)


def test_a_packed_row_has_a_mask_in_every_block_on_a_gpu():
    words = ("train.per_device_train_batch_size=1", "train.activation_checkpointing=false")
    plain, packed = (plan(*LLAMA, *words, f"train.packing={is_on}") for is_on in ("false", "true"))
    assert plain.steps.row == packed.steps.row == 1024
    mask = packed.memory["activations"] - plain.memory["activations"]
    assert mask == pytest.approx(16 * 1024**2 * 2 / 2**30)


def test_a_local_model_is_planned_by_its_own_config(tiny_recipe, tiny_model_dir, tmp_path):
    folder = build_family("granitemoehybrid", tmp_path / "granite", tiny_model_dir)
    assert "Infinity" in (folder / "config.json").read_text()
    assert plan(tiny_recipe, f"model.name_or_path={folder}", gpu="cpu").trace.layers == 2


def test_a_speed_is_that_of_a_run_that_was_launched_and_compiled_alike(tiny_recipe, tmp_path):
    assert main([str(tiny_recipe), "train.max_steps=1"]) == 0
    assert "the run tiny" in plan(tiny_recipe, gpu="cpu").speed_source
    assert "not known" in plan(tiny_recipe, "train.torch_compile=true", gpu="cpu").speed_source
    file = tmp_path / "runs" / "tiny" / "run.json"
    state = json.loads(file.read_text())
    state["guard"]["launch.distribution"], state["summary"]["world_size"] = "FSDP", 2
    file.write_text(json.dumps(state))
    for launch, words in (("ddp_cpu", "not known"), ("fsdp_cpu", "the run tiny")):
        made = plan(tiny_recipe, f"launch.accelerate={launch}", gpu="cpu", gpus=2)
        assert words in made.speed_source, launch


def test_no_change_that_is_advised_alters_the_examples_of_a_step():
    given = ["run.global_batch_size=null", "train.gradient_accumulation_steps=4"]
    made = plan(*LLAMA, *given)
    sizes = [other.steps.examples for _, _, other in changed_plans(made, [*LLAMA[1:], *given])]
    assert len(sizes) > 5 and {*sizes} == {made.steps.examples}


def test_processes_without_gpus_share_the_memory_of_the_machine(tiny_recipe):
    alone, two = (
        plan(tiny_recipe, f"launch.accelerate={name}", gpu="cpu") for name in ("cpu", "ddp_cpu")
    )
    assert two.card.memory_gib == pytest.approx(alone.card.memory_gib / 2, rel=0.2)


EIGHT_B = ("llama3.1-8b-tulu3/full", "run.global_batch_size=128")


def test_what_ddp_cannot_hold_is_sharded_over_the_same_cards():
    made = plan(*EIGHT_B, "launch.accelerate=ddp", gpus=8)
    assert not made.fits
    words, _, other = advise(made, EIGHT_B[1:])
    assert "launch.accelerate=fsdp launch.gpus=8" in words
    assert other.fits and other.launch.world_size == 8


def test_a_quantized_base_is_whole_on_every_card_while_it_is_loaded():
    words = ("llama2-7b-dolly/qlora-r32",)
    ddp, sharded = (
        plan(*words, f"launch.accelerate={name}", gpus=2) for name in ("ddp", "fsdp_qlora")
    )
    assert sharded.load_peak > ddp.memory["weights"] and ddp.load_peak == 0
    assert sharded.load_peak <= sharded.needed <= ddp.needed


def test_the_steps_of_a_shipped_recipe_are_of_the_rows_that_its_comments_name():
    made = plan("llama3.1-8b-tulu3/full", gpus=8)
    assert made.steps_known and made.steps.steps == pytest.approx(14_645, rel=0.01)
    lines = dict(rows_shown(made, None)[0])
    assert "per 1,000 rows" in lines["time"]
    unknown = plan("llama3.1-8b-tulu3/full", "data.source=someone/else", gpus=8)
    lines = dict(rows_shown(unknown, None)[0])
    assert not unknown.steps_known and "per 1,000 rows" in lines["steps"]


@pytest.mark.parametrize("family", ["mpt", "jetmoe"])
def test_a_class_that_cannot_be_traced_is_one_clear_line(family, tiny_recipe, tmp_path):
    config = AutoConfig.for_model(family, vocab_size=520)
    config.save_pretrained(tmp_path)
    words = (f"model.name_or_path={tmp_path}", "lora.target_modules=all-linear")
    with pytest.raises(RecipeError, match="no plan: a pass of"):
        plan(tiny_recipe, *words, gpu="cpu", rows=RowLengths((9,), 99, 0, "made up"))
