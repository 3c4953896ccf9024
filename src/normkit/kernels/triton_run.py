"""What every Triton kernel needs around it: a launch on the tensors' device, and what the device is.

Here: `Launcher`, `contiguous`, `multiprocessors`, `shared_bytes`, `triton_dtype`.
May import: torch, triton.
Read next: triton_rows.py and triton_channels.py, which launch.
"""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ACCUMULATION = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
# Squares of float32 overflow from 2^64 on. What they do so for is taken times this power of two: its largest value is
# then under 2^54, whose square can be summed 2^20 times, and what underflows does not matter beside it. float16 ends at
# 65504, whose square is no matter for float32.
SCALES = {torch.float32: 2.0**-74, torch.bfloat16: 2.0**-74, torch.float64: 2.0**-600, torch.float16: 0.0}

# Triton reads the variable where a kernel is decorated: its interpreter runs kernels on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED_MULTIPROCESSORS = 3  # few and odd: programs with several tiles and programs with none

# Of a block, in bytes: CUDA C++ programming guide, technical specifications per compute capability. Others have the
# smallest of them.
_SHARED_BYTES = {(8, 0): 163 * 1024, (8, 7): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (10, 3): 227 * 1024}
_LEAST_SHARED_BYTES = 99 * 1024

_log = logging.getLogger("normkit")
_WORTH_TELLING_S = 0.05  # a launch that compiles takes 0.3 s and more, one that finds all compiled 1e-4

# Compiled kernels take the arguments of their function, constexpr ones among them, in the versions from here on.
_REUSES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
_enter: Any = triton.knobs.runtime.launch_enter_hook if _REUSES else None
_leave: Any = triton.knobs.runtime.launch_exit_hook if _REUSES else None


def triton_dtype(dtype: torch.dtype) -> Any:
    """The accumulation dtype for input of `dtype`, as a kernel's constexpr."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def contiguous(values: Tensor | None) -> Tensor | None:
    """`values.contiguous()` where there are any, asked for only where memory does not lie so."""
    return values if values is None or values.is_contiguous() else values.contiguous()


def multiprocessors(device: int) -> int:
    """Of the device with that number; -1 is the CPU of the interpreter."""
    return _INTERPRETED_MULTIPROCESSORS if device < 0 else _multiprocessors(device)


@cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def shared_bytes(device: int) -> int:
    """How much shared memory a program may have on the device."""
    if device < 0:
        return _LEAST_SHARED_BYTES
    return _SHARED_BYTES.get(torch.cuda.get_device_capability(device), _LEAST_SHARED_BYTES)


class Launcher:
    """A kernel with its constants, and what triton compiled for the arguments it had so far.

    Triton's own way from arguments to the compiled kernel took 30 us of a call on the host where torch's whole
    layer_norm took 10. Which arguments share one: triton specializes on dtypes, on addresses that 16 divides, and of
    integers on 1, multiples of 16 and 64 bits.
    """

    def __init__(self, kernel: Any, constants: tuple[Any, ...], num_warps: int, registers: int | None = None) -> None:
        self.kernel, self.constants = kernel, constants
        self.options = {"num_warps": num_warps, "num_stages": 1}
        if registers is not None:  # of a thread, at most
            self.options["maxnreg"] = registers
        self._compiled: dict[Any, Any] = {}
        self._kinds: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def launch(
        self, device: int, grid: tuple[int, ...], pointers: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
    ) -> None:
        """On the device's current stream. A kernel's parameters are pointers, then numbers, then constants."""
        if INTERPRETED:
            self.kernel[grid](*pointers, *numbers, *self.constants)
        elif device == torch._C._cuda_getDevice():
            self._launch(device, grid, pointers, numbers)
        else:
            with torch.cuda.device(device):
                self._launch(device, grid, pointers, numbers)

    def _launch(
        self, device: int, grid: tuple[int, ...], pointers: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
    ) -> None:
        addresses: list[int | None] = []
        dtypes: list[Any] = [device]
        bits = 0
        for pointer in pointers:
            if pointer is None:
                addresses.append(None)
                dtypes.append(None)
            else:
                address = pointer.data_ptr()
                addresses.append(address)
                dtypes.append(pointer.dtype)
                bits |= address
        if bits & 15:
            dtypes.append(tuple([address is not None and address & 15 == 0 for address in addresses]))
        key = (self._kinds.get(numbers) or self._kinds_of(numbers), *dtypes)
        compiled = self._compiled.get(key)
        if compiled is None or _enter.calls or _leave.calls:  # a profiler wants to see the launch
            begin = time.perf_counter()
            compiled = self.kernel[grid](*pointers, *numbers, *self.constants, **self.options)
            if (seconds := time.perf_counter() - begin) > _WORTH_TELLING_S:
                _log.info("compiled %s in %.1f s; later calls reuse it", self.kernel.fn.__name__, seconds)
            if _REUSES:
                self._compiled[key] = compiled
            return
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        function, packed = compiled.function, compiled.packed_metadata
        compiled.run(x, y, z, stream, function, packed, None, None, None, *addresses, *numbers, *self.constants)

    def _kinds_of(self, numbers: tuple[Any, ...]) -> tuple[int, ...]:
        """What triton looks at: an integer's value 1, whether 16 divides it, whether it has 64 bits."""
        kinds = tuple(
            [-1 if type(n) is float else (n == 1) + 2 * (n & 15 == 0) + 4 * (n > 0x7FFFFFFF) for n in numbers]
        )
        if len(self._kinds) > 4096:  # as many sizes as that are not seen again
            self._kinds.clear()
        self._kinds[numbers] = kinds
        return kinds
