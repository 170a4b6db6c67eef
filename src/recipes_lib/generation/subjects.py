"""What is evaluated: finished runs, base models and any other model, grouped so that each base is loaded once.

A model without a run gets a run directory of its own, `base--<model>--<hash8>`, whose hash covers weights, precision and prompt
format: the same model asked in another format is another directory.
"""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recipes_lib.data.conversations import Message
from recipes_lib.errors import RecipeError
from recipes_lib.generation.fingerprints import folder_fingerprint, hash_of, model_fingerprint
from recipes_lib.recipe.project import runs_root
from recipes_lib.recipe.recipe import Recipe
from recipes_lib.recipe.sections import DataSection, LaunchSection, ModelSection, RunSection
from recipes_lib.runs.directory import RunDirectory, open_run
from recipes_lib.training.trained import BASE, Family, TrainedRun, families, finished_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Target:
    """One word of the command line: a finished run, or a model as a recipe that was never trained."""

    word: str
    recipe: Recipe
    trained: TrainedRun | None = None

    @property
    def is_base(self) -> bool:
        """Whether this is a model without a run."""
        return self.trained is None

    @property
    def is_stand_in(self) -> bool:
        """Whether the recipe was made up for a model that is no run's base."""
        return self.trained is None and not self.recipe.train


def find_targets(words: Sequence[str], prompt_format: str = "auto", dtype: str = "bfloat16", *, any_model: bool = False) -> list[Target]:
    """Return what the words name: runs, local models, packaged models, Hub ids.

    A model that is the base of a run among the words is asked as that run is: in its precision and prompt format.

    Args:
        words: run names or folders, model folders, `package:` names, Hub ids.
        prompt_format: `generation.prompt_format` of the eval recipe.
        dtype: precision of models that are no run's base.
        any_model: take any other word as a model that a server has.

    Raises:
        RecipeError: a word is neither a run nor a model, a run is not finished, or a run was trained with another prompt format.
    """
    opened = {word: open_run(word) for word in words if _is_run(word)}
    stand_ins = {word: recipe for word, run in opened.items() if (recipe := stored_recipe(run))}
    runs: dict[str, TrainedRun] = {word: finished_run(run) for word, run in opened.items() if word not in stand_ins}
    for one in runs.values():
        trained_with = one.recipe.data.prompt_format
        if prompt_format not in ("auto", trained_with):
            raise RecipeError(
                f"run '{one.run.name}' was trained with prompt format {trained_with}, generation.prompt_format asks for {prompt_format}",
                "leave generation.prompt_format at auto",
            )
    targets = []
    for word in dict.fromkeys(words):
        if word in runs:
            targets.append(Target(word, runs[word].recipe, runs[word]))
            continue
        if word in stand_ins:
            targets.append(Target(stand_ins[word].model.name_or_path, stand_ins[word]))
            continue
        if not (any_model or _is_model(word)):
            open_run(word)  # raises, with the names of similar runs
        same = [one.recipe for one in runs.values() if one.recipe.model.name_or_path == word]
        targets.append(base_target(same[0]) if same else Target(word, stand_in_recipe(word, prompt_format, dtype)))
    return targets


def base_target(recipe: Recipe) -> Target:
    """Return the base model of a run, asked as the run is."""
    return Target(recipe.model.name_or_path, dataclasses.replace(recipe, lora=None))


def _is_run(word: str) -> bool:
    path = Path(word)
    return (len(path.parts) > 1 and (path / "run.json").is_file()) or (runs_root() / path.name / "run.json").is_file()


def _is_model(word: str) -> bool:
    return (
        word.startswith("package:") or (Path(word) / "config.json").is_file() or (word.count("/") == 1 and not word.startswith((".", "/")))
    )


def stand_in_recipe(word: str, prompt_format: str = "auto", dtype: str = "bfloat16") -> Recipe:
    """Return a recipe that stands for a model nobody trained; the prompt format `auto` is settled when its tokenizer is there."""
    chosen: Any = "chat" if prompt_format == "auto" else prompt_format
    return Recipe(
        path=Path(word),
        name=prompt_format,
        model=ModelSection(name_or_path=word, dtype=dtype),  # type: ignore[arg-type]
        data=DataSection(source="", prompt_format=chosen),
        run=RunSection(),
        launch=LaunchSection(),
        train={},
        lora=None,
        quantization=None,
        origins={},
        warnings=(),
        base_dir=Path.cwd(),
    )


def record_base(run: RunDirectory, recipe: Recipe, fingerprint: str, prompts: Any) -> None:
    """Write run.json of a model without a run, so that its directory name can be used like a run's."""
    if run.exists():
        return
    stand_in: dict[str, Any] = {
        "model": dataclasses.asdict(recipe.model),
        "data": {"source": "", **{key: getattr(recipe.data, key) for key in ("prompt_format", "chat_template", "system_prompt")}},
        "quantization": recipe.quantization,
        "folder": str(recipe.base_dir),
    }
    stand_in["data"]["prompt_format"] = prompts.name
    run.write_state("finished", kind="base", stand_in=stand_in, fingerprint=fingerprint, prompt_format_hash=prompts.hash)


def stored_recipe(run: RunDirectory) -> Recipe | None:
    """Return the stand-in recipe of a directory that `record_base` made, or None for a trained run."""
    stored = run.read_state().get("stand_in")
    if stored is None:
        return None
    recipe = stand_in_recipe(stored["model"]["name_or_path"], stored["data"]["prompt_format"])
    model, data = ModelSection(**stored["model"]), DataSection(**stored["data"])
    return dataclasses.replace(recipe, model=model, data=data, quantization=stored["quantization"], base_dir=Path(stored["folder"]))


class Format(Protocol):
    """How conversations become prompts."""

    hash: str

    def render(self, messages: Sequence[Message]) -> tuple[str | None, tuple[int, ...]]:
        """Return the prompt's text and token ids; no text where only the server knows the format."""


class ServerFormat:
    """The chat template of the server that has the model."""

    hash = "server"
    name = "server"

    def render(self, messages: Sequence[Message]) -> tuple[None, tuple[int, ...]]:
        """Return nothing: the messages are sent as they are."""
        return None, ()


class PromptFormat:
    """Conversations rendered as the model was trained to read them; `hash` identifies the format."""

    def __init__(self, section: DataSection, tokenizer: Any, folder: Path) -> None:
        from recipes_lib.data.prompts import format_hash

        self.section, self.tokenizer, self.folders = section, tokenizer, [folder]
        self.name = section.prompt_format
        self.hash = format_hash(section, tokenizer, self.folders)

    def render(self, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
        """Return the prompt's text and token ids."""
        from recipes_lib.data.prompts import generation_prompt
        from recipes_lib.data.supervision import prompt_ids

        text = generation_prompt(self.section, self.tokenizer, messages=list(messages), folders=self.folders)
        return text, tuple(prompt_ids(self.section, self.tokenizer, text))


@dataclass
class Subject:
    """A target that is ready to answer.

    `engine_args` are what an engine in this process is built from: model, tokenizer and the context that activates the adapter.
    """

    target: Target
    run: RunDirectory
    fingerprint: str
    prompts: Any
    model: PreTrainedModel | None = None
    using: Any = None

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return self.run.name


@contextmanager
def loaded(targets: Sequence[Target], weights: bool = True) -> Iterator[list[Subject]]:
    """Give the subjects of targets that share one base, loaded once; afterwards its memory is free again.

    Args:
        targets: one group of `grouped`.
        weights: False loads tokenizers and fingerprints only, for a server that has the weights.
    """
    subjects = _load_group(targets, weights)
    try:
        yield subjects
    finally:
        for subject in subjects:
            subject.model = subject.using = None
        gc.collect()
        _empty_cache()


def grouped(targets: Sequence[Target]) -> list[list[Target]]:
    """Group targets that one loaded base serves: its runs, and the base itself."""
    groups: list[list[Target]] = []
    for group in families([target.trained for target in targets if target.trained]):
        names = {one.run.name for one in group}
        groups.append([target for target in targets if target.trained and target.trained.run.name in names])
    for target in targets:
        if target.trained:
            continue
        home = next((group for group in groups if _serves(group[0], target)), None)
        if home is None:
            groups.append([target])
        else:
            home.append(target)
    return groups


def _serves(first: Target, target: Target) -> bool:
    same_model = first.recipe.model == target.recipe.model and first.recipe.quantization == target.recipe.quantization
    return same_model and first.trained is not None and first.recipe.lora is not None


def _load_group(targets: Sequence[Target], weights: bool) -> list[Subject]:
    from recipes_lib.training.model import load_tokenizer, model_path

    trained = [target.trained for target in targets if target.trained]
    if trained and weights:
        family = Family(trained)
        return [_subject(target, family.tokenizer, family.model, _user_of(family, target)) for target in targets]
    subjects = []
    for target in targets:
        if target.is_stand_in and not weights:
            subjects.append(_served(target))
            continue
        if target.trained:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(target.trained.weights)
        else:
            model_path(target.recipe.model)
            tokenizer = load_tokenizer(target.recipe)
        subjects.append(_subject(target, tokenizer, _load_bare(target.recipe, tokenizer) if weights else None, None))
    return subjects


def _served(target: Target) -> Subject:
    """A model that only a server has: its name stands for its weights, its server renders the prompts."""
    prompts = ServerFormat()
    fingerprint = hash_of("served", target.word)
    return Subject(target, _base_directory(target.word, fingerprint, prompts.hash), fingerprint, prompts)


def _base_directory(path: str, fingerprint: str, format_hash: str) -> RunDirectory:
    """The run directory of a model without a run."""
    short = _NOT_IN_NAMES.sub("-", Path(path).name).strip("-.")[:60]
    return RunDirectory(f"base--{short}--{hash_of(fingerprint, format_hash)[:8]}")


def _user_of(family: Family, target: Target) -> Any:
    name = target.trained.run.name if target.trained else BASE

    def using() -> AbstractContextManager[Any]:
        return family.using(name)

    return using


def _load_bare(recipe: Recipe, tokenizer: Any) -> PreTrainedModel:
    import torch

    from recipes_lib.recipe.upstream import build_quantization_config
    from recipes_lib.training.model import load_model

    model = load_model(recipe, tokenizer, build_quantization_config(recipe)).eval()
    return model.to("cuda") if torch.cuda.is_available() and recipe.quantization is None else model


def _subject(target: Target, tokenizer: Any, model: Any, using: Any) -> Subject:
    """Return a subject with its fingerprint, prompt format and run directory."""
    from recipes_lib.training.model import model_path

    recipe = target.recipe
    section = recipe.data
    if recipe.name == "auto" and not getattr(tokenizer, "chat_template", None):
        section = dataclasses.replace(section, prompt_format="dolly")
    prompts = PromptFormat(section, tokenizer, recipe.base_dir)
    precision = [recipe.model.dtype, recipe.quantization]
    if target.trained and recipe.lora is None:
        fingerprint = hash_of(folder_fingerprint(target.trained.weights), precision)
    else:
        base = model_fingerprint(recipe.model, model_path(recipe.model))
        fingerprint = hash_of(base, precision, folder_fingerprint(target.trained.weights) if target.trained else None)
    if target.trained:
        check_format(target.trained, prompts)
        return Subject(target, target.trained.run, fingerprint, prompts, model, using)
    run = _base_directory(model_path(recipe.model), fingerprint, prompts.hash)
    return Subject(target, run, fingerprint, prompts, model, using)


def check_format(one: TrainedRun, prompts: PromptFormat) -> None:
    """Refuse to ask a run in another prompt format than it was trained in.

    Raises:
        RecipeError: the format's hash differs from the one that training recorded.
    """
    recorded = one.run.read_state().get("guard", {}).get("prompt_format_hash")
    if recorded and recorded != prompts.hash:
        raise RecipeError(
            f"run '{one.run.name}' was trained with another prompt format than its files give now ({recorded[:12]} -> {prompts.hash[:12]})",
            "the chat template, the system prompt or the end token changed since: restore it, or train the run again",
        )


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
