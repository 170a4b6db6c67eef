"""What is to be evaluated, as the command line names it: finished runs, their base, and any other
model. Nothing is loaded here.

A model without a run gets a run directory of its own, `base--<model>--<hash8>` (`subjects`), whose
name can be used like a run's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import COMMAND_LINE, Origin
from recipes_lib.config.model_files import KEY as MODEL_KEY
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import (
    ASKED,
    DataSection,
    LaunchSection,
    ModelSection,
    RunSection,
)
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, open_run
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.weights.finished_run import BASE, TrainedRun, finished_run


@dataclass(frozen=True)
class Target:
    """One word of the command line: a finished run, or a model as a recipe that was never
    trained.
    """

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

    @property
    def identity(self) -> Any:
        """What makes two targets the same run, or the same model asked in the same way."""
        if self.trained:
            return self.trained.run.path
        section = self.recipe.data
        asked = [getattr(section, key) for key in ASKED]
        return (
            self.recipe.model.name_or_path,
            str(self.recipe.model),
            str(self.recipe.quantization),
            *asked,
        )


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How models without a run are asked, and what the command line allows.

    Args:
        prompt_format: `generation.prompt_format` of the eval recipe.
        dtype: precision of models that are no run's base.
        any_model: take a word that is neither run nor local model as a model that a server has.
        own_code: whether the eval recipe asks for code that ships with a model without a run
            (`generation.trust_remote_code`).
        remote_code: whether the command line allowed code that ships with a model
            (`--trust-remote-code`).
    """

    prompt_format: str = "auto"
    dtype: str = "bfloat16"
    any_model: bool = False
    own_code: bool = False
    remote_code: bool = False


def asking_of(recipe: EvalRecipe, remote_code: bool) -> Asking:
    """Return how an eval recipe asks models without a run."""
    section = recipe.generation
    return Asking(
        prompt_format=section.prompt_format,
        dtype=section.dtype,
        any_model=section.engine == "openai",
        own_code=section.trust_remote_code,
        remote_code=remote_code,
    )


def find_targets(words: Sequence[str], asking: Asking | None = None) -> list[Target]:
    """Return what the words name, each run and model once; see `targets_by_word`."""
    return distinct(targets_by_word(words, asking).values())


def distinct(targets: Iterable[Target]) -> list[Target]:
    """Return each run and model once, in order."""
    return list({str(target.identity): target for target in targets}.values())


def targets_by_word(words: Sequence[str], asking: Asking | None = None) -> dict[str, Target]:
    """Return what each word names: a run, a local model, a packaged model, a Hub id, or `base` for
    the base of the runs.

    A model that is the base of a run among the words is asked as that run is: in its precision and
    prompt format.

    Args:
        words: run names or folders, model folders, `package:` names, Hub ids, `base`.
        asking: how; None for the defaults.

    Raises:
        RecipeError: a word is neither a run nor a model, a run is not finished, a run was trained
            with another prompt format, `base` is not one model, or code of a model is not allowed.
    """
    asking = asking or Asking()
    opened = {word: open_run(word) for word in words if is_run(word)}
    stand_ins = {word: recipe for word, run in opened.items() if (recipe := stored_recipe(run))}
    runs = {
        word: finished_run(run, asking.remote_code)
        for word, run in opened.items()
        if word not in stand_ins
    }
    for one in runs.values():
        trained_with = one.recipe.data.prompt_format
        if asking.prompt_format not in ("auto", trained_with):
            raise RecipeError(
                f"run '{one.run.name}' was trained with prompt format {trained_with}, "
                f"generation.prompt_format asks for {asking.prompt_format}",
                "leave generation.prompt_format at auto",
            )
    targets: dict[str, Target] = {}
    for word in dict.fromkeys(words):
        if word in runs:
            targets[word] = Target(word, runs[word].recipe, runs[word])
        elif word in stand_ins:
            targets[word] = _allowed(
                Target(stand_ins[word].model.name_or_path, stand_ins[word]), asking
            )
        elif word == BASE:
            targets[word] = common_base([one.recipe for one in runs.values()])
        else:
            if not (asking.any_model or _is_model(word)):
                open_run(word)  # raises, with the names of similar runs
            same = [one.recipe for one in runs.values() if one.recipe.model.name_or_path == word]
            found = (
                base_target(same[0])
                if same
                else Target(
                    word, stand_in_recipe(word, asking.prompt_format, asking.dtype, asking.own_code)
                )
            )
            targets[word] = _allowed(found, asking)
    return targets


def _allowed(target: Target, asking: Asking) -> Target:
    """Return the target, unless it would run code of its own that is not allowed."""
    if target.recipe.model.trust_remote_code and not asking.remote_code:
        raise RecipeError(
            f"'{target.word}' runs code that ships with it", "pass --trust-remote-code as well"
        )
    return target


def common_base(recipes: Sequence[Recipe]) -> Target:
    """Return the base that adapters share.

    Raises:
        RecipeError: there is no adapter, or their bases differ.
    """
    bases = {
        str(target.identity): target
        for target in (base_target(recipe) for recipe in recipes if recipe.lora is not None)
    }
    if len(bases) == 1:
        return next(iter(bases.values()))
    if not bases:
        raise RecipeError(
            "'base' is the base of the runs beside it, and none of them is an adapter",
            "name the model itself",
        )
    names = sorted({target.recipe.model.name_or_path for target in bases.values()})
    how = (
        f"{', '.join(names)}"
        if len(names) > 1
        else f"{names[0]}, asked in several ways (precision, prompt format)"
    )
    raise RecipeError(
        f"'base' is not one model: {how}", "name the model itself, or evaluate the runs one by one"
    )


def base_target(recipe: Recipe) -> Target:
    """Return the base model of a run, asked as the run is."""
    return Target(recipe.model.name_or_path, dataclasses.replace(recipe, lora=None))


def is_run(word: str) -> bool:
    """Whether a word names a run that is there."""
    path = Path(word)
    return (len(path.parts) > 1 and (path / "run.json").is_file()) or (
        runs_root() / path.name / "run.json"
    ).is_file()


def _is_model(word: str) -> bool:
    return (
        word.startswith("package:")
        or (Path(word) / "config.json").is_file()
        or (word.count("/") == 1 and not word.startswith((".", "/")))
    )


def stand_in_recipe(
    word: str, prompt_format: str = "auto", dtype: str = "bfloat16", own_code: bool = False
) -> Recipe:
    """Return a recipe that stands for a model nobody trained; the prompt format `auto` is settled
    when its tokenizer is there.
    """
    chosen: Any = "chat" if prompt_format == "auto" else prompt_format
    return Recipe(
        path=Path(word),
        name=prompt_format,
        model=ModelSection(name_or_path=word, dtype=dtype, trust_remote_code=own_code),  # type: ignore[arg-type]
        data=DataSection(source="", prompt_format=chosen),
        run=RunSection(),
        launch=LaunchSection(),
        train={},
        lora=None,
        quantization=None,
        origins={MODEL_KEY: Origin(COMMAND_LINE)},
        warnings=(),
    )


def stored_recipe(run: RunDirectory) -> Recipe | None:
    """Return the stand-in recipe of a model without a run, or None for a trained run."""
    stored = run.read_state().get("stand_in")
    if stored is None:
        return None
    recipe = stand_in_recipe(stored["model"]["name_or_path"], stored["data"]["prompt_format"])
    model, data = ModelSection(**stored["model"]), DataSection(**stored["data"])
    return dataclasses.replace(recipe, model=model, data=data, quantization=stored["quantization"])
