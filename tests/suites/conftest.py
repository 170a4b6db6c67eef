"""The finished runs and tiny judges of the generation tests."""

from tests.generation.conftest import judge_file, long_tiny_model_dir, make_run, runs_folder  # noqa: F401
