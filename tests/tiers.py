"""Which cases of a grid run in CI, and which at night."""

from collections.abc import Iterable
from typing import Any

import pytest


def in_ci(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the cases of `pytest.mark.parametrize`; those that are not chosen are nightly.

    Where a test has several parameters a case is a tuple of their values.
    """
    cases, params = list(cases), []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        params.append(pytest.param(*values, marks=[] if case in chosen else pytest.mark.nightly))
    assert all(case in cases for case in chosen), f"not among the cases: {chosen}"
    return params
