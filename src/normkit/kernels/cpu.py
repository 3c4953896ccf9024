"""The primitives on the compiled core: tensors to addresses, strides and dtype codes, one call into C++.

Plain contiguous tensors take a shorter way, the whole call in C++ (csrc/calls.cpp); it answers None for the others.
Both ways run the same kernels, to the same bits.

May import: torch, normkit._core, reference (for the name of a count), channel_lines.
Read next: csrc/rows.h, the arithmetic; _core.pyi, the signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from normkit.kernels.channel_lines import dense, empty, in_layout, in_lines
from normkit.reference import Count

recorders: dict[str, Callable[..., Any]] = {}  # autograd.py's, for calls.cpp
forced: ContextVar[str | None] = ContextVar("normkit_backend", default=None)  # backends.use_backend's; None: automatic

try:
    from normkit import _core
except ImportError as error:
    _off: str | None = f"the compiled core could not be imported: {error}"
else:
    _off = None
    if hasattr(Tensor, "__dlpack_c_exchange_api__"):  # torch 2.13 has it, 2.8 not; without it calls.cpp answers None
        _core.bind_torch(
            {
                "exchange_api": Tensor.__dlpack_c_exchange_api__,
                "Tensor": Tensor,
                "Parameter": torch.nn.Parameter,
                "is_grad_enabled": torch.is_grad_enabled,
                "num_threads": torch.get_num_threads,
                "empty_like": torch.empty_like,
                # what forbids a kernel, as backends.transformed() has it, and what wants to see the call
                "function_modes": torch._C._len_torch_function_stack,
                "dispatch_modes": torch._C._len_torch_dispatch_stack,
                "transforms": torch._C._functorch.peek_interpreter_stack,
                "tracing": torch._C._get_tracing_state,
                "forward_ad": forward_ad,
                "profiler": profiler,
                "forced": forced,
                "recorders": recorders,
                "increment_version": torch.autograd.graph.increment_version,
                "is_inference_enabled": torch.is_inference_mode_enabled,
            }
        )


def _never(*arguments: object) -> None:
    return None


# norm_now(x, residual, normalized_shape, weight, bias, eps, centered, weight_offset): a row norm checked and computed
# at once, and recorded where a gradient is wanted; out, or (out, total) with a residual. None where that cannot be: a
# tracer, transform, mode, profiler or another backend is in force, or an argument is not plain, or wrong. Not to be
# called while torch.compile traces. norm_backward_now is `rows_backward` in the same way.
# batch_norm_now(x, running_mean, running_var, weight, bias, training, momentum, eps, guarded) and
# batch_norm_backward_now are the same for BatchNorm: channels that fit a core's cache are read from memory once.
# Guarded, a batch with NaN or infinity is declined before anything is changed. sample_norm_now(x, groups, weight, bias,
# eps) is the same for statistics of each sample's groups of channels; backward is shared. No defs: a frame would cost
# 0.1 us of a call that takes 3.
norm_now: Callable[..., Any] = _never if _off else _core.norm_now
norm_backward_now: Callable[..., Any] = _never if _off else _core.norm_backward_now
batch_norm_now: Callable[..., Any] = _never if _off else _core.batch_norm_now
sample_norm_now: Callable[..., Any] = _never if _off else _core.sample_norm_now
batch_norm_backward_now: Callable[..., Any] = _never if _off else _core.batch_norm_backward_now

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACCUMULATION = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_ONE_AXIS = 1 << 62  # more rows than there are: the outer stride is not used
_ABSENT_ROWS = (0, 1, 0, 0)


def unavailable() -> str | None:
    """Why this backend is off on this machine, in a sentence; None if it is not."""
    return _off


def isa() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2 or baseline."""
    return _core.isa()


def openmp() -> bool:
    """Whether the core was built with threads."""
    return _core.openmp()


# ---------------------------------------------------------------------------------------------- rows


def _in_rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x (..., D) read in place as rows with two outer strides, or else its contiguous copy.

    The four numbers are (address, inner, outer_stride, inner_stride): row r starts at element
    (r // inner) * outer_stride + (r % inner) * inner_stride.
    """
    if x.is_contiguous():
        return x, (_address(x), _ONE_AXIS, 0, x.shape[-1])
    shape, strides = x.shape, x.stride()
    if shape[-1] > 1 and strides[-1] != 1:
        x = x.contiguous()
        return x, (_address(x), _ONE_AXIS, 0, shape[-1])
    axes: list[tuple[int, int]] = []  # (length, stride), innermost first, neighbours merged where one stride serves
    for length, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if length == 1:
            continue
        if axes and stride == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0] * length, axes[-1][1])
        else:
            axes.append((length, stride))
    if len(axes) > 2:
        x = x.contiguous()
        return x, (_address(x), _ONE_AXIS, 0, shape[-1])
    axes += [(1, 0)] * (2 - len(axes))
    (inner, inner_stride), (_, outer_stride) = axes
    return x, (_address(x), inner, outer_stride, inner_stride)


def _empty_rows(x: Tensor) -> Tensor:
    """New contiguous memory of x's shape and dtype; a torch.Size as argument would cost 0.6 us more than this."""
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _address(x: Tensor) -> int:
    address = x.data_ptr()
    assert address != 0 or x.numel() == 0, "a tensor without memory reached the compiled core"
    return address


def _in_accumulation(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous `values` in x's dtype or its accumulation dtype: the two that the core reads."""
    if values.dtype != dtype and values.dtype != _ACCUMULATION[dtype]:
        values = values.to(_ACCUMULATION[dtype])
    return values.contiguous()


def rows_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`reference.rows_forward`; mean and rstd in the accumulation dtype."""
    plain = _core.norm_recorded(x, residual, weight, bias, eps, centered, weight_offset)
    if plain is not None:
        return plain
    dtype, shape = x.dtype, x.shape
    x, x_rows = _in_rows(x)
    out = _empty_rows(x)
    total, residual_rows = x, _ABSENT_ROWS
    if residual is not None:
        assert residual.dtype == dtype and residual.shape == shape  # noqa: PT018
        residual, residual_rows = _in_rows(residual)
        total = _empty_rows(x)
    rstd = x.new_empty((*shape[:-1],), dtype=_ACCUMULATION[dtype])
    mean = torch.empty_like(rstd) if centered else None
    if weight is not None:
        weight = _in_accumulation(weight, dtype)
    if bias is not None:
        bias = _in_accumulation(bias, dtype)
    _core.rows_forward(
        _CODES[dtype],
        rstd.numel(),
        shape[-1],
        *x_rows,
        *residual_rows,
        0 if weight is None else _address(weight),
        0 if weight is None else _CODES[weight.dtype],
        0 if bias is None else _address(bias),
        0 if bias is None else _CODES[bias.dtype],
        eps,
        centered,
        weight_offset,
        out.data_ptr(),
        0 if residual is None else total.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return out, total, mean, rstd


def rows_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    weight_offset: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`reference.rows_backward`; what is not needed is not computed."""
    plain = _core.norm_backward(dout, dtotal, total, mean, rstd, weight, weight_offset, *needs, False)
    if plain is not None:
        return plain
    dtype, shape = total.dtype, total.shape
    total, total_rows = _in_rows(total)
    dout, dout_rows = _in_rows(dout if dout.dtype == dtype else dout.to(dtype))
    dtotal_rows = _ABSENT_ROWS
    if dtotal is not None and needs[0]:
        dtotal, dtotal_rows = _in_rows(dtotal if dtotal.dtype == dtype else dtotal.to(dtype))
    # what was saved may come back changed, by saved_tensors_hooks or a weight whose data was replaced
    rstd = rstd.to(_ACCUMULATION[dtype]).contiguous()
    mean = None if mean is None else mean.to(rstd.dtype).contiguous()
    if weight is not None:
        if weight.numel() != shape[-1] or dout.shape != shape:
            raise ValueError(
                f"normkit: backward needs what forward had, weight of {shape[-1]} elements, got {weight.numel()}; "
                "keep a layer's parameters until its backward is done"
            )
        weight = _in_accumulation(weight, dtype)
    assert rstd.shape == shape[:-1]
    dx = _empty_rows(total) if needs[0] else None
    dweight = rstd.new_empty(shape[-1]) if needs[1] else None
    dbias = rstd.new_empty(shape[-1]) if needs[2] else None
    _core.rows_backward(
        _CODES[dtype],
        rstd.numel(),
        shape[-1],
        *dout_rows,
        *dtotal_rows,
        *total_rows,
        0 if mean is None else mean.data_ptr(),
        rstd.data_ptr(),
        0 if weight is None else _address(weight),
        0 if weight is None else _CODES[weight.dtype],
        weight_offset,
        0 if dx is None else dx.data_ptr(),
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias


# ------------------------------------------------------------------------------------------ channels


def _empty(like: Tensor, channels_last: bool) -> Tensor:
    """New dense memory of `like`'s shape and dtype: a kept block where it is large and `like` lies as asked."""
    if like.stride() == dense(like.shape, channels_last) and (kept := _core.empty_like(like)) is not None:
        return kept
    return empty(like, channels_last)


def _lines(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """Address, stride from sample to sample, stride from line to line."""
    strides = x.stride()
    return _address(x), strides[0], strides[2] if channels_last else strides[1]


def _values(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(C,) or (B, C) in the accumulation dtype, and the stride from sample to sample."""
    values = values.to(_ACCUMULATION[dtype]).contiguous()
    return values, values.shape[1] if values.dim() == 2 else 0


def _mask(mask: Tensor | None) -> tuple[Tensor | None, int]:
    if mask is None:
        return None, 0
    assert mask.dtype == torch.bool
    mask = mask.contiguous()
    return mask, _address(mask)


def channels_moments(x: Tensor, mask: Tensor | None, per_sample: bool) -> tuple[Count, Tensor, Tensor]:
    """`reference.channels_moments`; mean and m2 in float64."""
    x, channels_last = in_lines(x)
    batch, channels, space = x.shape
    mask, mask_address = _mask(mask)
    count: Count
    if mask is None:
        count = space if per_sample else batch * space
    else:
        count = mask.sum(1, keepdim=True) if per_sample else mask.sum()
    size = (batch, channels) if per_sample else (channels,)
    mean = torch.empty(size, dtype=torch.float64, device="cpu")
    m2 = torch.empty(size, dtype=torch.float64, device="cpu")
    _core.channels_moments(
        _CODES[x.dtype],
        batch,
        channels,
        space,
        channels_last,
        mask_address,
        per_sample,
        *_lines(x, channels_last),
        mean.data_ptr(),
        m2.data_ptr(),
        torch.get_num_threads(),
    )
    return count, mean, m2


def channels_affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
    """`reference.channels_affine`."""
    dtype = x.dtype
    x, channels_last = in_lines(x)
    mask, mask_address = _mask(mask)
    center, center_stride = _values(center, dtype)
    scale, scale_stride = _values(scale, dtype)
    shift, shift_stride = _values(shift, dtype)
    out = _empty(x, channels_last)
    batch, channels, space = x.shape
    _core.channels_affine(
        _CODES[dtype],
        batch,
        channels,
        space,
        channels_last,
        mask_address,
        *_lines(x, channels_last),
        _address(center),
        center_stride,
        _address(scale),
        scale_stride,
        _address(shift),
        shift_stride,
        *_lines(out, channels_last),
        torch.get_num_threads(),
    )
    return out


def channels_backward_moments(
    dout: Tensor, x: Tensor, center: Tensor, mask: Tensor | None, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """`reference.channels_backward_moments`, in float64."""
    dtype = x.dtype
    x, channels_last = in_lines(x)
    dout = in_layout(dout if dout.dtype == dtype else dout.to(dtype), channels_last)
    batch, channels, space = x.shape
    mask, mask_address = _mask(mask)
    center, center_stride = _values(center, dtype)
    size = (batch, channels) if per_sample else (channels,)
    sum_d = torch.empty(size, dtype=torch.float64, device="cpu")
    sum_d_deviation = torch.empty(size, dtype=torch.float64, device="cpu")
    _core.channels_backward_moments(
        _CODES[dtype],
        batch,
        channels,
        space,
        channels_last,
        mask_address,
        per_sample,
        *_lines(dout, channels_last),
        *_lines(x, channels_last),
        _address(center),
        center_stride,
        sum_d.data_ptr(),
        sum_d_deviation.data_ptr(),
        torch.get_num_threads(),
    )
    return sum_d, sum_d_deviation


def channels_backward_affine(
    dout: Tensor,
    x: Tensor | None,
    center: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`reference.channels_backward_affine`; without b, x is not read."""
    dtype = dout.dtype
    mask, mask_address = _mask(mask)
    a, a_stride = _values(a, dtype)
    if b is None:
        dout, channels_last = in_lines(dout)
        x_lines = (0, 0, 0)
        vectors = (0, 0, _address(a), a_stride, 0, 0, 0, 0)
    else:
        assert x is not None
        assert center is not None
        assert c is not None
        x, channels_last = in_lines(x if x.dtype == dtype else x.to(dtype))
        dout = in_layout(dout, channels_last)
        x_lines = _lines(x, channels_last)
        center, center_stride = _values(center, dtype)
        b, b_stride = _values(b, dtype)
        c, c_stride = _values(c, dtype)
        vectors = (
            _address(center),
            center_stride,
            _address(a),
            a_stride,
            _address(b),
            b_stride,
            _address(c),
            c_stride,
        )
    dx = _empty(dout if x is None else x, channels_last)
    batch, channels, space = dout.shape
    _core.channels_backward_affine(
        _CODES[dtype],
        batch,
        channels,
        space,
        channels_last,
        mask_address,
        *_lines(dout, channels_last),
        *x_lines,
        *vectors,
        *_lines(dx, channels_last),
        torch.get_num_threads(),
    )
    return dx
