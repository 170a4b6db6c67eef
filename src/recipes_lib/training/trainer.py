"""SFTTrainer with what this project adds; loop and loss stay TRL's."""

from __future__ import annotations

import math
import pickle
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute
import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from recipes_lib.core.errors import EnvironmentFault, NumericsError
from recipes_lib.core.files import sync
from recipes_lib.core.ranks import meet, on_main_rank, say_once
from recipes_lib.models import families, upstream_fixes
from recipes_lib.training import resume_guard
from recipes_lib.training.loss import score_supervised_positions
from recipes_lib.training.metrics import keep_random_state, probe, tokens_so_far
from recipes_lib.training.stopping import NOTHING, StopRequest

FILLER = {"input_ids": [0, 0], "labels": [-100, -100]}  # a row without loss


@dataclass(eq=False)
class WholeBatches(Sampler[list[int]]):
    """The micro-batches of one process, the same rows a step on any number of processes and in a
    resumed run: step k of an epoch has `order[k * G : (k + 1) * G]`, G being the global batch.

    Args:
        rows: how many there are; each epoch leaves out `rows % G` others of them.
        seed: of the order, together with the epoch; None for the order of the rows.
        lengths: tokens of each row, to put rows of like length into one step.
    """

    rows: int
    per_device: int
    accumulation: int
    seed: int | None
    rank: int = 0
    world_size: int = 1
    lengths: list[int] | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        self.share = self.per_device * self.world_size  # of all processes in one micro-batch
        self.global_batch = self.share * self.accumulation
        self.steps = self.rows // self.global_batch  # in an epoch

    @property
    def batch_sampler(self) -> WholeBatches:
        """Itself: the Trainer looks for `set_epoch` there, whether it skips batches or not."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """Return the rows of this epoch, cut before grouping: else the shortest are never in it."""
        size, lengths = self.global_batch, self.lengths
        if self.seed is None:
            return list(range(self.steps * size))
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(self.rows, generator=draw).tolist()[: self.steps * size]
        if lengths is not None:
            rows.sort(key=lambda row: -lengths[row])
            steps = torch.randperm(self.steps, generator=draw).tolist()
            rows = [row for step in steps for row in rows[step * size : (step + 1) * size]]
        return rows

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of a step of this epoch, those of all processes."""
        return self.order()[step * self.global_batch : (step + 1) * self.global_batch]

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order()
        for start in range(self.rank * self.per_device, len(rows), self.share):
            yield rows[start : start + self.per_device]

    def __len__(self) -> int:
        return self.steps * self.global_batch // self.share


def row_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each row, read from arrow's offsets."""
    return pyarrow.compute.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_pylist()


def validation_batches(
    rows: Dataset, per_device: int, rank: int, world_size: int
) -> tuple[Dataset, WholeBatches]:
    """Return the rows, filled up to full batches of all processes, and the batches of one."""
    filler = Dataset.from_list([FILLER], features=rows.features)
    missing = -len(rows) % (per_device * world_size)
    rows = concatenate_datasets([rows, *[filler] * missing])
    return rows, WholeBatches(len(rows), per_device, 1, None, rank, world_size)


def make_loader(rows: Dataset, batches: Any, collate: Any, args: TrainingArguments) -> DataLoader:
    """Return a loader that draws nothing from the random state that dropout uses."""
    workers = args.dataloader_num_workers
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=bool(workers and args.dataloader_persistent_workers),
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        generator=torch.Generator(),
        worker_init_fn=_ignore_sigterm,
    )


def _ignore_sigterm(worker: int) -> None:
    # Slurm sends it to every process, and the step that is being trained needs its rows
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _refused_pickle(checkpoint: Path, error: pickle.UnpicklingError) -> EnvironmentFault:
    """Return the error for a file that torch did not load: it runs no code of a pickle. Torch's own
    text advises to run it.
    """
    what = f"a file of {checkpoint.name} is not what PyTorch saves, and was not loaded"
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        what += f": it would run {found[1]}"
    hint = f"remove {checkpoint}: the same command resumes from the checkpoint before it"
    return EnvironmentFault(what, hint)


class RecipeTrainer(SFTTrainer):
    """SFTTrainer with whole global batches, a probe, exact resume and finite losses.

    Args:
        row_ids: example ids by row of the training set; None for packed rows.
        keep: how many checkpoints to keep; None for all.
        guard: what a resumed run must share, for each checkpoint's marker.
    """

    data_collator: Any
    aux_loss_enabled: bool

    def __init__(
        self,
        *args: Any,
        stop: StopRequest,
        row_ids: list[str] | None,
        keep: int | None,
        guard: Mapping[str, object],
        **kwargs: Any,
    ) -> None:
        self.base_settings = families.training_settings(kwargs["model"])
        super().__init__(*args, **kwargs)
        self.stop, self.row_ids, self.keep, self.guard = stop, row_ids, keep, guard
        self._choose_head()
        if self.is_fsdp_enabled:
            upstream_fixes.reduce_in_float32(self.accelerator)
        how, self.lengths = self.args, row_lengths(self.train_dataset)
        seed = how.seed if how.data_seed is None else how.data_seed
        self.batches = WholeBatches(
            len(self.lengths),
            how.per_device_train_batch_size,
            how.gradient_accumulation_steps,
            None if how.train_sampling_strategy == "sequential" else seed,
            how.process_index,
            how.world_size,
            self.lengths if how.train_sampling_strategy == "group_by_length" else None,
        )
        self.began = time.monotonic()
        self.seconds_before = 0.0  # of earlier attempts, up to the checkpoint that is resumed
        self.tokens_untimed = 0  # of earlier attempts that noted no time
        self.precision: dict[str, torch.dtype] = {}  # of what is trained
        self.is_compiled = False
        self.add_callback(RunCallback(self))

    def _choose_head(self) -> None:
        """Take our own head on a CPU, where the logits are its products and nothing is added."""
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        upstream_fixes.prepare_head(base, sharded=self.is_fsdp_enabled)
        is_plain = families.has_plain_head(base) and base.get_output_embeddings().bias is None
        is_nll = self.args.loss_type == "nll" and not self.aux_loss_enabled
        if is_plain and is_nll and self.args.device.type == "cpu":
            score_supervised_positions(base)

    def train(self, resume_from_checkpoint: Path | None = None) -> Any:
        """Train from a checkpoint's step, or from the beginning, to the last step or a stop."""
        self.began = time.monotonic()
        if resume_from_checkpoint is None:
            return super().train()
        try:
            return super().train(resume_from_checkpoint=str(resume_from_checkpoint))
        except pickle.UnpicklingError as error:
            raise _refused_pickle(resume_from_checkpoint, error) from error

    def seconds_so_far(self) -> float:
        """Return the time that the steps so far took, those of earlier attempts too."""
        return self.seconds_before + time.monotonic() - self.began

    def get_train_dataloader(self) -> DataLoader:
        """Return whole global batches; not through accelerate, which would deal them out anew."""
        return make_loader(self.train_dataset, self.batches, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return as many full batches for every rank, filled up with rows without loss."""
        how = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        rows, batches = validation_batches(self.eval_dataset, *how)
        return make_loader(rows, batches, self.data_collator, self.args)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm is global: every rank stops at the same step, before the weights change."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self.refuse_numbers(f"gradient norm is {float(norm)}", self.state.global_step + 1)
        return norm

    def refuse_numbers(self, what: str, step: int) -> None:
        """Raise what stops the training at a step, with the rows of the step."""
        saved = resume_guard.list_checkpoints(Path(self.args.output_dir))
        rows = self.batches.rows_of_step((step - 1) % self.batches.steps)
        ids = self.row_ids and [self.row_ids[row] for row in rows[:12]]
        examples = f"examples {', '.join(ids)}" if ids else "examples not known (packed rows)"
        raise NumericsError(
            f"{what} at step {step}, learning rate {self._get_learning_rate():.3g}, {examples}",
            "lower train.learning_rate, lengthen train.warmup_steps, or look at the examples with:"
            " recipes data",
            f"last good checkpoint: {saved[-1].name if saved else 'none yet'}",
        )

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Return the loss over the supervised tokens of all ranks, not a mean of batches' means."""
        sums, adds_router_loss = torch.zeros(2, dtype=torch.float64), self.aux_loss_enabled
        self.model.eval()
        getattr(self.optimizer, "eval", lambda: None)()  # of those without a schedule
        self.aux_loss_enabled = False  # a validation loss is that of its tokens
        with keep_random_state(self.args.device), torch.no_grad():
            for batch in dataloader:
                tokens = int((batch["labels"][:, 1:] != -100).sum())
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, self._prepare_inputs(batch))
                if tokens:  # else a smoothed loss is 0 / 0
                    sums += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
        self.aux_loss_enabled = adds_router_loss
        if dist.is_initialized():
            sums = sums.to(self.args.device)
            dist.all_reduce(sums)
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1].clamp(min=1))}
        return EvalLoopOutput(None, None, metrics, num_samples=len(self.eval_dataset))

    def _prepare_for_training(self, *args: Any) -> Any:
        """Add the probe, and give a checkpoint's weights the precision they were trained in."""
        max_steps, _, checkpoint = args
        if checkpoint is not None:
            self._mend_loaded(checkpoint)
            self._total_train_tokens = tokens_so_far(self.state)
            seconds = resume_guard.read_marker(Path(checkpoint)).get("seconds")
            if seconds is None:
                self.tokens_untimed = self._total_train_tokens
            else:
                self.seconds_before = float(seconds)
            if best := self.state.best_global_step:  # the Trainer forgets one that is gone or moved
                self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{best}"
        prepared = super()._prepare_for_training(*args)
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
        best = Path(str(self.state.best_model_checkpoint))
        if wrong := on_main_rank(lambda: resume_guard.what_is_wrong(best, hashes=True)):
            what = f"the weights of the best step cannot be read from {best.name}: {wrong}"
            hint = "remove it and every later checkpoint: the same command trains these steps again"
            raise EnvironmentFault(what, hint)
        upstream_fixes.reshard(self.model_wrapped)
        super()._load_best_model()
        self._mend_loaded(str(best))

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
        config, now = self.model.config.get_text_config(), families.training_settings(self.model)
        config.update(self.base_settings)
        super().save_model(output_dir, _internal_call)
        config.update(now)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)
        meet()  # however long rank 0 writes

    def seal(self) -> None:
        """Rank 0: mark the checkpoint complete, once the lines logged up to it are on the disk."""
        root, step = Path(self.args.output_dir), self.state.global_step
        for path in root.parent.glob("metrics.jsonl"):
            sync(path)
            sync(path.parent)
        seconds = round(self.seconds_so_far(), 1)
        resume_guard.mark_complete(root / f"checkpoint-{step}", guard=self.guard, seconds=seconds)
        resume_guard.rotate(root, self.keep, self.state.best_model_checkpoint)


class RunCallback(TrainerCallback):
    """What happens after a step: log, validate, save, in this order. A checkpoint has the
    validation of its step, and ends the log window: a resumed run needs no sums of it.
    """

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer, self.stop = trainer, trainer.stop

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
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """All of it was done after the epoch's last step."""
        control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Seal the checkpoint."""
        meet()  # rank 0 may have written longer than `train.ddp_timeout`
        on_main_rank(self.trainer.seal)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Refuse a loss that is not finite: fp16 skips infinite gradients, and shows it here."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            self.trainer.refuse_numbers(f"loss is {loss}", state.global_step)
