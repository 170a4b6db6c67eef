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
from recipes_lib.training.adapters import (
    fold,
    free_memory,
    load_merged,
    merge_record,
    unfolded_float32,
    why_stale,
)
from recipes_lib.training.base_identity import adapter_config, check_whole
from recipes_lib.training.probes import Prompts, RecordedCheck, read_check, real_prompts
from recipes_lib.training.trained import BASE, Family, TrainedRun, check_base_of, weights_damage
from recipes_lib.training.weights_check import (
    EXACT_TOLERANCE,
    LogitsComparison,
    autocast,
    check_files,
    compare_logits,
    largest_difference,
    logits_on,
    rerouted_share,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Measured on SmolLM2-135M, rank 8: merging in bfloat16 costs 3-5% of the effect on average and 4-6%
# of the largest logit at most, of which the arithmetic in bfloat16 alone is 3%; a 4-bit adapter
# merged into the original 16-bit base is 32% and 39% off.
LOST_LIMIT = 0.25
FOLD_TOLERANCE = 0.15


@dataclass(frozen=True)
class AdapterLogits:
    """Logits of one run's base and adapter on the same prompts, shape (tokens, vocabulary) each."""

    base: torch.Tensor
    adapter: torch.Tensor


@dataclass(frozen=True)
class FoldComparison:
    """A folded adapter against the adapter on its base.

    Args:
        prompts: what both were asked.
        difference: folded against adapter.
        effect: adapter against bare base: what the adapter does.
        computed_in: precision of the arithmetic on both sides.
    """

    prompts: str
    difference: LogitsComparison
    effect: LogitsComparison
    computed_in: str

    @property
    def lost(self) -> float:
        """The mean difference as a share of the adapter's mean effect."""
        return self.difference.mean / self.effect.mean if self.effect.mean else float("inf")

    @property
    def problems(self) -> list[str]:
        """Why the two are not the same; empty when they are."""
        found = []
        difference = self.difference
        if not difference.agrees:
            allowed = difference.tolerance * difference.scale
            found.append(
                f"logits differ by {difference.largest:.3g} where {allowed:.3g} is allowed"
            )
        if self.lost > LOST_LIMIT:
            found.append(
                f"the mean difference is {self.lost:.0%} of what the adapter changes,"
                f" {LOST_LIMIT:.0%} is allowed: its effect is lost in rounding (try --dtype"
                " float32), or these are not its weights"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for a record or for --json."""
        return {
            "prompts": self.prompts,
            "computed_in": self.computed_in,
            "difference": self.difference.as_dict(),
            "adapter_effect": {
                key: value
                for key, value in dataclasses.asdict(self.effect).items()
                if key != "tolerance"
            },
            "lost_share": self.lost,
            "lost_limit": LOST_LIMIT,
            "agrees": not self.problems,
        }


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


def adapter_logits(family: Family, trained: TrainedRun, prompts: Prompts) -> AdapterLogits:
    """Return the logits of the bare base and of the adapter on it."""
    logits = []
    for name in (BASE, trained.run.name):
        with family.using(name) as model:
            logits.append(logits_on(model, prompts.rows))
    return AdapterLogits(*logits)


def compare_folded(
    trained: TrainedRun,
    logits: AdapterLogits,
    folded: PreTrainedModel,
    prompts: Prompts,
    precision: str,
) -> FoldComparison:
    """Compare a folded model with the adapter on its base.

    Args:
        trained: the run.
        logits: of base and adapter.
        folded: the folded model; it may be turned into float32.
        prompts: what `logits` were computed on.
        precision: of the base in memory when they were.
    """
    written = str(folded.dtype).removeprefix("torch.")
    exact = trained.recipe.quantization is None and {precision, written} == {"float32"}
    rerouted = rerouted_share(folded)
    first = _compare(logits, logits_on(folded, prompts.rows), prompts, exact, precision, rerouted)
    if exact or first.lost <= LOST_LIMIT:
        return first
    free_memory()
    again = logits_on(folded.float(), prompts.rows)
    model = unfolded_float32(trained)
    with model.disable_adapter():
        base = logits_on(model, prompts.rows)
    return _compare(
        AdapterLogits(base, logits_on(model, prompts.rows)),
        again,
        prompts,
        written == "float32",
        "float32",
        rerouted,
    )


def _compare(
    logits: AdapterLogits,
    folded: torch.Tensor,
    prompts: Prompts,
    exact: bool,
    precision: str,
    rerouted: float,
) -> FoldComparison:
    difference = compare_logits(
        logits.adapter, folded, EXACT_TOLERANCE if exact else FOLD_TOLERANCE, rerouted
    )
    return FoldComparison(
        str(prompts), difference, compare_logits(logits.base, logits.adapter, 0.0), precision
    )


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
