"""The table of a run: microseconds, counted GB/s and ratios, a line a cell."""

from __future__ import annotations

from typing import Any

import results
from rich.table import Table

COLUMNS = ("cell", "kernel", "layer", "torch", "compile", "onnx", "copy", "GB/s", "to copy", "canary", "peer/layer")
TIMES = ("kernel", "layer", "torch", "compile", "onnx", "copy")


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def rate_gbps(record: dict[str, Any]) -> float | None:
    """Counted bytes per second of the kernel, or of the layer where there is no kernel: `copies` times 2 bytes_x."""
    time = results.time_us(record, "kernel") or results.time_us(record, "layer")
    return None if time is None else record["copies"] * 2 * record["bytes_x"] / time / 1e3


def row(record: dict[str, Any]) -> list[str]:
    times = {name: results.time_us(record, name) for name in (*TIMES, "canary")}
    ours = times["kernel"] or times["layer"]
    return [
        results.label(record),
        *(_figure(times[name], 1) for name in TIMES),
        _figure(rate_gbps(record), 1),
        _figure(_ratio(ours, times["copy"]), 2),
        _figure(_ratio(times["canary"], times["copy"]), 2),
        _figure(_ratio(results.fastest_peer_us(record), times["layer"]), 2),
    ]


def table(cells: list[dict[str, Any]]) -> Table:
    shown = Table(
        title="CPU, medians in microseconds",
        caption="GB/s and 'to copy' are the kernel's where there is one, else the layer's; canary: the copy's second "
        "measurement over its first; peer: the faster of torch and compile",
    )
    for index, column in enumerate(COLUMNS):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    for record in cells:
        shown.add_row(*row(record))
    return shown
