"""Triton kernels compiled without a GPU: the launches that a call would make, and what the compiler made of each.

Here: `launches(call)` records instead of launching; `compiled(launch, capability)` compiles one for that architecture
exactly as the launch would, and reads registers, spills and shared memory off the assembler's report.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normkit.kernels.triton_run import Launcher

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    ttgir: str

    @property
    def widest_load_bits(self) -> int:
        """Of one thread's load from global memory, synchronous or not."""
        widths = [0]
        for vector, bits in re.findall(r"ld\.global(?:\.[\w:]+)*?(?:\.(v[24]))?\.[bfu](\d+)", self.ptx):
            widths.append(int(bits) * int(vector[1:] or 1) if vector else int(bits))
        widths += [
            8 * int(size)
            for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)", self.ptx)
            if not size.startswith("0x")
        ]
        widths += [
            8 * int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", self.ptx)
        ]
        return max(widths)


def launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch; its results hold nothing."""
    found: list[Launch] = []

    def record(launcher: Launcher, _: int, grid: tuple[int, ...], pointers: Any, numbers: Any) -> None:
        found.append(Launch(launcher.kernel, grid, (*pointers, *numbers, *launcher.constants), launcher.options))

    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "launch", record)
        call()
    return found


def compiled(launch: Launch, capability: int) -> Compiled:
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    kernel = launch.kernel
    assert len(kernel.params) == len(launch.arguments), kernel
    for number, (parameter, value) in enumerate(zip(kernel.params, launch.arguments, strict=True)):
        if (
            parameter.is_constexpr
            or value is None
            or (_is_int(value) and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name] = "constexpr"
            constants[(number,)] = value
            continue
        if isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        else:
            assert _is_int(value), (parameter.name, value)
            signature[parameter.name] = "i64" if value >= 2**31 else "i32"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, spilled = _assembled(built.asm["ptx"], capability)
    return Compiled(registers, spilled, built.metadata.shared, built.asm["ptx"], built.asm["ttgir"])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, (bool, tl.dtype))


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as ptxas reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    program = get_ptxas(capability)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = "sm_90a" if capability == 90 else f"sm_{capability}a" if capability >= 100 else f"sm_{capability}"
        command = [program.path, "-v", f"--gpu-name={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", report))
    return registers, max(int(number) for number in re.findall(r"(\d+) bytes spill stores", report))
