"""The two steps of a channel norm: moments of what shares statistics, then the affine, recorded for backward.

Here: `batch_moments` and `sample_moments`, `normalized` with them, `normalized_by` stored statistics; and both steps
`at_once` on the compiled core, or as a `whole` in Triton.
May import: torch, _checks, reference, statistics, autograd, backends, calls, handover.
Read next: autograd.py, what is saved and what backward does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit import _checks, backends, reference, statistics
from normkit.autograd import Shared, channel_moments, channel_vectors, lines, per_channel, record_channel_norm
from normkit.functional import handover
from normkit.functional.calls import requires_grad
from normkit.reference import Count, accumulation_dtype
from normkit.statistics import Moments


class Given(NamedTuple):
    """What a channel norm normalizes: x, its parameters, and the valid positions (B, S) or None."""

    x: Tensor  # (B, C, ...)
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None


def at_once(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """batch_norm checked, computed and recorded in one step of the core; None where that cannot be.

    A training batch that would bring NaN or infinity into the running statistics is declined too, nothing changed.
    """
    if torch.compiler.is_compiling():
        return None
    out: Tensor | None = backends.batch_norm_now(
        x, running_mean, running_var, weight, bias, training, momentum, eps, True
    )
    return out


def whole(
    given: Given,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    guarded: bool = False,
    tracked: Tensor | None = None,
    refused: Tensor | None = None,
) -> Tensor | None:
    """batch_norm in few launches where Triton takes the call; None where it does not, or where a policy must look.

    A `guarded` batch with NaN or infinity leaves running_mean and running_var alone; `tracked` and `refused` count the
    batches, on the device.
    """
    x, weight, bias, mask = given
    if not x.is_cuda and not backends.interpreted():
        return None
    values = x.shape[0] * x.shape[2:].numel()
    if x.numel() == 0 or (training and values == 1):
        return None
    if backends.select(x, running_mean, running_var, weight, bias) is not backends.TRITON:
        return None
    if any(buffer is not None and not buffer.is_contiguous() for buffer in (running_mean, running_var)):
        return None
    if mask is None:
        rest = (weight, bias, training, momentum, eps, guarded, tracked, refused)
        handed = handover.batch_norm(x, running_mean, running_var, *rest)
        if handed is not None:
            return handed
    shared = None
    triton: Any = backends.TRITON
    with torch.no_grad():
        if training:
            out, count, mean, rstd = triton.batch_norm_forward(
                lines(x), running_mean, running_var, weight, bias, momentum, eps, mask, guarded, tracked, refused
            )
            shared = Shared(count, None)
            for changed in (running_mean, running_var, tracked, refused):
                if changed is not None and not changed.is_inference():
                    torch.autograd.graph.increment_version(changed)
        else:
            out, mean, rstd = triton.batch_norm_with_running(
                lines(x), running_mean, running_var, weight, bias, eps, mask
            )
    normed: Tensor = out.view(x.shape)
    if torch.is_grad_enabled() and requires_grad(x, weight, bias):
        return record_channel_norm(triton, x, weight, bias, mean, rstd, shared, eps, normed, mask)
    return normed


def batch_moments(given: Given, group: object = None) -> Moments:
    """count, mean and m2 (C,) of the batch, with `group` of all its ranks' batches."""
    return _moments(given, None, group)


def sample_moments(given: Given, groups: int) -> Moments:
    """count, mean and m2 (B, G) of each sample's groups of channels."""
    return _moments(given, groups, None)


def _moments(given: Given, groups: int | None, group: object) -> Moments:
    """Differentiable where no backend takes the call."""
    backend = backends.select(given.x, given.weight, given.bias)
    primitives = reference if backend is None else backend
    with torch.set_grad_enabled(torch.is_grad_enabled() and backend is None):
        moments = channel_moments(primitives, lines(given.x), given.mask, groups)
        return moments if group is None else statistics.over_ranks(moments, group)


def require_two(op: str, x: Tensor, count: Count) -> None:
    """More than one value a channel in all, where the count is known without waiting for a device."""
    number = known(count)
    if number is not None:
        _checks.two_values(op, x, number)


def known(count: Count) -> int | None:
    """The count as a number, None where reading it would wait for a device or end a trace or transform."""
    if not isinstance(count, Tensor):
        return count
    readable = count.device.type == "cpu" and not torch.compiler.is_compiling() and backends.transformed() is None
    return int(count) if readable and backends.exact(count) else None


def normalized(given: Given, moments: Moments, eps: float, group: object = None) -> Tensor:
    """x normalized with its own moments, through which its gradient flows; `group` as `batch_moments` had it."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and moments.m2.requires_grad):
        rstd = statistics.reciprocal_root(moments, eps)
    return _affine(given, moments.mean, rstd, Shared(moments.count, group), eps)


def normalized_by(given: Given, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    """x normalized with stored statistics, (C,)."""
    x = given.x
    backend = backends.select(x, running_mean, running_var, given.weight, given.bias)
    dtype = accumulation_dtype(x.dtype)
    wide = torch.float64 if backend is backends.CPU else dtype  # as batch_norm_now: the same bits with a record
    # a copy: the buffers may be updated in place between this forward and its backward
    mean, rstd = running_mean.detach().to(dtype, copy=True), torch.rsqrt(running_var.detach().to(wide) + eps)
    return _affine(given, mean, rstd, None, eps)


def _affine(given: Given, mean: Tensor, rstd: Tensor, shared: Shared | None, eps: float) -> Tensor:
    """The second step; `shared` as in ChannelNorm."""
    x, weight, bias, mask = given
    backend = backends.select(x, weight, bias)
    recorded = backend is not None and torch.is_grad_enabled() and requires_grad(x, weight, bias)
    primitives = reference if backend is None else backend
    with torch.set_grad_enabled(torch.is_grad_enabled() and not recorded):
        of_channels = (per_channel(mean, x.shape[1]), per_channel(rstd, x.shape[1]))
        vectors = channel_vectors(*of_channels, weight, bias, accumulation_dtype(x.dtype))
        out = primitives.channels_affine(lines(x), *vectors, mask)
    if recorded:
        assert backend is not None
        out = record_channel_norm(backend, x, weight, bias, mean, rstd, shared, eps, out, mask)
    return out.view(x.shape)
