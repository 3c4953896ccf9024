"""The noise that a batch's statistics carry into BatchNorm, by the number of values behind them.

Here: `batch_mean_noise`, `batch_std_mean`, `batch_std_noise`, `largest_normalized_value`. All in units of the
population's standard deviation.
May import: the standard library.
Read next: running.py, what averaging over batches makes of this noise.
"""

from __future__ import annotations

import math


def _count(function: str, count: int, least: int) -> int:
    if count < least:
        raise ValueError(f"{function}: count must be {least} or more, got {count}; it is batch size times positions")
    return count


def batch_mean_noise(count: int) -> float:
    """The standard deviation of a batch's mean, in units of sigma: the noise that BatchNorm adds to every output.

        std(mean) / sigma = 1 / sqrt(n)

    Args:
        count: n, values per channel: batch size times positions. Positions of one image are not independent; n is then
            between the batch size and that.

    Raises:
        ValueError: no value.

    Assumes independent values, of any distribution with a variance.

    Example:
        >>> batch_mean_noise(16)
        0.25

    Source: the variance of a mean.
    """
    return 1.0 / math.sqrt(_count("batch_mean_noise", count, 1))


def batch_std_mean(count: int) -> float:
    """The mean of a batch's biased standard deviation, in units of sigma: below 1, so that outputs come out larger.

        E[s] / sigma = sqrt(2 / n) * Gamma(n / 2) / Gamma((n - 1) / 2),     s^2 = sum of (x - mean)^2 / n

    Args:
        count: n, 2 or more.

    Raises:
        ValueError: fewer than 2 values.

    Assumes independent Gaussian values: n s^2 / sigma^2 has the chi-squared distribution with n - 1 degrees.

    Example:
        >>> round(batch_std_mean(2), 4), round(batch_std_mean(128), 4)
        (0.5642, 0.9941)

    Source: Cochran, "The distribution of quadratic forms in a normal system", 1934, and the mean of a chi variable.
    """
    count = _count("batch_std_mean", count, 2)
    return math.sqrt(2.0 / count) * math.exp(math.lgamma(count / 2.0) - math.lgamma((count - 1) / 2.0))


def batch_std_noise(count: int) -> float:
    """The standard deviation of a batch's biased standard deviation, in units of sigma; near 1 / sqrt(2 n).

        std(s)^2 / sigma^2 = (n - 1) / n - (E[s] / sigma)^2

    Args:
        count: n, 2 or more.

    Raises:
        ValueError: fewer than 2 values.

    Assumes independent Gaussian values.

    Example:
        >>> round(batch_std_noise(8), 4), round(1 / 16**0.5, 4)
        (0.2452, 0.25)

    Source: as `batch_std_mean`.
    """
    count = _count("batch_std_noise", count, 2)
    return math.sqrt(max(0.0, (count - 1) / count - batch_std_mean(count) ** 2))


def largest_normalized_value(count: int) -> float:
    """The largest |xhat| that n values can have, whatever they are: one apart from n - 1 equal ones.

        max |xhat| = sqrt(n - 1)

    Args:
        count: n, 1 or more. With 2 the norm is a sign function, with 1 it gives 0.

    Raises:
        ValueError: no value.

    Assumes eps of nothing; with it the value is smaller.

    Example:
        >>> largest_normalized_value(17)
        4.0

    Source: Samuelson, "How Deviant Can You Be?", 1968.
    """
    return math.sqrt(_count("largest_normalized_value", count, 1) - 1)
