"""When sigmoid and tanh saturate: the probability that a unit's derivative is small, at initialisation.

Here: `preactivation_std`, `saturation_threshold`, `saturation_probability`.
May import: the standard library.
Read next: running.py.
"""

from __future__ import annotations

import math

# derivative / its maximum is 1 / cosh(steepness * z)^2: sigmoid(z) = (1 + tanh(z / 2)) / 2
_STEEPNESS = {"sigmoid": 0.5, "tanh": 1.0}


def _steepness(function: str, activation: str) -> float:
    if activation not in _STEEPNESS:
        raise ValueError(f'{function}: activation must be "sigmoid" or "tanh", got {activation!r}')
    return _STEEPNESS[activation]


def preactivation_std(weight_std: float, fan_in: int, input_mean_square: float = 1.0, bias_std: float = 0.0) -> float:
    """The standard deviation of a unit's pre-activation z = w x + b over random weights.

        std(z) = sqrt(weight_std^2 * fan_in * E[x^2] + bias_std^2)

    Args:
        weight_std: of the weights, which have mean 0.
        fan_in: how many inputs the unit has.
        input_mean_square: E[x^2] of an input: 1.0 behind a norm, 1/4 to 1/2 behind a sigmoid (its mean is 1/2).
        bias_std: of the bias; 0.0, none.

    Raises:
        ValueError: a negative number, or no input.

    Assumes independent weights. With BatchNorm before the activation std(z) is its gamma, whatever the weights.

    Example:
        >>> preactivation_std(0.5, 64)
        4.0

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 5.
    """
    if fan_in < 1:
        raise ValueError(f"preactivation_std: fan_in must be 1 or more, got {fan_in}")
    values = {"weight_std": weight_std, "input_mean_square": input_mean_square, "bias_std": bias_std}
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"preactivation_std: {name} must be zero or positive, got {value}")
    return math.sqrt(weight_std**2 * fan_in * input_mean_square + bias_std**2)


def saturation_threshold(activation: str, share: float = 0.1) -> float:
    """The |z| from which on the derivative is below `share` of its maximum.

        sigmoid: 4 s(z) (1 - s(z)) = 1 / cosh(z/2)^2 = share  ->  |z| = 2 arccosh(1 / sqrt(share))
        tanh:    1 - tanh(z)^2     = 1 / cosh(z)^2   = share  ->  |z| = arccosh(1 / sqrt(share))

    Args:
        activation: "sigmoid" or "tanh".
        share: of the derivative at 0, in (0, 1]; 0.1: a unit counts as saturated when it learns ten times slower.

    Raises:
        ValueError: another activation, or a share outside (0, 1].

    Example:
        >>> round(saturation_threshold("sigmoid"), 3), round(saturation_threshold("tanh"), 3)
        (3.637, 1.818)
    """
    steepness = _steepness("saturation_threshold", activation)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"saturation_threshold: share must lie in (0, 1], got {share}")
    return math.acosh(1.0 / math.sqrt(share)) / steepness


def saturation_probability(activation: str, std: float, share: float = 0.1, mean: float = 0.0) -> float:
    """The probability that a unit is saturated: |z| beyond `saturation_threshold`, z Gaussian.

        P = Q((t - mean) / std) + Q((t + mean) / std),     Q the normal tail, t the threshold

    Args:
        activation: "sigmoid" or "tanh".
        std: of the pre-activation z; `preactivation_std`, or gamma behind a BatchNorm.
        share: what counts as saturated, as in `saturation_threshold`.
        mean: of z; 0.0, or beta behind a BatchNorm.

    Returns:
        A number in [0, 1]; by the error function, exact.

    Raises:
        ValueError: as `saturation_threshold`, or a negative std.

    Assumes a Gaussian z: many independent terms, as random weights give.

    Example:
        >>> round(saturation_probability("sigmoid", 4.0), 4)
        0.3632
        >>> round(saturation_probability("sigmoid", 1.0), 6)  # behind a BatchNorm with gamma 1
        0.000276

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 2, for the question; the formula is the normal tail.
    """
    threshold = saturation_threshold(activation, share)
    if not std >= 0.0:
        raise ValueError(f"saturation_probability: std must be zero or positive, got {std}")
    if std == 0.0:
        return float(abs(mean) > threshold)
    scale = std * math.sqrt(2.0)
    return 0.5 * (math.erfc((threshold - mean) / scale) + math.erfc((threshold + mean) / scale))
