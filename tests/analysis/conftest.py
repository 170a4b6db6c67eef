"""Runs that a small study of these tests has."""

from __future__ import annotations

from tests.evals.conftest import runs_folder  # noqa: F401
