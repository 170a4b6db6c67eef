"""Quantiles without numpy are scipy's."""

from __future__ import annotations

import pytest
from scipy import special

from recipes_lib.statistics.distributions import chi_square_quantile, two_sided_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 80, 804, 14041])
def test_quantiles_are_those_of_scipy(freedom: int) -> None:
    for alpha in (0.5, 0.05, 0.01, 0.0002, 1e-7):
        exact = special.stdtrit(freedom, 1 - alpha / 2)
        assert two_sided_quantile(freedom, alpha) == pytest.approx(exact, rel=1e-6)
    if freedom < 100:
        for above in (0.99, 0.5, 0.05, 1e-6):
            exact = special.chdtri(freedom, above)
            assert chi_square_quantile(freedom, above) == pytest.approx(exact, rel=1e-9)
