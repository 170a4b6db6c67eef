"""What is evaluated: finished runs, their base, and any other model, each a `Model`.

`resolve` reads words of the command line; `loaded` gives one base and its adapters. A model without
a run gets a run folder of its own, `base--<model>--<hash8>`, whose hash covers weights, precision
and prompt format.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
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
from recipes_lib.core.files import (
    hash_of,
    model_fingerprint,
    object_or_none,
    write_json,
)
from recipes_lib.core.project import cache_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, open_run
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import format_hash, generation_prompt
from recipes_lib.evals.engines import answered_by
from recipes_lib.evals.engines.base import Target
from recipes_lib.evals.log import AnswerFacts
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.evals.served import is_served_only, served_fingerprint
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

    @property
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
        model, quantization = self.recipe.model.model_dump(), self.recipe.quantization
        self.run.write_state(
            "finished",
            kind="base",
            stand_in={"model": model, "data": data | {"source": ""}, "quantization": quantization},
            fingerprint=self.fingerprint,
            base_fingerprint=base_fingerprint(self.recipe) if self.prompt else None,
        )


def facts_of(folder: Path | None, load: Callable[[], Any]) -> SimpleNamespace:
    """Return what of a tokenizer makes a prompt format, remembered by its files and their times."""
    files = sorted(filter(Path.is_file, folder.iterdir())) if folder else []
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    stamp = hash_of(str(folder), stats, installed_version("transformers"))
    memory = cache_root() / "tokenizers" / f"{stamp[:32]}.json"
    known = object_or_none(memory) if files else None
    if known is None:
        quiet_libraries()
        tokenizer, names = load(), ("bos_token", "eos_token", "chat_template")
        known = {name: getattr(tokenizer, name, None) for name in names}
        if files:
            write_json(memory, known)
    return SimpleNamespace(**known)


# ---- words of the command line ----


def resolve(
    words: Sequence[str], recipe: EvalRecipe, remote_code: bool = False
) -> dict[str, Model]:
    """Return what each word names: a run, a model, or `base` for the base of the runs beside it.
    The base of a run among the words is asked as that run is, other models as the eval recipe says;
    `remote_code` is what the command line allowed.
    """
    models: dict[str, Model] = {}
    known: dict[str, Recipe] = {}  # how models without a run are asked, where that is known
    for word in words:
        if not (_run_folder(word) / "run.json").is_file():
            continue
        run = open_run(str(_run_folder(word)))
        if stored := run.read_state().get("stand_in"):
            try:
                section, data = ModelSection(**stored["model"]), DataSection(**stored["data"])
            except ValidationError:
                hint = f"remove {shown_path(run.path)}: evaluating the model recreates it"
                raise RecipeError("is from an earlier version", hint, file=run.state_file) from None
            if is_served_only(run.read_state()):
                models[word] = _served_alone(section.name_or_path, recipe)
            else:
                known[word] = bare_recipe(section, data, stored["quantization"])
            continue
        models[word] = _trained(word, finished_run(run, remote_code))
        own = models[word].recipe
        known[own.model.name_or_path] = dataclasses.replace(own, lora=None)
    runs = [model.recipe for model in models.values() if model.trained]
    for word in words:
        if word == BASE:
            models[word] = common_base(runs)
        elif word not in models:
            models[word] = _untrained(word, known.get(word), recipe, remote_code)
    return {word: models[word] for word in words}


def _run_folder(word: str) -> Path:
    """The folder of a run given by its name or path."""
    return Path(os.path.abspath(word)) if "/" in word else runs_root() / word  # noqa: PTH100 (links)


def base_of(side: Any) -> Model:
    """Return the base that a model is compared with; of one that was not trained here, itself."""
    if not isinstance(side, Model):
        raise RecipeError("a file of answers has no base", "name an opponent: --against OTHER")
    return common_base([side.recipe]) if side.trained else side


def common_base(recipes: Sequence[Recipe]) -> Model:
    """Return the base that runs share, or refuse those that share none."""
    asked: dict[str, Recipe] = {}
    for recipe in recipes:
        how = [str(getattr(recipe.data, key)) for key in ASKED]
        asked[str([recipe.model, recipe.quantization, how])] = recipe
    if len(asked) != 1:
        what = f"'base' is the base of the runs in the same command, which have {len(asked)}"
        raise RecipeError(what, "name the model itself, or evaluate the runs one by one")
    (recipe,) = asked.values()
    return _base(recipe.model.name_or_path, dataclasses.replace(recipe, lora=None))


def evaluated_bases(
    sections: Mapping[str, Any], root: Path, fingerprint: str | None
) -> list[RunDirectory]:
    """Return the runs of the base that a recipe's sections name, the newest last. Needs no torch.

    Args:
        fingerprint: of the base's files; None where they are not known.
    """

    def identity(of: Mapping[str, Any]) -> list[object]:
        model, data = of.get("model") or {}, of.get("data") or {}
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
    weights: str | None
    if stand_in := state.get("stand_in"):
        run = stand_in["model"]["name_or_path"]
        weights = None if is_served_only(state) else state["fingerprint"]
    else:
        trained = finished_run(directory, remote_code=True)
        weights = model_key(trained.recipe, trained.weights)
    return answered_by(recipe.generation, run, weights)


def _trained(word: str, trained: TrainedRun) -> Model:
    @cache
    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(trained.weights)

    run, recipe, section = trained.run, trained.recipe, trained.prompt_section
    prompt_hash = format_hash(section, facts_of(trained.weights, load))
    if run.read_state().get("guard", {}).get("prompt_format_hash", prompt_hash) != prompt_hash:
        what = f"run '{run.name}' was trained with another prompt format than its files give now"
        hint = "restore the chat template, the system prompt or the end token, or train again"
        raise RecipeError(what, hint)
    fingerprint = model_key(recipe, trained.weights)
    return Model(word, run, recipe, fingerprint, section, prompt_hash, load, trained)


def _untrained(word: str, known: Recipe | None, recipe: EvalRecipe, remote_code: bool) -> Model:
    """A model without a run, asked as is known of it; else as the eval recipe says."""
    section, wanted = recipe.generation, recipe.generation.prompt_format
    is_folder = (Path(word) / "config.json").is_file()
    is_local = is_folder or word.startswith("package:")
    is_hub_id = word.count("/") == 1 and not word.startswith((".", "/", f"{runs_root().name}/"))
    is_served = section.is_served and not is_local
    if known is None and not (is_local or is_hub_id or is_served):
        open_run(str(_run_folder(word)) if "/" in word else word)  # raises, with similar names
    model = ModelSection(
        name_or_path=str(Path(word).resolve()) if is_folder else word,
        dtype=section.dtype,
        trust_remote_code=section.trust_remote_code,
    )
    is_free = known is None and wanted == "auto"
    data = DataSection(source="", prompt_format="chat" if wanted == "auto" else wanted)
    chosen = known or bare_recipe(model, data)
    if chosen.model.trust_remote_code and not remote_code:
        what = f"'{word}' runs code that ships with it"
        raise RecipeError(what, "pass --trust-remote-code as well")
    if known is None and is_served:
        return _served_alone(word, recipe)
    return _base(chosen.model.name_or_path if known else word, chosen, is_free)


def _served_alone(name: str, recipe: EvalRecipe) -> Model:
    """A model that only a server knows, under its name there."""
    section = recipe.generation
    if not section.is_served:
        what = f"only a server knows the weights of '{name}'"
        hint = "ask that: generation.engine=openai generation.base_url=ADDRESS"
        raise RecipeError(what, hint)
    model = ModelSection(
        name_or_path=name,
        dtype=section.dtype,
        trust_remote_code=section.trust_remote_code,
    )
    wanted = section.prompt_format
    data = DataSection(source="", prompt_format="chat" if wanted == "auto" else wanted)
    chosen = bare_recipe(model, data)
    fingerprint = served_fingerprint(name)
    return Model(
        word=name,
        run=_folder_of(chosen, fingerprint, "server"),
        recipe=chosen,
        fingerprint=fingerprint,
    )


def _base(word: str, recipe: Recipe, is_free: bool = False) -> Model:
    """A model without a run; if the format is free, dolly where there is no chat template."""
    model_path(recipe.model)  # which makes the folder of a packaged model
    load = cache(partial(load_tokenizer, recipe))
    facts = facts_of(local_folder(recipe), load)
    if is_free and not facts.chat_template:
        data = recipe.data.model_copy(update={"prompt_format": "dolly"})
        recipe = dataclasses.replace(recipe, data=data)
    prompt_hash, fingerprint = format_hash(recipe.data, facts), model_key(recipe, None)
    run = _folder_of(recipe, fingerprint, prompt_hash)
    return Model(word, run, recipe, fingerprint, recipe.data, prompt_hash, load)


def _folder_of(recipe: Recipe, fingerprint: str, prompt_hash: str) -> RunDirectory:
    """The run folder of a model without a run."""
    short = NOT_IN_NAMES.sub("-", Path(model_path(recipe.model)).name).strip("-.")[:60]
    return RunDirectory(f"base--{short}--{hash_of(fingerprint, prompt_hash)[:8]}")


# ---- weights ----


@contextmanager
def loaded(models: Sequence[Model]) -> Iterator[Callable[[Model], AbstractContextManager[Any]]]:
    """Give a function that makes a context with the network that answers as a model, which is
    loaded at its first use and freed afterwards. All models are of one of their `families`.
    """
    trained = [model.trained for model in models if model.trained]
    memory: list[Any] = []  # the family of the runs, or the base alone, or why it cannot be loaded

    @contextmanager
    def using(model: Model) -> Iterator[Any]:
        if not memory:
            try:
                base = None if trained else load_base(model.recipe, model.tokenizer)
                memory.append(Family(trained) if base is None else ready_to_answer(base))
            except Exception as error:
                memory.append(error)
                if isinstance(error, ValueError) and "trust_remote_code" in str(error):
                    what = f"'{model.word}' needs Python code that ships with it"
                    hint = "read it; then generation.trust_remote_code=true --trust-remote-code"
                    memory[0] = RecipeError(what, hint)
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
