"""Before a trained arm is evaluated: are its weights the ones that were trained, finite, not zero,
and do they load and answer as then?

The files are checked without a model; the model that they make, once it is loaded, on the tokens
recorded at the end of the training.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import RecipesError
from recipes_lib.weights.base import adapter_config, check_whole, weight_hashes
from recipes_lib.weights.check import (
    EXACT_TOLERANCE,
    autocast,
    check_files,
    largest_difference,
    logits_on,
    read_check,
    rerouted_share,
)
from recipes_lib.weights.finished_run import check_base_of, check_weights
from recipes_lib.weights.verify import FOLD_TOLERANCE

if TYPE_CHECKING:
    from recipes_lib.generation.subjects import Subject
    from recipes_lib.weights.finished_run import TrainedRun


def check_weight_files(trained: TrainedRun) -> dict[str, Any]:
    """Return what the files of a finished run hold: {tensors, parameters, sha256}.

    Raises:
        RecipesError: a file is missing, truncated or changed since the training; a tensor is not
            finite; an adapter that changes nothing.
    """
    folder, base = trained.weights, ""
    if trained.full:
        check_whole(folder)
    else:
        check_base_of(trained)
        base = adapter_config(folder)["base_model_name_or_path"]
    found = check_files(folder, trained.full, base)
    check_weights(trained)
    return {**found, "sha256": weight_hashes(folder)}


def check_loaded(subject: Subject) -> dict[str, Any]:
    """Return how far the loaded model's logits are from those recorded at the end of its training;
    empty where none were recorded.

    Raises:
        RecipesError: it does not answer as it did when it was trained.
    """
    import torch

    trained = subject.target.trained
    check = read_check(trained.weights) if trained else None
    if trained is None or check is None or subject.model is None:
        return {}
    with (
        subject.using() if subject.using else contextlib.nullcontext(),
        autocast(
            check.autocast == "bfloat16", check.autocast == "float16", subject.model.device.type
        ),
    ):
        logits = logits_on(subject.model, check.tokens)
    top, recorded = torch.tensor(check.top_tokens), torch.tensor(check.top_logits)
    largest = largest_difference(
        (logits.gather(1, top[:, None]).squeeze(1) - recorded).abs(), rerouted_share(subject.model)
    )
    allowed = _tolerance(trained) * check.largest_logit
    if not largest <= allowed:
        what = f"run '{trained.run.name}' does not answer as it did when it was trained"
        raise RecipesError(
            what,
            f"logits differ by {largest:.3g} where {allowed:.3g} is allowed",
            f"more: recipes verify {trained.run.name}",
        )
    return {"positions": len(check.top_tokens), "largest_difference": largest, "allowed": allowed}


def _tolerance(trained: TrainedRun) -> float:
    """As `recipes verify`: exact where the reload at the end of the training was, half precision's
    rounding otherwise.
    """
    reload = trained.run.read_state().get("weights_check", {}).get("reload", {})
    return EXACT_TOLERANCE if reload.get("tolerance", 1.0) <= EXACT_TOLERANCE else FOLD_TOLERANCE
