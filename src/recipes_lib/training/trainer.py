"""What every training promises, whatever it learns: whole global batches, a probe before the first
step, the same bytes after a stop, finite numbers, a validation over all ranks.

Private names of transformers 5.24 that it overrides: `_get_grad_norm`, `_load_best_model`,
`_prepare_for_training`, `_run_epoch`; and that it calls: `_get_learning_rate`, `_prepare_inputs`.
"""

import contextlib
import math
import pickle
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from recipes_lib.core.errors import EnvironmentFault, NumericsError
from recipes_lib.core.files import sync
from recipes_lib.core.ranks import meet, on_main_rank, say_once
from recipes_lib.models import families, upstream_fixes
from recipes_lib.training import resume_guard
from recipes_lib.training.batches import WholeBatches, make_loader, validation_batches
from recipes_lib.training.metrics import keep_random_state, probe, tokens_so_far
from recipes_lib.training.stopping import NOTHING, StopRequest


class ExactTrainer(Trainer):
    """A mixin in front of the Trainer of an objective: `class MyTrainer(ExactTrainer, ItsTrainer)`.

    An objective says what a row is: `filler`, `row_lengths`, `num_items`; and, where its Trainer
    counts tokens or validates more than a loss, `tokens_trained`, `uncounted`, `validating` and
    `validation_means`. `SupervisedTrainer` is an example.

    Args:
        model: with its adapter, or before its Trainer puts one on it.
        stop: asks for a checkpoint and the end of the training.
        row_ids: example ids by row of the training set; None for packed rows.
        keep: how many checkpoints to keep; None for all.
        guard: what a resumed run must share, for each checkpoint's marker.
    """

    filler: Mapping[str, Any]  # a row without loss
    tokens_trained: int = 0

    def __init__(
        self,
        *,
        model: Any,
        stop: StopRequest,
        row_ids: list[str] | None,
        keep: int | None,
        guard: Mapping[str, object],
        **kwargs: Any,
    ) -> None:
        self.base_settings = families.training_settings(model)
        super().__init__(model=model, **kwargs)
        self.stop = stop
        self.row_ids = row_ids
        self.keep = keep
        self.guard = guard
        if self.is_fsdp_enabled:
            upstream_fixes.reduce_in_float32(self.accelerator)
        self.lengths = self.row_lengths(self.train_dataset)
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.train_sampling_strategy == "sequential":
            seed = None
        is_grouped = args.train_sampling_strategy == "group_by_length"
        self.batches = WholeBatches(
            rows=len(self.lengths),
            per_device=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            seed=seed,
            rank=args.process_index,
            world_size=args.world_size,
            lengths=self.lengths if is_grouped else None,
        )
        self.began = time.monotonic()
        self.seconds_before: float | None = 0.0  # up to the checkpoint that is resumed, if noted
        self.tokens_untimed = 0  # up to a checkpoint that notes no time
        self.precision: dict[str, torch.dtype] = {}  # of what is trained
        self.is_compiled = False
        self.add_callback(RunCallback(self))

    # ---- what an objective says ----

    def row_lengths(self, rows: Dataset) -> list[int]:
        """Return how many tokens each row costs."""
        raise NotImplementedError

    def num_items(self, batch: Any) -> int:
        """Return how many items, tokens or pairs, a batch's loss is the mean of; fillers are 0."""
        raise NotImplementedError

    def uncounted(self) -> contextlib.AbstractContextManager[None]:
        """Return a block whose training steps leave no trace in what this Trainer counts."""
        return contextlib.nullcontext()

    def validating(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which `compute_loss` is the loss of a validation."""
        return contextlib.nullcontext()

    def validation_means(self, batch: Any) -> dict[str, float]:
        """Return means over the items of a batch by name, the same names for each batch."""
        return {"loss": float(self.compute_loss(self.model, batch))}

    # ---- rows ----

    def get_train_dataloader(self) -> DataLoader:
        """Return whole global batches; not through accelerate, which would deal them out anew."""
        return make_loader(self.train_dataset, self.batches, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return as many full batches for every rank, filled up with rows without loss."""
        rows, batches = validation_batches(
            self.eval_dataset,
            filler=self.filler,
            per_device=self.args.per_device_eval_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return make_loader(rows, batches, self.data_collator, self.args)

    # ---- finite numbers ----

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm is global: every rank stops at the same step, before the weights change."""
        norm = super()._get_grad_norm(model, grad_norm)
        # the scaler of fp16 skips a step whose gradients are infinite, and goes on
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self.refuse_numbers(f"gradient norm is {float(norm)}", self.state.global_step + 1)
        return norm

    def refuse_numbers(self, what: str, step: int) -> None:
        """Raise what stops the training at a step, with the rows of the step."""
        examples = "examples not known (packed rows)"
        if self.row_ids:
            rows = self.batches.rows_of_step((step - 1) % self.batches.steps)
            examples = f"examples {', '.join(self.row_ids[row] for row in rows[:12])}"
        saved = resume_guard.list_checkpoints(Path(self.args.output_dir))
        last_good = saved[-1].name if saved else "none yet"
        raise NumericsError(
            f"{what} at step {step}, learning rate {self._get_learning_rate():.3g}, {examples}",
            "lower train.learning_rate, lengthen train.warmup_steps, or look at the examples with:"
            " recipes data",
            f"last good checkpoint: {last_good}",
        )

    # ---- validation ----

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Return means over the items of all ranks, not means of the batches' means."""
        sums: dict[str, float] = {}
        num_items = 0
        self.model.eval()
        if hasattr(self.optimizer, "eval"):  # schedule-free ones answer with averaged weights
            self.optimizer.eval()
        with keep_random_state(self.args.device), torch.no_grad(), self.validating():
            for batch in dataloader:
                in_batch = self.num_items(batch)
                # a batch of fillers too: under FSDP2 all ranks have to take part
                with self.compute_loss_context_manager():
                    means = self.validation_means(self._prepare_inputs(batch))
                num_items += in_batch
                for name, mean in means.items():
                    sums.setdefault(name, 0.0)
                    if in_batch:  # else the mean is 0 / 0
                        sums[name] += mean * in_batch
        totals = torch.tensor([*sums.values(), num_items], dtype=torch.float64)
        if dist.is_initialized():
            totals = totals.to(self.args.device)
            dist.all_reduce(totals)
        metrics = {}
        for index, name in enumerate(sums):
            metrics[f"{metric_key_prefix}_{name}"] = float(totals[index] / totals[-1].clamp(min=1))
        return EvalLoopOutput(None, None, metrics, num_samples=len(self.eval_dataset))

    # ---- begin and resume ----

    def train(self, resume_from_checkpoint: Path | None = None) -> Any:
        """Train from a checkpoint's step, or from the beginning, to the last step or a stop."""
        self.began = time.monotonic()
        if resume_from_checkpoint is None:
            return super().train()
        try:
            return super().train(resume_from_checkpoint=str(resume_from_checkpoint))
        except pickle.UnpicklingError as error:
            # torch runs no code of a pickle, and its own text advises to run it
            name = resume_from_checkpoint.name
            what = f"a file of {name} is not what PyTorch saves, and was not loaded"
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found:
                what += f": it would run {found[1]}"
            hint = f"remove {resume_from_checkpoint}: the same command resumes from the checkpoint"
            raise EnvironmentFault(what, f"{hint} before it") from error

    def seconds_so_far(self) -> float | None:
        """Return the wall time of all steps so far, with probe, validations and checkpoints; None
        after a checkpoint that notes no time.
        """
        if self.seconds_before is None:
            return None
        return round(self.seconds_before + time.monotonic() - self.began, 1)

    def _prepare_for_training(self, *args: Any) -> Any:
        """Add the probe, and give a checkpoint's weights the precision they were trained in."""
        max_steps, _, checkpoint = args
        if checkpoint is not None:
            self._mend_loaded(Path(checkpoint))
            self.tokens_trained = tokens_so_far(self.state)
            self.seconds_before = resume_guard.read_marker(Path(checkpoint)).get("seconds")
            if self.seconds_before is None:
                self.tokens_untimed = self.tokens_trained
            best = self.state.best_global_step
            if best:  # the Trainer forgets one that is gone or moved
                self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{best}"
        prepared = super()._prepare_for_training(*args)
        steps_to_come = max_steps - self.state.global_step
        if steps_to_come > 0:
            say_once(probe(self, prepared[0], self.lengths, steps_to_come))
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer (5.24) trains one step too many when it resumes from the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        wrong = on_main_rank(lambda: resume_guard.what_is_wrong(best, hashes=True))
        if wrong:
            what = f"the weights of the best step cannot be read from {best.name}: {wrong}"
            hint = "remove it and every later checkpoint: the same command trains these steps again"
            raise EnvironmentFault(what, hint)
        upstream_fixes.reshard(self.model_wrapped)
        super()._load_best_model()
        self._mend_loaded(best)

    def _mend_loaded(self, checkpoint: Path) -> None:
        if self.is_fsdp_enabled:
            return
        if not is_peft_model(self.model):
            upstream_fixes.load_whole(self.model, checkpoint)
        upstream_fixes.restore_precision(self.model, self.precision)

    # ---- save ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, beside the final weights."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save with the base's own settings, and without the arguments, which hold tokens."""
        config = self.model.config.get_text_config()
        settings_in_training = families.training_settings(self.model)
        config.update(self.base_settings)
        super().save_model(output_dir, _internal_call)
        config.update(settings_in_training)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
        meet()  # however long rank 0 writes

    def seal(self) -> None:
        """Rank 0: mark the checkpoint complete, once the lines logged up to it are on the disk."""
        root = Path(self.args.output_dir)
        metrics = root.with_name("metrics.jsonl")
        if metrics.is_file():
            sync(metrics)
            sync(metrics.parent)
        checkpoint = root / f"checkpoint-{self.state.global_step}"
        seconds = self.seconds_so_far()
        resume_guard.mark_complete(checkpoint, guard=self.guard, seconds=seconds)
        resume_guard.rotate(root, self.keep, self.state.best_model_checkpoint)


class RunCallback(TrainerCallback):
    """What happens after a step: log, validate, save, in this order. A checkpoint has the
    validation of its step, and ends the log window: a resumed run needs no sums of it.
    """

    def __init__(self, trainer: ExactTrainer) -> None:
        self.trainer = trainer
        self.stop = trainer.stop

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """End an epoch here and not after the save of its last step; save and stop on request."""
        is_last = state.global_step >= state.max_steps
        if is_last or state.global_step % self.trainer.batches.steps == 0:
            is_due = args.eval_strategy == "epoch" and args.eval_delay <= float(state.epoch or 0)
            control.should_evaluate |= is_due or (is_last and args.eval_strategy != "no")
            control.should_save |= args.save_strategy == "epoch"
            control.should_log |= args.logging_strategy == "epoch"
        if args.load_best_model_at_end:
            control.should_save |= control.should_evaluate  # else the best one may not be there
        if not is_last and self.stop.agree() != NOTHING:
            control.should_save = True
            control.should_training_stop = True
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """All of it was done after the epoch's last step."""
        control.should_log = False
        control.should_evaluate = False
        control.should_save = False

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Seal the checkpoint."""
        meet()  # rank 0 may have written longer than `train.ddp_timeout`
        on_main_rank(self.trainer.seal)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Refuse a loss that is not finite: fp16 skips infinite gradients, and shows it here."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            self.trainer.refuse_numbers(f"loss is {loss}", state.global_step)
