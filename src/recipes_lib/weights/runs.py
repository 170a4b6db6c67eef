"""Finished runs: where their weights lie, damage found before use, and runs loaded: one base serves
every adapter that leaves it as it is.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes_lib.config.recipe import RECIPE_FILE, DataSection, Recipe, load_recipe
from recipes_lib.core.errors import DataError, EnvironmentFault, RecipeError
from recipes_lib.core.files import file_hash, hash_of, read_object
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUST = "run code that ships with the model, if the run's recipe allows it too"
BASE = "base"
RECORD = "merge.json"
OnBase = TypeVar("OnBase", bound=Any)  # what has run, recipe and full: a TrainedRun or a Model
ADAPTER_CONFIG = "adapter_config.json"


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
    def saved(self) -> dict[str, Any]:
        """What run.json says of the weights (`check_saved`)."""
        return dict(self.run.read_state().get("weights_check") or {})

    @property
    def prompt_section(self) -> DataSection:
        """The data section for asking the run: its chat template was saved with its tokenizer."""
        return self.recipe.data.model_copy(update={"chat_template": None})


def finished_run(run: RunDirectory, remote_code: bool = False) -> TrainedRun:
    """Return a run that has weights; `remote_code` is whether the command line allows such code."""
    state = run.read_state()["state"]
    if state != "finished":
        what = f"run '{run.name}' is {state}, not finished"
        raise RecipeError(what, f"go on, or wait for its end: {run.train_command()}")
    recipe = load_recipe(run.path / RECIPE_FILE)
    if recipe.model.trust_remote_code and not remote_code:
        what = f"the model of run '{run.name}' runs code that ships with it"
        raise RecipeError(what, "pass --trust-remote-code, as its training did")
    return TrainedRun(run, recipe)


def merge_record(trained: TrainedRun) -> dict[str, Any] | None:
    """Return merge.json of a `merged/` that is whole and of the present adapter, or None."""
    try:
        record = read_object(trained.merged / RECORD)
        if changed_files(trained.merged, record["sha256"]):
            return None
        adapter = file_hash(trained.weights / load.ADAPTER_WEIGHTS)
        return record if record["adapter_sha256"] == adapter else None
    except (LookupError, DataError):  # absent or damaged
        return None


def weights_damage(run: RunDirectory, full: bool) -> str | None:
    """Return what is wrong with a finished run's weights; None where they are what was trained."""
    folder = run.weights(full)
    recorded = run.read_state().get("weights_check", {}).get("sha256")
    if not recorded:
        return f"run.json has no hashes of {folder.name}/"
    try:
        changed = changed_files(folder, recorded)
    except (DataError, OSError) as error:
        return str(error).splitlines()[0]
    return f"{folder.name}/{changed[0]} was changed or is gone" if changed else None


def check_weights(run: RunDirectory, full: bool) -> None:
    """Refuse weights that are not what was trained."""
    damage = weights_damage(run, full)
    if damage:
        what = f"run '{run.name}' has no usable weights: {damage}"
        hint = f"rebuild them from the run's newest complete checkpoint: {run.train_command()}"
        raise EnvironmentFault(what, hint)


def check_base_run(name_or_path: str) -> None:
    """Refuse to train on damaged weights of a run (`runs/NAME/model` or `merged`)."""
    folder = Path(name_or_path).expanduser().resolve()
    if not (folder.parent / "run.json").is_file():
        return
    run = RunDirectory(folder.parent.name, folder.parent.parent)
    if folder.name == "model":
        check_weights(run, full=True)
    changed = changed_files(folder, read_object(folder / RECORD).get("sha256", {}))
    if changed:
        what = f"{folder / changed[0]} is not what was merged"
        raise EnvironmentFault(what, f"make it again: recipes merge {run.name}")


def check_base_of(trained: TrainedRun) -> None:
    """Refuse a run whose base is another than it was; loads no model."""
    trained_on = trained.saved.get("base_fingerprint")
    now = load.base_fingerprint(trained.recipe)
    if trained_on and now and trained_on != now:
        base = trained.recipe.model.name_or_path
        run = trained.run.name
        what = f"'{base}' is not the base of run '{run}': its weights differ ({now[:12]})"
        raise RecipeError(what, "restore the base, or set model.revision to its commit then")


def recorded_names(folder: Path) -> list[str]:
    """Return the names of the files that decide what a model computes and how it reads text."""
    patterns = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
    return sorted({file.name for pattern in patterns for file in folder.glob(pattern)})


def recorded_hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of the recorded files, or of those in `names`."""
    if names is None:
        names = recorded_names(folder)
    hashes = {name: file_hash(folder / name) for name in names}
    if ADAPTER_CONFIG in hashes:
        # without the base's name and revision, which `check_base_of` checks: it may be moved
        settings = read_object(folder / ADAPTER_CONFIG)
        for key in ("base_model_name_or_path", "revision"):
            settings.pop(key, None)
        text = json.dumps(settings, sort_keys=True)
        hashes[ADAPTER_CONFIG] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Return which of the recorded files are not what they were, those that are gone first."""
    gone = [name for name in recorded if not (folder / name).is_file()]
    now = recorded_hashes(folder, recorded.keys() - gone)
    return gone + [name for name in recorded if name in now and recorded[name] != now[name]]


class Family:
    """Runs that share a base model, on one loaded copy of it; or one full fine-tuning."""

    def __init__(self, runs: Sequence[TrainedRun]) -> None:
        from transformers import AutoTokenizer

        first = runs[0]
        self.recipe = first.recipe
        self.full = first.full
        self.runs = {run.run.name: run for run in runs}
        self.names = [*self.runs] if _is_alone(first) else [BASE, *self.runs]
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        for name, run in self.runs.items():
            check_weights(run.run, run.full)
            self.tokenizers[name] = AutoTokenizer.from_pretrained(run.weights)
        # PEFT's names of the adapters: a module's must not contain the dots that a run's may
        self.adapters: dict[str, str] = {}
        tokenizer = self.tokenizers[first.run.name]
        if self.full:
            model = load.load_saved(first.weights, self.recipe, tokenizer)
        else:
            base = load.load_base(self.recipe, tokenizer)
            folders: dict[str, Path] = {}
            for number, (name, run) in enumerate(self.runs.items()):
                check_base_of(run)  # now: until here its files may have been on the Hub alone
                self.adapters[name] = f"run{number}"
                folders[self.adapters[name]] = run.weights
            model = load.attach(base, folders)
        self.model = ready_to_answer(model)

    def prompting(self, name: str) -> "tuple[DataSection, PreTrainedTokenizerBase]":
        """Return how `name` is asked: as it was trained; the base as the first run was."""
        if name == BASE:
            name = next(iter(self.runs))
        return self.runs[name].prompt_section, self.tokenizers[name]

    @contextmanager
    def answering(self, name: str) -> "Iterator[PreTrainedModel]":
        """Give the model with the adapter of a run, or none for `base`, in the run's precision."""
        import torch

        half = self.runs[name].saved.get("autocast") if name in self.runs else None
        with ExitStack() as stack:
            if name in self.adapters:
                self.model.set_adapter(self.adapters[name])
            elif not self.full:
                stack.enter_context(self.model.disable_adapter())
            if half:
                # else the float32 adapters of a bf16 base would compute in float32
                device = self.model.device.type
                stack.enter_context(torch.autocast(device, getattr(torch, half)))
            yield self.model


def _is_alone(run: Any) -> bool:
    return run.full or run.recipe.changes_base


def families(runs: Sequence[OnBase]) -> list[list[OnBase]]:
    """Group runs, or models, that one loaded base can serve as it is."""
    groups: dict[str, list[OnBase]] = defaultdict(list)
    for run in runs:
        key = run.run.name
        if not _is_alone(run):
            key = hash_of(run.recipe.model.model_dump(), run.recipe.quantization)
        groups[key].append(run)
    return list(groups.values())
