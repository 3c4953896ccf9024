"""Channel norms in Triton: the four channel primitives of the Backend protocol for CUDA tensors.

Here: from tensors to the kernels' arguments. Moments are taken by several programs for each channel and merged by
Chan's formula in a fixed order, in float64: no atomics, the same bits in every run.
May import: torch, reference (for the name of a count), launch, channel_lines, the kernels, triton_run.
Read next: triton_batch_norm.py, a whole BatchNorm in a few launches; channel_kernels.py, the arithmetic.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.kernels import launch
from normkit.kernels.channel_kernels import affine_kernel, backward_moments_kernel, moments_kernel
from normkit.kernels.channel_lines import (
    Lines,
    Shape,
    Strides,
    empty,
    geometry,
    in_layout,
    in_lines,
    in_units,
    strides,
)
from normkit.kernels.merge_kernels import merge_kernel, sums_kernel
from normkit.kernels.triton_run import ACCUMULATION, SCALES, Launcher, multiprocessors, triton_dtype
from normkit.reference import Count


class _Plan(NamedTuple):
    """What calls with tensors of the same shapes, strides and dtype have in common."""

    launcher: Launcher
    device: int
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    partial: tuple[int, ...] = ()  # the shape of what reductions write: values, splits, units, planes


def forget_plans() -> None:
    """Calls plan their launches anew: for who tries other tiles than `launch` chooses."""
    for plan in (_reduction_plan, _affine_plan):
        plan.cache_clear()


def packed(mask: Tensor | None) -> Tensor | None:
    """A mask's bytes."""
    if mask is None:
        return None
    assert mask.dtype == torch.bool
    return mask.contiguous().view(torch.uint8)


def counted(x: Tensor, mask: Tensor | None, per_sample: bool) -> Count:
    if mask is None:
        return x.shape[2] * (1 if per_sample else x.shape[0])
    return mask.sum(1, keepdim=True) if per_sample else mask.sum()


def _lines(
    shape: Shape, of_strides: tuple[Strides, ...], dtype: torch.dtype, channels_last: bool, shared: bool, masked: bool
) -> Lines:
    """How tensors are gone through; what is known of a channel is `shared` by all samples or not."""
    batch, channels, space = shape
    planes = shared and not masked and not channels_last and launch.planes(batch, channels, space, dtype.itemsize)
    planes = planes and all(  # dense within a sample, which begins at 16 bytes
        by_channel == space and by_position == 1 and by_sample * dtype.itemsize % 16 == 0
        for by_sample, by_channel, by_position in of_strides
    )
    return geometry(shape, of_strides, channels_last, shared, planes)


@lru_cache(maxsize=1024)
def _reduction_plan(
    kernel: Any,
    shape: Shape,
    of_strides: tuple[Strides, ...],
    dtype: torch.dtype,
    channels_last: bool,
    per_sample: bool,
    masked: bool,
    device: int,
) -> _Plan:
    """Of moments (3 values) of one tensor, or of both sums (2) of two."""
    lines = _lines(shape, of_strides, dtype, channels_last, not per_sample, masked)
    tile = launch.reduction(lines.channels, lines.space, lines.channels_last, dtype.itemsize)
    samples = lines.batch if per_sample else 1
    blocks_c = -(-lines.channels // tile.block_c)
    blocks = -(-lines.space // tile.block_s) * (1 if per_sample else lines.batch)
    if lines.planes > 1:
        blocks = min(blocks, launch.plane_blocks(lines.space, dtype.itemsize))
    splits = launch.splits(blocks_c * samples, blocks, tile.programs * multiprocessors(device))
    units = lines.channels * samples
    taken = in_units(lines, *(strides(each, shape, lines) for each in of_strides))
    moments = kernel is moments_kernel
    planes = () if moments else (lines.planes,)
    numbers = (lines.batch, lines.channels, taken.space, *taken.steps, splits, units, *planes)
    scale = (SCALES[dtype],) if moments else ()
    constants = (per_sample, *scale, triton_dtype(dtype), *taken.sizes, tile.block_c, tile.block_s, tile.stages)
    launcher = Launcher(kernel, constants, tile.warps, tile.registers)
    partial = (3 if moments else 2, splits, units // lines.planes, lines.planes)
    return _Plan(launcher, device, (blocks_c, splits, samples), numbers, partial)


def partial_moments(x: Tensor, channels_last: bool, mask: Tensor | None, per_sample: bool) -> Tensor:
    """count, mean and m2 (3, splits, units, planes) of each program's share of x, as `channels_last` says it lies."""
    of = (x.shape, (x.stride(),), x.dtype, channels_last, per_sample, mask is not None, x.get_device())
    plan = _reduction_plan(moments_kernel, *of)
    partial = torch.empty(plan.partial, dtype=torch.float64, device=x.device)
    plan.launcher.launch(plan.device, plan.grid, (x, packed(mask), partial), plan.numbers)
    return partial


def partial_sums(
    dout: Tensor, x: Tensor, center: Tensor, channels_last: bool, mask: Tensor | None, per_sample: bool
) -> Tensor:
    """Sums of dout and of dout * (x - center) (2, splits, units, planes) of each program's share."""
    both = (dout.stride(), x.stride())
    of = (x.shape, both, x.dtype, channels_last, per_sample, mask is not None, x.get_device())
    plan = _reduction_plan(backward_moments_kernel, *of)
    partial = torch.empty(plan.partial, dtype=torch.float64, device=x.device)
    plan.launcher.launch(plan.device, plan.grid, (dout, x, packed(mask), center, partial), plan.numbers)
    return partial


@lru_cache(maxsize=64)
def _merge_launcher(kernel: Any, block_p: int, block_u: int) -> Launcher:
    return Launcher(kernel, (block_p, block_u), 4)


def merge(kernel: Any, partial: Tensor, *merged: Tensor | None) -> None:
    """One launch of a merging kernel, from all parts of each unit to what they are as one (units,)."""
    _, splits, units, planes = partial.shape
    block_p, block_u = launch.merging(splits * planes)
    launcher = _merge_launcher(kernel, block_p, block_u)
    launcher.launch(partial.get_device(), (-(-units // block_u),), (partial, *merged), (splits, units, planes))


def merged_first(partial: Tensor) -> Tensor:
    """Moments (3, splits, units, planes) in so few parts that one program can take all of them."""
    _, splits, units, planes = partial.shape
    if not launch.merged_first(splits, planes, units):
        return partial
    merged = partial.new_empty((3, 1, units, 1))
    merge(merge_kernel, partial, *merged.unbind())
    return merged


def channels_moments(x: Tensor, mask: Tensor | None, per_sample: bool) -> tuple[Count, Tensor, Tensor]:
    """`reference.channels_moments`; mean and m2 in float64."""
    batch, channels, _ = x.shape
    size = (batch, channels) if per_sample else (channels,)
    count = counted(x, mask, per_sample)
    if x.numel() == 0:
        zeros = torch.zeros(size, dtype=torch.float64, device=x.device)
        return count, zeros, torch.zeros_like(zeros)
    mean = torch.empty(size, dtype=torch.float64, device=x.device)
    m2 = torch.empty_like(mean)
    merge(merge_kernel, partial_moments(*in_lines(x), mask, per_sample), None, mean, m2)
    return count, mean, m2


def _vectors(dtype: torch.dtype, *vectors: Tensor | None) -> tuple[list[Tensor | None], int]:
    """(C,) or (B, C), all alike, in the accumulation dtype, and the stride from sample to sample."""
    dtype = ACCUMULATION[dtype]
    found = [None if vector is None else vector.to(dtype).contiguous() for vector in vectors]
    several = next(vector for vector in found if vector is not None)
    if any(vector is not None and vector.dim() != several.dim() for vector in found):  # a gain (C,) beside (B, C)
        shape = next(vector.shape for vector in found if vector is not None and vector.dim() == 2)
        found = [None if vector is None else vector.expand(shape).contiguous() for vector in found]
        several = next(vector for vector in found if vector is not None)
    return found, several.shape[1] if several.dim() == 2 else 0


def channels_affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
    """`reference.channels_affine`."""
    x, channels_last = in_lines(x)
    out = empty(x, channels_last)
    if x.numel() > 0:
        (center_v, scale_v, shift_v), stride = _vectors(x.dtype, center, scale, shift)
        affine(x, None, mask, (center_v, scale_v, shift_v, None), stride, out, channels_last)
    return out


@lru_cache(maxsize=1024)
def _affine_plan(
    shape: Shape,
    of_strides: tuple[Strides, ...],
    dtype: torch.dtype,
    channels_last: bool,
    vector_stride: int,
    backward: bool,
    masked: bool,
    device: int,
) -> _Plan:
    lines = _lines(shape, of_strides, dtype, channels_last, vector_stride == 0, masked)
    tile = launch.affine(lines.channels, lines.space, lines.channels_last, dtype.itemsize)
    taken = in_units(lines, *(strides(each, shape, lines) for each in of_strides))
    blocks = -(-lines.channels // tile.block_c) * -(-lines.space // tile.block_s)
    numbers = (lines.batch, lines.channels, taken.space, *taken.steps, vector_stride, lines.planes)
    constants = (backward, lines.channels_last, triton_dtype(dtype), *taken.sizes, tile.block_c, tile.block_s)
    return _Plan(Launcher(affine_kernel, constants, tile.warps), device, (lines.batch * blocks,), numbers)


def affine(
    x: Tensor,
    x2: Tensor | None,
    mask: Tensor | None,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    vector_stride: int,
    out: Tensor,
    channels_last: bool,
    backward: bool = False,
) -> None:
    """One launch of the affine kernel; x and x2 lie as `channels_last` says."""
    of_strides = (x.stride(), (x if x2 is None else x2).stride(), out.stride())
    of = (x.shape, of_strides, x.dtype, channels_last, vector_stride, backward, mask is not None, x.get_device())
    plan = _affine_plan(*of)
    plan.launcher.launch(plan.device, plan.grid, (x, x2, packed(mask), *vectors, out), plan.numbers)


def channels_backward_moments(
    dout: Tensor, x: Tensor, center: Tensor, mask: Tensor | None, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """`reference.channels_backward_moments`, in float64."""
    x, channels_last = in_lines(x)
    batch, channels, _ = x.shape
    size = (batch, channels) if per_sample else (channels,)
    sum_d = torch.zeros(size, dtype=torch.float64, device=x.device)
    sum_d_deviation = torch.zeros_like(sum_d)
    if x.numel() > 0:
        center = center.to(ACCUMULATION[x.dtype]).contiguous()
        partial = partial_sums(in_layout(dout, channels_last), x, center, channels_last, mask, per_sample)
        merge(sums_kernel, partial, sum_d, sum_d_deviation)
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
    if x is None:
        dout, channels_last = in_lines(dout)
    else:
        x, channels_last = in_lines(x)
        dout = in_layout(dout, channels_last)
    dx = empty(dout, channels_last)
    if dout.numel() > 0:
        (center_v, a_v, b_v, c_v), stride = _vectors(dout.dtype, center, a, b, c)
        affine(dout, x, mask, (center_v, a_v, b_v, c_v), stride, dx, channels_last, backward=True)
    return dx
