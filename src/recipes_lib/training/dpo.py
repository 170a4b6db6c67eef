"""Preference tuning: TRL's DPOTrainer under the guarantees of `ExactTrainer`. The loss is the mean
over pairs, and the reference is the base as it was (`reference.py`), no second model.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from recipes_lib.data.encoding_pairs import pair_lengths
from recipes_lib.training.counting import CountingTrainer
from recipes_lib.training.reference import REFERENCE_COLUMNS

# A pair without loss. TRL's collator makes (2B, T) of B pairs: the chosen ones, then the rejected.
FILLER: dict[str, Any] = {"prompt_ids": [0, 0], "chosen_ids": [], "rejected_ids": []}
FILLER |= dict.fromkeys(REFERENCE_COLUMNS, 0.0)
ROUNDING = 1e-6  # of a log-probability in float32, as a share of it; measured: 4e-7


class PreferenceTrainer(CountingTrainer, DPOTrainer):
    """TRL's DPOTrainer with whole global batches, a probe, exact resume and finite losses.

    Private name of trl 1.16 that it uses beside those of its base: `_prepare_dataset`.
    """

    filler = FILLER
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", *REFERENCE_COLUMNS)
    unit = "pairs"
    row_lengths = staticmethod(pair_lengths)

    def __init__(self, **kwargs: Any) -> None:
        # For full fine-tuning, TRL would load the base a second time: by its name alone, so of
        # another revision perhaps. The rows bring what it would compute.
        load_reference = dpo_trainer.create_model_from_path
        dpo_trainer.create_model_from_path = lambda *_, **__: None
        try:
            super().__init__(**kwargs)
        finally:
            dpo_trainer.create_model_from_path = load_reference
        self.precompute_ref_logps = True  # read them from the rows

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows are prepared already: `data.prepare` names whatever it drops."""
        return dataset

    def describe(self) -> list[str]:
        """Return what the loss is, and that dropout is off."""
        args = self.args
        losses = " + ".join(args.loss_type)
        line = f"preference of the last answer: {losses}, beta {args.beta:g};"
        line += " the reference is the base as it was"
        if args.disable_dropout:
            line += "; dropout is off, of adapters too (train.disable_dropout)"
        return [line]

    def num_items(self, batch: Any) -> int:
        """Return how many pairs are none of the fillers."""
        return len(_real_pairs(batch))

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Measure the pairs of this process alone: the ranks may have unequal numbers of them, of
        which TRL's own metrics would wait for the same.
        """
        accelerator = self.accelerator
        accelerator.gather = accelerator.gather_for_metrics = lambda values, *_, **__: values
        try:
            with super().validating():
                yield
        finally:
            del accelerator.gather
            del accelerator.gather_for_metrics
            self._metrics["eval"].clear()  # means of means, in which ties are lost

    def validation_means(self, batch: Any) -> dict[str, float]:
        """Return the loss, the accuracy of the implicit reward (a tie is a half) and its margin."""
        pairs = _real_pairs(batch)
        if not len(pairs):  # only fillers; under FSDP2 all ranks have to take part
            pairs = torch.zeros(1, dtype=torch.long, device=batch["input_ids"].device)
        rows = torch.cat([pairs, pairs + len(batch["input_ids"]) // 2])
        real = {}
        for name, values in batch.items():
            real[name] = values[pairs if name in REFERENCE_COLUMNS else rows]
        outputs = []

        def forward(**inputs: Any) -> Any:
            outputs.append(self.model(**inputs))
            return outputs[0]

        loss = self.compute_loss(forward, real)
        chosen, rejected = outputs[0].log_probs.sum(dim=1).chunk(2)
        ratios = [chosen - real[REFERENCE_COLUMNS[0]], rejected - real[REFERENCE_COLUMNS[1]]]
        margins = self.args.beta * (ratios[0] - ratios[1])
        # before the first step all are ties, but for the rounding of padded sums
        is_tie = (ratios[0] - ratios[1]).abs() <= ROUNDING * (chosen + rejected).abs()
        is_right = torch.where(is_tie, 0.5, (margins > 0).double())
        return {
            "loss": float(loss),
            "rewards/accuracies": float(is_right.mean()),
            "rewards/margins": float(margins.double().mean()),
        }


def _real_pairs(batch: Any) -> torch.Tensor:
    """Return the numbers of the pairs of a batch whose answers have tokens."""
    of_chosen = batch["completion_mask"].chunk(2)[0]
    return of_chosen.any(dim=1).nonzero()[:, 0]
