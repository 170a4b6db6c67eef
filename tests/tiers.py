"""Which cases of a grid run in CI, and which at night."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def in_ci(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the cases of `pytest.mark.parametrize`; those that are not chosen are nightly.

    Where a test has several parameters a case is a tuple of their values.
    """
    found, left = [], list(chosen)
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        if case in left:
            left.remove(case)
            found.append(pytest.param(*values))
        else:
            found.append(pytest.param(*values, marks=pytest.mark.nightly))
    assert not left, f"not among the cases: {left}"
    return found
