"""Stopped or killed, and resumed, equals uninterrupted, byte for byte and line for line: every way
to train that has a state of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiers import in_ci

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main

pytestmark = pytest.mark.slow
NF4 = (
    "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"
)
NF4_IN_FLOAT32 = NF4.replace("bfloat16", "float32")
EPOCHS = [
    "data.max_examples=40",
    "data.split.validation=0.2",
    "train.max_steps=-1",
    "train.num_train_epochs=2",
]
# of the machine, not of the training
MEASURED = (
    "tokens_per_second",
    "peak_memory_gib",
    "step_seconds",
    "step_tokens",
    "others_cpu",
    "other_gpu_processes",
)

WAYS = {
    "float32": [],
    "bf16": ["train.bf16=true"],
    "bf16-weights": ["train.bf16=true", "model.dtype=bfloat16"],
    "qlora-bf16": [NF4, "train.bf16=true", "model.dtype=bfloat16"],
    "qlora-float32": [NF4_IN_FLOAT32],
    "qlora-dora": [NF4, "train.bf16=true", "model.dtype=bfloat16", "lora.use_dora=true"],
    "qlora-best": [
        NF4,
        "train.bf16=true",
        "train.load_best_model_at_end=true",
        "train.save_steps=4",
    ],
    "full": ["lora=null", "train.learning_rate=1e-3"],
    "full-bf16": [
        "lora=null",
        "train.learning_rate=1e-3",
        "train.bf16=true",
        "model.dtype=bfloat16",
    ],
    "dora": ["lora.use_dora=true"],
    "rslora": ["lora.use_rslora=true"],
    "modules-to-save": ["lora.modules_to_save=[lm_head]"],
    "neftune": ["train.neftune_noise_alpha=5"],
    "adafactor": ["train.optim=adafactor"],
    "adam-8bit": ["train.optim=adamw_8bit", "lora.r=64"],
    "adam-paged": ["train.optim=paged_adamw_32bit"],
    "plateau": ["train.lr_scheduler_type=reduce_lr_on_plateau"],
    "restarts": [
        "train.lr_scheduler_type=cosine_with_restarts",
        "train.lr_scheduler_kwargs={num_cycles: 3}",
    ],
    "best": ["train.load_best_model_at_end=true", "train.save_steps=4", "train.save_total_limit=1"],
    "wrapped": ["train.packing=true", "train.packing_strategy=wrapped"],
    "packing": ["train.packing=true"],
    "token-cap": ["run.max_tokens_per_micro_batch=300"],
    "checkpointing": ["train.activation_checkpointing=true"],
    "length-groups": [*EPOCHS, "train.train_sampling_strategy=group_by_length"],
    "rebalanced": [*EPOCHS, "train.train_sampling_strategy=batch_rebalance"],
    "dropped": [*EPOCHS, "train.dataloader_drop_last=true", "data.max_examples=45"],
    "epoch-saves": [*EPOCHS, "train.save_strategy=epoch", "train.eval_strategy=epoch"],
    "epoch-evaluations": [*EPOCHS, "train.save_strategy=steps", "train.eval_strategy=epoch"],
    "workers": [*EPOCHS, "train.dataloader_num_workers=1"],
    "persistent-workers": [
        *EPOCHS,
        "train.dataloader_num_workers=1",
        "train.dataloader_persistent_workers=true",
    ],
    "logs-between-saves": ["train.logging_steps=3"],
}


def written(recipe: Path, name: str) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """The weights and the metrics of a run, without what the machine decides."""
    run = recipe.parent / "runs" / name
    weights = {
        file.name: file.read_bytes()
        for folder in ("adapter", "model")
        for file in (run / folder).glob("*.safetensors")
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return weights, [
        {key: value for key, value in line.items() if key not in MEASURED} for line in lines
    ]


@pytest.fixture
def resumed(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that trains `whole` without a break, and `name` with one at a step, and returns
    the exit code of resuming it.
    """
    from recipes_lib.training.stopping import StopCallback

    def resume(*words: str, step: int, crash: bool = False, name: str = "broken") -> int:
        words = (str(tiny_recipe), "train.lr_scheduler_type=constant", *words)
        if not (tiny_recipe.parent / "runs" / "whole").exists():
            assert main([*words, "run.name=whole"]) == 0
        with monkeypatch.context() as patch:
            if crash:
                patch.setattr(
                    StopCallback, "on_pre_optimizer_step", broken_off(step), raising=False
                )
            else:
                patch.setattr(
                    StopCallback, "on_step_end", asked_to_stop(step, StopCallback.on_step_end)
                )
            assert main([*words, f"run.name={name}"]) == (
                ExitCode.FAILED if crash else ExitCode.PREEMPTED
            )
        return main([*words, f"run.name={name}"])

    return resume


def asked_to_stop(step: int, honest: Callable[..., Any]) -> Callable[..., Any]:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            self.request.requested = 1
        return honest(self, args, state, control, **kwargs)

    return on_step_end


def broken_off(step: int) -> Callable[..., Any]:
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
        *("epoch-saves", "workers"),
    ),
)
def test_stopped_or_killed_and_resumed_equals_uninterrupted(
    tiny_recipe: Path, way: str, resumed: Callable[..., int]
) -> None:
    words = [*([] if "lora=null" in WAYS[way] else ["lora.lora_dropout=0.2"]), *WAYS[way]]
    assert resumed(*words, step=5, name="stopped") == 0
    assert resumed(*words, step=7, crash=True, name="killed") == 0
    whole, metrics = written(tiny_recipe, "whole")
    for name in ("stopped", "killed"):
        weights, metrics_again = written(tiny_recipe, name)
        assert whole and whole == weights, name
        assert metrics == metrics_again, name


def test_an_evaluation_after_the_save_of_its_step_is_made_again_by_a_run_that_was_killed_after_it(
    tiny_recipe: Path, resumed: Callable[..., int]
) -> None:
    """An epoch is evaluated after its last step was saved: the checkpoint knows nothing of the
    random numbers that were drawn there.
    """
    words = [*WAYS["epoch-evaluations"], "lora.lora_dropout=0.2", "train.save_steps=5"]
    assert resumed(*words, step=7, crash=True) == 0
    assert written(tiny_recipe, "whole") == written(tiny_recipe, "broken")


def test_weights_that_would_go_on_in_another_precision_are_refused(
    resumed: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT loads adapters as float32; here nobody gives those of a 4-bit base their
    bfloat16 back.
    """
    from recipes_lib.training import trainer

    monkeypatch.setattr(trainer, "kept_precision", contextlib.nullcontext)
    assert resumed(*WAYS["qlora-bf16"], step=5) == ExitCode.ENVIRONMENT
    said = capsys.readouterr().err
    assert "checkpoint-5 would go on in another precision than it was saved in" in said
    assert "weights bfloat16: 8 tensors when it was saved, 0 now" in said


def test_persistent_workers_cannot_be_switched_on_in_the_middle(
    tiny_recipe: Path, resumed: Callable[..., int]
) -> None:
    assert resumed(*EPOCHS, "lora.lora_dropout=0.2", "train.dataloader_num_workers=1", step=5) == 0
    switched = [
        str(tiny_recipe),
        *EPOCHS,
        "train.lr_scheduler_type=constant",
        "lora.lora_dropout=0.2",
        "train.dataloader_num_workers=1",
    ]
    assert (
        main([*switched, "train.dataloader_persistent_workers=true", "run.name=broken"])
        == ExitCode.USAGE
    )
