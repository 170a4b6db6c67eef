"""What is evaluated: finished runs, their base, and any other model, each a `Model`.

`resolve` reads words of the command line; `loaded` gives one base and its adapters. A model without
a run gets a run folder of its own, `base--<model>--<hash8>`, whose hash covers weights, precision
and prompt format, and whose name can be used like a run's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recipes_lib.config.documents import COMMAND_LINE, Document, Origin
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ASKED, DataSection, LaunchSection, ModelSection, RunSection
from recipes_lib.core.environment import installed_version, quiet_libraries
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import (
    folder_fingerprint,
    hash_of,
    model_fingerprint,
    object_or_none,
    write_json,
)
from recipes_lib.core.project import cache_root, runs_root
from recipes_lib.core.run_directory import RunDirectory, open_run
from recipes_lib.data.prompts import format_hash, generation_prompt
from recipes_lib.data.rows import Message
from recipes_lib.evals.log import AnswerFacts
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import (
    base_fingerprint,
    free_memory,
    load_base,
    load_tokenizer,
    model_path,
)
from recipes_lib.weights.runs import BASE, Family, TrainedRun, finished_run

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class PromptFormat:
    """Conversations rendered as the model was trained to read them; `hash` identifies the format.
    There is no section where only the server that has the model knows it.
    """

    def __init__(
        self,
        section: DataSection | None = None,
        folder: Path | None = None,
        load: Callable[[], Any] = lambda: None,
    ) -> None:
        self.section, self._load = section, load
        self.name, self.hash = "server", "server"
        if section:
            facts = facts_of(folder, lambda: self.tokenizer)
            self.name, self.hash = section.prompt_format, format_hash(section, facts)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        quiet_libraries()
        return self._load()

    def render(self, messages: Sequence[Message]) -> tuple[str | None, tuple[int, ...]]:
        """Return the prompt's text and token ids; neither where only a server knows the format."""
        if self.section is None:
            return None, ()
        text = generation_prompt(self.section, self.tokenizer, messages=list(messages))
        from recipes_lib.data.supervision import prompt_ids  # numpy

        return text, tuple(prompt_ids(self.section, self.tokenizer, text))


def facts_of(folder: Path | None, load: Callable[[], Any]) -> SimpleNamespace:
    """Return what of a tokenizer makes a prompt format, remembered by its files and their times."""
    files = sorted(filter(Path.is_file, folder.iterdir())) if folder else []
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    stamp = hash_of(str(folder), stats, installed_version("transformers"))
    memory = cache_root() / "tokenizers" / f"{stamp[:32]}.json"
    known = object_or_none(memory) if files else None
    if known is None:
        quiet_libraries()
        tokenizer = load()
        names = ("bos_token", "eos_token", "chat_template")
        known = {name: getattr(tokenizer, name, None) for name in names}
        if files:
            write_json(memory, known)
    return SimpleNamespace(**known)


@dataclass(frozen=True, eq=False)
class Model:
    """A model to be asked."""

    word: str  # as it was typed
    run: RunDirectory  # where its answers go; its name is the model's
    recipe: Recipe  # what `from_pretrained` takes, and how the model is asked
    prompts: PromptFormat
    fingerprint: str  # hash of its weights and precision
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
    def served_only(self) -> bool:
        """Whether only a server has its weights."""
        return self.prompts.section is None

    def folder(self, eval_name: str) -> Path:
        """Return where an eval keeps what it knows of the model: runs/<run>/evals/<eval>."""
        return self.run.path / "evals" / eval_name

    def facts(self) -> AnswerFacts:
        """Return what a log says of it."""
        return AnswerFacts(
            name=self.name,
            models=(self.recipe.model.name_or_path,),
            fingerprint=self.fingerprint,
            prompt_format=self.prompts.name,
            prompt_format_hash=self.prompts.hash,
            dtype=self.recipe.model.dtype,
            quantized=self.recipe.quantization is not None,
        )

    def record(self) -> None:
        """Write run.json of a model without a run, so that its name can be used like a run's."""
        if self.trained or self.run.exists():
            return
        data = {key: getattr(self.recipe.data, key) for key in ASKED}
        self.run.write_state(
            "finished",
            kind="base",
            stand_in={
                "model": self.recipe.model.model_dump(),
                "data": {"source": "", **data, "prompt_format": self.prompts.name},
                "quantization": self.recipe.quantization,
            },
            fingerprint=self.fingerprint,
            base_fingerprint=None if self.served_only else base_fingerprint(self.recipe),
            prompt_format_hash=self.prompts.hash,
        )


# ---- words of the command line ----


def resolve(
    words: Sequence[str], recipe: EvalRecipe, remote_code: bool = False
) -> dict[str, Model]:
    """Return what each word names: a run, a local model, a packaged model, a Hub id, or `base` for
    the base of the runs beside it. The base of a run among the words is asked as that run is.

    Args:
        recipe: how models without a run are asked.
        remote_code: whether the command line allowed code that ships with a model.
    """
    trained: dict[str, TrainedRun] = {}
    known: dict[str, Recipe] = {}  # how models without a run are asked, where that is known
    for word in filter(is_run, words):
        run = open_run(word)
        if stored := run.read_state().get("stand_in"):
            section, data = ModelSection(**stored["model"]), DataSection(**stored["data"])
            known[word] = bare_recipe(section, data, stored["quantization"])
            continue
        trained[word] = finished_run(run, remote_code)
        own = trained[word].recipe
        if recipe.generation.prompt_format not in ("auto", own.data.prompt_format):
            wanted = recipe.generation.prompt_format
            what = f"run '{run.name}' was trained with prompt format {own.data.prompt_format}"
            hint = "leave generation.prompt_format at auto"
            raise RecipeError(f"{what}, not {wanted}", hint)
        known[own.model.name_or_path] = dataclasses.replace(own, lora=None)
    models: dict[str, Model] = {}
    for word in words:
        if word in trained:
            models[word] = _trained(word, trained[word])
        elif word == BASE:
            models[word] = common_base([run.recipe for run in trained.values()])
        else:
            models[word] = _untrained(word, known.get(word), recipe, remote_code)
    return models


def is_run(word: str) -> bool:
    """Return whether a word names a run that is there; a Hub id never does."""
    path = Path(word)
    return ((path if len(path.parts) > 1 else runs_root() / word) / "run.json").is_file()


def base_of(word: str, model: Model | None, others: Sequence[Model]) -> Model:
    """Return the base that a model is compared with; a base beside its runs has itself."""
    if model and model.trained:
        return common_base([model.recipe])
    bases = [common_base([other.recipe]).name for other in others if other.trained]
    if model and model.name in bases:
        return model
    what = f"'{word}' has no base of its own to be compared with"
    raise RecipeError(what, "name another run or model: --against OTHER")


def common_base(recipes: Sequence[Recipe]) -> Model:
    """Return the base that runs share, or refuse those that share none."""
    asked: dict[str, Recipe] = {}
    for recipe in recipes:
        how = [str(getattr(recipe.data, key)) for key in ASKED]
        asked[str([recipe.model, recipe.quantization, how])] = recipe
    if len(asked) != 1:
        names = ", ".join(sorted({recipe.model.name_or_path for recipe in asked.values()}))
        what = f"several: {names}, or one in several precisions or prompt formats"
        raise RecipeError(
            f"'base' is the base of the runs beside it; there is {what if asked else 'no run'}",
            "name the model itself, or evaluate the runs one by one",
        )
    (recipe,) = asked.values()
    return _base(recipe.model.name_or_path, dataclasses.replace(recipe, lora=None))


def evaluated_bases(
    sections: Mapping[str, Any], root: Path, fingerprint: str | None, prompt: str | None = None
) -> list[RunDirectory]:
    """Return the runs of a base that was evaluated already, the newest last. Needs no torch.

    Args:
        sections: of a recipe that trains it (`Recipe.to_dict`), or of a run's resolved recipe.
        root: the folder of all runs.
        fingerprint: of the base's files; None where they are not known.
        prompt: hash of the format that it must be asked in; None to go by the recipe's keys.
    """

    def identity(of: Mapping[str, Any]) -> list[object]:
        model, data = of.get("model") or {}, of.get("data") or {}
        keys = ASKED if data.get("prompt_format") == "chat" else ASKED[:1]
        asked = [prompt] if prompt else [data.get(key) for key in keys]
        weights = [model.get(key) for key in ("name_or_path", "revision", "dtype")]
        return [*weights, of.get("quantization"), *asked]

    runs = []
    for file in sorted(root.glob("base--*/run.json")):
        state = object_or_none(file) or {}
        same = identity(state.get("stand_in") or {}) == identity(sections)
        same &= prompt in (None, state.get("prompt_format_hash"))
        if same and (not fingerprint or state.get("base_fingerprint") in (None, fingerprint)):
            runs.append((str(state.get("created")), RunDirectory(file.parent.name, root)))
    return [run for _, run in sorted(runs, key=lambda entry: entry[0])]


def bare_recipe(
    model: ModelSection, data: DataSection | None = None, quantization: Any = None
) -> Recipe:
    """Return settings for a model that nobody trained here; weights/ loads what a recipe names."""
    return Recipe(
        document=Document(
            Path(model.name_or_path), origins={("model", "name_or_path"): Origin(COMMAND_LINE)}
        ),
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
        return hash_of(folder_fingerprint(weights), precision)
    base = model_fingerprint(model_path(recipe.model), recipe.model.revision)
    return hash_of(base, precision, folder_fingerprint(weights) if weights else None)


def _trained(word: str, trained: TrainedRun) -> Model:
    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(trained.weights)

    run, recipe = trained.run, trained.recipe
    prompts = PromptFormat(trained.prompt_section, trained.weights, load)
    recorded = run.read_state().get("guard", {}).get("prompt_format_hash")
    if recorded and recorded != prompts.hash:
        raise RecipeError(
            f"run '{run.name}' was trained with another prompt format than its files give now"
            f" ({str(recorded)[:12]} -> {prompts.hash[:12]})",
            "restore the chat template, the system prompt or the end token, or train again",
        )
    return Model(word, run, recipe, prompts, model_key(recipe, trained.weights), trained)


def _untrained(word: str, known: Recipe | None, recipe: EvalRecipe, remote_code: bool) -> Model:
    """A model without a run, asked as is known of it; else as the eval recipe says."""
    section = recipe.generation
    is_local = word.startswith("package:") or (Path(word) / "config.json").is_file()
    is_hub_id = word.count("/") == 1 and not word.startswith((".", "/", f"{runs_root().name}/"))
    is_served = section.engine == "openai" and not is_local
    if known is None and not (is_local or is_hub_id or is_served):
        open_run(word)  # raises, with the names of similar runs
    prompt_format = "chat" if section.prompt_format == "auto" else section.prompt_format
    chosen = known or bare_recipe(
        ModelSection(
            name_or_path=word, dtype=section.dtype, trust_remote_code=section.trust_remote_code
        ),
        DataSection(source="", prompt_format=prompt_format),
    )
    if chosen.model.trust_remote_code and not remote_code:
        hint = "pass --trust-remote-code as well"
        raise RecipeError(f"'{word}' runs code that ships with it", hint)
    if known is None and is_served:
        return _without_run(word, chosen, PromptFormat(), hash_of("served", word))
    try:
        return _base(word, chosen, known is None and section.prompt_format == "auto")
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        hint = "read it; then set generation.trust_remote_code=true and pass --trust-remote-code"
        raise RecipeError(f"'{word}' needs Python code that ships with it", hint) from None


def _base(word: str, recipe: Recipe, is_free: bool = False) -> Model:
    """A model without a run; if the format is free, dolly where there is no chat template."""
    model_path(recipe.model)  # which makes the folder of a packaged model
    folder, load = local_folder(recipe), partial(load_tokenizer, recipe)
    if is_free and not facts_of(folder, load).chat_template:
        data = recipe.data.model_copy(update={"prompt_format": "dolly"})
        recipe = dataclasses.replace(recipe, data=data)
    prompts = PromptFormat(recipe.data, folder, load)
    return _without_run(word, recipe, prompts, model_key(recipe, None))


def _without_run(word: str, recipe: Recipe, prompts: PromptFormat, fingerprint: str) -> Model:
    short = _NOT_IN_NAMES.sub("-", Path(model_path(recipe.model)).name).strip("-.")[:60]
    run = RunDirectory(f"base--{short}--{hash_of(fingerprint, prompts.hash)[:8]}")
    return Model(word, run, recipe, prompts, fingerprint)


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
        try:
            if not memory and trained:
                memory.append(Family(trained))
            elif not memory:
                memory.append(ready_to_answer(load_base(model.recipe, model.prompts.tokenizer)))
        except Exception as error:
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
