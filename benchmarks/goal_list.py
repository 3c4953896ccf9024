"""What the goals are: which cells each one looks at, which ratio it takes and where its limit lies.

Here: Check, Goal and one function per goal. `all_goals` is pure: from a result file's content to goals.
Read next: goals.py, which prints them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import results
from cells import ITEM_BYTES, LINE, MIDDLE, ONE, SMALL, THP_BYTES, VECTORS

Record = dict[str, Any]
NOISE = 1.02  # "never slower" up to this: a canary is seldom nearer
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Check:
    """One cell against one limit. `at_most`: the ratio must not exceed the limit; else it must reach it.

    `parts`: the ratio that the layer's parts would have, measured apart in the same run; None where they were not. An
    orientation and no bound: apart, each finds its data in cache.
    """

    label: str
    value: float
    limit: float
    at_most: bool
    parts: float | None = None

    @property
    def shortfall(self) -> float:
        """Above 1 where the goal is missed, by how much."""
        return self.value / self.limit if self.at_most else self.limit / self.value

    @property
    def ok(self) -> bool:
        return self.shortfall <= 1


@dataclass
class Goal:
    title: str
    limit: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def worst(self) -> Check:
        return max(self.checks, key=lambda check: check.shortfall)

    def median(self) -> float:
        return statistics.median(check.value for check in self.checks)


@dataclass
class Measured:
    """The cells of a file, and which of them a goal of its own has judged beside torch."""

    cells: list[Record]
    scaling: list[Record]
    llc_bytes: int
    judged: set[str] = field(default_factory=set)

    def where(self, family: str, wanted: Callable[[Record], bool]) -> list[Record]:
        return [cell for cell in self.cells if cell["family"] == family and wanted(cell)]

    def beyond_cache(self, cell: Record) -> bool:
        return bool(cell["bytes_x"] > self.llc_bytes / 2)

    def parts_us(self, cell: Record) -> float | None:
        """What a layer's parts take: the kernel; with gradients both kernels and an autograd function without them."""
        if cell["direction"] == "forward":
            return results.time_us(cell, "kernel")
        alike = ("norm", "shape", "layout", "dtype", "mode", "allocation")
        parts = [results.time_us(cell, "saving_function")]
        for direction in ("forward", "backward"):
            same = (other for other in self.cells if all(other[name] == cell[name] for name in alike))
            found = next((other for other in same if other["direction"] == direction), None)
            parts.append(None if found is None else results.time_us(found, "kernel"))
        return None if None in parts else sum(part for part in parts if part is not None)


def _shape(cell: Record) -> tuple[int, ...]:
    return tuple(cell["shape"])


def _at_most(cells: list[Record], above: str, below: Callable[[Record], float | None], limit: float) -> list[Check]:
    """Checks of `time of above / below <= limit` over the cells that have both."""
    checks = []
    for cell in cells:
        time, unit = results.time_us(cell, above), below(cell)
        if time is not None and unit is not None:
            checks.append(Check(results.label(cell), time / unit, limit, at_most=True))
    return checks


def _at_least(
    measured: Measured, cells: list[Record], above: Callable[[Record], float | None], limit: float
) -> list[Check]:
    """Checks of `above / time of our layer >= limit`."""
    checks = []
    for cell in cells:
        layer, peer, parts = results.time_us(cell, "layer"), above(cell), measured.parts_us(cell)
        if layer is not None and peer is not None:
            ratio = None if parts is None else peer / parts
            checks.append(Check(results.label(cell), peer / layer, limit, at_most=False, parts=ratio))
    return checks


def _copy(cell: Record) -> float | None:
    return results.time_us(cell, "copy")


def _counted_copies(cell: Record) -> float | None:
    """The copy's time for as many bytes as the task must move."""
    copy = _copy(cell)
    return None if copy is None else copy * cell["copies"]


def _torch(cell: Record) -> float | None:
    return results.time_us(cell, "torch")


def _onnx(cell: Record) -> float | None:
    return results.time_us(cell, "onnx")


def row_kernels(measured: Measured) -> list[Goal]:
    """1 and 2: rows into existing memory, x beyond half the last-level cache. One enormous row must be read twice and
    has parameters of its own length: it is compared with onnxruntime, but not with a copy of x; see goal 10.
    """
    goals = []
    for number, direction in (("1", "forward"), ("2", "backward")):
        for dtype in ITEM_BYTES:
            cells = measured.where(
                "rows",
                lambda cell, dtype=dtype, direction=direction: (  # type: ignore[misc]
                    measured.beyond_cache(cell)
                    and (cell["dtype"], cell["direction"]) == (dtype, direction)
                    and _shape(cell) != LINE
                ),
            )
            checks = _at_most(cells, "kernel", _counted_copies, 1.15)
            goals.append(Goal(f"{number} rows kernel {direction}, {dtype}", "<= 1.15 x copy of counted bytes", checks))
    cells = measured.where("rows", lambda cell: measured.beyond_cache(cell) and cell["direction"] == "forward")
    goals.insert(len(ITEM_BYTES), Goal("1 rows kernel forward", "<= 1 x onnx", _at_most(cells, "kernel", _onnx, 1.0)))
    return goals


def channel_kernels(measured: Measured) -> list[Goal]:
    """3: BatchNorm into existing memory, beyond half the cache; the unit is one copy of x."""
    goals = []
    for direction, limit in (("forward", 1.6), ("backward", 2.2)):
        cells = measured.where(
            "channels",
            lambda cell, direction=direction: (  # type: ignore[misc]
                measured.beyond_cache(cell) and cell["mode"] == "train" and cell["direction"] == direction
            ),
        )
        checks = _at_most(cells, "kernel", _copy, limit)
        goals.append(Goal(f"3 BatchNorm kernel train {direction}", f"<= {limit} x copy of x", checks))
    return goals


def row_layers(measured: Measured) -> list[Goal]:
    """4, 5 and 6: layers beside the faster of torch and torch.compile."""

    def large(allocation: str) -> Callable[[Record], bool]:
        return lambda cell: cell["bytes_x"] >= THP_BYTES and cell["allocation"] == allocation

    kinds = (
        ("4 rows layer, x >= 32 MB", 3.0, large("default")),
        ("5 rows layer, x >= 32 MB, huge pages", 1.2, large("thp")),
        ("6 rows layer in cache", 1.5, lambda cell: _shape(cell) in (SMALL, MIDDLE)),
    )
    goals = []
    for title, limit, wanted in kinds:
        for direction in PASSES:
            cells = [cell for cell in measured.where("rows", wanted) if cell["direction"] == direction]
            measured.judged |= {results.label(cell) for cell in cells}
            checks = _at_least(measured, cells, results.fastest_peer_us, limit)
            goals.append(Goal(f"{title}, {direction}", f"peer / layer >= {limit}", checks))
    return goals


def one_row(measured: Measured) -> list[Goal]:
    """7: a single row of 4096, where the call costs more than the arithmetic."""
    goals = []
    for direction in PASSES:
        for norm in ("rms_norm", "layer_norm"):
            cells = measured.where(
                "rows",
                lambda cell, norm=norm, direction=direction: (  # type: ignore[misc]
                    _shape(cell) == ONE and cell["norm"] == norm and cell["direction"] == direction
                ),
            )
            measured.judged |= {results.label(cell) for cell in cells}
            title = f"7 {norm} layer of (1, 4096), {direction}"
            if norm == "rms_norm":
                goals.append(Goal(title, "torch / layer >= 1.2", _at_least(measured, cells, _torch, 1.2)))
            else:
                checks = _at_most(cells, "layer", _torch, 1.25)
                goals.append(Goal(title, "layer / torch <= 1.25", checks, [_stretch(checks)] if checks else []))
            goals[-1].notes += [note for cell in cells if (note := _machinery(cell))]
    return goals


def _stretch(checks: list[Check]) -> str:
    return f"stretch goal layer / torch <= 1.0: {sum(check.value <= 1 for check in checks)} of {len(checks)}"


def _machinery(cell: Record) -> str | None:
    empty = results.time_us(cell, "empty_function")
    if empty is None:
        return None
    layer, torch = results.time_us(cell, "layer"), results.time_us(cell, "torch")
    return f"{cell['dtype']}: layer {layer:.1f} us, torch {torch:.1f} us, an empty autograd function {empty:.1f} us"


def batch_norms(measured: Measured) -> list[Goal]:
    """9: BatchNorm in training beside torch eager, default allocation. (B, C) alone has no layout and goes to 8."""
    goals = []
    for layout, limit in (("channels_first", 3.0), ("channels_last", 1.3)):
        for direction in PASSES:
            cells = measured.where(
                "channels",
                lambda cell, layout=layout, direction=direction: (  # type: ignore[misc]
                    (cell["layout"], cell["direction"], cell["mode"], cell["allocation"])
                    == (layout, direction, "train", "default")
                    and _shape(cell) != VECTORS
                ),
            )
            measured.judged |= {results.label(cell) for cell in cells}
            checks = _at_least(measured, cells, _torch, limit)
            goals.append(Goal(f"9 BatchNorm train {layout}, {direction}", f"torch / layer >= {limit}", checks))
    return goals


def the_rest(measured: Measured) -> Goal:
    """8: every cell that no other goal holds beside torch; call it after those."""
    cells = [cell for cell in measured.cells if results.label(cell) not in measured.judged]
    checks = _at_most(cells, "layer", _torch, NOISE)
    return Goal("8 every other layer", f"layer / torch <= {NOISE} (1 and 2 % of noise)", checks)


def scaling(measured: Measured) -> list[Goal]:
    """10: what the threads bring, where they bring the copy something; and one long row beside its passes."""
    threads = Goal("10 kernel, 1 thread / all threads", ">= 0.9 x threads where the copy's ratio is")
    alike = ("norm", "shape", "layout", "dtype", "direction", "mode", "allocation")
    for one in measured.scaling:
        every = next((cell for cell in measured.cells if all(cell[name] == one[name] for name in alike)), None)
        if every is None:
            continue
        limit = 0.9 * every["threads"]
        both = (one["time_us"], every["time_us"])
        kernel, copy = (both[0][name]["median"] / both[1][name]["median"] for name in ("kernel", "copy"))
        if copy >= limit:
            threads.checks.append(Check(results.label(every), kernel, limit, at_most=False))
        else:
            threads.notes.append(f"{results.label(every)}: kernel {kernel:.2f}, copy only {copy:.2f}")
    line = [cell for cell in measured.cells if _shape(cell) == LINE]
    checks = _at_most(line, "kernel", lambda cell: results.time_us(cell, "passes"), 1.25)
    notes = []
    for cell in line:
        passes = results.time_us(cell, "passes")
        if passes is not None:
            kernel = results.time_us(cell, "kernel")
            notes.append(f"{results.label(cell)}: kernel {kernel:.0f} us, the same passes {passes:.0f} us")
    return [threads, Goal("10 one row beyond the cache", "kernel <= 1.25 x the same passes", checks, notes)]


def all_goals(result: dict[str, Any]) -> list[Goal]:
    cells = [cell for cell in result["cells"] if not cell["scaling"]]
    scaled = [cell for cell in result["cells"] if cell["scaling"]]
    measured = Measured(cells, scaled, result["environment"]["llc_bytes"])
    kernels = row_kernels(measured) + channel_kernels(measured)
    layers = row_layers(measured) + one_row(measured)
    batch = batch_norms(measured)
    return [*kernels, *layers, the_rest(measured), *batch, *scaling(measured)]
