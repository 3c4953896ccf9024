"""Which tiles the long rows of a CUDA device should have: times those that could be, for `kernels/launch.py` to choose.

    python benchmarks/gpu_tiles.py                       # every size: minutes; results/gpu_tiles.json and a table
    python benchmarks/gpu_tiles.py --only "norm 65536"   # some cases; the others stay in the file
    python benchmarks/gpu_tiles.py --out FILE            # elsewhere

Backward is timed with its sums of parameters' gradients. tiles.py says how.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import tiles
import torch
from torch import Tensor

from normkit.kernels import launch
from normkit.kernels.launch import RowTile

SIZES = (16384, 32768, 65536)
ELEMENTS = 1 << 26  # of x
TASKS = ("forward", "backward")


@dataclass(frozen=True)
class Choice(tiles.Choice):
    """A tile of the case's kernel; `columns` is the second one's, where backward goes by rows and then by columns."""

    tile: RowTile
    columns: RowTile | None = None

    @property
    def label(self) -> str:
        said = f"{self.tile.block} x {self.tile.warps} warps, {self.tile.stages} stages"
        if self.columns is not None:
            said += f"; columns {self.columns.block} x {self.columns.warps}, {self.columns.programs} programs"
        return said

    def record(self) -> dict[str, Any]:
        columns = {} if self.columns is None else {"columns": asdict(self.columns)}
        return {**asdict(self.tile), **columns}

    @contextmanager
    def chosen(self) -> Iterator[None]:
        from normkit.kernels import triton_rows

        replaced = {"rows_forward": self.tile, "rows_backward": self.tile, "long_columns": self.columns}
        with mock.patch.multiple(launch, **{name: (lambda *_, tile=tile: tile) for name, tile in replaced.items()}):
            triton_rows.forget_plans()
            yield
        triton_rows.forget_plans()


@dataclass(frozen=True)
class Case(tiles.Case):
    """Rows of one kind."""

    size: int
    centered: bool
    task: str

    @property
    def label(self) -> str:
        return f"{'layer' if self.centered else 'rms'}_norm {self.size} {self.dtype} {self.task}"

    @property
    def passes(self) -> int:
        return 2 if self.task == "forward" else 3

    @property
    def shape(self) -> tuple[int, ...]:
        return (ELEMENTS // self.size, self.size)

    def choices(self, multiprocessors: int) -> Sequence[Choice]:
        itemsize = getattr(torch, self.dtype).itemsize
        found = [Choice(RowTile(1, bytes_ // itemsize, 16, n, 1)) for bytes_ in (8192, 16384) for n in (1, 3, 4, 6)]
        choose = launch.rows_forward if self.task == "forward" else launch.rows_backward
        now = choose(self.size, itemsize, self.centered)
        chosen = Choice(now)
        if self.task == "backward":
            columns = launch.long_columns(self.size, multiprocessors)
            if self.size * (2 if self.centered else 1) > 32768:
                found = []  # the sums would spill
            for means in (RowTile(1, 4096, 16, 1), RowTile(1, 8192, 32, 1), RowTile(1, 4096, 8, 1)):
                for warps, block, share in ((4, 1024, 1), (4, 1024, 2), (8, 2048, 1)):
                    programs = max(1, share * columns.programs * 1024 // block)
                    found.append(Choice(means, RowTile(1, block, warps, 3, programs)))
            chosen = Choice(now, None if now.programs else columns)
        return [chosen, *(choice for choice in found if choice != chosen)]

    def call(self, x: Tensor, dout: Tensor) -> object:
        from normkit.kernels import triton_rows

        weight = torch.ones(self.size, dtype=x.dtype, device=x.device)
        statistics = torch.ones(x.shape[0], device=x.device)
        mean, bias = (statistics, weight) if self.centered else (None, None)
        if self.task == "forward":
            return triton_rows.rows_forward(x, None, weight, bias, 1e-5, self.centered, 0.0)
        needs = (True, True, self.centered)
        return triton_rows.rows_backward(dout, None, x, mean, statistics, weight, 0.0, needs)


def cases() -> list[Case]:
    dtypes = ("bfloat16", "float32")
    return [Case(d, s, c, t) for s in SIZES for d in dtypes for c in (True, False) for t in TASKS]


if __name__ == "__main__":
    assert __doc__
    tiles.main("gpu_tiles.py", __doc__, "rows", cases())
