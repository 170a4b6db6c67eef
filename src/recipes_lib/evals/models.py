"""What is evaluated: finished runs, their base, and any other model, each a `Model`.

`resolve` reads words of the command line; `loaded` gives one base and its adapters. A model without
a run gets a run folder of its own, `base--<model>--<hash8>`, whose hash covers weights, precision
and prompt format.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from recipes_lib.config.documents import COMMAND_LINE, Document, Origin
from recipes_lib.config.launch import LaunchSection
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import ASKED, DataSection, ModelSection, Recipe, RunSection
from recipes_lib.core.environment import installed_version, quiet_libraries
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of, model_fingerprint, object_or_none, write_json
from recipes_lib.core.project import cache_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, open_run
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import format_hash, generation_prompt
from recipes_lib.evals.engines import answered_by
from recipes_lib.evals.engines.base import Target
from recipes_lib.evals.log import AnswerFacts
from recipes_lib.evals.recipe import EvalRecipe, GenerationSection
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import (
    base_fingerprint,
    free_memory,
    load_base,
    load_tokenizer,
    model_path,
)
from recipes_lib.weights.runs import BASE, Family, TrainedRun, finished_run

NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, eq=False)
class Model:
    """A model to be asked."""

    word: str  # as it was typed
    run: RunDirectory  # where its answers go; its name is the model's
    recipe: Recipe  # what `from_pretrained` takes
    fingerprint: str  # hash of its weights and precision
    prompt: DataSection | None = None  # how it is asked; None where only its server knows that
    prompt_hash: str = "server"
    load_tokenizer: Callable[[], Any] = lambda: None
    trained: TrainedRun | None = None  # None for a base and any other model

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return self.run.name

    @property
    def full(self) -> bool:
        """Whether it was fine-tuned as a whole, so that no base serves it."""
        return self.trained is not None and self.trained.full

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        quiet_libraries()
        return self.load_tokenizer()

    @property
    def served_name(self) -> str:
        """The name that it goes by on a server, as launch/vllm_server.sh serves it."""
        return self.name if self.trained else self.word

    @property
    def weights(self) -> str | None:
        """The hash of its weights and precision; None where only a server knows them."""
        return None if self.prompt is None else self.fingerprint

    def folder(self, eval_name: str) -> Path:
        """Return where an eval keeps what it knows of the model: runs/<run>/evals/<eval>."""
        return self.run.path / "evals" / eval_name

    def render(self, messages: Sequence[Message]) -> tuple[str | None, tuple[int, ...]]:
        """Return a conversation as the model was trained to read it, text and token ids; neither
        where only a server knows the format.
        """
        if self.prompt is None:
            return None, ()
        text = generation_prompt(self.prompt, self.tokenizer, messages=list(messages))
        from recipes_lib.data.encoding import prompt_ids  # numpy

        return text, tuple(prompt_ids(self.prompt, self.tokenizer, text))

    def facts(self) -> AnswerFacts:
        """Return what a log says of it, whichever engine answers."""
        return AnswerFacts(
            name=self.name,
            models=(self.recipe.model.name_or_path,),
            fingerprint=self.fingerprint,
            prompt_format=self.prompt.prompt_format if self.prompt else "server",
            prompt_format_hash=self.prompt_hash,
        )

    def target(self, using: Callable[[], AbstractContextManager[Any]]) -> Target:
        """Return the model as an engine sees it; `using` gives its network in this process."""
        return Target(
            name=self.served_name,
            recipe=self.recipe,
            saved=self.trained.weights if self.trained else None,
            load_tokenizer=lambda: self.tokenizer,
            using=using,
        )

    def record(self) -> None:
        """Write run.json of a model without a run, so that its name can be used like a run's."""
        if self.trained or self.run.exists():
            return
        data = {key: getattr(self.recipe.data, key) for key in ASKED}
        stand_in = {
            "model": self.recipe.model.model_dump(),
            "data": data | {"source": ""},
            "quantization": self.recipe.quantization,
        }
        self.run.write_state(
            "finished",
            kind="base",
            stand_in=stand_in,
            fingerprint=self.fingerprint,
            base_fingerprint=base_fingerprint(self.recipe) if self.prompt else None,
        )


def facts_of(folder: Path | None, load: Callable[[], Any]) -> SimpleNamespace:
    """Return what of a tokenizer makes a prompt format, remembered by its files and their times."""
    files = sorted(filter(Path.is_file, folder.iterdir())) if folder else []
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    stamp = hash_of(str(folder), stats, installed_version("transformers"))
    memory = cache_root() / "tokenizers" / f"{stamp[:32]}.json"
    facts = object_or_none(memory) if files else None
    if facts is None:
        quiet_libraries()
        tokenizer = load()
        names = ("bos_token", "eos_token", "chat_template")
        facts = {name: getattr(tokenizer, name, None) for name in names}
        if files:
            write_json(memory, facts)
    return SimpleNamespace(**facts)


# ---- words of the command line ----


def resolve(
    words: Sequence[str], recipe: EvalRecipe, remote_code: bool = False
) -> dict[str, Model]:
    """Return what each word names: a run, a model, or `base` for the base of the runs beside it.
    The base of a run among the words is asked as that run is, other models as the eval recipe says;
    `remote_code` is what the command line allowed.
    """
    models: dict[str, Model] = {}
    recipes: dict[str, Recipe] = {}  # of models without a run, where one says how they are asked
    for word in words:
        if not (_run_folder(word) / "run.json").is_file():
            continue
        run = open_run(str(_run_folder(word)))
        stand_in = run.read_state().get("stand_in")
        if not stand_in:
            models[word] = _trained(word, finished_run(run, remote_code))
            trained = models[word].recipe
            recipes[trained.model.name_or_path] = dataclasses.replace(trained, lora=None)
            continue
        try:
            section = ModelSection(**stand_in["model"])
            data = DataSection(**stand_in["data"])
        except ValidationError:
            hint = f"remove {shown_path(run.path)}: evaluating the model recreates it"
            raise RecipeError("is from an earlier version", hint, file=run.state_file) from None
        if _is_served_only(run.read_state()):
            models[word] = _served_only(section.name_or_path, recipe.generation)
        else:
            recipes[word] = bare_recipe(section, data, stand_in["quantization"])
    runs = [model.recipe for model in models.values() if model.trained]
    for word in words:
        if word == BASE:
            models[word] = common_base(runs)
        elif word not in models:
            models[word] = _untrained(word, recipes.get(word), recipe.generation, remote_code)
    return {word: models[word] for word in words}


def _run_folder(word: str) -> Path:
    """The folder of a run given by its name or path."""
    if "/" in word:
        return Path(os.path.abspath(word))  # noqa: PTH100 (links stay)
    return runs_root() / word


def base_of(side: Any) -> Model:
    """Return the base that a model is compared with; of one that was not trained here, itself."""
    if not isinstance(side, Model):
        raise RecipeError("a file of answers has no base", "name an opponent: --against OTHER")
    return common_base([side.recipe]) if side.trained else side


def common_base(recipes: Sequence[Recipe]) -> Model:
    """Return the base that runs share, or refuse those that share none."""
    bases: dict[str, Recipe] = {}
    for recipe in recipes:
        prompt = [str(getattr(recipe.data, key)) for key in ASKED]
        bases[str([recipe.model, recipe.quantization, prompt])] = recipe
    if len(bases) != 1:
        what = f"'base' is the base of the runs in the same command, which have {len(bases)}"
        raise RecipeError(what, "name the model itself, or evaluate the runs one by one")
    (recipe,) = bases.values()
    return _base(recipe.model.name_or_path, dataclasses.replace(recipe, lora=None))


def evaluated_bases(
    sections: Mapping[str, Any], root: Path, fingerprint: str | None
) -> list[RunDirectory]:
    """Return the runs of the base that a recipe's sections name, the newest last. Needs no torch.

    Args:
        fingerprint: of the base's files; None where they are not known.
    """

    def identity(of: Mapping[str, Any]) -> list[object]:
        model = of.get("model") or {}
        data = of.get("data") or {}
        # the other keys are for a chat template
        keys = ASKED if data.get("prompt_format") == "chat" else ASKED[:1]
        weights = [model.get(key) for key in ("name_or_path", "revision", "dtype")]
        return [*weights, of.get("quantization"), *map(data.get, keys)]

    runs = []
    for file in root.glob("base--*/run.json"):
        state = object_or_none(file) or {}
        same = identity(state.get("stand_in") or {}) == identity(sections)
        if same and (not fingerprint or state.get("base_fingerprint") in (None, fingerprint)):
            runs.append((str(state.get("created")), file.parent.name))
    return [RunDirectory(name, root) for _, name in sorted(runs)]


def bare_recipe(
    model: ModelSection, data: DataSection | None = None, quantization: Any = None
) -> Recipe:
    """Return a recipe for a model without a run; weights/ loads what a recipe names."""
    return Recipe(
        document=Document(Path(model.name_or_path), origins={("model",): Origin(COMMAND_LINE)}),
        name=model.name_or_path,
        model=model,
        data=data or DataSection(source=""),
        run=RunSection(),
        launch=LaunchSection(),
        train={},
        lora=None,
        quantization=quantization,
    )


def model_key(recipe: Recipe, weights: Path | None) -> str:
    """Return the hash of what answers: a base, or the weights of a run of it. Needs no torch."""
    precision = [recipe.model.dtype, recipe.quantization]
    if weights is not None and recipe.lora is None:
        return hash_of(model_fingerprint(weights), precision)
    base = model_fingerprint(model_path(recipe.model), recipe.model.revision)
    return hash_of(base, precision, model_fingerprint(weights) if weights else None)


def known_by(run: str, recipe: EvalRecipe) -> str:
    """Return what the answers of a finished run, or of a base's, are known by. Needs no torch."""
    directory = RunDirectory(run)
    state = directory.read_state()
    if "stand_in" not in state:
        trained = finished_run(directory, remote_code=True)
        return answered_by(recipe.generation, run, model_key(trained.recipe, trained.weights))
    name = state["stand_in"]["model"]["name_or_path"]
    weights = None if _is_served_only(state) else state["fingerprint"]
    return answered_by(recipe.generation, name, weights)


def _is_served_only(state: Mapping[str, Any]) -> bool:
    """Whether the run.json of a model without a run is of one that only a server knows."""
    name = state["stand_in"]["model"]["name_or_path"]
    return bool(state.get("fingerprint") == hash_of("served", name))


def _trained(word: str, trained: TrainedRun) -> Model:
    """A finished run."""

    @cache
    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(trained.weights)

    run = trained.run
    prompt_hash = format_hash(trained.prompt_section, facts_of(trained.weights, load))
    if run.read_state().get("guard", {}).get("prompt_format_hash", prompt_hash) != prompt_hash:
        what = f"run '{run.name}' was trained with another prompt format than its files give now"
        hint = "restore the chat template, the system prompt or the end token, or train again"
        raise RecipeError(what, hint)
    return Model(
        word=word,
        run=run,
        recipe=trained.recipe,
        fingerprint=model_key(trained.recipe, trained.weights),
        prompt=trained.prompt_section,
        prompt_hash=prompt_hash,
        load_tokenizer=load,
        trained=trained,
    )


def _untrained(
    word: str, stored: Recipe | None, section: GenerationSection, remote_code: bool
) -> Model:
    """A model that was not trained here.

    Args:
        stored: its recipe, of its earlier run.json or of a run on it; else the eval recipe's.
    """
    is_folder = (Path(word) / "config.json").is_file()
    is_local = is_folder or word.startswith("package:")
    is_hub_id = word.count("/") == 1 and not word.startswith((".", "/", f"{runs_root().name}/"))
    if stored is None and not (is_local or is_hub_id or section.is_served):
        open_run(str(_run_folder(word)) if "/" in word else word)  # raises, with similar names
    recipe = stored or _recipe_of(str(Path(word).resolve()) if is_folder else word, section)
    if recipe.model.trust_remote_code and not remote_code:
        what = f"'{word}' runs code that ships with it"
        raise RecipeError(what, "pass --trust-remote-code as well")
    if stored:
        return _base(stored.model.name_or_path, stored)
    if section.is_served and not is_local:
        return _served_only(word, section)
    return _base(word, recipe, is_free=section.prompt_format == "auto")


def _recipe_of(name: str, section: GenerationSection) -> Recipe:
    """The recipe of a model of which the eval recipe alone says how it is asked."""
    model = ModelSection(
        name_or_path=name,
        dtype=section.dtype,
        trust_remote_code=section.trust_remote_code,
    )
    prompt_format = "chat" if section.prompt_format == "auto" else section.prompt_format
    return bare_recipe(model, DataSection(source="", prompt_format=prompt_format))


def _served_only(name: str, section: GenerationSection) -> Model:
    """A model that only a server knows, under its name there."""
    if not section.is_served:
        what = f"only a server knows the weights of '{name}'"
        hint = "ask that: generation.engine=openai generation.base_url=ADDRESS"
        raise RecipeError(what, hint)
    recipe = _recipe_of(name, section)
    fingerprint = hash_of("served", name)
    run = _folder_of(recipe, fingerprint, "server")
    return Model(word=name, run=run, recipe=recipe, fingerprint=fingerprint)


def _base(word: str, recipe: Recipe, is_free: bool = False) -> Model:
    """A model without a run; if the format is free, dolly where there is no chat template."""
    model_path(recipe.model)  # which makes the folder of a packaged model
    load = cache(partial(load_tokenizer, recipe))
    facts = facts_of(local_folder(recipe), load)
    if is_free and not facts.chat_template:
        data = recipe.data.model_copy(update={"prompt_format": "dolly"})
        recipe = dataclasses.replace(recipe, data=data)
    prompt_hash = format_hash(recipe.data, facts)
    fingerprint = model_key(recipe, None)
    return Model(
        word=word,
        run=_folder_of(recipe, fingerprint, prompt_hash),
        recipe=recipe,
        fingerprint=fingerprint,
        prompt=recipe.data,
        prompt_hash=prompt_hash,
        load_tokenizer=load,
    )


def _folder_of(recipe: Recipe, fingerprint: str, prompt_hash: str) -> RunDirectory:
    """The run folder of a model without a run."""
    name = NOT_IN_NAMES.sub("-", Path(model_path(recipe.model)).name).strip("-.")[:60]
    return RunDirectory(f"base--{name}--{hash_of(fingerprint, prompt_hash)[:8]}")


# ---- weights ----


@contextmanager
def loaded(models: Sequence[Model]) -> Iterator[Callable[[Model], AbstractContextManager[Any]]]:
    """Give a function that makes a context with the network that answers as a model, which is
    loaded at its first use and freed afterwards. All models are of one of their `families`.
    """
    trained = [model.trained for model in models if model.trained]
    # the family of the runs, or the base alone, or why it cannot be loaded: what failed once is
    # not tried again for each model
    memory: list[Any] = []

    @contextmanager
    def using(model: Model) -> Iterator[Any]:
        if not memory:
            try:
                if trained:
                    memory.append(Family(trained))
                else:
                    memory.append(ready_to_answer(load_base(model.recipe, model.tokenizer)))
            except Exception as error:
                if isinstance(error, ValueError) and "trust_remote_code" in str(error):
                    what = f"'{model.word}' needs Python code that ships with it"
                    hint = "read it; then generation.trust_remote_code=true --trust-remote-code"
                    memory.append(RecipeError(what, hint))
                else:
                    memory.append(error)
        if isinstance(memory[0], Exception):
            raise memory[0]
        if not trained:
            yield memory[0]
            return
        with memory[0].answering(model.name if model.trained else BASE) as network:
            yield network

    try:
        yield using
    finally:
        memory.clear()
        free_memory()
