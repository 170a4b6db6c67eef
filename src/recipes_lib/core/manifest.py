"""Moved to `core.environment`."""

from recipes_lib.core.environment import *  # noqa: F403
