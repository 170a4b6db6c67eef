"""Moved to `core.errors`."""

from recipes_lib.core.errors import *  # noqa: F403
