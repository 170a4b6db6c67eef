"""The three products of a LoRA layer that meet its dropout, in Triton: the mask is drawn in
registers, where the product needs it, and never written.

Each is an operator of its own, which torch.compile takes as a whole. What they compute, and which
counters draw the mask, is said by `fused_lora.kept` and its neighbours, which do the same in torch;
products are summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_DECISIONS, _ROUNDS = 2**16, 7  # as in `fused_lora`, which a kernel cannot read
_TOKENS, _INPUTS = 64, 64  # of one tile
_PROGRAMS = 256  # that a product over all tokens is shared out to: about two for each processor


@triton.jit
def _keeps(seed, rows, blocks, drop, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Which elements of a tile stay: eight decisions for each row and block of eight columns."""
    zero = rows[:, None] * 0 + blocks[None, :] * 0
    c0, c1 = (zero + blocks[None, :]).to(tl.uint32), (zero + rows[:, None]).to(tl.uint32)
    c2, c3 = zero.to(tl.uint32), zero.to(tl.uint32)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    left, right = tl.full((), 0xD2511F53, tl.uint32), tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        low0, low2 = c0 * left, c2 * right
        c0, c2 = tl.umulhi(c2, right + c2 * 0) ^ c1 ^ k0, tl.umulhi(c0, left + c0 * 0) ^ c3 ^ k1
        c1, c3 = low2, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    # joined pair by pair, so that they lie as `fused_lora.kept` has them
    low = _alternate(_alternate(c0 & 0xFFFF, c2 & 0xFFFF), _alternate(c1 & 0xFFFF, c3 & 0xFFFF))
    high = _alternate(_alternate(c0 >> 16, c2 >> 16), _alternate(c1 >> 16, c3 >> 16))
    return _alternate(low, high).to(tl.int32) >= drop


@triton.jit
def _alternate(one, other):  # type: ignore[no-untyped-def]  # noqa: ANN202
    pairs = tl.join(one, other)
    return tl.reshape(pairs, (one.shape[0], one.shape[1] * 2))


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    x, a, seed, low, T, K, R, drop, scale,
    ROUNDS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """low[T, R] = drop(x)[T, K] a[R, K]'"""
    seed = tl.load(seed)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    total = tl.full((BT, BR), 0.0, tl.float32)
    x_rows, a_rows = x + t[:, None].to(tl.int64) * K, a + r[None, :].to(tl.int64) * K
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        keeps = _keeps(seed, t, start // 8 + tl.arange(0, BK // 8), drop, ROUNDS)
        inside = (t[:, None] < T) & (k[None, :] < K)
        left = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
        right = tl.load(a_rows + k[:, None], mask=(r[None, :] < R) & (k[:, None] < K), other=0.0)
        left = tl.where(keeps, left, 0.0).to(right.dtype)
        total = tl.dot(left, right, total, input_precision="ieee")
    place = low + t[:, None].to(tl.int64) * R + r[None, :]
    total = (total * scale).to(low.dtype.element_ty)
    tl.store(place, total, mask=(t[:, None] < T) & (r[None, :] < R))


@triton.jit
def add_kernel(  # type: ignore[no-untyped-def]
    of_x, of_low, a, seed, T, K, R, drop, scale,
    ROUNDS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """of_x[T, K] += drop(of_low[T, R] a[R, K])"""
    seed = tl.load(seed)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    total = tl.full((BT, BK), 0.0, tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inside = (t[:, None] < T) & (r[None, :] < R)
        left = tl.load(of_low + t[:, None].to(tl.int64) * R + r[None, :], mask=inside, other=0.0)
        inside = (r[:, None] < R) & (k[None, :] < K)
        right = tl.load(a + r[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    blocks = tl.program_id(1) * (BK // 8) + tl.arange(0, BK // 8)
    total = tl.where(_keeps(seed, t, blocks, drop, ROUNDS), total * scale, 0.0)
    place, inside = of_x + t[:, None].to(tl.int64) * K + k[None, :], (t[:, None] < T) & (k < K)
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(of_x.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(  # type: ignore[no-untyped-def]
    of_low, x, seed, of_a, T, K, R, share, drop, scale,
    ROUNDS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """of_a[S, R, K] = of_low[T, R]' drop(x)[T, K], each of S over its share of the tokens"""
    seed = tl.load(seed)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    begin = tl.program_id(2) * share
    blocks = tl.program_id(0) * (BK // 8) + tl.arange(0, BK // 8)
    total = tl.full((BR, BK), 0.0, tl.float32)
    for start in range(begin, begin + share, BT):
        t = start + tl.arange(0, BT)
        rows = t.to(tl.int64)
        inside = (r[:, None] < R) & (t[None, :] < T)
        left = tl.load(of_low + rows[None, :] * R + r[:, None], mask=inside, other=0.0)
        inside = (t[:, None] < T) & (k[None, :] < K)
        right = tl.load(x + rows[:, None] * K + k[None, :], mask=inside, other=0.0)
        right = tl.where(_keeps(seed, t, blocks, drop, ROUNDS), right, 0.0).to(left.dtype)
        total = tl.dot(left, right, total, input_precision="ieee")
    place = of_a + (tl.program_id(2) * R + r[:, None]).to(tl.int64) * K + k[None, :]
    tl.store(place, total * scale, mask=(r[:, None] < R) & (k[None, :] < K))


def tile(ranks: int, most: int = 128) -> dict[str, int]:
    """Return the sizes of a tile as the kernels name them.

    Args:
        most: ranks of a tile.
    """
    wide = min(most, max(16, triton.next_power_of_2(ranks)))
    return {"ROUNDS": _ROUNDS, "BT": _TOKENS, "BK": _INPUTS, "BR": wide}


def _scale(drop: int) -> float:
    return _DECISIONS / (_DECISIONS - drop)


@torch.library.custom_op("recipes::dropped_product", mutates_args=())
def product(x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, drop: int) -> torch.Tensor:
    """Return drop(x) A'."""
    (tokens, inputs), ranks, size = x.shape, a.shape[0], tile(a.shape[0])
    low = x.new_empty(tokens, ranks)
    grid = (triton.cdiv(tokens, size["BT"]), triton.cdiv(ranks, size["BR"]))
    numbers = (tokens, inputs, ranks, drop, _scale(drop))
    product_kernel[grid](x, a, seed, low, *numbers, **size)
    return low


@product.register_fake
def _(x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, drop: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("recipes::add_dropped_product", mutates_args=("of_x",))
def add_product(
    of_x: torch.Tensor, of_low: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, drop: int
) -> None:
    """Add drop(of_low A) to `of_x`."""
    (tokens, inputs), ranks, size = of_x.shape, a.shape[0], tile(a.shape[0], 64)
    grid = (triton.cdiv(tokens, size["BT"]), triton.cdiv(inputs, size["BK"]))
    numbers = (tokens, inputs, ranks, drop, _scale(drop))
    add_kernel[grid](of_x, of_low, a, seed, *numbers, **size)


@torch.library.custom_op("recipes::dropped_outer", mutates_args=())
def outer(of_low: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, drop: int) -> torch.Tensor:
    """Return of_low' drop(x) in float32; the sum does not depend on which program ends first."""
    (tokens, inputs), ranks, size = x.shape, of_low.shape[1], tile(of_low.shape[1])
    wide, high = triton.cdiv(inputs, size["BK"]), triton.cdiv(ranks, size["BR"])
    shares = max(1, min(_PROGRAMS // (wide * high), triton.cdiv(tokens, size["BT"])))
    share = triton.cdiv(triton.cdiv(tokens, shares), size["BT"]) * size["BT"]
    of_a = x.new_empty(shares, ranks, inputs, dtype=torch.float32)
    numbers = (tokens, inputs, ranks, share, drop, _scale(drop))
    outer_kernel[(wide, high, shares)](of_low, x, seed, of_a, *numbers, **size)
    return of_a.sum(0)


@outer.register_fake
def _(of_low: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, drop: int) -> torch.Tensor:
    return x.new_empty(of_low.shape[1], x.shape[1], dtype=torch.float32)
