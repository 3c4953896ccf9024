"""Our three norms beside torch's, in one interleaved run: microseconds and ratios to a memory copy of the same bytes.

    python benchmarks/layers.py [--quick] [--out benchmarks/results/layers.json]

Protocol: every variant of a cell is called in turn, round after round, so that whatever else the machine does falls on
all of them; medians over rounds, with the 10th and 90th percentile beside them. A canary, the same copy measured as
two variants, says how far two equal things came apart in that cell. Outputs are freshly allocated, as in a model,
unless THP_MEM_ALLOC_ENABLE=1 is set, which gives torch's own allocations huge pages; the result file records it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import normkit
from normkit.kernels import cpu

SHAPES = ((1, 4096), (64, 1024), (4096, 4096))
IMAGE = (32, 64, 56, 56)
MIN_ROUND_S = 2e-3  # a round repeats a small call until it is far above the timer's resolution


@dataclass
class Timing:
    """Microseconds of one call: the median over rounds, and the 10th and 90th percentile."""

    median_us: float
    p10_us: float
    p90_us: float


def measure(variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Time the variants in turn for about `seconds` in all."""
    repeats = {}
    for name, call in variants.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(MIN_ROUND_S / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[next(iter(samples))]) < 7:
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    timings = {}
    for name, values in samples.items():
        deciles = statistics.quantiles(values, n=10)
        timings[name] = Timing(statistics.median(values), deciles[0], deciles[-1])
    return timings


def layers(norm: str, shape: tuple[int, ...]) -> dict[str, torch.nn.Module]:
    """Our layer, torch's and torch's compiled, with the same arguments."""
    classes = {"layer": "LayerNorm", "rms": "RMSNorm", "batch": "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"}
    features = shape[1] if norm == "batch" else shape[-1]
    ours, theirs = (getattr(module, classes[norm])(features, eps=1e-5) for module in (normkit, torch.nn))
    return {"normkit": ours, "torch": theirs, "compile": theirs}


def forward(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def forward_backward(layer: torch.nn.Module, x: torch.Tensor, dout: torch.Tensor) -> Callable[[], object]:
    inputs = [x.detach().requires_grad_(), *layer.parameters()]
    return lambda: torch.autograd.grad(layer(inputs[0]), inputs, dout)


def cell(norm: str, shape: tuple[int, ...], backward: bool, seconds: float) -> dict[str, object]:
    """One row of the table: every variant on the same input. A single row takes BatchNorm in eval mode."""
    torch.manual_seed(0)
    torch.compiler.reset()
    x, dout = torch.randn(shape), torch.randn(shape)
    training = shape[0] > 1
    variants: dict[str, Callable[[], object]] = {}
    for name, layer in layers(norm, shape).items():
        layer.train(training)
        called = torch.compile(layer) if name == "compile" else layer
        variants[name] = forward_backward(called, x, dout) if backward else forward(called, x)
    target = torch.empty_like(x)
    variants["copy"] = lambda: target.copy_(x)
    variants["canary"] = lambda: target.copy_(x)
    timings = measure(variants, seconds)
    return {
        "norm": norm,
        "shape": shape,
        "mode": "train" if training else "eval",
        "direction": "forward+backward" if backward else "forward",
        "time_us": {name: vars(timing) for name, timing in timings.items()},
    }


def environment() -> dict[str, object]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "normkit": normkit.__version__,
        "isa": cpu.isa(),
        "thp": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
    }


def table(cells: list[dict[str, object]]) -> Table:
    columns = ("norm", "shape", "", "normkit us", "torch us", "compile us", "copy us", "torch/normkit", "normkit/copy")
    shown = Table(*columns, title="CPU, float32, medians")
    for row in cells:
        times = {name: timing["median_us"] for name, timing in row["time_us"].items()}  # type: ignore[attr-defined]
        figures = [f"{times[name]:.1f}" for name in ("normkit", "torch", "compile", "copy")]
        ratios = [f"{times['torch'] / times['normkit']:.2f}", f"{times['normkit'] / times['copy']:.2f}"]
        shown.add_row(f"{row['norm']} ({row['mode']})", str(row["shape"]), str(row["direction"]), *figures, *ratios)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.5 s a cell instead of 4 s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch._dynamo.config.cache_size_limit = 64
    seconds = 0.5 if arguments.quick else 4.0
    cells = [
        cell(norm, shape, backward, seconds)
        for norm in ("layer", "rms", "batch")
        for shape in ((*SHAPES, IMAGE) if norm == "batch" else SHAPES)
        for backward in (False, True)
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment(), "cells": cells}, indent=1) + "\n")
    console = Console(width=140)
    console.print(environment())
    console.print(table(cells))
    console.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
