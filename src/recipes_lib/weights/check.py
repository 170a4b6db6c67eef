"""Proof that the weights on the disk are the weights that were trained: finite, not zero, right
base, same logits.

The check reloads what was saved into a fresh model, from the files alone, and compares logits with
those the trained model gave.

`weights_check.json` lies beside the weights: the tokens of a few validation rows, the most likely
next token at each position and its logit, the weights' hashes and the base's. With it a later
process can tell whether a folder still holds what was trained, also after the data has gone.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.weights.base import adapter_config, base_fingerprint, load_model, weight_hashes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes_lib.config.recipe import Recipe
    from recipes_lib.weights.finished_run import TrainedRun


# Largest difference of a logit, as a share of the largest logit. Half precision: rounding of other
# kernels on other shapes.
EXACT_TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
# share of positions that a comparison leaves out where tokens choose experts: rounding sends some
# to others
REROUTED = 0.05
_SPARE = 1.1  # free memory asked for, as a multiple of the weights


@dataclass(frozen=True)
class LogitsComparison:
    """How far two models' logits are apart on the same tokens; `left_out` positions, those furthest
    apart, do not count for `largest`.
    """

    largest: float
    mean: float
    scale: float
    same_top_token: float
    tolerance: float
    left_out: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the largest difference is within tolerance of the largest logit."""
        return self.largest <= self.tolerance * self.scale

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for run.json."""
        return {**asdict(self), "agrees": self.agrees}


def compare_logits(
    first: torch.Tensor, second: torch.Tensor, tolerance: float, rerouted: float = 0.0
) -> LogitsComparison:
    """Compare two logit tensors of shape (tokens, vocabulary).

    Args:
        rerouted: what `rerouted_share` says of the model.
    """
    first, second = first.float().cpu(), second.float().cpu()
    difference = (first - second).abs()
    left_out = int(rerouted * len(difference))
    return LogitsComparison(
        largest=largest_difference(difference.amax(-1), rerouted),
        left_out=left_out,
        mean=float(difference.mean()),
        scale=float(first.abs().max()),
        same_top_token=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
        tolerance=tolerance,
    )


def rerouted_share(model: PreTrainedModel) -> float:
    """Return the share of positions that a comparison leaves out: none, unless each token chooses
    its experts.

    A choice near a tie falls the other way by rounding alone, and then the token's logits are
    others; wrong weights differ everywhere.
    """
    return REROUTED if getattr(model.config.get_text_config(), "num_experts_per_tok", None) else 0.0


def largest_difference(by_position: torch.Tensor, rerouted: float) -> float:
    """Return the largest of the differences by position, the share `rerouted` of them left out;
    infinite where one is not a number.
    """
    kept = (
        by_position.nan_to_num(nan=float("inf"))
        .sort()
        .values[: len(by_position) - int(rerouted * len(by_position))]
    )
    return float(kept.max())


def logits_on(model: PreTrainedModel, probes: list[list[int]]) -> torch.Tensor:
    """Return the logits of each probe's tokens one after the other, shape (sum of lengths,
    vocabulary). Runs on every rank under FSDP.
    """
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        rows = [
            model(input_ids=torch.tensor([probe], device=_device_of(model)), use_cache=False)
            .logits[0]
            .float()
            .cpu()
            for probe in probes
        ]
    model.train(was_training)
    return torch.cat(rows)


def autocast(bf16: bool, fp16: bool, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return the mixed precision that a training ran in, or nothing."""
    import torch

    return (
        torch.autocast(device_type, dtype=torch.bfloat16 if bf16 else torch.float16)
        if bf16 or fp16
        else contextlib.nullcontext()
    )


def check_files(folder: Path, full_finetuning: bool, base: str) -> dict[str, Any]:
    """Check the saved tensors without a model: readable, finite, changed by training, and made for
    `base`.

    Args:
        folder: `adapter/` or `model/` as saved.
        full_finetuning: whether it holds a whole model.
        base: what the recipe's model was loaded from.

    Returns:
        {tensors, parameters}.

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
    import dataclasses

    if full_finetuning:
        saved = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, name_or_path=str(folder), revision=None)
        )
        model = load_model(saved, tokenizer)
        return model.to(device_with_room(model))
    from peft import PeftModel

    quantization = build_quantization_config(recipe)
    base = load_model(recipe, tokenizer, quantization)
    device = base.device if quantization else device_with_room(base)
    model = PeftModel.from_pretrained(base if quantization else base.to(device), str(folder))
    keep_saved_precision(model, folder)
    return model.to(device) if quantization is None else model


def device_with_room(model: PreTrainedModel) -> torch.device:
    """Return this process's GPU, or the CPU where there is none or its free memory does not hold
    the model: what was trained in shards on several GPUs may be too large for one.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info()
    return (
        torch.device("cuda", torch.cuda.current_device())
        if _SPARE * needed < free
        else torch.device("cpu")
    )


def keep_saved_precision(model: PreTrainedModel, folder: Path, adapter: str = "default") -> None:
    """Give an adapter the precision it was trained in, which loading it does not.

    PEFT raises adapters to float32 on loading; TRL trains those of a quantized base in bfloat16,
    which rounds differently.
    """
    from safetensors.torch import load_file

    saved = {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()}
    if len(saved) == 1:
        for name, parameter in model.named_parameters():
            if "lora_" in name and adapter in name.split("."):
                parameter.data = parameter.data.to(next(iter(saved)))


def _device_of(model: PreTrainedModel) -> torch.device:
    import torch

    device = next(model.parameters()).device
    return device if device.type != "meta" else torch.device("cpu")


CHECK_FILE = "weights_check.json"
NUM_PROMPTS, MAX_TOKENS, MIN_TOKENS = 8, 128, 16
MAX_LOGITS = 2**26  # values of one comparison: 256 MiB in float32
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write three short tips for someone who starts a new job.",
    "What is the capital of Australia, and why is it not Sydney?",
    "List the steps to make a cup of tea.",
)


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare models on, and where they come from."""

    rows: list[list[int]]
    source: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))

    def __str__(self) -> str:
        return f"{len(self.rows)} {self.source} ({self.num_tokens} tokens)"


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


def record_check(
    folder: Path,
    recipe: Recipe,
    probes: list[list[int]],
    logits: torch.Tensor,
    autocast: str | None,
) -> None:
    """Write `weights_check.json` into a folder of weights.

    Args:
        folder: the saved weights.
        recipe: the run's recipe, for its base.
        probes: token ids of real rows.
        logits: the trained model's on all of them, shape (sum of lengths, vocabulary).
        autocast: the half precision the logits were computed in, or None.
    """
    top = logits.float().max(dim=-1)
    record = RecordedCheck(
        tokens=[list(map(int, probe)) for probe in probes],
        top_tokens=top.indices.tolist(),
        top_logits=[round(value, 5) for value in top.values.tolist()],
        largest_logit=float(logits.abs().max()),
        autocast=autocast,
        base_fingerprint=base_fingerprint(recipe),
        sha256=weight_hashes(folder),
    )
    write_text(folder / CHECK_FILE, json.dumps(record.__dict__) + "\n")


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
    """Return prompts of the run's own kind: validation rows, prepared as its recipe says.

    Where the data is not there any more they are the rows that were recorded beside the weights,
    and without those four questions in the recipe's prompt format.

    Args:
        trained: a finished run.
        tokenizer: the run's.
        count: number of rows.
    """
    limit = min(MAX_TOKENS, max(MIN_TOKENS, MAX_LOGITS // (max(count, 1) * len(tokenizer))))
    try:
        return _validation_rows(trained, tokenizer, count, limit)
    except (RecipesError, OSError, ConnectionError):
        recorded = read_check(trained.weights)
        if recorded is not None:
            return Prompts(
                [ids[:limit] for ids in recorded.tokens],
                "recorded validation rows; the data is not readable now",
            )
        return _questions(trained, tokenizer, limit)


def _validation_rows(trained: TrainedRun, tokenizer: Any, count: int, limit: int) -> Prompts:
    from recipes_lib.data.preparation import prepare_data

    data = prepare_data(trained.recipe, tokenizer)
    rows = data.validation if data.validation is not None else data.train
    kind = (
        "validation rows"
        if data.validation is not None
        else "training rows; the run has no validation rows"
    )
    return Prompts([list(ids[:limit]) for ids in rows[:count]["input_ids"]], kind)


def _questions(trained: TrainedRun, tokenizer: Any, limit: int) -> Prompts:
    from recipes_lib.data.supervision import prompt_ids

    section = trained.prompt_section
    texts = [generation_prompt(section, tokenizer, instruction=question) for question in QUESTIONS]
    return Prompts(
        [prompt_ids(section, tokenizer, text)[:limit] for text in texts],
        "general questions; the data is not readable now",
    )
