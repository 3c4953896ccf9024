"""Norms of one sample's statistics: GroupNorm, InstanceNorm and LayerNorm2d beside what is used without them.

    python benchmarks/sample_norms.py [--seconds 1] [--tries 3] [--out benchmarks/results/sample_norms.json]

Sizes of ResNets, diffusion U-Nets, style transfer, 3D segmentation and ConvNeXt's stages; forward without gradients
and forward with backward (x, weight and bias). The variants of a cell are called in turn (timing.py); the table prints
medians in microseconds and how many times as long as ours each of the others takes:

- normkit: our layer
- torch:   torch.nn's layer; for LayerNorm2d x.permute(0, 2, 3, 1), torch's layer_norm, permuted back, whose output for
  channels-first x is channels-last
- compile: torch.compile of that; for LayerNorm2d of ConvNeXt's own formula for channels-first
- copy:    target.copy_(x) into existing memory, which forward cannot undercut where x is beyond the caches

A cell is measured `--tries` times, and that time counts whose copy was the fastest: what else the machine did then was
the least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results
import timing
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import normkit

EPS = 1e-5
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Cell:
    norm: str  # a class of normkit
    shape: tuple[int, ...]
    layout: str
    dtype: str
    direction: str


INPUTS = (
    ("GroupNorm", (32, 64, 56, 56), "channels_first"),
    ("GroupNorm", (64, 256, 14, 14), "channels_first"),
    ("GroupNorm", (2, 320, 64, 64), "channels_first"),
    ("GroupNorm", (2, 320, 64, 64), "channels_last"),
    ("GroupNorm", (2, 1280, 8, 8), "channels_first"),
    ("InstanceNorm2d", (4, 64, 128, 128), "channels_first"),
    ("InstanceNorm3d", (2, 32, 64, 64, 64), "channels_first"),
    ("LayerNorm2d", (32, 64, 56, 56), "channels_first"),
    ("LayerNorm2d", (32, 64, 56, 56), "channels_last"),
    ("LayerNorm2d", (64, 256, 14, 14), "channels_first"),
    ("LayerNorm2d", (64, 256, 14, 14), "channels_last"),
    ("LayerNorm2d", (8, 768, 7, 7), "channels_first"),
    ("LayerNorm2d", (8, 768, 7, 7), "channels_last"),
)
CELLS = [
    Cell(norm, shape, layout, dtype, direction)
    for norm, shape, layout in INPUTS
    for dtype in ("float32", "bfloat16")
    for direction in DIRECTIONS
]


class Permuted(torch.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Formula(torch.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        deviation = x - x.mean(1, keepdim=True)
        normalized = deviation / torch.sqrt(deviation.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * normalized + self.bias[:, None, None]


def layers(cell: Cell) -> dict[str, torch.nn.Module]:
    """Ours, torch's, and what torch.compile compiles."""
    channels, dtype = cell.shape[1], getattr(torch, cell.dtype)
    if cell.norm == "LayerNorm2d":
        classes = {"normkit": normkit.LayerNorm2d, "torch": Permuted, "compile": Formula}
        return {name: one(channels, EPS, dtype=dtype) for name, one in classes.items()}
    arguments = (32, channels, EPS) if cell.norm == "GroupNorm" else (channels, EPS)
    more = {} if cell.norm == "GroupNorm" else {"affine": True}
    modules = {"normkit": normkit, "torch": torch.nn, "compile": torch.nn}
    return {name: getattr(module, cell.norm)(*arguments, dtype=dtype, **more) for name, module in modules.items()}


def task(layer: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, dout: Tensor | None) -> Any:
    """One call of the layer; with dout also the gradients of x and of the parameters."""
    if dout is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(layer(leaf), [leaf, *parameters], dout)


def measure(cell: Cell, seconds: float, tries: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    memory_format = torch.channels_last if cell.layout == "channels_last" else torch.contiguous_format
    dtype = getattr(torch, cell.dtype)
    x, dout = (torch.randn(cell.shape).to(dtype=dtype, memory_format=memory_format) for _ in range(2))
    target = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {}
    for name, layer in layers(cell).items():
        function = torch.compile(layer, dynamic=False) if name == "compile" else layer
        calls[name] = task(function, list(layer.parameters()), x, dout if cell.direction != "forward" else None)
    calls["copy"] = lambda: target.copy_(x)
    for call in calls.values():
        call()
    found = min((timing.measure(calls, seconds) for _ in range(tries)), key=lambda times: times["copy"].median)
    times = {name: asdict(time) for name, time in found.items()}
    return asdict(cell) | {"shape": list(cell.shape), "time_us": times}


def print_table(result: dict[str, Any], console: Console) -> None:
    environment = result["environment"]
    table = Table(title=f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}; us")
    words = ("norm", "shape", "memory", "dtype", "direction")
    for name in (*words, "normkit", "torch", "ratio", "compile", "ratio", "copy"):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    for cell in result["cells"]:
        times = {name: found["median"] for name, found in cell["time_us"].items()}
        table.add_row(
            cell["norm"],
            "x".join(map(str, cell["shape"])),
            cell["layout"],
            cell["dtype"],
            cell["direction"],
            f"{times['normkit']:.0f}",
            f"{times['torch']:.0f}",
            f"{times['torch'] / times['normkit']:.2f}",
            f"{times['compile']:.0f}",
            f"{times['compile'] / times['normkit']:.2f}",
            f"{times['copy']:.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell and try")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--norms", default="", help="only norms whose name contains this text")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "sample_norms.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"environment": results.environment(), "cells": []}
    for cell in (cell for cell in CELLS if given.norms in cell.norm):
        result["cells"].append(measure(cell, given.seconds, given.tries))
        results.write(given.out, result)
    print_table(result, Console(width=160))


if __name__ == "__main__":
    main()
