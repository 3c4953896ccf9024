"""What the GPU benchmark measures: its cells, and the bytes that each must move.

Here: `Cell`, `grid` and the parts of it. No torch at import, so that a result file can be read anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

SIZES = (64, 128, 256, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
COMPILED_SIZES = (256, 1024, 4096, 16384, 65536)  # torch.compile takes seconds for each
FEW_SIZES = (1024, 4096, 8192)
QUICK_SIZES = (256, 4096, 65536)
ELEMENTS = 2**26
IMAGES = ((256, 64, 56, 56), (64, 256, 56, 56), (256, 512, 7, 7))
ITEMSIZE = {"float32": 4, "bfloat16": 2}
PLAIN, ADDS = ("layer_norm", "rms_norm"), ("add_layer_norm", "add_rms_norm")
KINDS = ("large", "small", "ladder")


@dataclass(frozen=True)
class Cell:
    norm: str  # layer_norm, rms_norm, add_layer_norm, add_rms_norm, batch_norm
    shape: tuple[int, ...]
    dtype: str
    task: str  # forward, backward, forward+backward
    gamma: str = ""  # the parameters' dtype; "": x's, and float32 for batch_norm
    layout: str = "contiguous"  # or channels-last
    kind: str = "large"  # large: time on the device; small, ladder: time of a call as a program sees it

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        more = [f"gamma {self.gamma}"] * bool(self.gamma) + [self.layout] * (self.layout != "contiguous")
        return " ".join([self.norm, shape, self.dtype, *more, self.task])

    @property
    def added(self) -> bool:
        return self.norm.startswith("add_")

    @property
    def x_bytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def bytes(self) -> int:
        """Read and written once where once is enough; BatchNorm must go through x, and in backward dout too, twice."""
        forward = 3 if self.norm == "batch_norm" else 4 if self.added else 2
        backward = 5 if self.norm == "batch_norm" else 4 if self.added else 3
        passes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[self.task]
        return passes * self.x_bytes

    def compiles(self) -> bool:
        """Whether torch.compile is a peer here."""
        rows = self.norm != "batch_norm" and not self.gamma and self.dtype == "bfloat16"
        return self.kind == "large" and rows and (self.added or self.shape[-1] in COMPILED_SIZES)

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "bytes": self.bytes}


def _rows(norm: str, size: int, dtype: str, task: str, gamma: str = "") -> Cell:
    return Cell(norm, (ELEMENTS // size, size), dtype, task, gamma)


def large(dtype: str) -> Iterator[Cell]:
    """The cells that goals are about."""
    for size in SIZES:
        for norm in PLAIN:
            for task in ("forward", "backward"):
                yield _rows(norm, size, dtype, task)
    for shape in IMAGES:
        for layout in ("contiguous", "channels-last"):
            for task in ("forward", "forward+backward"):
                yield Cell("batch_norm", shape, dtype, task, layout=layout)
    for size in FEW_SIZES:
        for norm in ADDS:
            for task in ("forward", "backward", "forward+backward"):
                yield _rows(norm, size, dtype, task)


def mixed() -> Iterator[Cell]:
    """bfloat16 x with float32 parameters, as automatic mixed precision leaves them."""
    for size in FEW_SIZES:
        for norm in PLAIN:
            for task in ("forward", "backward"):
                yield _rows(norm, size, "bfloat16", task, "float32")


def whole() -> Iterator[Cell]:
    """What no goal asks for: rows forward and backward together, and BatchNorm's backward alone."""
    for size in COMPILED_SIZES:
        for norm in PLAIN:
            yield _rows(norm, size, "bfloat16", "forward+backward")
    for shape in IMAGES:
        yield Cell("batch_norm", shape, "bfloat16", "backward")


def small() -> Iterator[Cell]:
    """Calls whose time is that of the host, or nearly."""
    for task in ("forward", "forward+backward"):
        for norm in PLAIN:
            for shape in ((1, 4096), (64, 1024), (2048, 768)):
                yield Cell(norm, shape, "float32", task, kind="small")
            yield Cell(norm, (2048, 768), "bfloat16", task, kind="small")
        for image in ((256, 512), (32, 64, 14, 14)):
            yield Cell("batch_norm", image, "float32", task, kind="small")


def ladder() -> Iterator[Cell]:
    """From where on a Triton launch is worth its time: the limits in kernels/launch.py."""
    for power in range(17, 27):
        for task in ("forward", "forward+backward"):
            for norm in PLAIN:
                yield Cell(norm, (2**power // 1024, 1024), "float32", task, kind="ladder")
            yield Cell("batch_norm", (2**power // (64 * 1024), 64, 32, 32), "float32", task, kind="ladder")


def is_quick(cell: Cell) -> bool:
    """The subset that answers "did it get slower" in a minute."""
    if cell.kind == "small":
        return cell.shape in ((2048, 768), (256, 512))
    if cell.kind == "ladder" or cell.dtype != "bfloat16" or cell.gamma:
        return False
    if cell.norm == "batch_norm":
        return cell.shape == IMAGES[0] and cell.task != "backward"
    return cell.shape[-1] in QUICK_SIZES


def grid(kinds: tuple[str, ...] = KINDS, quick: bool = False, text: str = "") -> list[Cell]:
    """The cells of a run, the most important first, for a run may end before the last."""
    cells = [*large("bfloat16"), *small(), *large("float32"), *mixed(), *whole(), *ladder()]
    chosen = [cell for cell in cells if cell.kind in kinds and text in cell.label]
    return [cell for cell in chosen if is_quick(cell)] if quick else chosen
