"""`recipes verify`: does the run still give what was trained, and does its merged model give what
its adapter gives? Everything is compared as logits on real prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from recipes_lib.core.errors import DataError, EnvironmentFault, RecipeError, RecipesError
from recipes_lib.weights.base import check_whole, precision_name, weight_hashes
from recipes_lib.weights.check import AsTrained, TensorCounts, free_memory, read_check, real_prompts
from recipes_lib.weights.finished_run import (
    Family,
    TrainedRun,
    check_tensors,
    check_weights,
    weights_damage,
)
from recipes_lib.weights.merge import (
    StoredFold,
    adapter_logits,
    compare_folded,
    fold,
    load_merged,
    merge_record,
    why_stale,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ComparedMerge(StoredFold):
    """What was compared with the adapter: `merged/`, or a merge in memory."""

    compared: str
    dtype: str


class VerifiedNumbers(TypedDict, total=False):
    """What was compared. `as_trained` are the fields of `AsTrained`."""

    as_trained: Mapping[str, object]
    merged: ComparedMerge


@dataclass
class Verification:
    """What verifying a run found: facts to show, numbers, and problems, of which one is enough to
    fail.
    """

    run: str
    kind: str
    facts: list[str] = field(default_factory=list)
    numbers: VerifiedNumbers = field(default_factory=lambda: VerifiedNumbers())
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the weights."""
        return not self.problems

    def as_dict(self) -> dict[str, object]:
        """Return everything for --json."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def verify(trained: TrainedRun, num_prompts: int) -> Verification:
    """Check a finished run's weights: the files, the model they make, and `merged/` or a merge made
    in memory.

    Args:
        num_prompts: rows to compare logits on.

    Raises:
        RecipeError: the base is not the run's.
        EnvironmentFault: files are missing or truncated, or the base cannot be had.
    """
    adapter = "LoRA" if trained.recipe.quantization is None else "QLoRA"
    kind = "full fine-tuning" if trained.full else adapter
    result = Verification(trained.run.name, kind)
    _check_weights(trained, result)
    if result.problems:
        return result
    family = Family([trained])
    _check_as_trained(trained, family, result)
    if not trained.full:
        _check_folded(trained, family, num_prompts, result)
    return result


def _check_weights(trained: TrainedRun, result: Verification) -> None:
    try:
        found = check_tensors(trained, trained.weights)
    except (DataError, EnvironmentFault, RecipeError):
        raise
    except RecipesError as error:
        result.problems.append(error.what)
        return
    folder = trained.weights
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
        return
    unknown = "sha256" not in recorded and read_check(folder) is None
    result.facts.append(
        f"{folder.name}/: this run recorded no hashes and no answers to compare with"
        if unknown
        else f"{folder.name}/: sha256 as recorded at the end of the training"
    )


class CheckedFiles(TensorCounts):
    """What the files of a finished run hold, and their hashes."""

    sha256: dict[str, str]


class TrainedAnswers(TypedDict):
    """How far logits are from those of the trained model, and how far they may be."""

    positions: int
    largest_difference: float
    allowed: float


def check_weight_files(trained: TrainedRun) -> CheckedFiles:
    """Return what the files of a finished run hold, without a model.

    Raises:
        RecipesError: a file is missing, truncated or changed since the training; a tensor is not
            finite; an adapter that changes nothing.
    """
    found = check_tensors(trained, trained.weights)
    check_weights(trained)
    return {**found, "sha256": weight_hashes(trained.weights)}


def check_answers_as_trained(trained: TrainedRun, model: PreTrainedModel) -> TrainedAnswers | None:
    """Return how far a loaded model's logits are from those recorded at the end of its training, or
    None where none were recorded.

    Raises:
        RecipesError: it does not answer as it did when it was trained.
    """
    found = _as_trained(trained, model)
    if found is None:
        return None
    if not found.agrees:
        raise RecipesError(
            f"run '{trained.run.name}' does not answer as it did when it was trained",
            f"logits differ by {found.largest:.3g} where {found.allowed:.3g} is allowed",
            f"more: recipes verify {trained.run.name}",
        )
    return {
        "positions": found.positions,
        "largest_difference": found.largest,
        "allowed": found.allowed,
    }


def _as_trained(trained: TrainedRun, model: PreTrainedModel) -> AsTrained | None:
    check = read_check(trained.weights)
    reload = trained.run.read_state().get("weights_check", {}).get("reload", {})
    return check.compare(model, reload) if check else None


def _check_as_trained(trained: TrainedRun, family: Family, result: Verification) -> None:
    with family.using(trained.run.name) as model:
        found = _as_trained(trained, model)
    if found is None:
        return
    result.numbers["as_trained"] = {**dataclasses.asdict(found), "agrees": found.agrees}
    if found.agrees:
        result.facts.append(
            f"as trained: logits of {found.positions} recorded tokens differ by at most"
            f" {found.largest:.2g} ({found.allowed:.2g} allowed)"
        )
    else:
        result.problems.append(
            "the model does not answer as it did when it was trained: logits differ by"
            f" {found.largest:.3g} where {found.allowed:.3g} is allowed"
        )


def _check_folded(
    trained: TrainedRun, family: Family, num_prompts: int, result: Verification
) -> None:
    """`merged/` gives the adapter's logits; without one, a merge in memory does."""
    tokenizer, precision = family.tokenizer, precision_name(family.model.dtype)
    record = merge_record(trained)
    stale = why_stale(trained, record) if record else None
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
    comparison = compare_folded(trained, logits, folded, prompts, precision)
    result.numbers["merged"] = {
        "compared": what,
        "dtype": precision_name(folded.dtype),
        **comparison.as_dict(),
    }
    result.problems += [f"{what}: {problem}" for problem in comparison.problems]
