"""What torch, Keras and Flax call a BatchNorm's numbers and what they mean by momentum.

Here: the table of conventions; momentum from one to another, and for several updates a step.
May import: _checks.
Read next: batch_norm.py, which converts the numbers by this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from normkit import _checks

Convention: TypeAlias = Literal["torch", "keras", "flax"]


class Names(NamedTuple):
    """How one framework names and means a BatchNorm's numbers."""

    weight: str
    bias: str
    mean: str
    var: str
    batches: str | None  # how many were seen
    unbiased: bool  # running averages take m2 / (n - 1) instead of m2 / n
    momentum_is_new: bool  # momentum weighs the new batch, not the old average
    separator: str  # between the names of modules in a path


CONVENTIONS = {
    "torch": Names("weight", "bias", "running_mean", "running_var", "num_batches_tracked", True, True, "."),
    "keras": Names("gamma", "beta", "moving_mean", "moving_variance", None, False, False, "/"),
    "flax": Names("scale", "bias", "mean", "var", None, False, False, "/"),
}


def momentum(value: float, source: Convention, target: Convention) -> float:
    """Converts a momentum: torch's is the weight of the new batch, Keras's and Flax's that of the old average.

        torch:       running = (1 - momentum) * running + momentum * batch           default 0.1
        keras, flax: running = momentum * running + (1 - momentum) * batch           default 0.99

    Args:
        value: the momentum in the source's meaning, between 0 and 1.
        source, target: "torch", "keras" or "flax".

    Returns:
        value where both mean the same, otherwise 1 - value.

    Raises:
        ValueError: value lies outside [0, 1], or is None, torch's cumulative average, which the others do not have.

    Example:
        >>> import normkit
        >>> normkit.convert.momentum(0.9, "flax", "torch") == 1 - 0.9
        True

    Source: as `batch_norm_state`.
    """
    return checked_momentum("momentum", value, source, target)


def momentum_per_update(momentum: float, updates_per_step: int) -> float:
    """The momentum at which several updates of the running averages act as one update at the given momentum.

        momentum_per_update = 1 - (1 - momentum)^(1 / updates_per_step)

    k updates keep (1 - m)^k of the old average, so that two at m act as one at 1 - (1 - m)^2. A forward that is
    recomputed by activation checkpointing updates twice with the same batch; k micro-batches update once each.

    Args:
        momentum: the weight of the new batch, torch's meaning, between 0 and 1.
        updates_per_step: k, 1 or more.

    Returns:
        The momentum for each of the k updates, torch's meaning.

    Raises:
        ValueError: momentum lies outside [0, 1], or updates_per_step is below 1.

    Numerics: exact for k updates with the same batch. Of k different ones, the last weighs most: the i-th of k weighs
        m (1 - m)^(k - i).

    Example:
        >>> import normkit
        >>> round(normkit.convert.momentum_per_update(0.19, updates_per_step=2), 12)
        0.1

    Source: the update rule of torch.nn.BatchNorm2d, unrolled; PyTorch issue 96136 for checkpointing.
    """
    value = checked_momentum("momentum_per_update", momentum, "torch", "torch")
    if not updates_per_step >= 1:
        raise ValueError(
            f"momentum_per_update: updates_per_step must be 1 or more, got {updates_per_step}; "
            f"pass how often one optimizer step updates the running averages"
        )
    if value == 1.0:
        return 1.0
    return -math.expm1(math.log1p(-value) / updates_per_step)  # 1 - (1 - m)^(1/k) without its cancellation


def convention(op: str, role: str, name: str) -> Names:
    """The row of the table, or the sentence that says which there are."""
    if name not in CONVENTIONS:
        raise ValueError(f"{op}: {role} must be one of {listed(CONVENTIONS)}, got {name!r}; pass the framework's name")
    return CONVENTIONS[name]


def checked_momentum(op: str, value: float | None, source: Convention, target: Convention) -> float:
    """`momentum`, in the words of another operation."""
    same = convention(op, "source", source).momentum_is_new == convention(op, "target", target).momentum_is_new
    if value is None:
        raise ValueError(
            f"{op}: momentum must be a number, got None, torch's cumulative average of all batches; "
            f"pass the weight that the running average is to have"
        )
    _checks.momentum_or_decay(op, False, value, None)
    return value if same else 1.0 - value


def listed(names: Mapping[str, Any]) -> str:
    """Names as a sentence lists them."""
    return ", ".join(repr(name) for name in names) or "none"
