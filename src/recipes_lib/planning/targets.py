"""Which matrices of a model a LoRA section adapts, and at which rank, as PEFT 0.21 finds them by
their names; no torch.

Since transformers 5 the experts of a layer are one parameter. In the families of `_FORMER_LAYERS`
PEFT takes their former names for it, wherever they stand: then a dense MLP or a shared expert of
the same names has no adapter. Elsewhere `lora.target_parameters` alone adapts experts.

Source: peft 0.21 `tuners_utils.check_target_module_exists`, `utils/transformers_weight_conversion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from recipes_lib.models.architectures import ARCHITECTURES, ROUTER
from recipes_lib.models.blocks import Matrix
from recipes_lib.models.shapes import ModelShape

_BY_DEFAULT = {
    "gpt2": ("c_attn",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
# name of a former layer -> the parameter it is in now
_MIXTRAL = {"gate": ROUTER, "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {
    "gate": ROUTER,
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
_FORMER_LAYERS = {
    "mixtral": _MIXTRAL,
    **dict.fromkeys(
        (
            *("qwen3_moe", "qwen3_next", "olmoe", "glm4_moe", "glm4_moe_lite"),
            *("deepseek_v2", "deepseek_v3"),
        ),
        _QWEN,
    ),
}

Adapted = tuple[tuple[Matrix, int], ...]


def adapted_matrices(lora: Mapping[str, Any], shape: ModelShape) -> tuple[Adapted, ...]:
    """Return the adapted matrices of each layer, and last those outside, with their ranks."""
    rule = _Rule(lora, shape)
    layers = (
        rule.adapted(block.matrices, f"{shape.path}.{number}.")
        for number, block in enumerate(shape.blocks)
    )
    return (*layers, rule.adapted(shape.matrices, ""))


class _Rule:
    """`lora`'s keys as PEFT reads them for one model."""

    def __init__(self, lora: Mapping[str, Any], shape: ModelShape) -> None:
        self.rank = int(lora.get("r", 8))
        self.ranks: dict[str, int] = dict(lora.get("rank_pattern") or {})
        self.excluded = lora.get("exclude_modules") or ()
        self.saved = [str(name) for name in lora.get("modules_to_save") or ()]
        only = lora.get("layers_to_transform")
        self.only = {only} if isinstance(only, int) else {*only} if only else None
        self.parameters = {str(name) for name in lora.get("target_parameters") or ()}
        written = lora.get("target_modules")
        if written is None:
            default = ("q_proj", "v_proj", "qkv_proj")
            written = [] if self.parameters else _BY_DEFAULT.get(shape.family, default)
        self.all_linear = isinstance(written, str) and written.lower() == "all-linear"
        self.pattern = written if isinstance(written, str) and not self.all_linear else None
        self.names = set() if isinstance(written, str) else {str(name) for name in written}
        needs = ARCHITECTURES.get(shape.family) if self.all_linear else None
        self.left_out = needs.left_out if needs else ()
        if former := _FORMER_LAYERS.get(shape.family):
            self._convert(former, shape)
        self.endings = tuple(f".{name}" for name in self.names)
        self.parameter_endings = tuple(f".{name}" for name in self.parameters)

    def _convert(self, former: Mapping[str, str], shape: ModelShape) -> None:
        """Take names of former layers for parameters; two that became one have twice the rank."""
        if self.all_linear or self.pattern is not None:  # PEFT makes a list of last names of them
            every = [
                (f"{shape.path}.{number}.{matrix.name}", matrix)
                for number, block in enumerate(shape.blocks)
                for matrix in block.matrices
            ]
            if self.all_linear:
                self.names = {matrix.last_name for _, matrix in every if matrix.linear} | {*former}
            else:
                found = {name.rpartition(".")[2] for name, _ in every if self._matches(name)}
                for name, _ in every:
                    found |= {
                        old
                        for old, new in former.items()
                        if name.endswith(f".{new}") and self._matches(name[: -len(new)] + old)
                    }
                self.names = found
        moved = {
            name: old
            for name in self.names
            for old in former
            if name == old or name.endswith(f".{old}")
        }
        self.names -= {*moved}
        self.parameters |= {former[old] for old in moved.values()}
        if self.all_linear:  # as `architectures.settle_targets` has it
            self.parameters.discard(ROUTER)
        if sum(former[old] == "gate_up_proj" for old in {*moved.values()}) == 2:
            self.ranks[r".*\.gate_up_proj"] = 2 * self.rank
        self.all_linear, self.pattern = False, None

    def adapted(self, matrices: Iterable[Matrix], prefix: str) -> Adapted:
        """Return those of some matrices that have an adapter, with its rank."""
        found = []
        for matrix in matrices:
            name = f"{prefix}{matrix.name}"
            parameter = f"{name}.weight" if matrix.linear else name
            if parameter in self.parameters or parameter.endswith(self.parameter_endings):
                found.append((matrix, self._rank(parameter)))
            elif matrix.linear and matrix.last_name not in self.left_out and self._matches(name):
                found.append((matrix, self._rank(name)))
        return tuple(found)

    def _matches(self, name: str) -> bool:
        if isinstance(self.excluded, str):
            if re.fullmatch(self.excluded, name):
                return False
        elif any(name == one or name.endswith(f".{one}") for one in self.excluded):
            return False
        if any(re.match(rf"(^|.*\.){one}($|\..*)", name) for one in self.saved):
            return False
        if self.all_linear or name in self.names:  # PEFT lists whole names for all-linear
            return True
        if self.pattern is not None:
            return re.fullmatch(self.pattern, name) is not None
        if not name.endswith(self.endings):
            return False
        if self.only is None:
            return True
        number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return number is not None and int(number[1]) in self.only

    def _rank(self, name: str) -> int:
        if not self.ranks:
            return self.rank
        patterns = (one for one in self.ranks if re.match(rf"(.*\.)?({one})$", name))
        return self.ranks.get(next(patterns, ""), self.rank)
