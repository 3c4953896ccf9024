"""Tables and goals of the GPU benchmark: results/gpu.json -> results/gpu.md.

    python benchmarks/gpu_table.py [FILE]

Here: `GOALS`, `judged`, `markdown`, `write`. No torch at import.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from gpu_cells import Cell
from results import time_us

Record = dict[str, Any]
PEERS = ("torch", "compile", "liger")
CALLED = ("normkit", "triton", "torch", "normkit in a graph", "triton in a graph", "torch in a graph")


def cell_of(record: Record) -> Cell:
    names = ("norm", "dtype", "task", "gamma", "layout", "kind")
    return Cell(**{name: record[name] for name in names}, shape=tuple(record["shape"]))


def fraction(record: Record) -> float | None:
    """Of the rate of a copy in the same cell: the bytes that must move at that rate, over the time it took."""
    ours, copy = time_us(record, "normkit"), time_us(record, "copy")
    if ours is None or copy is None:
        return None
    floor = copy * record["bytes"] / (2 * cell_of(record).x_bytes)
    return floor / ours


def speedup(record: Record, peers: Iterable[str] = PEERS) -> float | None:
    """The fastest peer's time over ours."""
    ours = time_us(record, "normkit")
    times = [time for name in peers if (time := time_us(record, name)) is not None]
    return min(times) / ours if ours and times else None


@dataclass(frozen=True)
class Goal:
    name: str
    applies: Callable[[Cell], bool]
    figure: Callable[[Record], float | None]
    least: float


def _plain(cell: Cell) -> bool:
    return cell.kind == "large" and cell.norm in ("layer_norm", "rms_norm")


GOALS = (
    Goal(
        "forward >= 0.90 of the copy rate, D from 1024 to 16384",
        lambda cell: _plain(cell) and cell.task == "forward" and 1024 <= cell.shape[-1] <= 16384,
        fraction,
        0.90,
    ),
    Goal(
        "forward >= 0.80 of the copy rate at D = 256 and 65536",
        lambda cell: _plain(cell) and cell.task == "forward" and cell.shape[-1] in (256, 65536),
        fraction,
        0.80,
    ),
    Goal(
        "rows backward >= 0.85 of the copy rate",
        lambda cell: _plain(cell) and cell.task == "backward",
        fraction,
        0.85,
    ),
    Goal(
        "fused add forward+backward >= 1.3 x the fastest peer",
        lambda cell: cell.kind == "large" and cell.added and cell.task == "forward+backward",
        speedup,
        1.3,
    ),
    Goal(
        "BatchNorm training forward+backward >= 1.3 x torch",
        lambda cell: cell.kind == "large" and cell.norm == "batch_norm" and cell.task == "forward+backward",
        speedup,
        1.3,
    ),
    Goal(
        "small calls not slower than torch eager (0.95: noise)",
        lambda cell: cell.kind == "small",
        lambda record: speedup(record, ("torch",)),
        0.95,
    ),
)


@dataclass(frozen=True)
class Judged:
    """A cell that a goal is about; without a figure ours raised or was wrong, or the cell was not measured."""

    label: str
    figure: float | None
    passed: bool
    reason: str = ""  # why there is no figure

    @property
    def counts(self) -> bool:
        """Whether it passes or misses: a cell that was not measured does neither."""
        return self.figure is not None or bool(self.reason)


def judge(record: Record, goal: Goal) -> Judged:
    label = cell_of(record).label
    if "normkit" in record.get("absent", {}):
        return Judged(label, None, False, f"raises {record['absent']['normkit']}")
    if "normkit" in record.get("wrong", {}):
        return Judged(label, None, False, f"wrong by {record['wrong']['normkit']}")
    figure = goal.figure(record) if "time_us" in record else None
    return Judged(label, figure, figure is not None and figure >= goal.least)


def judged(result: Record, goal: Goal) -> list[Judged]:
    """Every cell of the result that the goal is about."""
    return [judge(record, goal) for record in result["cells"] if goal.applies(cell_of(record))]


def verdict(record: Record) -> str:
    """Of the goal that the cell belongs to, if one is; no cell belongs to two."""
    for goal in GOALS:
        if goal.applies(cell_of(record)):
            found = judge(record, goal)
            return ("passed" if found.passed else "missed") if found.counts else ""
    return ""


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def goal_lines(result: Record) -> list[str]:
    rows, short = [], []
    for goal in GOALS:
        cells = judged(result, goal)
        counted = [cell for cell in cells if cell.counts]
        figures = [cell.figure for cell in counted if cell.figure is not None]
        rows.append(
            [
                goal.name,
                f"{sum(cell.passed for cell in counted)} of {len(counted)}" if counted else "not measured",
                str(len(cells) - len(counted) or ""),
                _number(statistics.median(figures) if figures else None),
                _number(min(figures, default=None)),
            ]
        )
        missed = (cell for cell in counted if not cell.passed)
        short += [f"- {goal.name}: {cell.label}: {cell.reason or _number(cell.figure)}" for cell in missed]
    lines = _table(("goal", "cells that pass", "cells not measured", "median", "worst"), rows)
    return [*lines, *(["", "Cells that fall short:", "", *short] if short else [])]


def large_lines(result: Record, norms: tuple[str, ...]) -> list[str]:
    others = ("triton", *PEERS) if norms == ("batch_norm",) else PEERS
    columns = (
        "norm",
        "shape",
        "dtype",
        "task",
        "floor us",
        "normkit us",
        "of copy rate",
        *(f"{name} us" for name in others),
        "peer / ours",
        "goal",
        "first call s",
    )
    rows = []
    for record in result["cells"]:
        cell = cell_of(record)
        if cell.kind != "large" or cell.norm not in norms or "time_us" not in record:
            continue
        of_copy, ours = fraction(record), time_us(record, "normkit")
        dtype = cell.dtype + (f", gamma {cell.gamma}" if cell.gamma else "")
        shape = "x".join(map(str, cell.shape)) + (" channels-last" if cell.layout == "channels-last" else "")
        floor = None if of_copy is None or ours is None else of_copy * ours
        shown = [
            "wrong" if name in record["wrong"] else _microseconds(time_us(record, name))
            for name in ("normkit", *others)
        ]
        rows.append(
            [
                cell.norm,
                shape,
                dtype,
                cell.task,
                _microseconds(floor),
                shown[0],
                _number(of_copy),
                *shown[1:],
                _number(speedup(record)),
                verdict(record),
                _number(record.get("first_call_s", {}).get("normkit"), 1),
            ]
        )
    return _table(columns, rows)


def call_lines(result: Record, kind: str, variants: tuple[str, ...]) -> list[str]:
    rows = []
    for record in result["cells"]:
        cell = cell_of(record)
        if cell.kind == kind and "time_us" in record:
            rows.append([cell.label, *(_microseconds(time_us(record, variant)) for variant in variants)])
    return _table(("cell", *(f"{variant} us" for variant in variants)), rows)


def section(title: str, lines: list[str], text: str = "") -> list[str]:
    """Nothing where the table has no row."""
    return ["", f"## {title}", "", *([text, ""] if text else []), *lines] if len(lines) > 2 else []


def left_lines(result: Record) -> list[str]:
    """What was not measured, by reason."""
    reasons: dict[str, list[str]] = {}
    for record in result["cells"]:
        if "time_us" not in record:
            reasons.setdefault(record.get("skipped") or record["failed"], []).append(cell_of(record).label)
    return [f"- {len(labels)} cells, {labels[0]} to {labels[-1]}: {reason}" for reason, labels in reasons.items()]


def late_lines(result: Record) -> list[str]:
    """Where the device began before its calls were queued, and in how many rounds."""
    late = [(cell_of(record).label, record["late"]) for record in result["cells"] if record.get("late")]
    return [f"- {label}: " + ", ".join(f"{name} {rounds} rounds" for name, rounds in of.items()) for label, of in late]


def absent_lines(result: Record) -> list[str]:
    """Why variants have no figure, each reason once."""
    found = [item for record in result["cells"] for item in record.get("absent", {}).items()]
    return [f"- {name}, {found.count((name, why))} cells: {why}" for name, why in dict.fromkeys(found)]


def markdown(result: Record) -> str:
    environment = result["environment"]
    lines = [
        "# Norms on a GPU",
        "",
        f"{environment['device']}, driver {environment['driver']}, torch {environment['torch']}, triton "
        f"{environment['triton']}; {environment['date']}, commit {environment['commit']}. Written by "
        "`benchmarks/gpu_table.py` from `gpu.json`; [the protocol](../README.md#gpu).",
        *(["", environment["note"]] if "note" in environment else []),
        "",
        "## Goals",
        "",
        *goal_lines(result),
        *section("Rows", large_lines(result, ("layer_norm", "rms_norm"))),
        *section("Fused adds", large_lines(result, ("add_layer_norm", "add_rms_norm"))),
        *section("BatchNorm, training", large_lines(result, ("batch_norm",))),
        *section("Small calls, host and device together", call_lines(result, "small", CALLED)),
        *section(
            "From where on Triton is faster",
            call_lines(result, "ladder", ("triton", "torch")),
            "Triton forced against torch eager, as calls: the limits of `kernels/launch.py` come from here.",
        ),
    ]
    if absent := absent_lines(result):
        lines += ["", "## Absent", "", *absent]
    if late := late_lines(result):
        lines += ["", "## Times that may hold the host's", "", *late]
    if left := left_lines(result):
        lines += ["", "## Not measured", "", *left]
    return "\n".join(lines) + "\n"


def write(path: Path) -> None:
    path.with_suffix(".md").write_text(markdown(results.read(path)))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else results.RESULTS / "gpu.json")
