"""One persistent GEMM, y = epilogue(a b^T), for the linear layers of a forward: LayerNorm, bias, quick_gelu, drop path,
residual and row statistics ride in its epilogue. The algebra is derived in docs/kernels.md.

M rows, N columns, K summed. Programs walk over the tiles of y; from sm_90 on tiles move through tensor descriptors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import quick_gelu_value
from .launching import Prepared, arch, cdiv, next_power_of_2, prepared, processors, tile
from .rows import rows_of_sample


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: columns of GROUP_M tiles, so that neighbors in time share rows and columns in L2."""
    in_group = tile % (GROUP_M * tiles_n)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + in_group % height, in_group // height


@triton.jit
def _halves(x):
    """(R, C) -> its left and its right half."""
    left_right = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(left_right, (0, 2, 1)))


@triton.jit(do_not_specialize=["M", "sample_rows"])
def gemm_kernel(
    a_ptr,  # (M, K), rows a_row apart
    b_ptr,  # (N, K), rows b_row apart
    y_ptr,  # (M, N), rows y_row apart
    bias_ptr,  # (N,)
    mean_ptr,  # (M,) float32 or None: the LayerNorm of a whose weight is already in b
    rstd_ptr,  # (M,) float32, with mean
    b_sum_ptr,  # (N,) float32: sums of b over K, with mean
    u_ptr,  # (M, N) contiguous or None: written, what quick_gelu is applied to
    drop_ptr,  # (M / sample_rows,) or None
    residual_ptr,  # (M, N), rows residual_row apart, or None
    part_mean_ptr,  # (slots, M) float32 or None: mean and
    part_m2_ptr,  # (slots, M) float32: sum of squared deviations of a row's BLOCK_N / SUBTILES columns
    M,
    N,
    K,
    a_row,
    b_row,
    y_row,
    residual_row,
    sample_rows,
    ACTIVATION: tl.constexpr,  # whether quick_gelu is applied
    LOAD_DESCRIPTORS: tl.constexpr,
    STORE_DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,  # the epilogue works on this many column slices in turn: fewer registers, less memory
    FLATTEN: tl.constexpr,  # fuse the loops over tiles and K: the next tile's loads start before this one's epilogue
):
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    if LOAD_DESCRIPTORS:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [a_row, 1], [BLOCK_M, BLOCK_K])
        b_tiles = tl.make_tensor_descriptor(b_ptr, [N, K], [b_row, 1], [BLOCK_N, BLOCK_K])
    if STORE_DESCRIPTORS:
        y_tiles = tl.make_tensor_descriptor(y_ptr, [M, N], [y_row, 1], [BLOCK_M, WIDTH])
        if u_ptr is not None:
            u_tiles = tl.make_tensor_descriptor(u_ptr, [M, N], [N, 1], [BLOCK_M, WIDTH])
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for at in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _place(at, tiles_m, tiles_n, GROUP_M)
        # acc = a b^T
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            if LOAD_DESCRIPTORS:
                a = a_tiles.load([tile_m * BLOCK_M, k * BLOCK_K])
                b = b_tiles.load([tile_n * BLOCK_N, k * BLOCK_K]).T
            else:
                # rows past the end repeat the last one: their results are never stored
                a_rows = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
                ks = k * BLOCK_K + tl.arange(0, BLOCK_K)
                zero = None if EVEN_K else 0.0
                a_at = a_ptr + a_rows[:, None] * a_row + ks[None, :]
                a = tl.load(a_at, mask=None if EVEN_K else ks[None, :] < K, other=zero)
                b_rows = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
                b_at = b_ptr + b_rows[None, :] * b_row + ks[:, None]
                b = tl.load(b_at, mask=None if EVEN_K else ks[:, None] < K, other=zero)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < M
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]
        if drop_ptr is not None:
            drop = tl.load(drop_ptr + rows // sample_rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        if SUBTILES == 1:
            parts = (acc,)
        elif SUBTILES == 2:
            parts = _halves(acc)
        else:
            left, right = _halves(acc)
            parts = _halves(left) + _halves(right)
        for part in tl.static_range(SUBTILES):
            value = parts[part]
            first = tile_n * BLOCK_N + part * WIDTH
            columns = first + tl.arange(0, WIDTH)
            in_columns = columns < N
            inside = in_rows[:, None] & in_columns[None, :]
            at_MN = rows[:, None].to(tl.int64) * N + columns[None, :]
            if mean_ptr is not None:
                # LN(x) W = r (x W' - mu s)
                b_sum = tl.load(b_sum_ptr + columns, mask=in_columns, other=0.0)[None, :]
                value = rstd * (value - mean * b_sum)
            value += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            if ACTIVATION:
                if u_ptr is not None:
                    if STORE_DESCRIPTORS:
                        u_tiles.store([tile_m * BLOCK_M, first], value.to(u_ptr.dtype.element_ty))
                    else:
                        tl.store(u_ptr + at_MN, value.to(u_ptr.dtype.element_ty), mask=inside)
                value = quick_gelu_value(value, y_ptr.dtype.element_ty)
            if drop_ptr is not None:
                value *= drop
            if residual_ptr is not None:
                residual_at = residual_ptr + rows[:, None].to(tl.int64) * residual_row + columns[None, :]
                value += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
            y = value.to(y_ptr.dtype.element_ty)
            if STORE_DESCRIPTORS:
                y_tiles.store([tile_m * BLOCK_M, first], y)
            else:
                tl.store(y_ptr + rows[:, None].to(tl.int64) * y_row + columns[None, :], y, mask=inside)
            if part_mean_ptr is not None:
                # mean and M2 = sum (y - mean)^2 of this slice of each row, as stored
                stored = tl.where(in_columns[None, :], y.to(tl.float32), 0.0)
                part_mean = tl.sum(stored, 1) / tl.maximum(tl.minimum(N - first, WIDTH), 1)
                off = tl.where(in_columns[None, :], stored - part_mean[:, None], 0.0)
                slot = (tile_n * SUBTILES + part).to(tl.int64) * M + rows
                kept = in_rows & (slot < tl.cdiv(N, WIDTH).to(tl.int64) * M)
                tl.store(part_mean_ptr + slot, part_mean, mask=kept)
                tl.store(part_m2_ptr + slot, tl.sum(off * off, 1), mask=kept)


@triton.jit(do_not_specialize=["M"])
def _merge_statistics_kernel(
    part_mean_ptr,  # (slots, M)
    part_m2_ptr,  # (slots, M)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    M,
    N,
    width,  # columns of a slot; the last may have fewer
    slots,
    eps,
    SLOTS: tl.constexpr,  # >= slots, a power of two
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)[:, None]
    inside = (slot < slots) & (rows < M)[None, :]
    count = tl.where(inside, tl.minimum(N - slot * width, width), 0).to(tl.float32)
    at = slot.to(tl.int64) * M + rows[None, :]
    part_mean = tl.load(part_mean_ptr + at, mask=inside, other=0.0)
    part_m2 = tl.load(part_m2_ptr + at, mask=inside, other=0.0)
    # mean = sum n_i mean_i / N, M2 = sum M2_i + n_i (mean_i - mean)^2
    mean = tl.sum(count * part_mean, 0) / N
    off = part_mean - mean[None, :]
    variance = tl.sum(part_m2 + count * off * off, 0) / N
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, 1.0 / tl.sqrt(variance + eps), mask=rows < M)


class _Launches(NamedTuple):
    """What a product launches."""

    product: Prepared
    merge: Prepared | None  # of the statistics
    slots: int


@prepared
def _prepare(
    device: torch.device,
    dtype: torch.dtype,
    out: torch.dtype,
    M: int,
    N: int,
    K: int,
    a_row: int,
    b_row: int,
    residual_row: int | None,
    sample_rows: int,
    activation: bool,
    aligned: bool,
    keep: bool,
    eps: float | None,
) -> _Launches:
    """For a (M, K) and b (N, K) of ``dtype``, rows ``a_row`` and ``b_row`` apart, ``aligned`` to 16 bytes."""
    size = dtype.itemsize

    def describable(row: int, columns: int, size: int = size) -> bool:
        """Whether a tensor descriptor takes such rows: row stride in whole 16 bytes."""
        return row * size % 16 == 0 and row > 0 and columns * size >= 16

    # float32 runs on the ordinary units, from registers, where tiles in descriptor layout only cost more of them
    descriptors = arch(device) >= 90 and dtype != torch.float32
    by_tile = descriptors and aligned and describable(a_row, K) and describable(b_row, K)
    sizes = {"m": M, "n": N, "k": K, "bytes": size, "residual": int(residual_row is not None), "aligned": int(by_tile)}
    config = dict(tile("gemm", device, **sizes))
    occupancy = config.pop("OCCUPANCY", 1)
    width = config["BLOCK_N"] // config["SUBTILES"]
    slots = cdiv(N, width)
    product = Prepared(
        device,
        gemm_kernel,
        (min(processors(device) * occupancy, cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])),),
        (M, N, K, a_row, b_row, N, residual_row or 0, sample_rows),
        ACTIVATION=activation,
        LOAD_DESCRIPTORS=by_tile,
        STORE_DESCRIPTORS=descriptors and describable(N, N, out.itemsize) and (not keep or describable(N, N)),
        EVEN_K=K % config["BLOCK_K"] == 0,
        **config,
    )
    if eps is None:
        return _Launches(product, None, slots)
    rows, numbers = 64, (M, N, width, slots, eps)
    merge = Prepared(
        device, _merge_statistics_kernel, (cdiv(M, rows),), numbers, SLOTS=next_power_of_2(slots), ROWS=rows
    )
    return _Launches(product, merge, slots)


def gemm(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    activation: bool = False,
    keep: bool = False,
    drop_scale: Tensor | None = None,
    residual: Tensor | None = None,
    statistics_eps: float | None = None,
) -> tuple[Tensor, ...]:
    """y = residual + s act(LN(a) b^T + bias); all but product and bias are optional.

    Args:
        a: (M, K), unit stride along K, any row stride.
        b: (N, K) in a's dtype, a weight (O, I); copied unless its stride along K is 1.
        bias: (N,), any floating dtype.
        norm: (mean (M,), rstd (M,), sums of b over K (N,)), float32: the LayerNorm whose weight is folded into b.
        activation: apply quick_gelu.
        keep: return u, what quick_gelu was applied to, as well.
        drop_scale: (B,), M a multiple of B: factor of each M / B rows.
        residual: (M, N), unit stride along N.
        statistics_eps: return the mean and 1 / sqrt(variance + eps) of y's rows as well, (M,) float32 each.

    Returns:
        y (M, N), contiguous, in the promoted dtype of a and residual, then those of u, mean, rstd that were asked for.
    """
    (M, K), (a_row, a_step), device = a.shape, a.stride(), a.device
    b = b if b.stride()[1] == 1 else b.contiguous()
    N = b.shape[0]
    assert a_step == 1 or K == 1
    assert a.dtype == b.dtype
    dtype = a.dtype if residual is None else torch.promote_types(a.dtype, residual.dtype)
    launches = _prepare(
        device,
        a.dtype,
        dtype,
        M,
        N,
        K,
        a_row,
        b.stride()[0],
        None if residual is None else residual.stride()[0],
        rows_of_sample(M, drop_scale),
        activation,
        not (a.data_ptr() | b.data_ptr()) % 16,
        keep,
        statistics_eps,
    )
    y = torch.empty(M, N, dtype=dtype, device=device)
    u = torch.empty(M, N, dtype=a.dtype, device=device) if keep else None
    mean, rstd, b_sums = norm or (None, None, None)
    part_mean = part_m2 = None
    if launches.merge is not None:
        part_mean = torch.empty(launches.slots, M, dtype=torch.float32, device=device)
        part_m2 = torch.empty_like(part_mean)
    launches.product(a, b, y, bias, mean, rstd, b_sums, u, drop_scale, residual, part_mean, part_m2)
    outputs = (y,) if u is None else (y, u)
    if launches.merge is None:
        return outputs
    mean = torch.empty(M, dtype=torch.float32, device=device)
    rstd = torch.empty_like(mean)
    launches.merge(part_mean, part_m2, mean, rstd)
    return *outputs, mean, rstd
