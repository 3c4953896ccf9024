"""The measuring process: runs one grid under the allocation its environment chose, appending each cell to the file.

    THP_MEM_ALLOC_ENABLE=1 python benchmarks/worker.py --allocation thp --seconds 600 --out FILE

cpu.py starts it twice. torch reads the variable once, so one process cannot measure both.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import results
import torch
from cells import Cell, grid
from timing import measure
from variants import variants

LEAST_S, MOST_S = 0.3, 4.0  # timed seconds of a cell, whatever its share of the budget


def record(cell: Cell, share_s: float) -> dict[str, object]:
    """Measure a cell in about share_s seconds, compiling included."""
    default_threads = torch.get_num_threads()
    if cell.threads:
        torch.set_num_threads(cell.threads)
    start = time.perf_counter()
    try:
        # one block around everything: a context manager per call would cost a small norm's own time
        with torch.set_grad_enabled(cell.direction == "forward+backward"):
            calls = variants(cell)
            for call in calls.values():
                call()
            left = share_s - (time.perf_counter() - start)
            times = measure(calls, min(max(left, LEAST_S), MOST_S))
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(default_threads)
    time_us = {name: asdict(timing) for name, timing in times.items()}
    return cell.record() | {"threads": threads, "scaling": bool(cell.threads), "time_us": time_us}


def warm_up() -> None:
    """Compile something, so that importing the compiler is not charged to the first cell."""
    torch.compile(torch.nn.LayerNorm(8), dynamic=False)(torch.ones(1, 8))


def silence() -> None:
    """torch.compile's and torch's own remarks: mixed dtypes, fallbacks, recompilation; they are what is measured."""
    warnings.simplefilter("ignore")
    for name in ("torch._dynamo", "torch._inductor", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allocation", choices=("default", "thp"), default="default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cells", default="", help="only cells whose label contains this text")
    parser.add_argument("--seconds", type=float, required=True, help="what all cells together may take")
    parser.add_argument("--out", type=Path, required=True, help="an existing result file")
    arguments = parser.parse_args()
    silence()
    cells = grid(arguments.allocation, results.llc_bytes(), arguments.quick, arguments.cells)
    end = time.perf_counter() + arguments.seconds
    warm_up()
    for index, cell in enumerate(cells):
        left = sum(later.weight for later in cells[index:])
        share_s = (end - time.perf_counter()) * cell.weight / left
        start = time.perf_counter()
        results.append(arguments.out, record(cell, share_s))
        gc.collect()
        print(f"[{index + 1}/{len(cells)}] {cell.label}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
