"""`make bench-gpu`: norms on a CUDA device, against torch, torch.compile, Liger and a copy of the same bytes.

    python benchmarks/gpu.py                          # everything: benchmarks/results/gpu.json and gpu.md
    python benchmarks/gpu.py --quick                  # a chosen subset, a minute: build/bench_gpu.json and .md
    python benchmarks/gpu.py --cells 'rms_norm 65536x1024'    # cells whose label contains the text: the same place
    python benchmarks/gpu.py --dry                    # every call once on few rows, nothing timed or written

Processes beside each other compile what the cells need, before anything is timed.

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
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_cells
import gpu_table
import gpu_variants
import results
import torch
from gpu_cells import Cell

import normkit
from normkit.kernels import launch

ROUNDS, CALLS = 20, 2  # medians of 40 calls
SLEEP_CYCLES = 2_000_000  # 1.1 ms at 1.8 GHz: the host has queued the calls before the device begins
SMALL_ROUNDS, SMALL_CALLS = 9, 60
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # wrong is far beyond: an element too few, a NaN
# a parameter's gradient that a peer sums in bfloat16 is 0.1 off, no reason to leave the peer out
PEER_SUM_TOLERANCE = 0.3
COMPILE_S = 60.0  # after so long with torch.compile the other cells go without it

Call = Callable[[int], Any]


def timing(samples: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": statistics.median(samples), "p10": deciles[0], "p90": deciles[-1]}


def device_times(calls: dict[str, Call], clock: Any = torch.cuda) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Microseconds on the device, variants in turn, and in how many rounds the host was late.

    Calls are queued behind a wait, so that the host's time does not show; it may show where the host was late.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    late = dict.fromkeys(calls, 0)
    number = 0
    for _ in range(ROUNDS):
        for name, call in calls.items():
            events = [clock.Event(enable_timing=True) for _ in range(CALLS + 1)]
            clock._sleep(SLEEP_CYCLES)
            events[0].record()
            for event in events[1:]:
                number += 1
                call(number)
                late[name] += event is events[-1] and events[0].query()
                event.record()
            clock.synchronize()
            samples[name] += [1e3 * begin.elapsed_time(end) for begin, end in pairwise(events)]
    return {name: timing(values) for name, values in samples.items()}, {k: n for k, n in late.items() if n}


def call_times(calls: dict[str, Call], clock: Any = torch.cuda) -> dict[str, dict[str, float]]:
    """Microseconds of a call among many, host and device together, variants in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SMALL_ROUNDS):
        for name, call in calls.items():
            clock.synchronize()
            begin = time.perf_counter()
            for i in range(SMALL_CALLS):
                call(i)
            clock.synchronize()
            samples[name].append(1e6 * (time.perf_counter() - begin) / SMALL_CALLS)
    return {name: timing(values) for name, values in samples.items()}


def replayed(call: Call) -> Call:
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


def forced(call: Call) -> Call:
    """The call with nothing handed to torch."""

    def in_triton(i: int) -> Any:
        with normkit.use_backend("triton"):
            return call(i)

    return in_triton


def keep_right(cell: Cell, inputs: gpu_variants.Inputs, calls: dict[str, Call], record: dict[str, Any]) -> None:
    """Take out of the calls those whose first result is wrong; the record says how far off each is."""
    exact = gpu_variants.reference(cell, inputs)
    for name in list(calls):
        poison(inputs.x[0].detach())
        try:
            rows, sums = gpu_variants.errors(calls[name](0), exact)
        except Exception as error:  # the others are worth having
            record["absent"][name] = gpu_variants.reason(error)
            del calls[name]
            continue
        sum_tolerance = TOLERANCE[cell.dtype] if name in ("normkit", "triton") else PEER_SUM_TOLERANCE
        record["error"][name] = max(rows, sums)
        if not (rows < TOLERANCE[cell.dtype] and sums < sum_tolerance):
            record["wrong"][name] = str(max(rows, sums))  # inf is no JSON number
            del calls[name]
    record["error"] = {name: value for name, value in record["error"].items() if name not in record["wrong"]}


def measure(
    cell: Cell, cache_bytes: int, dry: bool = False, compiled: bool = True, device: str = "cuda", clock: Any = None
) -> dict[str, Any]:
    clock = clock or torch.cuda
    inputs = gpu_variants.Inputs(cell, device, cache_bytes)
    poison(inputs.x[0].detach())
    calls, absent, first_s = gpu_variants.variants(cell, inputs, compiled)
    record = {**cell.record(), "absent": absent, "wrong": {}, "error": {}, "first_call_s": first_s}
    if cell.compiles() and not compiled:
        absent["compile"] = f"{COMPILE_S:.0f} s of compiling were over"
    # a backward alone cannot be forced: its forward went before
    forward = cell.norm == "batch_norm" and cell.task != "backward"
    handed_over = forward and cell.x_bytes <= launch.TORCH_BATCH_NORM_BYTES
    if (cell.kind != "large" or handed_over) and "normkit" in calls:
        calls["triton"] = forced(calls["normkit"])
    if cell.kind == "ladder":
        calls.pop("normkit", None)
    keep_right(cell, inputs, calls, record)
    if cell.kind == "large":
        target = torch.empty_like(inputs.x[0], requires_grad=False)
        calls["copy"] = lambda i: target.copy_(inputs.x[i % len(inputs.x)].detach())
    if cell.kind == "small":
        for name, call in list(calls.items()):
            try:
                calls[f"{name} in a graph"] = replayed(call)
            except Exception as error:  # the time of the calls themselves is worth having
                absent[f"{name} in a graph"] = gpu_variants.reason(error)
    if dry:
        for call in calls.values():
            call(1)
        clock.synchronize()
    elif cell.kind == "large":
        record["time_us"], record["late"] = device_times(calls, clock)
    else:
        record["time_us"] = call_times(calls, clock)
    return record


def environment() -> dict[str, Any]:
    import triton

    def said(*command: str) -> str:
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return "unknown"
        return ran.stdout.strip() or "unknown"

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "normkit": normkit.__version__,
        "commit": said("git", "describe", "--always", "--dirty", "--exclude=*"),
        "rounds": ROUNDS,
        "calls": CALLS,
    }


def unfit(record: dict[str, Any]) -> str:
    """What went wrong in a cell, an absent peer apart."""
    ours = record.get("absent", {}).get("normkit", "")
    wrong = ", ".join(f"{name} wrong by {by}" for name, by in record.get("wrong", {}).items())
    return record.get("failed", "") or ours or wrong


def tiny(cell: Cell) -> Cell:
    return replace(cell, shape=(4, *cell.shape[1:]))


def first_calls(arguments: argparse.Namespace) -> dict[tuple[str, str], dict[str, float]]:
    """Compile every cell's kernels in processes side by side; the seconds of the first calls, by kind and label.

    The run that follows finds what they compiled in the caches on disk: its time on the device goes into measuring.
    """
    command = [sys.executable, __file__, "--kinds", arguments.kinds, "--cells", arguments.cells]
    command += ["--seconds", str(arguments.seconds / 2), *(["--quick"] if arguments.quick else [])]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(arguments.jobs)]
        parts = [
            subprocess.Popen([*command, "--part", f"{i}/{len(outs)}", "--out", str(out)], stdout=subprocess.DEVNULL)
            for i, out in enumerate(outs)
        ]
        for part, out in zip(parts, outs, strict=True):
            if part.wait():
                print(
                    f"a process that compiles ended with {part.returncode}; its kernels are compiled later", flush=True
                )
            for record in results.read(out)["cells"] if out.exists() else []:
                if "first_call_s" in record:
                    found[record["kind"], gpu_table.cell_of(record).label] = record["first_call_s"]
    return found


def run(cells: list[Cell], arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill the result, a record a cell; what is wrong or fails is said at once."""
    begin, compile_s = time.monotonic(), 0.0
    first = first_calls(arguments) if arguments.jobs and not (arguments.dry or arguments.part) else {}
    cache_bytes = 0 if arguments.part else torch.cuda.get_device_properties(0).L2_cache_size
    once = arguments.dry or bool(arguments.part)
    for cell in cells:
        if time.monotonic() - begin > arguments.seconds:
            result["cells"].append({**cell.record(), "skipped": f"{arguments.seconds:.0f} s were over"})
            continue
        try:
            record = measure(cell, cache_bytes, once, compile_s < COMPILE_S)
            compile_s += record["first_call_s"].get("compile", 0.0)
            record["first_call_s"] = first.get((cell.kind, cell.label), record["first_call_s"])
        except Exception as error:  # the other cells are worth having
            record = {**cell.record(), "failed": gpu_variants.reason(error)}
        result["cells"].append(record)
        if what := unfit(record):
            print(f"{cell.label}: {what}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if arguments.out:
            results.write(arguments.out, result)
    if arguments.out:
        results.write(arguments.out, result)  # with the cells that were skipped
    print(f"{len(result['cells'])} cells in {time.monotonic() - begin:.0f} s", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: results/gpu.json of a full run, else build/bench_gpu.json")
    parser.add_argument("--quick", action="store_true", help="a chosen subset, a minute")
    parser.add_argument("--cells", default="", help="only cells whose label contains this text")
    parser.add_argument("--kinds", default=",".join(gpu_cells.KINDS), help="only cells of these kinds")
    parser.add_argument("--seconds", type=float, default=150.0, help="after so long no further cell is begun")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile before the run; 0: none")
    parser.add_argument("--dry", action="store_true", help="run every call once on few rows, time nothing")
    parser.add_argument("--part", default="", help="i/n: only call every n-th cell from the i-th on, as such a process")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: needs a CUDA device, torch finds none; run it on a machine with a GPU")
    cells = gpu_cells.grid(tuple(arguments.kinds.split(",")), arguments.quick, arguments.cells)
    if not arguments.out and not arguments.dry and not arguments.part:
        # a partial run must not take the place of the full run that the documentation quotes
        full = len(cells) == len(gpu_cells.grid())
        arguments.out = results.RESULTS / "gpu.json" if full else Path("build/bench_gpu.json")
    if arguments.part:
        first, step = map(int, arguments.part.split("/"))
        cells = cells[first::step]
    if arguments.dry:
        cells = [tiny(cell) for cell in cells]
    # torch.compile's backward is called again on the same graph
    importlib.import_module("torch._functorch.config").donated_buffer = False
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as empty:
        if not arguments.part:  # the first calls compile; parts share the cache of the run that started them
            os.environ.setdefault("TRITON_CACHE_DIR", empty)
        result: dict[str, Any] = {"environment": environment(), "cells": []}
        run(cells, arguments, result)
    if not arguments.part:
        print("\n".join(gpu_table.absent_lines(result)))
    if arguments.dry:
        sys.exit(any(unfit(record) for record in result["cells"]))
    if arguments.out and not arguments.part:
        gpu_table.write(arguments.out)


if __name__ == "__main__":
    # one: inductor's own pool of compilers would run beside the measurement
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    main()
