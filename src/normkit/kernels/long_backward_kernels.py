"""Triton kernels of the backward of row norms whose rows do not fit on chip.

Here: `long_backward_kernel`, which reads rows again out of the cache, for parameters' sums that registers hold;
`long_means_kernel` and `long_columns_kernel`, a pass by rows and then one by columns, for any size.
May import: triton, row_kernels.
Read next: triton_rows.py, who launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.row_kernels import _dx, _gain, _start, _statistics_at, _step, _sum_of_two, _xhat


@triton.jit
def _means(sum_g_xhat, sum_g, CENTERED: tl.constexpr, D: tl.constexpr):
    """mean(g * xhat) and mean(g) of a row, out of sums by columns: [1, BLOCK_D]."""
    INVERSE: tl.constexpr = 1.0 / D
    if CENTERED:
        total_g_xhat, total_g = tl.reduce((sum_g_xhat, sum_g), 1, _sum_of_two)
    else:
        total_g_xhat = tl.sum(sum_g_xhat, 1)
        total_g = total_g_xhat * 0.0
    return tl.sum(total_g_xhat, 0) * INVERSE, tl.sum(total_g, 0) * INVERSE


@triton.jit(do_not_specialize=["rows", "dout_inner", "dtotal_inner", "total_inner"])
def long_backward_kernel(
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
    STAGES: tl.constexpr,
):
    """The rows whose number is the program's, modulo the number of programs: dx, and the parameters' sums in registers.

    A step takes BLOCK_D columns of one row for its sums, and the same columns of the row before it, out of the cache,
    for dx: one loop without a pause between rows, whose loads the compiler starts steps ahead.
    """
    WHOLE: tl.constexpr = D % BLOCK_D == 0
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    PARTS: tl.constexpr = triton.next_power_of_2(BLOCKS)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK_D)[None, :]
    part = tl.arange(0, PARTS)[:, None]
    dweight = tl.zeros([PARTS, BLOCK_D], ACC)
    dbias = tl.zeros([PARTS, BLOCK_D], ACC)
    sum_g = tl.zeros([1, BLOCK_D], ACC)
    sum_g_xhat = tl.zeros([1, BLOCK_D], ACC)
    mean, rstd = _statistics_at(mean_ptr, rstd_ptr, rows, rows, CENTERED)  # there is no row before the first
    mean_g_xhat, mean_g = rstd, rstd
    next_mean, next_rstd = _statistics_at(mean_ptr, rstd_ptr, program, rows, CENTERED)
    later_mean, later_rstd = _statistics_at(mean_ptr, rstd_ptr, program + programs, rows, CENTERED)
    for step in tl.range(0, (tl.cdiv(rows - program, programs) + 1) * BLOCKS, num_stages=STAGES):
        block, next_row, row, cols, inside = _step(step, lanes, D, BLOCK_D)
        ahead = inside & (next_row < rows)
        here = inside & (row >= 0)
        dout_at = dout_ptr + _start(next_row, dout_inner, dout_outer_stride, dout_inner_stride, DOUT_TWO_AXES)
        next_g = tl.load(dout_at + cols, mask=ahead, other=0.0).to(ACC)
        total_at = total_ptr + _start(next_row, total_inner, total_outer_stride, total_inner_stride, TOTAL_TWO_AXES)
        next_xhat = _xhat(total_at + cols, ahead, next_mean, next_rstd, CENTERED, ACC, WHOLE)
        dout_at = dout_ptr + _start(row, dout_inner, dout_outer_stride, dout_inner_stride, DOUT_TWO_AXES)
        g = tl.load(dout_at + cols, mask=here, other=0.0).to(ACC)
        total_at = total_ptr + _start(row, total_inner, total_outer_stride, total_inner_stride, TOTAL_TWO_AXES)
        xhat = _xhat(total_at + cols, here, mean, rstd, CENTERED, ACC, WHOLE)
        g_xhat = g * xhat
        for number in tl.static_range(BLOCKS):
            if block == number:  # the comparison below is the compiler's: a part is a set of registers
                if NEEDS_DWEIGHT:
                    dweight = tl.where(part == number, dweight + g_xhat, dweight)
                if NEEDS_DBIAS:
                    dbias = tl.where(part == number, dbias + g, dbias)
        if weight_ptr is not None:
            gain = _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
            g = g * gain
            next_g = next_g * gain
        sum_g += next_g
        sum_g_xhat += next_g * next_xhat
        dx = _dx(g, xhat, mean_g_xhat, mean_g, rstd, CENTERED)
        if dtotal_ptr is not None:
            dtotal_at = dtotal_ptr + _start(
                row, dtotal_inner, dtotal_outer_stride, dtotal_inner_stride, DTOTAL_TWO_AXES
            )
            dx += tl.load(dtotal_at + cols, mask=here, other=0.0).to(ACC)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=here)
        if block == BLOCKS - 1:
            mean_g_xhat, mean_g = _means(sum_g_xhat, sum_g, CENTERED, D)
            sum_g = tl.zeros([1, BLOCK_D], ACC)
            sum_g_xhat = tl.zeros([1, BLOCK_D], ACC)
            mean, rstd = next_mean, next_rstd
            next_mean, next_rstd = later_mean, later_rstd
            later_mean, later_rstd = _statistics_at(mean_ptr, rstd_ptr, next_row + 2 * programs, rows, CENTERED)
    column = part * BLOCK_D + lanes
    if NEEDS_DWEIGHT:
        tl.store(partial_ptr + program * D + column, dweight, mask=column < D)
    if NEEDS_DBIAS:
        tl.store(partial_ptr + (programs + program) * D + column, dbias, mask=column < D)


@triton.jit(do_not_specialize=["rows", "dout_inner", "total_inner"])
def long_means_kernel(
    dout_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    means_ptr,  # (2, rows): mean(g * xhat), mean(g)
    rows,
    dout_inner,
    dout_outer_stride,
    dout_inner_stride,
    total_inner,
    total_outer_stride,
    total_inner_stride,
    DOUT_TWO_AXES: tl.constexpr,
    TOTAL_TWO_AXES: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What dx needs of one row per program, BLOCK_D elements at a time."""
    WHOLE: tl.constexpr = D % BLOCK_D == 0
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = _statistics_at(mean_ptr, rstd_ptr, row, rows, CENTERED)
    sum_g = tl.zeros([1, BLOCK_D], ACC)
    sum_g_xhat = tl.zeros([1, BLOCK_D], ACC)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        cols = begin + tl.arange(0, BLOCK_D)[None, :]
        inside = cols < D
        dout_at = dout_ptr + _start(row, dout_inner, dout_outer_stride, dout_inner_stride, DOUT_TWO_AXES)
        g = tl.load(dout_at + cols, mask=inside, other=0.0).to(ACC)
        if weight_ptr is not None:
            g = g * _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
        total_at = total_ptr + _start(row, total_inner, total_outer_stride, total_inner_stride, TOTAL_TWO_AXES)
        xhat = _xhat(total_at + cols, inside, mean, rstd, CENTERED, ACC, WHOLE)
        sum_g += g
        sum_g_xhat += g * xhat
    mean_g_xhat, mean_g = _means(sum_g_xhat, sum_g, CENTERED, D)
    tl.store(means_ptr + row, mean_g_xhat)
    tl.store(means_ptr + rows + row, mean_g)


@triton.jit(do_not_specialize=["rows", "dout_inner", "dtotal_inner", "total_inner"])
def long_columns_kernel(
    dout_ptr,
    dtotal_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,  # (2, programs, D)
    means_ptr,  # (2, rows), of long_means_kernel
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
    STAGES: tl.constexpr,
):
    """dx and the sums of dweight and dbias for BLOCK_D columns of the rows program_id(1), + programs, ..."""
    WHOLE: tl.constexpr = D % BLOCK_D == 0
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    dweight = tl.zeros([BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)
    if weight_ptr is not None:
        gain = _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
    next_mean, next_rstd = _statistics_at(mean_ptr, rstd_ptr, program, rows, CENTERED)
    next_mean_g_xhat, next_mean_g = next_rstd, next_rstd
    if dx_ptr is not None:
        next_mean_g, next_mean_g_xhat = _statistics_at(means_ptr + rows, means_ptr, program, rows, CENTERED)
    for number in tl.range(program, rows, programs, num_stages=STAGES):
        row = tl.full((), 0, tl.int64) + number
        mean, rstd, mean_g_xhat, mean_g = next_mean, next_rstd, next_mean_g_xhat, next_mean_g
        next_row = row + programs
        next_mean, next_rstd = _statistics_at(mean_ptr, rstd_ptr, next_row, rows, CENTERED)
        dout_at = dout_ptr + _start(row, dout_inner, dout_outer_stride, dout_inner_stride, DOUT_TWO_AXES)
        g = tl.load(dout_at + cols, mask=inside, other=0.0).to(ACC)
        total_at = total_ptr + _start(row, total_inner, total_outer_stride, total_inner_stride, TOTAL_TWO_AXES)
        xhat = _xhat(total_at + cols, inside, mean, rstd, CENTERED, ACC, WHOLE)
        if NEEDS_DWEIGHT:
            dweight += g * xhat
        if NEEDS_DBIAS:
            dbias += g
        if dx_ptr is not None:
            next_mean_g, next_mean_g_xhat = _statistics_at(means_ptr + rows, means_ptr, next_row, rows, CENTERED)
            if weight_ptr is not None:
                g = g * gain
            dx = _dx(g, xhat, mean_g_xhat, mean_g, rstd, CENTERED)
            if dtotal_ptr is not None:
                dtotal_at = dtotal_ptr + _start(
                    row, dtotal_inner, dtotal_outer_stride, dtotal_inner_stride, DTOTAL_TWO_AXES
                )
                dx += tl.load(dtotal_at + cols, mask=inside, other=0.0).to(ACC)
            tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if NEEDS_DWEIGHT:
        tl.store(partial_ptr + program * D + cols, dweight, mask=inside)
    if NEEDS_DBIAS:
        tl.store(partial_ptr + (programs + program) * D + cols, dbias, mask=inside)
