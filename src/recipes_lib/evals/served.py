"""Models that only a server knows: there is a name, and no weights on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes_lib.core.files import hash_of


def served_fingerprint(name: str) -> str:
    """Return the fingerprint of a model of which only its name on a server is known."""
    return hash_of("served", name)


def is_served_only(state: Mapping[str, Any]) -> bool:
    """Whether the run.json of a model without a run is of one that only a server knows."""
    stand_in = state.get("stand_in")
    if not stand_in:
        return False
    return bool(state.get("fingerprint") == served_fingerprint(stand_in["model"]["name_or_path"]))
