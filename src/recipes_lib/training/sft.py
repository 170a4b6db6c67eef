"""Supervised fine-tuning: TRL's SFTTrainer under the guarantees of `ExactTrainer`. The loss is the
mean over the tokens that have a label.
"""

from typing import Any

import pyarrow.compute
from datasets import Dataset
from trl import SFTTrainer

from recipes_lib.data.encoding import IGNORED
from recipes_lib.models import families
from recipes_lib.training.counting import CountingTrainer
from recipes_lib.training.loss import score_supervised_positions

FILLER = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}  # a row without loss


class SupervisedTrainer(CountingTrainer, SFTTrainer):
    """TRL's SFTTrainer with whole global batches, a probe, exact resume and finite losses."""

    filler = FILLER
    columns = ("input_ids", "labels")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        base = self.base_model
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
        return int((batch["labels"][:, 1:] != IGNORED).sum())
