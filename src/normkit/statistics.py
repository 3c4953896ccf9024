"""BatchNorm's policies on vectors of C numbers: variance from (count, m2), running averages.

Here: what happens between `channels_moments` and `channels_affine`, the same for every backend.
May import: torch.
Read next: functional/channels.py, where batch_norm puts the steps together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.reference import Count


def variance(count: Count, m2: Tensor) -> Tensor:
    """The biased variance m2 / count that normalizes the batch; 0 where nothing was counted."""
    return m2 / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def unbiased_variance(count: Count, m2: Tensor) -> Tensor:
    """m2 / (count - 1), which torch stores in running_var: larger by n / (n - 1), twice as large at n = 2."""
    return m2 / ((count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1))


def update_running(
    running_mean: Tensor,  # (C,), changed in place
    running_var: Tensor,  # (C,), changed in place
    momentum: float,
    count: int,
    mean: Tensor,  # (C,)
    m2: Tensor,  # (C,)
) -> None:
    """running = (1 - momentum) * running + momentum * batch, outside backpropagation; an empty batch changes nothing.

    `momentum` is torch's: the weight of the new batch. The sum is formed in the wider of both dtypes and rounded
    once, so that half-precision buffers lose no more than their own rounding.
    """
    if count == 0:
        return
    with torch.no_grad():
        for running, batch in ((running_mean, mean), (running_var, unbiased_variance(count, m2))):
            wide = torch.promote_types(running.dtype, batch.dtype)
            running.copy_(torch.lerp(running.to(wide), batch.detach().to(wide), momentum))
