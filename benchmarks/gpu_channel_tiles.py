"""How reductions over channels should be launched on a CUDA device: times what could be, for `kernels/launch.py`.

    python benchmarks/gpu_channel_tiles.py                    # minutes; results/gpu_tiles.json and a table
    python benchmarks/gpu_channel_tiles.py --only 512x49      # some cases; the others stay in the file
    python benchmarks/gpu_channel_tiles.py --out FILE         # elsewhere

Moments and backward's sums with what merges their parts: tiles, programs, registers, and whether small maps go by
planes. tiles.py says how.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import tiles
import torch
from torch import Tensor

from normkit.kernels import launch
from normkit.kernels.launch import ChannelTile

SHAPES = ((256, 64, 3136), (64, 256, 3136), (256, 512, 49))
TASKS = ("moments", "sums")


@dataclass(frozen=True)
class Choice(tiles.Choice):
    tile: ChannelTile
    planes: bool = False
    capped: bool = True  # registers, so that all programs are there at once

    @property
    def label(self) -> str:
        tile = self.tile
        said = f"{tile.block_c} x {tile.block_s} x {tile.warps} warps, {tile.stages} stages, {tile.programs} programs"
        return said + ", by planes" * self.planes + ", any registers" * (not self.capped)

    def record(self) -> dict[str, Any]:
        return {**asdict(self.tile), "planes": self.planes, "capped": self.capped}

    @contextmanager
    def chosen(self) -> Iterator[None]:
        from normkit.kernels import triton_channels

        registers = self.tile.registers if self.capped else None
        with (
            mock.patch.multiple(launch, reduction=lambda *_: self.tile, planes=lambda *_: self.planes),
            mock.patch.object(ChannelTile, "registers", registers),
        ):
            triton_channels.forget_plans()
            yield
        triton_channels.forget_plans()


@dataclass(frozen=True)
class Case(tiles.Case):
    batch: int
    channels: int
    space: int
    channels_last: bool
    task: str

    @property
    def label(self) -> str:
        layout = "channels-last" if self.channels_last else "contiguous"
        return f"{self.batch}x{self.channels}x{self.space} {self.dtype} {layout} {self.task}"

    @property
    def passes(self) -> int:
        return 1 if self.task == "moments" else 2

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, self.space)

    def laid(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if self.channels_last else x

    def _tile(self, planes: bool) -> ChannelTile:
        itemsize = getattr(torch, self.dtype).itemsize
        if planes:
            return launch.reduction(self.channels * self.space, self.batch, True, itemsize)
        space = self.space * self.batch if self.channels_last else self.space
        return launch.reduction(self.channels, space, self.channels_last, itemsize)

    def choices(self, multiprocessors: int) -> Sequence[Choice]:
        itemsize = getattr(torch, self.dtype).itemsize
        planes = not self.channels_last and launch.planes(self.batch, self.channels, self.space, itemsize)
        found = []
        for by_planes in dict.fromkeys((planes, False)):
            tile = self._tile(by_planes)
            larger = replace(tile, block_s=2 * tile.block_s, warps=8, stages=3, programs=2)
            others = (replace(tile, programs=3), replace(tile, programs=8), replace(tile, stages=1), larger)
            found += [Choice(tile, by_planes), Choice(tile, by_planes, capped=False)]
            found += [Choice(other, by_planes, capped=other.programs < 8) for other in others if other != tile]
        return found

    def call(self, x: Tensor, dout: Tensor) -> object:
        from normkit.kernels import triton_channels

        if self.task == "moments":
            return triton_channels.channels_moments(x, None, False)
        center = torch.zeros(self.channels, device=x.device)
        return triton_channels.channels_backward_moments(dout, x, center, None, False)


def cases() -> list[Case]:
    dtypes = ("bfloat16", "float32")
    return [Case(d, *shape, last, t) for shape in SHAPES for d in dtypes for last in (False, True) for t in TASKS]


if __name__ == "__main__":
    assert __doc__
    tiles.main("gpu_channel_tiles.py", __doc__, "reductions", cases())
