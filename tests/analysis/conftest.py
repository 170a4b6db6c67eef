"""Runs that a small study of these tests has."""

from tests.evals.conftest import runs_folder  # noqa: F401
