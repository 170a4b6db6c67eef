"""The end of a training: weights saved, checked against the trained model, and only then given
their final name; run.json says how.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from recipes_lib.config.launch import Active
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.atomic_files import publish, sync, sync_tree
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.prepare import PreparedData
from recipes_lib.planning.gate import Planned
from recipes_lib.training.attempt import Resumption
from recipes_lib.training.build import count_quantized
from recipes_lib.training.metrics import draw_figures, first_and_last, peak_memory_gib
from recipes_lib.training.stopping import EXIT_CODES
from recipes_lib.training.trainer import RecipeTrainer
from recipes_lib.weights import check as weights_check
from recipes_lib.weights.base import model_path
from recipes_lib.weights.card import write_card
from recipes_lib.weights.check import StoredComparison, TensorCounts
from recipes_lib.weights.export import push_finished_run
from recipes_lib.weights.saved import recorded_hashes

if TYPE_CHECKING:
    from transformers import TrainerState


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


class _BestStep(TypedDict, total=False):
    """Only of a training that ended with the best checkpoint and not the last one."""

    best_step: int


class TrainingSummary(_BestStep):
    """What run.json and the model card say of a finished training; None where not measured."""

    steps: int
    training_rows: int
    validation_rows: int
    first_training_loss: float | None
    last_training_loss: float | None
    first_validation_loss: float | None
    last_validation_loss: float | None
    tokens: int
    seconds: float
    tokens_per_second: float | None
    quantized_layers: int
    peak_memory_gib: float
    planned_seconds: float | None
    planned_peak_memory_gib: float | None
    world_size: int
    distribution: str
    reproducible: str


class WeightsCheck(TensorCounts):
    """What the check of the saved weights found: how far the reloaded model's logits are from those
    of the trained one on so many `probes`, and the hashes of the files.
    """

    reload: StoredComparison
    probes: int
    sha256: dict[str, str]


def summarise_training(
    trainer: RecipeTrainer,
    data: PreparedData,
    metrics: Path,
    active: Active,
    resumption: Resumption | None,
    planned: Planned,
    seconds: float,
) -> TrainingSummary:
    """Return rows, steps, losses, time and memory of the attempt that reached the end; None where
    not measured.

    After a resume, times leave out the earlier attempts, and the planned time of the whole training
    is not put beside them.
    """
    training, validation = first_and_last(metrics, "loss"), first_and_last(metrics, "eval_loss")
    state, tokens = trainer.state, int(trainer._total_train_tokens)
    begun = resumption.marker.get("tokens", 0) if resumption else 0
    on_cpu = active.device.startswith("cpu")
    chosen = trainer.args.load_best_model_at_end
    best: _BestStep = {"best_step": state.best_global_step} if chosen else {}
    return {
        "steps": state.global_step,
        **best,
        "training_rows": len(data.train),
        "validation_rows": len(data.validation) if data.validation is not None else 0,
        "first_training_loss": training[0],
        "last_training_loss": training[1],
        "first_validation_loss": validation[0],
        "last_validation_loss": validation[1],
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round((tokens - begun) / seconds, 1) if seconds else None,
        "quantized_layers": count_quantized(trainer.model),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "planned_seconds": planned.get("seconds") if resumption is None else None,
        "planned_peak_memory_gib": planned.get("peak_memory_gib"),
        "world_size": active.world_size,
        "distribution": active.distributed_type,
        "reproducible": (
            "exact on the same versions" if on_cpu else "same hardware, within rounding"
        ),
    }


def beside_the_plan(summary: TrainingSummary) -> str:
    """Return time and peak memory as measured, and as planned where there was a plan.

    Example:
        >>> summary = {"seconds": 51.3, "peak_memory_gib": 1.88, "planned_seconds": 47.9}
        >>> beside_the_plan({**summary, "planned_peak_memory_gib": 2.07})
        'took 51 s (planned 48), peak memory 1.9 GiB (planned 2.1)'
    """
    seconds, peak = summary["planned_seconds"], summary["planned_peak_memory_gib"]
    time_planned = "" if seconds is None else f" (planned {seconds:,.0f})"
    peak_planned = "" if peak is None else f" (planned {peak:.1f})"
    return (
        f"took {summary['seconds']:,.0f} s{time_planned}, peak memory"
        f" {summary['peak_memory_gib']:.1f} GiB{peak_planned}"
    )


def save_and_check(
    trainer: RecipeTrainer,
    recipe: Recipe,
    data: PreparedData,
    run: RunDirectory,
    summary: TrainingSummary,
) -> WeightsCheck:
    """Save the final weights, prove them, and rename them to `adapter/` or `model/`; every rank has
    to call. The trainer's model is released, so that the reload has the memory.

    Raises:
        RecipesError: the reloaded weights are not the trained ones; they stay in
            `weights.rejected/`.
    """
    full, args = recipe.lora is None, trainer.args
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    scratch = run.path / "weights.unchecked"
    on_main_rank(lambda: shutil.rmtree(scratch, ignore_errors=True))
    trainer.save_model(str(scratch))  # a collective under FSDP: every rank takes part
    rows = (data.validation or data.train)[:NUM_PROBES]["input_ids"]
    probes = [list(ids[:PROBE_TOKENS]) for ids in rows]
    with weights_check.autocast(half, args.device.type):
        trained = weights_check.logits_on(trainer.model, probes)
    rounds = recipe.base_format or half or recipe.model.dtype in {"bfloat16", "float16"}
    tolerance = weights_check.HALF_TOLERANCE if rounds else weights_check.EXACT_TOLERANCE
    tokenizer, sharded = trainer.processing_class, trainer.is_fsdp_enabled
    _release(trainer)

    def check() -> WeightsCheck:
        files = weights_check.check_files(scratch, full, model_path(recipe.model))
        reloaded = weights_check.reload(scratch, recipe, full, tokenizer)
        if sharded and half:
            weights_check.round_weights(reloaded, half)
        with weights_check.autocast(half, reloaded.device.type):
            again = weights_check.logits_on(reloaded, probes)
        rerouted = weights_check.rerouted_share(reloaded)
        comparison = weights_check.compare_logits(trained, again, tolerance, rerouted)
        if comparison.scale == 0 or not comparison.agrees:
            raise _reject(scratch, run, comparison)
        weights_check.record_check(scratch, recipe, probes, trained, half)
        write_card(scratch, recipe, summary)
        hashes = recorded_hashes(scratch)
        publish(scratch, run.weights(full))
        return {**files, "reload": comparison.as_dict(), "probes": len(probes), "sha256": hashes}

    return on_main_rank(check)


def _reject(
    scratch: Path, run: RunDirectory, comparison: weights_check.LogitsComparison
) -> RecipesError:
    rejected = run.path / "weights.rejected"
    shutil.rmtree(rejected, ignore_errors=True)
    os.replace(scratch, rejected)
    what = (
        f"the saved weights are not the trained ones: logits differ by {comparison.largest:.3g}"
        f" where {comparison.allowed:.3g} is allowed"
        if comparison.scale
        else "the trained model answers nothing: all logits are zero; the learning rate was"
        " probably far too high"
    )
    return RecipesError(what, f"the weights are kept in {rejected}, the checkpoints as they are")


def _release(trainer: RecipeTrainer) -> None:
    trainer.accelerator.free_memory()
    for owner in (trainer, trainer.callback_handler):
        owner.model = owner.optimizer = owner.lr_scheduler = None
    trainer.model_wrapped = None
    weights_check.free_memory()


def record_finish(
    run: RunDirectory,
    weights: Path,
    summary: TrainingSummary,
    check: WeightsCheck,
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
