"""Triton kernels of the channels family: moments and the affine step, forward and backward, for both memory formats.

Here: `moments_kernel`, `affine_kernel`, `backward_moments_kernel`. A program takes a block of channels and, of the
positions (B samples times S), blocks of BLOCK_S; each block lies within a sample.
May import: triton.
Read next: merge_kernels.py, which merges what programs found; triton_channels.py, from tensors to launches.

Strides and sizes come in units of UNIT elements, a power of two that divides all of them, so that the compiler sees
how addresses are aligned: it knows of a run-time integer only whether 16 divides it.

Where small maps are gone through as planes (`launch.planes`), what is called a channel here is one plane of a channel:
one of its positions in all samples. `planes` of them share what the vectors of channels hold.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block(number, blocks, S, begin, BLOCK_S: tl.constexpr, WHOLE: tl.constexpr):
    """Sample, positions and which of them are in it, for block `number` of `blocks` a sample from position `begin`."""
    if WHOLE:
        sample = number // blocks
        s = (number % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = s >= 0
    else:
        sample = number
        s = begin + tl.arange(0, BLOCK_S)
        inside = s < S
    return sample, s, inside


@triton.jit
def _tile(base_ptr, sample, c, s, sb, sc, ss):
    """Addresses of a tile (channels, positions) of a sample."""
    return base_ptr + (tl.full((), 0, tl.int64) + sample) * sb + c[:, None] * sc + s[None, :].to(tl.int64) * ss


@triton.jit
def _kept(mask_ptr, sample, S, s, inside):
    """Positions that are inside and valid. Tiles are fetched whole, and what is not valid is put out after: a load that
    a mask cuts up is one of single elements.
    """
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + (tl.full((), 0, tl.int64) + sample) * S + s, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _deviating(
    sum_d, sum_dd, count, first, last, stride, blocks, S, begin, x_ptr, mask_ptr, c, present, sb, sc, ss, center, scale,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds d = x * scale - center, and its square, of the blocks first, first + stride, ... to every lane's sums."""
    for number in tl.range(first, last, stride, num_stages=STAGES):
        sample, s, inside = _block(number, blocks, S, begin, BLOCK_S, WHOLE)
        x = tl.load(_tile(x_ptr, sample, c, s, sb, sc, ss), mask=present[:, None] & inside[None, :], other=0.0)
        d = x.to(ACC) * scale[:, None] - center[:, None]
        if mask_ptr is not None:
            inside = _kept(mask_ptr, sample, S, s, inside)
        if mask_ptr is not None or not WHOLE:
            d = tl.where(inside[None, :], d, 0.0)
            count += inside.to(ACC)
        else:
            count += 1.0
        sum_d += d
        sum_dd += d * d
    return sum_d, sum_dd, count


@triton.jit
def _all_deviating(
    sample_begin, samples, split, splits, x_ptr, mask_ptr, c, present, S, sb, sc, ss, center, scale, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Count, mean of d and mean of d^2 (BLOCK_C,), d = x * scale - center, over the split's share of the blocks."""
    sum_d = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    sum_dd = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    count = tl.zeros([BLOCK_S], ACC)
    whole = S // BLOCK_S
    first = sample_begin * whole + split
    sum_d, sum_dd, count = _deviating(
        sum_d, sum_dd, count, first, (sample_begin + samples) * whole, splits, whole, S, 0, x_ptr, mask_ptr, c, present,
        sb, sc, ss, center, scale, ACC, BLOCK_S, True, STAGES,
    )  # fmt: skip
    if whole * BLOCK_S < S:
        # from the other end: the first splits had one whole block more
        first = sample_begin + (splits - 1 - split)
        sum_d, sum_dd, count = _deviating(
            sum_d, sum_dd, count, first, sample_begin + samples, splits, 1, S, whole * BLOCK_S, x_ptr, mask_ptr, c,
            present, sb, sc, ss, center, scale, ACC, BLOCK_S, False, STAGES,
        )  # fmt: skip
    # a lane counts up to some thousands, all of them more than float32 holds exactly
    n = tl.sum(count.to(tl.float64), 0)
    divisor = tl.maximum(n, 1.0)
    return n, tl.sum(sum_d, 1).to(tl.float64) / divisor, tl.sum(sum_dd, 1).to(tl.float64) / divisor


@triton.jit
def _sampled_center(
    sample, x_ptr, mask_ptr, c, present, S, sb, sc, ss, ACC: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """The mean (BLOCK_C,) of a sample's first positions; 0 where it is not finite."""
    s = tl.arange(0, BLOCK_S)
    inside = s < S
    x = tl.load(_tile(x_ptr, sample, c, s, sb, sc, ss), mask=present[:, None] & inside[None, :], other=0.0)
    inside = _kept(mask_ptr, sample, S, s, inside)
    center = tl.sum(tl.where(inside[None, :], x.to(ACC), 0.0), 1) / tl.maximum(tl.sum(inside.to(ACC), 0), 1.0)
    return tl.where(tl.abs(center) < float("inf"), center, 0.0)


@triton.jit(do_not_specialize=["B", "splits"])
def moments_kernel(
    x_ptr,
    mask_ptr,  # (B, S)
    partial_ptr,  # (3, splits, units): count, mean, m2; float64
    B,
    C,
    S_units,
    sb_units,
    sc_units,
    ss_units,
    splits,
    units,
    PER_SAMPLE: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    UNIT_S: tl.constexpr,
    UNIT_B: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_SS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of d and d^2 about the mean of a sample of the values: var = mean(d^2) - mean(d)^2.

    Where that difference would lose digits, the sample's mean lying more than a standard deviation off, the pass is
    made again about the mean itself; where squares overflow, with values times SCALE, about 0 and then about the mean.
    """
    S = S_units * UNIT_S
    sb, sc, ss = sb_units * UNIT_B, sc_units * UNIT_C, ss_units * UNIT_SS
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    present = c < C
    split = tl.program_id(1)
    sample_begin = tl.program_id(2)
    samples = 1
    sample = sample_begin
    if not PER_SAMPLE:
        sample_begin = 0
        samples = B
        sample = split % B
    center = _sampled_center(sample, x_ptr, mask_ptr, c, present, S, sb, sc, ss, ACC, BLOCK_S)
    zero = tl.zeros([BLOCK_C], tl.float64)
    count = tl.sum(zero, 0)
    mean, square = zero, zero
    scale = zero.to(ACC) + 1.0
    centered = 0
    again = 1
    while again == 1:
        count, mean, square = _all_deviating(
            sample_begin, samples, split, splits, x_ptr, mask_ptr, c, present, S, sb, sc, ss, center, scale, ACC,
            BLOCK_C, BLOCK_S, STAGES,
        )  # fmt: skip
        again = 0
        far = tl.max((present & (mean * mean > square - mean * mean)).to(tl.int32), 0)
        if SCALE != 0.0:
            overflowed = present & (square == float("inf")) & (scale == 1.0)
            if tl.max(overflowed.to(tl.int32), 0) == 1:
                scale = tl.where(overflowed, SCALE, scale)
                center = tl.where(overflowed, 0.0, center)
                centered = 0
                far = 0
                again = 1
        if far == 1 and centered == 0:
            center = (center.to(tl.float64) + mean).to(ACC)
            centered = 1
            again = 1
    inverse = 1.0 / scale.to(tl.float64)
    m2 = (square - mean * mean) * count
    m2 = tl.where(m2 < 0.0, 0.0, m2) * inverse * inverse  # rounding; NaN stays
    mean = (mean + center.to(tl.float64)) * inverse
    mean = tl.where(count > 0.0, mean, 0.0)
    to = partial_ptr + (tl.full((), 0, tl.int64) + split) * units + sample_begin * C + c
    tl.store(to, zero + count, mask=present)
    tl.store(to + splits.to(tl.int64) * units, mean, mask=present)
    tl.store(to + 2 * splits.to(tl.int64) * units, m2, mask=present)


@triton.jit
def _place(index, blocks_c, blocks_s, CHANNELS_LAST: tl.constexpr):
    """Sample, block of channels and block of positions of a program, in the order of memory."""
    sample = index // (blocks_c * blocks_s)
    rest = index % (blocks_c * blocks_s)
    if CHANNELS_LAST:
        block_c = rest % blocks_c
        block_s = rest // blocks_c
    else:
        block_c = rest // blocks_s
        block_s = rest % blocks_s
    return sample, block_c, block_s


@triton.jit(do_not_specialize=["B"])
def affine_kernel(
    x_ptr,
    x2_ptr,  # None, or x of backward, where x_ptr is dout
    mask_ptr,
    center_ptr,  # (C / planes,) or (B, C), as are the others
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    B,
    C,
    S_units,
    xb_units,
    xc_units,
    xs_units,
    x2b_units,
    x2c_units,
    x2s_units,
    ob_units,
    oc_units,
    os_units,
    vector_stride,  # from sample to sample: 0 or C
    planes,
    BACKWARD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    UNIT_S: tl.constexpr,
    UNIT_B: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_SS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Forward: (x - center) * a + b. Backward: a * dout + b * (x - center) + c, or a * dout without b.

    Programs go through memory from its end: the pass before went from its start, and what it read last is in the cache.
    """
    S = S_units * UNIT_S
    blocks_c, blocks_s = tl.cdiv(C, BLOCK_C), tl.cdiv(S, BLOCK_S)
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, block_c, block_s = _place(index, blocks_c, blocks_s, CHANNELS_LAST)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    s = block_s * BLOCK_S + tl.arange(0, BLOCK_S)
    present = c < C
    inside = s < S
    valid = present[:, None] & inside[None, :]
    at = (tl.full((), 0, tl.int64) + sample) * vector_stride + c // planes
    a = tl.load(a_ptr + at, mask=present, other=0.0)[:, None]
    x = tl.load(
        _tile(x_ptr, sample, c, s, xb_units * UNIT_B, xc_units * UNIT_C, xs_units * UNIT_SS), mask=valid, other=0.0
    )
    x = x.to(ACC)
    if BACKWARD:
        out = a * x
        if b_ptr is not None:
            x2_at = _tile(x2_ptr, sample, c, s, x2b_units * UNIT_B, x2c_units * UNIT_C, x2s_units * UNIT_SS)
            center = tl.load(center_ptr + at, mask=present, other=0.0)[:, None]
            b = tl.load(b_ptr + at, mask=present, other=0.0)[:, None]
            out += b * (tl.load(x2_at, mask=valid, other=0.0).to(ACC) - center)
            out += tl.load(c_ptr + at, mask=present, other=0.0)[:, None]
    else:
        center = tl.load(center_ptr + at, mask=present, other=0.0)[:, None]
        out = (x - center) * a + tl.load(b_ptr + at, mask=present, other=0.0)[:, None]
    if mask_ptr is not None:
        out = tl.where(_kept(mask_ptr, sample, S, s, inside)[None, :], out, 0.0)
    to = _tile(out_ptr, sample, c, s, ob_units * UNIT_B, oc_units * UNIT_C, os_units * UNIT_SS)
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _summing(
    sum_d, sum_dx, first, last, stride, blocks, S, begin, dout_ptr, x_ptr, mask_ptr, c, present, db, dc, ds, xb, xc, xs,
    center, ACC: tl.constexpr, BLOCK_S: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for number in tl.range(first, last, stride, num_stages=STAGES):
        sample, s, inside = _block(number, blocks, S, begin, BLOCK_S, WHOLE)
        loaded = present[:, None] & inside[None, :]
        d = tl.load(_tile(dout_ptr, sample, c, s, db, dc, ds), mask=loaded, other=0.0).to(ACC)
        x = tl.load(_tile(x_ptr, sample, c, s, xb, xc, xs), mask=loaded, other=0.0).to(ACC) - center[:, None]
        if mask_ptr is not None:
            valid = _kept(mask_ptr, sample, S, s, inside)[None, :]
            d = tl.where(valid, d, 0.0)
            x = tl.where(valid, x, 0.0)
        sum_d += d
        sum_dx += d * x
    return sum_d, sum_dx


@triton.jit(do_not_specialize=["B", "splits"])
def backward_moments_kernel(
    dout_ptr,
    x_ptr,
    mask_ptr,
    center_ptr,  # (C / planes,) or (B, C)
    partial_ptr,  # (2, splits, units): sums of dout and of dout * (x - center); float64
    B,
    C,
    S_units,
    db_units,
    dc_units,
    ds_units,
    xb_units,
    xc_units,
    xs_units,
    splits,
    units,
    planes,
    PER_SAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    UNIT_S: tl.constexpr,
    UNIT_B: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_SS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    S = S_units * UNIT_S
    db, dc, ds = db_units * UNIT_B, dc_units * UNIT_C, ds_units * UNIT_SS
    xb, xc, xs = xb_units * UNIT_B, xc_units * UNIT_C, xs_units * UNIT_SS
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    present = c < C
    split = tl.program_id(1)
    sample_begin = tl.program_id(2)
    samples = 1
    if not PER_SAMPLE:
        sample_begin = 0
        samples = B
    center = tl.load(center_ptr + sample_begin * C + c // planes, mask=present, other=0.0).to(ACC)
    sum_d = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    sum_dx = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    whole = S // BLOCK_S
    sum_d, sum_dx = _summing(
        sum_d, sum_dx, sample_begin * whole + split, (sample_begin + samples) * whole, splits, whole, S, 0, dout_ptr,
        x_ptr, mask_ptr, c, present, db, dc, ds, xb, xc, xs, center, ACC, BLOCK_S, True, STAGES,
    )  # fmt: skip
    if whole * BLOCK_S < S:
        sum_d, sum_dx = _summing(
            sum_d, sum_dx, sample_begin + (splits - 1 - split), sample_begin + samples, splits, 1, S, whole * BLOCK_S,
            dout_ptr, x_ptr, mask_ptr, c, present, db, dc, ds, xb, xc, xs, center, ACC, BLOCK_S, False, STAGES,
        )  # fmt: skip
    to = partial_ptr + (tl.full((), 0, tl.int64) + split) * units + sample_begin * C + c
    tl.store(to, tl.sum(sum_d, 1).to(tl.float64), mask=present)
    tl.store(to + splits.to(tl.int64) * units, tl.sum(sum_dx, 1).to(tl.float64), mask=present)
