"""Masked norms in NumPy float64, written from the formulas: one loop over what shares statistics.

Here: normalize, for every channel norm. Nothing of normkit or torch computes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Found:
    """What a norm gives for one input: invalid positions of out and dx are 0."""

    out: Array
    dx: Array
    dweight: Array
    dbias: Array
    counts: list[int]  # one per set of elements that share statistics, in the order of (sample, group) or channel
    means: list[float]
    variances: list[float]  # unbiased


def sets(batch: int, channels: int, groups: int | None) -> list[tuple[list[int], list[int]]]:
    """(samples, channels) of what shares statistics: a channel over the batch, or a group of channels of a sample."""
    if groups is None:
        return [(list(range(batch)), [channel]) for channel in range(channels)]
    size = channels // groups
    return [([b], list(range(g * size, (g + 1) * size))) for b in range(batch) for g in range(groups)]


def normalize(
    x: Array,  # (B, C, S)
    valid: np.ndarray[Any, np.dtype[np.bool_]],  # (B, S)
    weight: Array,
    bias: Array,
    dout: Array,
    groups: int | None,
    eps: float = 1e-5,
) -> Found:
    """out, and the gradients of sum(out * dout)."""
    batch, channels, _ = x.shape
    found = Found(np.zeros_like(x), np.zeros_like(x), np.zeros(channels), np.zeros(channels), [], [], [])
    for samples, members in sets(batch, channels, groups):
        places = [(b, c, s) for b in samples for c in members for s in np.flatnonzero(valid[b])]
        n = len(places)
        found.counts.append(n)
        if n == 0:
            found.means.append(0.0)
            found.variances.append(0.0)
            continue
        at = tuple(np.array(axis) for axis in zip(*places, strict=True))
        values, d = x[at], dout[at]
        mean = values.mean()
        var = ((values - mean) ** 2).mean()
        xhat = (values - mean) / np.sqrt(var + eps)
        gain = weight[at[1]]
        found.out[at] = xhat * gain + bias[at[1]]
        g = d * gain
        found.dx[at] = (g - g.mean() - xhat * (g * xhat).mean()) / np.sqrt(var + eps)
        np.add.at(found.dweight, at[1], d * xhat)
        np.add.at(found.dbias, at[1], d)
        found.means.append(mean)
        found.variances.append(var * n / max(n - 1, 1))
    return found
