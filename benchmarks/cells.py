"""What is measured: one Cell per combination of norm, shape, layout, dtype, direction, threads and allocation.

Here: Cell, the full grid, the quick one, and which cells fit a `--cells` filter. No torch, so that the report side
(table, goals, plot) can read it too.
Read next: variants.py, which makes a cell's calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "bfloat16+float32": 2}
ROW_NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
DIRECTIONS = ("forward", "forward+backward", "backward")

ONE, SMALL, MIDDLE, TALL = (1, 4096), (64, 1024), (2048, 768), (16384, 1024)
SQUARE, WIDE, LINE, QKV = (4096, 4096), (8, 131072), (1, 16777216), (8, 512, 12, 128)
IMAGE, DEEP_IMAGE, TOP_IMAGE = (32, 64, 56, 56), (64, 256, 14, 14), (8, 2048, 7, 7)
LARGE_IMAGE, HUGE_IMAGES = (2, 8, 1024, 1024), (128, 64, 64, 64)
VECTORS, SIGNALS = (256, 512), (16, 80, 1000)

THP_BYTES = 32_000_000  # below this an allocation is no large share of a call, and huge pages change little
CACHES = 4  # a cell this many times the last-level cache is not helped by what the cache kept


@dataclass(frozen=True)
class Cell:
    """One input and one task; every variant of it is timed in turn in one process."""

    family: str  # rows or channels
    norm: str
    shape: tuple[int, ...]
    layout: str  # rows: contiguous or qkv_slice; channels: channels_first or channels_last
    dtype: str  # of x; "bfloat16+float32" has float32 parameters
    direction: str
    mode: str | None = None  # train or eval, for channels
    threads: int = 0  # 0: torch's default
    allocation: str = "default"

    @property
    def bytes_x(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def copies(self) -> float:
        """The bytes that the task must move, in copies of x (each reads x once and writes it once).

        Rows: forward reads x and writes out, backward reads dout and total and writes dx; the fused add has one more
        tensor to read and one more to write in forward, one more to read in backward. Channels in training read x,
        and in backward dout too, twice: statistics come before the first output.
        """
        if self.family == "channels":
            forward = 1.5 if self.mode == "train" else 1.0
            backward = 2.5
        else:
            added = self.norm.startswith("add_")
            forward, backward = (2.0, 2.0) if added else (1.0, 1.5)
        return {"forward": forward, "backward": backward}.get(self.direction, forward + backward)

    @property
    def weight(self) -> float:
        """Its part of the time: 1 for compiling and for many rounds of a small call, more for seven of a large one.

        By elements, because torch's composites cost as much in half precision as in single.
        """
        return 1 + math.prod(self.shape) / 8e6 * (3.0 if self.direction == "forward+backward" else 0.5)

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        words = [self.norm, shape, self.dtype, self.direction]
        if self.mode:
            words.insert(3, self.mode)
        if self.layout != "contiguous":
            words.append(self.layout)
        words.append(self.allocation)
        if self.threads:
            words.append("1 thread" if self.threads == 1 else f"{self.threads} threads")
        return " ".join(words)

    def record(self) -> dict[str, Any]:
        """The cell as it stands in the result file; `threads` is filled in by who measured."""
        return asdict(self) | {"shape": list(self.shape), "bytes_x": self.bytes_x, "copies": self.copies}


def beyond_caches(dtype: str, llc_bytes: int) -> tuple[int, int]:
    """The smallest (2^k, 4096) of at least CACHES last-level caches, and no smaller than SQUARE."""
    rows = math.ceil(CACHES * llc_bytes / (4096 * ITEM_BYTES[dtype]))
    return max(SQUARE[0], 1 << (rows - 1).bit_length()), 4096


def row_shapes(dtype: str, llc_bytes: int) -> list[tuple[int, ...]]:
    """Every shape for float32 and bfloat16, the ones that goals need for the other dtypes; none twice."""
    shapes: list[tuple[int, ...]] = [SMALL, MIDDLE, TALL, SQUARE]
    if dtype in ("float32", "bfloat16"):
        shapes = [ONE, SMALL, MIDDLE, QKV, WIDE, TALL, SQUARE, LINE]
    return list(dict.fromkeys([*shapes, beyond_caches(dtype, llc_bytes)]))


def rows(llc_bytes: int) -> Iterator[Cell]:
    for dtype in ITEM_BYTES:
        norms = ROW_NORMS if dtype in ("float32", "bfloat16") else ROW_NORMS[:2]
        for shape in row_shapes(dtype, llc_bytes):
            layout = "qkv_slice" if shape == QKV else "contiguous"
            for norm in norms:
                for direction in DIRECTIONS:
                    cell = Cell("rows", norm, shape, layout, dtype, direction)
                    yield cell
                    # beside the cell with all threads, so that the machine is in the same state for both
                    scales = norm in ROW_NORMS[:2] and shape in (SQUARE, TALL, LINE) and dtype == "float32"
                    if scales and direction == "forward":
                        yield Cell("rows", norm, shape, layout, dtype, direction, threads=1)


def channels() -> Iterator[Cell]:
    firsts = (VECTORS, SIGNALS, TOP_IMAGE, IMAGE, DEEP_IMAGE, LARGE_IMAGE, HUGE_IMAGES)
    inputs = [("float32", shape, "channels_first") for shape in firsts]
    inputs += [("float32", shape, "channels_last") for shape in (IMAGE, DEEP_IMAGE)]
    inputs += [
        ("bfloat16", shape, layout) for shape in (IMAGE, DEEP_IMAGE) for layout in ("channels_first", "channels_last")
    ]
    inputs += [("bfloat16", shape, "channels_first") for shape in (TOP_IMAGE, LARGE_IMAGE, HUGE_IMAGES)]
    for dtype, shape, layout in inputs:
        for direction in DIRECTIONS:
            yield Cell("channels", "batch_norm", shape, layout, dtype, direction, "train")
        yield Cell("channels", "batch_norm", shape, layout, dtype, "forward", "eval")


def is_quick(cell: Cell) -> bool:
    """The subset that answers "did it get slower" in under three minutes."""
    if cell.threads:
        return False
    if cell.family == "channels":
        return cell.shape == IMAGE and cell.dtype == "float32" and cell.mode == "train"
    if cell.dtype not in ("float32", "bfloat16") or cell.norm not in ("layer_norm", "rms_norm", "add_rms_norm"):
        return False
    if cell.norm == "add_rms_norm" and (cell.dtype != "float32" or cell.shape != SQUARE):
        return False
    return cell.shape in (ONE, SMALL, MIDDLE, SQUARE)


def grid(allocation: str, llc_bytes: int, quick: bool = False, text: str = "") -> list[Cell]:
    """The cells of one measuring process, in order. `text` keeps the cells whose label holds it."""
    cells = [Cell(**(vars(cell) | {"allocation": allocation})) for cell in (*rows(llc_bytes), *channels())]
    if allocation == "thp":
        cells = [cell for cell in cells if cell.bytes_x >= THP_BYTES and not cell.threads]
    if quick:
        cells = [cell for cell in cells if is_quick(cell)]
    return [cell for cell in cells if text in cell.label]
