"""The shape of a model: its layers, vocabulary and embeddings, and the parameter counts that
follow. Read from a config.json, no torch.

Counted is what is loaded for training on text: the language model alone where transformers has a
class for it, else everything, of which the parts that read images or sound are not trained. Those
of Gemma 3 are counted; any others are said and not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.models.blocks import (
    FAMILIES,
    Block,
    Matrix,
    Numbers,
    blocks_of,
    outside_blocks,
    path_of,
    tied,
)

# `AutoModelForCausalLM` of transformers 5.24 makes the language model alone of these
_TEXT_ALONE = ("qwen3_5", "qwen3_5_moe", "llama4")
_NO_SDPA = ("gemma2", "gpt_oss")
_NO_VARLEN = (*_NO_SDPA, "llama4_text")
# with buffers in the state dict (transformers 5.24); of nemotron_h, those with experts
KEEPS_BUFFERS = ("deepseek_v3", "gemma4_text", "glm4_moe", "nemotron_h")
_BESIDE_IMAGES = "model.language_model.layers"
_NO_VARLEN_BESIDE_IMAGES = ("gemma3_text", "gemma4_text")
LARGEST_HEAD = 256  # channels, in torch's flash kernels
_OTHER_PARTS = ("vision_config", "audio_config", "speech_config", "image_config")


class UnknownFamily(RecipeError):
    """Nothing is known of how a model is built."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only language model in numbers.

    Args:
        hidden: width of the residual stream.
        blocks: the layers, the first one first.
        outside: parameters in no layer and no matrix; embeddings and head are counted apart.
        matrices: those in no layer, with their whole names.
        source: where the numbers were read.
        path: of the list of layers, as PEFT sees it.
        positions: the longest sequence the model was made for.
        dtype: precision of the weights on disk; None where not known.
        frozen: parameters of parts for images, which are loaded and not trained.
        other_parts: whether such parts are loaded that are not counted.
        attention_dropout: whether attention drops some of its scores.
    """

    name: str
    family: str
    hidden: int
    vocabulary: int
    blocks: tuple[Block, ...]
    outside: int
    matrices: tuple[Matrix, ...] = ()
    source: str = "config.json"
    path: str = "model.layers"
    tied: bool = False
    positions: int = 4096
    dtype: str | None = None
    frozen: int = 0
    other_parts: bool = False
    attention_dropout: bool = False

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.blocks)

    @cached_property
    def kinds(self) -> tuple[tuple[Block, int], ...]:
        """The different layers, and how many there are of each."""
        return tuple(Counter(self.blocks).items())

    @property
    def carries_state(self) -> bool:
        """Whether a layer passes a state from one example of a row into the next."""
        return any(block.carries for block, _ in self.kinds)

    @property
    def lacks_sdpa(self) -> bool:
        """Whether its class has no sdpa: then attention is written out."""
        return self.family in _NO_SDPA

    @property
    def takes_varlen(self) -> bool:
        """Whether torch's variable-length attention computes all of it, as
        `architectures.why_not_varlen` finds of the loaded model.
        """
        if self.carries_state or self.attention_dropout or self.family in _NO_VARLEN:
            return False
        if self.path == _BESIDE_IMAGES and self.family in _NO_VARLEN_BESIDE_IMAGES:
            return False
        for block, _ in self.kinds:
            channels = block.query // block.heads
            if block.output != block.query or channels > LARGEST_HEAD or channels % 8:
                return False
        return True

    @property
    def uncounted(self) -> tuple[str, ...]:
        """What the arithmetic of memory leaves out, in words."""
        found = dict.fromkeys(words for block, _ in self.kinds for words in block.uncounted)
        found |= dict.fromkeys(["dropout in attention"] * self.attention_dropout)
        return (*found, *["the parts for images or sound"] * self.other_parts)

    @property
    def experts(self) -> int:
        """Experts of a layer that has some; 0 for a dense model."""
        return max(matrix.experts for block, _ in self.kinds for matrix in block.matrices)

    @property
    def widest(self) -> int:
        """The largest width of a linear layer, the head counted."""
        widths = (max(one.inputs, one.outputs) for block, _ in self.kinds for one in block.matrices)
        return max(self.vocabulary, *widths)

    @cached_property
    def linear_parameters(self) -> int:
        """Weights of linear layers, the head left out: what is quantized."""
        return sum(
            count * sum(matrix.parameters for matrix in block.matrices if matrix.linear)
            for block, count in self.kinds
        )

    @property
    def embedding_parameters(self) -> int:
        """Input embeddings and LM head, counted once where they are one matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @cached_property
    def block_parameters(self) -> int:
        """All parameters of the layers."""
        return sum(count * block.parameters for block, count in self.kinds)

    @property
    def parameters(self) -> int:
        """All parameters."""
        matrices = sum(matrix.parameters for matrix in self.matrices)
        others = self.embedding_parameters + self.outside + matrices + self.frozen
        return self.block_parameters + others

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token passes through: the N of 4N and 6N. The lookup of embeddings
        counts as work (2% of a 7B model).
        """
        used = sum(count * block.used for block, count in self.kinds)
        return self.parameters - self.frozen - self.block_parameters + used


def shape_of_config(
    config: Mapping[str, Any], name: str, source: str = "config.json"
) -> ModelShape:
    """Return the shape that a config.json describes.

    Raises:
        UnknownFamily: the planner does not know how the family is built.
        RecipeError: the file lacks a number, or has one that cannot be.
    """
    whole, inner = config, config.get("text_config")
    alone = whole.get("model_type") in _TEXT_ALONE
    if isinstance(inner, dict) and inner:  # older files leave some of it out
        family = str(inner.get("model_type") or f"{whole.get('model_type')}_text")
        # of a model that is loaded whole its own key, which is true where it is absent
        is_tied = whole.get("tie_word_embeddings", None if alone else True)
        is_tied = inner.get("tie_word_embeddings", is_tied) if alone else is_tied
        config = {**inner, "model_type": family, "tie_word_embeddings": is_tied}
    numbers = Numbers(config)
    family = numbers.family
    if family not in FAMILIES:
        raise UnknownFamily(
            f"no plan: how a model of type '{family}' ({name}) is built is not known here, and"
            " nothing of it is counted",
            f"known: {', '.join(sorted(FAMILIES))}",
        )
    try:
        outside, matrices = outside_blocks(numbers)
        parts = not alone and any(whole.get(part) for part in _OTHER_PARTS)
        siglip = parts and (whole.get("vision_config") or {}).get("vision_use_head") is False
        return ModelShape(
            name=name,
            source=source,
            family=family,
            hidden=numbers.number("hidden_size", "n_embd"),
            vocabulary=numbers.number("vocab_size"),
            blocks=blocks_of(numbers),
            outside=outside,
            matrices=matrices,
            path=path_of(family) if config is whole or alone else _BESIDE_IMAGES,
            tied=tied(numbers),
            positions=numbers.number("max_position_embeddings", "n_positions", default=2**40),
            dtype=str(whole.get("dtype") or whole.get("torch_dtype") or "") or None,
            attention_dropout=bool(config.get("attention_dropout") or config.get("attn_pdrop")),
            frozen=_siglip(whole["vision_config"], numbers) if siglip else 0,
            other_parts=parts and not siglip,
        )
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise RecipeError(
            f"the config.json of {name} has no usable"
            f" {error if isinstance(error, KeyError) else 'numbers'}",
            "the planner needs widths, layers, heads and vocabulary",
        ) from None


def _siglip(config: Mapping[str, Any], text: Numbers) -> int:
    """Return the parameters of Gemma 3's vision tower and of its projection into the language
    model.
    """
    numbers = Numbers(config)
    hidden, inner = numbers.number("hidden_size"), numbers.number("intermediate_size")
    patch = numbers.number("patch_size")
    attention, norms = 4 * hidden * (hidden + 1), 4 * hidden
    layer = attention + norms + 2 * hidden * inner + inner + hidden
    patches = (numbers.number("image_size") // patch) ** 2
    embeddings = hidden * (3 * patch**2 + 1 + patches)
    around = 2 * hidden + hidden * text.number("hidden_size") + hidden
    return numbers.number("num_hidden_layers") * layer + embeddings + around
