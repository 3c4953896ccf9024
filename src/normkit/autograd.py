"""Differentiation: what each family saves in forward and what its backward does.

Here: RowNorm and ChannelNorm, the two autograd functions of the library.
May import: torch, statistics, ranks, backends, reference.
Read next: backends.py, which says who computes; kernels/cpu.py, which computes.

Backward runs on the backend that forward ran on, unless it must itself be differentiated (`create_graph=True`) or
transformed (a batched gradient): then it takes the reference formulas as differentiable operations, with the
statistics computed again from the input, so that higher derivatives are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normkit import backends, ranks, reference, statistics
from normkit.backends import Backend
from normkit.reference import Count, accumulation_dtype
from normkit.statistics import Moments


def _differentiated(*gradients: Tensor | None) -> bool:
    """Whether this backward must be a composite: it is recorded, transformed, or fed with something not plain."""
    if torch.is_grad_enabled() or backends.transformed() is not None:
        return True
    return any(gradient is not None and (_batched(gradient) or not backends.exact(gradient)) for gradient in gradients)


def _batched(gradient: Tensor) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) made it: its old vmap leaves no level to ask for."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def _in_dtype(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient.to(dtype)`, without the 2 us that torch takes to find nothing to do."""
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


Computed = tuple[Tensor, Tensor, Tensor | None, Tensor]  # out, total, mean, rstd


class RowNorm(torch.autograd.Function):
    """(out, total) of a row norm; total is None without a residual. Saves total, mean, rstd and weight.

    `computed` holds what was computed already, or is None. It comes in a list, since autograd would take a tensor that
    is both argument and result for a view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        computed: list[Computed] | None,
        eps: float,
        centered: bool,
        weight_offset: float,
    ) -> tuple[Tensor, Tensor | None]:
        if computed is None:
            out, total, mean, rstd = backend.rows_forward(x, residual, weight, bias, eps, centered, weight_offset)
        else:
            out, total, mean, rstd = computed.pop()
        # x itself, not the copy that a kernel may have made of it: a derivative of backward goes through what is saved
        ctx.save_for_backward(x if residual is None else total, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        ctx.arguments = backend, eps, centered, weight_offset, None if bias is None else bias.dtype
        if residual is None:
            return out, None
        if not any(ctx.needs_input_grad[1:3]):
            ctx.mark_non_differentiable(total)  # x + residual does not depend on weight and bias
        return out, total

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        _, x_needs, residual_needs, weight_needs, bias_needs, *_ = ctx.needs_input_grad
        total, mean, rstd, weight = ctx.saved_tensors
        backend, eps, centered, weight_offset, bias_dtype = ctx.arguments
        needs = (x_needs or residual_needs, weight_needs, bias_needs)
        dx, dweight, dbias = dtotal, None, None
        if dout is not None:
            found = None
            if backend is backends.CPU and not torch.compiler.is_compiling():
                narrow = weight is not None and bias_dtype in (None, weight.dtype)
                saved = (total, mean, rstd, weight, weight_offset)
                found = backends.norm_backward_now(dout, dtotal, *saved, *needs, narrow)
            if found is None:
                rows_backward = backend.rows_backward
                if _differentiated(dout, dtotal):
                    mean, var = reference.rows_moments(total, centered)
                    mean = None if mean is None else mean.squeeze(-1)
                    rstd = torch.rsqrt(var + eps).squeeze(-1)
                    rows_backward = reference.rows_backward
                elif backend is backends.TRITON and weight is not None and bias_dtype in (None, weight.dtype):
                    rows_backward = partial(rows_backward, narrow=weight.dtype)  # one launch less than rounding later
                found = rows_backward(dout, dtotal, total, mean, rstd, weight, weight_offset, needs)
            dx, dweight, dbias = found
        if dweight is not None:
            dweight = _in_dtype(dweight, weight.dtype)
        if dbias is not None:
            dbias = _in_dtype(dbias, bias_dtype)
        return None, dx if x_needs else None, dx if residual_needs else None, dweight, dbias, None, None, None, None


def channel_vectors(
    mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """center, scale and shift of `channels_affine` in `dtype`, from statistics that may be wider.

    What the rounding of the mean to `dtype` leaves out goes into the shift: at mean 1e4 in float32 that is up to
    5e-4 of a standard deviation of 1.
    """
    center = mean.to(dtype)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    shift = torch.zeros_like(scale) if bias is None else bias.to(scale.dtype)
    if mean.dtype != dtype:
        shift = shift - (mean - center.to(mean.dtype)) * scale
    return center, scale.to(dtype), shift.to(dtype)


def lines(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C, S), a view where memory allows it."""
    return x if x.dim() == 3 else x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel())


def per_channel(values: Tensor, channels: int) -> Tensor:
    """(C,) numbers as they are; (B, G) numbers of a sample's groups as (B, C) numbers of their channels."""
    if values.dim() == 1 or values.shape[1] == channels:
        return values
    return values.repeat_interleave(channels // values.shape[1], 1)


@dataclass(frozen=True)
class Shared:
    """What statistics that are the batch's own were taken over, so that the gradient flows through them."""

    count: Count  # how many values stand behind each of them
    group: object  # the process group whose ranks' batches they are of, or None


def channel_moments(primitives: Any, x: Tensor, mask: Tensor | None, groups: int | None) -> Moments:
    """count, mean and m2 of x (B, C, S): (C,) over the batch or, with `groups`, (B, G) of each sample.

    The channels of a group are merged by Chan's formula.
    """
    count, mean, m2 = primitives.channels_moments(x, mask, groups is not None)
    batch, channels, _ = x.shape
    if groups is None or groups == channels:
        return Moments(count, mean, m2)
    grouped = (batch, groups, channels // groups)
    mean, m2 = mean.reshape(grouped), m2.reshape(grouped)
    center = mean.mean(2, keepdim=True)  # of equal counts
    between = ((mean - center) ** 2).sum(2) * count
    return Moments(count * (channels // groups), center.squeeze(2), m2.sum(2) + between)


class ChannelNorm(torch.autograd.Function):
    """Normalizes (B, C, ...) with given statistics, (C,) or (B, G). Saves x, weight, mean, rstd and mask.

    `shared` tells what the statistics were taken over when they are this batch's own, and the gradient flows through
    them; None when they are fixed (running statistics), and dx = dout * scale. `eps` is what rstd was made with:
    backward needs it where it is itself differentiated. `computed` holds the result: forward only records it. It comes
    in a list, since autograd would take a tensor that is both argument and result for a view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        shared: Shared | int | None,
        eps: float,
        computed: list[Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd, mask)
        ctx.backend, ctx.eps = backend, eps
        ctx.shared = Shared(shared, None) if isinstance(shared, int) else shared  # the core knows a count only
        ctx.bias_dtype = None if bias is None else bias.dtype
        return computed.pop()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, mask = ctx.saved_tensors
        _, x_needs, weight_needs, bias_needs, *_ = ctx.needs_input_grad
        parameters = weight_needs or bias_needs
        backend: Backend = ctx.backend
        shared: Shared | None = ctx.shared
        found = None
        plain = mask is None and shared is not None and shared.group is None
        if plain and backend is backends.CPU and not torch.compiler.is_compiling():
            narrow = weight is not None and ctx.bias_dtype in (None, weight.dtype)
            found = backends.batch_norm_backward_now(dout, x, mean, rstd, weight, x_needs, parameters, narrow)
        differentiated = found is None and _differentiated(dout)
        in_triton = backend is backends.TRITON and not differentiated and mean.dim() == 1 and x.numel() > 0
        if in_triton and (shared is None or shared.group is None):
            found = _in_triton(dout, x, mask, mean, rstd, weight, shared, (x_needs, parameters), ctx.bias_dtype)
        if found is None:
            if differentiated:
                backend = reference
                if shared is not None:
                    mean, rstd = _statistics_again(x, mask, mean, shared, ctx.eps)
            needs = (x_needs, parameters)
            dx, *sums = channel_gradients(backend, lines(dout), lines(x), mask, mean, rstd, weight, shared, needs)
            found = (None if dx is None else dx.view(x.shape), *sums)
        dx, dweight, dbias = found
        if dweight is not None:
            dweight = _in_dtype(dweight, weight.dtype) if weight_needs else None
        if dbias is not None:
            dbias = _in_dtype(dbias, ctx.bias_dtype) if bias_needs else None
        return None, dx, dweight, dbias, None, None, None, None, None, None


def _in_triton(
    dout: Tensor,
    x: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    shared: Shared | None,
    needs: tuple[bool, bool],
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`channel_gradients` of a whole BatchNorm in few launches."""
    narrow = weight.dtype if weight is not None and bias_dtype in (None, weight.dtype) else None
    count = None if shared is None else shared.count
    arguments = (lines(dout), lines(x), mean, rstd, weight, count, mask, needs, narrow)
    dx, dweight, dbias = backends.TRITON.batch_norm_backward(*arguments)
    return None if dx is None else dx.view(x.shape), dweight, dbias


def _statistics_again(
    x: Tensor, mask: Tensor | None, mean: Tensor, shared: Shared, eps: float
) -> tuple[Tensor, Tensor]:
    """mean and rstd as differentiable functions of x."""
    moments = channel_moments(reference, lines(x), mask, mean.shape[1] if mean.dim() == 2 else None)
    if shared.group is not None:
        moments = statistics.over_ranks(moments, shared.group)
    return moments.mean, statistics.reciprocal_root(moments, eps)


def channel_gradients(
    backend: Backend,
    dout: Tensor,  # (B, C, S)
    x: Tensor,  # (B, C, S)
    mask: Tensor | None,  # (B, S)
    mean: Tensor,  # (C,) or (B, G)
    rstd: Tensor,  # as mean
    weight: Tensor | None,
    shared: Shared | None,
    needs: tuple[bool, bool],  # dx; dweight and dbias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias on the backward primitives; `shared` as in ChannelNorm."""
    per_sample, channels = mean.dim() == 2, x.shape[1]
    groups = mean.shape[1] if per_sample else None
    dtype = accumulation_dtype(x.dtype)
    mean, rstd = per_channel(mean, channels), per_channel(rstd, channels)
    center = mean.to(dtype)
    drift = mean - center.to(mean.dtype)  # what rounding took from the mean; see channel_vectors
    dx = sum_d = sum_d_xhat = None
    if needs[1] or (needs[0] and shared is not None):
        sum_d, sum_d_deviation = backend.channels_backward_moments(dout, x, center, mask, per_sample)
        sum_d_xhat = (sum_d_deviation - drift * sum_d) * rstd
    if needs[0]:
        a = rstd if weight is None else rstd * weight.to(rstd.dtype)
        if shared is None:
            dx = backend.channels_backward_affine(dout, None, None, a.to(dtype), None, None, mask)
        else:
            assert sum_d is not None
            assert sum_d_xhat is not None
            # dx = a * dout - rstd * (mean(dout * gain) + xhat * mean(dout * gain * xhat)), means over what shares
            # statistics, sorted by what multiplies (x - center)
            b, c = _pooled(-a * rstd * sum_d_xhat, -a * sum_d, groups, shared)
            c = c - b * drift
            dx = backend.channels_backward_affine(dout, x, center, a.to(dtype), b.to(dtype), c.to(dtype), mask)
        dx = dx.to(x.dtype)
    if per_sample and sum_d is not None and sum_d_xhat is not None:
        return dx, sum_d_xhat.sum(0), sum_d.sum(0)
    return dx, sum_d_xhat, sum_d


def _pooled(b: Tensor, c: Tensor, groups: int | None, shared: Shared) -> tuple[Tensor, Tensor]:
    """Sums of channels as means over what shares statistics: a sample's group of channels, or the batches of ranks."""
    channels, count = b.shape[-1], shared.count
    if groups is not None:
        grouped = (b.shape[0], groups, channels // groups)
        b, c = (per_channel(sums.reshape(grouped).sum(2), channels) for sums in (b, c))
    elif shared.group is not None:
        b, c = ranks.summed(torch.cat([b, c]), shared.group).chunk(2)
    n = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    return b / n, c / n


# Function.apply is Python around this: it binds defaults and unwraps what torch.func transforms leave behind, for 1 us
# of a call that takes 10. Used where the kernels have read the tensors' memory, and nothing was left to unwrap.
_apply_row_norm: Callable[..., Any] = super(torch.autograd.Function, RowNorm).apply
_apply_channel_norm: Callable[..., Any] = super(torch.autograd.Function, ChannelNorm).apply


def record_row_norm(
    backend: Backend,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """A row norm that backward will follow: (out, total), total being x without a residual."""
    out, total = RowNorm.apply(  # type: ignore[no-untyped-call]
        backend, x, residual, weight, bias, None, eps, centered, weight_offset
    )
    return out, x if total is None else total


def _record_computed(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    computed: Computed,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """What norm_now returns where it computed and a gradient is wanted."""
    pair = _apply_row_norm(backends.CPU, x, residual, weight, bias, [computed], eps, centered, weight_offset)
    only: Tensor = pair[0]
    return only if residual is None else pair


backends.recorders["norm"] = _record_computed


def record_channel_norm(
    backend: Backend,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shared: Shared | int | None,
    eps: float,
    out: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """`out` as ChannelNorm's result."""
    recorded: Tensor = _apply_channel_norm(backend, x, weight, bias, mean, rstd, shared, eps, [out], mask)
    return recorded


backends.recorders["batch_norm"] = partial(record_channel_norm, backends.CPU)  # what batch_norm_now computed
