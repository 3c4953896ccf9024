"""Row norms in Triton: `rows_forward` and `rows_backward` of the Backend protocol for CUDA tensors.

Here: from tensors to the kernels' arguments. A row that fits is read once and stays on chip; of a longer one, what does
not fit is read again. Backward keeps the sums of dweight and dbias in registers over the rows of a program, and another
kernel adds the programs' sums in a fixed order: no atomics, the same bits in every run.
May import: torch, triton, reference, kernels.cpu (for the strides of rows), launch, the kernels.
Read next: launch.py, who chooses tiles and grids; row_kernels.py, the arithmetic.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit import reference
from normkit.kernels import launch
from normkit.kernels.cpu import _empty_rows, _in_rows
from normkit.kernels.launch import RowTile
from normkit.kernels.long_backward_kernels import long_backward_kernel, long_columns_kernel, long_means_kernel
from normkit.kernels.long_forward_kernels import long_forward_kernel
from normkit.kernels.row_kernels import backward_kernel, forward_kernel, sum_kernel
from normkit.kernels.triton_run import (
    ACCUMULATION,
    SCALES,
    Launcher,
    contiguous,
    multiprocessors,
    shared_bytes,
    triton_dtype,
)

_Axes = tuple[int, int, int]  # inner, outer stride, inner stride; see kernels.cpu._in_rows
_ABSENT = (1, 0, 0)


def _strided(x: Tensor) -> tuple[Tensor, _Axes, bool]:
    """x read in place as rows with up to two outer strides, or its copy; and whether there are two."""
    if x.is_contiguous():
        return x, (1, 0, x.shape[-1]), False
    x, (_, inner, outer_stride, inner_stride) = _in_rows(x)
    two = x.numel() > inner * x.shape[-1]
    return x, (inner if two else 1, outer_stride if two else 0, inner_stride), two


def _optional(x: Tensor | None) -> tuple[Tensor | None, _Axes, bool]:
    return (None, _ABSENT, False) if x is None else _strided(x)


def _parameter(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """weight or bias as the kernels take it: no wider than what they compute in."""
    acc = ACCUMULATION[dtype]
    return contiguous(values if values is None or values.dtype.itemsize <= acc.itemsize else values.to(acc))


class _Plan(NamedTuple):
    """What calls with rows of one size and dtype have in common."""

    tile: RowTile
    launcher: Launcher
    device: int
    multiprocessors: int

    def programs(self, rows: int) -> int:
        return launch.programs(-(-rows // self.tile.rows), self.multiprocessors, self.tile)


@lru_cache(maxsize=1024)
def _forward_plan(
    size: int, dtype: torch.dtype, centered: bool, eps: float, weight_offset: float, added: bool, two: Any, device: int
) -> _Plan:
    """`two`: whether x, and whether residual, have two outer strides."""
    tile = launch.rows_forward(size, dtype.itemsize, centered)
    numbers = (*two, eps, weight_offset, centered, SCALES[dtype], triton_dtype(dtype), size)
    tensors, itemsize, shared = (2 if added else 1), dtype.itemsize, shared_bytes(device)
    if tile.block < size:
        kept = tile.kept(size, itemsize)
        # x and residual of a row, what is fetched again of the row before it, weight and bias, which may be wider
        tensors += (kept * tile.block < size) + (4 if itemsize == 2 else 2)
        tile = launch.fitting(tile, tensors, itemsize, shared)
        launcher = Launcher(long_forward_kernel, (*numbers, tile.block, kept, tile.stages), tile.warps)
    else:
        tile = launch.fitting(tile, tensors, itemsize, shared)
        launcher = Launcher(forward_kernel, (*numbers, tile.block, tile.rows, tile.stages), tile.warps)
    return _Plan(tile, launcher, device, multiprocessors(device))


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
    dtype, shape = x.dtype, x.shape
    x, x_axes, x_two = _strided(x)
    residual, residual_axes, residual_two = _optional(residual)
    out = _empty_rows(x)
    total = None if residual is None else torch.empty_like(out)
    rstd = x.new_empty(shape[:-1], dtype=ACCUMULATION[dtype])
    mean = torch.empty_like(rstd) if centered else None
    rows = rstd.numel()
    plan = _forward_plan(
        shape[-1], dtype, centered, float(eps), float(weight_offset), total is not None, (x_two, residual_two),
        x.get_device(),
    )  # fmt: skip
    pointers = (x, residual, _parameter(weight, dtype), _parameter(bias, dtype), out, total, mean, rstd)
    plan.launcher.launch(plan.device, (plan.programs(rows),), pointers, (rows, *x_axes, *residual_axes))
    return out, x if total is None else total, mean, rstd


class _Backward(NamedTuple):
    """The kinds of a backward: which inputs there are and which gradients are needed."""

    size: int
    dtype: torch.dtype
    weight_offset: float
    centered: bool
    added: bool
    needs: tuple[bool, bool, bool]
    two: tuple[bool, bool, bool]  # whether dout, dtotal and total have two outer strides
    device: int

    @property
    def constants(self) -> tuple[Any, ...]:
        needs = self.needs[1:]
        return *self.two, self.weight_offset, self.centered, *needs, triton_dtype(self.dtype), self.size


@lru_cache(maxsize=1024)
def _backward_plan(of: _Backward) -> _Plan:
    """Of all gradients in one launch; a tile without programs: they take two, and this is none of them."""
    tile = launch.rows_backward(of.size, of.dtype.itemsize, of.centered)
    itemsize, shared = of.dtype.itemsize, shared_bytes(of.device)
    if tile.block < of.size:
        # two rows of dout and of total, and a weight that may be as wide again
        tile = launch.fitting(tile, (5 if of.added else 4) + (2 if itemsize == 2 else 1), itemsize, shared)
        launcher = Launcher(long_backward_kernel, (*of.constants, tile.block, tile.stages), tile.warps)
    else:
        tile = launch.fitting(tile, 3 if of.added else 2, itemsize, shared)
        constants = (*of.constants, tile.block, tile.rows, tile.stages, tile.again)
        launcher = Launcher(backward_kernel, constants, tile.warps)
    return _Plan(tile, launcher, of.device, multiprocessors(of.device))


@lru_cache(maxsize=1024)
def _means_plan(of: _Backward) -> _Plan:
    """Of what dx needs to know of each long row."""
    tile = launch.rows_backward(of.size, of.dtype.itemsize, of.centered)
    dtype = triton_dtype(of.dtype)
    constants = (of.two[0], of.two[2], of.weight_offset, of.centered, dtype, of.size, tile.block, tile.stages)
    return _Plan(tile, Launcher(long_means_kernel, constants, tile.warps), of.device, 0)


@lru_cache(maxsize=1024)
def _columns_plan(of: _Backward) -> _Plan:
    """Of the gradients of long rows, by columns."""
    tile = launch.long_columns(of.size, multiprocessors(of.device))
    launcher = Launcher(long_columns_kernel, (*of.constants, tile.block, tile.stages), tile.warps)
    return _Plan(tile, launcher, of.device, 0)


@lru_cache(maxsize=1024)
def _sum_plan(size: int, device: int) -> _Plan:
    tile = launch.partial_sums(size)
    return _Plan(tile, Launcher(sum_kernel, (size, tile.block, tile.rows), tile.warps), device, 0)


def forget_plans() -> None:
    """Calls plan their launches anew: for who tries other tiles than `launch` chooses."""
    for plan in (_forward_plan, _backward_plan, _means_plan, _columns_plan, _sum_plan):
        plan.cache_clear()


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
    if total.numel() == 0 or not any(needs):
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
    acc = ACCUMULATION[dtype]
    if rstd.dtype != acc or not rstd.is_contiguous():  # saved_tensors_hooks may have changed them
        rstd = rstd.to(acc).contiguous()
    if mean is not None and (mean.dtype != acc or not mean.is_contiguous()):
        mean = mean.to(acc).contiguous()
    weight = _parameter(weight, dtype)
    dx = _empty_rows(total) if needs[0] else None
    gradients = [rstd.new_empty(size, dtype=narrow or acc) if need else None for need in needs[1:]]
    rows, device = rstd.numel(), total.get_device()
    two = (dout_two, dtotal_two, total_two)
    of = _Backward(size, dtype, float(weight_offset), mean is not None, dtotal is not None, needs, two, device)
    plan = _backward_plan(of)
    axes = (*dout_axes, *dtotal_axes, *total_axes)
    at_once = plan.tile.programs > 0 and (needs[0] or plan.tile.block >= size)
    if not at_once:
        plan = _columns_plan(of)
    programs = plan.programs(rows) if at_once else min(rows, plan.tile.programs)
    partial = rstd.new_empty((2, programs, size)) if needs[1] or needs[2] else None
    pointers = (dout, dtotal, total, mean, rstd, weight, dx, partial)
    if at_once:
        plan.launcher.launch(device, (programs,), pointers, (rows, *axes))
    else:
        means = None
        if needs[0]:
            means = rstd.new_empty((2, rows))
            _means_plan(of).launcher.launch(
                device, (rows,), (dout, total, mean, rstd, weight, means), (rows, *dout_axes, *total_axes)
            )
        grid = (-(-size // plan.tile.block), programs)
        plan.launcher.launch(device, grid, (*pointers, means), (rows, *axes))
    if partial is not None:
        plan = _sum_plan(size, device)
        grid = (-(-size // plan.tile.block), 2 if needs[2] else 1)
        plan.launcher.launch(device, grid, (partial, *gradients), (programs,))
    return dx, gradients[0], gradients[1]
