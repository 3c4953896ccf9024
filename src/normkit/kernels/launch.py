"""How the Triton kernels are launched: pure functions of sizes and dtypes, with the measurement beside each number.

Here: tiles, warps and grids of the row kernels and of the channel kernels; nothing of torch or triton, so that every
choice is tested without a GPU.
May import: nothing.
Read next: triton_rows.py and triton_channels.py, which launch.

A choice depends on the normalized size and the dtype, never on the number of rows: a row's sum is taken in the same
order whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Up to so many bytes of x torch's own norm is called instead (results/gpu.md, an H200). Rows: in a loop of nothing but
# norms torch's calls return sooner up to 2^25 bytes forward and 2^26 with backward (37 us of ours on the host, torch
# 11; 240 and 110), but on the device its kernels take 0.9 to 2.6 times ours, and where activations have more than this
# a model waits for the device, not for the host. BatchNorm: torch's calls return sooner up to 2^25 bytes (132 us and
# 74), and are shorter on the device where x is small (18 us and 11 at (256, 512)).
TORCH_ROW_BYTES = 2**23
TORCH_BATCH_NORM_BYTES = 2**25


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
    again: bool = False  # whether backward fetches a tile twice

    def kept(self, size: int, itemsize: int) -> int:
        """How many blocks of a long row forward keeps in registers.

        As many as triton 3.4 to 3.7 keep without spills (test_triton_offline.py): 32768 elements, of float32 fewer
        where blocks that are fetched again are merged with them.
        """
        blocks = -(-size // self.block)
        if itemsize == 4 and blocks > 16:
            return 11
        return min(blocks, (32768 if itemsize <= 4 else 8192) // self.block)


def rows_forward(size: int, itemsize: int, centered: bool) -> RowTile:
    """For rows of `size` elements of `itemsize` bytes.

    The fastest, or within some percent of it, of several hundred tiles tried on an H200: 64 bytes a thread, a row or
    more than one at a time; from 16384 elements on, what the register file allows. benchmarks/results/gpu_tiles.json
    has those of D = 256; the record of the others was lost.

    Tiles of rows that are longer have not been measured, see `_long`.
    """
    block = power_of_two(size)
    narrow = itemsize <= 2
    if block > 16384 or (block == 16384 and centered and not narrow):
        return _long(size, itemsize)
    if block <= 128:
        return RowTile(max(1, 4096 // (itemsize * block)), block, 4)
    if block == 16384 and not centered:
        return RowTile(1, block, 16 if narrow else 32, stages=3, programs=1)
    rows = max(1, 1024 // block)
    return RowTile(rows, block, min(32, rows * block // (1024 if narrow else 512)))


def _long(size: int, itemsize: int) -> RowTile:
    """Of rows of which registers hold a part: 16 bytes a thread and tensor, 128 registers for each.

    Three blocks on their way and, for whole dtypes, only where rows begin at multiples of 16 bytes: as was measured for
    `reduction`, not for these.
    """
    aligned = itemsize < 4 or size * itemsize % 16 == 0
    return RowTile(1, 8192 // itemsize, 16, stages=4 if aligned else 1, programs=1)


def rows_backward(size: int, itemsize: int, centered: bool) -> RowTile:
    """For rows of `size` elements of `itemsize` bytes; chosen as those of `rows_forward`.

    Centered norms sum two parameters' gradients in registers, so they have fewer threads with more registers each.
    Sums of 32768 elements fit beside what a step needs; what has more goes by rows and then by columns, with tiles that
    were measured for earlier kernels of the same two loops (gpu_tiles.json: dx and parameters).
    """
    block = power_of_two(size)
    narrow = itemsize <= 2
    if block == 16384 and not centered and itemsize <= 4:
        return RowTile(1, block, 16, stages=1 if narrow else 2, programs=1, again=True)
    if block > 8192:
        if itemsize <= 4 and block * (2 if centered else 1) <= 32768:
            return _long(size, itemsize)
        return RowTile(1, 4096, 16, stages=1)
    if not narrow:
        rows = max(1, 4096 // block)
        if block == 8192:
            return RowTile(1, block, 8, stages=4, programs=1)
        if block == 2048:
            return RowTile(1, block, 8, stages=3, programs=3)
        return RowTile(rows, block, 8, stages=1 if block == 256 else 3, programs=2)
    if block <= 128:
        return RowTile(4096 // block, block, 8, 3, 2) if centered else RowTile(2048 // block, block, 8, 4, 4)
    if block == 256:
        return RowTile(4, block, 1, stages=4, programs=16) if centered else RowTile(4, block, 1, stages=3, programs=12)
    rows = max(1, 2048 // block)
    warps = rows * block // (1024 if centered else 512)
    return RowTile(rows, block, warps, stages=4, programs=max(1, (8 if centered else 24) // warps))


def fitting(tile: RowTile, tensors: int, itemsize: int, shared_bytes: int) -> RowTile:
    """The tile with no more stages than a program's shared memory holds, of that many tensors each."""
    stage = tensors * tile.rows * tile.block * itemsize
    room = shared_bytes - 4096  # sums over the warps lie there too
    return replace(tile, stages=max(1, min(tile.stages, 1 + room // stage))) if tile.stages > 1 else tile


def programs(tiles: int, multiprocessors: int, tile: RowTile) -> int:
    """How many programs share the tiles: one for each, or what the device holds at once."""
    return min(tiles, multiprocessors * tile.programs) if tile.programs else tiles


def long_columns(size: int, multiprocessors: int) -> RowTile:
    """For the gradients of long rows by columns: `programs` in all share the rows of each block of columns."""
    block = 1024
    return RowTile(1, block, 4, stages=3, programs=max(1, 4 * multiprocessors * block // size))


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
    programs: int = 0  # of a reduction, per multiprocessor

    @property
    def registers(self) -> int:
        """Of a thread, as many as let all programs of a reduction be on their multiprocessor at once.

        Moments of float32 (256, 64, 56, 56) would take 140 (triton 3.7): of 4 programs one would wait. They took 62 us
        where channels-last, with 128 registers, took 53 (gpu_tiles.json): a guess at why. With 128 no tile of values
        spills (test_triton_offline.py).
        """
        return min(255, 65536 // (self.programs * self.warps * 32))


_WASTE = 0.15  # of a block's positions may lie beyond the last one


def affine(channels: int, space: int, channels_last: bool, itemsize: int) -> ChannelTile:
    """For a step through (B, C, S) of `channels` and `space` in either memory format: 16 elements a thread."""
    block_c, block_s = _blocks(4096, channels, space, channels_last, itemsize)
    return ChannelTile(block_c, block_s, max(1, min(8, block_c * block_s // 512)))


def reduction(channels: int, space: int, channels_last: bool, itemsize: int) -> ChannelTile:
    """For sums over (B, C, S): 16 elements a thread and three tiles on their way, by 4 programs that are there at once.

    They are on an H100 and H200; where a multiprocessor has less shared memory, 3 of them in float32.

    Of eight tiles tried on an H200 (benchmarks/results/gpu_tiles.json), at three shapes in two dtypes and both formats,
    within 5 % of the fastest in 10 of 12 cells for moments and in 10 of 12 for backward's sums. Lines that do not
    begin at 16 bytes are read element by element, each with an address of its own: 16 of them take 221 registers
    (triton 3.7), so 2 of 8 programs were there at once, and moments of float32 (256, 512, 7, 7) took 40 us. So they
    have 8 a thread, which is not measured; and in whole dtypes none on their way, which would be copied 4 bytes at a
    time (120 us). float64 has 8 a thread too, or its moments would spill.
    """
    aligned = channels_last or space * itemsize % 16 == 0
    block_c, block_s = _blocks(2048 if aligned and itemsize <= 4 else 1024, channels, space, channels_last, itemsize)
    warps = max(1, min(4, block_c * block_s // 256))
    return ChannelTile(block_c, block_s, warps, stages=4 if aligned or itemsize < 4 else 1, programs=4)


def _blocks(tile: int, channels: int, space: int, channels_last: bool, itemsize: int) -> tuple[int, int]:
    """How many channels and positions make a tile; the contiguous axis has 256 bytes or more."""
    if channels_last:
        block_c = min(power_of_two(channels), 256 // itemsize)
        return block_c, min(power_of_two(space), tile // block_c)
    block_s = position_block(space)
    return min(power_of_two(channels), tile // block_s), block_s


def position_block(space: int) -> int:
    """The widest power of two up to 1024 of which not too much lies beyond the last position of a sample."""
    block = min(power_of_two(space), 1024)
    while block > 64 and 1 - space / (-(-space // block) * block) > _WASTE:
        block //= 2
    return block


def planes(batch: int, channels: int, space: int, itemsize: int) -> bool:
    """Whether samples (C, S), S positions of each channel on end, are gone through as rows of C * S planes.

    Their sums, one for each plane and then over a channel's, read whole rows where a channel's line is short and begins
    at no multiple of 16 bytes. For (256, 512, 7, 7) that is what channels-last memory does, whose moments took 13 us in
    float32 and 20 in bfloat16, backward's sums 16 and 11, beside 40, 24, 20 and 15 by channels (gpu_tiles.json). The
    limits are not measured: so many samples that what is written of a plane is little beside its values (see
    `plane_blocks`), so many planes that programs need not share them, so few positions that a program merges a
    channel's in some steps.
    """
    if not 1 < space <= 256 or channels * space < 8192 or batch * itemsize < 256:
        return False
    return space * itemsize % 16 != 0 and channels * space * itemsize % 16 == 0


def plane_blocks(batch: int, itemsize: int) -> int:
    """How many programs may share a plane: the 48 bytes that each writes and a merge reads stay under a fifth of x."""
    return max(1, batch * itemsize // 256)


def merged_first(splits: int, planes: int, channels: int) -> bool:
    """Whether several programs merge the parts before one program does all that is left of BatchNorm's forward.

    It takes up to 4096 parts in a step, and goes through them twice; other programs take more at once. Not measured.
    """
    return planes > 1 or splits * channels > 4096


def splits(grid: int, blocks: int, programs: int) -> int:
    """How many of the device's `programs` share a channel's `blocks`; `grid` of them do all channels once.

    Where they are shared, none waits for another to end: moments of bfloat16 (64, 256, 56, 56) by 576 programs, where
    528 are there at once, took 42 us, and of (256, 64, 56, 56), as many bytes by 528, 31; in float32, where 396 were
    there, both took 62 (gpu_tiles.json).
    """
    return max(1, min(blocks, programs // grid))


def merging(parts: int, alone: bool = False) -> tuple[int, int]:
    """How many parts and how many channels a program merges at a time; `alone`, it takes all channels in turn."""
    if alone:
        block = min(power_of_two(parts), 64)
        return block, min(512, 4096 // block)
    block = min(power_of_two(parts), 256)
    return block, max(4, 512 // block)
