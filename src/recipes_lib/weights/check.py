"""Proof that the weights on the disk are the weights that were trained: finite, not zero, right
base, same logits, by a fresh model that is loaded from the files alone.

`weights_check.json` beside the weights keeps tokens of validation rows, the most likely next token
at each position and its logit, and hashes: with it a later process can tell whether a folder still
holds what was trained, also after the data has gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.weights.base import (
    attach,
    base_fingerprint,
    device_with_room,
    load_base,
    load_model,
    weight_hashes,
)
from recipes_lib.weights.saved import adapter_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes_lib.weights.finished_run import TrainedRun


# Largest difference of a logit, as a share of the largest logit. Half precision: rounding of other
# kernels on other shapes.
EXACT_TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
# Of an adapter folded into its base. Measured on SmolLM2-135M, rank 8: merging in bfloat16 costs
# 4-6% of the largest logit at most, of which the arithmetic in bfloat16 alone is 3%; a 4-bit
# adapter merged into the original 16-bit base is 39% off.
FOLD_TOLERANCE = 0.15
# share of positions that a comparison leaves out where tokens choose experts: rounding sends some
# to others
REROUTED = 0.05
CHECK_FILE = "weights_check.json"
NUM_PROMPTS, MAX_TOKENS, MIN_TOKENS = 8, 128, 16
MAX_LOGITS = 2**26  # values of one comparison: 256 MiB in float32
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write three short tips for someone who starts a new job.",
    "What is the capital of Australia, and why is it not Sydney?",
    "List the steps to make a cup of tea.",
)


class StoredComparison(TypedDict):
    """A `LogitsComparison` in run.json."""

    largest: float
    mean: float
    scale: float
    same_top_token: float
    tolerance: float
    left_out: int
    agrees: bool


class TensorCounts(TypedDict):
    """What weight files hold."""

    tensors: int
    parameters: int


class _Difference:
    """The largest difference of logits beside the largest logit."""

    largest: float
    scale: float
    tolerance: float

    @property
    def allowed(self) -> float:
        """The largest difference that is rounding."""
        return self.tolerance * self.scale

    @property
    def agrees(self) -> bool:
        """Whether the differences are rounding."""
        return self.largest <= self.allowed


@dataclass(frozen=True)
class LogitsComparison(_Difference):
    """How far two models' logits are apart on the same tokens; `largest` leaves out the `left_out`
    positions furthest apart.
    """

    largest: float
    mean: float
    scale: float
    same_top_token: float
    tolerance: float
    left_out: int = 0

    def as_dict(self) -> StoredComparison:
        """Return the numbers for run.json."""
        return cast(StoredComparison, asdict(self) | {"agrees": self.agrees})


def compare_logits(
    first: torch.Tensor, second: torch.Tensor, tolerance: float, rerouted: float = 0.0
) -> LogitsComparison:
    """Compare two logit tensors of shape (tokens, vocabulary), the share `rerouted` left out."""
    first, second = first.float().cpu(), second.float().cpu()
    difference = (first - second).abs()
    return LogitsComparison(
        largest=largest_difference(difference.amax(-1), rerouted),
        left_out=int(rerouted * len(difference)),
        mean=float(difference.mean()),
        scale=float(first.abs().max()),
        same_top_token=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
        tolerance=tolerance,
    )


def rerouted_share(model: PreTrainedModel) -> float:
    """Return the share of positions to leave out: a choice of experts near a tie falls the other
    way by rounding alone; wrong weights differ everywhere.
    """
    return REROUTED if getattr(model.config.get_text_config(), "num_experts_per_tok", None) else 0.0


def largest_difference(by_position: torch.Tensor, rerouted: float) -> float:
    """Return the largest, the share `rerouted` left out; infinite where one is no number."""
    ordered = by_position.nan_to_num(nan=float("inf")).sort().values
    return float(ordered[: len(ordered) - int(rerouted * len(ordered))].max())


def logits_on(model: PreTrainedModel, probes: list[list[int]]) -> torch.Tensor:
    """Return the logits of each probe's tokens one after the other, shape (sum of lengths,
    vocabulary); runs on every rank under FSDP.
    """
    import torch

    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    rows = []
    with torch.no_grad():
        for probe in probes:
            ids = torch.tensor([probe], device="cpu" if device.type == "meta" else device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    model.train(was_training)
    return torch.cat(rows)


def free_memory() -> None:
    """Give memory of models that nobody refers to any more back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def autocast(half: str | None, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return the mixed precision that a training ran in: `bfloat16`, `float16` or none."""
    import torch

    if half is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=getattr(torch, half))


def check_files(folder: Path, full_finetuning: bool, base: str) -> TensorCounts:
    """Count what saved weights hold: readable, finite, changed by training, and made for
    `base`.

    Raises:
        RecipesError: a tensor is not finite, every LoRA B matrix is zero (the adapter changes
            nothing), or the base is another one.
    """
    import torch
    from safetensors import safe_open

    count = parameters = 0
    changed = full_finetuning
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RecipesError(f"no weights were written to {folder}")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                count, parameters = count + 1, parameters + tensor.numel()
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise RecipesError(f"{file.name}: {name} has values that are not finite")
                changed = changed or ("lora_A" not in name and bool(tensor.any()))
    if not changed:
        what = f"the adapter in {folder} changes nothing: every trained tensor is zero"
        raise RecipesError(
            what,
            "was the learning rate 0 at every step? more steps, or a shorter train.warmup_steps",
        )
    if not full_finetuning:
        recorded = adapter_config(folder)["base_model_name_or_path"]
        if recorded != base:
            raise RecipesError(f"the adapter names the base '{recorded}', but '{base}' was trained")
    return {"tensors": count, "parameters": parameters}


def reload(folder: Path, recipe: Recipe, full_finetuning: bool, tokenizer: Any) -> PreTrainedModel:
    """Load what was saved, from its files, in the precision it was trained in."""
    if not full_finetuning:
        return attach(load_base(recipe, tokenizer), {"default": folder})
    section = dataclasses.replace(recipe.model, name_or_path=str(folder), revision=None)
    model = load_model(dataclasses.replace(recipe, model=section), tokenizer)
    return model.to(device_with_room(model))


def round_weights(model: PreTrainedModel, half: str) -> None:
    """Give a model the weights that FSDP2's mixed precision computes with: each rounded as a whole,
    where autocast leaves the residual stream and the norms in float32.
    """
    import torch

    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(getattr(torch, half))


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare models on, and where they come from."""

    rows: list[list[int]]
    source: str

    def __str__(self) -> str:
        return f"{len(self.rows)} {self.source} ({sum(map(len, self.rows))} tokens)"


@dataclass(frozen=True)
class RecordedCheck:
    """What was recorded beside the weights when they were trained."""

    tokens: list[list[int]]
    top_tokens: list[int]
    top_logits: list[float]
    largest_logit: float
    autocast: str | None
    base_fingerprint: str | None
    sha256: dict[str, str]

    def compare(self, model: PreTrainedModel, reload: Mapping[str, Any]) -> AsTrained:
        """Compare a model's logits with those recorded.

        Args:
            reload: the comparison in run.json: where the reload at the end of the training was
                exact, this must be; else rounding is allowed.
        """
        import torch

        with autocast(self.autocast, model.device.type):
            logits = logits_on(model, self.tokens)
        top = torch.tensor(self.top_tokens)
        found = logits.gather(1, top[:, None]).squeeze(1)
        difference = (found - torch.tensor(self.top_logits)).abs()
        exact = reload.get("tolerance", 1.0) <= EXACT_TOLERANCE
        return AsTrained(
            positions=len(top),
            largest=largest_difference(difference, rerouted_share(model)),
            scale=self.largest_logit,
            tolerance=EXACT_TOLERANCE if exact else FOLD_TOLERANCE,
            same_top_token=float((logits.argmax(-1) == top).float().mean()),
        )


@dataclass(frozen=True)
class AsTrained(_Difference):
    """How far a model's most likely next tokens are from those recorded when it was trained."""

    positions: int
    largest: float
    scale: float
    tolerance: float
    same_top_token: float


def record_check(
    folder: Path, recipe: Recipe, probes: list[list[int]], logits: torch.Tensor, half: str | None
) -> None:
    """Write `weights_check.json` into a folder of weights.

    Args:
        probes: token ids of real rows.
        logits: the trained model's on all of them, shape (sum of lengths, vocabulary).
        half: the half precision of `autocast` that they were computed in.
    """
    top = logits.float().max(dim=-1)
    record = RecordedCheck(
        tokens=[list(map(int, probe)) for probe in probes],
        top_tokens=top.indices.tolist(),
        top_logits=[round(value, 5) for value in top.values.tolist()],
        largest_logit=float(logits.abs().max()),
        autocast=half,
        base_fingerprint=base_fingerprint(recipe),
        sha256=weight_hashes(folder),
    )
    write_text(folder / CHECK_FILE, json.dumps(asdict(record)) + "\n")


def read_check(folder: Path) -> RecordedCheck | None:
    """Return what `record_check` wrote, or None for weights of a version that recorded nothing."""
    record = read_object(folder / CHECK_FILE)
    try:
        return RecordedCheck(**record) if record else None
    except TypeError:
        raise DamagedFile(
            "is not what was recorded at the end of the training", file=folder / CHECK_FILE
        ) from None


def real_prompts(
    trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, count: int = NUM_PROMPTS
) -> Prompts:
    """Return prompts of the run's own kind: validation rows as its recipe prepares them; where the
    data is gone the rows recorded beside the weights, or four questions.
    """
    from recipes_lib.data.prepare import prepare_data
    from recipes_lib.data.supervision import prompt_ids

    limit = min(MAX_TOKENS, max(MIN_TOKENS, MAX_LOGITS // (max(count, 1) * len(tokenizer))))
    gone = "the data is not readable now"
    try:
        data = prepare_data(trained.recipe, tokenizer)
    except (RecipesError, OSError, ConnectionError):
        recorded = read_check(trained.weights)
        if recorded is not None:
            rows, source = recorded.tokens, f"recorded validation rows; {gone}"
        else:
            section = trained.prompt_section
            texts = [generation_prompt(section, tokenizer, instruction=one) for one in QUESTIONS]
            rows = [prompt_ids(section, tokenizer, text) for text in texts]
            source = f"general questions; {gone}"
    else:
        if data.validation is not None:
            rows, source = data.validation[:count]["input_ids"], "validation rows"
        else:
            rows = data.train[:count]["input_ids"]
            source = "training rows; the run has no validation rows"
    return Prompts([list(ids[:limit]) for ids in rows], source)
