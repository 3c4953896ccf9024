"""`make bench-gpu`: norms on a CUDA device, against torch, torch.compile, Liger and a copy of the same bytes.

    python benchmarks/gpu.py [--out FILE] [--cells TEXT] [--seconds N] [--kinds large,small,ladder] [--dry]

Here: the protocol and the command. Cells are in gpu_cells.py, calls in gpu_variants.py, tables and goals in
gpu_table.py, all explained in benchmarks/README.md. The result file is written after every cell.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_cells
import gpu_table
import results
import torch
from gpu_cells import Cell

OUT = results.RESULTS / "gpu.json"
ROUNDS, CALLS = 8, 4  # medians of 32 calls
SLEEP_CYCLES = 3_000_000  # 1.7 ms at 1.8 GHz: the host has queued the calls before the device begins
SMALL_ROUNDS, SMALL_CALLS = 9, 60
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # wrong is far beyond: an element too few, a NaN


def timing(samples: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(samples, n=10)
    return {"median": statistics.median(samples), "p10": deciles[0], "p90": deciles[-1]}


def device_times(calls: dict[str, Callable[[int], Any]]) -> dict[str, dict[str, float]]:
    """Microseconds on the device, variants in turn; queued behind a wait, so that the host's time does not show."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    number = 0
    for _ in range(ROUNDS):
        for name, call in calls.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
            torch.cuda._sleep(SLEEP_CYCLES)
            events[0].record()
            for event in events[1:]:
                number += 1
                call(number)
                event.record()
            torch.cuda.synchronize()
            samples[name] += [1e3 * begin.elapsed_time(end) for begin, end in pairwise(events)]
    return {name: timing(values) for name, values in samples.items()}


def call_times(calls: dict[str, Callable[[int], Any]]) -> dict[str, dict[str, float]]:
    """Microseconds of a call among many, host and device together, variants in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SMALL_ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for i in range(SMALL_CALLS):
                call(i)
            torch.cuda.synchronize()
            samples[name].append(1e6 * (time.perf_counter() - begin) / SMALL_CALLS)
    return {name: timing(values) for name, values in samples.items()}


def replayed(call: Callable[[int], Any]) -> Callable[[int], Any]:
    """The call SMALL_CALLS times in a CUDA graph, as one of that many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(SMALL_CALLS)]

    def replay(i: int, kept: Any = kept) -> None:
        if i == 0:
            graph.replay()

    return replay


def poison(like: torch.Tensor) -> None:
    """What the allocator hands out next holds NaN."""
    for value in [torch.full_like(like, torch.nan) for _ in range(3)]:
        del value


def forced(call: Callable[[int], Any]) -> Callable[[int], Any]:
    """The call with nothing handed to torch."""
    import normkit

    def in_triton(i: int) -> Any:
        with normkit.use_backend("triton"):
            return call(i)

    return in_triton


def measure(cell: Cell, cache_bytes: int, dry: bool) -> dict[str, Any]:
    import gpu_variants

    inputs = gpu_variants.Inputs(cell, "cuda", cache_bytes)
    poison(inputs.x[0].detach())
    begin = time.perf_counter()
    calls, absent = gpu_variants.variants(cell, inputs)
    record = {**cell.record(), "absent": absent, "wrong": {}, "error": {}, "prepared_s": time.perf_counter() - begin}
    if cell.kind == "ladder":
        calls = {"triton": forced(calls["normkit"]), "torch": calls["torch"]}
    elif cell.kind == "large":
        exact = gpu_variants.reference(cell, inputs)
        for name in list(calls):
            poison(inputs.x[0].detach())
            found = record["error"][name] = gpu_variants.error(cell, calls[name](0), exact)
            if not found < TOLERANCE[cell.dtype]:
                record["wrong"][name] = found
                del calls[name]
        del exact
        target = torch.empty_like(inputs.x[0])
        calls["copy"] = lambda i: target.copy_(inputs.x[i % len(inputs.x)].detach())
    if dry:
        return record
    if cell.kind == "large":
        record["time_us"] = device_times(calls)
    else:
        if cell.kind == "small":
            calls["triton"] = forced(calls["normkit"])
            calls |= {f"{name} in a graph": replayed(call) for name, call in calls.items()}
        record["time_us"] = call_times(calls)
    return record


def environment() -> dict[str, Any]:
    import triton

    import normkit

    def said(*command: str) -> str:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        return ran.stdout.strip() or "unknown"

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "normkit": normkit.__version__,
        "commit": said("git", "rev-parse", "--short", "HEAD"),
        "rounds": ROUNDS,
        "calls": CALLS,
    }


def tiny(cell: Cell) -> Cell:
    return replace(cell, shape=(4, *cell.shape[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cells", default="", help="only cells whose label contains this")
    parser.add_argument("--kinds", default="large,small,ladder")
    parser.add_argument("--seconds", type=float, default=600.0, help="after so long no further cell is begun")
    parser.add_argument("--dry", action="store_true", help="run every call once on few rows, time nothing")
    parser.add_argument(
        "--part", default="", help="i/n: every n-th cell from i on, called once, to fill compilers' caches"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: needs a CUDA device, torch finds none; run it on a machine with a GPU")
    importlib.import_module(
        "torch._functorch.config"
    ).donated_buffer = False  # torch.compile's backward is called again on the same graph
    torch.manual_seed(0)
    cells = [
        cell
        for kind in arguments.kinds.split(",")
        for cell in getattr(gpu_cells, kind)()
        if arguments.cells in cell.label
    ]
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    if arguments.part:
        i, n = map(int, arguments.part.split("/"))
        for cell in cells[i::n]:
            try:
                measure(cell, 0, True)
            except Exception as error:
                print(cell.label, repr(error)[:200])
        return
    result: dict[str, Any] = {"environment": environment(), "cells": []}
    begin = time.monotonic()
    for cell in cells:
        cell = tiny(cell) if arguments.dry else cell
        if time.monotonic() - begin > arguments.seconds:
            result["cells"].append({**cell.record(), "skipped": f"{arguments.seconds:.0f} s were over"})
            continue
        try:
            result["cells"].append(measure(cell, cache_bytes, arguments.dry))
        except Exception as error:  # the other cells are worth having
            result["cells"].append({**cell.record(), "failed": repr(error)[:300]})
            print(f"{cell.label}: {error!r}"[:300], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if not arguments.dry:
            results.write(arguments.out, result)
    print(f"{len(result['cells'])} cells in {time.monotonic() - begin:.0f} s", flush=True)
    wrong = [
        f"{record['norm']} {record['shape']}: {record['wrong']}" for record in result["cells"] if record.get("wrong")
    ]
    print("\n".join(wrong))
    if not arguments.dry:
        gpu_table.write(arguments.out)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    main()
