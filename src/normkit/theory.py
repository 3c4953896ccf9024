"""Closed forms about normalization in residual networks, each with its assumptions and its source.

Here: the weight of the identity branch under PostNorm.
May import: the standard library.
Read next: study/measure.py, which measures what these predict.
"""

from __future__ import annotations

import math


def post_skip_weight(variance_ratio: float = 1.0) -> float:
    """The factor by which one PostNorm sublayer norm(x + f(x)) multiplies the identity branch x.

        weight = std(x) / std(x + f(x)) = 1 / sqrt(1 + v),     v = Var(f) / Var(x)

    Args:
        variance_ratio: v, zero or positive; 1.0, equal variances, gives the textbook's 1 / sqrt(2). Measured v
            differs by sublayer and initialisation, so the study draws 1 / sqrt(2) only as a reference line.

    Returns:
        A number in (0, 1].

    Raises:
        ValueError: v is negative.

    Assumes that x and f(x) are uncorrelated.

    Example:
        >>> round(post_skip_weight(), 4)
        0.7071

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, section 3.
    """
    if not variance_ratio >= 0.0:
        raise ValueError(f"post_skip_weight: variance_ratio must be zero or positive, got {variance_ratio}")
    return 1.0 / math.sqrt(1.0 + variance_ratio)


def post_identity_weight(sublayers: int, variance_ratio: float = 1.0) -> float:
    """The weight that the input keeps after a stack of PostNorm sublayers: post_skip_weight(v) ** sublayers.

    Args:
        sublayers: how many norms follow an add; a transformer block has two.
        variance_ratio: v of every sublayer, as in `post_skip_weight`.

    Raises:
        ValueError: sublayers is negative.

    Example:
        >>> round(post_identity_weight(24) * 2**12, 9)
        1.0

    Source: as `post_skip_weight`; unrolled, x_l = x_0 / 2^(l/2) + ... at v = 1.
    """
    if sublayers < 0:
        raise ValueError(f"post_identity_weight: sublayers must be zero or positive, got {sublayers}")
    return post_skip_weight(variance_ratio) ** sublayers
