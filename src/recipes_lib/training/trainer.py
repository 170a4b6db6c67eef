"""TRL's SFTTrainer with the promises of this project added; the loss, the loop and the data order
stay TRL's.

What is added, and why:
- a checkpoint gets its completeness marker last, after every rank has written its part
  (`checkpoints`);
- a fully trained model is loaded from a checkpoint with its experts, which the Trainer passes over
  (`load_whole`);
- an epoch has the same rows in each step on any number of processes, and none twice (`row_order`);
- a resumed run has the precision, the unlogged sums and the random state of the run it continues
  (`resume_facts`);
- a stop request ends in one agreed checkpoint, also out of an evaluation (`stopping`);
- a gradient that is not finite stops the run and names its examples, instead of being logged as
  0.0;
- the validation loss is the sum of token losses over the number of tokens, so that it does not
  depend on batch size or ranks;
- token statistics are added up where they are and read once per log: TRL gathers and reads four of
  them in every micro-batch; the entropy that nobody asked for is not computed;
- without Triton (a CPU) only supervised positions are scored, in one pass (`cpu.loss`);
- FSDP2 leaves outputs in the precision they were computed in and adds up gradients in float32, so
  that it logs DDP's losses;
- FSDP2 averages the gradient of a head that `lora.modules_to_save` trains (`gather_trained_head`);
- no training_args.bin: nobody should unpickle one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerControl
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from recipes_lib.config.batch import rows_per_epoch
from recipes_lib.core.atomic_files import sync
from recipes_lib.core.errors import EnvironmentFault, NumericsError
from recipes_lib.core.faults import check_space, explain_fault
from recipes_lib.core.ranks import agree_on_largest, meet, on_main_rank
from recipes_lib.core.run_lock import end_if_taken_over
from recipes_lib.models.architectures import lacks_experts, training_settings, with_settings
from recipes_lib.training import checkpoints
from recipes_lib.training.cpu.loss import add_token_loss, can_score_itself
from recipes_lib.training.metrics import has_evaluation
from recipes_lib.training.micro_batches import filler, split_batch
from recipes_lib.training.resume_guard import differences
from recipes_lib.training.row_order import (
    EpochRows,
    LengthGroups,
    RebalancedRows,
    with_training_filler,
)
from recipes_lib.training.row_tracking import ROW, RowTrackingCollator, name_rows
from recipes_lib.training.stopping import EvaluationStopped, StopCallback, StopRequest
from recipes_lib.training.token_counts import TokenCounts


class RecipeTrainer(SFTTrainer):
    """An SFTTrainer that can be stopped, killed and believed.

    Args:
        *args: as for `trl.SFTTrainer`.
        stop: the process's stop request.
        keep_checkpoints: complete checkpoints to keep; None keeps all.
        flattens: whether each micro-batch becomes one row without padding, although
            `args.padding_free` does not say so. It is decided here and not there because it depends
            on the attention of the loaded model.
        row_ids: example ids by row of the training set, to name examples in errors.
        max_tokens: cap on the tokens of one forward pass (`micro_batches`); None for none.
        marker_facts: what each checkpoint's marker records besides step and sizes (fingerprint of
            the run).
        **kwargs: as for `trl.SFTTrainer`.
    """

    data_collator: Any
    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        stop: StopRequest,
        keep_checkpoints: int | None,
        flattens: bool,
        row_ids: list[str],
        max_tokens: int | None,
        marker_facts: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"]
        self.base_settings = training_settings(model)
        super().__init__(*args, **kwargs)
        if lacks_experts(
            model
        ):  # its config has a coefficient all the same, and there is no auxiliary loss to weigh
            self.router_aux_loss_coef, self.aux_loss_enabled = 0.0, False
            model.config.get_text_config().update(
                {"router_aux_loss_coef": 0.0, "output_router_logits": False}
            )
        self.stop = stop
        self.stop_callback = StopCallback(stop)
        self.add_callback(self.stop_callback)
        self.keep_checkpoints = keep_checkpoints
        self.flattens = flattens
        self.row_ids = row_ids
        self.max_tokens = max_tokens
        self.marker_facts = marker_facts
        if flattens:
            self.data_collator = dataclasses.replace(self.data_collator, padding_free=True)
        self.data_collator = RowTrackingCollator(self.data_collator)
        self.recent_rows: deque[torch.Tensor] = deque(
            maxlen=max(self.args.gradient_accumulation_steps, 1)
        )
        self.without_rows = False
        self.evaluation_due = False
        self._unlogged_before: dict[str, Any] | None = None
        self._saved_precisions: dict[str, int] | None = None
        self._resumes = False
        self._validation_sums = torch.zeros(2, dtype=torch.float64)
        self._counts = {mode: TokenCounts(self.args.device) for mode in ("train", "eval")}
        self._set_up_loss()
        self._leave_fsdp_outputs_alone()

    def _leave_fsdp_outputs_alone(self) -> None:
        """accelerate has FSDP2 cast the output of every layer to bf16, and with it the logged loss:
        1716.97 and 1717.25 become 1720.

        Cast to float32 instead, the layers would hand float32 to the head, whose products then use
        no tensor cores.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if self.is_fsdp_enabled and plugin is not None and policy is not None:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32
            )

    # ---- Which rows are in the step ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        rows = inputs.pop(ROW, None)
        self.without_rows = rows is not None and not rows.numel()
        if rows is not None and rows.numel() and self.model.training:
            self.recent_rows.append(rows)
        return super()._prepare_inputs(inputs)

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's, with the rows of `row_order`."""
        args, rows = self.args, self.train_dataset
        shape = {
            "per_device": self._train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "world_size": args.world_size,
        }
        length = rows_per_epoch(len(rows), **shape, drop_last=args.dataloader_drop_last)
        loader = self._get_dataloader(
            dataset=with_training_filler(rows),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: self._get_train_sampler(rows),
            is_training=True,
        )
        batches = getattr(
            loader.batch_sampler, "batch_sampler", loader.batch_sampler
        )  # of all processes
        if isinstance(
            batches, RebalancedRows
        ):  # accelerate's wrapper does not hand the epoch on after a resume
            loader.batch_sampler.set_epoch = batches.set_epoch
        else:
            loader.set_sampler(EpochRows(batches.sampler, length, filler=len(rows)))
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As the Trainer's, with groups of rows that depend on the seed, the epoch and the examples
        of a step alone.
        """
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(sampler, LengthGroupedSampler):
            return LengthGroups(sampler.batch_size * self.args.world_size, sampler.lengths, seed)
        if isinstance(sampler, BatchRebalanceSampler):
            shape = (
                sampler.lengths,
                sampler.effective_batch_size,
                sampler.dp_size,
                sampler.grad_accum,
            )
            return RebalancedRows(*shape, seed=seed, rank=sampler.rank, drop_last=sampler.drop_last)
        return sampler

    # ---- Numbers that are not finite ----

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm is global, so every rank sees the same number and stops at the same step, before
        the weights change.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        loss_scaling_handles_it = self.accelerator.scaler is not None
        if not loss_scaling_handles_it and not math.isfinite(float(norm)):
            raise self._numerics_error(f"gradient norm is {float(norm)}")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, unless the loss is not finite (fp16 reaches this point: its loss scaling may skip
        steps with infinite gradients).
        """
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise self._numerics_error(f"loss is {loss}")
        if self.scored_here:
            mode = "train" if self.model.training else "eval"
            self._count_tokens()
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
            accuracy = self._counts[mode].take_accuracy()
            if accuracy is not None:
                self._metrics[mode]["mean_token_accuracy"] = [accuracy]
        super().log(logs, start_time)

    def _numerics_error(self, what: str) -> NumericsError:
        rows = [int(row) for batch in self.recent_rows for row in batch.tolist()]
        last = max(
            (
                int(path.name.split("-")[1])
                for path in checkpoints.list_checkpoints(Path(self.args.output_dir))
            ),
            default=None,
        )
        error = NumericsError(
            f"{what} at step {self.state.global_step + 1}, learning rate"
            f" {self._get_learning_rate():.3g}, {name_rows(rows, self.row_ids)}",
            "lower train.learning_rate, lengthen train.warmup_steps, or look at the examples with:"
            " recipes data",
            f"last good checkpoint: {'none yet' if last is None else f'checkpoint-{last}'}",
        )
        error.on_every_rank = True  # type: ignore[attr-defined]  # norm and logged loss are global numbers
        return error

    # ---- Gradients of several backward passes ----

    @property
    def syncs_each_batch(self) -> bool:
        """Whether FSDP2 shares out the gradients of every backward pass
        (`recipe.batch.sync_each_batch`).
        """
        return self.is_fsdp_enabled and bool(
            self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        )

    # ---- The loss, and what is counted beside it ----

    def _set_up_loss(self) -> None:
        """Put the head that fits the device on the model, if the loss is TRL's `nll` with nothing
        added.
        """
        self.scored_here = (
            self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and self.accelerator.parallelism_config is None
        )
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if self.is_fsdp_enabled:
            gather_trained_head(base)
        self.scores_itself = (
            self.scored_here and self.args.device.type == "cpu" and can_score_itself(base)
        )
        if self.scores_itself:
            add_token_loss(base)
        elif self.scored_here:
            add_fused_lm_head(base, outputs=("log_probs", "is_top1"))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's token loss: the sum over supervised tokens, divided by their number in the whole
        step.
        """
        if (
            not self.scored_here and self.without_rows
        ):  # other losses are means over the micro-batch, and this one has no token
            return (
                model(**{key: value for key, value in inputs.items() if key != "labels"})
                .logits.float()
                .sum()
                * 0
            )
        if not self.scored_here or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        labels = inputs["labels"]
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        scale = 1 / torch.as_tensor(count, device=labels.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            scale = (
                scale * self.accelerator.num_processes
            )  # the count is over all ranks, and DDP averages gradients
        if self.scores_itself:
            loss, supervised, correct = model(**inputs, loss_scale=float(scale))
        else:
            outputs = model(**inputs, fused_lm_head=True)
            loss, supervised, correct = (
                -outputs.log_probs.sum() * scale,
                outputs.label_mask.sum(),
                outputs.is_top1.sum(),
            )
        if not self.without_rows:
            tokens = (
                inputs["attention_mask"].sum()
                if "attention_mask" in inputs
                else inputs["position_ids"].numel()
            )
            self._counts["train" if self.model.training else "eval"].add(
                tokens, supervised, correct
            )
        return loss

    def _count_tokens(self) -> None:
        """Bring the number of tokens seen by all ranks up to date; to be called by every rank."""
        self._total_train_tokens += self._counts["train"].take_tokens()

    # ---- Validation loss per token ----

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """As TRL's, adding the batch to the sums of token losses and tokens."""
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        result = super().prediction_step(model, inputs, *args, **kwargs)
        self._validation_sums += torch.tensor(
            [float(result[0]) * tokens, tokens], dtype=torch.float64
        )
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the loss replaced by the mean over all tokens of all ranks."""
        self._validation_sums.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        sums = self._validation_sums.to(
            torch.float32 if self.args.device.type == "mps" else torch.float64
        ).to(self.args.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if sums[1] > 0:
            output.metrics[f"{prefix}_loss"] = float(sums[0] / sums[1])
        return output

    # ---- Stopping and resuming ----

    def train_until_stop(self, checkpoint: Path | None) -> float:
        """Train, from the beginning or from a checkpoint, until the planned end or an agreed stop;
        return the seconds it took.
        """
        started = time.monotonic()
        with contextlib.suppress(
            EvaluationStopped
        ):  # in an evaluation that an earlier stop had put off: the old checkpoint still says so
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return time.monotonic() - started

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: torch.nn.Module,
        trial: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        last = self.state.global_step >= self.state.max_steps
        if (
            last and self.control.should_save and self.control.should_evaluate
        ):  # the trained weights must not wait for a long validation
            self.control.should_evaluate = False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            self.control.should_save, self.control.should_evaluate = False, True
        with (
            self._stopping_in_an_evaluation(model, trial)
            if self.control.should_evaluate
            else contextlib.nullcontext()
        ):
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            if last:
                self._note_best_checkpoint()

    @contextlib.contextmanager
    def _stopping_in_an_evaluation(
        self, model: torch.nn.Module, trial: Any = None
    ) -> Iterator[None]:
        """Turn an evaluation that a stop request cuts short into a checkpoint that says it is still
        due.
        """
        random_state = _random_state()
        try:
            yield
        except EvaluationStopped:
            _restore_random_state(random_state)
            self.stop_callback.evaluation_pending = True
            self.control.should_evaluate = False
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_training_stop = True

    def _note_best_checkpoint(self) -> None:
        """Let the checkpoint of the last step, saved before its evaluation, be the best one if that
        is what the evaluation found.
        """
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if (
            self.args.load_best_model_at_end
            and self.state.best_global_step == step
            and on_main_rank(folder.is_dir)
        ):
            self.state.best_model_checkpoint = str(folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, after the evaluation of the last step where none was made: one that a
        stop put off, or `train.eval_delay`.
        """
        step = self.state.global_step
        if (
            not self.stop.agreed
            and self.eval_dataset is not None
            and not has_evaluation(self.state.log_history, step)
        ):
            with self._stopping_in_an_evaluation(self.model_wrapped):
                self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
                self._note_best_checkpoint()
        return super()._finalize_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which trains one step too many when it resumes from the checkpoint of
        the last planned step.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As TRL's; after a resume it first takes over the sums for the next log, and makes up the
        evaluation that the stop put off.

        This is the first point after the Trainer has restored the random state, so dropout goes on
        as if never interrupted.
        """
        if self._unlogged_before is not None:
            self._give_back_unlogged(self._unlogged_before)
            self._unlogged_before = None
        if self.evaluation_due:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)
            self.evaluation_due = False
        if self.max_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self._training_step_in_pieces(model, inputs, num_items_in_batch, self.max_tokens)

    def _training_step_in_pieces(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any,
        max_tokens: int,
    ) -> torch.Tensor:
        """One micro-batch in pieces of at most `max_tokens`; every rank makes as many pieces as the
        rank that needs most.

        Gradients are exchanged as for whole micro-batches: after every piece where
        `sync_each_batch` says so, else after the last piece of the step. (Leaving accelerate's
        `no_sync` turns FSDP2's exchange on, whatever was around it.)
        """
        rows = inputs.pop(ROW, None)
        if rows is not None and rows.numel():
            self.recent_rows.append(rows)
        pieces = (
            [filler(inputs)]
            if rows is not None and not rows.numel()
            else split_batch(inputs, max_tokens)
        )
        pieces += [filler(inputs)] * (agree_on_largest(len(pieces)) - len(pieces))
        losses = []
        for number, piece in enumerate(pieces, 1):
            last = number == len(pieces) and self.accelerator.sync_gradients
            with (
                contextlib.nullcontext()
                if last or self.syncs_each_batch
                else self.accelerator.no_sync(model)
            ):
                losses.append(super().training_step(model, dict(piece), num_items_in_batch))
        return torch.stack(losses).sum()

    def resume_facts(self, marker: dict[str, Any], exactly: bool) -> None:
        """Take over from a checkpoint's marker what the Trainer does not restore: tokens seen, sums
        not yet logged, an evaluation put off.

        Args:
            marker: the checkpoint's.
            exactly: whether to refuse weights or optimizer state of another precision than it was
                saved from; false where the user insisted on another recipe or on a partial resume.
        """
        self._resumes = True
        self._total_train_tokens = marker.get("tokens", 0)
        self.evaluation_due = marker.get("evaluation_pending", False)
        self._unlogged_before = marker.get("unlogged")
        self._saved_precisions = marker.get("precisions") if exactly else None

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """As the Trainer's, but for `train.eval_on_start` (which alone skips the scheduler): a
        resumed run made it when it began.
        """
        if skip_scheduler and self._resumes:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with kept_precision(self.model):
            if self._whole:
                load_whole(self.model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        for module in self.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                # a validation leaves the root's weights gathered, and shards are what is loaded
                module.reshard()
        with kept_precision(self.model):
            if self._whole:
                load_whole(self.model, Path(str(self.state.best_model_checkpoint)))
            else:
                super()._load_best_model()

    @property
    def _whole(self) -> bool:
        """Whether a checkpoint holds the whole model in the files of `save_pretrained`."""
        return not (is_peft_model(self.model) or self.is_fsdp_enabled)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, which converts what it loads to the precision it finds; refused unless
        that is the one it was saved in.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        now = precisions(self.model, self.optimizer)
        if checkpoint and self._saved_precisions is not None and now != self._saved_precisions:
            changed = differences(self._saved_precisions, now)
            table = [
                f"{what}: {before or 0} tensors when it was saved, {here or 0} now"
                for what, (before, here) in changed.items()
            ]
            error = EnvironmentFault(
                f"{Path(checkpoint).name} would go on in another precision than it was saved in,"
                " and end with other weights",
                *table,
                "start a new run with run.name=OTHER, or accept another result with"
                " --allow-partial-resume",
            )
            error.on_every_rank = True  # type: ignore[attr-defined]  # every rank holds the same tensors
            raise error

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Persistent workers get a random state of their own: they draw a seed
        from it when they start, which is at another time in a resumed run, and dropout must not
        notice. (Rows are shuffled by the sampler, from the recipe's seed.)
        """
        loader = super()._get_dataloader(*args, **kwargs)
        if self.args.dataloader_persistent_workers:
            loader.base_dataloader.generator = torch.Generator()
        if self.args.dataloader_num_workers:
            loader.base_dataloader.worker_init_fn = functools.partial(
                _init_worker, loader.base_dataloader.worker_init_fn
            )
        return loader

    def _take_unlogged(self) -> dict[str, Any]:
        """What the next log will average over, and the steps since the last one have added; to be
        called by every rank.
        """
        losses = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        scored = self._counts["train"].scored()
        return {
            "since": self._globalstep_last_logged,
            "loss_by_rank": losses,
            "scored": scored,
            "means": dict(self._metrics["train"]),
        }

    def _give_back_unlogged(self, unlogged: dict[str, Any]) -> None:
        """The reverse of `_take_unlogged`, in the first step after a resume."""
        self._globalstep_last_logged = unlogged["since"]
        self._tr_loss += unlogged["loss_by_rank"][self.args.process_index]
        self._metrics["train"].update(unlogged["means"])
        if self.args.process_index == 0:  # they are sums over all ranks
            self._counts["train"].add(0, *unlogged["scored"])

    # ---- Checkpoints ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, beside the final weights, by `training.card`."""

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; the other ranks wait for rank 0, whose files may take longer than the
        collective that would follow allows.
        """
        super().save_model(*args, **kwargs)
        meet()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with with_settings(
            self.model, self.base_settings
        ):  # the trainer turned the cache off and router logits on for itself
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        root = Path(self.args.output_dir)
        folder = root / f"checkpoint-{self.state.global_step}"
        self._count_tokens()
        unlogged = self._take_unlogged()
        # Only the evaluation after it was put off since; rank 0 looks, because a file server shows
        # a new file to some ranks later.
        if on_main_rank(lambda: folder.is_dir() and checkpoints.what_is_missing(folder) is None):
            on_main_rank(lambda: self._seal(root, folder, unlogged))
            return
        on_main_rank(lambda: self._check_place(root))
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            fault = explain_fault(error)
            if fault is None:
                raise
            raise EnvironmentFault(
                f"while saving {folder.name}: {fault.what}", *fault.hints
            ) from None
        meet()  # rank 0 may have written longer than `train.ddp_timeout`
        on_main_rank(lambda: self._seal(root, folder, unlogged))

    def _check_place(self, root: Path) -> None:
        """Rank 0, before a save: the run is still ours, and the disk has room."""
        end_if_taken_over(root.parent)
        remedy = " and run the same command again: it resumes from the newest complete checkpoint"
        check_space(root, self._size_of_a_save(root), "a save", remedy)

    def _seal(self, root: Path, folder: Path, unlogged: dict[str, Any]) -> None:
        """Mark the checkpoint complete, once the lines logged up to it are on the disk: a run
        resumed from it never writes them again.
        """
        metrics = root.with_name("metrics.jsonl")
        if metrics.is_file():
            sync(metrics)
            sync(metrics.parent)
        checkpoints.mark_complete(
            folder,
            step=self.state.global_step,
            world_size=self.accelerator.num_processes,
            tokens=int(self._total_train_tokens),
            evaluation_pending=self.stop_callback.evaluation_pending
            or self.evaluation_due
            or self._evaluation_follows(),
            unlogged=unlogged,
            precisions=precisions(self.model, self.optimizer),
            **self.marker_facts,
        )
        best = self.state.best_model_checkpoint
        checkpoints.rotate(root, self.keep_checkpoints, Path(best) if best else None)

    def _evaluation_follows(self) -> bool:
        """Whether the evaluation of this step comes after its save: that of an epoch after its last
        step, and that of the whole.
        """
        last_of_epoch = (
            self.args.eval_strategy == "epoch" and float(self.state.epoch or 0).is_integer()
        )
        last = self.eval_dataset is not None and self.state.global_step >= self.state.max_steps
        return (last_of_epoch or last) and not has_evaluation(
            self.state.log_history, self.state.global_step
        )

    def _size_of_a_save(self, root: Path) -> int:
        """The last save's size, else three times the trained weights (weights and two optimizer
        moments, in float32).
        """
        earlier = checkpoints.list_checkpoints(root)
        if earlier:
            return checkpoints.folder_size(earlier[-1])
        return (
            3
            * 4
            * sum(
                parameter.numel()
                for parameter in self.model.parameters()
                if parameter.requires_grad
            )
        )


def gather_trained_head(model: Any) -> None:
    """Let FSDP2 gather a trained head before the loss reads its weight, so that its gradient is
    averaged over the ranks.

    The losses here and in TRL use the weight and never call the head. Where accelerate makes the
    head a shard group of its own (`lora.modules_to_save`), nothing would gather it, and the
    gradient of `full_tensor()` is each rank's own. To be called on the causal language model,
    before or after it is wrapped.
    """

    def gather(*_: Any) -> None:
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule) and any(
            parameter.requires_grad for parameter in head.parameters()
        ):
            head.unshard()

    model.base_model.register_forward_hook(gather)


def load_whole(model: Any, folder: Path) -> None:
    """Load a fully trained model's weights from a checkpoint, all of them.

    The Trainer looks for the names of the model's parameters in the file and passes over those that
    it does not find. Experts are one parameter in memory and a matrix each in the file, so that
    they would stay those of the base without a word.

    Raises:
        EnvironmentFault: weights are missing in the checkpoint.
    """
    saved, report = type(model).from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
    )
    if lost := sorted(report["missing_keys"]):
        error = EnvironmentFault(
            f"{folder} lacks {len(lost)} weights of the model, {lost[0]} among them",
            "remove it to go on from an earlier one",
        )
        error.on_every_rank = True  # type: ignore[attr-defined]  # every rank reads the same files
        raise error
    model.load_state_dict(saved.state_dict())


@contextlib.contextmanager
def kept_precision(model: torch.nn.Module) -> Iterator[None]:
    """Give trained weights their precision back after a loading that changes it: PEFT makes every
    adapter that it loads float32, also those that TRL trains in bfloat16 (of a quantized base).
    """
    before = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])


def precisions(model: torch.nn.Module, optimizer: Any) -> dict[str, int]:
    """Return how many tensors of each precision are trained, and how many the optimizer keeps, by
    their name there.
    """
    found = Counter(
        f"weights {parameter.dtype}" for parameter in model.parameters() if parameter.requires_grad
    )
    for state in optimizer.state.values():
        found.update(
            f"{name} {value.dtype}"
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        )
    return {name.replace("torch.", ""): number for name, number in sorted(found.items())}


def _init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Let a data worker leave SIGTERM to the training. Slurm sends it to every process of a step:
    workers would end before the checkpoint, and the training with them. They end with the training.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)


def _random_state() -> tuple[Any, ...]:
    return (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
    )


def _restore_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])
