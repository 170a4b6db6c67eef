"""Supervised fine-tuning: TRL's SFTTrainer under the guarantees of `ExactTrainer`. The loss is the
mean over the tokens that have a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow.compute
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import SFTTrainer

from recipes_lib.models import families, upstream_fixes
from recipes_lib.training.loss import score_supervised_positions
from recipes_lib.training.trainer import ExactTrainer

NO_LABEL = -100
FILLER = {"input_ids": [0, 0], "labels": [NO_LABEL, NO_LABEL]}  # a row without loss


class SupervisedTrainer(ExactTrainer, SFTTrainer):
    """TRL's SFTTrainer with whole global batches, a probe, exact resume and finite losses.

    Private names of trl 1.16 that it uses: `_metrics`, `_total_train_tokens`.
    """

    filler = FILLER
    data_collator: Any
    aux_loss_enabled: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        base = self.model
        if is_peft_model(base):
            base = base.get_base_model()
        upstream_fixes.prepare_head(base, sharded=self.is_fsdp_enabled)
        # our own head on a CPU, where the logits are its products and nothing is added to the loss
        is_plain = families.has_plain_head(base) and base.get_output_embeddings().bias is None
        is_nll = self.args.loss_type == "nll" and not self.aux_loss_enabled
        if is_plain and is_nll and self.args.device.type == "cpu":
            score_supervised_positions(base)

    @staticmethod
    def row_lengths(rows: Dataset) -> list[int]:
        """Return the tokens of each row, read from arrow's offsets."""
        tokens = rows.with_format("arrow")[:]["input_ids"]
        return pyarrow.compute.list_value_length(tokens).to_pylist()

    def num_items(self, batch: Any) -> int:
        """Return how many tokens have a label that some token before them predicts."""
        return int((batch["labels"][:, 1:] != NO_LABEL).sum())

    @property
    def tokens_trained(self) -> int:
        """The tokens of all training batches so far, as TRL counts them."""
        return int(self._total_train_tokens)

    @tokens_trained.setter
    def tokens_trained(self, tokens: int) -> None:
        """Go on counting from those of a checkpoint."""
        self._total_train_tokens = tokens

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Forget what TRL counts of the batches in the block: tokens, entropy, accuracy."""
        tokens = self._total_train_tokens
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        try:
            yield
        finally:
            self._total_train_tokens = tokens
            self._metrics["train"].clear()
            self._metrics["train"].update(metrics)

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """A validation loss is that of its tokens, without the loss of routers."""
        adds_router_loss = self.aux_loss_enabled
        self.aux_loss_enabled = False
        try:
            yield
        finally:
            self.aux_loss_enabled = adds_router_loss
