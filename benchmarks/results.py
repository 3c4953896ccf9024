"""The result file: {"environment": {...}, "cells": [...]}, written after every cell.

Here: read, write without ever leaving half a file, the environment, and small look-ups that table, goals and plot
share. No torch at import, so that a result file can be read anywhere.
"""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from cells import Cell

RESULTS = Path(__file__).parent / "results"
UNITS = {"K": 1 << 10, "M": 1 << 20}


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    head = json.dumps(result["environment"], indent=1)
    cells = ",\n".join(json.dumps(cell) for cell in result["cells"])  # a cell a line: a diff shows which cells moved
    partial.write_text(f'{{"environment": {head},\n"cells": [\n{cells}\n]}}\n')
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def append(path: Path, cell: dict[str, Any]) -> None:
    result = read(path)
    result["cells"].append(cell)
    write(path, result)


def label(record: dict[str, Any]) -> str:
    """The cell's name in lists; the number of threads only where it is not the default."""
    names = ("family", "norm", "layout", "dtype", "direction", "mode", "allocation")
    threads = record["threads"] if record.get("scaling") else 0
    return Cell(**{name: record[name] for name in names}, shape=tuple(record["shape"]), threads=threads).label


def time_us(record: dict[str, Any], variant: str) -> float | None:
    """The median of a variant, None if the cell has no such variant."""
    timing = record["time_us"].get(variant)
    return None if timing is None else float(timing["median"])


def fastest_peer_us(record: dict[str, Any]) -> float | None:
    """The faster of torch eager and torch.compile: the two that allocate their output as our layer does."""
    times = [time for name in ("torch", "compile") if (time := time_us(record, name)) is not None]
    return min(times, default=None)


def llc_bytes() -> int:
    """The last-level cache that one core reaches, from sysfs.

    Not getconf LEVEL3_CACHE_SIZE, which on an AMD machine of several chiplets adds up caches that no core shares:
    320 MiB there where a core reaches 32 MiB.
    """
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        found = re.fullmatch(r"(\d+)([KM]?)", (index / "size").read_text().strip())
        if found:
            sizes.append(int(found[1]) * UNITS.get(found[2], 1))
    return max(sizes, default=32 << 20)


def _cpu() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.processor()


def _thp() -> str:
    """The kernel's own policy: with "always", the default allocation has huge pages as well."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", path.read_text()) if path.exists() else None
    return found[1] if found else "none"


def environment() -> dict[str, Any]:
    import datetime

    import onnxruntime
    import torch

    import normkit
    from normkit.kernels import cpu

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "llc_bytes": llc_bytes(),
        "huge_pages": _thp(),
        "torch": torch.__version__,
        "normkit": normkit.__version__,
        "onnxruntime": onnxruntime.__version__,
        "isa": cpu.isa(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
