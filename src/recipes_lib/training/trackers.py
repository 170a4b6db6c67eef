"""Trackers that `train.report_to` names: whether they are installed, asked before anything is
loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl import SFTConfig

    from recipes_lib.config.recipe import Recipe

NOT_ASKED = ("none", "all", "flyte")  # transformers does not say whether flyte is there


def check_trackers(recipe: Recipe, args: SFTConfig) -> None:
    """Refuse a tracker that is not installed; the Trainer would say so after the model was loaded.

    Raises:
        EnvironmentFault: with the way to install it.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    missing = sorted(set(args.report_to) - {*NOT_ASKED, *get_available_reporting_integrations()})
    if missing:
        raise recipe.fault(
            "train.report_to",
            f"train.report_to: {', '.join(missing)} is not installed",
            "pip install -c constraints.txt -e '.[tracking]' brings tensorboard, trackio and wandb;"
            " or train.report_to=none",
        )
