"""Channel norms in Triton: the four channel primitives of the Backend protocol for CUDA tensors.

Here: from tensors to the kernels' arguments. Moments are taken by several programs for each channel and merged by
Chan's formula in a fixed order, in float64: no atomics, the same bits in every run.
May import: torch, reference (for the name of a count), launch, the kernels, triton_run.
Read next: triton_batch_norm.py, a whole BatchNorm in three launches; channel_kernels.py, the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.kernels import launch
from normkit.kernels.channel_kernels import (
    affine_kernel,
    backward_moments_kernel,
    merge_kernel,
    moments_kernel,
    sums_kernel,
)
from normkit.kernels.launch import ChannelTile
from normkit.kernels.triton_run import ACCUMULATION, SCALES, multiprocessors, run, triton_dtype
from normkit.reference import Count


class Lines(NamedTuple):
    """How (B, C, S) tensors of one memory format are gone through."""

    batch: int
    channels: int
    space: int
    channels_last: bool
    folded: bool  # samples follow each other like positions, and are taken for them


def in_lines(x: Tensor) -> tuple[Tensor, bool]:
    """x (B, C, S) with one contiguous axis of the two fast layouts, or its copy; and whether it is channels-last."""
    _, channels, space = x.shape
    _, channel_stride, space_stride = x.stride()
    if space_stride == 1 and space > 1:
        return x, False
    if channel_stride == 1 or channels == 1:
        return x, True
    return x.contiguous(), space == 1


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x itself if it lies as asked, or else its copy."""
    if channels_last:
        return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def empty(like: Tensor, channels_last: bool) -> Tensor:
    """New dense memory of `like`'s shape and dtype."""
    batch, channels, space = like.shape
    strides = (space * channels, 1, channels) if channels_last else (channels * space, space, 1)
    return torch.empty_strided((batch, channels, space), strides, dtype=like.dtype, device=like.device)


def geometry(channels_last: bool, foldable: bool, *tensors: Tensor) -> Lines:
    """Of tensors of one shape and format; samples are folded into space where all of them allow it."""
    batch, channels, space = tensors[0].shape
    if foldable and channels_last:
        if space == 1:
            return Lines(1, channels, batch, True, True)
        if all(x.stride(0) == space * x.stride(2) for x in tensors):
            return Lines(1, channels, batch * space, True, True)
    return Lines(batch, channels, space, channels_last, False)


def strides(x: Tensor, lines: Lines) -> tuple[int, int, int]:
    """From sample to sample, channel to channel, position to position."""
    by_sample, by_channel, by_position = x.stride()
    if lines.channels == 1:
        by_channel = 1
    if lines.folded:
        return 0, by_channel, by_sample if x.shape[2] == 1 else by_position
    if lines.channels_last:
        return by_sample, by_channel, by_position
    return by_sample, by_channel, 1


def _unit(*numbers: int) -> int:
    """The largest power of two, 16 at most, that divides all of them."""
    divisor = math.gcd(16, *numbers)
    return divisor & -divisor


class Units(NamedTuple):
    """Sizes and strides as the kernels take them: in units that divide all of them."""

    space: int
    steps: tuple[int, ...]  # by sample, channel and position of each tensor
    sizes: tuple[int, int, int, int]  # of the units of space, and of strides by sample, channel and position


def in_units(lines: Lines, *of_tensors: tuple[int, int, int]) -> Units:
    unit_space = _unit(lines.space)
    sizes = tuple(_unit(*(steps[axis] for steps in of_tensors)) for axis in range(3))
    steps = tuple(step // size for each in of_tensors for step, size in zip(each, sizes, strict=True))
    return Units(lines.space // unit_space, steps, (unit_space, *sizes))  # type: ignore[arg-type]


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


def partial_moments(x: Tensor, mask: Tensor | None, per_sample: bool) -> tuple[Tensor, int]:
    """count, mean and m2 (3, splits, units) of each program's share of x, and the number of units."""
    x, channels_last = in_lines(x)
    lines = geometry(channels_last, not per_sample, x)
    tile = launch.channels(lines.channels, lines.space, channels_last, x.element_size())
    splits = _splits(lines, tile, per_sample, x)
    units = lines.channels * (lines.batch if per_sample else 1)
    partial = torch.empty((3, splits, units), dtype=torch.float64, device=x.device)
    taken = in_units(lines, strides(x, lines))
    grid = (-(-lines.channels // tile.block_c), splits, lines.batch if per_sample else 1)
    numbers = (lines.batch, lines.channels, taken.space, *taken.steps, splits, units)
    constants = (
        per_sample,
        SCALES[x.dtype],
        triton_dtype(x.dtype),
        *taken.sizes,
        tile.block_c,
        tile.block_s,
        tile.stages,
    )
    run(moments_kernel, x, grid, x, packed(mask), partial, *numbers, *constants, num_warps=tile.warps)
    return partial, units


def _splits(lines: Lines, tile: ChannelTile, per_sample: bool, x: Tensor) -> int:
    grid = -(-lines.channels // tile.block_c) * (lines.batch if per_sample else 1)
    blocks = -(-lines.space // tile.block_s) * (1 if per_sample else lines.batch)
    return launch.splits(grid, blocks, multiprocessors(x))


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
    partial, units = partial_moments(x, mask, per_sample)
    _merge(merge_kernel, partial, mean, m2, units)
    return count, mean, m2


def _merge(kernel: Any, partial: Tensor, first: Tensor, second: Tensor, units: int) -> None:
    splits = partial.shape[1]
    block_p, block_u = launch.merging(splits)
    run(kernel, partial, (-(-units // block_u),), partial, first, second, splits, units, block_p, block_u, num_warps=4)


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
    second = x if x2 is None else x2
    lines = geometry(channels_last, vector_stride == 0, x, second, out)
    tile = launch.channels(lines.channels, lines.space, channels_last, x.element_size())
    taken = in_units(lines, strides(x, lines), strides(second, lines), strides(out, lines))
    blocks = -(-lines.channels // tile.block_c) * -(-lines.space // tile.block_s)
    numbers = (lines.batch, lines.channels, taken.space, *taken.steps, vector_stride)
    constants = (backward, channels_last, triton_dtype(x.dtype), *taken.sizes, tile.block_c, tile.block_s)
    pointers = (x, x2, packed(mask), *vectors, out)
    run(affine_kernel, x, (lines.batch * blocks,), *pointers, *numbers, *constants, num_warps=tile.warps)


def partial_sums(
    dout: Tensor, x: Tensor, center: Tensor, mask: Tensor | None, per_sample: bool, channels_last: bool
) -> tuple[Tensor, int]:
    """Both sums (2, splits, units) of each program's share, and the number of units."""
    lines = geometry(channels_last, not per_sample, dout, x)
    tile = launch.channels(lines.channels, lines.space, channels_last, x.element_size())
    splits = _splits(lines, tile, per_sample, x)
    units = lines.channels * (lines.batch if per_sample else 1)
    partial = torch.empty((2, splits, units), dtype=torch.float64, device=x.device)
    taken = in_units(lines, strides(dout, lines), strides(x, lines))
    grid = (-(-lines.channels // tile.block_c), splits, lines.batch if per_sample else 1)
    numbers = (lines.batch, lines.channels, taken.space, *taken.steps, splits, units)
    constants = (per_sample, triton_dtype(x.dtype), *taken.sizes, tile.block_c, tile.block_s, tile.stages)
    pointers = (dout, x, packed(mask), center, partial)
    run(backward_moments_kernel, x, grid, *pointers, *numbers, *constants, num_warps=tile.warps)
    return partial, units


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
        partial, units = partial_sums(in_layout(dout, channels_last), x, center, mask, per_sample, channels_last)
        _merge(sums_kernel, partial, sum_d, sum_d_deviation, units)
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
