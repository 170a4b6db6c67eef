"""Project defaults for `train` that differ from TRL's. None changes the declared mathematics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProjectDefault:
    """A value and why it is not upstream's."""

    value: Any
    reason: str


MAX_LENGTH = 1024  # TRL's default of max_length

TRAIN_DEFAULTS = {
    "activation_checkpointing": ProjectDefault(
        False,
        "recomputing activations costs speed (about 20% by TRL's figure); switch it on when memory"
        " is short",
    ),
    "logging_nan_inf_filter": ProjectDefault(
        False, "upstream replaces a NaN loss by an earlier mean, so a broken run looks fine"
    ),
    "ddp_find_unused_parameters": ProjectDefault(
        False, "a LoRA step uses every trainable parameter; searching for unused ones costs time"
    ),
}
