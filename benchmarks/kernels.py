"""The compiled core called on preallocated memory: addresses and strides as kernels/cpu.py passes them, and no more.

Here: one function per task that returns a call without arguments. The only benchmark module that knows the
signatures in _core.pyi.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from normkit import _core

EPS = 1e-5
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ABSENT_ROWS = (0, 1, 0, 0)
_ONE_AXIS = 1 << 62


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of parameter gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _call(function: Callable[..., None], arguments: tuple[object, ...], *memory: Tensor | None) -> Callable[[], None]:
    """A call that keeps the memory alive behind the addresses it passes."""
    call = partial(function, *arguments)
    call.memory = memory  # type: ignore[attr-defined]
    return call


def _parameter(values: Tensor | None) -> tuple[int, int]:
    return (0, 0) if values is None else (values.data_ptr(), _CODES[values.dtype])


def _rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address, inner, outer stride, inner stride of contiguous rows, or of q in a fused qkv: (B, S, H, D) in place."""
    if x is None:
        return _ABSENT_ROWS
    if x.is_contiguous():
        return x.data_ptr(), _ONE_AXIS, 0, x.shape[-1]
    batch, length, heads, _ = x.shape
    assert x.stride(-1) == 1
    assert batch == 1 or x.stride(0) == length * x.stride(1), "batch and length must merge into one axis"
    return x.data_ptr(), heads, x.stride(1), x.stride(2)


def _statistics(x: Tensor, centered: bool) -> tuple[Tensor | None, Tensor]:
    rstd = torch.empty(x.shape[:-1], dtype=accumulation(x.dtype))
    return (torch.empty_like(rstd) if centered else None), rstd


def rows_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centered: bool, threads: int
) -> Callable[[], None]:
    """out, mean and rstd of a row norm; with a residual also total."""
    mean, rstd = _statistics(x, centered)
    return _rows_forward(x, residual, weight, bias, mean, rstd, threads)


def _rows_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    threads: int,
) -> Callable[[], None]:
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty_like(out)
    arguments = (
        _CODES[x.dtype],
        rstd.numel(),
        x.shape[-1],
        *_rows(x),
        *_rows(residual),
        *_parameter(weight),
        *_parameter(bias),
        EPS,
        mean is not None,
        0.0,
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        rstd.data_ptr(),
        threads,
    )
    return _call(_core.rows_forward, arguments, x, residual, weight, bias, mean, rstd, out, total)


def rows_backward(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, biased: bool, centered: bool, threads: int
) -> Callable[[], None]:
    """dx, dweight and, if `biased`, dbias."""
    mean, rstd = _statistics(total, centered)
    _rows_forward(total, None, weight, None, mean, rstd, threads)()
    dx = torch.empty(total.shape, dtype=total.dtype)
    dweight = rstd.new_empty(total.shape[-1])
    dbias = torch.empty_like(dweight) if biased else None
    arguments = (
        _CODES[total.dtype],
        rstd.numel(),
        total.shape[-1],
        *_rows(dout),
        *_rows(dtotal),
        *_rows(total),
        0 if mean is None else mean.data_ptr(),
        rstd.data_ptr(),
        *_parameter(weight),
        0.0,
        dx.data_ptr(),
        dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        threads,
    )
    return _call(_core.rows_backward, arguments, dout, dtotal, total, mean, rstd, weight, dx, dweight, dbias)


def _three(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C, S), a view."""
    return x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)


def _lines(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(2 if channels_last else 1)


def _head(x: Tensor) -> tuple[tuple[object, ...], bool]:
    """dtype, batch, channels, space, channels_last and no mask; and whether it is channels-last."""
    channels_last = x.stride(1) == 1
    return (_CODES[x.dtype], *x.shape, channels_last, 0), channels_last


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd (C,) of x (B, C, S), by torch, in the accumulation dtype."""
    wide = x.to(accumulation(x.dtype))
    return wide.mean((0, 2)), torch.rsqrt(wide.var((0, 2), correction=0) + EPS)


def channels_forward(x: Tensor, weight: Tensor, bias: Tensor, training: bool, threads: int) -> Callable[[], None]:
    """The batch's moments if `training`, then the affine with vectors computed beforehand, as for given statistics."""
    out = _three(torch.empty_like(x))
    x = _three(x)
    center, rstd = _channel_statistics(x)
    scale, shift = rstd * weight.to(rstd.dtype), bias.to(rstd.dtype, copy=True)
    head, channels_last = _head(x)
    vectors = [number for vector in (center, scale, shift) for number in (vector.data_ptr(), 0)]
    affine = _call(
        _core.channels_affine,
        (*head, *_lines(x, channels_last), *vectors, *_lines(out, channels_last), threads),
        *(x, out, center, scale, shift),
    )
    if not training:
        return affine
    mean, m2 = (torch.empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    moments = _call(
        _core.channels_moments,
        (*head, False, *_lines(x, channels_last), mean.data_ptr(), m2.data_ptr(), threads),
        *(x, mean, m2),
    )
    return _both(moments, affine)


def channels_backward(dout: Tensor, x: Tensor, weight: Tensor, threads: int) -> Callable[[], None]:
    """The two sums of a training backward, then dx with vectors computed beforehand."""
    dx = _three(torch.empty_like(x))
    x, dout = _three(x), _three(dout)
    center, rstd = _channel_statistics(x)
    a, b, c = rstd * weight.to(rstd.dtype), -0.01 * rstd, 0.01 * rstd  # any vectors: time does not depend on them
    head, channels_last = _head(x)
    sums = [torch.empty(x.shape[1], dtype=torch.float64) for _ in range(2)]
    both = (*_lines(dout, channels_last), *_lines(x, channels_last))
    moments = _call(
        _core.channels_backward_moments,
        (*head, False, *both, center.data_ptr(), 0, *(values.data_ptr() for values in sums), threads),
        *(dout, x, center, *sums),
    )
    vectors = [number for vector in (center, a, b, c) for number in (vector.data_ptr(), 0)]
    affine = _call(
        _core.channels_backward_affine,
        (*head, *both, *vectors, *_lines(dx, channels_last), threads),
        *(dout, x, dx, center, a, b, c),
    )
    return _both(moments, affine)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call
