"""The shape of a model: layers, widths, vocabulary, and the parameter counts that follow. Read from a config.json, no torch.

The families named in `FAMILIES` are built alike (attention and a gated MLP per layer); anything else is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes_lib.errors import RecipeError

# Qwen2 has a bias on q, k and v; Qwen3 and Gemma 3 norm each head's query and key; Phi-3 stores q, k, v (and gate, up) as one matrix.
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
_APPROXIMATE = {"gemma", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe", "qwen2_moe", "granite"}
_POSITIVE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")


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

    @property
    def query_width(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys (and of all values) together."""
        return self.kv_heads * self.head_dim

    @property
    def approximate(self) -> bool:
        """Whether the family has parts that this arithmetic leaves out (extra norms, routing)."""
        return self.family in _APPROXIMATE

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one block: name -> (inputs, outputs). Experts count once."""
        h, i, q, kv = self.hidden, self.intermediate, self.query_width, self.kv_width
        if self.family == "phi3":
            return {"qkv_proj": (h, q + 2 * kv), "o_proj": (q, h), "gate_up_proj": (h, 2 * i), "down_proj": (i, h)}
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return {**attention, "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks: what is quantized, and what the work is proportional to."""
        return self.layers * self._block_linears(self.experts)

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
        """Parameters that one token passes through: the N of 4N and 6N. The lookup of embeddings counts as work (2% of a 7B model)."""
        return self.layers * self._block_linears(self.active_experts) + self.embedding_parameters + self.small_parameters

    def _block_linears(self, experts: int) -> int:
        mlp = {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}
        router = self.hidden * self.experts if self.experts > 1 else 0
        return router + sum(a * b * (experts if name in mlp else 1) for name, (a, b) in self.linears().items())


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that a config.json describes.

    Raises:
        RecipeError: the architecture is not one whose memory this arithmetic knows, or the file lacks a number.
    """
    config = config.get("text_config") or config
    family = str(config.get("model_type", "unknown"))
    if family not in FAMILIES:
        raise RecipeError(f"the planner does not know the architecture '{family}' of {name}", f"it knows {', '.join(sorted(FAMILIES))}")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
        shape = ModelShape(
            name=name,
            family=family,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["moe_intermediate_size"] if "moe_intermediate_size" in config else config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)) or family in _ALWAYS_TIED,
            experts=experts,
            active_experts=int(config.get("num_experts_per_tok") or 2) if experts > 1 else 1,
            positions=int(config.get("max_position_embeddings") or 4096),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "") or None,
        )
        wrong = [field for field in _POSITIVE if getattr(shape, field) < 1]
        if wrong:
            raise KeyError(wrong[0])
        return shape
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise RecipeError(
            f"the config.json of {name} has no usable {error if isinstance(error, KeyError) else 'numbers'}",
            "the planner needs widths, layers, heads and vocabulary",
        ) from None
