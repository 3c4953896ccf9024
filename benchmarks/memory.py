"""What forward keeps for backward, and the peak memory of forward and backward: benchmarks/results/memory.json.

    python benchmarks/memory.py

LayerNorm, RMSNorm and BatchNorm2d on a 64 MB float32 input, ours and torch's, each in a fresh process, so that no
memory of one is lent to the next. Peak: the high-water mark of resident memory above what was resident once input and
incoming gradient existed; it holds output, gradient, what is saved and whatever was temporary. Saved tensors that
share the input's memory are counted apart: they cost nothing while the input lives.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
import torch
from rich.console import Console
from rich.table import Table

import normkit

SHAPES = {"LayerNorm": (4096, 4096), "RMSNorm": (4096, 4096), "BatchNorm2d": (16, 64, 128, 128)}  # 64 MiB each
QKV_BATCH, QKV_HEADS, QKV_SIZE = (8, 512), 12, 128
LIBRARIES = {"normkit": normkit, "torch": torch.nn}


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def restart_peak() -> None:
    """Set the high-water mark back to what is resident now; where the system refuses, it stays where it was."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The high-water mark; getrusage's is the same but cannot be set back, so it only stands in."""
    try:
        return resident_bytes("VmHWM")
    except AssertionError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def saved_bytes(layer: torch.nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Bytes that forward saves, by whether they share the input's memory."""
    own = {"input": 0, "other": 0}
    shared = x.untyped_storage().data_ptr()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        address = saved.untyped_storage().data_ptr()
        if address not in parameters:
            own["input" if address == shared else "other"] += saved.nbytes
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
    return own


def make(library: str, norm: str) -> torch.nn.Module:
    shape = SHAPES[norm]
    layer: torch.nn.Module = getattr(LIBRARIES[library], norm)(shape[1] if norm == "BatchNorm2d" else shape[-1])
    return layer


def measure(library: str, norm: str) -> dict[str, Any]:
    """One row of the table, in a process of its own."""
    layer = make(library, norm)
    small = torch.randn(max(SHAPES[norm][0] // 16, 1), *SHAPES[norm][1:], requires_grad=True)
    # loads code and starts threads; large enough to take the paths that the 16 times larger input takes
    torch.autograd.grad(layer(small), [small, *layer.parameters()], torch.ones_like(small))
    del small
    x = torch.randn(SHAPES[norm], requires_grad=True)
    dout = torch.randn(SHAPES[norm])
    restart_peak()
    before = resident_bytes("VmRSS")
    out = layer(x)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], dout)
    peak = peak_bytes() - before
    assert out.shape == gradients[0].shape
    saved = saved_bytes(layer, x)
    return {
        "norm": norm,
        "library": library,
        "bytes_x": x.nbytes,
        "saved_bytes": saved["other"],
        "saved_input_bytes": saved["input"],
        "peak_bytes": peak,
    }


def strided() -> dict[str, Any]:
    """Whether the q slice of a fused qkv is saved in place: a copy would be as large as q, and not share its memory."""
    qkv = torch.randn(*QKV_BATCH, 3, QKV_HEADS, QKV_SIZE)
    q = qkv[:, :, 0].detach().requires_grad_()
    found = {}
    for norm in ("LayerNorm", "RMSNorm"):
        saved = saved_bytes(getattr(normkit, norm)(QKV_SIZE), q)
        found[norm] = {"saved_in_place": saved["input"] == q.nbytes, "saved_bytes": saved["other"]}
    return {"shape": list(q.shape), "strides": list(q.stride()), "bytes_x": q.nbytes, "norms": found}


def in_fresh_process(*arguments: str) -> Any:
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="float32, MiB; peak is above input and incoming gradient")
    for column in ("norm", "library", "input", "saved", "saved, input's memory", "peak", "peak / input"):
        shown.add_column(column, justify="left" if column in ("norm", "library") else "right")
    for row in rows:
        sizes = [
            f"{row[name] / (1 << 20):.2f}" for name in ("bytes_x", "saved_bytes", "saved_input_bytes", "peak_bytes")
        ]
        shown.add_row(row["norm"], row["library"], *sizes, f"{row['peak_bytes'] / row['bytes_x']:.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.RESULTS / "memory.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(strided() if arguments.child == ["strided"] else measure(*arguments.child)))
        return
    rows = [in_fresh_process(library, norm) for norm in SHAPES for library in LIBRARIES]
    slices = in_fresh_process("strided")
    console = Console()
    console.print(table(rows))
    console.print("q slice of a fused qkv:", slices)
    result = {"environment": results.environment(), "layers": rows, "strided": slices}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{arguments.out} written")


if __name__ == "__main__":
    main()
