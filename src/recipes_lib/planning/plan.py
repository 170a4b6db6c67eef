"""The plan of one recipe on one kind of card: memory, batches and time, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import RecipeError, first_line
from recipes_lib.core.json_files import object_or_none
from recipes_lib.data.sources import hub_answers, offline_by_environment
from recipes_lib.models.known import known_facts
from recipes_lib.models.shapes import ModelShape, UnknownFamily, shape_of_config
from recipes_lib.planning.batches import Batches, batches_of, validation_tokens, validations
from recipes_lib.planning.cards import DEFAULT, Card, card_named, cards_here, cpu_card
from recipes_lib.planning.duration import Duration, EvalTime, training_duration, walltime
from recipes_lib.planning.lengths import Lengths, lengths_of
from recipes_lib.planning.measured import measured_on
from recipes_lib.planning.memory import Memory, largest_tokens, memory_of
from recipes_lib.planning.settings import Settings, settings_of, uncounted

# tokens of a pass that keeps a card busy; more gain nothing, and what is kept of them may not fit
_MODEL_KEY = "model.name_or_path"
# A launch on CPUs and its twin on GPUs.
_TWINS = {"cpu": "single_gpu", "ddp_cpu": "ddp", "fsdp_cpu": "fsdp"}


@dataclass(frozen=True)
class Plan:
    """What a training needs.

    Args:
        launch: how it is started; a plan with other settings keeps it.
        accumulation: micro-batches per step and process.
        evals: the time of evaluations that are counted in, one of each.
        price: of one card for one hour, in any currency; None for no cost.
    """

    recipe: Recipe
    launch: Launch
    card: Card
    settings: Settings
    lengths: Lengths
    accumulation: int
    evals: Sequence[EvalTime] = ()
    price: float | None = None

    @cached_property
    def batches(self) -> Batches:
        """Steps and forward passes."""
        settings = replace(self.settings, max_tokens=self.tokens_per_pass)
        return batches_of(settings, self.lengths, self.recipe.train, self.accumulation)

    @cached_property
    def tokens_per_pass(self) -> int | None:
        """The cap on the tokens of a forward pass; None for none."""
        return self.settings.max_tokens

    @cached_property
    def _validation(self) -> tuple[int, float]:
        return validation_tokens(self.settings, self.lengths)

    @property
    def eval_tokens(self) -> int:
        """Tokens of the largest validation batch."""
        return self._validation[0]

    @cached_property
    def _accumulating(self) -> Settings:
        """The settings with what only the batches tell."""
        return replace(self.settings, accumulates=self.batches.forward_passes > 1)

    @cached_property
    def memory(self) -> Memory:
        """GiB of one process."""
        batches = self.batches
        return memory_of(self._accumulating, batches.largest, batches.largest_row, self.eval_tokens)

    @cached_property
    def least(self) -> float:
        """GiB that a card must have. Where passes take up what is free, only the longest row must
        go through.
        """
        if self.settings.max_tokens == self.tokens_per_pass:
            return self.memory.needed
        return self.with_settings(max_tokens=self.longest).memory.needed

    @cached_property
    def duration(self) -> Duration:
        """Seconds of the training."""
        batches = self.batches
        passes = validations(batches.steps, batches.steps_per_epoch, self.recipe.train)
        tokens = self._validation[1] * passes
        return training_duration(self.settings, batches, self.card, tokens)

    @property
    def basis(self) -> str:
        """Where the speed is from."""
        row = measured_on(self.card.name, self.settings)
        return self.card.basis if row is None else row.basis

    @property
    def needed(self) -> float:
        """GiB that the card must have; processes without a GPU share the machine's memory."""
        return self.memory.needed * self.sharing

    @property
    def fits(self) -> bool:
        """Whether what is counted of the worst micro-batch fits, see `verdict`."""
        return self.needed <= self.card.memory_gib

    @cached_property
    def uncounted(self) -> tuple[str, ...]:
        """What needs memory and is not in the sum, in words."""
        return uncounted(self.recipe, self.settings)

    @property
    def certain(self) -> bool | None:
        """Whether it fits; None where it does by a sum that leaves something out."""
        if not self.fits:
            return False
        return None if self.uncounted else True

    @property
    def verdict(self) -> str:
        """`certain` in a word."""
        return {True: "yes", False: "no", None: "?"}[self.certain]

    @property
    def sharing(self) -> int:
        """Processes that share one card's memory, as those of a machine without a GPU do."""
        return self.settings.per_machine if self.settings.device == "cpu" else 1

    @property
    def evaluation(self) -> float:
        """Seconds of the evaluations."""
        return sum(item.total for item in self.evals)

    @property
    def card_hours(self) -> float:
        """Hours times processes (machine hours where there is no GPU), evaluations on one card."""
        cards = 1 if self.settings.device == "cpu" else self.settings.world_size
        return (self.duration.total * cards + self.evaluation) / 3600

    @property
    def walltime(self) -> int:
        """Seconds to ask a scheduler for."""
        return walltime(self.duration.total)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, as it is cut."""
        longest = max(self.lengths.tokens)
        return min(self.settings.max_length or longest, longest)

    def largest(self, *, checkpointing: bool | None = None) -> int:
        """Return the largest micro-batch in tokens that fits the card."""
        settings = self._accumulating
        if checkpointing is not None:
            settings = replace(settings, checkpointing=checkpointing)
        card = replace(self.card, memory_gib=self.card.memory_gib / self.sharing)
        row = settings.max_length or max(self.lengths.tokens)
        return largest_tokens(settings, card, row, self.eval_tokens)

    def with_settings(self, accumulation: int | None = None, **changes: Any) -> Plan:
        """Return the plan with other settings."""
        settings = replace(self.settings, **changes)
        return replace(self, settings=settings, accumulation=accumulation or self.accumulation)


def plan_recipe(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    accelerate: str | None = None,
    nodes: int | None = None,
) -> Plan:
    """Return the plan of a recipe; what is not given is the recipe's own, or `card_for`'s choice.

    Raises:
        RecipeError: unknown card or model, a batch that cannot be divided, a launch that cannot be.
    """
    launch = _launch(recipe, gpu, gpus, accelerate, nodes)
    return plan_launched(recipe, launch, card_for(launch, gpu))


def card_for(launch: Launch, gpu: str | None) -> Card:
    """Return the card of that name; else the processor for a launch without GPUs, this machine's
    GPU, or the table's default.

    Raises:
        RecipeError: unknown card.
    """
    if gpu == "cpu" or (gpu is None and launch.config.use_cpu):
        return cpu_card()
    if gpu:
        return card_named(gpu)
    return next(iter(cards_here()), replace(card_named(DEFAULT), stands_in=True))


def plan_launched(
    recipe: Recipe, launch: Launch, card: Card, lengths: Lengths | None = None
) -> Plan:
    """Return the plan of a recipe under a launch, on a card, for the data's lengths if known.

    Raises:
        RecipeError: an unknown architecture, or a batch that cannot be divided.
        EnvironmentFault: the model's shape cannot be had.
    """
    shape = model_shape(recipe)
    settings = settings_of(recipe, launch, shape, on_cpu=card.name == "cpu")
    lengths = lengths or lengths_of(recipe, shape.vocabulary)
    accumulation = accumulation_steps(recipe, launch.world_size)
    return Plan(recipe, launch, card, settings, lengths, accumulation)


def _launch(
    recipe: Recipe, gpu: str | None, gpus: int | None, accelerate: str | None, nodes: int | None
) -> Launch:
    """Return the launch: several GPUs for one process mean DDP, and a card means no CPU launch."""
    own = recipe.launch
    chosen = accelerate or own.accelerate
    if accelerate is None:
        if gpu not in (None, "cpu"):
            chosen = _TWINS.get(chosen, chosen)
        elif gpu == "cpu" and not chosen.endswith("cpu"):
            twins = {on_gpu: on_cpu for on_cpu, on_gpu in _TWINS.items()}
            chosen = {**twins, "fsdp_qlora": "fsdp_cpu"}.get(chosen, "ddp_cpu")
        if (gpus or 1) * (nodes or 1) > 1:
            chosen = {"cpu": "ddp_cpu", "single_gpu": "ddp"}.get(chosen, chosen)
        elif gpus == 1 and (nodes or own.nodes) == 1 and chosen not in ("cpu", "single_gpu"):
            return plan_launch(own, "cpu" if chosen.endswith("cpu") else "single_gpu", 1, None)
    if chosen == own.accelerate:
        return plan_launch(own, None, gpus, nodes)
    return plan_launch(own, chosen, gpus or own.gpus, nodes)


def model_shape(recipe: Recipe) -> ModelShape:
    """Return the shape of a recipe's model, by its config.json: that of a folder, of the facts
    that stand beside the recipes, of the Hub's cache, or of the Hub.

    Raises:
        RecipeError: no model at this path, or an architecture that the planner does not know.
        EnvironmentFault: nothing is known of the name, and the Hub does not answer, or the family.
    """
    name, known = recipe.model.name_or_path, known_facts()
    hint = (
        f"online, or after: hf download {name} config.json; known without it: {len(known)} names"
        " such as meta-llama/Llama-3.1-8B"
    )
    what = (
        f"'{name}' is not on this machine, not among the known models, and the Hub does not answer"
    )
    folder: Path | None = None
    config: Mapping[str, Any] | None = None
    source = "config.json"
    if name in known and not Path(name).is_dir():
        config, source = known[name].config, known[name].source
    elif (folder := local_folder(recipe)) is not None:
        config = object_or_none(folder / "config.json")
        if config is None:
            raise recipe.error(
                _MODEL_KEY,
                f"{folder} has no readable config.json",
                "a model is a folder with config.json, safetensors and a tokenizer",
            )
    elif not (name.startswith("package:") or offline_by_environment() or not hub_answers()):
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(name, "config.json", revision=recipe.model.revision)
            config = object_or_none(Path(file))
        except Exception as error:  # gated, no such model or revision: each has its own message
            what, hint = f"the Hub gives no config.json of '{name}': {first_line(error)}", ""
    if config is not None:
        try:
            return shape_of_config(config, name, source)
        except UnknownFamily as error:
            raise recipe.fault(_MODEL_KEY, error.what, *error.hints) from None
        except RecipeError as error:
            raise recipe.error(_MODEL_KEY, error.what, *error.hints) from None
    hints = [*did_you_mean(name, known), *([hint] if hint else [])]
    raise recipe.fault(_MODEL_KEY, f"no plan: {what}", *hints)
