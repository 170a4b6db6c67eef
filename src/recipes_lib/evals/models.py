"""What is evaluated: finished runs, their base, and any other model, each a `Model`.

`resolve` reads words of the command line and loads tokenizers alone; `loaded` gives one base and
its adapters after each other. A model without a run gets a run folder of its own,
`base--<model>--<hash8>`, whose hash covers weights, precision and prompt format: the same model
asked in another format is another folder, and its name can be used like a run's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import COMMAND_LINE, Origin
from recipes_lib.config.preflight import KEY as MODEL_KEY
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import (
    ASKED,
    DataSection,
    LaunchSection,
    ModelSection,
    RunSection,
)
from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import folder_fingerprint, hash_of, model_fingerprint
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, open_run
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import format_hash, generation_prompt
from recipes_lib.data.supervision import prompt_ids
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.models.families import ready_to_answer
from recipes_lib.models.packaged import is_packaged
from recipes_lib.weights.load import base_fingerprint, load_model, load_tokenizer, model_path
from recipes_lib.weights.merge import free_memory
from recipes_lib.weights.runs import BASE, Family, TrainedRun, families, finished_run

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class PromptFormat:
    """Conversations rendered as the model was trained to read them; `hash` identifies the format.

    Without a tokenizer the server that has the model renders them.
    """

    def __init__(self, section: DataSection | None, tokenizer: Any = None) -> None:
        self.section, self.tokenizer = section, tokenizer
        self.name = section.prompt_format if section else "server"
        self.hash = format_hash(section, tokenizer) if section else "server"

    def render(self, messages: Sequence[Message]) -> tuple[str | None, tuple[int, ...]]:
        """Return the prompt's text and token ids; no text where only the server knows the
        format.
        """
        if self.section is None:
            return None, ()
        text = generation_prompt(self.section, self.tokenizer, messages=list(messages))
        return text, tuple(prompt_ids(self.section, self.tokenizer, text))


@dataclass(frozen=True, eq=False)
class Model:
    """A model to be asked.

    Args:
        word: as it was typed.
        run: the run folder that its answers go to; its name is the model's name.
        recipe: what `from_pretrained` takes, and how the model is asked.
        prompts: its prompt format.
        fingerprint: hash of its weights and precision.
        trained: the run that trained it; None for a base and any other model.
        served_only: whether nothing of it is here but its name on a server.
    """

    word: str
    run: RunDirectory
    recipe: Recipe
    prompts: PromptFormat
    fingerprint: str
    trained: TrainedRun | None = None
    served_only: bool = False

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return self.run.name

    @property
    def quantized(self) -> bool:
        """Whether its base is in 4 or 8 bits."""
        return self.recipe.quantization is not None

    def record(self) -> None:
        """Write run.json of a model without a run, so that its folder's name can be used like a
        run's.
        """
        if self.trained or self.run.exists():
            return
        data = {"source": "", **{key: getattr(self.recipe.data, key) for key in ASKED}}
        self.run.write_state(
            "finished",
            kind="base",
            stand_in={
                "model": self.recipe.model.model_dump(),
                "data": data | {"prompt_format": self.prompts.name},
                "quantization": self.recipe.quantization,
            },
            fingerprint=self.fingerprint,
            base_fingerprint=None if self.served_only else base_fingerprint(self.recipe),
            prompt_format_hash=self.prompts.hash,
        )


# ---- words of the command line ----


def is_run(word: str) -> bool:
    """Whether a word names a run that is there: its folder, or its name in the runs folder. A Hub
    id is not one, whatever runs are called.
    """
    path = Path(word)
    if len(path.parts) > 1:
        return (path / "run.json").is_file()
    return (runs_root() / path.name / "run.json").is_file()


def resolve(
    words: Sequence[str], recipe: EvalRecipe, remote_code: bool = False
) -> dict[str, Model]:
    """Return what each word names: a run, a local model, a packaged model, a Hub id, or `base` for
    the base of the runs beside it.

    A model that is the base of a run among the words is asked as that run is: in its precision and
    prompt format.

    Args:
        words: run names or folders, model folders, `package:` names, Hub ids, `base`.
        recipe: how models without a run are asked.
        remote_code: whether the command line allowed code that ships with a model.

    Raises:
        RecipeError: a word is neither a run nor a model, a run is not finished, a run was trained
            with another prompt format, `base` is not one model, or code of a model is not allowed.
    """
    served = recipe.generation.engine == "openai"
    opened = {word: open_run(word) for word in words if is_run(word)}
    stored = {word: found for word, run in opened.items() if (found := _stored_recipe(run))}
    runs = {
        word: finished_run(run, remote_code) for word, run in opened.items() if word not in stored
    }
    wanted = recipe.generation.prompt_format
    for one in runs.values():
        own = one.recipe.data.prompt_format
        if wanted not in ("auto", own):
            raise RecipeError(
                f"run '{one.run.name}' was trained with prompt format {own},"
                f" generation.prompt_format asks for {wanted}",
                "leave generation.prompt_format at auto",
            )
    models: dict[str, Model] = {}
    for word in dict.fromkeys(words):
        if word in runs:
            models[word] = _trained(word, runs[word])
            continue
        if word == BASE:
            models[word] = common_base([one.recipe for one in runs.values()])
            continue
        same = [one.recipe for one in runs.values() if one.recipe.model.name_or_path == word]
        found = stored.get(word) or (_base_recipe(same[0]) if same else None)
        if found is None and not (served or _is_model(word)):
            open_run(word)  # raises, with the names of similar runs
        chosen = found or _as_asked(word, recipe)
        if chosen.model.trust_remote_code and not remote_code:
            what = f"'{word}' runs code that ships with it"
            raise RecipeError(what, "pass --trust-remote-code as well")
        if served and found is None and not _is_local(word):
            models[word] = _served_only(word, chosen)
        else:
            models[word] = _untrained(word, chosen, auto=found is None and wanted == "auto")
    return models


def base_of(model: Model, others: Sequence[Model]) -> Model:
    """Return the base that a model is compared with; the base itself beside its runs is compared
    with itself, which is one half.

    Raises:
        RecipeError: it has none.
    """
    if model.trained is not None:
        return common_base([model.recipe])
    bases = [common_base([one.recipe]) for one in others if one.trained is not None]
    if any(base.name == model.name for base in bases):
        return model
    what = f"'{model.word}' has no base of its own to be compared with"
    raise RecipeError(what, "name another run or model: --against OTHER")


def common_base(recipes: Sequence[Recipe]) -> Model:
    """Return the base that runs share.

    Raises:
        RecipeError: there is no run, or their bases differ.
    """
    asked: dict[str, Recipe] = {}
    for recipe in map(_base_recipe, recipes):
        how = [str(getattr(recipe.data, key)) for key in ASKED]
        asked[str([recipe.model, recipe.quantization, how])] = recipe
    if not asked:
        what = "'base' is the base of the runs beside it, and there is none"
        raise RecipeError(what, "name the model itself")
    if len(asked) > 1:
        names = sorted({recipe.model.name_or_path for recipe in asked.values()})
        ways = f"{names[0]}, asked in several ways (precision, prompt format)"
        raise RecipeError(
            f"'base' is not one model: {', '.join(names) if len(names) > 1 else ways}",
            "name the model itself, or evaluate the runs one by one",
        )
    (recipe,) = asked.values()
    return _untrained(recipe.model.name_or_path, recipe)


def _base_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a run's base, asked as the run is."""
    return dataclasses.replace(recipe, lora=None)


def _is_local(word: str) -> bool:
    return is_packaged(word) or (Path(word) / "config.json").is_file()


def _is_model(word: str) -> bool:
    hub_id = word.count("/") == 1 and not word.startswith((".", "/"))
    return _is_local(word) or hub_id


def bare_recipe(
    model: ModelSection, data: DataSection | None = None, quantization: Any = None
) -> Recipe:
    """Return settings for a model that nobody trained here; weights/ loads what a recipe names."""
    return Recipe(
        path=Path(model.name_or_path),
        name=model.name_or_path,
        model=model,
        data=data or DataSection(source=""),
        run=RunSection(),
        launch=LaunchSection(),
        train={},
        lora=None,
        quantization=quantization,
        origins={MODEL_KEY: Origin(COMMAND_LINE)},
        warnings=(),
    )


def _as_asked(word: str, recipe: EvalRecipe) -> Recipe:
    """Settings for a model that is no run's base, as an eval recipe asks it."""
    section = recipe.generation
    format_: Any = "chat" if section.prompt_format == "auto" else section.prompt_format
    code = section.trust_remote_code
    model = ModelSection(name_or_path=word, dtype=section.dtype, trust_remote_code=code)
    return bare_recipe(model, DataSection(source="", prompt_format=format_))


def _stored_recipe(run: RunDirectory) -> Recipe | None:
    """Return the settings of a model without a run, or None for a trained run."""
    stored = run.read_state().get("stand_in")
    if stored is None:
        return None
    data = DataSection(**stored["data"])
    return bare_recipe(ModelSection(**stored["model"]), data, stored["quantization"])


# ---- models ----


def model_key(recipe: Recipe, weights: Path | None) -> str:
    """Return the hash of what answers: a base, or a run of it.

    Args:
        recipe: how the base is loaded.
        weights: the run's adapter, or its whole model; None for the base alone.

    Raises:
        RecipesError: the base is not on this machine.
    """
    if weights is not None and recipe.lora is None:
        return hash_of(folder_fingerprint(weights), _precision(recipe))
    base = model_fingerprint(model_path(recipe.model), recipe.model.revision)
    return hash_of(base, _precision(recipe), folder_fingerprint(weights) if weights else None)


def _trained(word: str, one: TrainedRun) -> Model:
    from transformers import AutoTokenizer

    recipe = one.recipe
    prompts = PromptFormat(one.prompt_section, AutoTokenizer.from_pretrained(one.weights))
    recorded = one.run.read_state().get("guard", {}).get("prompt_format_hash")
    if recorded and recorded != prompts.hash:
        raise RecipeError(
            f"run '{one.run.name}' was trained with another prompt format than its files give now"
            f" ({str(recorded)[:12]} -> {prompts.hash[:12]})",
            "the chat template, the system prompt or the end token changed since: restore it, or"
            " train the run again",
        )
    return Model(word, one.run, recipe, prompts, model_key(recipe, one.weights), one)


def _untrained(word: str, recipe: Recipe, auto: bool = False) -> Model:
    try:
        tokenizer = load_tokenizer(recipe)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        hint = (
            "read that code; then set generation.trust_remote_code=true and pass"
            " --trust-remote-code"
        )
        raise RecipeError(f"'{word}' needs Python code that ships with it", hint) from None
    if auto and not tokenizer.chat_template:
        data = recipe.data.model_copy(update={"prompt_format": "dolly"})
        recipe = dataclasses.replace(recipe, data=data)
    prompts = PromptFormat(recipe.data, tokenizer)
    path = model_path(recipe.model)
    fingerprint = model_key(recipe, None)
    return Model(word, _folder(path, fingerprint, prompts), recipe, prompts, fingerprint)


def _served_only(word: str, recipe: Recipe) -> Model:
    """Only the server has it: its name stands for its weights, its server renders the prompts."""
    prompts, fingerprint = PromptFormat(None), hash_of("served", word)
    run = _folder(word, fingerprint, prompts)
    return Model(word, run, recipe, prompts, fingerprint, served_only=True)


def _folder(path: str, fingerprint: str, prompts: PromptFormat) -> RunDirectory:
    """The run folder of a model without a run."""
    short = _NOT_IN_NAMES.sub("-", Path(path).name).strip("-.")[:60]
    return RunDirectory(f"base--{short}--{hash_of(fingerprint, prompts.hash)[:8]}")


def _precision(recipe: Recipe) -> list[Any]:
    return [recipe.model.dtype, recipe.quantization]


# ---- weights ----


@dataclass(frozen=True)
class Loaded:
    """A model in memory; `using` gives the context in which it answers as itself."""

    model: Model
    network: Any = None
    using: Any = None


def grouped(models: Sequence[Model]) -> list[list[Model]]:
    """Group models that one loaded base serves: its runs, and the base itself."""
    by_name = {model.name: model for model in models}
    groups = [
        [by_name[one.run.name] for one in family]
        for family in families([model.trained for model in by_name.values() if model.trained])
    ]
    for model in by_name.values():
        if model.trained:
            continue
        home = next((group for group in groups if _serves(group[0], model)), None)
        if home is None:
            groups.append([model])
        else:
            home.append(model)
    return groups


def _serves(first: Model, model: Model) -> bool:
    trained = first.trained
    same = first.recipe.model, first.recipe.quantization
    is_adapter = trained is not None and not trained.full
    return is_adapter and same == (model.recipe.model, model.recipe.quantization)


@contextmanager
def loaded(models: Sequence[Model]) -> Iterator[Iterator[Loaded]]:
    """Give the models of one group of `grouped`, on one base in memory, which is freed
    afterwards.
    """
    holder: list[Any] = []
    try:
        yield _loaded(models, holder)
    finally:
        holder.clear()
        free_memory()


def _loaded(models: Sequence[Model], holder: list[Any]) -> Iterator[Loaded]:
    trained = [model.trained for model in models if model.trained]
    if trained:
        family = Family(trained)
        holder.append(family)
        for model in models:
            yield Loaded(model, family.model, _answering(family, model))
        return
    for model in models:
        config = build_quantization_config(model.recipe)
        network = load_model(model.recipe, model.prompts.tokenizer, config)
        holder.append(_on_device(ready_to_answer(network), model.recipe))
        yield Loaded(model, holder[-1])


def _answering(family: Family, model: Model) -> Any:
    name = model.name if model.trained else BASE

    def using() -> AbstractContextManager[Any]:
        return family.answering(name)

    return using


def _on_device(network: Any, recipe: Recipe) -> Any:
    import torch

    moved = torch.cuda.is_available() and recipe.quantization is None
    return network.to("cuda") if moved else network
