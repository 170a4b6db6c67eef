"""Runs and their weights: the proof that what lies on the disk is what was trained, damage found
before use, and runs loaded: one base serves every adapter that leaves it as it is.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes_lib.config.recipe import RECIPE_FILE, DataSection, Recipe, load_recipe
from recipes_lib.core.errors import DataError, EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.files import file_hash, hash_of, read_object
from recipes_lib.core.ranks import on_main_rank, rank
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import (
    ADAPTER_WEIGHTS,
    attach,
    base_fingerprint,
    load_base,
    load_saved,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUST = "run code that ships with the model, if the run's recipe allows it too"
BASE = "base"
RECORD = "merge.json"
OnBase = TypeVar("OnBase", bound=Any)  # what has run, recipe and full: a TrainedRun or a Model
ADAPTER_CONFIG = "adapter_config.json"
# The files that decide what a model computes and how it reads text.
RECORDED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


# ---- a finished run ----


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
        is_whole = not changed_files(trained.merged, record["sha256"])
        adapter = file_hash(trained.weights / ADAPTER_WEIGHTS)
        return record if is_whole and record["adapter_sha256"] == adapter else None
    except (LookupError, DataError):  # absent or damaged
        return None


def weights_damage(run: RunDirectory, full: bool) -> str | None:
    """Return what is wrong with a finished run's weights; None where they are what was trained."""
    folder, recorded = run.weights(full), run.read_state().get("weights_check", {}).get("sha256")
    if not recorded:
        return f"run.json has no hashes of {folder.name}/"
    try:
        changed = changed_files(folder, recorded)
    except (DataError, OSError) as error:
        return str(error).splitlines()[0]
    return f"{folder.name}/{changed[0]} was changed or is gone" if changed else None


def check_weights(run: RunDirectory, full: bool) -> None:
    """Refuse weights that are not what was trained."""
    if damage := weights_damage(run, full):
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
    if changed := changed_files(folder, read_object(folder / RECORD).get("sha256", {})):
        what = f"{folder / changed[0]} is not what was merged"
        raise EnvironmentFault(what, f"make it again: recipes merge {run.name}")


def check_base_of(trained: TrainedRun) -> None:
    """Refuse a run whose base is another than it was; loads no model."""
    before, now = trained.saved.get("base_fingerprint"), base_fingerprint(trained.recipe)
    if before and now and before != now:
        base, run = trained.recipe.model.name_or_path, trained.run.name
        what = f"'{base}' is not the base of run '{run}': its weights differ ({now[:12]})"
        raise RecipeError(what, "restore the base, or set model.revision to its commit then")


def recorded_hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of every file that decides what a model answers. That of an adapter's
    settings leaves out the base's name and revision: it may be moved, and has its own check.
    """
    if names is None:
        names = sorted({file.name for pattern in RECORDED for file in folder.glob(pattern)})
    hashes = {name: file_hash(folder / name) for name in names}
    if ADAPTER_CONFIG in hashes:
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


# ---- the proof ----


def check_saved(
    model: Any, folder: Path, *, base: str, may_change_nothing: bool = False, **known: str | None
) -> dict[str, Any]:
    """Prove that `folder` holds the trained model; every rank has to call. Returns what run.json
    says of the weights: how many tensors were compared, and the SHA-256 of each file that decides
    what the model answers.

    Args:
        base: what `adapter_config.json` has to name.
        may_change_nothing: whether the training had no step with a learning rate above 0.
    """
    count, is_zero, problems = _compare_bytes(model, folder)

    def prove() -> dict[str, Any]:
        wrong = problems or list(_name_problems(model, folder, base))
        if wrong:
            what = f"{wrong[0]} ({len(wrong)} in all)"
            raise RecipesError(f"the saved weights are not the trained ones: {what}")
        if is_zero and not may_change_nothing:
            what = f"the adapter in {folder} changes nothing: every trained tensor is zero"
            hint = "was the learning rate 0 at every step? train more, or lower train.warmup_steps"
            raise RecipesError(what, hint)
        return {"tensors": count, "sha256": recorded_hashes(folder), "base": base, **known}

    return on_main_rank(prove)


def _compare_bytes(model: Any, folder: Path) -> tuple[int, bool, list[str]]:
    """Compare every trained tensor with the files; return how many there are, whether all of them
    are zero, and the problems. The other ranks wait in the gathering: no error may cut it short.
    """
    import torch
    from safetensors import safe_open

    count, is_zero = 0, True
    problems: list[str] = []
    files: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")) if rank() == 0 else ():
        opened = safe_open(file, framework="pt")
        files |= dict.fromkeys(opened.keys(), opened)
    aliases: dict[int, set[str]] = defaultdict(set)  # a file needs one name of a tied parameter
    for name, parameter in _named(model):
        aliases[id(parameter)].add(name)
    saved_as_another = {
        name for names in aliases.values() if names & files.keys() for name in names - files.keys()
    }
    for name, tensor in trained_tensors(model):
        if tensor is None:
            continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
        elif name in files:
            if not same_bytes(tensor, files[name].get_tensor(name)):
                problems.append(f"{name} differs from the trained one")
        elif name not in saved_as_another:
            problems.append(f"{name} was not saved")
        count += 1
        is_zero &= "lora_A" in name or not bool(tensor.any())
    return count, is_zero, problems


def _name_problems(model: Any, folder: Path, base: str) -> Iterator[str]:
    """Load the files onto a model without weights, and yield the names that do not fit."""
    import torch
    from peft import PeftModel
    from torch.distributed.fsdp import FSDPModule

    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    is_sharded = isinstance(plain, FSDPModule)  # it puts a class of its own in front
    kind: Any = type(plain).__mro__[2] if is_sharded else type(plain)
    if plain is model:
        _, info = kind.from_pretrained(
            folder, device_map="meta", dtype="auto", output_loading_info=True
        )
        missing = {*info["missing_keys"], *map(str, info["mismatched_keys"])}
        trained = {name for name, weight in _named(model) if weight.requires_grad}
        yield from (f"{name} is missing in the file" for name in trained & missing)
        yield from (f"{name} in the file belongs to no layer" for name in info["unexpected_keys"])
        return
    recorded = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if recorded != base:
        yield f"the adapter names the base '{recorded}', but '{base}' was trained"
        return
    config = copy.deepcopy(plain.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        empty = kind(config)
    if model.active_peft_config.trainable_token_indices:
        # peft 0.21 moves a copy of their rows beside loaded embeddings, and cannot without memory
        for layer in (empty.get_input_embeddings(), empty.get_output_embeddings()):
            layer.to_empty(device="cpu")
    try:
        attach(empty, {"default": folder}, without_base_weights=True)
    except RecipesError as error:
        yield error.what


def trained_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield each trained tensor under its name in the file, whole, one at a time.

    Every rank has to call (FSDP2 gathers the shards); only rank 0 gets the tensors, and all of them
    at once where names in the file are not those of parameters (experts, some with images).
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from torch.distributed.tensor import DTensor
    from transformers.core_model_loading import revert_weight_conversion

    def whole(tensor: torch.Tensor) -> torch.Tensor | None:
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return gathered.detach().cpu() if rank() == 0 else None

    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    if isinstance(model, PeftModel):
        with_rows = True if getattr(model, "rows_added", 0) else "auto"
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=with_rows)
    else:
        trained = {name for name, weight in _named(model) if weight.requires_grad}
        state = {name: value for name, value in state.items() if name in trained}
        shapes = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in state.items()
        }
        if {*revert_weight_conversion(model, shapes)} != state.keys():
            names = {name for name, _ in _named(model, once=True)}
            gathered = {name: whole(state[name]) for name in state if name in names}
            if rank() == 0:
                yield from revert_weight_conversion(model, gathered).items()
            return
    for name, tensor in state.items():
        yield name, whole(tensor)


def _named(model: Any, once: bool = False) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter, tied ones by each of their names unless only `once`."""
    for name, parameter in model.named_parameters(remove_duplicate=once):
        yield name.replace("_orig_mod.", ""), parameter


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes; `torch.equal` alone
    takes float32 for bfloat16, -0.0 for 0.0, and a NaN for unequal to itself.
    """
    import torch

    flat = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in (first, second)]
    is_alike = first.dtype == second.dtype and first.shape == second.shape
    return is_alike and torch.equal(*(tensor.view(torch.uint8) for tensor in flat))


# ---- runs that answer ----


class Family:
    """Runs that share a base model, on one loaded copy of it; or one full fine-tuning."""

    def __init__(self, runs: Sequence[TrainedRun]) -> None:
        from transformers import AutoTokenizer

        self.recipe, self.full = runs[0].recipe, runs[0].full
        self.runs = {run.run.name: run for run in runs}
        self.names = [*self.runs] if _is_alone(runs[0]) else [BASE, *self.runs]
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
            if name in self.runs and (half := self.runs[name].saved.get("autocast")):
                device = self.model.device.type
                stack.enter_context(torch.autocast(device, getattr(torch, half)))
            yield self.model


def _is_alone(run: Any) -> bool:
    return run.full or run.recipe.changes_base


def families(runs: Sequence[OnBase]) -> list[list[OnBase]]:
    """Group runs, or models, that one loaded base can serve as it is."""
    groups: dict[str, list[OnBase]] = defaultdict(list)
    for run in runs:
        shared = hash_of(run.recipe.model.model_dump(), run.recipe.quantization)
        groups[run.run.name if _is_alone(run) else shared].append(run)
    return list(groups.values())
