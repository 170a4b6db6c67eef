"""The two numbers of a plan that `recipes ls` shows, and only where they are had at once: without a
network, large files or a GPU query.
"""

from __future__ import annotations

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.loader import Document
from recipes_lib.config.recipe import Recipe, recipe_from
from recipes_lib.core.errors import RecipesError
from recipes_lib.data.sources import find_path, listed_sources
from recipes_lib.models.known import known_shapes
from recipes_lib.planning.cards import DEFAULT, card_named
from recipes_lib.planning.machine import cpu_card
from recipes_lib.planning.plan import plan_launched

LARGEST_DATA = 300_000  # bytes; reading more would keep the list waiting
_CARD = card_named(DEFAULT)


def quick_plan(document: Document) -> tuple[float, float] | None:
    """Return GiB per process and seconds of a recipe's default launch; None where only `recipes
    plan` can say.

    The document was not checked, which would take most of the time of the list: what cannot be
    planned has no numbers.
    """
    try:
        recipe = recipe_from(document)
        if recipe.model.name_or_path not in known_shapes() or not _small(recipe):
            return None
        launch = plan_launch(recipe.launch, None, None, None)
        plan = plan_launched(recipe, launch, cpu_card() if launch.config.use_cpu else _CARD)
    except (RecipesError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return None
    return plan.memory.needed, plan.duration.total


def _small(recipe: Recipe) -> bool:
    """Whether no source of the rows is a folder or a large file of this machine."""
    paths = [find_path(source.source, (recipe.base_dir,)) for source in listed_sources(recipe.data)]
    return all(
        path is None or (path.is_file() and path.stat().st_size <= LARGEST_DATA) for path in paths
    )
