"""Triton kernel of the forward of row norms whose rows do not fit on chip.

Here: `long_forward_kernel`. As much of a row as the registers hold is read once, the rest again out of the L2 cache.
May import: triton, row_kernels.
Read next: triton_rows.py, who launches; long_backward_kernels.py, which goes through rows in the same way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.row_kernels import _gain, _reciprocal_root, _rescaled_root, _start, _step, _with_rest


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _stored(
    x_ptr, residual_ptr, row, x_inner, x_outer_stride, x_inner_stride, residual_inner, residual_outer_stride,
    residual_inner_stride, X_TWO_AXES: tl.constexpr, RESIDUAL_TWO_AXES: tl.constexpr, cols, mask, ACC: tl.constexpr
):  # fmt: skip
    """Those columns of what is normalized, as memory holds it: x, or x + residual rounded to x's dtype."""
    start = _start(row, x_inner, x_outer_stride, x_inner_stride, X_TWO_AXES)
    stored = tl.load(x_ptr + start + cols, mask=mask, other=0.0)
    if residual_ptr is not None:
        start = _start(row, residual_inner, residual_outer_stride, residual_inner_stride, RESIDUAL_TWO_AXES)
        addend = tl.load(residual_ptr + start + cols, mask=mask, other=0.0)
        stored = (stored.to(ACC) + addend.to(ACC)).to(x_ptr.dtype.element_ty)
    return stored


@triton.jit
def _scaled_and_shifted(
    out, cols, inside, weight_ptr, bias_ptr, OFFSET: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    if weight_ptr is not None:
        out = out * _gain(tl.load(weight_ptr + cols, mask=inside, other=0.0), OFFSET, ACC)
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    return out


@triton.jit
def _exchanged(kept, bits, next_bits, block, KEPT: tl.constexpr):
    """What is kept of that block, else `bits`; and what is kept when `next_bits` are in its place."""
    part = tl.arange(0, triton.next_power_of_2(KEPT))[:, None]
    for number in tl.static_range(KEPT):
        if block == number:  # the comparisons below are the compiler's: a part is a set of registers
            bits = tl.reduce(tl.where(part == number, kept, 0), 0, _either)[None, :]
            kept = tl.where(part == number, next_bits, kept)
    return bits, kept


@triton.jit
def _measured(
    x, first, origin, lane_mean, sum_dd, block, inside, CENTERED: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The lanes' means about the origin, and sums of squares about them, with another block of the row (Welford).

    The origin is the mean of the row's first block, so that nothing is lost at a large mean; it is taken about the
    first element, which is exact for a constant row.
    """
    if CENTERED:
        if block == 0:
            origin = first + tl.sum(tl.sum(x - first, 1), 0) * (1.0 / BLOCK_D)
            origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
        d = x - origin
        off = d - lane_mean
        if D % BLOCK_D != 0:
            off = tl.where(inside, off, 0.0)
        lane_mean += off * (tl.full((), 1.0, ACC) / (block + 1))
        sum_dd += off * (d - lane_mean)
    else:
        sum_dd += x * x
    return origin, lane_mean, sum_dd


@triton.jit
def _merged(lane_mean, sum_dd, CENTERED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean, and mean square of deviations, of a row out of its lanes' means and sums of squares about them."""
    INVERSE: tl.constexpr = 1.0 / D
    mean = tl.zeros((), sum_dd.dtype)
    if CENTERED:
        count = tl.where(tl.arange(0, BLOCK_D)[None, :] < D % BLOCK_D, D // BLOCK_D + 1, D // BLOCK_D).to(sum_dd.dtype)
        mean = tl.sum(tl.sum(count * lane_mean, 1), 0) * INVERSE
        apart = lane_mean - mean
        sum_dd = sum_dd + count * (apart * apart)
    return mean, tl.sum(tl.sum(sum_dd, 1), 0) * INVERSE


@triton.jit
def _row_that_overflows(
    from_ptr, row, inner, outer_stride, inner_stride, TWO_AXES: tl.constexpr, weight_ptr, bias_ptr, out_ptr, mean_ptr,
    rstd_ptr, EPS: tl.constexpr, OFFSET: tl.constexpr, CENTERED: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row whose squares overflow, or that holds NaN or infinity: once more, taken times SCALE."""
    from_ptr += _start(row, inner, outer_stride, inner_stride, TWO_AXES)
    lanes = tl.arange(0, BLOCK_D)
    mean = tl.zeros((), ACC)
    if CENTERED:
        sum_x = tl.zeros([BLOCK_D], ACC)
        for begin in tl.range(0, D, BLOCK_D, num_stages=1):
            cols = begin + lanes
            sum_x += tl.load(from_ptr + cols, mask=cols < D, other=0.0).to(ACC) * SCALE
        mean = tl.sum(sum_x, 0) * (1.0 / D)
    sum_dd = tl.zeros([BLOCK_D], ACC)
    for begin in tl.range(0, D, BLOCK_D, num_stages=1):
        cols = begin + lanes
        d = tl.load(from_ptr + cols, mask=cols < D, other=0.0).to(ACC) * SCALE - mean
        sum_dd += tl.where(cols < D, d * d, 0.0)
    square = tl.sum(sum_dd, 0) * (1.0 / D)
    rstd = _rescaled_root(square, mean * 0.0 + SCALE, EPS)
    for begin in tl.range(0, D, BLOCK_D, num_stages=1):
        cols = begin + lanes
        inside = cols < D
        d = tl.load(from_ptr + cols, mask=inside, other=0.0).to(ACC) * SCALE - mean
        out = _scaled_and_shifted(d * (rstd / SCALE), cols, inside, weight_ptr, bias_ptr, OFFSET, ACC)
        tl.store(out_ptr + row * D + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)
    if CENTERED:
        tl.store(mean_ptr + row, mean / SCALE)


@triton.jit
def _rows_that_overflow(
    from_ptr, rows, inner, outer_stride, inner_stride, TWO_AXES: tl.constexpr, weight_ptr, bias_ptr, out_ptr, mean_ptr,
    rstd_ptr, EPS: tl.constexpr, OFFSET: tl.constexpr, CENTERED: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Those of the program's rows whose rstd says so: 1 / sqrt(infinity), or NaN."""
    tl.debug_barrier()  # rstd, and the total, are read back by other threads than wrote them
    for number in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=1):
        row = tl.full((), 0, tl.int64) + number
        rstd = tl.load(rstd_ptr + row)
        if (rstd > 0.0) == 0:
            _row_that_overflows(from_ptr, row, inner, outer_stride, inner_stride, TWO_AXES, weight_ptr, bias_ptr,
                                out_ptr, mean_ptr, rstd_ptr, EPS, OFFSET, CENTERED, SCALE, ACC, D,
                                BLOCK_D)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner"])
def long_forward_kernel(
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
    KEPT: tl.constexpr,  # so many blocks of a row stay in registers, at least one
    STAGES: tl.constexpr,
):
    """The rows whose number is the program's, modulo the number of programs.

    A step takes BLOCK_D columns of one row for its statistics, and writes the same columns of the row before it: one
    loop without a pause between rows, whose loads the compiler starts steps ahead.
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    BITS: tl.constexpr = tl.int64 if ACC == tl.float64 else tl.int32
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK_D)[None, :]
    kept = tl.zeros([triton.next_power_of_2(KEPT), BLOCK_D], BITS)
    lane_mean = tl.zeros([1, BLOCK_D], ACC)
    sum_dd = tl.zeros([1, BLOCK_D], ACC)
    mean = tl.zeros((), ACC)
    rstd, rest = mean, mean
    origin, next_first, later_first = mean, mean, mean
    if CENTERED:
        start = program.to(tl.int64)
        next_first = _stored(x_ptr, residual_ptr, start, x_inner, x_outer_stride, x_inner_stride, residual_inner,
                             residual_outer_stride, residual_inner_stride, X_TWO_AXES, RESIDUAL_TWO_AXES, 0,
                             start < rows, ACC).to(ACC)  # fmt: skip
        start += programs
        later_first = _stored(x_ptr, residual_ptr, start, x_inner, x_outer_stride, x_inner_stride, residual_inner,
                              residual_outer_stride, residual_inner_stride, X_TWO_AXES, RESIDUAL_TWO_AXES, 0,
                              start < rows, ACC).to(ACC)  # fmt: skip
    overflown = 0
    for step in tl.range(0, (tl.cdiv(rows - program, programs) + 1) * BLOCKS, num_stages=STAGES):
        block, next_row, row, cols, inside = _step(step, lanes, D, BLOCK_D)
        ahead = inside & (next_row < rows)
        here = inside & (row >= 0)
        stored = _stored(x_ptr, residual_ptr, next_row, x_inner, x_outer_stride, x_inner_stride, residual_inner,
                         residual_outer_stride, residual_inner_stride, X_TWO_AXES, RESIDUAL_TWO_AXES, cols, ahead,
                         ACC)  # fmt: skip
        if residual_ptr is not None:
            tl.store(total_ptr + next_row * D + cols, stored, mask=ahead)
        next_x = stored.to(ACC)
        bits = tl.zeros([1, BLOCK_D], BITS)
        if KEPT < BLOCKS:
            # The total was written before the row's last reduction, where all threads meet, and is read after it: the
            # loads that the compiler starts before belong to blocks that are kept.
            tl.static_assert(KEPT >= STAGES - 1)
            again = here & (block >= KEPT)
            if residual_ptr is None:
                from_start = x_ptr + _start(row, x_inner, x_outer_stride, x_inner_stride, X_TWO_AXES)
            else:
                from_start = total_ptr + row * D
            bits = tl.load(from_start + cols, mask=again, other=0.0).to(ACC).to(BITS, bitcast=True)
        bits, kept = _exchanged(kept, bits, next_x.to(BITS, bitcast=True), block, KEPT)
        origin, lane_mean, sum_dd = _measured(
            next_x, next_first, origin, lane_mean, sum_dd, block, inside, CENTERED, ACC, D, BLOCK_D
        )
        out = bits.to(ACC, bitcast=True)
        if CENTERED:
            out = (out - mean) - rest  # one by one: their sum would be rounded
        out = _scaled_and_shifted(out * rstd, cols, inside, weight_ptr, bias_ptr, OFFSET, ACC)
        tl.store(out_ptr + row * D + cols, out.to(out_ptr.dtype.element_ty), mask=here)
        if block == BLOCKS - 1:
            shift, square = _merged(lane_mean, sum_dd, CENTERED, D, BLOCK_D)
            mean, rest = _with_rest(origin, shift)
            rstd = _reciprocal_root(square + EPS)
            tl.store(rstd_ptr + next_row, rstd, mask=next_row < rows)
            if CENTERED:
                tl.store(mean_ptr + next_row, mean, mask=next_row < rows)
                next_first = later_first
                later = next_row + 2 * programs
                later_first = _stored(x_ptr, residual_ptr, later, x_inner, x_outer_stride, x_inner_stride,
                                      residual_inner, residual_outer_stride, residual_inner_stride, X_TWO_AXES,
                                      RESIDUAL_TWO_AXES, 0, later < rows, ACC).to(ACC)  # fmt: skip
            if SCALE != 0.0:
                overflown = tl.where(square < float("inf"), overflown, 1)
            lane_mean = tl.zeros([1, BLOCK_D], ACC)
            sum_dd = tl.zeros([1, BLOCK_D], ACC)
    if SCALE != 0.0:
        if overflown == 1:
            if residual_ptr is None:
                _rows_that_overflow(x_ptr, rows, x_inner, x_outer_stride, x_inner_stride, X_TWO_AXES, weight_ptr,
                                    bias_ptr, out_ptr, mean_ptr, rstd_ptr, EPS, OFFSET, CENTERED, SCALE, ACC, D,
                                    BLOCK_D)  # fmt: skip
            else:
                _rows_that_overflow(total_ptr, rows, 1, 0, D, False, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr,
                                    EPS, OFFSET, CENTERED, SCALE, ACC, D, BLOCK_D)  # fmt: skip
