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
from recipes_lib.weights.base import adapter_config, check_whole
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
from recipes_lib.weights.finished_run import Family, TrainedRun, check_base_of, weights_damage
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
    pass


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
    folder = trained.weights
    if trained.full:
        check_whole(folder)
    else:
        check_base_of(trained)
    try:
        found = check_files(
            folder,
            trained.full,
            "" if trained.full else adapter_config(folder)["base_model_name_or_path"],
        )
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


def _check_as_trained(trained: TrainedRun, family: Family, result: Verification) -> None:
    """The model that the files make gives the logits that the trained model gave."""
    check = read_check(trained.weights)
    if check is None:
        return
    reload = trained.run.read_state()["weights_check"]["reload"]
    tolerance = EXACT_TOLERANCE if reload["tolerance"] <= EXACT_TOLERANCE else FOLD_TOLERANCE
    largest, same_top = _differences_from_record(trained, family, check)
    allowed = tolerance * check.largest_logit
    result.numbers["as_trained"] = {
        "positions": len(check.top_tokens),
        "largest": largest,
        "scale": check.largest_logit,
        "tolerance": tolerance,
        "same_top_token": same_top,
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


def _differences_from_record(
    trained: TrainedRun, family: Family, check: RecordedCheck
) -> tuple[float, float]:
    """Return the largest difference from the recorded top logits, and the share of positions with
    the same top token.
    """
    import torch

    half = check.autocast == "bfloat16", check.autocast == "float16"
    with family.using(trained.run.name) as model, autocast(*half, model.device.type):
        logits = logits_on(model, check.tokens)
    top = torch.tensor(check.top_tokens)
    recorded = torch.tensor(check.top_logits)
    found = logits.gather(1, top[:, None]).squeeze(1)
    return largest_difference((found - recorded).abs(), rerouted_share(model)), float(
        (logits.argmax(-1) == top).float().mean()
    )


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
