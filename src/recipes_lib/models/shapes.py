"""The shape of a model: layers, widths, vocabulary, and the parameter counts that follow. Read from
a config.json, no torch.

The families named in `FAMILIES` are built alike (attention and a gated MLP per layer). Any other is
counted as if it were, and says so in `uncounted`: then a plan shows an estimate, and never says
that it fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes_lib.core.errors import RecipeError

# Qwen2 has a bias on q, k and v; Qwen3 and Gemma 3 norm each head's query and key; Phi-3 stores q,
# k, v (and gate, up) as one matrix.
FAMILIES = {
    *(
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "smollm3",
        "granite",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo2",
        "mixtral",
    ),
    *("qwen3_moe", "qwen2_moe"),
}
_BIASED = {"qwen2", "qwen2_moe"}
_HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3_text"}
_ALWAYS_TIED = {"gemma", "gemma2", "gemma3_text"}
_APPROXIMATE = {
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "granite",
}
_OTHER_PARTS = ("vision_config", "audio_config", "speech_config", "image_config")
# What a config calls a number; the first that is there. Names after the first are those of other
# families than `FAMILIES`.
_NAMES = {
    "layers": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "layers_block_type",
    ),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate": (
        "moe_intermediate_size",
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "d_ff",
    ),
    "vocabulary": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "active_experts": ("num_experts_per_tok", "moe_topk", "moe_k"),
    "positions": ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"),
}
_LARGEST = 2**40  # no model has a number like it
_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer in numbers.

    Args:
        hidden: width of the residual stream.
        intermediate: inner width of the MLP (of one expert).
        experts: MLPs per layer; 1 for a dense model.
        active_experts: how many of them a token goes through.
        positions: the longest sequence the model was made for.
        dtype: precision of the weights on disk; None where not known.
        other_parts: whether the checkpoint also has parts for images or sound.
    """

    name: str
    family: str = "llama"
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    experts: int = 1
    active_experts: int = 1
    positions: int = 4096
    dtype: str | None = None
    other_parts: bool = False

    @property
    def known(self) -> bool:
        """Whether the arithmetic was made for this family, so that it counts no more than
        there is.
        """
        return self.family in FAMILIES

    @property
    def query_width(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys (and of all values) together."""
        return self.kv_heads * self.head_dim

    @property
    def uncounted(self) -> tuple[str, ...]:
        """What of the model this arithmetic leaves out, in words."""
        found = (
            []
            if self.known
            else [
                f"what the {self.family} family has beside attention and a gated MLP in each layer"
            ]
        )
        if self.family in _APPROXIMATE:
            found.append(
                "routing between experts"
                if self.experts > 1
                else f"what is special to the {self.family} family"
            )
        if self.other_parts:
            found.append("the parts for images or sound")
        return tuple(found)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one block: name -> (inputs, outputs). Experts count once."""
        h, i, q, kv = self.hidden, self.intermediate, self.query_width, self.kv_width
        if self.family == "phi3":
            return {
                "qkv_proj": (h, q + 2 * kv),
                "o_proj": (q, h),
                "gate_up_proj": (h, 2 * i),
                "down_proj": (i, h),
            }
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return {**attention, "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks: what is quantized, and what the work is
        proportional to.
        """
        return self.layers * self._block_linears(self.experts)

    @property
    def expert_parameters(self) -> int:
        """Weights of the experts, which are one parameter of three dimensions per layer and not
        linear layers.
        """
        if self.experts == 1:
            return 0
        return (
            self.layers
            * self.experts
            * sum(a * b for name, (a, b) in self.linears().items() if name in _MLP)
        )

    @property
    def embedding_parameters(self) -> int:
        """Input embeddings and LM head, counted once where they are one matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def small_parameters(self) -> int:
        """Norms and biases."""
        biases = self.query_width + 2 * self.kv_width if self.family in _BIASED else 0
        head_norms = 2 * self.head_dim if self.family in _HEAD_NORMS else 0
        norms = (4 if self.family in _FOUR_NORMS else 2) * self.hidden
        return self.layers * (norms + biases + head_norms) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through: the N of 4N and 6N. The lookup of embeddings
        counts as work (2% of a 7B model).
        """
        return (
            self.layers * self._block_linears(self.active_experts)
            + self.embedding_parameters
            + self.small_parameters
        )

    def _block_linears(self, experts: int) -> int:
        router = self.hidden * self.experts if self.experts > 1 else 0
        return router + sum(
            a * b * (experts if name in _MLP else 1) for name, (a, b) in self.linears().items()
        )


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that a config.json describes; a family that is not in `FAMILIES` as the
    plain transformer of its numbers.

    Raises:
        RecipeError: the file lacks a number, or has one that cannot be.
    """
    whole, inner = config, config.get("text_config")
    config = inner if isinstance(inner, dict) and inner else config
    family = str(config.get("model_type", "unknown"))
    known = family in FAMILIES
    try:
        hidden = _number(config, "hidden")
        heads = _number(config, "heads", None if known else max(hidden // 64, 1))
        experts = _number(config, "experts", 1)
        shape = ModelShape(
            name=name,
            family=family,
            layers=_number(config, "layers"),
            hidden=hidden,
            intermediate=_number(config, "intermediate", None if known else 4 * hidden),
            heads=heads,
            kv_heads=_number(config, "kv_heads", heads),
            head_dim=_number(config, "head_dim", hidden // heads),
            vocabulary=_number(config, "vocabulary"),
            tied=bool(config.get("tie_word_embeddings", False)) or family in _ALWAYS_TIED,
            experts=experts,
            active_experts=_number(config, "active_experts", 2) if experts > 1 else 1,
            positions=_number(config, "positions", 4096 if known else _LARGEST),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "") or None,
            other_parts=any(part in whole for part in _OTHER_PARTS),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError(
            f"the config.json of {name} has no usable"
            f" {error if isinstance(error, KeyError) else 'numbers'}",
            "the planner needs widths, layers, heads and vocabulary",
        ) from None
    return shape


def _number(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """Return a number of a config: the largest where each layer has one; a default where it is
    absent, null or 0.

    Raises:
        KeyError: it is needed and not there, or cannot be.
    """
    key = next((key for key in _NAMES[field] if config.get(key)), _NAMES[field][0])
    value = config.get(key) or default
    if value is None:
        raise KeyError(key)
    if isinstance(value, list):  # a number for each layer, or its kind
        value = len(value) if field == "layers" else max(value)
    number = int(value)
    if not 1 <= number <= _LARGEST:
        raise KeyError(key)
    return number
