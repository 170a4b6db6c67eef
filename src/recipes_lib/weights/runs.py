"""Trained runs loaded for use: one base model serves the base and every adapter trained on it,
without merging. Weights are compared with the hashes in run.json wherever they are read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.config.recipe import RECIPE_FILE, Recipe, load_recipe
from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.files import DamagedFile, read_object
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.check import SavedWeights, adapter_config, changed_files
from recipes_lib.weights.load import (
    attach,
    autocast,
    base_fingerprint,
    load_base,
    load_saved,
    model_path,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUST = "allow code that ships with the model, if the run's recipe asks for it too"
BASE = "base"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its recipe as it was resolved, and where its weights lie."""

    run: RunDirectory
    recipe: Recipe

    @property
    def weights(self) -> Path:
        """`adapter/` or `model/`."""
        return self.run.weights(self.full)

    @property
    def full(self) -> bool:
        """Whether the whole model was trained, not an adapter."""
        return self.recipe.lora is None

    @property
    def merged(self) -> Path:
        """`merged/`, where `recipes merge` puts the adapter folded into its base."""
        return self.run.path / "merged"

    @property
    def saved(self) -> SavedWeights:
        """What run.json says of the weights."""
        return SavedWeights.of(self.run.read_state())

    @property
    def prompt_section(self) -> DataSection:
        """The recipe's data section for asking the run: its chat template was saved with its
        tokenizer.
        """
        return self.recipe.data.model_copy(update={"chat_template": None})


def finished_run(run: RunDirectory, remote_code: bool = False) -> TrainedRun:
    """Return a run that has weights.

    Args:
        remote_code: whether the command line allowed code that ships with the model.

    Raises:
        RecipeError: the run is not finished, or its model needs code that was not allowed.
        EnvironmentFault: its weights or its settings are gone.
    """
    state = run.read_state()["state"]
    if state != "finished":
        what = f"run '{run.name}' is {state}, not finished"
        raise RecipeError(what, f"train it first; the command is in {run.path / 'command.txt'}")
    try:
        recipe = load_recipe(run.path / RECIPE_FILE)
    except (RecipeError, DamagedFile) as error:
        what = f"the settings of run '{run.name}' are damaged: {str(error).splitlines()[0]}"
        raise EnvironmentFault(what, f"write them again: {run.train_command()}") from None
    if recipe.model.trust_remote_code and not remote_code:
        raise RecipeError(
            f"the model of run '{run.name}' runs code that ships with it",
            "pass --trust-remote-code, as its training did",
        )
    trained = TrainedRun(run, recipe)
    if not trained.weights.is_dir():
        raise _lost(run, f"{trained.weights.name}/ is gone")
    return trained


def weights_damage(run: RunDirectory, full: bool) -> str | None:
    """Return what is wrong with a finished run's weights, or None where they are what was
    trained.
    """
    folder = run.weights(full)
    recorded = SavedWeights.of(run.read_state()).sha256
    if not folder.is_dir():
        return f"{folder.name}/ is gone"
    if not recorded:
        return f"run.json has no hashes of {folder.name}/"
    try:
        changed = changed_files(folder, recorded)
    except (DamagedFile, OSError) as error:
        return str(error).splitlines()[0]
    if not changed:
        return None
    if not (folder / changed[0]).is_file():
        return f"{folder.name}/{changed[0]} is gone"
    return f"{folder.name}/{', '.join(changed)} changed after the training: sha256 differs"


def check_weights(trained: TrainedRun) -> None:
    """Refuse weights that are not what was trained.

    Raises:
        EnvironmentFault: which file, and the command that makes the weights again.
    """
    if damage := weights_damage(trained.run, trained.full):
        raise _lost(trained.run, damage)


def check_base_run(name_or_path: str) -> None:
    """Refuse to train on damaged weights of a run (`runs/NAME/model` or `merged`).

    Raises:
        EnvironmentFault: which file, and the command that makes it again.
    """
    folder = Path(name_or_path).expanduser()
    if folder.name not in ("model", "merged") or not (folder.parent / "run.json").is_file():
        return
    run = RunDirectory(folder.resolve().parent.name, folder.resolve().parent.parent)
    if folder.name == "model":
        if damage := weights_damage(run, full=True):
            raise _lost(run, damage)
        return
    if changed := changed_files(folder, read_object(folder / "merge.json").get("sha256", {})):
        raise EnvironmentFault(
            f"{folder / changed[0]} is not what was merged",
            f"make it again: recipes merge {run.name}",
        )


def check_base_of(trained: TrainedRun) -> None:
    """Refuse a run whose base is another than it was; loads no model.

    Raises:
        RecipeError: another base, by name or by the content of its files.
        EnvironmentFault: the adapter's settings are gone or damaged.
    """
    recipe, name = trained.recipe, trained.recipe.model.name_or_path
    try:
        trained_on = adapter_config(trained.weights)["base_model_name_or_path"]
    except (DamagedFile, EnvironmentFault) as error:
        raise _lost(trained.run, str(error).splitlines()[0]) from None
    if Path(trained_on).name not in {Path(name).name, Path(model_path(recipe.model)).name}:
        what = f"{trained.weights} was trained on '{trained_on}', not on '{name}'"
        raise RecipeError(what, "load it on its own base")
    before, now = trained.saved.base_fingerprint, base_fingerprint(recipe)
    if before and now and before != now:
        revision = f" at revision '{recipe.model.revision}'" if recipe.model.revision else ""
        raise RecipeError(
            f"the base '{name}'{revision} is not the one that run '{trained.run.name}' was trained"
            " on: its weights differ",
            f"recorded {before[:12]}, found {now[:12]}",
            "restore the base, or set model.revision to the commit it was; an adapter means nothing"
            " on another base",
        )


def _lost(run: RunDirectory, damage: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"run '{run.name}' has no usable weights: {damage}",
        f"make them again from the run's newest whole checkpoint: {run.train_command()}",
    )


class Family:
    """Runs that share a base model, on one loaded copy of it.

    Args:
        runs: finished LoRA runs with the same model and quantization, or one full fine-tuning.

    Raises:
        RecipeError: the base is not the one that a run was trained on.
        EnvironmentFault: the base cannot be had, or an adapter's files are damaged.
    """

    def __init__(self, runs: Sequence[TrainedRun]) -> None:
        from transformers import AutoTokenizer

        self.runs = list(runs)
        for run in self.runs:
            if not run.full:
                check_base_of(run)
            check_weights(run)
        first = self.runs[0]
        self.recipe = first.recipe
        self.full = first.full
        self.tokenizers = {
            run.run.name: AutoTokenizer.from_pretrained(run.weights) for run in self.runs
        }
        self.tokenizer = self.tokenizers[first.run.name]
        if self.full:
            model = load_saved(first.weights, self.recipe, self.tokenizer)
        else:
            adapters = {self._adapter_of(run.run.name): run.weights for run in self.runs}
            model = attach(load_base(self.recipe, self.tokenizer), adapters)
        self.model = ready_to_answer(model)

    @property
    def names(self) -> list[str]:
        """What can answer: the base (unless it was fine-tuned as a whole) and the runs."""
        return [*([] if self.full else [BASE]), *(run.run.name for run in self.runs)]

    def prompting(self, name: str) -> tuple[DataSection, PreTrainedTokenizerBase]:
        """Return how `name` is asked: as it was trained; the base as the first run was."""
        run = next((run for run in self.runs if run.run.name == name), self.runs[0])
        return run.prompt_section, self.tokenizers[run.run.name]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[PreTrainedModel]:
        """Give the model with the adapter of one run active, or none for `base`."""
        if self.full:
            yield self.model
        elif name == BASE:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(self._adapter_of(name))
            yield self.model

    @contextlib.contextmanager
    def answering(self, name: str) -> Iterator[PreTrainedModel]:
        """As `using`, in the run's precision: without autocast the float32 adapters of a bf16 base
        would compute in float32. The base answers as it is loaded.
        """
        half = next((run.saved.autocast for run in self.runs if run.run.name == name), None)
        with self.using(name) as model, autocast(half, model.device.type):
            yield model

    def _adapter_of(self, name: str) -> str:
        """PEFT's name for it: a module's name must not contain the dots that a run's may."""
        return f"run{[run.run.name for run in self.runs].index(name)}"


def families(runs: Sequence[TrainedRun]) -> list[list[TrainedRun]]:
    """Group runs that one loaded base can serve; a full fine-tuning stands alone."""
    groups: dict[str, list[TrainedRun]] = {}
    for run in runs:
        recipe = run.recipe
        shared = [recipe.model.model_dump(), recipe.quantization]
        key = run.run.name if recipe.lora is None else json.dumps(shared, sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())
