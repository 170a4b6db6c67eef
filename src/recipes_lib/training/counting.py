"""What the trainers of TRL count of their batches: tokens and metrics, under `ExactTrainer`."""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils import is_peft_model

from recipes_lib.models import upstream_fixes
from recipes_lib.training.trainer import ExactTrainer


class CountingTrainer(ExactTrainer):
    """A mixin in front of a trainer of TRL.

    Private names of trl 1.16 that it uses: `_metrics`, `_total_train_tokens`.
    """

    data_collator: Any
    aux_loss_enabled: bool
    columns: tuple[str, ...]  # that it reads of the prepared rows
    unit = "examples"  # what a row is

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        upstream_fixes.prepare_head(self.base_model, sharded=self.is_fsdp_enabled)

    @property
    def base_model(self) -> Any:
        """The model without its adapter."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def describe(self) -> list[str]:
        """Return what the user should know of the objective before the first step."""
        return []

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
        """A validation loss is that of its rows, without the loss of routers."""
        adds_router_loss = self.aux_loss_enabled
        self.aux_loss_enabled = False
        try:
            yield
        finally:
            self.aux_loss_enabled = adds_router_loss
