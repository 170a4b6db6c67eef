"""4-bit weights on a CPU: they stay in the layout they were loaded in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def keep_plain_4bit_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for AVX512-BF16 processors at the first
    evaluation.

    Measured with bitsandbytes 0.50.2: after the repacking a layer's output differs from before (2%
    of the largest logit of a 135M model), so what is trained after the first evaluation is not what
    was trained before it; and for a layer with 128 inputs two loads of the same weights gave
    different outputs.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
