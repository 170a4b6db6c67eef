"""Targets ready to answer: grouped so that each base is loaded once, with fingerprint, prompt
format and run directory.

A model without a run gets a run directory of its own, `base--<model>--<hash8>`, whose hash covers
weights, precision and prompt format: the same model asked in another format is another directory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ASKED, DataSection
from recipes_lib.config.upstream import build_quantization_config
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import format_hash, generation_prompt
from recipes_lib.data.supervision import prompt_ids
from recipes_lib.eval_key import model_key
from recipes_lib.generation.targets import Target
from recipes_lib.models.architectures import ready_to_answer
from recipes_lib.weights.base import base_fingerprint, load_model, load_tokenizer, model_path
from recipes_lib.weights.finished_run import BASE, Family, TrainedRun, check_weights, families
from recipes_lib.weights.merge import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class Format(Protocol):
    """How conversations become prompts."""

    hash: str

    def render(self, messages: Sequence[Message]) -> tuple[str | None, tuple[int, ...]]:
        """Return the prompt's text and token ids; no text where only the server knows the
        format.
        """


class ServerFormat:
    """The chat template of the server that has the model."""

    hash = "server"
    name = "server"

    def render(self, messages: Sequence[Message]) -> tuple[None, tuple[int, ...]]:
        """Return nothing: the messages are sent as they are."""
        return None, ()


class PromptFormat:
    """Conversations rendered as the model was trained to read them; `hash` identifies the
    format.
    """

    def __init__(self, section: DataSection, tokenizer: Any) -> None:
        self.section, self.tokenizer = section, tokenizer
        self.name = section.prompt_format
        self.hash = format_hash(section, tokenizer)

    def render(self, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
        """Return the prompt's text and token ids."""
        text = generation_prompt(self.section, self.tokenizer, messages=list(messages))
        return text, tuple(prompt_ids(self.section, self.tokenizer, text))


@dataclass
class Subject:
    """A target that is ready to answer.

    `using` gives the context in which its adapter is active.
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

    def record(self) -> None:
        """Write run.json of a model without a run, so that its directory's name can be used like a
        run's.
        """
        if not self.target.is_base or self.run.exists():
            return
        recipe = self.target.recipe
        data = {"source": "", **{key: getattr(recipe.data, key) for key in ASKED}}
        self.run.write_state(
            "finished",
            kind="base",
            stand_in={
                "model": dataclasses.asdict(recipe.model),
                "data": data | {"prompt_format": self.prompts.name},
                "quantization": recipe.quantization,
            },
            fingerprint=self.fingerprint,
            base_fingerprint=base_fingerprint(recipe),
            prompt_format_hash=self.prompts.hash,
        )


@contextmanager
def loaded(targets: Sequence[Target], weights: bool = True) -> Iterator[list[Subject]]:
    """Give the subjects of targets that share one base, loaded once; afterwards its memory is free
    again.

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
        free_memory()


def grouped(targets: Sequence[Target]) -> list[list[Target]]:
    """Group targets that one loaded base serves: its runs, and the base itself."""
    groups: list[list[Target]] = []
    for group in families([target.trained for target in targets if target.trained]):
        names = {one.run.name for one in group}
        groups.append(
            [target for target in targets if target.trained and target.trained.run.name in names]
        )
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
    same_model = (
        first.recipe.model == target.recipe.model
        and first.recipe.quantization == target.recipe.quantization
    )
    return same_model and first.trained is not None and first.recipe.lora is not None


def _load_group(targets: Sequence[Target], weights: bool) -> list[Subject]:
    trained = [target.trained for target in targets if target.trained]
    if trained and weights:
        family = Family(trained)
        return [_of_family(family, target) for target in targets]
    return [_alone(target, weights) for target in targets]


def _of_family(family: Family, target: Target) -> Subject:
    """One of the models that a loaded base serves; a base is asked with the tokenizer of the first
    run.
    """
    name = target.trained.run.name if target.trained else BASE
    tokenizer = family.tokenizers[name] if target.trained else family.tokenizer
    return _subject(target, tokenizer, family.model, lambda: family.answering(name))


def _alone(target: Target, weights: bool) -> Subject:
    """A model without a run, or a target whose weights a server has."""
    if target.is_stand_in and not weights:
        # Only the server has it: its name stands for its weights, its server renders the prompts.
        prompts, fingerprint = ServerFormat(), hash_of("served", target.word)
        run = _base_directory(target.word, fingerprint, prompts.hash)
        return Subject(target, run, fingerprint, prompts)
    if target.trained:
        from transformers import AutoTokenizer

        check_weights(target.trained)
        return _subject(target, AutoTokenizer.from_pretrained(target.trained.weights), None, None)
    try:
        model_path(target.recipe.model)
        tokenizer = load_tokenizer(target.recipe)
        model = _load_bare(target.recipe, tokenizer) if weights else None
        return _subject(target, tokenizer, model, None)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        hint = (
            "read that code; then set generation.trust_remote_code=true and pass"
            " --trust-remote-code"
        )
        raise RecipeError(f"'{target.word}' needs Python code that ships with it", hint) from None


def _base_directory(path: str, fingerprint: str, format_hash: str) -> RunDirectory:
    """The run directory of a model without a run."""
    short = _NOT_IN_NAMES.sub("-", Path(path).name).strip("-.")[:60]
    return RunDirectory(f"base--{short}--{hash_of(fingerprint, format_hash)[:8]}")


def _load_bare(recipe: Recipe, tokenizer: Any) -> PreTrainedModel:
    import torch

    model = ready_to_answer(load_model(recipe, tokenizer, build_quantization_config(recipe)))
    return model.to("cuda") if torch.cuda.is_available() and recipe.quantization is None else model


def _subject(target: Target, tokenizer: Any, model: Any, using: Any) -> Subject:
    """Return a subject with its fingerprint, prompt format and run directory."""
    recipe = target.recipe
    section = recipe.data
    if recipe.name == "auto" and not getattr(tokenizer, "chat_template", None):
        section = dataclasses.replace(section, prompt_format="dolly")
    prompts = PromptFormat(section, tokenizer)
    fingerprint = model_key(recipe, target.trained.weights if target.trained else None)
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
            f"run '{one.run.name}' was trained with another prompt format than its files give now"
            f" ({str(recorded)[:12]} -> {prompts.hash[:12]})",
            "the chat template, the system prompt or the end token changed since: restore it, or"
            " train the run again",
        )
