"""Running statistics as an exponential moving average: what is left of the start, and how noisy it is.

Here: `running_residual`, `updates_until`, `running_noise`.
May import: the standard library.
Read next: batches.py, the noise of the batches that are averaged.
"""

from __future__ import annotations

import math


def _decay(function: str, decay: float) -> float:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"{function}: decay must lie in [0, 1], got {decay}; it is 1 - momentum in torch's terms")
    return float(decay)


def _updates(function: str, updates: int) -> int:
    if updates < 0:
        raise ValueError(f"{function}: updates must be zero or positive, got {updates}")
    return updates


def running_residual(decay: float, updates: int) -> float:
    """The weight that the start value still has in a running average.

        weight = decay^t

    Args:
        decay: the weight of the old average in an update, 1 - torch's momentum.
        updates: t, how many batches were averaged.

    Raises:
        ValueError: decay outside [0, 1], negative updates.

    Example:
        >>> round(running_residual(0.9, 44), 4)
        0.0097

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3.1; the recursion unrolled.
    """
    return _decay("running_residual", decay) ** _updates("running_residual", updates)


def updates_until(decay: float, residual: float = 0.01) -> int:
    """After how many updates the start value weighs at most `residual`.

        t = ceil(ln residual / ln decay)

    Args:
        decay: the weight of the old average, below 1.
        residual: in (0, 1); 0.01, one percent.

    Raises:
        ValueError: decay outside [0, 1), residual outside (0, 1).

    Example:
        >>> [updates_until(decay) for decay in (0.9, 0.99, 0.999)]
        [44, 459, 4603]

    Source: as `running_residual`.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"updates_until: decay must lie in [0, 1), got {decay}; with 1 the start value stays")
    if not 0.0 < residual < 1.0:
        raise ValueError(f"updates_until: residual must lie in (0, 1), got {residual}")
    if decay == 0.0:
        return 1
    updates = max(1, math.ceil(math.log(residual) / math.log(decay)))
    while updates > 1 and decay ** (updates - 1) <= residual:  # the quotient's rounding
        updates -= 1
    return updates if decay**updates <= residual else updates + 1


def running_noise(decay: float, updates: int | None = None) -> float:
    """The standard deviation of a running average over that of what one batch contributes.

        ratio^2 = m / (2 - m) * (1 - decay^(2t)),     m = 1 - decay;     t to infinity: m / (2 - m)

    Args:
        decay: the weight of the old average.
        updates: t; None, the default, for the stationary value.

    Returns:
        0.229 at decay 0.9: the running mean is as exact as the mean of 19 batches, (2 - m) / m.

    Raises:
        ValueError: decay outside [0, 1], negative updates.

    Assumes independent batches from a distribution that stands still.

    Example:
        >>> round(running_noise(0.9) ** 2, 4)
        0.0526

    Source: the variance of an exponentially weighted average: Roberts, "Control Chart Tests Based on Geometric Moving
        Averages", 1959.
    """
    decay = _decay("running_noise", decay)
    momentum = 1.0 - decay
    stationary = momentum / (2.0 - momentum)
    if updates is None:
        return math.sqrt(stationary)
    return math.sqrt(stationary * (1.0 - decay ** (2 * _updates("running_noise", updates))))
