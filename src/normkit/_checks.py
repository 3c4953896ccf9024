"""Checks of arguments: what a call needs, and the one sentence that says so when it is not given.

Here: the shape and dtype rules of the public functions; every message names the operation, what was expected,
what came and what to do.
May import: torch.
Read next: functional/rows.py, which calls a check, then differentiates, then computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shape_text(shape: Sequence[int]) -> str:
    """A shape as Python prints a tuple, whatever sequence holds it."""
    return str(tuple(shape))


def tensor(op: str, name: str, value: object) -> None:
    """`value` must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}; pass a tensor")


def floating(op: str, x: Tensor, complex_too: bool = False) -> None:
    """x must have a floating-point dtype; integers have no normalized value to round to."""
    if x.is_floating_point() or (complex_too and x.is_complex()):
        return
    advice = "normalize x.real and x.imag apart" if x.is_complex() else "convert it with x.float()"
    raise TypeError(f"{op}: x must have a floating-point dtype, got {x.dtype}; {advice}")


def companion(op: str, name: str, value: Tensor | None, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    """A parameter or statistic that stands beside x: a real tensor of `shape` on x's device."""
    if value is None:
        return
    tensor(op, name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} must have {meaning} {shape_text(shape)}, got shape {shape_text(value.shape)}; "
            f"pass a {name} of that shape, or None"
        )
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on x's device {x.device}, got {value.device}; move it with {name}.to(x.device)"
        )
    if not (value.is_floating_point() or value.dtype == x.dtype):
        raise TypeError(
            f"{op}: {name} must have a floating-point dtype, got {value.dtype}; convert it with {name}.float()"
        )


def epsilon(op: str, eps: float) -> None:
    """eps is added to a variance: negative values would let the root go below zero."""
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps must be zero or positive, got {eps}; 1e-5 is torch's default")


def normalized_shape(
    op: str, x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[int, ...]:
    """The trailing shape over which x is normalized, as a tuple; x, weight and bias fit it."""
    tensor(op, "x", x)
    not_strided_nested(op, "x", x)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise ValueError(
            f"{op}: normalized_shape must name at least one dimension, got (); "
            f"pass x.shape[-1:] to normalize the last one"
        )
    if tuple(x.shape[-len(shape) :]) != shape:
        advice = f"normalized_shape={x.shape[-1]} or transpose x" if x.dim() else "an x with at least one dimension"
        raise ValueError(
            f"{op}: x must end with normalized_shape {shape_text(shape)}, got x of shape {shape_text(x.shape)}; "
            f"pass {advice}"
        )
    companion(op, "weight", weight, x, shape, "shape normalized_shape")
    companion(op, "bias", bias, x, shape, "shape normalized_shape")
    return shape


def addend(op: str, x: Tensor, residual: Tensor) -> None:
    """x and residual are added: their shapes must be equal, since a broadcast would hide a mistake."""
    tensor(op, "x", x)
    tensor(op, "residual", residual)
    not_strided_nested(op, "x", x)
    not_strided_nested(op, "residual", residual)
    if x.shape != residual.shape:
        advice = (
            "make both of the same offsets" if x.is_nested or residual.is_nested else "expand it to that shape first"
        )
        raise ValueError(
            f"{op}: residual must have x's shape {shape_text(x.shape)}, got {shape_text(residual.shape)}; {advice}"
        )


def batch_norm(
    op: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """x (B, C, ...) with vectors of C numbers; statistics to use in eval."""
    channels(op, x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _running_statistics(op, running_mean, running_var, training, "training", eps)


def two_values(op: str, x: Tensor, count: int) -> None:
    """A channel's statistics need more than one value; none at all is an empty batch."""
    if count == 1:
        valid = "" if x.shape[0] * x.shape[2:].numel() == 1 else " with 1 valid value per channel in all"
        raise ValueError(
            f"{op}: training needs more than 1 value per channel, got x of shape {shape_text(x.shape)}{valid}; "
            f"use a larger batch, or eval mode"
        )


def channels(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """x (B, C, ...), and beside it vectors of C numbers or None."""
    tensor(op, "x", x)
    floating(op, x)
    if x.dim() < 2:
        raise ValueError(
            f"{op}: x must have at least 2 dimensions (batch, channels, ...), got x of shape {shape_text(x.shape)}; "
            f"add a batch dimension with x.unsqueeze(0)"
        )
    for name, value in vectors.items():
        companion(op, name, value, x, (x.shape[1],), "one value per channel, shape")


def _running_statistics(
    op: str, running_mean: Tensor | None, running_var: Tensor | None, own: bool, own_name: str, eps: float
) -> None:
    """Both or none; there, where the input's `own` are not used; eps that fits."""
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{op}: running_mean and running_var go together, got no {missing}; pass both or neither")
    epsilon(op, eps)
    if not own:
        if running_mean is None:
            where, instead = (
                ("outside training", "training=True to use the batch's statistics")
                if own_name == "training"
                else (f"without {own_name}", f"{own_name}=True to use the samples' statistics")
            )
            raise ValueError(
                f"{op}: running_mean and running_var are needed {where}, got None; pass them, or {instead}"
            )
    elif eps == 0.0:  # torch 2.13 refuses it too: a constant channel would divide by zero
        where = "in training" if own_name == "training" else f"with {own_name}"
        raise ValueError(f"{op}: eps must be positive {where}, got {eps}; 1e-5 is torch's default")


def group_norm(op: str, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """x (B, C, ...) whose channels num_groups divides; more than one value in all, as torch asks."""
    channels(op, x, weight=weight, bias=bias)
    epsilon(op, eps)
    if num_groups < 1 or x.shape[1] % num_groups != 0:
        raise ValueError(
            f"{op}: num_groups must divide the channels, got {num_groups} groups for x of shape "
            f"{shape_text(x.shape)}; pass a divisor of {x.shape[1]}"
        )
    if x.shape[0] * (x.shape[1] // num_groups) * x.shape[2:].numel() == 1:
        raise ValueError(
            f"{op}: a group needs more than 1 value, got {num_groups} groups for x of shape {shape_text(x.shape)}; "
            f"use fewer groups"
        )


def instance_norm(
    op: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    eps: float,
) -> None:
    """As batch_norm, with statistics of each sample: they need more than one position."""
    channels(op, x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _running_statistics(op, running_mean, running_var, use_input_stats, "use_input_stats", eps)
    if use_input_stats and x.shape[2:].numel() == 1:
        raise ValueError(
            f"{op}: each channel needs more than 1 value, got x of shape {shape_text(x.shape)}; "
            f"pass x with space, (B, C, L) or more"
        )


def momentum_or_decay(op: str, momentum_given: bool, momentum: float | None, decay: float | None) -> None:
    """momentum weighs the new batch and decay the old average: a layer takes one of them."""
    if decay is not None and momentum_given:
        raise ValueError(
            f"{op}: momentum (weight of the new batch) and decay (weight of the old average, 1 - momentum) "
            f"exclude each other, got momentum={momentum} and decay={decay}; pass one of them"
        )
    for name, value in (("momentum", momentum), ("decay", decay)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{op}: {name} must lie between 0 and 1, got {value}; usual are momentum=0.1, decay=0.9")


def choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def not_strided_nested(op: str, name: str, value: Tensor) -> None:
    """Of torch's two nested tensors only the jagged one has a shape, offsets and packed values."""
    if value.is_nested and value.layout is not torch.jagged:
        raise TypeError(
            f"{op}: {name} must be a dense tensor or a nested tensor of layout torch.jagged, got a nested tensor of "
            f"layout {value.layout}; make it with layout=torch.jagged"
        )


def process_group(op: str, name: str, group: object) -> None:
    """`group` must be a process group; torch gives ranks that do not belong to it a number instead."""
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"{op}: {name} must be a process group of torch.distributed that this rank belongs to, got "
            f"{type(group).__name__}; pass what torch.distributed.new_group or a DeviceMesh's get_group returned"
        )
