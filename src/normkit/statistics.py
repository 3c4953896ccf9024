"""BatchNorm's policies on vectors of C numbers: variance from (count, m2), merging, ranks, running averages.

Here: what happens between `channels_moments` and `channels_affine`, the same for every backend.
May import: torch, reference, ranks.
Read next: functional/channel_steps.py, where batch_norm puts the steps together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit import ranks
from normkit.reference import Count

# One all-gather of all ranks' (count, mean, m2) up to so many bytes at each rank and so many ranks; else two
# all-reduces. benchmarks/results/ranks.json, merging included: at 1 MiB the gather took 5.7 ms against 12.8 on 4 gloo
# ranks, at 2 MiB 4.4 against 5.0 on 2, at 8 MiB 19.5 against 7.8. Where sums go up a tree, the gather loses from some
# 32 ranks on: benchmarks/rank_model.py, a model.
GATHER_BYTES, GATHER_RANKS = 1 << 20, 32


@dataclass(frozen=True)
class Moments:
    """How many values, their mean, and the sum of their squared deviations from it."""

    count: Count  # an int, or a tensor where a mask or other ranks decide
    mean: Tensor
    m2: Tensor


def variance(count: Count, m2: Tensor) -> Tensor:
    """The biased variance m2 / count that normalizes the batch; 0 where nothing was counted."""
    return m2 / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def unbiased_variance(count: Count, m2: Tensor) -> Tensor:
    """m2 / (count - 1), which torch stores in running_var: larger by n / (n - 1), twice as large at n = 2."""
    return m2 / ((count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1))


def reciprocal_root(moments: Moments, eps: float) -> Tensor:
    """1 / sqrt(var + eps); 0 without a valid position, where an eps of 0 would leave infinity."""
    rstd = torch.rsqrt(variance(moments.count, moments.m2) + eps)
    return torch.where(moments.count > 0, rstd, 0.0) if isinstance(moments.count, Tensor) else rstd


def pooled(counts: Tensor, means: Tensor, m2s: Tensor) -> Moments:
    """The moments of all parts together, by Chan's formula; parts lie along the first axis, counts are (parts, 1).

        mean = sum(n_i mean_i) / n;     m2 = sum(m2_i) + sum(n_i (mean_i - mean)^2)

    Parts without a value count for nothing, whatever stands in them.
    """
    some = counts > 0
    means, m2s = torch.where(some, means, 0.0), torch.where(some, m2s, 0.0)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return Moments(count.squeeze(-1), mean, m2s.sum(0) + (counts * (means - mean) ** 2).sum(0))


def on_device(value: Count, device: torch.device) -> Tensor:
    """A count or vector in float64 there; a number is filled in, since copying it would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def merged(first: Moments, second: Moments) -> Moments:
    """Two parts as one; counts become a float64 tensor, exact up to 2^53."""

    def both(values: Sequence[Count]) -> Tensor:
        return torch.stack([on_device(value, second.mean.device) for value in values])

    counts = both([first.count, second.count]).reshape(2, 1)
    return pooled(counts, both([first.mean, second.mean]), both([first.m2, second.m2]))


def moved(moments: Moments, device: torch.device) -> Moments:
    """The same on another device; a layer may have moved since."""
    count = moments.count.to(device) if isinstance(moments.count, Tensor) else moments.count
    return Moments(count, moments.mean.to(device), moments.m2.to(device))


def over_ranks(moments: Moments, group: ranks.ProcessGroup) -> Moments:
    """The moments of all ranks' values: the same bits on every rank; to be called by all of them.

    One all-gather of (count, mean, m2) in float64 or, where that would be large, two all-reduces: of count and sum,
    then of the squared deviations from the common mean. Never E[x^2] - E[x]^2. Both are differentiable.
    """
    mean, m2 = moments.mean.double(), moments.m2.double()
    own = on_device(moments.count, mean.device).reshape(1)
    channels = mean.numel()
    number = ranks.size(group)
    if number <= GATHER_RANKS and number * (2 * channels + 1) * own.itemsize <= GATHER_BYTES:  # the same on every rank
        parts = ranks.gathered(torch.cat([own, mean, m2]), group)
        return pooled(parts[:, :1].detach(), parts[:, 1 : channels + 1], parts[:, channels + 1 :])
    sums = ranks.summed(torch.cat([own, own * mean]), group)
    count = sums[0].detach()
    common = sums[1:] / count.clamp(min=1)
    return Moments(count, common, ranks.summed(m2 + own * (mean - common) ** 2, group))


def finite(moments: Moments, mean_dtype: torch.dtype, variance_dtype: torch.dtype) -> Tensor:
    """Whether mean and unbiased variance are finite in the running averages' dtypes: a boolean on their device."""
    mean = moments.mean.detach().to(mean_dtype).double()
    variance = unbiased_variance(moments.count, moments.m2).detach().to(variance_dtype).double()
    return torch.isfinite(mean.sum() + variance.sum())


def sample_average(moments: Moments) -> tuple[Tensor, Tensor, Count]:
    """InstanceNorm's batch statistics: the means over the samples of mean and unbiased variance, and of how many.

    With a mask, over the samples with at least two valid positions: one value has no variance.
    """
    variances = unbiased_variance(moments.count, moments.m2)
    if not isinstance(moments.count, Tensor):
        return moments.mean.mean(0), variances.mean(0), moments.mean.shape[0]
    enough = moments.count > 1  # (B, 1)
    number = enough.sum()
    divisor = number.clamp(min=1)
    means, variances = torch.where(enough, moments.mean, 0.0), torch.where(enough, variances, 0.0)
    return means.sum(0) / divisor, variances.sum(0) / divisor, number


def update_running(
    running_mean: Tensor,  # (C,), changed in place
    running_var: Tensor,  # (C,), changed in place
    momentum: float | Tensor,
    mean: Tensor,  # (C,)
    variance: Tensor,  # (C,), unbiased
    keep: bool | Tensor,
) -> None:
    """running = (1 - momentum) * running + momentum * batch where `keep`, outside backpropagation.

    `momentum` is torch's: the weight of the new batch. The sum is formed in the wider of both dtypes and rounded
    once, so that half-precision buffers lose no more than their own rounding. A tensor `keep` is not waited for.
    """
    if keep is False:
        return
    for running, batch in ((running_mean.detach(), mean.detach()), (running_var.detach(), variance.detach())):
        wide = torch.promote_types(running.dtype, batch.dtype)
        weight = momentum.to(wide) if isinstance(momentum, Tensor) else momentum
        new = torch.lerp(running.to(wide), batch.to(wide), weight).to(running.dtype)
        running.copy_(torch.where(keep, new, running) if isinstance(keep, Tensor) else new)
