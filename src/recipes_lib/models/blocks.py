"""What the layers of a model are made of, matrix by matrix, read from its config.json. No
torch.

Every family here is built as transformers builds it: `tests/planning/test_shapes.py` compares the
matrices with the modules of the real classes. A family that is not here is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

_LARGEST = 2**40  # no model has a number like it


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight matrix of a block, or one parameter that holds the matrices of all experts.

    Args:
        name: of its module in the block; of the parameter where it is in no linear layer.
        reads: what its input is: `attention` and `mlp` are the normed residual stream, `output`
            what attention made, `inner` what the MLP made, `routed` and `routed inner` those of
            experts, `state` anything else.
        linear: whether it is a linear layer's: what is quantized, and what `all-linear` means.
        experts: how many matrices the parameter holds; 0 for a matrix of its own.
        active: how many of them a token goes through.
    """

    name: str
    inputs: int
    outputs: int
    reads: str
    linear: bool = True
    experts: int = 0
    active: int = 1

    @property
    def parameters(self) -> int:
        """All of its weights."""
        return self.inputs * self.outputs * max(self.experts, 1)

    @property
    def used(self) -> int:
        """The weights that a token meets."""
        return self.inputs * self.outputs * self.active

    @property
    def last_name(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Linear attention by a gated delta rule, in widths of a token.

    Args:
        key: of all keys, repeated for every value head; `value` alike.
        convolved: of queries, keys and values before that.
    """

    heads: int
    key: int
    value: int
    convolved: int


@dataclass(kw_only=True, unsafe_hash=True)
class Block:
    """One layer of a model, which nobody changes once it is made.

    Args:
        small: parameters that are in no matrix: norms, biases, convolutions, constants of states.
        norms: (vectors of a token, their width) of each norm.
        heads: query heads of attention; 0 without attention.
        query: width of all queries together; `key`, `value` and `output` alike.
        window: tokens that attention looks back; None for all.
        gate: width of what attention's output is multiplied with; 0 for nothing.
        delta: linear attention; None for none.
        state: products per token that linear attention or state space needs for its state.
        inner: widths of what MLP and short convolution keep between their matrices, per token.
        routing: bytes of what the choice of experts keeps, per token.
        carries: whether it passes a state from token to token, and so from example to example.
        uncounted: what the block keeps for the backward pass that is not counted, in words.
    """

    matrices: tuple[Matrix, ...] = ()
    small: int = 0
    norms: tuple[tuple[int, int], ...] = ()
    heads: int = 0
    query: int = 0
    key: int = 0
    value: int = 0
    output: int = 0
    window: int | None = None
    gate: int = 0
    delta: Delta | None = None
    state: int = 0
    inner: int = 0
    routing: int = 0
    carries: bool = False
    uncounted: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(matrix.parameters for matrix in self.matrices) + self.small

    @property
    def used(self) -> int:
        """Parameters that a token meets."""
        return sum(matrix.used for matrix in self.matrices) + self.small

    def matrix(
        self, name: str, inputs: int, outputs: int, reads: str, *, bias: bool = False, **more: Any
    ) -> None:
        """Add a matrix, as `Matrix` describes it."""
        added = Matrix(name=name, inputs=inputs, outputs=outputs, reads=reads, **more)
        self.matrices += (added,)
        self.small += outputs * max(added.experts, 1) if bias else 0

    def norm(self, width: int, vectors: int = 1, *, weights: int | None = None) -> None:
        """Add a norm; `weights`: how many it has, where that is not its width."""
        self.norms += ((vectors, width),)
        self.small += width if weights is None else weights

    def attend(
        self, heads: int, query: int, key: int, value: int, output: int, window: int | None = None
    ) -> None:
        """Add attention."""
        self.heads, self.query, self.key, self.value = heads, query, key, value
        self.output, self.window = output, window


@dataclass(frozen=True)
class Numbers:
    """A config.json's numbers, each asked for by its names, the newest first."""

    config: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The `model_type`."""
        return str(self.config.get("model_type", "unknown"))

    def number(self, *names: str, default: int | None = None) -> int:
        """Return a number; the default where it is absent, null or 0.

        Raises:
            KeyError: it is needed and not there, or cannot be.
        """
        value = next((self.config[name] for name in names if self.config.get(name)), default)
        if value is None:
            raise KeyError(names[0])
        number = int(value)
        if not 1 <= number <= _LARGEST:
            raise KeyError(names[0])
        return number

    def optional(self, *names: str) -> int:
        """Return a number, 0 where it is absent or null."""
        return self.number(*names) if any(self.config.get(name) for name in names) else 0

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a switch."""
        value = self.config.get(name)
        return default if value is None else bool(value)

    def layers_in(self, name: str) -> set[int]:
        """Return the layers that a key lists."""
        return set(self.config.get(name) or ())


# ---- Families ----

# Biases of query, key and value, and of the output: the key that says so, with its default.
_BIASES: dict[str, tuple[tuple[str, bool], tuple[str, bool]]] = {
    "qwen2": (("", True), ("", False)),
    "qwen2_moe": (("qkv_bias", True), ("", False)),
    "glm": (("attention_bias", True), ("", False)),
    "glm4": (("attention_bias", True), ("", False)),
    "glm4_moe": (("attention_bias", False), ("", False)),
    "gpt_oss": (("attention_bias", True), ("attention_bias", True)),
    "seed_oss": (("attention_bias", True), ("attention_out_bias", False)),
}
_BIAS = (("attention_bias", False), ("attention_bias", False))
_HEAD_NORMS = {
    *("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "exaone4"),
    *("gemma3_text", "hunyuan_v1_dense", "lfm2", "lfm2_moe", "apertus"),
}
_WIDE_NORMS = {"olmo2", "olmo3", "olmoe"}  # one norm over all heads
_FOUR_NORMS = {"gemma2", "gemma3_text", "glm4"}
_ONE_NORM = {"cohere", "cohere2"}
_FUSED_MLP = {"phi3", "glm", "glm4"}
_NO_GATE = {"arcee", "apertus", "nemotron_h"}
_GATED_ATTENTION = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}  # as wide again as queries
_LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}
_EVERY_WINDOW = {"mistral", "mixtral", "ministral", "ministral3", "phi3"}
_TIED = {
    *("gemma", "gemma2", "gemma3_text", "gemma4_text", "cohere", "cohere2", "smollm3", "gpt2"),
    *("mamba", "lfm2", "lfm2_moe"),
}
_PATTERNS = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4, "exaone4": 4}


@dataclass(frozen=True, kw_only=True)
class _Experts:
    """Where a family keeps its experts.

    Args:
        path: of the module that holds router and experts.
        shared: name of the experts that every token goes through.
        bias: whether router and experts have biases.
        linear_router: whether the router is a linear layer.
    """

    path: str = "mlp"
    router: str = "gate"
    shared: str = ""
    bias: bool = False
    linear_router: bool = False


_EXPERTS: dict[str, _Experts] = {
    "mixtral": _Experts(),
    "olmoe": _Experts(),
    "qwen3_moe": _Experts(),
    "qwen2_moe": _Experts(shared="shared_expert"),
    "qwen3_next": _Experts(shared="shared_expert"),
    "qwen3_5_moe_text": _Experts(shared="shared_expert"),
    "gpt_oss": _Experts(router="router", bias=True),
    "granitemoe": _Experts(path="block_sparse_moe", router="router"),
    "granitemoeshared": _Experts(path="block_sparse_moe", router="router"),
    "granitemoehybrid": _Experts(path="block_sparse_moe", router="router"),
    "llama4_text": _Experts(
        path="feed_forward", router="router", shared="shared_expert", linear_router=True
    ),
    "glm4_moe": _Experts(shared="shared_experts"),
    "glm4_moe_lite": _Experts(shared="shared_experts"),
    "deepseek_v2": _Experts(shared="shared_experts"),
    "deepseek_v3": _Experts(shared="shared_experts"),
    "lfm2_moe": _Experts(path="feed_forward"),
    "nemotron_h": _Experts(path="mixer", shared="shared_experts"),
}
FAMILIES = {
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "qwen3_5_text", "smollm3"),
    *("granite", "phi3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3"),
    *("cohere", "cohere2", "glm", "glm4", "exaone4", "seed_oss", "arcee", "apertus"),
    *("hunyuan_v1_dense", "lfm2", "gpt2", "mamba", "mamba2", "falcon_h1", *_EXPERTS),
}


def layer_kinds(config: Numbers) -> list[str]:
    """Return the kind of each layer, in transformers' words of today.

    Raises:
        KeyError: the number of layers is not there.
    """
    family, given = config.family, config.config
    kinds = given.get("layer_types") or given.get("layers_block_type")
    if not kinds and isinstance(pattern := given.get("hybrid_override_pattern"), str):
        names = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
        kinds = [names[letter] for letter in pattern]
    if kinds:
        today = {"attention": "full_attention", "mamba": "linear_attention"}
        return [today.get(kind, kind) for kind in map(str, kinds)]
    count = config.number("num_hidden_layers", "n_layer")
    layers, window = range(count), given.get("sliding_window")
    if family in _EVERY_WINDOW:
        return ["sliding_attention" if window else "full_attention"] * count
    if family in ("qwen2", "qwen3"):
        slides = window and config.flag("use_sliding_window")
        first = int(given.get("max_window_layers") or 0) if slides else count
        return ["sliding_attention" if i >= first else "full_attention" for i in layers]
    if family in _GATED_ATTENTION:
        every = config.number("full_attention_interval", default=4)
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in layers]
    if family == "llama4_text":
        every = config.number("no_rope_layer_interval", default=4)
        turned = given.get("no_rope_layers") or [(i + 1) % every for i in layers]
        return ["chunked_attention" if one else "full_attention" for one in turned]
    if family == "lfm2" and "full_attn_idxs" in given:
        full = config.layers_in("full_attn_idxs")
        return ["full_attention" if i in full else "conv" for i in layers]
    if family in ("mamba", "mamba2", "granitemoehybrid"):
        return ["linear_attention"] * count
    if family == "gemma4_text" or (family in _PATTERNS and (window or family == "gpt_oss")):
        pattern = given.get("sliding_window_pattern")
        every = pattern if isinstance(pattern, int) else _PATTERNS.get(family, 6)
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in layers]
        return [*kinds[:-1], "full_attention"] if family == "gemma4_text" else kinds
    return ["full_attention"] * count


def tied(config: Numbers) -> bool:
    """Return whether input embeddings and head are one matrix."""
    own = config.config.get("tie_embedding") if config.family.startswith("lfm2") else None
    default = config.family in _TIED
    return config.flag("tie_word_embeddings", default) if own is None else bool(own)


def blocks_of(config: Numbers) -> tuple[Block, ...]:
    """Return the layers, the first one first.

    Raises:
        KeyError: a number is missing or cannot be.
    """
    made: dict[tuple[Any, ...], Block] = {}
    blocks = []
    for layer, kind in enumerate(layer_kinds(config)):
        # alike layers are one object
        key = (kind, _has_experts(config, layer, kind), *_gemma4(config, layer, kind))
        if key not in made:
            made[key] = _block(config, layer, kind)
        blocks.append(made[key])
    return tuple(blocks)


def _block(config: Numbers, layer: int, kind: str) -> Block:
    family, block = config.family, Block()
    hidden = config.number("hidden_size", "n_embd")
    if family == "gpt2":
        return _gpt2(config, block, hidden)
    if family in ("mamba", "mamba2"):
        block.norm(hidden)
        (_mamba if family == "mamba" else _mamba2)(config, block, hidden, "mixer")
        return block
    if family == "nemotron_h":  # each layer is one part of what others have together
        block.norm(hidden)
        if kind == "linear_attention":
            _mamba2(config, block, hidden, "mixer")
        elif kind == "full_attention":
            _attention(config, block, hidden, kind, "mixer")
        elif kind == "mlp":
            width = config.number("intermediate_size")
            _mlp(config, block, hidden, width, "mixer")
        else:
            _experts(config, block, hidden)
        return block
    for _ in range(4 if family in _FOUR_NORMS else 1 if family in _ONE_NORM else 2):
        block.norm(hidden)
    if family in _ONE_NORM:  # a difference from the mean is taken twice
        block.norm(hidden, weights=0)
    if family == "gemma4_text":
        _gemma4_block(config, block, hidden, layer, kind)
        return block
    if family == "falcon_h1":
        _mamba2(config, block, hidden, "mamba")
        _attention(config, block, hidden, kind, "self_attn")
    elif kind == "conv":
        _convolution(config, block, hidden)
    elif kind == "linear_attention":
        if family == "granitemoehybrid":
            _mamba2(config, block, hidden, "mamba")
        else:
            _delta(config, block, hidden)
    elif family in _LATENT:
        _latent(config, block, hidden)
    else:
        _attention(config, block, hidden, kind, "self_attn")
    if _has_experts(config, layer, kind):
        _experts(config, block, hidden)
    elif family != "granitemoehybrid":
        path = "feed_forward" if family.startswith(("lfm2", "falcon_h1", "llama4")) else "mlp"
        _mlp(config, block, hidden, _dense_width(config), path)
    if family in ("granitemoeshared", "granitemoehybrid"):
        width = config.number("shared_intermediate_size", default=1024)
        block.matrix("shared_mlp.input_linear", hidden, 2 * width, "mlp")
        block.matrix("shared_mlp.output_linear", width, hidden, "inner")
        block.inner += 3 * width
    return block


def _has_experts(config: Numbers, layer: int, kind: str) -> bool:
    family, given = config.family, config.config
    if family not in _EXPERTS:
        return False
    if family == "nemotron_h":
        return kind == "moe"
    if family == "granitemoehybrid":
        return config.optional("num_local_experts") > 0
    if family == "llama4_text":
        step = config.number("interleave_moe_layer_step", default=1)
        return layer in (given.get("moe_layers") or range(step - 1, layer + 1, step))
    if family in ("glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3"):
        if kinds := given.get("mlp_layer_types"):
            return str(kinds[layer]) == "sparse"
        return layer >= int(given.get("first_k_dense_replace") or 0)
    if family == "lfm2_moe":
        return layer >= int(given.get("num_dense_layers") or 0)
    if family.startswith("qwen"):
        step = config.number("decoder_sparse_step", default=1)
        return layer not in config.layers_in("mlp_only_layers") and (layer + 1) % step == 0
    return True


def _dense_width(config: Numbers) -> int:
    if config.family == "llama4_text":
        return config.number("intermediate_size_mlp")
    width = config.number("block_ff_dim", "intermediate_size")
    if config.family == "lfm2" and config.flag("block_auto_adjust_ff_dim", True):
        width = int(config.config.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        multiple = config.number("block_multiple_of", default=256)
        width = -(-width // multiple) * multiple
    return width


def _mlp(config: Numbers, block: Block, hidden: int, width: int, path: str) -> None:
    bias = config.flag("mlp_bias")
    if config.family in _FUSED_MLP:
        block.matrix(f"{path}.gate_up_proj", hidden, 2 * width, "mlp", bias=bias)
        block.matrix(f"{path}.down_proj", width, hidden, "inner", bias=bias)
        block.inner += 3 * width
        return
    if config.family in _NO_GATE:
        block.matrix(f"{path}.up_proj", hidden, width, "mlp", bias=bias)
        block.matrix(f"{path}.down_proj", width, hidden, "inner", bias=bias)
        if config.family == "apertus":
            block.small += 2  # the activation learns, too
            block.inner += 4 * width
        else:  # of a squared ReLU its output alone
            block.inner += width
        return
    names = ("w1", "w3", "w2") if config.family.startswith("lfm2") else _GATED
    block.matrix(f"{path}.{names[0]}", hidden, width, "mlp", bias=bias)
    block.matrix(f"{path}.{names[1]}", hidden, width, "mlp", bias=bias)
    block.matrix(f"{path}.{names[2]}", width, hidden, "inner", bias=bias)
    block.inner += 3 * width


_GATED = ("gate_proj", "up_proj", "down_proj")


def _experts(config: Numbers, block: Block, hidden: int) -> None:
    family, where = config.family, _EXPERTS[config.family]
    count = config.number("num_local_experts", "num_experts", "n_routed_experts")
    active = config.number("num_experts_per_tok", default=2)
    matrix = partial(block.matrix, bias=where.bias, linear=False, experts=count, active=active)
    width = config.number(
        *(() if family in ("llama4_text", "gpt_oss") else ("moe_intermediate_size",)),
        "intermediate_size",
    )
    router = f"{where.path}.{where.router}" + (".weight" if not where.linear_router else "")
    block.matrix(router, hidden, count, "mlp", bias=where.bias, linear=where.linear_router)
    name, gate = ("up_proj", 1) if family == "nemotron_h" else ("gate_up_proj", 2)
    latent = config.optional("moe_latent_size") if family == "nemotron_h" else 0
    if latent:
        block.matrix(f"{where.path}.fc1_latent_proj", hidden, latent, "mlp")
        block.matrix(f"{where.path}.fc2_latent_proj", latent, hidden, "state")
    inputs, path = latent or hidden, f"{where.path}.experts"
    matrix(f"{path}.{name}", inputs, gate * width, "routed")
    matrix(f"{path}.down_proj", width, inputs, "routed inner")
    if family == "llama4_text":
        block.uncounted += ("what all its experts make of every token",)
    _routed(block, active, count, inputs, width * (6 if family == "gpt_oss" else gate + 1))
    if not where.shared:
        return
    if family == "nemotron_h":
        shared = config.number("moe_shared_expert_intermediate_size")
    elif family == "llama4_text":
        shared = width
    elif where.shared == "shared_experts":
        shared = width * config.optional("n_shared_experts")
    else:
        shared = config.number("shared_expert_intermediate_size")
    if shared:
        _mlp(config, block, hidden, shared, f"{where.path}.{where.shared}")
    if family.startswith("qwen"):
        block.matrix(f"{where.path}.shared_expert_gate", hidden, 1, "mlp")


def _routed(block: Block, active: int, count: int, hidden: int, inner: int) -> None:
    """Count what transformers' `grouped_mm` keeps: each expert's inner tensors and what it made,
    the probabilities of all experts in float32, and four lists of whole numbers.
    """
    block.inner += active * (inner + hidden + 1)
    block.routing += 4 * count + 4 * 8 * active


def _attention(config: Numbers, block: Block, hidden: int, kind: str, path: str) -> None:
    family = config.family
    heads = config.number("num_attention_heads")
    size = config.number("head_dim", default=hidden // heads)
    groups = config.number("num_key_value_heads", default=heads)
    query, key = heads * size, groups * size
    (one, first), (other, second) = _BIASES.get(family, _BIAS)
    biased, output_biased = config.flag(one, first), config.flag(other, second)
    block.gate = query if family in _GATED_ATTENTION else 0
    wide = query + block.gate
    if family == "phi3":
        block.matrix(f"{path}.qkv_proj", hidden, query + 2 * key, "attention")
    else:
        block.matrix(f"{path}.q_proj", hidden, wide, "attention", bias=biased)
        block.matrix(f"{path}.k_proj", hidden, key, "attention", bias=biased)
        block.matrix(f"{path}.v_proj", hidden, key, "attention", bias=biased)
    last = "out_proj" if family.startswith("lfm2") else "o_proj"
    block.matrix(f"{path}.{last}", query, hidden, "output", bias=output_biased)
    if family in _HEAD_NORMS or (family == "glm4_moe" and config.flag("use_qk_norm")):
        block.norm(size, heads)
        block.norm(size, groups)
    elif family in _WIDE_NORMS:
        block.norm(query)
        block.norm(key)
    elif family == "cohere" and config.flag("use_qk_norm"):
        block.norm(size, heads, weights=query)
        block.norm(size, groups, weights=key)
    block.small += heads if family == "gpt_oss" else 0  # sinks
    window = None
    if kind == "chunked_attention":
        window = config.number("attention_chunk_size", default=8192)
    elif kind == "sliding_attention":
        window = config.optional("sliding_window") or None
    # without copies for the heads, values are a part of what one matrix made for all three
    value = query + 2 * key if family == "phi3" else key
    block.attend(heads, query, key if family != "phi3" else 0, value, query, window)


def _latent(config: Numbers, block: Block, hidden: int) -> None:
    """Multi-head latent attention: queries, keys and values through a narrow layer."""
    heads, rank = config.number("num_attention_heads"), config.optional("q_lora_rank")
    turned, plain = config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim")
    narrow, value = config.number("kv_lora_rank"), heads * config.number("v_head_dim")
    bias, query = config.flag("attention_bias"), heads * (turned + plain)
    path = "self_attn"
    if rank:
        block.matrix(f"{path}.q_a_proj", hidden, rank, "attention", bias=bias)
        block.norm(rank)
        block.matrix(f"{path}.q_b_proj", rank, query, "state")
    else:
        block.matrix(f"{path}.q_proj", hidden, query, "attention")
    block.matrix(f"{path}.kv_a_proj_with_mqa", hidden, narrow + turned, "attention", bias=bias)
    block.norm(narrow)
    block.matrix(f"{path}.kv_b_proj", narrow, heads * plain + value, "state")
    block.matrix(f"{path}.o_proj", value, hidden, "output", bias=bias)
    block.attend(heads, query, query, value, value)
    block.uncounted += ("what the kernel of latent attention keeps",)


def _delta(config: Numbers, block: Block, hidden: int) -> None:
    """Linear attention of Qwen3-Next and Qwen3.5: a gated delta rule."""
    groups, heads = config.number("linear_num_key_heads"), config.number("linear_num_value_heads")
    key_size, size = config.number("linear_key_head_dim"), config.number("linear_value_head_dim")
    key, value, path = groups * key_size, heads * size, "linear_attn"
    if config.family == "qwen3_next":
        block.matrix(f"{path}.in_proj_qkvz", hidden, 2 * key + 2 * value, "attention")
        block.matrix(f"{path}.in_proj_ba", hidden, 2 * heads, "attention")
    else:
        block.matrix(f"{path}.in_proj_qkv", hidden, 2 * key + value, "attention")
        block.matrix(f"{path}.in_proj_z", hidden, value, "attention")
        block.matrix(f"{path}.in_proj_b", hidden, heads, "attention")
        block.matrix(f"{path}.in_proj_a", hidden, heads, "attention")
    block.matrix(f"{path}.out_proj", value, hidden, "output")
    block.small += (2 * key + value) * config.number("linear_conv_kernel_dim", default=4)
    block.small += 2 * heads + size
    block.delta = Delta(heads=heads, key=heads * key_size, value=value, convolved=2 * key + value)
    block.state = heads * key_size * size
    block.carries = True


def _convolution(config: Numbers, block: Block, hidden: int) -> None:
    """Lfm2's short convolution."""
    bias = config.flag("conv_bias")
    block.matrix("conv.in_proj", hidden, 3 * hidden, "attention", bias=bias)
    block.matrix("conv.out_proj", hidden, hidden, "output", bias=bias)
    block.small += hidden * config.number("conv_L_cache", default=3) + bias * hidden
    block.inner += 5 * hidden  # the three parts of its input, two of them multiplied, its output
    block.carries = True


def _mamba2(config: Numbers, block: Block, hidden: int, path: str) -> None:
    heads = config.number("mamba_n_heads", "mamba_num_heads", "num_heads", default=128)
    groups = config.number("mamba_n_groups", "n_groups", default=1)
    state = config.number("mamba_d_state", "ssm_state_size", "state_size", default=128)
    width = config.number("mamba_expand", "expand", default=2) * hidden
    sized = config.config.get("mamba_d_head") or config.config.get("mamba_head_dim")
    if config.family == "nemotron_h":
        width = heads * config.number("mamba_head_dim", default=64)
    elif config.family == "falcon_h1":
        width = config.optional("mamba_d_ssm") or width
    elif isinstance(sized, int):
        width = heads * sized
    mixed = width + 2 * groups * state
    bias = config.flag("use_bias") or config.flag("mamba_proj_bias")
    output_bias = config.flag("projectors_bias") if config.family == "falcon_h1" else bias
    block.matrix(f"{path}.in_proj", hidden, width + mixed + heads, "attention", bias=bias)
    block.matrix(f"{path}.out_proj", width, hidden, "output", bias=output_bias)
    kernel = config.number("mamba_d_conv", "conv_kernel", default=4)
    convolved = config.flag("use_conv_bias", config.flag("mamba_conv_bias", True))
    block.small += mixed * (kernel + convolved) + 3 * heads
    if config.family != "falcon_h1" or config.flag("mamba_rms_norm"):
        block.small += width
    block.state = width * state
    block.carries = True
    block.uncounted += ("what Mamba layers keep",)


def _mamba(config: Numbers, block: Block, hidden: int, path: str) -> None:
    width = config.number("intermediate_size", default=2 * hidden)
    state = config.number("state_size", default=16)
    rank = config.config.get("time_step_rank", "auto")
    rank = rank if isinstance(rank, int) else -(-hidden // 16)
    bias = config.flag("use_bias")
    block.matrix(f"{path}.in_proj", hidden, 2 * width, "attention", bias=bias)
    block.matrix(f"{path}.x_proj", width, rank + 2 * state, "state")
    block.matrix(f"{path}.dt_proj", rank, width, "state", bias=True)
    block.matrix(f"{path}.out_proj", width, hidden, "output", bias=bias)
    kernel = config.number("conv_kernel", default=4)
    block.small += width * (kernel + config.flag("use_conv_bias", True)) + width * state + width
    block.state = width * state
    block.carries = True
    block.uncounted += ("what Mamba layers keep",)


def _gpt2(config: Numbers, block: Block, hidden: int) -> Block:
    width = config.number("n_inner", default=4 * hidden)
    for _ in range(2):
        block.norm(hidden, weights=2 * hidden)
    block.matrix("attn.c_attn", hidden, 3 * hidden, "attention", bias=True)
    block.matrix("attn.c_proj", hidden, hidden, "output", bias=True)
    block.matrix("mlp.c_fc", hidden, width, "mlp", bias=True)
    block.matrix("mlp.c_proj", width, hidden, "inner", bias=True)
    heads = config.number("num_attention_heads", "n_head")
    block.attend(heads, hidden, hidden, hidden, hidden)
    block.inner = 2 * width
    block.uncounted += ("dropout and what else is special to GPT-2",)
    return block


def _gemma4(config: Numbers, layer: int, kind: str) -> tuple[Any, ...]:
    """Return what tells one layer of Gemma 4 from another: head size, key heads, whether its keys
    are an earlier layer's, whether its MLP is twice as wide.
    """
    if config.family != "gemma4_text":
        return ()
    given, full = config.config, kind == "full_attention"
    size = config.number("global_head_dim", default=512) if full else config.number("head_dim")
    groups = config.number("num_key_value_heads")
    if full and config.flag("attention_k_eq_v"):
        groups = config.number("num_global_key_value_heads", default=groups)
    own = (given.get("per_layer_config") or {}).get(str(layer)) or {}
    size, groups = own.get("head_dim", size), own.get("num_key_value_heads", groups)
    count = config.number("num_hidden_layers")
    shared = layer >= count - config.optional("num_kv_shared_layers")
    return int(size), int(groups), shared, shared and config.flag("use_double_wide_mlp")


def _gemma4_block(config: Numbers, block: Block, hidden: int, layer: int, kind: str) -> None:
    size, groups, shared, wide = _gemma4(config, layer, kind)
    heads, path = config.number("num_attention_heads"), "self_attn"
    query, key, bias = heads * size, groups * size, config.flag("attention_bias")
    block.norm(hidden)
    block.norm(hidden)
    block.matrix(f"{path}.q_proj", hidden, query, "attention", bias=bias)
    block.norm(size, heads)
    if not shared:
        block.matrix(f"{path}.k_proj", hidden, key, "attention", bias=bias)
        block.norm(size, groups)
        if not (config.flag("attention_k_eq_v") and kind == "full_attention"):
            block.matrix(f"{path}.v_proj", hidden, key, "attention", bias=bias)
        block.norm(size, groups, weights=0)
    block.matrix(f"{path}.o_proj", query, hidden, "output", bias=bias)
    window = config.number("sliding_window", default=512)
    block.attend(heads, query, key, key, query, None if kind == "full_attention" else window)
    _mlp(config, block, hidden, config.number("intermediate_size") * (2 if wide else 1), "mlp")
    if narrow := config.optional("hidden_size_per_layer_input"):
        block.matrix("per_layer_input_gate", hidden, narrow, "mlp")
        block.matrix("per_layer_projection", narrow, hidden, "inner")
        block.norm(hidden)
        block.inner += 3 * narrow
    if config.flag("enable_moe_block"):
        count, width = config.number("num_experts"), config.number("moe_intermediate_size")
        active = config.number("top_k_experts")
        matrix = partial(block.matrix, linear=False, experts=count, active=active)
        block.matrix("router.proj", hidden, count, "mlp")
        block.small += hidden + count
        matrix("experts.gate_up_proj", hidden, 2 * width, "routed")
        matrix("experts.down_proj", width, hidden, "routed inner")
        _routed(block, active, count, hidden, 3 * width)
        for _ in range(4):
            block.norm(hidden)
        block.small -= hidden  # the router's norm has no weights


def outside_blocks(config: Numbers) -> tuple[int, tuple[Matrix, ...]]:
    """Return what is in no layer, embeddings and head left out: the parameters of the last norm and
    of tables (positions; Gemma 4's embeddings for layers), and matrices with whole names.
    """
    hidden = config.number("hidden_size", "n_embd")
    if config.family == "gpt2":
        return 2 * hidden + hidden * config.number("n_positions", default=1024), ()
    narrow = config.optional("hidden_size_per_layer_input")
    if config.family == "gemma4_text" and narrow:
        width = narrow * config.number("num_hidden_layers")
        rows = config.number("vocab_size_per_layer_input", default=262_144)
        name = "model.per_layer_model_projection"
        matrix = Matrix(name=name, inputs=hidden, outputs=width, reads="state")
        return hidden + rows * width + narrow, (matrix,)
    return hidden, ()


def path_of(family: str) -> str:
    """Return the name of the list that holds the layers."""
    return {
        "gpt2": "transformer.h",
        "mamba": "backbone.layers",
        "mamba2": "backbone.layers",
    }.get(family, "model.layers")
