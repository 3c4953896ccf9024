"""The formulas in plain torch: specification, oracle and fallback.

Here: the six primitives that every backend implements, and the split row forms, as differentiable torch
operations, so that they are also the composite that compilers, transforms and double backward go through.
May import: torch.
Read next: kernels/cpu.py, the same six functions on the compiled core.

Shapes: R rows, D normalized size, B batch, C channels, S space. Every norm is

    out = gamma * (x - mean) * rstd + beta,     rstd = 1 / sqrt(var + eps)

and its two families differ in which elements share `mean` and `var`: *rows* share them along the last axis of
(..., D), *channels* share them over B and S of (B, C, S), or over S alone (`per_sample`).
"""

from __future__ import annotations

import torch
from torch import Tensor

Count = int | Tensor  # a number without a mask; an int64 tensor, () or (B, 1), with one


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums and parameter gradients for input of `dtype`: never below float32."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


# ---------------------------------------------------------------------------------------------- rows


def rows_moments(total: Tensor, centered: bool) -> tuple[Tensor | None, Tensor]:
    """mean (..., 1) or None, and var (..., 1): about the mean if `centered`, about zero if not."""
    x = total.to(accumulation_dtype(total.dtype))
    mean = x.mean(-1, keepdim=True) if centered else None
    deviation = x if mean is None else x - mean
    return mean, (deviation * deviation).mean(-1, keepdim=True)


def gain(weight: Tensor, weight_offset: float, dtype: torch.dtype) -> Tensor:
    """What multiplies the normalized value: `weight + weight_offset`, in the accumulation dtype."""
    wide = weight.to(dtype)
    return wide + weight_offset if weight_offset else wide


def rows_affine(
    total: Tensor,
    mean: Tensor | None,  # (..., 1)
    rstd: Tensor,  # (..., 1)
    weight: Tensor | None,  # (D,)
    bias: Tensor | None,  # (D,)
    weight_offset: float,
) -> Tensor:
    """(total - mean) * rstd * (weight + weight_offset) + bias, rounded once to total's dtype."""
    x = total.to(rstd.dtype)
    out = (x if mean is None else x - mean) * rstd
    if weight is not None:
        out = out * gain(weight, weight_offset, rstd.dtype)
    if bias is not None:
        out = out + bias.to(rstd.dtype)
    return out.to(total.dtype)


def rows_forward(
    x: Tensor,  # (..., D)
    residual: Tensor | None,  # (..., D)
    weight: Tensor | None,  # (D,)
    bias: Tensor | None,  # (D,)
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """out (..., D), total = x + residual (..., D), mean (...) or None, rstd (...)."""
    total = x if residual is None else x + residual
    mean, var = rows_moments(total, centered)
    rstd = torch.rsqrt(var + eps)
    out = rows_affine(total, mean, rstd, weight, bias, weight_offset)
    return out, total, None if mean is None else mean.squeeze(-1), rstd.squeeze(-1)


def rows_backward_moments(
    dout: Tensor, total: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, weight_offset: float
) -> tuple[Tensor | None, Tensor]:
    """mean over D of g and of g * xhat, each (..., 1), where g = dout * gain and xhat = (total - mean) * rstd."""
    g, xhat = _rows_gradient(dout, total, mean, rstd, weight, weight_offset)
    return (None if mean is None else g.mean(-1, keepdim=True)), (g * xhat).mean(-1, keepdim=True)


def rows_backward_affine(
    dout: Tensor,
    total: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    weight_offset: float,
    mean_g: Tensor | None,
    mean_g_xhat: Tensor,
) -> Tensor:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), unrounded; without mean(g) when not centered."""
    g, xhat = _rows_gradient(dout, total, mean, rstd, weight, weight_offset)
    inner = g - xhat * mean_g_xhat
    return rstd * (inner if mean_g is None else inner - mean_g)


def _rows_gradient(
    dout: Tensor, total: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, weight_offset: float
) -> tuple[Tensor, Tensor]:
    dtype = rstd.dtype
    x = total.to(dtype)
    xhat = (x if mean is None else x - mean) * rstd
    g = dout.to(dtype)
    return (g if weight is None else g * gain(weight, weight_offset, dtype)), xhat


def rows_backward(
    dout: Tensor,  # (..., D)
    dtotal: Tensor | None,  # (..., D): the gradient that reaches `total` past the norm
    total: Tensor,  # (..., D)
    mean: Tensor | None,  # (...)
    rstd: Tensor,  # (...)
    weight: Tensor | None,  # (D,)
    weight_offset: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (= dresidual) in total's dtype, dweight (D,) and dbias (D,) in the accumulation dtype.

    None stands where `needs` (dx, dweight, dbias) says no.
    """
    mean = None if mean is None else mean.unsqueeze(-1)
    rstd = rstd.unsqueeze(-1)
    dx = dweight = dbias = None
    if needs[0]:
        sums = rows_backward_moments(dout, total, mean, rstd, weight, weight_offset)
        dx = rows_backward_affine(dout, total, mean, rstd, weight, weight_offset, *sums)
        if dtotal is not None:
            dx = dx + dtotal.to(dx.dtype)
        dx = dx.to(total.dtype)
    if needs[1] or needs[2]:
        d, xhat = _rows_gradient(dout, total, mean, rstd, None, 0.0)
        rows = tuple(range(d.dim() - 1))
        dweight = (_sum(d * xhat, rows)) if needs[1] else None
        dbias = _sum(d, rows) if needs[2] else None
    return dx, dweight, dbias


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims) if dims else x  # torch.sum over an empty tuple of dimensions sums over all of them


# ------------------------------------------------------------------------------------------ channels


def _per_channel(values: Tensor) -> Tensor:
    """(C,) or (B, C) -> (1, C, 1) or (B, C, 1), to stand beside (B, C, S)."""
    return values.unsqueeze(-1) if values.dim() == 2 else values.view(1, -1, 1)


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with its invalid positions at 0, whatever stood there: `where`, because 0 * NaN is NaN."""
    return x if mask is None else torch.where(mask.unsqueeze(1), x, torch.zeros((), dtype=x.dtype, device=x.device))


def channels_moments(
    x: Tensor,  # (B, C, S)
    mask: Tensor | None,  # (B, S) bool, True = valid
    per_sample: bool,
) -> tuple[Count, Tensor, Tensor]:
    """count, mean and m2 = sum((x - mean)^2), (C,) or with `per_sample` (B, C), float32 or wider.

    Two passes, never E[x^2] - E[x]^2. Without a valid element mean and m2 are 0.
    """
    dims = (2,) if per_sample else (0, 2)
    wide = _valid(x.to(accumulation_dtype(x.dtype)), mask)
    count: Count
    if mask is None:
        count = x.shape[2] * (1 if per_sample else x.shape[0])
        divisor: Count = max(count, 1)
    else:
        count = mask.sum(1, keepdim=True) if per_sample else mask.sum()
        divisor = count.clamp(min=1)
    mean = wide.sum(dims) / divisor
    deviation = _valid(wide - _per_channel(mean), mask)
    return count, mean, (deviation * deviation).sum(dims)


def channels_affine(
    x: Tensor,  # (B, C, S)
    center: Tensor,  # (C,) or (B, C), accumulation dtype, as are scale and shift
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None,  # (B, S)
) -> Tensor:
    """(x - center) * scale + shift in x's dtype and memory format; 0 at invalid positions."""
    wide = _valid(x.to(center.dtype), mask)
    out = (wide - _per_channel(center)) * _per_channel(scale) + _per_channel(shift)
    return _valid(out, mask).to(x.dtype)


def channels_backward_moments(
    dout: Tensor,  # (B, C, S)
    x: Tensor,  # (B, C, S)
    center: Tensor,  # (C,) or (B, C)
    mask: Tensor | None,  # (B, S)
    per_sample: bool,
) -> tuple[Tensor, Tensor]:
    """sum(dout) and sum(dout * (x - center)), (C,) or with `per_sample` (B, C)."""
    dims = (2,) if per_sample else (0, 2)
    d = _valid(dout.to(center.dtype), mask)
    deviation = _valid(x.to(center.dtype), mask) - _per_channel(center)
    return d.sum(dims), (d * deviation).sum(dims)


def channels_backward_affine(
    dout: Tensor,  # (B, C, S)
    x: Tensor | None,  # (B, C, S); not read when b is None
    center: Tensor | None,
    a: Tensor,  # (C,) or (B, C), accumulation dtype, as are b and c
    b: Tensor | None,
    c: Tensor | None,
    mask: Tensor | None,  # (B, S)
) -> Tensor:
    """dx = a * dout + b * (x - center) + c in dout's dtype; 0 at invalid positions.

    b and c are None together: fixed statistics, where dx = a * dout stays finite at x = inf, as in torch.
    """
    dx = _per_channel(a) * _valid(dout.to(a.dtype), mask)
    if b is not None:
        assert x is not None
        assert center is not None
        assert c is not None
        deviation = _valid(x.to(a.dtype), mask) - _per_channel(center)
        dx = _valid(dx + _per_channel(b) * deviation + _per_channel(c), mask)
    return dx.to(dout.dtype)
