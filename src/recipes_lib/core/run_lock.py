"""Moved to `core.lock`."""

from recipes_lib.core.lock import *  # noqa: F403
