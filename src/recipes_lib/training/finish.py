"""The end of a training: weights saved, checked against the trained model, and only then given
their final name; run.json says how.
"""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.atomic_files import publish, sync, sync_tree
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.core.terminal import next_step, say
from recipes_lib.training.figures import draw_figures
from recipes_lib.training.stopping import EXIT_CODES
from recipes_lib.training.summary import beside_the_plan
from recipes_lib.weights import check as weights_check
from recipes_lib.weights.base import model_path, recorded_hashes
from recipes_lib.weights.card import write_card
from recipes_lib.weights.check import record_check
from recipes_lib.weights.export import push_finished_run

if TYPE_CHECKING:
    from transformers import TrainerState

    from recipes_lib.config.recipe import Recipe
    from recipes_lib.core.run_directory import RunDirectory
    from recipes_lib.data.preparation import PreparedData
    from recipes_lib.training.trainer import RecipeTrainer

NUM_PROBES, PROBE_TOKENS = 4, 128


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
    next_step("run the same command again to resume")
    return code


def record_finish(
    run: RunDirectory,
    weights: Path,
    summary: dict[str, Any],
    check: dict[str, Any],
    push_to: str | None,
) -> None:
    """Rank 0: the weights have their name; draw the curves, put all on the disk, and only then call
    the run finished.
    """
    draw_figures(run.metrics, run.figures, run.name)
    sync_tree(run.figures)
    if run.metrics.is_file():
        sync(run.metrics)
    run.stop_file.unlink(missing_ok=True)
    run.write_state("finished", exit_code=0, error=None, summary=summary, weights_check=check)
    reload = check["reload"]
    say(
        f"finished: {weights} (reloaded: logits differ by at most {reload['largest']:.2g} of"
        f" {reload['scale']:.2g})"
    )
    say(beside_the_plan(summary))
    if push_to:
        say(f"pushed: {push_finished_run(run, push_to)}")
    next_step(f"recipes chat {run.name}")


def save_and_check(
    trainer: RecipeTrainer,
    recipe: Recipe,
    data: PreparedData,
    run: RunDirectory,
    summary: dict[str, Any],
) -> dict[str, Any]:
    """Save the final weights, prove them, and rename them to `adapter/` or `model/`. Call it on
    every rank.

    Args:
        trainer: the trainer after its planned end; its model is released on the way, so that the
            reload has the memory.
        summary: what the model card says about the run.

    Returns:
        What the check found, for run.json.

    Raises:
        RecipesError: the reloaded weights are not the trained ones; they stay in
            `weights.rejected/`.
    """
    full = recipe.lora is None
    scratch = run.path / "weights.unchecked"
    on_main_rank(lambda: shutil.rmtree(scratch, ignore_errors=True))
    trainer.save_model(str(scratch))  # a collective under FSDP: every rank takes part
    probes = [
        list(ids[:PROBE_TOKENS])
        for ids in (data.validation or data.train)[:NUM_PROBES]["input_ids"]
    ]
    with weights_check.autocast(trainer.args.bf16, trainer.args.fp16, trainer.args.device.type):
        trained = weights_check.logits_on(trainer.model, probes)
    half = (
        recipe.quantization is not None
        or trainer.args.bf16
        or trainer.args.fp16
        or recipe.model.dtype in {"bfloat16", "float16"}
    )
    tokenizer, bf16, fp16 = trainer.processing_class, trainer.args.bf16, trainer.args.fp16
    _release(trainer)

    def check() -> dict[str, Any]:
        files = weights_check.check_files(scratch, full, model_path(recipe.model))
        reloaded = weights_check.reload(scratch, recipe, full, tokenizer)
        with weights_check.autocast(bf16, fp16, reloaded.device.type):
            again = weights_check.logits_on(reloaded, probes)
        tolerance = weights_check.HALF_TOLERANCE if half else weights_check.EXACT_TOLERANCE
        comparison = weights_check.compare_logits(
            trained, again, tolerance, weights_check.rerouted_share(reloaded)
        )
        if comparison.scale == 0 or not comparison.agrees:
            raise _reject(scratch, run, comparison)
        record_check(
            scratch, recipe, probes, trained, "bfloat16" if bf16 else "float16" if fp16 else None
        )
        write_card(scratch, recipe, summary)
        hashes = recorded_hashes(scratch)
        publish(scratch, run.weights(full))
        return {**files, "reload": comparison.as_dict(), "probes": len(probes), "sha256": hashes}

    return on_main_rank(check)


def _reject(
    scratch: Path, run: RunDirectory, comparison: weights_check.LogitsComparison
) -> RecipesError:
    """Keep weights that failed the check under a name that nothing loads."""
    rejected = run.path / "weights.rejected"
    shutil.rmtree(rejected, ignore_errors=True)
    os.replace(scratch, rejected)
    allowed = comparison.tolerance * comparison.scale
    what = (
        f"the saved weights are not the trained ones: logits differ by {comparison.largest:.3g}"
        f" where {allowed:.3g} is allowed"
    )
    if comparison.scale == 0:
        what = (
            "the trained model answers nothing: all logits are zero; the learning rate was probably"
            " far too high"
        )
    return RecipesError(what, f"the weights are kept in {rejected}, the checkpoints as they are")


def _release(trainer: RecipeTrainer) -> None:
    import torch

    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = (
        trainer.callback_handler.lr_scheduler
    ) = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
