"""normkit's CPU norms beside torch eager, torch.compile, onnxruntime and a memory copy, in interleaved runs.

    make bench                               # everything, under 30 minutes: benchmarks/results/cpu.json and .md
    make bench ARGS="--quick"                # a chosen subset, under 3 minutes
    make bench ARGS="--cells 'rms_norm 2048x768'"   # cells whose label contains the text

Here: the two measuring processes (worker.py), with torch's default allocation and with huge pages, then the table and
the goals. benchmarks/README.md says what each variant is and how to read the figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import goals
import results
import table
from cells import grid
from rich.console import Console

HERE = Path(__file__).parent
FULL_S = {"default": 1050.0, "thp": 600.0}
QUICK_S = {"default": 95.0, "thp": 40.0}
FILTERED_CELL_S = 3.0


def measure(allocation: str, arguments: argparse.Namespace) -> None:
    """Run one measuring process; an error there ends this one, with what it measured kept in the file."""
    cells = grid(allocation, results.llc_bytes(), arguments.quick, arguments.cells)
    if not cells:
        return
    budget_s = (QUICK_S if arguments.quick else FULL_S)[allocation]
    if arguments.cells:
        budget_s = min(budget_s, FILTERED_CELL_S * len(cells))
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1" if allocation == "thp" else "0"}
    # inductor's own pool of compilers would run beside the measurement
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    command = [sys.executable, str(HERE / "worker.py"), "--allocation", allocation, "--seconds", str(budget_s)]
    command += ["--cells", arguments.cells, "--out", str(arguments.out), *(["--quick"] if arguments.quick else [])]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a chosen subset, under 3 minutes")
    parser.add_argument("--cells", default="", help="only cells whose label contains this text")
    parser.add_argument("--out", type=Path, help="default: results/cpu.json of a full run, else build/bench.json")
    arguments = parser.parse_args()
    partial = arguments.quick or bool(arguments.cells)
    # a partial run must not take the place of the full run that the README quotes
    arguments.out = arguments.out or (Path("build/bench.json") if partial else results.RESULTS / "cpu.json")
    results.write(arguments.out, {"environment": results.environment(), "cells": []})
    for allocation in ("default", "thp"):
        measure(allocation, arguments)
    result = results.read(arguments.out)
    console = Console(width=190 if not sys.stdout.isatty() else None)
    console.print(result["environment"])
    console.print(table.table(result["cells"]))
    goals.report(arguments.out, console)


if __name__ == "__main__":
    main()
