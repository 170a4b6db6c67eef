"""Trained runs loaded for use: one base model serves itself and every adapter trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes_lib.config.recipe import RECIPE_FILE, Recipe, load_recipe
from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError, EnvironmentFault, RecipeError
from recipes_lib.core.files import DamagedFile, file_hash, hash_of, read_object
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.check import SavedWeights, changed_files
from recipes_lib.weights.load import (
    ADAPTER_WEIGHTS,
    attach,
    base_fingerprint,
    load_base,
    load_saved,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUST = "allow code that ships with the model, if the run's recipe asks for it too"
BASE = "base"
RECORD = "merge.json"
OnBase = TypeVar("OnBase", bound=Any)  # what has run, recipe and full: a TrainedRun or a Model


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its recipe as it was resolved, and where its weights lie."""

    run: RunDirectory
    recipe: Recipe

    @property
    def full(self) -> bool:
        """Whether the whole model was trained, not an adapter."""
        return self.recipe.lora is None

    @property
    def weights(self) -> Path:
        """`adapter/` or `model/`."""
        return self.run.weights(self.full)

    @property
    def merged(self) -> Path:
        """`merged/`, where `recipes merge` puts the adapter folded into its base."""
        return self.run.path / "merged"

    @property
    def saved(self) -> SavedWeights:
        """What run.json says of the weights."""
        return SavedWeights(**self.run.read_state().get("weights_check", {}))

    @property
    def prompt_section(self) -> DataSection:
        """The data section for asking the run: its chat template was saved with its tokenizer."""
        return self.recipe.data.model_copy(update={"chat_template": None})


def finished_run(run: RunDirectory, remote_code: bool = False) -> TrainedRun:
    """Return a run that has weights; `remote_code` is whether the command line allows such code."""
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
        what = f"the model of run '{run.name}' runs code that ships with it"
        raise RecipeError(what, "pass --trust-remote-code, as its training did")
    return TrainedRun(run, recipe)


@dataclass
class MergeRecord:
    """merge.json: what was merged, in which precision, and what the comparison of logits found.

    Args:
        effect: how far the adapter moves the base's logits, on average.
        difference: how far merging moves the adapter's, on average.
    """

    adapter_sha256: str
    dtype: str
    effect: float
    difference: float
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def lost(self) -> float:
        """The difference as a share of the adapter's effect."""
        return self.difference / self.effect if self.effect else float("inf")


def merge_record(trained: TrainedRun) -> MergeRecord | None:
    """Return the record of a `merged/` that is whole and of the present adapter, or None."""
    try:
        record = MergeRecord(**read_object(trained.merged / RECORD))
        if changed_files(trained.merged, record.sha256):
            return None
    except (TypeError, DataError):  # absent or damaged
        return None
    adapter = file_hash(trained.weights / ADAPTER_WEIGHTS)
    return record if record.adapter_sha256 == adapter else None


def weights_damage(run: RunDirectory, full: bool) -> str | None:
    """Return what is wrong with a finished run's weights; None where they are what was trained."""
    folder, recorded = run.weights(full), run.read_state().get("weights_check", {}).get("sha256")
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
    damage = "was changed after the training" if (folder / changed[0]).is_file() else "is gone"
    return f"{folder.name}/{changed[0]} {damage}"


def check_weights(run: RunDirectory, full: bool) -> None:
    """Refuse weights that are not what was trained."""
    if damage := weights_damage(run, full):
        what = f"run '{run.name}' has no usable weights: {damage}"
        hint = f"make them again from the run's newest whole checkpoint: {run.train_command()}"
        raise EnvironmentFault(what, hint)


def check_base_run(name_or_path: str) -> None:
    """Refuse to train on damaged weights of a run (`runs/NAME/model` or `merged`)."""
    folder = Path(name_or_path).expanduser().resolve()
    if not (folder.parent / "run.json").is_file():
        return
    run = RunDirectory(folder.parent.name, folder.parent.parent)
    if folder.name == "model":
        check_weights(run, full=True)
    if changed := changed_files(folder, read_object(folder / RECORD).get("sha256", {})):
        what = f"{folder / changed[0]} is not what was merged"
        raise EnvironmentFault(what, f"make it again: recipes merge {run.name}")


def check_base_of(trained: TrainedRun) -> None:
    """Refuse a run whose base is another than it was; loads no model."""
    before, now = trained.saved.base_fingerprint, base_fingerprint(trained.recipe)
    if before and now and before != now:
        base, run = trained.recipe.model.name_or_path, trained.run.name
        what = f"'{base}' is not the base of run '{run}': its weights differ ({now[:12]})"
        raise RecipeError(what, "restore the base, or set model.revision to the commit it was")


class Family:
    """Runs that share a base model, on one loaded copy of it; or one full fine-tuning.

    Attributes:
        names: what can answer: the base (unless it was fine-tuned as a whole) and the runs.
    """

    def __init__(self, runs: Sequence[TrainedRun]) -> None:
        from transformers import AutoTokenizer

        self.recipe, self.full = runs[0].recipe, runs[0].full
        self.runs = {run.run.name: run for run in runs}
        self.names = [*self.runs] if self.full else [BASE, *self.runs]
        for run in runs:
            check_weights(run.run, run.full)
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {
            name: AutoTokenizer.from_pretrained(run.weights) for name, run in self.runs.items()
        }
        # PEFT's names of the adapters: a module's must not contain the dots that a run's may
        self.adapters: dict[str, str] = {}
        tokenizer = self.tokenizers[runs[0].run.name]
        if self.full:
            model = load_saved(runs[0].weights, self.recipe, tokenizer)
        else:
            self.adapters = {name: f"run{number}" for number, name in enumerate(self.runs)}
            base = load_base(self.recipe, tokenizer)
            for run in runs:
                check_base_of(run)  # now: until here its files may have been on the Hub alone
            folders = {self.adapters[name]: run.weights for name, run in self.runs.items()}
            model = attach(base, folders)
        self.model = ready_to_answer(model)

    def prompting(self, name: str) -> tuple[DataSection, PreTrainedTokenizerBase]:
        """Return how `name` is asked: as it was trained; the base as the first run was."""
        name = next(iter(self.runs)) if name == BASE else name
        return self.runs[name].prompt_section, self.tokenizers[name]

    @contextmanager
    def answering(self, name: str) -> Iterator[PreTrainedModel]:
        """Give the model with the adapter of a run, or none for `base`, in the run's precision:
        without autocast the float32 adapters of a bf16 base would compute in float32.
        """
        import torch

        with ExitStack() as stack:
            if name in self.adapters:
                self.model.set_adapter(self.adapters[name])
            elif not self.full:
                stack.enter_context(self.model.disable_adapter())
            if name in self.runs and (half := self.runs[name].saved.autocast):
                device = self.model.device.type
                stack.enter_context(torch.autocast(device, dtype=getattr(torch, half)))
            yield self.model


def families(runs: Sequence[OnBase]) -> list[list[OnBase]]:
    """Group runs, or models, that one loaded base can serve; a full fine-tuning stands alone."""
    groups: dict[str, list[OnBase]] = {}
    for run in runs:
        shared = hash_of(run.recipe.model.model_dump(), run.recipe.quantization)
        groups.setdefault(run.run.name if run.full else shared, []).append(run)
    return list(groups.values())
