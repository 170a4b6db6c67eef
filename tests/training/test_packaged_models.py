"""Models that travel in a PyPI package."""

from __future__ import annotations

from recipes_lib.training.packaged_models import _silence


def test_making_the_model_folder_leaves_the_terminal_to_our_own_lines(capfd):
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    def settings() -> tuple:
        return (
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            modeling_gguf_pytorch_utils.tqdm,
        )

    before = settings()
    with _silence():
        transformers_logging.get_logger("transformers.modeling_utils").warning(
            "Loading a GGUF checkpoint ..."
        )
        list(modeling_gguf_pytorch_utils.tqdm([1, 2], desc="Converting"))
        list(transformers_logging.tqdm([1, 2], desc="Loading weights"))
    assert (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        modeling_gguf_pytorch_utils.tqdm,
    ) == before
    assert capfd.readouterr().err == ""
