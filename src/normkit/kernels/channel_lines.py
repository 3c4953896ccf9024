"""How the channel kernels go through (B, C, S): the two memory formats; for Triton folded samples and units of strides.

Here: `in_lines`, `in_layout`, `empty` for tensors on any device; `dense`, `geometry`, `strides`, `in_units`, pure
functions of shapes and strides.
May import: torch.
Read next: cpu.py, which calls the core; triton_channels.py, which launches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Strides = tuple[int, ...]


class Lines(NamedTuple):
    """How (B, C, S) tensors of one memory format are gone through."""

    batch: int
    channels: int
    space: int
    channels_last: bool
    folded: bool  # samples follow each other like positions, and are taken for them
    planes: int = 1  # positions of a channel that are taken for channels


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


def dense(shape: Shape, channels_last: bool) -> Strides:
    """The strides of (B, C, S) without gaps."""
    _, channels, space = shape
    return (space * channels, 1, channels) if channels_last else (channels * space, space, 1)


def empty(like: Tensor, channels_last: bool) -> Tensor:
    """New dense memory of `like`'s shape and dtype on its device, which need not be the default one."""
    strides = dense(like.shape, channels_last)
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)


def geometry(
    shape: Shape, of_strides: tuple[Strides, ...], channels_last: bool, foldable: bool, planes: bool = False
) -> Lines:
    """Of tensors of one shape and format; samples are folded into space where all of them allow it.

    With `planes`, for tensors dense within a sample, every position is a channel of its own and samples are positions.
    """
    batch, channels, space = shape
    if planes:
        return Lines(1, channels * space, batch, True, True, space)
    if foldable and channels_last:
        if space == 1:
            return Lines(1, channels, batch, True, True)
        if all(by_sample == space * by_position for by_sample, _, by_position in of_strides):
            return Lines(1, channels, batch * space, True, True)
    return Lines(batch, channels, space, channels_last, False)


def strides(of: Strides, shape: Shape, lines: Lines) -> tuple[int, int, int]:
    """From sample to sample, channel to channel, position to position."""
    by_sample, by_channel, by_position = of
    if lines.planes > 1:
        return 0, 1, by_sample
    if lines.channels == 1:
        by_channel = 1
    if lines.folded:
        return 0, by_channel, by_sample if shape[2] == 1 else by_position
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
    sizes: tuple[int, ...]  # of the units of space, and of strides by sample, channel and position


def in_units(lines: Lines, *of_tensors: tuple[int, int, int]) -> Units:
    unit_space = _unit(lines.space)
    sizes = tuple([_unit(*(steps[axis] for steps in of_tensors)) for axis in range(3)])
    steps = tuple([step // size for each in of_tensors for step, size in zip(each, sizes, strict=True)])
    return Units(lines.space // unit_space, steps, (unit_space, *sizes))
