"""Moved to `core.files`."""

from recipes_lib.core.files import *  # noqa: F403
