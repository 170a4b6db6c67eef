"""SFTTrainer with what this project adds; loop and loss stay TRL's."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from recipes_lib.core.errors import NumericsError
from recipes_lib.core.files import sync
from recipes_lib.core.ranks import meet, of_every_rank, on_main_rank, say_once
from recipes_lib.models import upstream_fixes
from recipes_lib.models.families import (
    adds_router_loss,
    has_plain_head,
    training_settings,
    with_settings,
)
from recipes_lib.training import checkpoints
from recipes_lib.training.batches import WholeBatches, make_loader, row_lengths, validation_batches
from recipes_lib.training.loss import score_supervised_positions
from recipes_lib.training.metrics import tokens_so_far
from recipes_lib.training.probe import peak_memory_gib, probe
from recipes_lib.training.stopping import NOTHING, EvaluationStopped, StopRequest


class RecipeTrainer(SFTTrainer):
    """SFTTrainer with whole global batches, a probe, exact resume and finite losses.

    Args:
        row_ids: example ids by row of the training set; None for packed rows.
        marker_facts: what each checkpoint's marker records besides step and sizes.
    """

    data_collator: Any
    control: TrainerControl
    aux_loss_enabled: bool

    def __init__(
        self,
        *args: Any,
        stop: StopRequest,
        row_ids: list[str] | None,
        keep: int | None,
        marker_facts: Mapping[str, object],
        **kwargs: Any,
    ) -> None:
        self.base_settings = training_settings(kwargs["model"])
        super().__init__(*args, **kwargs)
        self.stop, self.row_ids, self.keep, self.marker_facts = stop, row_ids, keep, marker_facts
        self._choose_loss()
        if self.is_fsdp_enabled:
            upstream_fixes.reduce_in_float32(self.accelerator)
        settings, self.lengths = self.args, row_lengths(self.train_dataset)
        seed = settings.seed if settings.data_seed is None else settings.data_seed
        strategy = settings.train_sampling_strategy
        self.batches = WholeBatches(
            len(self.lengths),
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
            None if strategy == "sequential" else seed,
            settings.process_index,
            settings.world_size,
            self.lengths if strategy == "group_by_length" else None,
        )
        self.tokens_before = 0  # of earlier attempts
        self.loading_peak_gib = 0.0
        self.add_callback(RunCallback(self))

    def _choose_loss(self) -> None:
        """Take the router loss only where it belongs to the training, and on a CPU our own head."""
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        asked = self.args.router_aux_loss_coef
        if self.aux_loss_enabled and not adds_router_loss(self.model, asked, self.base_settings):
            self.router_aux_loss_coef, self.aux_loss_enabled = 0.0, False
            off = {"router_aux_loss_coef": 0.0, "output_router_logits": False}
            base.config.get_text_config().update(off)
        upstream_fixes.prepare_head(base, sharded=self.is_fsdp_enabled)
        is_plain = self.args.loss_type == "nll" and not self.aux_loss_enabled
        is_plain = is_plain and has_plain_head(base) and base.get_output_embeddings().bias is None
        if is_plain and self.args.device.type == "cpu":
            score_supervised_positions(base)

    def get_train_dataloader(self) -> DataLoader:
        """Return whole global batches; not through accelerate, which would deal them out anew."""
        return make_loader(self.train_dataset, self.batches, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return as many full batches for every rank, filled up with rows without loss."""
        args, size = self.args, self.args.per_device_eval_batch_size
        place = (args.process_index, args.world_size)
        rows, batches = validation_batches(self.eval_dataset, size, *place)
        return make_loader(rows, batches, self.data_collator, args)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm is global: every rank stops at the same step, before the weights change."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self.refuse_numbers(f"gradient norm is {float(norm)}", self.state.global_step + 1)
        return norm

    def refuse_numbers(self, what: str, step: int) -> None:
        """Raise what stops the training at a step, with the rows of the step."""
        saved = checkpoints.list_checkpoints(Path(self.args.output_dir))
        per_epoch = len(self.batches) // self.args.gradient_accumulation_steps
        rows = self.batches.rows_of_step((step - 1) % per_epoch)
        ids = self.row_ids and [self.row_ids[row] for row in rows[:12]]
        examples = f"examples {', '.join(ids)}" if ids else "examples not known (packed rows)"
        error = NumericsError(
            f"{what} at step {step}, learning rate {self._get_learning_rate():.3g}, {examples}",
            "lower train.learning_rate, lengthen train.warmup_steps, or look at the examples with:"
            " recipes data",
            f"last good checkpoint: {saved[-1].name if saved else 'none yet'}",
        )
        raise of_every_rank(error)

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Return the loss over the supervised tokens of all ranks, not a mean of batches' means."""
        sums, adds_router_loss = torch.zeros(2, dtype=torch.float64), self.aux_loss_enabled
        self.callback_handler.eval_dataloader = dataloader
        self.model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        self.aux_loss_enabled = False  # a validation loss is that of its tokens
        try:
            with torch.random.fork_rng(), torch.no_grad():
                for batch in dataloader:
                    tokens = int((batch["labels"][:, 1:] != -100).sum())
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(self.model, self._prepare_inputs(batch))
                    sums += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
                    self.control = self.callback_handler.on_prediction_step(
                        self.args, self.state, self.control
                    )
        finally:
            self.aux_loss_enabled = adds_router_loss
        if dist.is_initialized():
            sums = sums.to(self.args.device)
            dist.all_reduce(sums)
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1].clamp(min=1))}
        return EvalLoopOutput(None, None, metrics, num_samples=len(self.eval_dataset))

    def train_until_stop(self, checkpoint: Path | None) -> float:
        """Train until the planned end or an agreed stop; return the seconds it took."""
        began = time.monotonic()
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.precision = {name: parameter.dtype for name, parameter in trained}
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except EvaluationStopped:
            # the resumed run makes the evaluation again, from the checkpoint of its step
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if on_main_rank(lambda: checkpoints.what_is_wrong(folder)) is not None:
                self._save_checkpoint(self.model_wrapped, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
        return time.monotonic() - began

    def _prepare_for_training(self, *args: Any) -> Any:
        """Add the probe, and give a checkpoint's weights the precision they were trained in."""
        max_steps, _, checkpoint = args
        if checkpoint is not None:
            self._mend_loaded(checkpoint)
            self._total_train_tokens = self.tokens_before = tokens_so_far(self.state)
        prepared = super()._prepare_for_training(*args)
        self.loading_peak_gib = peak_memory_gib()
        if max_steps > self.state.global_step:
            say_once(probe(self, prepared[0], self.lengths, max_steps - self.state.global_step))
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer (5.24) trains one step too many when it resumes from the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        upstream_fixes.reshard(self.model_wrapped)
        super()._load_best_model()
        self._mend_loaded(str(self.state.best_model_checkpoint))

    def _mend_loaded(self, folder: str) -> None:
        if self.is_fsdp_enabled:
            return
        if not is_peft_model(self.model):
            upstream_fixes.load_whole(self.model, Path(folder))
        upstream_fixes.restore_precision(self.model, self.precision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, beside the final weights."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save with the base's own settings, and without the arguments, which hold tokens."""
        with with_settings(self.model, self.base_settings):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)
        meet()  # however long rank 0 writes

    def seal(self) -> None:
        """Rank 0: mark the checkpoint complete, once the lines logged up to it are on the disk."""
        root, step = Path(self.args.output_dir), self.state.global_step
        metrics = root.with_name("metrics.jsonl")
        if metrics.is_file():
            sync(metrics)
            sync(metrics.parent)
        facts = {"step": step, "world_size": self.args.world_size, **self.marker_facts}
        checkpoints.mark_complete(root / f"checkpoint-{step}", **facts)
        checkpoints.rotate(root, self.keep, self.state.best_model_checkpoint)

    def make_up_evaluation(self) -> None:
        """Evaluate a checkpoint's step where a stop put that off or a kill came before it."""
        args, state, step = self.args, self.state, self.state.global_step
        epoch, is_last = float(state.epoch or 0), step >= state.max_steps
        if args.eval_strategy == "steps":
            is_due = step % state.eval_steps == 0 and step >= args.eval_delay
        else:
            is_due = epoch.is_integer() and epoch >= args.eval_delay
        is_done = any(row["step"] == step and "eval_loss" in row for row in state.log_history)
        if args.eval_strategy == "no" or is_done or not (is_due or is_last):
            return
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        if state.best_global_step != step:
            return
        if args.save_strategy == "steps":
            is_saved = step % state.save_steps == 0 or is_last
        else:
            is_saved = args.save_strategy == "best" or epoch.is_integer()
        if is_saved:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{step}")
        else:  # an uninterrupted run has no checkpoint of this step
            state.best_global_step = None


class RunCallback(TrainerCallback):
    """What happens between steps. A save ends the log window: a resumed run needs no sums of it."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer, self.stop = trainer, trainer.stop

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Make up the evaluation of the checkpoint's step."""
        if state.global_step:
            self.trainer.make_up_evaluation()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Agree with the other ranks; on a request save, stop and put off an evaluation."""
        if state.global_step >= state.max_steps:
            # after the save where there is one: the trained weights must not wait for it
            control.should_evaluate = args.eval_strategy != "no" and not control.should_save
        elif self.stop.agree() != NOTHING:
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        self._end_log_window(args, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """The Trainer comes here after a stop inside an epoch too, and after the last step."""
        if self.stop.agreed != NOTHING:
            control.should_evaluate = control.should_save = control.should_log = False
        elif state.global_step >= state.max_steps:
            control.should_evaluate = False
        self._end_log_window(args, control)

    def _end_log_window(self, args: Any, control: Any) -> None:
        may_save = control.should_save or (control.should_evaluate and args.save_strategy == "best")
        control.should_log |= may_save

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Seal the checkpoint; a request that arrived meanwhile needs no second one."""
        meet()  # rank 0 may have written longer than `train.ddp_timeout`
        on_main_rank(self.trainer.seal)
        if state.global_step >= state.max_steps:
            self.trainer.make_up_evaluation()
        elif self.stop.agree() != NOTHING:
            control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A request during an evaluation cuts it short, that of the last step too."""
        if self.stop.agree() != NOTHING:
            raise EvaluationStopped

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Refuse a loss that is not finite: fp16 skips infinite gradients, and shows it here."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            self.trainer.refuse_numbers(f"loss is {loss}", state.global_step)
