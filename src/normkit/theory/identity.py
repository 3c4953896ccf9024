"""How much of its input a residual stack still carries: the weight of the identity branch by depth.

Here: `post_skip_weight`, `post_identity_weight`, `pre_identity_weight`, and the check of variance ratios that other
modules share.
May import: the standard library.
Read next: residual.py, the variance of the stream and the gradients through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Ratios = float | Sequence[float]  # one for all sublayers, or one for each


def per_sublayer(function: str, name: str, sublayers: int, values: Ratios) -> list[float]:
    """The values of all sublayers, zero or positive."""
    if sublayers < 0:
        raise ValueError(f"{function}: sublayers must be zero or positive, got {sublayers}")
    found = [float(values)] * sublayers if isinstance(values, (int, float)) else [float(value) for value in values]
    if len(found) != sublayers:
        raise ValueError(
            f"{function}: {name} must be one number or one for each of the {sublayers} sublayers, "
            f"got {len(found)} numbers"
        )
    for value in found:
        if not value >= 0.0:
            raise ValueError(f"{function}: {name} must be zero or positive, got {value}")
    return found


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


def post_identity_weight(sublayers: int, variance_ratio: Ratios = 1.0) -> float:
    """The weight that the input keeps after a stack of PostNorm sublayers: the product of their skip weights.

        weight = prod over the sublayers of 1 / sqrt(1 + v_i)

    Args:
        sublayers: how many norms follow an add; a transformer block has two.
        variance_ratio: v of every sublayer as in `post_skip_weight`, or a sequence with one for each, as measured.

    Raises:
        ValueError: sublayers or a ratio is negative, or the sequence has another length.

    Assumes that x and f(x) are uncorrelated in every sublayer.

    Example:
        >>> round(post_identity_weight(24) * 2**12, 9)
        1.0
        >>> round(post_identity_weight(2, [0.0, 3.0]), 9)
        0.5

    Source: as `post_skip_weight`; unrolled, x_l = x_0 / 2^(l/2) + ... at v = 1.
    """
    ratios = per_sublayer("post_identity_weight", "variance_ratio", sublayers, variance_ratio)
    return math.prod(post_skip_weight(ratio) for ratio in ratios)


def pre_identity_weight(sublayers: int, branch_variance: Ratios = 1.0) -> float:
    """The weight that the input has in what leaves a PreNorm stack through its final norm.

        x_L = x_0 + sum of branches;     weight = std(x_0) / std(x_L) = 1 / sqrt(1 + v_1 + ... + v_L)

    It falls with the root of depth, where PostNorm's falls exponentially.

    Args:
        sublayers: how many branches are added; a transformer block has two.
        branch_variance: Var(f_i) / Var(x_0) of every branch, or a sequence with one for each. A branch reads a
            normalized input, so its variance does not grow with the stream's.

    Returns:
        A number in (0, 1].

    Raises:
        ValueError: sublayers or a variance is negative, or the sequence has another length.

    Assumes branches uncorrelated with each other and with x_0.

    Example:
        >>> pre_identity_weight(24)
        0.2

    Source: He et al., "Identity Mappings in Deep Residual Networks", 2016, eq. 4, and the norm after the last add.
    """
    variances = per_sublayer("pre_identity_weight", "branch_variance", sublayers, branch_variance)
    return 1.0 / math.sqrt(1.0 + math.fsum(variances))
