"""The plan of one recipe on one kind of card: memory, batches, time and advice, put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.recipe import Recipe
from recipes_lib.planning.batches import Batches, batches_of, draw, validations
from recipes_lib.planning.cards import DEFAULT, Card, card_named, cards_here
from recipes_lib.planning.duration import Duration, training_duration, walltime
from recipes_lib.planning.lengths import Lengths, lengths_of
from recipes_lib.planning.machine import cpu_card
from recipes_lib.planning.memory import Memory, largest_tokens, memory_of
from recipes_lib.planning.models import model_shape
from recipes_lib.planning.settings import Settings, settings_of
from recipes_lib.planning.uncounted import uncounted


@dataclass(frozen=True)
class Plan:
    """What a training needs.

    Args:
        launch: how it is started.
        eval_tokens: tokens of the largest validation batch.
        validation_tokens: computed tokens of all passes over the validation set.
        recipe_settings: the recipe's own settings, where this plan has others.
    """

    recipe: Recipe
    launch: Launch
    card: Card
    settings: Settings
    lengths: Lengths
    batches: Batches
    memory: Memory
    eval_tokens: int
    validation_tokens: float
    duration: Duration
    recipe_settings: Settings

    @property
    def fits(self) -> bool:
        """Whether what is counted of the worst micro-batch fits, see `verdict`; processes without a
        GPU share the machine's memory.
        """
        return self.memory.needed * self.sharing <= self.card.memory_gib

    @property
    def uncounted(self) -> tuple[str, ...]:
        """What needs memory and is not in the sum, in words."""
        return uncounted(self.recipe, self.settings)

    @property
    def verdict(self) -> str:
        """`yes`, `no`, or `?` where something is not counted: a sum that leaves something out
        cannot say that it fits, nor, for a family that it was not made for, that it does not.
        """
        if not self.fits:
            return "no" if self.settings.shape.known else "?"
        return "?" if self.uncounted else "yes"

    @property
    def sharing(self) -> int:
        """Processes that share one card's memory: those of a machine where the card is its
        processor.
        """
        return self.settings.per_machine if self.settings.device == "cpu" else 1

    @property
    def gpu_hours(self) -> float:
        """Hours times processes (machine hours where there is no GPU)."""
        cards = 1 if self.settings.device == "cpu" else self.settings.world_size
        return self.duration.total * cards / 3600

    @property
    def walltime(self) -> int:
        """Seconds to ask a scheduler for."""
        return walltime(self.duration.total)

    def largest(self, *, checkpointing: bool | None = None) -> int:
        """Return the largest micro-batch in tokens that fits the card."""
        settings = (
            self.settings
            if checkpointing is None
            else replace(self.settings, checkpointing=checkpointing)
        )
        row = self.settings.max_length or max(self.lengths.tokens)
        return largest_tokens(
            settings,
            replace(self.card, memory_gib=self.card.memory_gib / self.sharing),
            row,
            self.eval_tokens,
        )

    def with_train(self, **values: Any) -> Plan:
        """Return the plan with other values of the recipe's `train` that the settings do not hold,
        such as how often is validated.
        """
        recipe = replace(self.recipe, train={**self.recipe.train, **values})
        return _plan(
            recipe,
            self.launch,
            self.card,
            self.settings,
            self.lengths,
            self.batches.accumulation,
            self.recipe_settings,
        )

    def with_rows(self, validation: int) -> Plan:
        """Return the plan with fewer rows held out for validation; the others are trained on."""
        lengths = replace(
            self.lengths,
            train=self.lengths.train + self.lengths.validation - validation,
            validation=validation,
        )
        return _plan(
            self.recipe,
            self.launch,
            self.card,
            self.settings,
            lengths,
            self.batches.accumulation,
            self.recipe_settings,
        )

    def with_settings(self, settings: Settings, accumulation: int) -> Plan:
        """Return the plan with other settings. The launch stays the recipe's: only numbers are
        compared.
        """
        return _plan(
            self.recipe,
            self.launch,
            self.card,
            settings,
            self.lengths,
            accumulation,
            self.recipe_settings,
        )


def plan_recipe(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    accelerate: str | None = None,
    nodes: int | None = None,
    lengths: Lengths | None = None,
) -> Plan:
    """Return the plan of a recipe.

    Args:
        gpu: a card's name, or `cpu`; absent: as `card_for` chooses.
        gpus: processes on each machine; absent, the recipe's.
        lengths: the data's, where the caller has them.

    Raises:
        RecipeError: unknown card or model, a batch that cannot be divided, a launch that cannot be.
    """
    launch = _launch(recipe, gpu, gpus, accelerate, nodes)
    return plan_launched(recipe, launch, card_for(launch, gpu), lengths)


def card_for(launch: Launch, gpu: str | None) -> Card:
    """Return the card of that name; without one this machine's GPU, else the table's default, and
    the processor for a launch without GPUs.

    Raises:
        RecipeError: unknown card.
    """
    if gpu == "cpu" or (gpu is None and launch.config.use_cpu):
        return cpu_card()
    return (
        card_named(gpu)
        if gpu
        else next(iter(cards_here()), replace(card_named(DEFAULT), stands_in=True))
    )


def plan_launched(
    recipe: Recipe, launch: Launch, card: Card, lengths: Lengths | None = None
) -> Plan:
    """Return the plan of a recipe under a launch, on a card.

    Raises:
        RecipeError: an unknown architecture, or a batch that cannot be divided.
        EnvironmentFault: the model's shape cannot be had.
    """
    shape = model_shape(recipe)
    settings = settings_of(recipe, launch, shape, on_cpu=card.name == "cpu")
    lengths = lengths or lengths_of(recipe, shape.vocabulary)
    return _plan(
        recipe, launch, card, settings, lengths, accumulation_steps(recipe, launch.world_size)
    )


def _launch(
    recipe: Recipe, gpu: str | None, gpus: int | None, accelerate: str | None, nodes: int | None
) -> Launch:
    """Return the launch; several GPUs for a recipe of one process mean DDP, and a card means that a
    CPU launch is not wanted.
    """
    chosen = accelerate or recipe.launch.accelerate
    if accelerate is None:
        several = (gpus or 1) * (nodes or 1) > 1
        if gpu not in (None, "cpu") and chosen in ("cpu", "ddp_cpu", "fsdp_cpu"):
            chosen = {"cpu": "single_gpu", "ddp_cpu": "ddp", "fsdp_cpu": "fsdp"}[chosen]
        elif gpu == "cpu" and not chosen.endswith("cpu"):
            chosen = {"single_gpu": "cpu", "fsdp": "fsdp_cpu", "fsdp_qlora": "fsdp_cpu"}.get(
                chosen, "ddp_cpu"
            )
        if several and chosen in ("cpu", "single_gpu"):
            chosen = {"cpu": "ddp_cpu", "single_gpu": "ddp"}[chosen]
        if (
            gpus == 1
            and (nodes or recipe.launch.nodes) == 1
            and chosen not in ("cpu", "single_gpu")
        ):
            return plan_launch(
                recipe.launch, "cpu" if chosen.endswith("cpu") else "single_gpu", 1, None
            )
    if chosen == recipe.launch.accelerate:
        return plan_launch(recipe.launch, None, gpus, nodes)
    return plan_launch(recipe.launch, chosen, gpus or recipe.launch.gpus, nodes)


def _plan(
    recipe: Recipe,
    launch: Launch,
    card: Card,
    settings: Settings,
    lengths: Lengths,
    accumulation: int,
    own: Settings | None = None,
) -> Plan:
    batches = batches_of(settings, lengths, recipe.train, accumulation)
    settings = replace(settings, accumulates=batches.forward_passes > 1)
    eval_tokens, per_pass = _validation(settings, lengths)
    validation = per_pass * validations(batches.steps, batches.steps_per_epoch, recipe.train)
    return Plan(
        recipe=recipe,
        launch=launch,
        card=card,
        settings=settings,
        lengths=lengths,
        batches=batches,
        memory=memory_of(settings, batches.largest, batches.largest_row, eval_tokens),
        eval_tokens=eval_tokens,
        validation_tokens=validation,
        duration=training_duration(settings, batches, card, validation),
        recipe_settings=own or settings,
    )


def _validation(settings: Settings, lengths: Lengths) -> tuple[int, float]:
    """Return the tokens of the largest validation batch, and the computed tokens of one pass over
    the validation rows.
    """
    if not settings.eval_per_device or not lengths.validation:
        return 0, 0.0
    cut = settings.max_length or max(lengths.tokens)
    uncapped = replace(settings, max_tokens=None, packing=False, grouped=False)
    drawn = draw(
        uncapped, [min(length, cut) for length in lengths.tokens[:5000]], settings.eval_per_device
    )
    rows = min(lengths.validation, settings.eval_per_device)
    return round(
        drawn.largest * rows / settings.eval_per_device
    ), drawn.computed / settings.eval_per_device * lengths.validation
