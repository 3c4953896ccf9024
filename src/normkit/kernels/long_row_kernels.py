"""Triton kernels of row norms whose rows do not fit on chip: each is read twice, the second time from the L2 cache.

Here: `long_forward_kernel`, `long_dx_kernel`, `long_parameters_kernel`.
May import: triton, row_kernels.
Read next: triton_rows.py, who launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.row_kernels import _gain, _reciprocal_root, _rescaled_root, _start


@triton.jit
def _long_means(
    x_start, residual_start, total_start, scale, center, CENTERED: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """mean(d) and mean(d^2) of a row's d = total * scale - center; also writes the total."""
    lanes = tl.arange(0, BLOCK_D)
    sum_d = tl.zeros([BLOCK_D], ACC)
    sum_dd = tl.zeros([BLOCK_D], ACC)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        inside = begin + lanes < D
        stored = tl.load(x_start + begin + lanes, mask=inside, other=0.0)
        if residual_start is not None:
            addend = tl.load(residual_start + begin + lanes, mask=inside, other=0.0)
            stored = (stored.to(ACC) + addend.to(ACC)).to(x_start.dtype.element_ty)
            tl.store(total_start + begin + lanes, stored, mask=inside)
        d = stored.to(ACC) * scale
        if CENTERED:
            d = d - center
            if D % BLOCK_D != 0:
                d = tl.where(inside, d, 0.0)
            sum_d += d
        sum_dd += d * d
    return tl.sum(sum_d, 0) * (1.0 / D), tl.sum(sum_dd, 0) * (1.0 / D)


@triton.jit
def _first_mean(x_start, residual_start, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mean of a row's first BLOCK_D elements, 0 where it is not finite."""
    lanes = tl.arange(0, BLOCK_D)
    stored = tl.load(x_start + lanes).to(ACC)
    if residual_start is not None:
        stored += tl.load(residual_start + lanes).to(ACC)
    mean = tl.sum(stored, 0) * (1.0 / BLOCK_D)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit(do_not_specialize=["x_inner", "residual_inner"])
def long_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
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
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row per program, BLOCK_D elements at a time, twice: the second time from its end, which the cache still has.

    Statistics are sums about the mean of the row's beginning, as `channel_kernels.moments_kernel` takes them.
    """
    row = tl.program_id(0).to(tl.int64)
    x_start = x_ptr + _start(row, x_inner, x_outer_stride, x_inner_stride, X_TWO_AXES)
    from_start = x_start
    residual_start = None
    total_start = None
    if residual_ptr is not None:
        residual_start = residual_ptr + _start(
            row, residual_inner, residual_outer_stride, residual_inner_stride, RESIDUAL_TWO_AXES
        )
        total_start = total_ptr + row * D
        from_start = total_start
    zero = (row * 0).to(ACC)
    scale, center = zero + 1.0, zero
    if CENTERED:
        center = _first_mean(x_start, residual_start, ACC, D, BLOCK_D)
    mean, square = zero, zero
    centered = 0
    again = 1
    while again == 1:
        mean, square = _long_means(
            x_start, residual_start, total_start, scale, center, CENTERED, ACC, D, BLOCK_D, STAGES
        )
        again = 0
        if SCALE != 0.0:
            if square == float("inf") and scale == 1.0:
                scale, center = zero + SCALE, zero
                centered = 0
                again = 1
        if CENTERED:
            if (again == 0 and centered == 0) and mean * mean > square - mean * mean:
                center += mean
                centered = 1
                again = 1
    if CENTERED:
        square = square - mean * mean
        square = tl.where(square < 0.0, 0.0, square)
    rstd = _reciprocal_root(square + EPS)
    if SCALE != 0.0:
        if scale != 1.0:
            rstd = _rescaled_root(square, scale, EPS)
    inverse = 1.0 / scale  # exact: a power of two
    factor = rstd * inverse
    lanes = tl.arange(0, BLOCK_D)
    if residual_ptr is not None:
        tl.debug_barrier()  # the total is read back by other threads than wrote it
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    for number in tl.range(0, BLOCKS, num_stages=STAGES):
        cols = (BLOCKS - 1 - number) * BLOCK_D + lanes
        inside = cols < D
        out = tl.load(from_start + cols, mask=inside, other=0.0).to(ACC) * scale
        if CENTERED:
            out = (out - center) - mean  # one by one: their sum would be rounded
        out = out * factor
        if weight_ptr is not None:
            out = out * _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
        if bias_ptr is not None:
            out = out + tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
        tl.store(out_ptr + row * D + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)
    if CENTERED:
        tl.store(mean_ptr + row, (center + mean) * inverse)


@triton.jit(do_not_specialize=["dout_inner", "dtotal_inner", "total_inner"])
def long_dx_kernel(
    dout_ptr,
    dtotal_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
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
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of one row per program, BLOCK_D elements at a time, twice: the second time from its end."""
    row = tl.program_id(0).to(tl.int64)
    dout_start = dout_ptr + _start(row, dout_inner, dout_outer_stride, dout_inner_stride, DOUT_TWO_AXES)
    total_start = total_ptr + _start(row, total_inner, total_outer_stride, total_inner_stride, TOTAL_TWO_AXES)
    rstd = tl.load(rstd_ptr + row)
    mean = rstd * 0.0
    if CENTERED:
        mean = tl.load(mean_ptr + row)
    lanes = tl.arange(0, BLOCK_D)
    sum_g = tl.zeros([BLOCK_D], ACC)
    sum_g_xhat = tl.zeros([BLOCK_D], ACC)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        cols = begin + lanes
        inside = cols < D
        g = tl.load(dout_start + cols, mask=inside, other=0.0).to(ACC)
        if weight_ptr is not None:
            g = g * _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
        sum_g += g
        sum_g_xhat += g * (tl.load(total_start + cols, mask=inside, other=0.0).to(ACC) - mean) * rstd
    mean_g = tl.sum(sum_g, 0) * (1.0 / D)
    mean_g_xhat = tl.sum(sum_g_xhat, 0) * (1.0 / D)
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    for number in tl.range(0, BLOCKS, num_stages=STAGES):
        cols = (BLOCKS - 1 - number) * BLOCK_D + lanes
        inside = cols < D
        g = tl.load(dout_start + cols, mask=inside, other=0.0).to(ACC)
        if weight_ptr is not None:
            g = g * _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
        xhat = (tl.load(total_start + cols, mask=inside, other=0.0).to(ACC) - mean) * rstd
        dx = g - mean_g_xhat * xhat
        if CENTERED:
            dx = dx - mean_g
        dx = dx * rstd
        if dtotal_ptr is not None:
            start = _start(row, dtotal_inner, dtotal_outer_stride, dtotal_inner_stride, DTOTAL_TWO_AXES)
            dx += tl.load(dtotal_ptr + start + cols, mask=inside, other=0.0).to(ACC)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "dout_inner", "total_inner"])
def long_parameters_kernel(
    dout_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # (2, programs, D)
    rows,
    dout_inner,
    dout_outer_stride,
    dout_inner_stride,
    total_inner,
    total_outer_stride,
    total_inner_stride,
    DOUT_TWO_AXES: tl.constexpr,
    TOTAL_TWO_AXES: tl.constexpr,
    CENTERED: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of dweight and dbias over the rows program_id(1), + programs, ..., for BLOCK_D columns."""
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    dweight = tl.zeros([BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)
    next_rstd = tl.load(rstd_ptr + program, mask=program < rows, other=0.0)
    next_mean = next_rstd
    if CENTERED:
        next_mean = tl.load(mean_ptr + program, mask=program < rows, other=0.0)
    for number in tl.range(program, rows, programs, num_stages=STAGES):
        row = tl.full((), 0, tl.int64) + number
        rstd, mean = next_rstd, next_mean
        ahead = row + programs
        next_rstd = tl.load(rstd_ptr + ahead, mask=ahead < rows, other=0.0)
        if CENTERED:
            next_mean = tl.load(mean_ptr + ahead, mask=ahead < rows, other=0.0)
        start = _start(row, dout_inner, dout_outer_stride, dout_inner_stride, DOUT_TWO_AXES)
        d = tl.load(dout_ptr + start + cols, mask=inside, other=0.0).to(ACC)
        dbias += d
        if NEEDS_DWEIGHT:
            start = _start(row, total_inner, total_outer_stride, total_inner_stride, TOTAL_TWO_AXES)
            xhat = tl.load(total_ptr + start + cols, mask=inside, other=0.0).to(ACC)
            if CENTERED:
                xhat = xhat - mean
            dweight += d * (xhat * rstd)
    if NEEDS_DWEIGHT:
        tl.store(partial_ptr + program * D + cols, dweight, mask=inside)
    if NEEDS_DBIAS:
        tl.store(partial_ptr + (programs + program) * D + cols, dbias, mask=inside)
