"""Triton kernels that merge what the programs of a reduction found, in a fixed order and in float64.

Here: `merged_moments`, `merged_sums`, within a kernel; `merge_kernel`, `sums_kernel`, the kernels of nothing else.
May import: triton.
Read next: channel_kernels.py, which writes the parts.

A part is what one split, a program's share of the positions, found for one plane: a unit (a channel, or one of a
sample) is gone through as a single plane, or as several that lie side by side.
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
def _parts(partial_ptr, splits, units, planes, unit, start, BLOCK_P: tl.constexpr):
    """Addresses of the units' parts from `start` on (units, BLOCK_P), and which there are."""
    part = start + tl.arange(0, BLOCK_P)
    column = unit.to(tl.int64)[:, None] * planes + (part % planes)[None, :]
    at = partial_ptr + (part // planes).to(tl.int64)[None, :] * units * planes + column
    return at, (unit < units)[:, None] & (part < splits * planes)[None, :]


@triton.jit
def merged_moments(partial_ptr, splits, units, planes, unit, BLOCK_P: tl.constexpr):
    """count, mean and m2 of `unit` over all parts, by Chan's formula."""
    n = tl.sum(tl.zeros([unit.shape[0], BLOCK_P], tl.float64), 1)
    mean, m2 = n, n
    step = splits.to(tl.int64) * units * planes
    for start in tl.range(0, splits * planes, BLOCK_P):
        at, valid = _parts(partial_ptr, splits, units, planes, unit, start, BLOCK_P)
        other_n, other_mean, other_m2 = tl.reduce(
            (
                tl.load(at, mask=valid, other=0.0),
                tl.load(at + step, mask=valid, other=0.0),
                tl.load(at + 2 * step, mask=valid, other=0.0),
            ),
            1,
            _pooled,
        )
        n, mean, m2 = _pooled(n, mean, m2, other_n, other_mean, other_m2)
    return n, mean, m2


@triton.jit
def merged_sums(partial_ptr, splits, units, planes, unit, BLOCK_P: tl.constexpr):
    """Both sums of `unit` over all parts."""
    sum_d = tl.zeros([unit.shape[0], BLOCK_P], tl.float64)
    sum_dx = tl.zeros([unit.shape[0], BLOCK_P], tl.float64)
    step = splits.to(tl.int64) * units * planes
    for start in tl.range(0, splits * planes, BLOCK_P):
        at, valid = _parts(partial_ptr, splits, units, planes, unit, start, BLOCK_P)
        sum_d += tl.load(at, mask=valid, other=0.0)
        sum_dx += tl.load(at + step, mask=valid, other=0.0)
    return tl.sum(sum_d, 1), tl.sum(sum_dx, 1)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial_ptr,  # (3, splits, units, planes)
    count_ptr,  # (units,), as the others; None: it is known
    mean_ptr,
    m2_ptr,
    splits,
    units,
    planes,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    n, mean, m2 = merged_moments(partial_ptr, splits, units, planes, unit, BLOCK_P)
    if count_ptr is not None:
        tl.store(count_ptr + unit, n, mask=unit < units)
    tl.store(mean_ptr + unit, mean, mask=unit < units)
    tl.store(m2_ptr + unit, m2, mask=unit < units)


@triton.jit(do_not_specialize=["splits"])
def sums_kernel(
    partial_ptr,  # (2, splits, units, planes)
    sum_d_ptr,
    sum_dx_ptr,
    splits,
    units,
    planes,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    sum_d, sum_dx = merged_sums(partial_ptr, splits, units, planes, unit, BLOCK_P)
    tl.store(sum_d_ptr + unit, sum_d, mask=unit < units)
    tl.store(sum_dx_ptr + unit, sum_dx, mask=unit < units)
