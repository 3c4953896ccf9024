"""How the Triton kernels are launched: pure functions of sizes and dtypes, with the measurement beside each number.

Here: tiles, warps and grids of the row kernels and of the channel kernels; nothing of torch or triton, so that every
choice is tested without a GPU.
May import: nothing.
Read next: triton_rows.py and triton_channels.py, which launch.

A choice depends on the normalized size and the dtype, never on the number of rows: a row's sum is taken in the same
order whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`, at least 1."""
    return 1 << max(size - 1, 0).bit_length()


# ---------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class RowTile:
    """What a program works on at a time: `rows` rows of `block` elements, by `warps` warps."""

    rows: int
    block: int  # below the row's size where a row does not stay on chip
    warps: int
    stages: int = 0  # of the pipeline of a program that takes tiles in turn; 0: it takes one
    programs: int = 0  # per multiprocessor, each taking tiles in turn; 0: one for each tile


# Bytes of the longest row that forward keeps on chip: more spills (tests/test_triton_offline.py compiles the limits).
_LONGEST_FORWARD = 1 << 16
_LONGEST_BACKWARD = 1 << 15


def rows_forward(size: int, itemsize: int) -> RowTile:
    """For rows of `size` elements of `itemsize` bytes."""
    block = power_of_two(size)
    if block * itemsize > _LONGEST_FORWARD:
        return RowTile(1, 8192 * 4 // max(itemsize, 4), 16, stages=1)
    tile = 4096 // itemsize  # elements of 4 KiB, a warp's share is 1 KiB
    rows = max(1, tile // block)
    return RowTile(rows, block, min(max(rows * block * itemsize // 1024, 1), 32))


def rows_backward(size: int, itemsize: int, centered: bool, parameters: bool) -> RowTile:
    """For rows of `size` elements of `itemsize` bytes; the sums of parameters' gradients are 4 bytes an element."""
    block = power_of_two(size)
    if block * itemsize > _LONGEST_BACKWARD:
        return RowTile(1, 4096 * 4 // max(itemsize, 4), 16, stages=1)
    rows = max(1, 2048 // block)
    warps = min(max(rows * block // 512, 1), 32)
    return RowTile(rows, block, warps, stages=2, programs=max(1, 32 // warps))


def programs(tiles: int, multiprocessors: int, tile: RowTile) -> int:
    """How many programs share the tiles: one for each, or what the device holds at once."""
    return min(tiles, multiprocessors * tile.programs) if tile.programs else tiles


def long_parameters(size: int, itemsize: int, rows: int, multiprocessors: int) -> RowTile:
    """For the parameters' gradients of long rows: `programs` in all share the rows of each block of columns."""
    block = 1024
    programs = max(1, min(rows, 4 * multiprocessors * block // size))
    return RowTile(1, block, 4, stages=3, programs=programs)


def partial_sums(size: int) -> RowTile:
    """For the sum over programs, `rows` of them at a time."""
    block = min(power_of_two(size), 32)
    return RowTile(64, block, 4)


# ------------------------------------------------------------------------------------------ channels


@dataclass(frozen=True)
class ChannelTile:
    """What a program works on at a time: `block_c` channels at `block_s` positions, by `warps` warps."""

    block_c: int
    block_s: int
    warps: int
    stages: int = 1


_TILE = 4096  # elements: with 8 warps a thread has 16 of them, 2 to 4 loads of 16 bytes at once
_WASTE = 0.15  # of a block's positions may lie beyond the last one


def channels(channels: int, space: int, channels_last: bool, itemsize: int) -> ChannelTile:
    """For (B, C, S) of `channels` and `space` in either memory format."""
    if channels_last:
        block_c = min(power_of_two(channels), 256 // itemsize)
        block_s = min(power_of_two(space), _TILE // block_c)
    else:
        block_s = position_block(space)
        block_c = min(power_of_two(channels), _TILE // block_s)
    return ChannelTile(block_c, block_s, max(1, min(8, block_c * block_s // 512)))


def position_block(space: int) -> int:
    """The widest power of two up to 1024 of which not too much lies beyond the last position of a sample."""
    block = min(power_of_two(space), 1024)
    while block > 64 and 1 - space / (-(-space // block) * block) > _WASTE:
        block //= 2
    return block


def splits(grid: int, blocks: int, multiprocessors: int) -> int:
    """How many programs share a channel's `blocks`, where `grid` programs would take one for each block of channels."""
    return max(1, min(blocks, -(-4 * multiprocessors // grid)))


def merging(splits: int) -> tuple[int, int]:
    """How many splits and how many channels a program merges at a time."""
    block = min(power_of_two(splits), 64)
    return block, max(1, 512 // block)
