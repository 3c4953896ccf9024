"""Triton kernels for what BatchNorm does with vectors of C numbers between its passes over x: one launch for all of it.

Here: `finish_forward_kernel`, `commit_kernel`, `stored_kernel` (with running statistics), `finish_backward_kernel`.
Formulas are those of statistics.py and autograd.py, in float64.
May import: triton, merge_kernels.
Read next: triton_batch_norm.py, who launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.merge_kernels import merged_moments, merged_sums


@triton.jit
def _affine_vectors(at, inside, mean, rstd, weight_ptr, bias_ptr, center_ptr, scale_ptr, shift_ptr):
    """`autograd.channel_vectors`: what the rounding of the mean leaves out goes into the shift."""
    center = mean.to(center_ptr.dtype.element_ty)
    scale = rstd
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float64)
    shift = (center.to(tl.float64) - mean) * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float64)
    tl.store(center_ptr + at, center, mask=inside)
    tl.store(scale_ptr + at, scale.to(scale_ptr.dtype.element_ty), mask=inside)
    tl.store(shift_ptr + at, shift.to(shift_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _moved(running_ptr, at, inside, batch, momentum, keep):
    """running + momentum * (batch - running), in float64, rounded once."""
    running = tl.load(running_ptr + at, mask=inside, other=0.0).to(tl.float64)
    new = running + momentum * (batch - running)
    tl.store(running_ptr + at, new.to(running_ptr.dtype.element_ty), mask=inside & keep)


@triton.jit(do_not_specialize=["splits"])
def finish_forward_kernel(
    partial_ptr,  # (3, splits, C)
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,  # float64, as rstd
    rstd_ptr,
    center_ptr,  # accumulation dtype, as scale and shift
    scale_ptr,
    shift_ptr,
    count_ptr,  # int64, or None where the count is known
    tracked_ptr,  # int64: how many batches moved the running statistics, or None
    refused_ptr,  # int64: how many did not for NaN or infinity, or None
    splits,
    C,
    momentum_high,  # momentum is the sum of both: a float argument is 32 bits wide
    momentum_low,
    EPS: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: whether any channel is not finite decides over all."""
    number = tl.full((), 0.0, tl.float64)
    momentum = number + momentum_high + momentum_low
    fine = tl.full((), 1, tl.int32)
    for begin in tl.range(0, C, BLOCK_C):
        at = begin + tl.arange(0, BLOCK_C)
        inside = at < C
        n, mean, m2 = merged_moments(partial_ptr, splits, C, 1, at, BLOCK_P)
        rstd = 1.0 / tl.sqrt(m2 / tl.where(n > 0.0, n, 1.0) + EPS)
        rstd = tl.where(n > 0.0, rstd, 0.0)
        number = tl.max(n, 0)
        tl.store(mean_ptr + at, mean, mask=inside)
        tl.store(rstd_ptr + at, rstd, mask=inside)
        _affine_vectors(at, inside, mean, rstd, weight_ptr, bias_ptr, center_ptr, scale_ptr, shift_ptr)
        if running_mean_ptr is not None:
            variance = m2 / tl.where(n > 1.0, n - 1.0, 1.0)
            if GUARDED:
                stored = tl.abs(mean.to(running_mean_ptr.dtype.element_ty).to(tl.float64))
                stored += tl.abs(variance.to(running_var_ptr.dtype.element_ty).to(tl.float64))
                fine = tl.minimum(fine, tl.min(tl.where(inside, (stored < float("inf")).to(tl.int32), 1), 0))
            else:
                _moved(running_mean_ptr, at, inside, mean, momentum, n > 1.0)
                _moved(running_var_ptr, at, inside, variance, momentum, n > 1.0)
    if count_ptr is not None:
        tl.store(count_ptr, number.to(tl.int64))
    if running_mean_ptr is not None:
        if GUARDED:
            for begin in tl.range(0, C, BLOCK_C):
                at = begin + tl.arange(0, BLOCK_C)
                inside = at < C
                n, mean, m2 = merged_moments(partial_ptr, splits, C, 1, at, BLOCK_P)
                variance = m2 / tl.where(n > 1.0, n - 1.0, 1.0)
                _moved(running_mean_ptr, at, inside, mean, momentum, (n > 1.0) & (fine == 1))
                _moved(running_var_ptr, at, inside, variance, momentum, (n > 1.0) & (fine == 1))
        if tracked_ptr is not None:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + tl.where(number > 1.0, fine, 0).to(tl.int64))
        if refused_ptr is not None:
            tl.store(refused_ptr, tl.load(refused_ptr) + 1 - fine.to(tl.int64))


@triton.jit
def commit_kernel(
    moved_mean_ptr,  # what the batch would make of the running statistics
    moved_var_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,  # int64, or None
    refused_ptr,  # int64, or None
    C,
    BLOCK_C: tl.constexpr,
):
    """One program: running statistics become the moved ones if these are finite in every channel."""
    fine = tl.full((), 1, tl.int32)
    for begin in tl.range(0, C, BLOCK_C):
        at = begin + tl.arange(0, BLOCK_C)
        size = tl.abs(tl.load(moved_mean_ptr + at, mask=at < C, other=0.0))
        size += tl.abs(tl.load(moved_var_ptr + at, mask=at < C, other=0.0))
        fine = tl.minimum(fine, tl.min((size < float("inf")).to(tl.int32), 0))
    if fine == 1:
        for begin in tl.range(0, C, BLOCK_C):
            at = begin + tl.arange(0, BLOCK_C)
            tl.store(running_mean_ptr + at, tl.load(moved_mean_ptr + at, mask=at < C), mask=at < C)
            tl.store(running_var_ptr + at, tl.load(moved_var_ptr + at, mask=at < C), mask=at < C)
    if tracked_ptr is not None:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + fine.to(tl.int64))
    if refused_ptr is not None:
        tl.store(refused_ptr, tl.load(refused_ptr) + 1 - fine.to(tl.int64))


@triton.jit
def stored_kernel(
    running_mean_ptr,
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    C,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The vectors of an affine step with running statistics, and copies of these for backward."""
    at = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = at < C
    mean = tl.load(running_mean_ptr + at, mask=inside, other=0.0).to(mean_ptr.dtype.element_ty)
    rstd = 1.0 / tl.sqrt(tl.load(running_var_ptr + at, mask=inside, other=0.0).to(tl.float64) + EPS)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(rstd_ptr + at, rstd.to(rstd_ptr.dtype.element_ty), mask=inside)
    mean = mean.to(tl.float64)
    _affine_vectors(at, inside, mean, rstd, weight_ptr, bias_ptr, center_ptr, scale_ptr, shift_ptr)


@triton.jit(do_not_specialize=["splits", "count"])
def finish_backward_kernel(
    partial_ptr,  # (2, splits, C, planes)
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    count_ptr,  # int64, or None where `count` holds
    a_ptr,  # accumulation dtype, as b and c; None: dx is not needed
    b_ptr,  # None: the statistics are fixed
    c_ptr,
    dweight_ptr,
    dbias_ptr,
    splits,
    C,
    planes,
    count,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`autograd.channel_gradients` between its two passes."""
    at = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = at < C
    sum_d, sum_dx = merged_sums(partial_ptr, splits, C, planes, at, BLOCK_P)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0).to(tl.float64)
    rstd = tl.load(rstd_ptr + at, mask=inside, other=0.0).to(tl.float64)
    drift = mean - mean.to(ACC).to(tl.float64)
    sum_dxhat = (sum_dx - drift * sum_d) * rstd
    if a_ptr is not None:
        a = rstd
        if weight_ptr is not None:
            a = a * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float64)
        tl.store(a_ptr + at, a.to(ACC), mask=inside)
        if b_ptr is not None:
            if count_ptr is not None:
                n = tl.load(count_ptr).to(tl.float64)
            else:
                n = tl.full((), 0.0, tl.float64) + count
            n = tl.where(n > 1.0, n, 1.0)
            b = -a * rstd * sum_dxhat / n
            c = -a * sum_d / n - b * drift
            tl.store(b_ptr + at, b.to(ACC), mask=inside)
            tl.store(c_ptr + at, c.to(ACC), mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, sum_dxhat.to(dweight_ptr.dtype.element_ty), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, sum_d.to(dbias_ptr.dtype.element_ty), mask=inside)
