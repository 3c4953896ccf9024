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
def _pooled(n, mean, m2, other_n, other_mean, other_m2):
    """Two parts' counts, means and sums of squared deviations as one, by Chan's formula."""
    count = n + other_n
    weight = other_n / tl.where(count > 0.0, count, 1.0)
    delta = other_mean - mean
    return count, mean + delta * weight, m2 + other_m2 + delta * delta * n * weight


@triton.jit
def _long_moments(
    x_start, residual_start, total_start, scale, CENTERED: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """mean and mean square of the deviations of a row times `scale`; also writes the total."""
    lanes = tl.arange(0, BLOCK_D)
    mean = tl.zeros([BLOCK_D], ACC)
    m2 = tl.zeros([BLOCK_D], ACC)
    count = tl.zeros([BLOCK_D], ACC)
    number = scale * 0.0
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        inside = begin + lanes < D
        stored = tl.load(x_start + begin + lanes, mask=inside, other=0.0)
        if residual_start is not None:
            addend = tl.load(residual_start + begin + lanes, mask=inside, other=0.0)
            stored = (stored.to(ACC) + addend.to(ACC)).to(x_start.dtype.element_ty)
            tl.store(total_start + begin + lanes, stored, mask=inside)
        values = stored.to(ACC) * scale
        if CENTERED:
            number += 1.0
            delta = tl.where(inside, values - mean, 0.0)
            mean += delta * (1.0 / number)
            m2 += delta * tl.where(inside, values - mean, 0.0)
            count = tl.where(inside, number, count)
        else:
            m2 += values * values
    if CENTERED:
        pooled = tl.reduce((count, mean, m2), 0, _pooled)
        return pooled[1], pooled[2] * (1.0 / D)
    return number, tl.sum(m2, 0) * (1.0 / D)


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
    """One row per program, BLOCK_D elements at a time, twice."""
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
    one = (row * 0).to(ACC) + 1.0
    scale, inverse = one, one
    mean, square = _long_moments(x_start, residual_start, total_start, one, CENTERED, ACC, D, BLOCK_D, STAGES)
    rstd = _reciprocal_root(square + EPS)
    if SCALE != 0.0:
        if not (square < float("inf")):
            scale, inverse = one * SCALE, one * (1.0 / SCALE)
            mean, square = _long_moments(x_start, residual_start, total_start, scale, CENTERED, ACC, D, BLOCK_D, STAGES)
            rstd = _rescaled_root(square, scale, EPS)
    factor = rstd * inverse
    lanes = tl.arange(0, BLOCK_D)
    if residual_ptr is not None:
        tl.debug_barrier()  # the total is read back by other threads than wrote it
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        cols = begin + lanes
        inside = cols < D
        out = tl.load(from_start + cols, mask=inside, other=0.0).to(ACC) * scale
        if CENTERED:
            out = out - mean
        out = out * factor
        if weight_ptr is not None:
            out = out * _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
        if bias_ptr is not None:
            out = out + tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
        tl.store(out_ptr + row * D + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)
    if CENTERED:
        tl.store(mean_ptr + row, mean * inverse)


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
    """dx of one row per program, BLOCK_D elements at a time, twice."""
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
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        cols = begin + lanes
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
