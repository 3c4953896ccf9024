"""The variance of a residual stream by depth, and the gradients that flow back through it.

Here: `stream_variances`, `pre_norm_variance_bounds`, `pre_gradient_growth`, `post_gradient_growth`,
`last_layer_gradient_bound`.
May import: identity (its check of values by sublayer).
Read next: saturation.py.
"""

from __future__ import annotations

import math

from normkit.theory.identity import Ratios, per_sublayer


def stream_variances(
    sublayers: int,
    branch_variance: Ratios = 1.0,
    *,
    output_norm: bool = False,
    skip_scale: float = 1.0,
    branch_scale: float = 1.0,
    start: float = 1.0,
) -> list[float]:
    """The variance of the stream at its start and after every add, for any placement of norms.

        V_0 = start;     V_l = skip_scale^2 * S_(l-1) + branch_scale^2 * v_l
        S_l = V_l without a norm after the add, 1 with one

    Args:
        sublayers: how many adds; a transformer block has two.
        branch_variance: v, the variance of what a branch adds, before branch_scale; one for all or one for each. It
            does not depend on the stream's where the branch begins with a norm (PreNorm) or the stream is normalized
            (PostNorm).
        output_norm: whether a norm follows the add (PostNorm): what is listed is the variance that it removes.
        skip_scale, branch_scale: the two scales of `normkit.Placement`; DeepNorm's alpha is a skip_scale.
        start: the variance of the stack's input, 1.0 after an embedding of unit variance.

    Returns:
        sublayers + 1 variances.

    Raises:
        ValueError: a count or variance is negative, or the sequence has another length.

    Assumes branches uncorrelated with the stream; norms with gain 1.

    Example:
        >>> stream_variances(4)  # PreNorm: linear in depth
        [1.0, 2.0, 3.0, 4.0, 5.0]
        >>> stream_variances(4, output_norm=True)  # PostNorm: 2 before every norm
        [1.0, 2.0, 2.0, 2.0, 2.0]

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, lemma 2; De and Smith, "Batch
        Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks", 2020, section 3.
    """
    variances = per_sublayer("stream_variances", "branch_variance", sublayers, branch_variance)
    if not start >= 0.0:
        raise ValueError(f"stream_variances: start must be zero or positive, got {start}")
    found, stream = [float(start)], float(start)
    for variance in variances:
        found.append(skip_scale**2 * stream + branch_scale**2 * variance)
        stream = 1.0 if output_norm else found[-1]
    return found


def pre_norm_variance_bounds(layers: int) -> tuple[float, float]:
    """Between what the stream's variance lies after so many PreNorm transformer layers at initialisation.

        1 + l / 2  <=  E ||x_l||^2 / d  <=  1 + 3 l / 2

    The lower bound takes the attention's average over tokens as 0, the upper one as one token's value.

    Args:
        layers: l, transformer layers of an attention and a ReLU feed-forward sublayer each.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: layers is negative.

    Assumes the paper's setting: one head, all matrices d x d with Gaussian Xavier weights of variance 1 / d, queries
        and keys 0 (attention averages uniformly), no biases, gain 1, inputs of unit variance.

    Example:
        >>> pre_norm_variance_bounds(12)
        (7.0, 19.0)

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, lemma 2.
    """
    if layers < 0:
        raise ValueError(f"pre_norm_variance_bounds: layers must be zero or positive, got {layers}")
    return 1.0 + layers / 2.0, 1.0 + 3.0 * layers / 2.0


def pre_gradient_growth(sublayers: int, branch_variance: Ratios = 1.0, branch_gain: Ratios = 1.0) -> list[float]:
    """How much longer the gradient is at the start of each PreNorm sublayer than at the stack's end.

        |dL/dx_(l-1)|^2 = |dL/dx_l|^2 * (1 + j_l / V_(l-1)),     V the stream's variance, `stream_variances`

    The norm at the branch's start divides its gradient by the stream's standard deviation, so the growth slows down
    with depth: with all j = v = 1 the product telescopes to sqrt(V_L / V_l).

    Args:
        sublayers: how many.
        branch_variance: v of each branch; where the stream's variance comes from.
        branch_gain: j, the mean square of the branch's derivative behind its norm, E |J'g|^2 / |g|^2; for a linear
            branch it equals v.

    Returns:
        sublayers + 1 ratios, from the stack's input to its end; the last is 1.

    Raises:
        ValueError: a count or value is negative, or a sequence has another length.

    Assumes branches whose Jacobians are independent of the gradient, a wide stream (the two directions that a norm
        removes do not count), an input of unit variance.

    Example:
        >>> [round(ratio, 4) for ratio in pre_gradient_growth(3)]
        [2.0, 1.4142, 1.1547, 1.0]

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, section 3.3; the Jacobian of a
        norm is (1 / sigma) times a projection.
    """
    gains = per_sublayer("pre_gradient_growth", "branch_gain", sublayers, branch_gain)
    variances = stream_variances(sublayers, branch_variance)
    ratios = [1.0]
    for gain, variance in zip(reversed(gains), reversed(variances[:-1]), strict=True):
        ratios.append(ratios[-1] * math.sqrt(1.0 + gain / variance))
    return ratios[::-1]


def post_gradient_growth(sublayers: int, variance_ratio: Ratios = 1.0, branch_gain: Ratios = 1.0) -> list[float]:
    """How much longer (or shorter) the gradient is at the start of each PostNorm sublayer than at the stack's end.

        |dL/dx_(l-1)|^2 = |dL/dx_l|^2 * (1 + j_l) / (1 + v_l)

    The norm after the add divides the gradient of both branches by the standard deviation of their sum. Where the
    branch's derivative is weaker than its output, j < v, gradients vanish exponentially towards the input.

    Args:
        sublayers: how many.
        variance_ratio: v of each sublayer, as in `post_skip_weight`.
        branch_gain: j, the mean square of the branch's derivative, E |J'g|^2 / |g|^2; for a linear branch it equals v.

    Returns:
        sublayers + 1 ratios, from the stack's input to its end; the last is 1.

    Raises:
        ValueError: a count or value is negative, or a sequence has another length.

    Assumes branches whose Jacobians are independent of the gradient, and a wide stream.

    Example:
        >>> [round(ratio, 4) for ratio in post_gradient_growth(2, 1.0, 0.5)]
        [0.75, 0.866, 1.0]

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, section 3.3; attention that
        averages over many tokens has j near 0.
    """
    ratios_of = per_sublayer("post_gradient_growth", "variance_ratio", sublayers, variance_ratio)
    gains = per_sublayer("post_gradient_growth", "branch_gain", sublayers, branch_gain)
    ratios = [1.0]
    for gain, ratio in zip(reversed(gains), reversed(ratios_of), strict=True):
        ratios.append(ratios[-1] * math.sqrt((1.0 + gain) / (1.0 + ratio)))
    return ratios[::-1]


def last_layer_gradient_bound(placement: str, width: int, layers: int) -> float:
    """The order of the gradient of the last feed-forward's second matrix at initialisation, up to a constant.

        post: d sqrt(ln d);     pre: d sqrt(ln d / L)

    PostNorm's does not shrink with depth, which is why it needs a warm-up: only ratios between depths and placements
    mean something.

    Args:
        placement: "post" or "pre".
        width: d.
        layers: L.

    Raises:
        ValueError: another placement, a width below 2, or no layers.

    Assumes the setting of `pre_norm_variance_bounds`.

    Example:
        >>> last_layer_gradient_bound("post", 512, 12) / last_layer_gradient_bound("pre", 512, 12) == 12**0.5
        True

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, theorem 1.
    """
    if placement not in ("post", "pre"):
        raise ValueError(f'last_layer_gradient_bound: placement must be "post" or "pre", got {placement!r}')
    if width < 2 or layers < 1:
        raise ValueError(
            f"last_layer_gradient_bound: width must be 2 or more and layers 1 or more, "
            f"got width {width}, layers {layers}"
        )
    bound = width * math.sqrt(math.log(width))
    return bound if placement == "post" else bound / math.sqrt(layers)
