"""Stopped or killed, and resumed, equals uninterrupted, byte for byte and line for line: every way
to train that has a state of its own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.conftest import NF4
from tests.families import asked_to_stop
from tests.invariants.conftest import written
from tests.tiers import in_ci

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main

pytestmark = pytest.mark.slow
NF4_IN_FLOAT32 = NF4.replace("bfloat16", "float32")
EPOCHS = ["data.max_examples=40", "data.split.validation=0.2"]
EPOCHS += ["train.max_steps=-1", "train.num_train_epochs=2"]

FULL = ["lora=null", "train.learning_rate=1e-3"]
BF16, HALF = ["train.bf16=true"], ["train.bf16=true", "model.dtype=bfloat16"]
BEST = ["train.load_best_model_at_end=true", "train.save_steps=4"]
RESTARTS = "train.lr_scheduler_type=cosine_with_restarts"
WORKER = [*EPOCHS, "train.dataloader_num_workers=1"]
WAYS = {
    "float32": [],
    "bf16": BF16,
    "bf16-weights": HALF,
    "qlora-bf16": [NF4, *HALF],
    "qlora-float32": [NF4_IN_FLOAT32],
    "qlora-dora": [NF4, *HALF, "lora.use_dora=true"],
    "qlora-best": [NF4, *BF16, *BEST],
    "full": FULL,
    "full-bf16": [*FULL, *HALF],
    "dora": ["lora.use_dora=true"],
    "rslora": ["lora.use_rslora=true"],
    "modules-to-save": ["lora.modules_to_save=[lm_head]"],
    "neftune": ["train.neftune_noise_alpha=5"],
    "adafactor": ["train.optim=adafactor"],
    "adam-8bit": ["train.optim=adamw_8bit", "lora.r=64"],
    "adam-paged": ["train.optim=paged_adamw_32bit"],
    "plateau": ["train.lr_scheduler_type=reduce_lr_on_plateau"],
    "restarts": [RESTARTS, "train.lr_scheduler_kwargs={num_cycles: 3}"],
    "best": [*BEST, "train.save_total_limit=1"],
    "wrapped": ["train.packing=true", "train.packing_strategy=wrapped"],
    "packing": ["train.packing=true"],
    "checkpointing": ["train.activation_checkpointing=true"],
    "length-groups": [*EPOCHS, "train.train_sampling_strategy=group_by_length"],
    "left-out": [*EPOCHS, "data.max_examples=45"],
    "epoch-saves": [*EPOCHS, "train.save_strategy=epoch", "train.eval_strategy=epoch"],
    "epoch-evaluations": [*EPOCHS, "train.save_strategy=steps", "train.eval_strategy=epoch"],
    "workers": WORKER,
    "persistent-workers": [*WORKER, "train.dataloader_persistent_workers=true"],
    "logs-between-saves": ["train.logging_steps=3", "train.eval_on_start=true"],
}


@pytest.fixture
def resumed(tiny_recipe, monkeypatch) -> Callable[..., int]:
    """A function that trains `whole` without a break, and `name` with one at a step, and returns
    the exit code of resuming it.
    """
    from recipes_lib.training.trainer import RunCallback

    stopped = asked_to_stop, "on_step_end", ExitCode.PREEMPTED
    crashed = broken_off, "on_pre_optimizer_step", ExitCode.FAILED

    def resume(*words: str, step: int, crash: bool = False, name: str = "broken") -> int:
        words = (str(tiny_recipe), "train.lr_scheduler_type=constant", *words)
        if not (tiny_recipe.parent / "runs" / "whole").exists():
            assert main([*words, "run.name=whole"]) == 0
        end, method, code = crashed if crash else stopped
        with monkeypatch.context() as patch:
            patch.setattr(RunCallback, method, end(step, getattr(RunCallback, method)))
            assert main([*words, f"run.name={name}"]) == code
        return main([*words, f"run.name={name}"])

    return resume


def broken_off(step: int, _: Callable[..., Any]) -> Callable[..., Any]:
    """The files are those that a kill in the step leaves: nothing is written on the way out."""

    def on_pre_optimizer_step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step - 1:
            raise AssertionError("the power went out")

    return on_pre_optimizer_step


@pytest.mark.parametrize(
    "way",
    in_ci(
        WAYS,
        *("bf16", "qlora-bf16", "full", "dora", "adam-8bit", "plateau", "best", "packing"),
        *("epoch-saves", "workers", "logs-between-saves"),
    ),
)
def test_stopped_or_killed_and_resumed_equals_uninterrupted(tiny_recipe, way, resumed) -> None:
    words = [*([] if "lora=null" in WAYS[way] else ["lora.lora_dropout=0.2"]), *WAYS[way]]
    assert resumed(*words, step=5, name="stopped") == 0
    assert resumed(*words, step=7, crash=True, name="killed") == 0
    whole, metrics = written(tiny_recipe, "whole")
    weights, metrics_again = written(tiny_recipe, "killed")
    assert whole and whole == weights and metrics == metrics_again
    weights, metrics_again = written(tiny_recipe, "stopped")
    assert whole == weights and validations(metrics) == validations(metrics_again)


def validations(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """A stop saves, and a save ends the window that a training loss is averaged over."""
    return [line for line in lines if "eval_loss" in line]


EACH_STEP = [*EPOCHS, "data.max_examples=28", "lora.lora_dropout=0.2", "train.eval_strategy=epoch"]


def test_a_stop_at_any_step_of_an_evaluated_epoch_changes_nothing(tiny_recipe, resumed) -> None:
    assert resumed(*EACH_STEP, step=1, name="step-1") == 0
    whole, metrics = written(tiny_recipe, "whole")
    last = metrics[-1]["step"]
    assert last >= 4 and len(validations(metrics)) == 2
    failures = []
    for step in range(1, int(last)):
        if step > 1:
            assert resumed(*EACH_STEP, step=step, name=f"step-{step}") == 0
        if written(tiny_recipe, f"step-{step}") != (whole, metrics):
            failures.append(step)
    assert not failures


def test_the_best_model_is_the_same_one_where_a_stop_saved_its_step(tiny_recipe, resumed) -> None:
    """Each evaluated step is saved, so that step 2, which stays the best one, is there."""
    words = [
        "train.load_best_model_at_end=true",
        "train.eval_steps=2",
        "train.save_steps=4",
        "train.metric_for_best_model=loss",
        "train.greater_is_better=true",  # so that the first one is the best
    ]
    assert resumed(*words, step=2) == 0
    assert written(tiny_recipe, "whole")[0] == written(tiny_recipe, "broken")[0]


def test_a_validation_leaves_the_random_state_as_the_step_left_it(tiny_recipe, monkeypatch) -> None:
    """Each batch of the validation draws random numbers, and dropout goes on after it."""
    from recipes_lib.training.sft import SupervisedTrainer

    honest = SupervisedTrainer.compute_loss

    def drawing(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            torch.rand(3)
        return honest(self, model, *args, **kwargs)

    words = [str(tiny_recipe), "lora.lora_dropout=0.3"]
    assert main([*words, "run.name=whole"]) == 0
    monkeypatch.setattr(SupervisedTrainer, "compute_loss", drawing)
    assert main([*words, "run.name=drawn"]) == 0
    assert written(tiny_recipe, "whole") == written(tiny_recipe, "drawn")
