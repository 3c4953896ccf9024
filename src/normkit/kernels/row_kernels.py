"""Triton kernels of row norms whose rows stay on chip: read once, forward and backward.

Here: `forward_kernel`, `backward_kernel`, `sum_kernel`, and the formulas that they share with longer rows.
May import: triton.
Read next: long_forward_kernels.py and long_backward_kernels.py, the same for rows that do not fit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _start(row, inner, outer_stride, inner_stride, TWO_AXES: tl.constexpr):
    """The element at which a row starts, 64 bits wide."""
    if TWO_AXES:
        return (row // inner) * outer_stride + (row % inner) * inner_stride
    return row * inner_stride


@triton.jit
def _reciprocal_root(value):
    """1 / sqrt(value), both rounded to nearest: the hardware's approximation is off by up to two units."""
    if value.dtype == tl.float64:
        root = 1.0 / tl.sqrt(value)
    else:
        root = tl.div_rn(tl.full(value.shape, 1.0, tl.float32), tl.sqrt_rn(value))
    return root


@triton.jit
def _gain(weight, OFFSET: tl.constexpr, ACC: tl.constexpr):
    wide = weight.to(ACC)
    if OFFSET != 0.0:
        wide = wide + OFFSET
    return wide


@triton.jit
def _sum_of_two(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _with_rest(a, b):
    """a + b, rounded, and what rounding took from it (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def _deviations(values, first, inside, D: tl.constexpr, CENTERED: tl.constexpr):
    """Deviations from the mean (or from zero), their mean square, and the mean.

    The mean is first taken about the row's first element, which is exact for a constant row and loses nothing at a
    large mean; then about what was found, since a first element far from the others took their digits.
    """
    INVERSE: tl.constexpr = 1.0 / D
    if CENTERED:
        mean = first + tl.sum(tl.where(inside, values - first[:, None], 0.0), 1) * INVERSE
        deviation = tl.where(inside, values - mean[:, None], 0.0)
        off, square = tl.reduce((deviation, deviation * deviation), 1, _sum_of_two)
        off = off * INVERSE
        deviation = deviation - off[:, None]
        square = square * INVERSE - off * off
        square = tl.where(square < 0.0, 0.0, square)  # rounding; NaN stays
        mean += off
    else:
        deviation = values
        square = tl.sum(values * values, 1) * INVERSE
        mean = first
    return deviation, square, mean


@triton.jit
def _rescaled_root(square, scale, EPS: tl.constexpr):
    """1 / sqrt(square / scale^2 + eps) where scale^2 * eps underflows: eps matters to a row without deviations only."""
    wide = tl.where(square > 0.0, square, 1.0)
    alone = _reciprocal_root(tl.zeros_like(square) + EPS)
    scaled = scale * _reciprocal_root(wide)
    return tl.where(square > 0.0, scaled, tl.where(square == 0.0, alone, square))


@triton.jit
def _statistics_at(mean_ptr, rstd_ptr, row, rows, CENTERED: tl.constexpr):
    """mean (zero where there is none) and rstd of rows that may lie beyond the last."""
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    mean = rstd * 0.0
    if CENTERED:
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    return mean, rstd


@triton.jit
def _step(step, lanes, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a program that goes through long rows block by block: the block, its row, the program's row before that, the
    columns and which of them are in a row.
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block = step % BLOCKS
    row = tl.program_id(0) + (tl.full((), 0, tl.int64) + step // BLOCKS) * tl.num_programs(0)
    cols = block * BLOCK_D + lanes
    return block, row, row - tl.num_programs(0), cols, cols < D


# ------------------------------------------------------------------------------------------------ rows on chip


@triton.jit
def _total(x_at, residual_at, mask, ACC: tl.constexpr):
    """What is normalized, as memory holds it: x, or x + residual rounded to x's dtype."""
    stored = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first")
    if residual_at is not None:
        addend = tl.load(residual_at, mask=mask, other=0.0, eviction_policy="evict_first")
        stored = (stored.to(ACC) + addend.to(ACC)).to(x_at.dtype.element_ty)
    return stored


@triton.jit
def _normalize(
    row, rows, x_start, residual_start, total_ptr, first, weight_ptr, weight, bias_ptr, bias, out_ptr, mean_ptr,
    rstd_ptr, EPS: tl.constexpr, OFFSET: tl.constexpr, CENTERED: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile. Parameters come as values where they serve many tiles, else they are fetched when they are needed."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    present = row < rows
    valid = inside & present[:, None]
    x_at = x_start[:, None] + cols
    to = row[:, None] * D + cols
    residual_at = None
    if residual_start is not None:
        residual_at = residual_start[:, None] + cols
    stored = _total(x_at, residual_at, valid, ACC)
    if residual_start is not None:
        tl.store(total_ptr + to, stored, mask=valid)
    deviation, square, mean = _deviations(stored.to(ACC), first, inside, D, CENTERED)
    rstd = _reciprocal_root(square + EPS)
    factor = rstd
    if SCALE != 0.0:
        fits = square < float("inf")
        if tl.min(fits.to(tl.int32)) == 0:  # some row overflowed, or holds NaN or infinity
            scale = tl.where(fits, 1.0, SCALE).to(ACC)
            inverse = tl.where(fits, 1.0, 1.0 / SCALE).to(ACC)
            # fetched again: to keep it for this would take the registers of a second tile
            values = _total(x_at, residual_at, valid, ACC).to(ACC) * scale[:, None]
            deviation, square, mean = _deviations(values, first * scale, inside, D, CENTERED)
            rstd = tl.where(fits, rstd, _rescaled_root(square, scale, EPS))
            factor = rstd * inverse
            mean = mean * inverse
    out = deviation * factor[:, None]
    if weight_ptr is not None:
        if weight is None:
            weight = tl.load(weight_ptr + cols, mask=inside, other=0.0, eviction_policy="evict_last")
        out = out * _gain(weight, OFFSET, ACC)
    if bias_ptr is not None:
        if bias is None:
            bias = tl.load(bias_ptr + cols, mask=inside, other=0.0, eviction_policy="evict_last")
        out = out + bias.to(ACC)
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(rstd_ptr + row, rstd, mask=present)
    if CENTERED:
        tl.store(mean_ptr + row, mean, mask=present)


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner"])
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    X_TWO_AXES: tl.constexpr,
    RESIDUAL_TWO_AXES: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
    SCALE: tl.constexpr,  # 0.0: squares cannot overflow
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,  # 0: the grid has a program for each tile
):
    """The tiles of ROWS rows whose number is the program's, modulo the number of programs."""
    program = tl.program_id(0)
    row = tl.arange(0, ROWS).to(tl.int64) + program * ROWS
    x_start = x_ptr + _start(row, x_inner, x_outer_stride, x_inner_stride, X_TWO_AXES)
    residual_start = None
    if residual_ptr is not None:
        residual_start = residual_ptr + _start(
            row, residual_inner, residual_outer_stride, residual_inner_stride, RESIDUAL_TWO_AXES
        )
    next_first = tl.zeros([ROWS], ACC)
    if CENTERED:
        next_first = _total(x_start, residual_start, row < rows, ACC).to(ACC)
    weight = None
    bias = None
    if STAGES == 0:
        _normalize(row, rows, x_start, residual_start, total_ptr, next_first, weight_ptr, weight, bias_ptr, bias,
                   out_ptr, mean_ptr, rstd_ptr, EPS, OFFSET, CENTERED, SCALE, ACC, D, BLOCK_D, ROWS)  # fmt: skip
    else:
        programs = tl.num_programs(0)
        cols = tl.arange(0, BLOCK_D)[None, :]
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0)
        for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
            first = next_first
            if CENTERED:
                # a row's first element is fetched one tile ahead: what the compiler pipelines is whole tiles
                row = tl.arange(0, ROWS).to(tl.int64) + (tile + programs) * ROWS
                x_start = x_ptr + _start(row, x_inner, x_outer_stride, x_inner_stride, X_TWO_AXES)
                if residual_ptr is not None:
                    residual_start = residual_ptr + _start(
                        row, residual_inner, residual_outer_stride, residual_inner_stride, RESIDUAL_TWO_AXES
                    )
                next_first = _total(x_start, residual_start, row < rows, ACC).to(ACC)
            # from the number of the tile, not from the last one: the compiler must see how addresses are aligned
            row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
            x_start = x_ptr + _start(row, x_inner, x_outer_stride, x_inner_stride, X_TWO_AXES)
            if residual_ptr is not None:
                residual_start = residual_ptr + _start(
                    row, residual_inner, residual_outer_stride, residual_inner_stride, RESIDUAL_TWO_AXES
                )
            _normalize(row, rows, x_start, residual_start, total_ptr, first, weight_ptr, weight, bias_ptr, bias,
                       out_ptr, mean_ptr, rstd_ptr, EPS, OFFSET, CENTERED, SCALE, ACC, D, BLOCK_D, ROWS)  # fmt: skip


@triton.jit
def _xhat(total_at, valid, mean, rstd, CENTERED: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr):
    """xhat, and 0 where there is no element; WHOLE: only whole rows are missing, whose statistics are 0."""
    xhat = tl.load(total_at, mask=valid, other=0.0).to(ACC)
    if CENTERED:
        xhat = xhat - mean
    xhat = xhat * rstd
    if not WHOLE:
        xhat = tl.where(valid, xhat, 0.0)  # mean * rstd may overflow
    return xhat


@triton.jit
def _dx(g, xhat, mean_g_xhat, mean_g, rstd, CENTERED: tl.constexpr):
    dx = g - mean_g_xhat * xhat
    if CENTERED:
        dx = dx - mean_g
    return dx * rstd


@triton.jit(do_not_specialize=["rows", "dout_inner", "dtotal_inner", "total_inner"])
def backward_kernel(
    dout_ptr,
    dtotal_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,  # (2, programs, D): sums of dweight, of dbias
    rows,
    dout_inner,
    dout_outer_stride,
    dout_inner_stride,
    dtotal_inner,
    dtotal_outer_stride,
    dtotal_inner_stride,
    total_inner,
    total_outer_stride,
    total_inner_stride,
    DOUT_TWO_AXES: tl.constexpr,
    DTOTAL_TWO_AXES: tl.constexpr,
    TOTAL_TWO_AXES: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """The tiles of ROWS rows whose number is the program's, modulo the number of programs.

    AGAIN: a tile is fetched again, out of the nearest cache, when its sums are known, and the weight for every tile:
    beside the sums of the parameters' gradients the registers would not hold them.
    """
    INVERSE: tl.constexpr = 1.0 / D
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, ROWS).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    if weight_ptr is not None:
        if not AGAIN:
            gain = _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
    dweight = tl.zeros([ROWS, BLOCK_D], ACC)
    dbias = tl.zeros([ROWS, BLOCK_D], ACC)
    # a row's statistics are fetched one tile ahead: the loads that the compiler pipelines are those of whole tiles
    ahead = lanes + program * ROWS
    next_mean, next_rstd = _statistics_at(mean_ptr, rstd_ptr, ahead, rows, CENTERED)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = lanes + tile * ROWS
        valid = inside & (row < rows)[:, None]
        rstd, mean = next_rstd[:, None], next_mean[:, None]
        next_mean, next_rstd = _statistics_at(mean_ptr, rstd_ptr, row + programs * ROWS, rows, CENTERED)
        start = _start(row, total_inner, total_outer_stride, total_inner_stride, TOTAL_TWO_AXES)
        total_at = total_ptr + start[:, None] + cols
        xhat = _xhat(total_at, valid, mean, rstd, CENTERED, ACC, D == BLOCK_D)
        start = _start(row, dout_inner, dout_outer_stride, dout_inner_stride, DOUT_TWO_AXES)
        dout_at = dout_ptr + start[:, None] + cols
        g = tl.load(dout_at, mask=valid, other=0.0).to(ACC)
        if NEEDS_DWEIGHT:
            dweight += g * xhat
        if NEEDS_DBIAS:
            dbias += g
        if dx_ptr is not None:
            if weight_ptr is not None:
                if AGAIN:
                    gain = _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
                g = g * gain
            if CENTERED:
                sum_g_xhat, sum_g = tl.reduce((g * xhat, g), 1, _sum_of_two)
                mean_g_xhat, mean_g = (sum_g_xhat * INVERSE)[:, None], (sum_g * INVERSE)[:, None]
            else:
                mean_g_xhat = (tl.sum(g * xhat, 1) * INVERSE)[:, None]
                mean_g = mean_g_xhat
            if AGAIN:
                xhat = _xhat(total_at, valid, mean, rstd, CENTERED, ACC, D == BLOCK_D)
                g = tl.load(dout_at, mask=valid, other=0.0).to(ACC)
                if weight_ptr is not None:
                    g = g * _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
            dx = _dx(g, xhat, mean_g_xhat, mean_g, rstd, CENTERED)
            if dtotal_ptr is not None:
                start = _start(row, dtotal_inner, dtotal_outer_stride, dtotal_inner_stride, DTOTAL_TWO_AXES)
                dx += tl.load(dtotal_ptr + start[:, None] + cols, mask=valid, other=0.0).to(ACC)
            tl.store(dx_ptr + row[:, None] * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=valid)
    column = tl.arange(0, BLOCK_D)
    if NEEDS_DWEIGHT:
        tl.store(partial_ptr + program * D + column, tl.sum(dweight, 0), mask=column < D)
    if NEEDS_DBIAS:
        tl.store(partial_ptr + (programs + program) * D + column, tl.sum(dbias, 0), mask=column < D)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    partial_ptr,  # (2, programs, D)
    dweight_ptr,  # (D,)
    dbias_ptr,  # (D,)
    programs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The programs' sums of one parameter's gradient, in their order."""
    second = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_P)[:, None]
    from_ptr = partial_ptr + second.to(tl.int64) * programs * D
    total = tl.zeros([BLOCK_P, BLOCK_D], partial_ptr.dtype.element_ty)
    for start in tl.range(0, programs, BLOCK_P):
        program = start + lanes
        total += tl.load(
            from_ptr + program * D + column[None, :], mask=(program < programs) & (column[None, :] < D), other=0.0
        )
    result = tl.sum(total, 0)
    if second == 0:
        if dweight_ptr is not None:
            tl.store(dweight_ptr + column, result.to(dweight_ptr.dtype.element_ty), mask=column < D)
    else:
        if dbias_ptr is not None:
            tl.store(dbias_ptr + column, result.to(dbias_ptr.dtype.element_ty), mask=column < D)
