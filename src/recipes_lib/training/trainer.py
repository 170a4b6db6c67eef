"""SFTTrainer with safe stop, exact resume and finite-loss checks; the loop and the data order stay
TRL's.

Every loss, the validation's too, is a sum of token losses over the number of tokens, so that it
does not depend on batch size or ranks. Token statistics are added up on the device and read once
per log; TRL reads four in every micro-batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerControl
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from recipes_lib.config.batch import rows_per_epoch
from recipes_lib.core.atomic_files import sync
from recipes_lib.core.errors import EnvironmentFault, NumericsError
from recipes_lib.core.faults import check_space, explain_fault
from recipes_lib.core.ranks import agree_on_largest, meet, of_every_rank, on_main_rank
from recipes_lib.models.architectures import adds_router_loss, training_settings, with_settings
from recipes_lib.training import checkpoints
from recipes_lib.training.batches import (
    ROW,
    SUPERVISED,
    Batch,
    EpochRows,
    LengthGroups,
    RebalancedRows,
    RowTrackingCollator,
    filler,
    name_rows,
    passes_of,
    to_device,
    with_training_filler,
)
from recipes_lib.training.loss import add_token_loss, can_score_itself
from recipes_lib.training.metrics import has_evaluation
from recipes_lib.training.resume_guard import differences
from recipes_lib.training.stopping import EvaluationStopped, StopCallback, StopRequest


class RecipeTrainer(SFTTrainer):
    """SFTTrainer with safe stop, exact resume and finite-loss checks.

    Args:
        keep_checkpoints: complete checkpoints to keep; None keeps all.
        flattens: whether each micro-batch becomes one row without padding. `args.padding_free`
            cannot say so: it depends on the attention of the loaded model.
        row_ids: example ids by row of the training set, to name examples in errors.
        max_tokens: cap on the tokens of one forward pass (`passes_of`); None for none.
        marker_facts: what each checkpoint's marker records besides step and sizes.
        step_tokens: where the tokens of all ranks are put, step by step.
    """

    data_collator: Any
    control: TrainerControl
    aux_loss_enabled: bool

    def __init__(
        self,
        *args: Any,
        stop: StopRequest,
        keep_checkpoints: int | None,
        flattens: bool,
        row_ids: list[str],
        max_tokens: int | None,
        marker_facts: checkpoints.MarkerFacts,
        step_tokens: list[int],
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"]
        self.base_settings = training_settings(model)
        super().__init__(*args, **kwargs)
        asked = self.args.router_aux_loss_coef
        if self.aux_loss_enabled and not adds_router_loss(self.model, asked, self.base_settings):
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
        self.cap_is_chosen = False
        self.marker_facts = marker_facts
        self.step_tokens = step_tokens
        if flattens:
            self.data_collator = dataclasses.replace(self.data_collator, padding_free=True)
        self.data_collator = RowTrackingCollator(self.data_collator)
        self.recent_rows: list[int] = []
        self.without_rows = False
        self.passes: list[Batch] = []
        self.evaluation_due = False
        self._unlogged_before: Unlogged | None = None
        self._saved_precisions: dict[str, int] | None = None
        self._resumes = False
        self._validation_sums = torch.zeros(2, dtype=torch.float64)
        self._counts = {mode: TokenCounts(self.args.device) for mode in ("train", "eval")}
        self._set_up_loss()
        # accelerate has FSDP2 cast the output of every layer to bf16, and with it the logged loss:
        # 1716.97 and 1717.25 become 1720. Cast to float32 instead, the layers would hand float32 to
        # the head, whose products then use no tensor cores.
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if self.is_fsdp_enabled and plugin is not None and policy is not None:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32
            )

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Leave a model without weights where it is: `check_launch` refuses this launch in a
        moment.
        """
        if not any(one.is_meta for one in model.parameters()):
            super()._move_model_to_device(model, device)

    # ---- Which rows are in the step ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def _prepare_inputs(self, inputs: Batch) -> dict[str, Any]:
        rows = inputs.pop(ROW, None)
        self.without_rows = rows is not None and not rows.numel()
        return super()._prepare_inputs(to_device(inputs, self.args.device))

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's, with the rows of `EpochRows`."""
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
        of_this_rank = loader.batch_sampler
        batches = getattr(of_this_rank, "batch_sampler", of_this_rank)  # of all processes
        if isinstance(batches, RebalancedRows):
            # accelerate's wrapper does not hand the epoch on after a resume
            loader.batch_sampler.set_epoch = batches.set_epoch
        else:
            loader.set_sampler(EpochRows(batches.sampler, length, filler=len(rows)))
        loader.device = None  # `_prepare_inputs` moves batches, after what asks for their values
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """As the Trainer's, with the passes of the step, of which every rank makes equally many. On
        a CPU the number of supervised tokens is read once for all of them.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.recent_rows = [int(row) for batch in batches for row in batch.get(ROW, ())]
        self.passes = batches
        if batches and self.max_tokens is not None:
            self.passes = passes_of(batches, self.max_tokens)
            missing = agree_on_largest(len(self.passes)) - len(self.passes)
            self.passes += [filler(batches[0])] * missing
        on_cpu = isinstance(items, torch.Tensor) and items.device.type == "cpu"
        return batches, int(items) if on_cpu else items

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        its = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(its, LengthGroupedSampler):
            return LengthGroups(its.batch_size * self.args.world_size, its.lengths, seed)
        if isinstance(its, BatchRebalanceSampler):
            shape = (its.lengths, its.effective_batch_size, its.dp_size, its.grad_accum)
            return RebalancedRows(*shape, seed=seed, rank=its.rank, drop_last=its.drop_last)
        return its

    # ---- Numbers that are not finite ----

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm is global: every rank stops at the same step, before the weights change."""
        norm = super()._get_grad_norm(model, grad_norm)
        loss_scaling_handles_it = self.accelerator.scaler is not None
        if not loss_scaling_handles_it and not math.isfinite(float(norm)):
            raise self._numerics_error(f"gradient norm is {float(norm)}")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Refuse a loss that is not finite: under fp16, which skips infinite gradients, it shows
        here.
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
        saved = checkpoints.list_checkpoints(Path(self.args.output_dir))
        # norm and logged loss are global numbers
        return of_every_rank(
            NumericsError(
                f"{what} at step {self.state.global_step + 1}, learning rate"
                f" {self._get_learning_rate():.3g}, {name_rows(self.recent_rows, self.row_ids)}",
                "lower train.learning_rate, lengthen train.warmup_steps, or look at the examples"
                " with: recipes data",
                f"last good checkpoint: {saved[-1].name if saved else 'none yet'}",
            )
        )

    @property
    def syncs_each_batch(self) -> bool:
        """Whether FSDP2 shares out the gradients of every backward pass."""
        return self.is_fsdp_enabled and bool(
            self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        )

    # ---- The loss, and what is counted beside it ----

    def _set_up_loss(self) -> None:
        """Put the head that fits the device on the model, if the loss is TRL's plain `nll`."""
        self.scored_here = (
            self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and self.accelerator.parallelism_config is None
        )
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if self.is_fsdp_enabled:
            gather_trained_head(base)
        self.scores_itself = self.scored_here and can_score_itself(base)
        if self.scores_itself:
            add_token_loss(base)
        elif self.scored_here:
            add_fused_lm_head(base, outputs=("log_probs", "is_top1"))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sum over supervised tokens, divided by their number in the whole step."""
        supervised = inputs.pop(SUPERVISED)
        if not self.scored_here and self.without_rows:
            # other losses are means over the micro-batch, and this one has no token
            del inputs["labels"]
            return model(**inputs).logits.float().sum() * 0
        if not self.scored_here or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        mode = "train" if self.model.training else "eval"
        if self.aux_loss_enabled:
            # of training alone: a validation loss is that of its tokens
            inputs["output_router_logits"] = mode == "train" and not self.without_rows
        count = len(supervised) if num_items_in_batch is None else num_items_in_batch
        # the count of a step is over all ranks, and DDP averages gradients
        over_ranks = self.args.average_tokens_across_devices and num_items_in_batch is not None
        scale = self.accelerator.num_processes if over_ranks else 1
        scale = scale / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
        if self.scores_itself:
            known = isinstance(scale, float)  # else a tensor that nobody has read
            loss, correct = model(
                **inputs, supervised=supervised, loss_scale=scale if known else 1.0
            )
            loss = loss if known else loss * scale
        else:
            outputs = model(**inputs, fused_lm_head=True)
            loss = -outputs.log_probs.sum() * scale
            correct = outputs.is_top1.sum()
            if self.aux_loss_enabled and mode == "train":
                loss = loss + self._router_loss(outputs.aux_loss, num_items_in_batch)
        counts, step = self._counts[mode], self.state.global_step if mode == "train" else 0
        if self.without_rows:
            counts.add(0, 0, 0, step)
        else:
            padded = "attention_mask" in inputs
            tokens = inputs["attention_mask"].sum() if padded else inputs["position_ids"].numel()
            counts.add(tokens, len(supervised), correct, step)
        return loss

    def _router_loss(self, loss: torch.Tensor | None, num_items_in_batch: Any) -> torch.Tensor:
        """Return the routers' loss of one forward pass as its part of the step's mean, and note it;
        every rank has to call.
        """
        absent = torch.full((), math.nan, device=self.args.device)
        of_ranks = self.accelerator.gather((absent if loss is None else loss.detach()).reshape(1))
        self._metrics["train"]["aux_loss"].append(float(of_ranks.nanmean()))
        if loss is None:
            return torch.zeros((), device=self.args.device)
        passes = 1 if num_items_in_batch is None else len(self.passes)
        return self.router_aux_loss_coef * loss / passes

    def _count_tokens(self) -> None:
        """Bring the number of tokens seen by all ranks up to date; every rank has to call."""
        by_step = self._counts["train"].take_tokens()
        self.step_tokens += by_step
        self._total_train_tokens += sum(by_step)

    # ---- Validation loss per token ----

    def prediction_step(
        self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """As TRL's; the batch is added to the sums of token losses and tokens."""
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        result = super().prediction_step(model, inputs, *args, **kwargs)
        self._validation_sums += torch.tensor(
            [float(result[0]) * tokens, tokens], dtype=torch.float64
        )
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the loss is the mean over all tokens of all ranks."""
        self._validation_sums.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        sums = self._validation_sums
        if dist.is_initialized():
            sums = sums.to(self.args.device)
            dist.all_reduce(sums)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if sums[1] > 0:
            output.metrics[f"{prefix}_loss"] = float(sums[0] / sums[1])
        return output

    # ---- Stopping and resuming ----

    def train_until_stop(self, checkpoint: Path | None) -> float:
        """Train until the planned end or an agreed stop; return the seconds it took."""
        started = time.monotonic()
        # in an evaluation that an earlier stop had put off: the old checkpoint still says so
        with contextlib.suppress(EvaluationStopped):
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
        if last and self.control.should_save and self.control.should_evaluate:
            # the trained weights must not wait for a long validation
            self.control.should_evaluate = False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            self.control.should_save, self.control.should_evaluate = False, True
        due = self.control.should_evaluate
        with self._stopping_in_an_evaluation(model) if due else contextlib.nullcontext():
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            if last:
                self._note_best_checkpoint()

    @contextlib.contextmanager
    def _stopping_in_an_evaluation(self, model: torch.nn.Module) -> Iterator[None]:
        """Turn an evaluation that a stop cuts short into a checkpoint that says it is still due."""
        restore = _random_state()
        try:
            yield
        except EvaluationStopped:
            restore()
            self.stop_callback.evaluation_pending = True
            self.control.should_evaluate = False
            self._save_checkpoint(model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_training_stop = True

    def _note_best_checkpoint(self) -> None:
        """Let the last checkpoint, saved before its evaluation, be the best one if it is."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if (
            self.args.load_best_model_at_end
            and self.state.best_global_step == step
            and on_main_rank(folder.is_dir)
        ):
            self.state.best_model_checkpoint = str(folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Make up the evaluation of the last step: a stop put it off, or `train.eval_delay`."""
        made = has_evaluation(self.state.log_history, self.state.global_step)
        if not self.stop.agreed and self.eval_dataset is not None and not made:
            with self._stopping_in_an_evaluation(self.model_wrapped):
                self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
                self._note_best_checkpoint()
        return super()._finalize_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer trains one step too many when it resumes from the last planned step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As TRL's, or all passes of the step, whose gradients are exchanged after the last one
        unless `sync_each_batch` says after each.

        After a resume this is the first point with the random state restored: the sums for the next
        log are taken over, and the evaluation that the stop put off is made up.
        """
        if self._unlogged_before is not None:
            self._give_back(self._unlogged_before)
            self._unlogged_before = None
        if self.evaluation_due:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)
            self.evaluation_due = False
        if self.max_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:  # all passes are made with the last micro-batch
            return torch.zeros((), device=self.args.device)
        losses = []
        for number, one in enumerate(self.passes, 1):
            # leaving accelerate's `no_sync` turns FSDP2's exchange on, whatever was around it
            exchange = number == len(self.passes) or self.syncs_each_batch
            with contextlib.nullcontext() if exchange else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, dict(one), num_items_in_batch))
        return torch.stack(losses).sum()

    def resume_facts(self, marker: checkpoints.Marker, exactly: bool) -> None:
        """Take over from a checkpoint's marker what the Trainer does not restore.

        Args:
            exactly: whether to refuse weights or optimizer state in another precision than saved.
        """
        self._resumes = True
        self._total_train_tokens = marker.get("tokens", 0)
        self.evaluation_due = marker.get("evaluation_pending", False)
        unlogged = marker.get("unlogged")
        self._unlogged_before = Unlogged(**unlogged) if unlogged else None
        self._saved_precisions = marker.get("precisions") if exactly else None

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Leave out `train.eval_on_start` (which alone skips the scheduler) in a resumed run."""
        if skip_scheduler and self._resumes:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self._load_weights(resume_from_checkpoint, load)

    def _load_best_model(self) -> None:
        for module in self.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                # a validation leaves the root's weights gathered, and shards are what is loaded
                module.reshard()
        self._load_weights(str(self.state.best_model_checkpoint), super()._load_best_model)

    def _load_weights(self, folder: str, load: Callable[[], None]) -> None:
        """Load a checkpoint's weights in the precision they are trained in, a whole model with all
        its experts.
        """
        with kept_precision(self.model):
            if is_peft_model(self.model) or self.is_fsdp_enabled:
                load()
            else:
                load_whole(self.model, Path(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer converts what it loads to the precision it finds; refuse that."""
        super()._load_optimizer_and_scheduler(checkpoint)
        now = precisions(self.model, self.optimizer)
        if checkpoint and self._saved_precisions is not None and now != self._saved_precisions:
            table = [
                f"{what}: {before or 0} tensors when it was saved, {here or 0} now"
                for what, (before, here) in differences(self._saved_precisions, now).items()
            ]
            raise of_every_rank(
                EnvironmentFault(
                    f"{Path(checkpoint).name} would go on in another precision than it was saved"
                    " in, and end with other weights",
                    *table,
                    "start a new run with run.name=OTHER, or accept another result with"
                    " --allow-partial-resume",
                )
            )

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Give persistent workers a random state of their own: the seed that they draw, later in a
        resumed run, must not move dropout.
        """
        loader = super()._get_dataloader(*args, **kwargs)
        if self.args.dataloader_persistent_workers:
            loader.base_dataloader.generator = torch.Generator()
        if self.args.dataloader_num_workers:
            loader.base_dataloader.worker_init_fn = functools.partial(
                _init_worker, loader.base_dataloader.worker_init_fn
            )
        return loader

    def _take_unlogged(self) -> Unlogged:
        """Return what the next log will average over; every rank has to call."""
        return Unlogged(
            since=self._globalstep_last_logged,
            loss_by_rank=self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),
            scored=self._counts["train"].scored(),
            means=dict(self._metrics["train"]),
        )

    def _give_back(self, unlogged: Unlogged) -> None:
        self._globalstep_last_logged = unlogged.since
        self._tr_loss += unlogged.loss_by_rank[self.args.process_index]
        self._metrics["train"].update(unlogged.means)
        # They are sums over all ranks, of which each needs the same steps.
        supervised, correct = unlogged.scored if self.args.process_index == 0 else (0, 0)
        self._counts["train"].add(0, supervised, correct, self.state.global_step)

    # ---- Checkpoints ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, beside the final weights."""

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The other ranks wait for rank 0, longer than the collective that follows would."""
        super().save_model(*args, **kwargs)
        meet()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # the trainer turned the cache off and router logits on for itself
        with with_settings(self.model, self.base_settings):
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
        """Rank 0, before a save: the run is still ours, and there is room for a save as large as
        the last one, else for the trained weights and two optimizer moments in float32.
        """
        if earlier := checkpoints.list_checkpoints(root):
            files = (file for file in earlier[-1].rglob("*") if file.is_file())
            needed = sum(file.stat().st_size for file in files)
        else:
            weights = (one.numel() for one in self.model.parameters() if one.requires_grad)
            needed = 3 * 4 * sum(weights)
        remedy = " and run the same command again: it resumes from the newest complete checkpoint"
        check_space(root, needed, "a save", remedy)

    def _seal(self, root: Path, folder: Path, unlogged: Unlogged) -> None:
        """Mark the checkpoint complete, once the lines logged up to it, which no resumed run writes
        again, are on the disk.
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
            unlogged=dataclasses.asdict(unlogged),
            precisions=precisions(self.model, self.optimizer),
            **self.marker_facts,
        )
        best = self.state.best_model_checkpoint
        checkpoints.rotate(root, self.keep_checkpoints, Path(best) if best else None)

    def _evaluation_follows(self) -> bool:
        """Whether this step is evaluated after its save: the last of an epoch, and of all."""
        step, epoch = self.state.global_step, float(self.state.epoch or 0)
        last_of_epoch = self.args.eval_strategy == "epoch" and epoch.is_integer()
        last = self.eval_dataset is not None and step >= self.state.max_steps
        return (last_of_epoch or last) and not has_evaluation(self.state.log_history, step)


@dataclasses.dataclass(frozen=True)
class Unlogged:
    """The sums of the steps since the last log, as a checkpoint's marker keeps them.

    Args:
        since: the step of that log.
        loss_by_rank: sums of losses.
        scored: supervised tokens of all ranks, and those ranked first.
        means: what TRL will average.
    """

    since: int
    loss_by_rank: list[float]
    scored: list[int]
    means: dict[str, list[float]]


class TokenCounts:
    """Tokens seen, supervised and ranked first, counted on the device: reading a count makes the
    processor wait for the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens: dict[int, torch.Tensor] = {}  # by step
        self._scored = torch.zeros(2, dtype=torch.long, device=device)

    def add(
        self,
        tokens: torch.Tensor | int,
        supervised: torch.Tensor | int,
        correct: torch.Tensor | int,
        step: int = 0,
    ) -> None:
        """Count one micro-batch of this rank, also one without rows: every rank needs the same
        steps.
        """
        if step not in self._tokens:
            self._tokens[step] = torch.zeros(1, dtype=torch.long, device=self._device)
        self._tokens[step] += tokens
        self._scored[0] += supervised
        self._scored[1] += correct

    def take_tokens(self) -> list[int]:
        """Return the tokens of all ranks by step since the last call; every rank has to call."""
        tokens = _sum_of_ranks(torch.cat(list(self._tokens.values()))) if self._tokens else []
        self._tokens.clear()
        return tokens

    def scored(self) -> list[int]:
        """Return the supervised tokens of all ranks, and how many were ranked first, since
        `take_accuracy`; every rank has to call.
        """
        return _sum_of_ranks(self._scored)

    def take_accuracy(self) -> float | None:
        """Return the share of supervised tokens that were ranked first since the last call; every
        rank has to call.
        """
        supervised, correct = self.scored()
        self._scored.zero_()
        return correct / supervised if supervised else None


def _sum_of_ranks(counts: torch.Tensor) -> list[int]:
    total = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return [int(value) for value in total.tolist()]


def gather_trained_head(model: Any) -> None:
    """Let FSDP2 gather a trained head (`lora.modules_to_save`) before the loss reads its weight.

    No loss calls the head, so nothing else gathers it, and the gradient of `full_tensor()` would be
    each rank's own. To be called on the causal language model.
    """

    def gather(*_: Any) -> None:
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule) and any(one.requires_grad for one in head.parameters()):
            head.unshard()

    model.base_model.register_forward_hook(gather)


def load_whole(model: Any, folder: Path) -> None:
    """Load all of a fully trained model's weights from a checkpoint; the Trainer passes over
    experts, one parameter in memory and a matrix each in the file.

    Raises:
        EnvironmentFault: weights are missing in the checkpoint.
    """
    saved, report = type(model).from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
    )
    if lost := sorted(report["missing_keys"]):
        raise of_every_rank(
            EnvironmentFault(
                f"{folder} lacks {len(lost)} weights of the model, {lost[0]} among them",
                "remove it to go on from an earlier one",
            )
        )
    model.load_state_dict(saved.state_dict())


@contextlib.contextmanager
def kept_precision(model: torch.nn.Module) -> Iterator[None]:
    """Keep the precision of trained weights over loading: PEFT makes every adapter float32."""
    before = {name: one.dtype for name, one in model.named_parameters() if one.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])


def precisions(model: torch.nn.Module, optimizer: Any) -> dict[str, int]:
    """Return how many tensors of each precision are trained, and kept by the optimizer."""
    found = Counter(f"weights {one.dtype}" for one in model.parameters() if one.requires_grad)
    for state in optimizer.state.values():
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        found.update(f"{name} {value.dtype}" for name, value in tensors.items())
    return {name.replace("torch.", ""): number for name, number in sorted(found.items())}


def _init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Let a data worker leave SIGTERM, which Slurm sends to every process, to the training."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)


def _random_state() -> Callable[[], None]:
    """Return what brings the random state of now back."""
    python, numpy, processor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(processor)
        torch.cuda.set_rng_state_all(gpus)

    return restore
