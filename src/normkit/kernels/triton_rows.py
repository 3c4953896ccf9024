"""Row norms in Triton: `rows_forward` and `rows_backward` of the Backend protocol for CUDA tensors.

Here: from tensors to the kernels' arguments. A row that fits is read once and stays on chip; a longer one is read
twice. Backward keeps the sums of dweight and dbias in registers over the rows of a program, and a second kernel adds
the programs' sums in a fixed order: no atomics, the same bits in every run.
May import: torch, triton, reference, kernels.cpu (for the strides of rows), launch, the kernels.
Read next: launch.py, who chooses tiles and grids; row_kernels.py, the arithmetic.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from normkit import reference
from normkit.kernels import launch
from normkit.kernels.cpu import _empty_rows, _in_rows
from normkit.kernels.launch import RowTile
from normkit.kernels.long_row_kernels import long_dx_kernel, long_forward_kernel, long_parameters_kernel
from normkit.kernels.row_kernels import backward_kernel, forward_kernel, sum_kernel
from normkit.kernels.triton_run import ACCUMULATION, SCALES, multiprocessors, run, triton_dtype

_Axes = tuple[int, int, int]  # inner, outer stride, inner stride; see kernels.cpu._in_rows
_ABSENT = (1, 0, 0)


def _strided(x: Tensor) -> tuple[Tensor, _Axes, bool]:
    """x read in place as rows with up to two outer strides, or its copy; and whether there are two."""
    x, (_, inner, outer_stride, inner_stride) = _in_rows(x)
    two = outer_stride != 0 and x.numel() > inner * x.shape[-1]
    return x, (inner if two else 1, outer_stride if two else 0, inner_stride), two


def _optional(x: Tensor | None) -> tuple[Tensor | None, _Axes, bool]:
    return (None, _ABSENT, False) if x is None else _strided(x)


def _parameter(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.is_contiguous() else values.contiguous()


@cache
def _forward_plan(size: int, dtype: torch.dtype, centered: bool, eps: float, weight_offset: float) -> tuple[RowTile, Any]:
    """The tile, and the constants of a kernel."""
    tile = launch.rows_forward(size, dtype.itemsize, centered)
    numbers = (eps, weight_offset, centered, SCALES[dtype], triton_dtype(dtype), size)
    return tile, (*numbers, *((tile.block, tile.stages) if tile.block < size else (tile.block, tile.rows, tile.stages)))


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
    if x.numel() == 0:
        return reference.rows_forward(x, residual, weight, bias, eps, centered, weight_offset)
    dtype, shape, size = x.dtype, x.shape, x.shape[-1]
    x, x_axes, x_two = _strided(x)
    residual, residual_axes, residual_two = _optional(residual)
    out = _empty_rows(x)
    total = x if residual is None else torch.empty_like(out)
    rstd = x.new_empty(shape[:-1], dtype=ACCUMULATION[dtype])
    mean = torch.empty_like(rstd) if centered else None
    rows = rstd.numel()
    tensors = (x, residual, _parameter(weight), _parameter(bias), out, None if residual is None else total, mean, rstd)
    axes = (*x_axes, *residual_axes, x_two, residual_two)
    tile, constants = _forward_plan(size, dtype, centered, float(eps), float(weight_offset))
    if tile.block < size:
        run(long_forward_kernel, x, (rows,), *tensors, *axes, *constants, num_warps=tile.warps)
    else:
        grid = (launch.programs(-(-rows // tile.rows), multiprocessors(x), tile),)
        run(forward_kernel, x, grid, *tensors, rows, *axes, *constants, num_warps=tile.warps)
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
    narrow: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`reference.rows_backward`; the gradients of parameters in `narrow`, rounded once from the accumulation dtype."""
    if total.numel() == 0:
        return reference.rows_backward(dout, dtotal, total, mean, rstd, weight, weight_offset, needs)
    dtype, shape, size = total.dtype, total.shape, total.shape[-1]
    if (weight is not None and weight.numel() != size) or dout.shape != shape:
        raise ValueError(
            f"normkit: backward needs what forward had, weight of {size} elements, "
            f"got {None if weight is None else weight.numel()}; keep a layer's parameters until its backward is done"
        )
    total, total_axes, total_two = _strided(total)
    dout, dout_axes, dout_two = _strided(dout)
    dtotal, dtotal_axes, dtotal_two = _optional(dtotal if needs[0] else None)
    if rstd.dtype != ACCUMULATION[dtype] or not rstd.is_contiguous():  # saved_tensors_hooks may have changed them
        rstd = rstd.to(ACCUMULATION[dtype]).contiguous()
    if mean is not None and (mean.dtype != rstd.dtype or not mean.is_contiguous()):
        mean = mean.to(rstd.dtype).contiguous()
    weight = _parameter(weight)
    dx = _empty_rows(total) if needs[0] else None
    gradients = [rstd.new_empty(size, dtype=narrow or rstd.dtype) if need else None for need in needs[1:]]
    rows, parameters = rstd.numel(), needs[1] or needs[2]
    tile = launch.rows_backward(size, dtype.itemsize, mean is not None)
    axes = (*dout_axes, *dtotal_axes, *total_axes, dout_two, dtotal_two, total_two)
    acc, centered = triton_dtype(dtype), mean is not None
    statistics = (mean, rstd)
    if tile.block < size:
        if dx is not None:
            tensors = (dout, dtotal, total, *statistics, weight, dx)
            numbers = (float(weight_offset), centered, acc, size, tile.block, tile.stages)
            run(long_dx_kernel, total, (rows,), *tensors, *axes, *numbers, num_warps=tile.warps)
        if parameters:
            share = launch.long_parameters(size, dtype.itemsize, rows, multiprocessors(total))
            partial = rstd.new_empty((2, share.programs, size))
            axes = (*dout_axes, *total_axes, dout_two, total_two)
            numbers = (centered, *needs[1:], acc, size, share.block, share.stages)
            grid = (-(-size // share.block), share.programs)
            tensors = (dout, total, *statistics, partial)
            run(long_parameters_kernel, total, grid, *tensors, rows, *axes, *numbers, num_warps=share.warps)
            _add(partial, gradients)
    else:
        programs = launch.programs(-(-rows // tile.rows), multiprocessors(total), tile)
        partial = rstd.new_empty((2, programs, size)) if parameters else None
        tensors = (dout, dtotal, total, *statistics, weight, dx, partial)
        numbers = (float(weight_offset), centered, *needs[1:], acc, size, tile.block, tile.rows, tile.stages)
        run(backward_kernel, total, (programs,), *tensors, rows, *axes, *numbers, num_warps=tile.warps)
        if partial is not None:
            _add(partial, gradients)
    return dx, gradients[0], gradients[1]


def _add(partial: Tensor, gradients: list[Any]) -> None:
    """The programs' sums (2, programs, D) into dweight and dbias."""
    _, programs, size = partial.shape
    tile: RowTile = launch.partial_sums(size)
    grid = (-(-size // tile.block), 1 if gradients[1] is None else 2)
    run(sum_kernel, partial, grid, partial, *gradients, programs, size, tile.block, tile.rows, num_warps=tile.warps)
