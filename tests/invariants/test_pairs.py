"""Preference tuning under the same guarantees: interrupted equals uninterrupted, ranks equal
accumulation, DDP equals FSDP2.
"""

from pathlib import Path

import pytest
from tests.conftest import NF4
from tests.invariants.conftest import written
from tests.pairs import write_pair_recipe
from tests.tiers import in_ci

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main
from recipes_lib.training.trainer import RunCallback

pytestmark = pytest.mark.slow
EPOCHS = ["data.max_examples=40", "data.split={validation: 0.2}"]
EPOCHS += ["train.max_steps=-1", "train.num_train_epochs=2"]
DROPOUT = ["train.disable_dropout=false", "lora.lora_dropout=0.3"]
FULL = ["lora=null", "train.learning_rate=1e-3"]
BF16, HALF = ["train.bf16=true"], ["train.bf16=true", "model.dtype=bfloat16"]
BEST = ["train.load_best_model_at_end=true", "train.save_steps=4"]
WAYS = {
    "float32": [],
    "dropout": DROPOUT,
    "bf16": BF16,
    "bf16-weights": HALF,
    "qlora": [NF4, *HALF],
    "qlora-best": [NF4, *BF16, *BEST],
    "full": FULL,
    "full-bf16": [*FULL, *HALF],
    "dora": ["lora.use_dora=true"],
    "pissa": ["lora.init_lora_weights=pissa"],
    "modules-to-save": ["lora.modules_to_save=[lm_head]"],
    "checkpointing": ["train.activation_checkpointing=true"],
    "best": [*BEST, "train.save_total_limit=1"],
    "length-groups": [*EPOCHS, "train.train_sampling_strategy=group_by_length"],
    "epoch-saves": [*EPOCHS, "train.save_strategy=epoch", "train.eval_strategy=epoch"],
    "ipo": ["train.loss_type=ipo"],
    "two-losses": ["train.loss_type=[sigmoid, apo_zero]", "train.loss_weights=[0.7, 0.3]"],
    "weighted": ["train.use_weighting=true"],
}


@pytest.fixture
def recipe(tiny_recipe: Path, tiny_model_dir, tiny_recipe_text) -> Path:
    return write_pair_recipe(tiny_recipe.with_name("pairs.yaml"), tiny_recipe_text(tiny_model_dir))


@pytest.mark.parametrize("way", in_ci(WAYS, "dropout", "qlora", "full", "ipo", "epoch-saves"))
def test_a_power_cut_and_a_resume_equal_an_uninterrupted_training(recipe, way, monkeypatch) -> None:
    words = [str(recipe), "train.lr_scheduler_type=constant", *WAYS[way]]
    assert main([*words, "run.name=whole"]) == 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise AssertionError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_pre_optimizer_step", on_pre_optimizer_step)
        assert main([*words, "run.name=killed"]) == ExitCode.FAILED
    assert main([*words, "run.name=killed"]) == 0
    whole, lines = written(recipe, "whole")
    assert whole and (whole, lines) == written(recipe, "killed")


@pytest.fixture(scope="module")
def pair_launcher(launcher, tiny_model_dir, tiny_recipe_text):
    """The launcher of a module's trainings, on pairs."""
    write_pair_recipe(launcher.recipe, tiny_recipe_text(tiny_model_dir))
    return launcher


RANKS = {"lora": [], "full": FULL, "pissa": ["lora.init_lora_weights=pissa"]}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", in_ci(RANKS, "lora", "full"))
def test_ranks_equal_accumulation_and_ddp_equals_fsdp2(pair_launcher, way) -> None:
    """15 pairs for validation, in batches of 4 a rank: the last one has fewer on one of them."""
    launcher, words = pair_launcher, RANKS[way]
    words = [*words, "data.split={validation: 0.15}", "train.per_device_eval_batch_size=4"]
    for config in ("cpu", "ddp_cpu", "fsdp_cpu"):
        launcher.train(f"run.name={way}-{config}", *words, config=config)
    keys = ("loss", "grad_norm", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    for config in ("ddp_cpu", "fsdp_cpu"):
        for key in keys:
            one, two = (launcher.series(f"{way}-{name}", key) for name in ("cpu", config))
            assert len(one) == len(two) > 0 and one == pytest.approx(two, rel=2e-4, abs=1e-6)
        tokens = [launcher.series(f"{way}-{name}", "tokens") for name in ("cpu", config)]
        assert tokens[0] == tokens[1]
        references = [
            (launcher.run(f"{way}-{name}") / "reference.safetensors").read_bytes()
            for name in ("cpu", config)
        ]
        assert references[0] == references[1]
    if way == "lora":
        assert launcher.weights("lora-ddp_cpu") == launcher.weights("lora-fsdp_cpu")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("config", ["ddp_cpu", "fsdp_cpu"])
def test_a_killed_rank_and_a_resume_equal_an_uninterrupted_training(pair_launcher, config) -> None:
    launcher, words = pair_launcher, DROPOUT
    launcher.train(f"run.name=whole-{config}", *words, config=config)
    launcher.break_and_resume(f"broken-{config}", *words, config=config, step=5)
    assert launcher.weights(f"broken-{config}") == launcher.weights(f"whole-{config}")
