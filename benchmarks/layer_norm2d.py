"""LayerNorm over the channels of images: normkit.LayerNorm2d beside what is written without it.

    python benchmarks/layer_norm2d.py [--seconds 1.5] [--tries 3] [--out benchmarks/results/layer_norm2d.json]

Sizes of ConvNeXt's stages, both memory formats, float32 and bfloat16, forward without gradients and forward with
backward (x, weight and bias). The variants of a cell are called in turn (timing.py); the table prints medians in
microseconds and how many times as long as ours each of the others takes:

- normkit:  normkit.LayerNorm2d
- permuted: x.permute(0, 2, 3, 1), torch's layer_norm, permuted back; for channels-first x its output is channels-last
- formula:  ConvNeXt's own for channels-first: mean, (x - mean)^2, mean, division, and weight and bias in broadcast
- copy:     target.copy_(x) into existing memory, which forward cannot undercut where x is beyond the caches

A cell is measured `--tries` times, and that time counts whose copy was the fastest: what else the machine did then was
the least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import results
import timing
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import normkit

SHAPES = ((32, 64, 56, 56), (64, 256, 14, 14), (8, 768, 7, 7))
FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "forward+backward")
EPS = 1e-6  # ConvNeXt's
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def permuted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, EPS).permute(0, 3, 1, 2)


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    deviation = x - x.mean(1, keepdim=True)
    normalized = deviation / torch.sqrt(deviation.pow(2).mean(1, keepdim=True) + EPS)
    return weight[:, None, None] * normalized + bias[:, None, None]


def ours(layer: torch.nn.Module) -> Norm:
    return lambda x, weight, bias: layer(x)


def task(norm: Norm, x: Tensor, layer: torch.nn.LayerNorm, dout: Tensor | None) -> Callable[[], object]:
    """One call of the norm; with dout also the gradients of x and of the layer's parameters."""
    weight, bias = layer.weight, layer.bias
    if dout is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return norm(x, weight, bias)

        return forward
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(norm(leaf, weight, bias), [leaf, weight, bias], dout)


def measure(shape: tuple[int, ...], layout: str, dtype: str, direction: str, seconds: float) -> dict[str, Any]:
    memory_format = FORMATS[layout]
    x, dout = (torch.randn(shape).to(getattr(torch, dtype)).to(memory_format=memory_format) for _ in range(2))
    layer = normkit.LayerNorm2d(shape[1], eps=EPS, dtype=x.dtype)
    target = torch.empty_like(x)
    backward = dout if direction != "forward" else None
    calls = {
        "normkit": task(ours(layer), x, layer, backward),
        "permuted": task(permuted, x, layer, backward),
        "formula": task(formula, x, layer, backward),
        "copy": lambda: target.copy_(x),
    }
    for call in calls.values():
        call()
    times = {name: asdict(found) for name, found in timing.measure(calls, seconds).items()}
    return {"shape": list(shape), "layout": layout, "dtype": dtype, "direction": direction, "time_us": times}


def measure_quietly(tries: int, *cell: Any) -> dict[str, Any]:
    """The measurement whose copy was least disturbed."""
    return min((measure(*cell) for _ in range(tries)), key=lambda found: found["time_us"]["copy"]["median"])


def print_table(result: dict[str, Any], console: Console) -> None:
    environment = result["environment"]
    table = Table(title=f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}; us")
    for name in ("shape", "memory", "dtype", "direction", "normkit", "permuted", "ratio", "formula", "ratio", "copy"):
        table.add_column(name, justify="left" if name in ("shape", "memory", "dtype", "direction") else "right")
    for cell in result["cells"]:
        times = {name: found["median"] for name, found in cell["time_us"].items()}
        table.add_row(
            "x".join(map(str, cell["shape"])),
            cell["layout"],
            cell["dtype"],
            cell["direction"],
            f"{times['normkit']:.0f}",
            f"{times['permuted']:.0f}",
            f"{times['permuted'] / times['normkit']:.1f}",
            f"{times['formula']:.0f}",
            f"{times['formula'] / times['normkit']:.1f}",
            f"{times['copy']:.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each cell and try")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=results.RESULTS / "layer_norm2d.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"environment": results.environment(), "cells": []}
    for shape in SHAPES:
        for layout in FORMATS:
            for dtype in DTYPES:
                for direction in DIRECTIONS:
                    cell = (shape, layout, dtype, direction, given.seconds)
                    result["cells"].append(measure_quietly(given.tries, *cell))
                    results.write(given.out, result)
    print_table(result, Console(width=140))


if __name__ == "__main__":
    main()
