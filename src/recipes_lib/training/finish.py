"""The end of a training: weights saved, proven to be the trained ones, and only then given their
final name; run.json says how.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recipes_lib.config.launch import Active
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import publish, sync
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.prepare import PreparedData
from recipes_lib.training.attempt import Resumption
from recipes_lib.training.build import count_quantized, trains_nothing
from recipes_lib.training.probe import peak_memory_gib
from recipes_lib.training.stopping import EXIT_CODES
from recipes_lib.training.trainer import RecipeTrainer
from recipes_lib.weights.check import SavedWeights, check_saved
from recipes_lib.weights.export import push_finished_run, write_card
from recipes_lib.weights.load import base_fingerprint, model_path

if TYPE_CHECKING:
    from transformers import TrainerState


def record_stop(run: RunDirectory, state: TrainerState, agreed: int) -> ExitCode:
    """Rank 0: the checkpoint of a stopped training is written; record it, say how to go on, and
    return the exit code.

    Args:
        agreed: the request that all ranks agreed on (`stopping`).
    """
    code = EXIT_CODES[agreed]
    run.stop_file.unlink(missing_ok=True)
    step, last = state.global_step, state.max_steps
    run.write_state("preempted", exit_code=int(code), step=step, error=None)
    where = "in the validation after the last step," if step >= last else "at"
    say(
        f"stopped {where} step {step}/{last}: checkpoint-{step} is complete (exit code {int(code)})"
    )
    return code


def summarise_training(
    trainer: RecipeTrainer,
    data: PreparedData,
    active: Active,
    resumption: Resumption | None,
    seconds: float,
) -> dict[str, object]:
    """Return what run.json and the model card say of a training: rows, steps, losses, time and
    memory of the attempt that reached the end; None where not measured. After a resume, times leave
    out the earlier attempts.
    """
    state, tokens = trainer.state, int(trainer._total_train_tokens)
    training, validation = (
        [row[key] for row in state.log_history if key in row] or [None]
        for key in ("loss", "eval_loss")
    )
    in_this_attempt = tokens - (trainer.tokens_before if resumption else 0)
    on_cpu = active.device.startswith("cpu")
    summary: dict[str, object] = {
        "steps": state.global_step,
        "training_rows": len(data.train),
        "validation_rows": len(data.validation) if data.validation is not None else 0,
        "first_training_loss": training[0],
        "last_training_loss": training[-1],
        "first_validation_loss": validation[0],
        "last_validation_loss": validation[-1],
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(in_this_attempt / seconds, 1) if seconds else None,
        "quantized_layers": count_quantized(trainer.model),
        "peak_memory_gib": round(max(trainer.loading_peak_gib, peak_memory_gib()), 2),
        "world_size": active.world_size,
        "distribution": active.distributed_type,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "reproducible": (
            "exact on the same versions" if on_cpu else "same hardware, within rounding"
        ),
    }
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        summary["best_step"] = int(state.best_model_checkpoint.rpartition("-")[2])
    return summary


def save_and_check(
    trainer: RecipeTrainer, recipe: Recipe, run: RunDirectory, summary: Mapping[str, Any]
) -> SavedWeights:
    """Save the final weights, prove them, and rename them to `adapter/` or `model/`; every rank has
    to call.

    Raises:
        RecipesError: the files do not hold what was trained; they stay in `weights.rejected/`.
    """
    args, scratch = trainer.args, run.path / "weights.unchecked"
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    on_main_rank(lambda: shutil.rmtree(scratch, ignore_errors=True))
    trainer.save_model(str(scratch))  # a collective under FSDP2: every rank takes part
    try:
        check = check_saved(
            trainer.model,
            scratch,
            base=model_path(recipe.model),
            base_fingerprint=on_main_rank(lambda: base_fingerprint(recipe)),
            autocast=half,
            may_change_nothing=trains_nothing(trainer, trainer.state.max_steps),
        )
    except RecipesError as error:
        rejected = run.path / "weights.rejected"
        on_main_rank(lambda: shutil.rmtree(rejected, ignore_errors=True))
        on_main_rank(lambda: os.replace(scratch, rejected))
        error.hints = (*error.hints, f"the weights are kept in {rejected}")
        raise

    def give_name() -> None:
        write_card(scratch, recipe, summary)
        publish(scratch, run.weights(recipe.lora is None))

    on_main_rank(give_name)
    return check


def record_finish(
    run: RunDirectory,
    weights: Path,
    summary: Mapping[str, Any],
    check: SavedWeights,
    push_to: str | None,
) -> None:
    """Rank 0: the weights have their name; put all on the disk, and only then call the run
    finished.
    """
    if run.metrics.is_file():
        sync(run.metrics)
    run.stop_file.unlink(missing_ok=True)
    run.write_state(
        "finished", exit_code=0, error=None, summary=summary, weights_check=check.model_dump()
    )
    say(f"finished: {weights} ({check.tensors} trained tensors equal the files, byte for byte)")
    say(f"took {summary['seconds']:,.0f} s, peak memory {summary['peak_memory_gib']:.1f} GiB")
    if push_to:
        say(f"pushed: {push_finished_run(run, push_to)}")
    next_step(f"recipes chat {run.name}")
