"""Trained runs loaded for use: one base model serves the base and every adapter trained on it, without merging."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.errors import RecipeError
from recipes_lib.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes_lib.recipe.recipe import Recipe

BASE = "base"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its recipe as it was resolved, and where its weights lie."""

    run: RunDirectory
    recipe: Recipe

    @property
    def weights(self) -> Path:
        """`adapter/` or `model/`."""
        return self.run.weights(self.recipe.lora is None)


def finished_run(run: RunDirectory) -> TrainedRun:
    """Return a run that has weights.

    Raises:
        RecipeError: the run has not reached its end, or its weights are gone.
    """
    from recipes_lib.recipe.recipe import load_recipe

    state = run.read_state()["state"]
    if state != "finished":
        raise RecipeError(f"run '{run.name}' is {state}, not finished", f"train it first; the command is in {run.path / 'command.txt'}")
    trained = TrainedRun(run, load_recipe(run.path / "resolved.yaml"))
    if not trained.weights.is_dir():
        raise RecipeError(f"run '{run.name}' has no {trained.weights.name}/", "it was removed after the training; train the run again")
    return trained


class Family:
    """Runs that share a base model, on one loaded copy of it.

    Args:
        runs: finished LoRA runs with the same model and quantization, or one full fine-tuning.
    """

    def __init__(self, runs: Sequence[TrainedRun]) -> None:
        self.runs = list(runs)
        first = self.runs[0]
        self.recipe = first.recipe
        self.full = first.recipe.lora is None
        self.tokenizer = _tokenizer_of(first)
        self.model = _load_full(first, self.tokenizer) if self.full else _load_adapters(self.runs, self.tokenizer)

    @property
    def names(self) -> list[str]:
        """What can be asked to answer: the base (unless it was fine-tuned as a whole) and the runs."""
        return [*([] if self.full else [BASE]), *(one.run.name for one in self.runs)]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[PreTrainedModel]:
        """Give the model with the adapter of one run active, or none for `base`."""
        if self.full:
            yield self.model
        elif name == BASE:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self.model
        else:
            self.model.set_adapter(adapter_name(name))  # type: ignore[operator]
            yield self.model


def families(runs: Sequence[TrainedRun]) -> list[list[TrainedRun]]:
    """Group runs that one loaded base can serve; a full fine-tuning stands alone."""
    groups: dict[str, list[TrainedRun]] = {}
    for one in runs:
        recipe = one.recipe
        shared = [dataclasses.asdict(recipe.model), recipe.quantization]
        key = one.run.name if recipe.lora is None else json.dumps(shared, sort_keys=True)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def adapter_name(run_name: str) -> str:
    """Return a run's name as PEFT can use it: module names must not contain a dot.

    Example:
        >>> adapter_name("llama-2.1")
        'llama-2_1'
    """
    return run_name.replace(".", "_")


def check_base(adapter: Path, base: str) -> None:
    """Refuse an adapter that was trained on another base.

    Raises:
        RecipeError: the adapter names another base.
    """
    recorded = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if recorded != base and Path(str(recorded)).name != Path(base).name:
        raise RecipeError(f"{adapter} was trained on '{recorded}', not on '{base}'", "load it on its own base")


def _tokenizer_of(one: TrainedRun) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(one.weights)


def _load_full(one: TrainedRun, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from recipes_lib.training.weights_check import reload

    return reload(one.weights, one.recipe, full_finetuning=True, tokenizer=tokenizer).eval()


def _load_adapters(runs: Sequence[TrainedRun], tokenizer: PreTrainedTokenizerBase) -> Any:
    import torch
    from peft import PeftModel

    from recipes_lib.recipe.upstream import build_quantization_config
    from recipes_lib.training.model import load_model, model_path

    recipe = runs[0].recipe
    base = load_model(recipe, tokenizer, build_quantization_config(recipe))
    if torch.cuda.is_available() and recipe.quantization is None:
        base = base.to("cuda")
    for one in runs:
        check_base(one.weights, model_path(recipe.model))
    model = PeftModel.from_pretrained(base, str(runs[0].weights), adapter_name=adapter_name(runs[0].run.name))
    for one in runs[1:]:
        model.load_adapter(str(one.weights), adapter_name(one.run.name))
    return model.eval()
