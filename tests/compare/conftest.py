"""The study of the tests of running one, for tests that only read it."""

from tests.study.conftest import study_folder  # noqa: F401
