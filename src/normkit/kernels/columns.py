"""Row norms on the compiled core where a row's elements lie apart: the channels of channels-first images, in place.

Here: `rows_forward` and `rows_backward` of the Backend protocol for x (B, ..., C) that is a channels-first (B, C, ...)
seen with its channels last; centered, without a residual and without an offset: LayerNorm over channels.
May import: torch, normkit._core, kernels.cpu.
Read next: csrc/columns.h, the arithmetic; _core.pyi, the signatures.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from normkit.kernels.cpu import _ACCUMULATION, _CODES, _address, _in_accumulation

with contextlib.suppress(ImportError):  # cpu.py says why, and no call comes here
    from normkit import _core


def suits(x: Tensor) -> bool:
    """Whether x (B, ..., C) is rather for these kernels than for rows of contiguous channels.

    It is where the positions lie side by side, and where neither they nor the channels do, and one copy must be made:
    a channels-first one, since such an x is mostly a piece of a channels-first image.
    """
    return x.shape[1:-1].numel() > 1 and (_reads(x) or x.stride(-1) != 1)


def _reads(x: Tensor) -> bool:
    """Whether the axes between the first and the last are contiguous among themselves."""
    step = 1
    for length, stride in zip(reversed(x.shape[1:-1]), reversed(x.stride()[1:-1]), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True


def _in_columns(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x (B, ..., C) read in place, or else its channels-first copy; address, stride of samples, stride of channels."""
    if not _reads(x):
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    strides = x.stride()
    return x, (_address(x), strides[0], strides[-1])


def _empty_like(x: Tensor) -> Tensor:
    """New channels-first memory for (B, ..., C), x's shape and dtype."""
    batch, *lengths, channels = x.shape
    strides, step = [1] * len(lengths), 1
    for i in reversed(range(len(lengths))):
        strides[i] = step
        step *= lengths[i]
    expected = (channels * step, *strides, step)
    if x.stride() == expected and (kept := _core.empty_like(x)) is not None:
        return kept
    return torch.empty_strided((batch, *lengths, channels), expected, dtype=x.dtype, device="cpu")


def rows_forward(
    x: Tensor,  # (B, ..., C)
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.rows_forward`, out in channels-first memory; mean and rstd in the accumulation dtype."""
    assert residual is None
    assert centered
    assert weight_offset == 0.0
    dtype = x.dtype
    x, x_lines = _in_columns(x)
    out = _empty_like(x)
    mean = torch.empty(x.shape[:-1], dtype=_ACCUMULATION[dtype], device="cpu")
    rstd = torch.empty_like(mean)
    if weight is not None:
        weight = _in_accumulation(weight, dtype)
    if bias is not None:
        bias = _in_accumulation(bias, dtype)
    _core.columns_forward(
        _CODES[dtype],
        x.shape[0],
        x.shape[-1],
        x.shape[1:-1].numel(),
        *x_lines,
        0 if weight is None else _address(weight),
        0 if weight is None else _CODES[weight.dtype],
        0 if bias is None else _address(bias),
        0 if bias is None else _CODES[bias.dtype],
        eps,
        out.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return out, x, mean, rstd


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
    """`reference.rows_backward`, dx in channels-first memory; what is not needed is not computed."""
    assert dtotal is None
    assert mean is not None
    dtype, channels = total.dtype, total.shape[-1]
    x, x_lines = _in_columns(total)
    dout, dout_lines = _in_columns(dout if dout.dtype == dtype else dout.to(dtype))
    # what was saved may come back changed, by saved_tensors_hooks or a weight whose data was replaced
    rstd = rstd.to(_ACCUMULATION[dtype]).contiguous()
    mean = mean.to(rstd.dtype).contiguous()
    if weight is not None:
        if weight.numel() != channels or dout.shape != x.shape:
            raise ValueError(
                f"normkit: backward needs what forward had, weight of {channels} elements, got {weight.numel()}; "
                "keep a layer's parameters until its backward is done"
            )
        weight = _in_accumulation(weight, dtype)
    assert rstd.shape == x.shape[:-1]
    dx = _empty_like(x) if needs[0] else None
    dweight = torch.empty(channels, dtype=rstd.dtype, device="cpu") if needs[1] else None
    dbias = torch.empty(channels, dtype=rstd.dtype, device="cpu") if needs[2] else None
    _core.columns_backward(
        _CODES[dtype],
        x.shape[0],
        channels,
        x.shape[1:-1].numel(),
        *dout_lines,
        *x_lines,
        mean.data_ptr(),
        rstd.data_ptr(),
        0 if weight is None else _address(weight),
        0 if weight is None else _CODES[weight.dtype],
        0 if dx is None else dx.data_ptr(),
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias
