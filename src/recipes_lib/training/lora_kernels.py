"""The products of a LoRA group with a narrow side, in Triton: one kernel for all its layers, where
cuBLAS needs one each and others that cast, scale and add. Dropout's mask is drawn in registers.

Each is an operator of its own, which torch.compile takes as a whole. `fused_lora` does the same in
torch, and says which counters draw the mask; products are summed in float32.

Letters: T tokens, K inputs, N outputs of one layer, R the ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_DECISIONS, _ROUNDS = 2**16, tl.constexpr(7)  # as in `fused_lora`, which a kernel cannot read
_TOKENS, _WIDTH = 64, 64  # of one tile
_PROGRAMS = 256  # that sums over all tokens are shared out to: about two for each processor
_MOST_SHARES = 16


@triton.jit
def _keeps(seed, rows, blocks, drop):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Which elements of a tile stay: eight decisions for each row and block of eight columns."""
    zero = rows[:, None] * 0 + blocks[None, :] * 0
    c0, c1 = (zero + blocks[None, :]).to(tl.uint32), (zero + rows[:, None]).to(tl.uint32)
    c2, c3 = zero.to(tl.uint32), zero.to(tl.uint32)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    left, right = tl.full((), 0xD2511F53, tl.uint32), tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
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
def _parts(size, part):  # type: ignore[no-untyped-def]  # noqa: ANN202
    return (size + part - 1) // part


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    x, a, seed, low, T, K, R, drop, scale,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """low[T, R] = drop(x)[T, K] a[R, K]'"""
    seed = tl.load(seed)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    total = tl.full((BT, BR), 0.0, tl.float32)
    x_rows, a_rows = x + t[:, None].to(tl.int64) * K, a + r[None, :].to(tl.int64) * K
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        keeps = _keeps(seed, t, start // 8 + tl.arange(0, BK // 8), drop)
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
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
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
    total = tl.where(_keeps(seed, t, blocks, drop), total * scale, 0.0)
    place, inside = of_x + t[:, None].to(tl.int64) * K + k[None, :], (t[:, None] < T) & (k < K)
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(of_x.dtype.element_ty), mask=inside)


@triton.jit
def up_kernel(  # type: ignore[no-untyped-def]
    outputs, low, b, scales, widths, ranks, T, R,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """outputs_i[T, N_i] += scale_i low_i[T, R_i] b_i[N_i, R_i]' for each layer i"""
    t, tile = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1)
    for i in tl.static_range(len(outputs)):
        tiles = _parts(widths[i], BK)
        if (tile >= 0) & (tile < tiles):
            n = tile * BK + tl.arange(0, BK)
            total = tl.full((BT, BK), 0.0, tl.float32)
            for start in range(0, ranks[i], BR):
                r = start + tl.arange(0, BR)
                inside = (t[:, None] < T) & (r[None, :] < ranks[i])
                rows = low + t[:, None].to(tl.int64) * R
                left = tl.load(rows + r[None, :], mask=inside, other=0.0)
                inside = (r[:, None] < ranks[i]) & (n[None, :] < widths[i])
                right = tl.load(b[i] + n[None, :] * ranks[i] + r[:, None], mask=inside, other=0.0)
                total = tl.dot(left, right, total, input_precision="ieee")
            place = outputs[i] + t[:, None].to(tl.int64) * widths[i] + n[None, :]
            inside = (t[:, None] < T) & (n[None, :] < widths[i])
            total = total * scales[i] + tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, total.to(outputs[i].dtype.element_ty), mask=inside)
        tile -= tiles
        low += ranks[i]


@triton.jit
def down_kernel(  # type: ignore[no-untyped-def]
    grads, b, scales, widths, ranks, of_low, T, R,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """of_low_i[T, R_i] = scale_i grads_i[T, N_i] b_i[N_i, R_i] for each layer i"""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    for i in tl.static_range(len(grads)):
        if tl.program_id(1) == i:
            rows = grads[i] + t[:, None].to(tl.int64) * widths[i]
            total = tl.full((BT, BR), 0.0, tl.float32)
            for start in range(0, widths[i], BK):
                n = start + tl.arange(0, BK)
                inside = (t[:, None] < T) & (n[None, :] < widths[i])
                left = tl.load(rows + n[None, :], mask=inside, other=0.0)
                inside = (n[:, None] < widths[i]) & (r[None, :] < ranks[i])
                right = tl.load(b[i] + n[:, None] * ranks[i] + r[None, :], mask=inside, other=0.0)
                total = tl.dot(left, right, total, input_precision="ieee")
            inside = (t[:, None] < T) & (r[None, :] < ranks[i])
            place = of_low + t[:, None].to(tl.int64) * R + r[None, :]
            tl.store(place, (total * scales[i]).to(of_low.dtype.element_ty), mask=inside)
        of_low += ranks[i]


@triton.jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    of_low, x, seed, low, grads, scales, widths, ranks, found, T, K, R, size, share, drop, scale,
    DROPS: tl.constexpr, BA: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """found[S, size], each of S over its share of the tokens, has first the gradient of A,
    of_low[T, R]' drop(x)[T, K], then of each B scale_i grads_i[T, N_i]' low_i[T, R_i]
    """
    tile, begin = tl.program_id(0), tl.program_id(1) * share
    found += tl.program_id(1).to(tl.int64) * size
    wide, tiles = _parts(K, BK), _parts(K, BK) * _parts(R, BA)
    if tile < tiles:
        k = (tile % wide) * BK + tl.arange(0, BK)
        r = (tile // wide) * BA + tl.arange(0, BA)
        blocks = (tile % wide) * (BK // 8) + tl.arange(0, BK // 8)
        total = tl.full((BA, BK), 0.0, tl.float32)
        for start in range(begin, begin + share, BT):
            t = start + tl.arange(0, BT)
            rows = t.to(tl.int64)
            inside = (r[:, None] < R) & (t[None, :] < T)
            left = tl.load(of_low + rows[None, :] * R + r[:, None], mask=inside, other=0.0)
            inside = (t[:, None] < T) & (k[None, :] < K)
            right = tl.load(x + rows[:, None] * K + k[None, :], mask=inside, other=0.0)
            if DROPS:
                keeps = _keeps(tl.load(seed), t, blocks, drop)
                right = tl.where(keeps, right, 0.0).to(left.dtype)
            total = tl.dot(left, right, total, input_precision="ieee")
        inside = (r[:, None] < R) & (k[None, :] < K)
        tl.store(found + r[:, None] * K + k[None, :], total * scale, mask=inside)
    tile -= tiles
    found += R * K
    for i in tl.static_range(len(grads)):
        high = _parts(widths[i], BK)
        tiles = high * _parts(ranks[i], BR)
        if (tile >= 0) & (tile < tiles):
            n = (tile % high) * BK + tl.arange(0, BK)
            r = (tile // high) * BR + tl.arange(0, BR)
            total = tl.full((BK, BR), 0.0, tl.float32)
            for start in range(begin, begin + share, BT):
                t = start + tl.arange(0, BT)
                rows = t.to(tl.int64)
                inside = (n[:, None] < widths[i]) & (t[None, :] < T)
                left = grads[i] + rows[None, :] * widths[i] + n[:, None]
                left = tl.load(left, mask=inside, other=0.0)
                inside = (t[:, None] < T) & (r[None, :] < ranks[i])
                right = tl.load(low + rows[:, None] * R + r[None, :], mask=inside, other=0.0)
                total = tl.dot(left, right, total, input_precision="ieee")
            inside = (n[:, None] < widths[i]) & (r[None, :] < ranks[i])
            place = found + n[:, None] * ranks[i] + r[None, :]
            tl.store(place, total * scales[i], mask=inside)
        tile -= tiles
        found += widths[i] * ranks[i]
        low += ranks[i]


def tile(ranks: int, most: int = 128) -> dict[str, int]:
    """Return the sizes of a tile as the kernels name them.

    Args:
        most: ranks of a tile.
    """
    return {"BT": _TOKENS, "BK": _WIDTH, "BR": min(most, max(16, triton.next_power_of_2(ranks)))}


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


@torch.library.custom_op("recipes::addmm_in_place", mutates_args=("total",))
def add_mm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left right to `total`, as cuBLAS can; torch.compile would copy `total` first."""
    total.addmm_(left, right)


@torch.library.custom_op("recipes::add_up", mutates_args=("outputs",))
def add_outputs(
    outputs: Sequence[torch.Tensor],
    low: torch.Tensor,
    b: Sequence[torch.Tensor],
    scales: Sequence[float],
) -> None:
    """Add to the output of each layer what its B makes of its part of `low`."""
    tokens, widths, ranks = low.shape[0], *_sizes(b)
    size = tile(max(ranks), 64)
    grid = (
        triton.cdiv(tokens, size["BT"]),
        sum(triton.cdiv(width, size["BK"]) for width in widths),
    )
    layers = (tuple(b), tuple(scales), widths, ranks)
    up_kernel[grid](tuple(outputs), low, *layers, tokens, sum(ranks), **size)


@torch.library.custom_op("recipes::down", mutates_args=())
def gradient_of_low(
    grads: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scales: Sequence[float]
) -> torch.Tensor:
    """Return the gradient of `low`.

    Args:
        grads: of the output of each layer.
    """
    tokens, widths, ranks = grads[0].shape[0], *_sizes(b)
    of_low, size = grads[0].new_empty(tokens, sum(ranks)), tile(max(ranks))
    size["BT"] //= 2  # else there are few programs
    grid = (triton.cdiv(tokens, size["BT"]), len(b), triton.cdiv(max(ranks), size["BR"]))
    layers = (tuple(b), tuple(scales), widths, ranks)
    down_kernel[grid](tuple(grads), *layers, of_low, tokens, sum(ranks), **size)
    return of_low


@gradient_of_low.register_fake
def _(
    grads: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scales: Sequence[float]
) -> torch.Tensor:
    return grads[0].new_empty(grads[0].shape[0], sum(one.shape[1] for one in b))


def _sizes(b: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(one.shape[0] for one in b), tuple(one.shape[1] for one in b)


@torch.library.custom_op("recipes::adapter_gradients", mutates_args=())
def gradients(
    of_low: torch.Tensor,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    drop: int,
    low: torch.Tensor,
    grads: Sequence[torch.Tensor],
    ranks: Sequence[int],
    scales: Sequence[float],
) -> torch.Tensor:
    """Return the gradients of A and of each B in float32, end to end in a row, or as the sum of
    several rows, whose content does not depend on which program ends first.
    """
    (tokens, inputs), total = x.shape, of_low.shape[1]
    widths, ranks = tuple(one.shape[1] for one in grads), tuple(ranks)
    found, size = x.new_empty(_rows(x, grads, ranks), dtype=torch.float32), tile(max(ranks))
    wide = tile(total)["BR"]
    grid = (_tiles(inputs, widths, ranks), found.shape[0])
    share = triton.cdiv(triton.cdiv(tokens, found.shape[0]), size["BT"]) * size["BT"]
    layers = (tuple(grads), tuple(scales), widths, ranks)
    numbers = (tokens, inputs, total, found.shape[1], share, drop, _scale(drop))
    gradients_kernel[grid](
        of_low, x, seed, low, *layers, found, *numbers, DROPS=seed is not None, BA=wide, **size
    )
    return found


@gradients.register_fake
def _(
    of_low: torch.Tensor,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    drop: int,
    low: torch.Tensor,
    grads: Sequence[torch.Tensor],
    ranks: Sequence[int],
    scales: Sequence[float],
) -> torch.Tensor:
    return x.new_empty(_rows(x, grads, ranks), dtype=torch.float32)


def _tiles(inputs: int, widths: Sequence[int], ranks: Sequence[int]) -> int:
    sizes = ((inputs, sum(ranks)), *zip(widths, ranks, strict=True))
    high = (tile(sum(ranks)), *(tile(max(ranks)) for _ in widths))
    return sum(
        triton.cdiv(width, size["BK"]) * triton.cdiv(rank, size["BR"])
        for (width, rank), size in zip(sizes, high, strict=True)
    )


def _rows(x: torch.Tensor, grads: Sequence[torch.Tensor], ranks: Sequence[int]) -> tuple[int, int]:
    """Return how many rows the gradients of a group have, whatever the tokens, and their length."""
    inputs, widths = x.shape[1], [one.shape[1] for one in grads]
    numbers = sum(rank * (inputs + width) for width, rank in zip(widths, ranks, strict=True))
    return max(1, min(_MOST_SHARES, _PROGRAMS // _tiles(inputs, widths, ranks))), numbers
