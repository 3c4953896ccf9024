"""Triton kernels of the channels family: moments and the affine step, forward and backward, for both memory formats.

Here: `moments_kernel`, `affine_kernel`, `backward_moments_kernel`, `backward_affine_kernel`. A program takes a block of
channels and, of the positions (B samples times S), blocks of BLOCK_S; each block lies within a sample.
May import: triton.
Read next: triton_channels.py, from tensors to launches.

Strides and sizes come in units of UNIT elements, a power of two that divides all of them, so that the compiler sees
how addresses are aligned: it knows of a run-time integer only whether 16 divides it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pooled(n, mean, m2, other_n, other_mean, other_m2):
    """Two parts' counts, means and sums of squared deviations as one, by Chan's formula."""
    count = n + other_n
    weight = other_n / tl.where(count > 0.0, count, 1.0)
    delta = other_mean - mean
    return count, mean + delta * weight, m2 + other_m2 + delta * delta * n * weight


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
    mean, m2, count, steps, first, last, stride, blocks, S, begin, x_ptr, mask_ptr, c, present, sb, sc, ss, center, scale,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Welford's update of every lane by the blocks first, first + stride, ... of x - center."""
    for number in tl.range(first, last, stride, num_stages=STAGES):
        sample, s, inside = _block(number, blocks, S, begin, BLOCK_S, WHOLE)
        if MASKED:
            inside = inside & (
                tl.load(mask_ptr + (tl.full((), 0, tl.int64) + sample) * S + s, mask=inside, other=0) != 0
            )
        valid = present[:, None] & inside[None, :]
        x = tl.load(_tile(x_ptr, sample, c, s, sb, sc, ss), mask=valid, other=0.0).to(ACC)
        steps += 1.0
        if MASKED:
            count += tl.where(inside, 1.0, 0.0)
            share = (1.0 / tl.where(count > 0.0, count, 1.0))[None, :]
        else:
            count = tl.where(inside, steps, count)
            share = 1.0 / steps
        x = (x - center[:, None]) * scale
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta * share
        m2 += delta * tl.where(valid, x - mean, 0.0)
    return mean, m2, count, steps


@triton.jit
def _all_deviating(
    sample_begin, samples, split, splits, x_ptr, mask_ptr, c, present, S, sb, sc, ss, center, scale, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """count, mean and m2 (BLOCK_C,) of (x - center) * scale over the split's share of the blocks."""
    mean = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    m2 = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    count = tl.zeros([BLOCK_S], ACC)
    steps = tl.sum(count, 0)
    whole = S // BLOCK_S
    first = sample_begin * whole + split
    mean, m2, count, steps = _deviating(
        mean, m2, count, steps, first, (sample_begin + samples) * whole, splits, whole, S, 0, x_ptr, mask_ptr, c, present,
        sb, sc, ss, center, scale, ACC, BLOCK_S, True, MASKED, STAGES,
    )  # fmt: skip
    if whole * BLOCK_S < S:
        # from the other end: the first splits had one whole block more
        first = sample_begin + (splits - 1 - split)
        mean, m2, count, steps = _deviating(
            mean, m2, count, steps, first, sample_begin + samples, splits, 1, S, whole * BLOCK_S, x_ptr, mask_ptr, c,
            present, sb, sc, ss, center, scale, ACC, BLOCK_S, False, MASKED, STAGES,
        )  # fmt: skip
    counts = tl.zeros([BLOCK_C, BLOCK_S], ACC) + count[None, :]
    return tl.reduce((counts, mean, m2), 1, _pooled)


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
    S = S_units * UNIT_S
    sb, sc, ss = sb_units * UNIT_B, sc_units * UNIT_C, ss_units * UNIT_SS
    MASKED: tl.constexpr = mask_ptr is not None
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    present = c < C
    split = tl.program_id(1)
    sample_begin = tl.program_id(2)
    samples = 1
    if not PER_SAMPLE:
        sample_begin = 0
        samples = B
    # about the mean of some of the values: what is left is of the size of the deviations, at any mean
    sample = sample_begin
    if not PER_SAMPLE:
        sample = split % B
    s = tl.arange(0, BLOCK_S)
    inside = s < S
    sampled = tl.load(_tile(x_ptr, sample, c, s, sb, sc, ss), mask=present[:, None] & inside[None, :], other=0.0)
    inside = _kept(mask_ptr, sample, S, s, inside)
    sampled = tl.where(inside[None, :], sampled.to(ACC), 0.0)
    center = tl.sum(sampled, 1) / tl.maximum(tl.sum(inside.to(ACC), 0), 1.0)
    center = tl.where(tl.abs(center) < float("inf"), center, 0.0)
    one = (tl.program_id(0) * 0).to(ACC) + 1.0
    found = _all_deviating(
        sample_begin, samples, split, splits, x_ptr, mask_ptr, c, present, S, sb, sc, ss, center, one, ACC, BLOCK_C,
        BLOCK_S, MASKED, STAGES,
    )  # fmt: skip
    count, mean, m2 = found
    mean, m2 = mean.to(tl.float64), m2.to(tl.float64)
    if SCALE != 0.0:
        if tl.min((m2 < float("inf")).to(tl.int32)) == 0:  # squares overflowed, or there is NaN or infinity
            scale = one * SCALE
            center = center * 0.0
            count, mean, m2 = _all_deviating(
                sample_begin, samples, split, splits, x_ptr, mask_ptr, c, present, S, sb, sc, ss, center, scale, ACC,
                BLOCK_C, BLOCK_S, MASKED, STAGES,
            )  # fmt: skip
            mean, m2 = mean.to(tl.float64) * (1.0 / SCALE), m2.to(tl.float64) * (1.0 / SCALE) * (1.0 / SCALE)
    mean = mean + center.to(tl.float64)
    mean = tl.where(count > 0.0, mean, 0.0)
    to = partial_ptr + (tl.full((), 0, tl.int64) + split) * units + sample_begin * C + c
    tl.store(to, count.to(tl.float64), mask=present)
    tl.store(to + splits.to(tl.int64) * units, mean, mask=present)
    tl.store(to + 2 * splits.to(tl.int64) * units, m2, mask=present)


@triton.jit
def merged_moments(partial_ptr, splits, units, unit, BLOCK_P: tl.constexpr):
    """count, mean and m2 of `unit` over all splits, in their order, by Chan's formula in float64."""
    n = tl.sum(tl.zeros([BLOCK_P, unit.shape[0]], tl.float64), 0)
    mean, m2 = n, n
    lanes = tl.arange(0, BLOCK_P)
    step = splits.to(tl.int64) * units
    for start in tl.range(0, splits, BLOCK_P):
        split = (start + lanes)[:, None]
        valid = (split < splits) & (unit < units)[None, :]
        at = partial_ptr + split.to(tl.int64) * units + unit[None, :]
        other = tl.reduce(
            (
                tl.load(at, mask=valid, other=0.0),
                tl.load(at + step, mask=valid, other=0.0),
                tl.load(at + 2 * step, mask=valid, other=0.0),
            ),
            0,
            _pooled,
        )
        n, mean, m2 = _pooled(n, mean, m2, other[0], other[1], other[2])
    return n, mean, m2


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(partial_ptr, mean_ptr, m2_ptr, splits, units, BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr):
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    _, mean, m2 = merged_moments(partial_ptr, splits, units, unit, BLOCK_P)
    tl.store(mean_ptr + unit, mean, mask=unit < units)
    tl.store(m2_ptr + unit, m2, mask=unit < units)


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
    center_ptr,  # (C,) or (B, C), as are the others
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
    at = (tl.full((), 0, tl.int64) + sample) * vector_stride + c
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
        if mask_ptr is not None:
            inside = inside & (
                tl.load(mask_ptr + (tl.full((), 0, tl.int64) + sample) * S + s, mask=inside, other=0) != 0
            )
        valid = present[:, None] & inside[None, :]
        d = tl.load(_tile(dout_ptr, sample, c, s, db, dc, ds), mask=valid, other=0.0).to(ACC)
        x = tl.load(_tile(x_ptr, sample, c, s, xb, xc, xs), mask=valid, other=0.0).to(ACC)
        sum_d += d
        sum_dx += d * tl.where(valid, x - center[:, None], 0.0)
    return sum_d, sum_dx


@triton.jit(do_not_specialize=["B", "splits"])
def backward_moments_kernel(
    dout_ptr,
    x_ptr,
    mask_ptr,
    center_ptr,  # (C,) or (B, C)
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
    center = tl.load(center_ptr + sample_begin * C + c, mask=present, other=0.0).to(ACC)
    sum_d = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    sum_dx = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    whole = S // BLOCK_S
    sum_d, sum_dx = _summing(
        sum_d, sum_dx, sample_begin * whole + split, (sample_begin + samples) * whole, splits, whole, S, 0, dout_ptr, x_ptr,
        mask_ptr, c, present, db, dc, ds, xb, xc, xs, center, ACC, BLOCK_S, True, STAGES,
    )  # fmt: skip
    if whole * BLOCK_S < S:
        sum_d, sum_dx = _summing(
            sum_d, sum_dx, sample_begin + (splits - 1 - split), sample_begin + samples, splits, 1, S, whole * BLOCK_S,
            dout_ptr, x_ptr, mask_ptr, c, present, db, dc, ds, xb, xc, xs, center, ACC, BLOCK_S, False, STAGES,
        )  # fmt: skip
    to = partial_ptr + (tl.full((), 0, tl.int64) + split) * units + sample_begin * C + c
    tl.store(to, tl.sum(sum_d, 1).to(tl.float64), mask=present)
    tl.store(to + splits.to(tl.int64) * units, tl.sum(sum_dx, 1).to(tl.float64), mask=present)


@triton.jit
def merged_sums(partial_ptr, splits, units, unit, BLOCK_P: tl.constexpr):
    """Both sums of `unit` over all splits."""
    sum_d = tl.zeros([BLOCK_P, unit.shape[0]], tl.float64)
    sum_dx = tl.zeros([BLOCK_P, unit.shape[0]], tl.float64)
    lanes = tl.arange(0, BLOCK_P)
    for start in tl.range(0, splits, BLOCK_P):
        split = (start + lanes)[:, None]
        valid = (split < splits) & (unit < units)[None, :]
        at = partial_ptr + split.to(tl.int64) * units + unit[None, :]
        sum_d += tl.load(at, mask=valid, other=0.0)
        sum_dx += tl.load(at + splits.to(tl.int64) * units, mask=valid, other=0.0)
    return tl.sum(sum_d, 0), tl.sum(sum_dx, 0)


@triton.jit(do_not_specialize=["splits"])
def sums_kernel(partial_ptr, sum_d_ptr, sum_dx_ptr, splits, units, BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr):
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    sum_d, sum_dx = merged_sums(partial_ptr, splits, units, unit, BLOCK_P)
    tl.store(sum_d_ptr + unit, sum_d, mask=unit < units)
    tl.store(sum_dx_ptr + unit, sum_dx, mask=unit < units)
