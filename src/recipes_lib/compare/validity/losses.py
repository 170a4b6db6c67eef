"""Validation losses that cannot be compared: means over other tokens, or computed in another
precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.findings import Finding
from recipes_lib.compare.validity.circumstances import CIRCUMSTANCES
from recipes_lib.compare.validity.settings import Values, arm_values, effective, pairs, setting_text

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements, RunMeasurements

METRIC = "validation_loss"
# They decide which tokens the mean is over.
_TOKENS = (
    "model.name_or_path",
    "data.source",
    "data.subset",
    "data.revision",
    "data.source_split",
    "data.prompt_format",
    "data.chat_template",
    "data.system_prompt",
    "data.chat_loss",
    "data.split.method",
    "data.split.validation",
    "data.split.test",
    "data.split.seed",
    "data.max_examples",
    "data.special_tokens",
    "train.max_length",
    "train.completion_only_loss",
    "train.assistant_only_loss",
    "train.packing",
    "train.eval_packing",
    "train.truncation_mode",
)
# They decide in which arithmetic it is computed.
_PRECISION = (
    "model.dtype",
    "train.bf16",
    "train.fp16",
    "train.bf16_full_eval",
    "train.fp16_full_eval",
    "launch.mixed_precision",
)
_RECORDED = ("confound-data", "confound-split", "confound-prompt-format")


def check_losses(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield, per two arms that both have a validation loss, why the two are not the same
    measure.
    """
    values = arm_values(study, measurements)
    first_runs = {name: arm.runs[0] for name, arm in measurements.arms.items() if arm.runs}
    measured = {
        name: run
        for name, run in first_runs.items()
        if any(line.get("eval_loss") is not None for line in run.curves)
    }
    for first, second in pairs(measured):
        one, other = values.get(first, {}), values.get(second, {})
        tokens = [
            *_differences(_TOKENS, first, second, one, other),
            *_recorded(measured[first], measured[second]),
        ]
        precision = _differences(_PRECISION, first, second, one, other)
        precision += _quantization(first, second, one, other)
        for code, evidence, what, remedy in (
            (
                "loss-of-other-tokens",
                tokens,
                "over different tokens",
                "compare answers, or evaluate both on the same tokens",
            ),
            (
                "loss-in-other-precision",
                precision,
                "in different precisions",
                "evaluate both in one precision first",
            ),
        ):
            if evidence:
                title = f"The validation losses of {first} and {second} are {what}"
                yield Finding(
                    code, "error", title, tuple(evidence), remedy, (first, second), (METRIC,)
                )


def _differences(
    keys: tuple[str, ...], first: str, second: str, one: Values, other: Values
) -> list[str]:
    if not one or not other:
        return []
    return [
        f"{key}: {first} {setting_text(one.get(key))}, {second} {setting_text(other.get(key))}"
        for key in keys
        if (effective(key, one) or None) != (effective(key, other) or None)
    ]


def _quantization(first: str, second: str, one: Values, other: Values) -> list[str]:
    """The bits of the base's weights."""
    if not one or not other:
        return []
    mine, theirs = (_bits(values) for values in (one, other))
    return [f"quantization: {first} {mine}, {second} {theirs}"] if mine != theirs else []


def _bits(values: Values) -> str:
    return (
        "4 bit"
        if values.get("quantization.load_in_4bit")
        else "8 bit"
        if values.get("quantization.load_in_8bit")
        else "none"
    )


def _recorded(one: RunMeasurements, other: RunMeasurements) -> list[str]:
    """What the runs themselves recorded about their rows."""
    lines = []
    for circumstance in (known for known in CIRCUMSTANCES if known.code in _RECORDED):
        mine: Any = circumstance.read(one)
        theirs: Any = circumstance.read(other)
        names = [
            name
            for name in mine
            if name in theirs and mine[name] != theirs[name] and name != "train"
        ]
        lines += [
            f"{name}: {setting_text(mine[name])} and {setting_text(theirs[name])}" for name in names
        ]
    return lines
