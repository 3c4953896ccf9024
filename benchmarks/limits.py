"""Where a kernel falls short of a copy: what memory alone and arithmetic alone take, in the same run.

    python benchmarks/limits.py [benchmarks/results/cpu.json] [--seconds 1]

Here: for every cell of goals 1 to 3 that the result file shows to fall short, beside the kernel and the copy of the
counted bytes,
- `streams`: torch's own kernels passing over the same tensors (as float32, so that nothing is converted): one add reads
  dout and total and writes dx; BatchNorm reads both once more for its sums;
- `in_cache`: the same kernel on as many rows (or samples) as stay in the cores' own caches, times the share of rows
  left out: its arithmetic.
A kernel cannot take less than the larger of them. Writes limits.json and limits.md beside the result file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goals
import results
import timing
import torch
import variants
from cells import LINE, QKV, Cell, grid
from goal_list import all_goals
from rich.console import Console
from torch import Tensor

CORE_CACHES = 1 << 20  # bytes of all tensors together that two cores of at least 1 MiB of their own hold
COLUMNS = ("cell", "kernel us", "copies us", "streams us", "in cache us", "kernel / limit", "before, / copies")


def short_cells(result: dict[str, Any]) -> dict[str, tuple[Cell, float]]:
    """Cells of goals 1 to 3 that miss, with the ratio measured then; once each, whatever the allocation."""
    missed = {
        check.label.rsplit(" ", 1)[0]: check.value
        for goal in all_goals(result)
        if goal.title[0] in "123" and goal.title[1] == " " and "onnx" not in goal.limit
        for check in goal.checks
        if not check.ok
    }
    found = {}
    for cell in grid("default", result["environment"]["llc_bytes"]):
        name = cell.label.rsplit(" ", 1)[0]
        if name in missed and cell.shape not in (LINE, QKV) and not cell.threads:
            found[name] = (cell, missed[name])
    return found


def _floats(x: Tensor) -> Tensor:
    """All of x's memory as one line of float32."""
    flat = x.detach().as_strided((x.numel(),), (1,))
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.view(torch.float32)


def streams(cell: Cell) -> Callable[[], None] | None:
    """The passes over memory of one task without its arithmetic; None where no single kernel of torch makes them."""
    backward = cell.direction == "backward"
    if cell.norm.startswith("add_") and not backward:
        return None
    count = math.prod(cell.shape)
    dtype = getattr(torch, cell.dtype.partition("+")[0])
    reads = [_floats(torch.randn(count).to(dtype)) for _ in range(cell.norm.startswith("add_") + backward + 1)]
    out, total = torch.empty_like(reads[0]), torch.empty((), dtype=reads[0].dtype)

    def call() -> None:
        if cell.family == "channels":
            for values in reads:
                torch.sum(values, dim=0, out=total)
        if len(reads) == 1:
            out.copy_(reads[0])
        elif len(reads) == 2:
            torch.add(*reads, out=out)
        else:
            torch.addcmul(*reads, out=out)

    return call


def small(cell: Cell) -> Cell:
    """The cell with as many rows or samples as keep all tensors in the cores' own caches."""
    rows = cell.shape[0]
    tensors = 4 if cell.direction == "backward" or cell.norm.startswith("add_") else 2
    return dataclasses.replace(cell, shape=(max(2, rows * CORE_CACHES // (tensors * cell.bytes_x)), *cell.shape[1:]))


def measured(cell: Cell, seconds: float) -> dict[str, float]:
    """Microseconds by name, all of the whole cell's size."""
    little = small(cell)
    calls = {name: call for name, call in variants.variants(cell).items() if name in ("kernel", "copy")}
    calls["in_cache"] = variants.variants(little)["kernel"]
    passes = streams(cell)
    if passes is not None:
        calls["streams"] = passes
    for call in calls.values():
        call()
    times = {name: found.median for name, found in timing.measure(calls, seconds).items()}
    times["in_cache"] *= cell.shape[0] / little.shape[0]
    times["copies"] = times.pop("copy") * cell.copies
    return times


def row(record: dict[str, Any]) -> list[str]:
    times = record["time_us"]
    shown = [f"{times[name]:.0f}" if name in times else "" for name in ("kernel", "copies", "streams", "in_cache")]
    return [record["cell"], *shown, f"{record['kernel_over_limit']:.2f}", f"{record['before']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=results.RESULTS / "cpu.json")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each cell")
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = {"environment": results.environment(), "cells": []}
    for name, (cell, before) in short_cells(results.read(arguments.path)).items():
        times = measured(cell, arguments.seconds)
        limit = max(times[part] for part in ("copies", "streams", "in_cache") if part in times)
        record = {"cell": name, "time_us": times, "kernel_over_limit": times["kernel"] / limit, "before": before}
        result["cells"].append(record)
        console.print("  ".join(row(record)), highlight=False, soft_wrap=True)
    path = arguments.path.with_name("limits.json")
    results.write(path, result)
    text = ["# Limits of the kernels that fall short of a copy", "", "Written by `python benchmarks/limits.py`.", ""]
    text += [", ".join(f"{key} {value}" for key, value in result["environment"].items()), ""]
    text += goals.markdown_table(COLUMNS, map(row, result["cells"]))
    path.with_suffix(".md").write_text("\n".join(text) + "\n")
    console.print(f"{path} and {path.with_suffix('.md')} written")


if __name__ == "__main__":
    main()
