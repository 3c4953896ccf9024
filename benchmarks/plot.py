"""Time of the row layers in copies of the same input, over its size: benchmarks/results/cpu.png.

    python benchmarks/plot.py [benchmarks/results/cpu.json]

One point per size: of the shapes that have the same bytes the most square one is drawn. float32, default allocation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import results
from cells import LINE, QKV, TALL

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, which colour-blind readers tell apart; the dashes and markers say the same again
LINES = {
    "layer": ("normkit", "#0072B2", "-", "o"),
    "kernel": ("normkit, memory given", "#56B4E9", "--", "o"),
    "torch": ("torch eager", "#D55E00", "-", "s"),
    "compile": ("torch.compile", "#009E73", "-", "^"),
    "onnx": ("onnxruntime, memory given", "#CC79A7", "--", "D"),
}
PANELS = [(norm, direction) for direction in ("forward", "forward+backward") for norm in ("layer_norm", "rms_norm")]
SKIPPED = (LINE, QKV, TALL)
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size_name(size: float, _: object = None) -> str:
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size:g} B"


def points(cells: list[dict[str, Any]], norm: str, direction: str, variant: str) -> list[tuple[int, float]]:
    """(bytes of x, time over the copy's) by size."""
    found = []
    for cell in cells:
        kind = (cell["norm"], cell["direction"], cell["dtype"], cell["allocation"])
        if kind != (norm, direction, "float32", "default") or cell["scaling"] or tuple(cell["shape"]) in SKIPPED:
            continue
        time, copy = results.time_us(cell, variant), results.time_us(cell, "copy")
        if time is not None and copy is not None:
            found.append((cell["bytes_x"], time / copy))
    return sorted(found)


def panel(axes: Axes, cells: list[dict[str, Any]], norm: str, direction: str, llc_bytes: int) -> None:
    sizes: set[int] = set()
    for variant, (name, colour, dash, marker) in LINES.items():
        line = points(cells, norm, direction, variant)
        sizes |= {size for size, _ in line}
        if line:
            width = 2.2 if variant == "layer" else 1.4
            order = 4 if variant == "layer" else 3
            axes.plot(
                *zip(*line, strict=True),
                dash,
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=width,
                label=name,
                zorder=order,
            )
    axes.set(xscale="log", yscale="log")
    axes.set_title(f"{norm}, {direction}", loc="left", fontsize=10)
    axes.axvline(llc_bytes, color="#777777", linewidth=1, linestyle=":", zorder=1)
    axes.axhline(1, color="#777777", linewidth=0.8, zorder=1)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    shown = [1 << power for power in range(14, 31, 2)]
    axes.xaxis.set_major_locator(FixedLocator([size for size in shown if sizes and size <= 2 * max(sizes)]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(size_name))
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.tick_params(labelsize=8)


def figure(result: dict[str, Any]) -> plt.Figure:
    environment = result["environment"]
    drawn, grid = plt.subplots(2, 2, figsize=(9.6, 7.2), sharex=True, sharey="row", layout="constrained")
    for axes, (norm, direction) in zip(grid.flat, PANELS, strict=True):
        panel(axes, result["cells"], norm, direction, environment["llc_bytes"])
    for axes in grid[:, 0]:
        axes.set_ylabel("time / time of a copy of x", fontsize=9)
    for axes in grid[1]:
        axes.tick_params(axis="x", rotation=30)
    top = grid[0, 0].get_ylim()[1]
    grid[0, 0].annotate(
        "last-level cache",
        (environment["llc_bytes"], top),
        xytext=(-3, -2),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color="#555555",
    )
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    drawn.supxlabel(
        f"bytes of x; float32, default allocation, {environment['cpu']}, {environment['threads']} threads, "
        f"torch {environment['torch']}; 1 is a copy of x into existing memory",
        fontsize=9,
    )
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=results.RESULTS / "cpu.json")
    path = parser.parse_args().path
    written = path.with_suffix(".png")
    figure(results.read(path)).savefig(written, dpi=130)
    print(f"{written} written")


if __name__ == "__main__":
    main()
