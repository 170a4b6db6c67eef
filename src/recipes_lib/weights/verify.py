"""`recipes verify`: does the run still give what was trained, and does its merged model give what
its adapter gives?

Everything is compared as logits on real prompts. Two yardsticks decide: the largest difference as a
share of the largest logit (rounding), and the mean difference as a share of the adapter's own
effect on the base. The second is what a merge that lost a weak adapter altogether would fail, while
passing the first. Where the effect is too small to be told from the rounding of half precision,
both sides are computed again in float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import RecipesError
from recipes_lib.weights.base import adapter_config, check_whole, weight_hashes
from recipes_lib.weights.check import (
    EXACT_TOLERANCE,
    RecordedCheck,
    autocast,
    check_files,
    largest_difference,
    logits_on,
    read_check,
    real_prompts,
    rerouted_share,
)
from recipes_lib.weights.finished_run import (
    Family,
    TrainedRun,
    check_base_of,
    check_weights,
    weights_damage,
)
from recipes_lib.weights.merge import (
    FOLD_TOLERANCE,
    adapter_logits,
    compare_folded,
    fold,
    free_memory,
    load_merged,
    merge_record,
    why_stale,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Verification:
    """What verifying a run found: facts to show, numbers, and problems, of which one is enough to
    fail.
    """

    run: str
    kind: str
    facts: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the weights."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return everything for --json."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def verify(trained: TrainedRun, num_prompts: int) -> Verification:
    """Check a finished run's weights: the files, the model they make, and `merged/` or a merge made
    in memory.

    Args:
        trained: the run.
        num_prompts: rows to compare logits on.

    Raises:
        RecipeError: the base is not the run's.
        EnvironmentFault: files are missing or truncated, or the base cannot be had.
    """
    kind = (
        "full fine-tuning"
        if trained.full
        else "LoRA"
        if trained.recipe.quantization is None
        else "QLoRA"
    )
    result = Verification(trained.run.name, kind)
    _check_weights(trained, result)
    if result.problems:
        return result
    family = Family([trained])
    _check_as_trained(trained, family, result)
    if not trained.full:
        _check_folded(trained, family, num_prompts, result)
    return result


# ---- The parts of a verification ----


def _check_weights(trained: TrainedRun, result: Verification) -> None:
    """The files: whole, finite, as many tensors as were recorded, and byte for byte those of the
    end of the training.
    """
    folder, base = trained.weights, _check_complete(trained)
    try:
        found = check_files(folder, trained.full, base)
    except RecipesError as error:
        result.problems.append(error.what)
        return
    recorded = trained.run.read_state().get("weights_check", {})
    for key in ("tensors", "parameters"):
        if recorded.get(key) not in (None, found[key]):
            result.problems.append(
                f"{folder.name}/ has {found[key]:,} {key}, run.json recorded {recorded[key]:,}"
            )
    result.facts.append(
        f"{folder.name}/: {found['tensors']:,} tensors, {found['parameters']:,} numbers, all finite"
    )
    if damage := weights_damage(trained.run, trained.full):
        result.problems.append(f"{damage}; make it again: {trained.run.train_command()}")
    elif "sha256" not in recorded and read_check(folder) is None:
        result.facts.append(
            f"{folder.name}/: this run recorded no hashes and no answers to compare with"
        )
    else:
        result.facts.append(f"{folder.name}/: sha256 as recorded at the end of the training")


def _check_complete(trained: TrainedRun) -> str:
    """Refuse weights that are not whole or of another base; return the base of an adapter."""
    if trained.full:
        check_whole(trained.weights)
        return ""
    check_base_of(trained)
    return str(adapter_config(trained.weights)["base_model_name_or_path"])


def check_weight_files(trained: TrainedRun) -> dict[str, Any]:
    """Return what the files of a finished run hold, without a model: {tensors, parameters, sha256}.

    Raises:
        RecipesError: a file is missing, truncated or changed since the training; a tensor is not
            finite; an adapter that changes nothing.
    """
    found = check_files(trained.weights, trained.full, _check_complete(trained))
    check_weights(trained)
    return {**found, "sha256": weight_hashes(trained.weights)}


def check_answers_as_trained(trained: TrainedRun, model: PreTrainedModel) -> dict[str, Any]:
    """Return how far a loaded model's logits are from those recorded at the end of its training;
    empty where none were recorded.

    Raises:
        RecipesError: it does not answer as it did when it was trained.
    """
    check = read_check(trained.weights)
    if check is None:
        return {}
    found = difference_from_record(trained, check, model)
    largest, allowed = found.largest, found.allowed
    if not largest <= allowed:
        raise RecipesError(
            f"run '{trained.run.name}' does not answer as it did when it was trained",
            f"logits differ by {largest:.3g} where {allowed:.3g} is allowed",
            f"more: recipes verify {trained.run.name}",
        )
    return {"positions": len(check.top_tokens), "largest_difference": largest, "allowed": allowed}


def _check_as_trained(trained: TrainedRun, family: Family, result: Verification) -> None:
    """The model that the files make gives the logits that the trained model gave."""
    check = read_check(trained.weights)
    if check is None:
        return
    with family.using(trained.run.name) as model:
        found = difference_from_record(trained, check, model)
    largest, allowed = found.largest, found.allowed
    result.numbers["as_trained"] = {
        "positions": len(check.top_tokens),
        "largest": largest,
        "scale": check.largest_logit,
        "tolerance": found.tolerance,
        "same_top_token": found.same_top,
        "agrees": largest <= allowed,
    }
    if largest > allowed:
        result.problems.append(
            "the model does not answer as it did when it was trained: logits differ by"
            f" {largest:.3g} where {allowed:.3g} is allowed"
        )
    else:
        difference = f"differ by at most {largest:.2g} ({allowed:.2g} allowed)"
        result.facts.append(
            f"as trained: logits of {len(check.top_tokens)} recorded tokens {difference}"
        )


@dataclass(frozen=True)
class RecordDifference:
    """How far a model is from the logits recorded at the end of its training.

    Args:
        largest: of all recorded positions.
        allowed: the most it may be, `tolerance` times the largest recorded logit: exact where the
            reload at the end of the training was, half precision's rounding otherwise.
        same_top: share of positions with the same most likely token.
    """

    largest: float
    allowed: float
    tolerance: float
    same_top: float


def difference_from_record(
    trained: TrainedRun, check: RecordedCheck, model: PreTrainedModel
) -> RecordDifference:
    """Return how far the loaded model of a finished run is from what its training recorded."""
    import torch

    reload = trained.run.read_state().get("weights_check", {}).get("reload", {})
    exact = reload.get("tolerance", 1.0) <= EXACT_TOLERANCE
    tolerance = EXACT_TOLERANCE if exact else FOLD_TOLERANCE
    with autocast(check.autocast == "bfloat16", check.autocast == "float16", model.device.type):
        logits = logits_on(model, check.tokens)
    top, recorded = torch.tensor(check.top_tokens), torch.tensor(check.top_logits)
    found = logits.gather(1, top[:, None]).squeeze(1)
    largest = largest_difference((found - recorded).abs(), rerouted_share(model))
    same_top = float((logits.argmax(-1) == top).float().mean())
    return RecordDifference(largest, tolerance * check.largest_logit, tolerance, same_top)


def _check_folded(
    trained: TrainedRun, family: Family, num_prompts: int, result: Verification
) -> None:
    """`merged/` gives the adapter's logits; without one, a merge in memory does."""
    tokenizer, precision = family.tokenizer, str(family.model.dtype).removeprefix("torch.")
    record = merge_record(trained)
    stale = why_stale(trained, record, contents=True) if record else None
    if stale:
        result.problems.append(
            f"merged/ is out of date: {stale}; make it again: recipes merge {trained.run.name}"
        )
        return
    prompts = real_prompts(trained, tokenizer, num_prompts)
    logits = adapter_logits(family, trained, prompts)
    if record:
        family.model = None
        free_memory()
        check_whole(trained.merged)
        folded, what = load_merged(trained.merged, trained, tokenizer, record["dtype"]), "merged/"
    else:
        folded, what = fold(trained, family), "a merge in memory (there is no merged/)"
    dtype = str(folded.dtype).removeprefix("torch.")
    comparison = compare_folded(trained, logits, folded, prompts, precision)
    result.numbers["merged"] = {"compared": what, "dtype": dtype, **comparison.as_dict()}
    result.problems += [f"{what}: {problem}" for problem in comparison.problems]
