"""What every Triton kernel needs around it: a launch on the tensors' device, and what the device is.

Here: `run`, `multiprocessors`, `triton_dtype`.
May import: torch, triton.
Read next: triton_rows.py and triton_channels.py, which launch.
"""

from __future__ import annotations

import os
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
_INTERPRETED_MULTIPROCESSORS = 3  # few and odd: programs with several tiles and programs with none

# Triton reads the variable where a kernel is decorated: its interpreter runs kernels on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Compiled kernels take the arguments of their function, constexpr ones among them, in the versions from here on.
_REUSES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def triton_dtype(dtype: torch.dtype) -> Any:
    """The accumulation dtype for input of `dtype`, as a kernel's constexpr."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def multiprocessors(x: Tensor) -> int:
    """Of x's device."""
    return _multiprocessors(x.device.index) if x.is_cuda else _INTERPRETED_MULTIPROCESSORS


@cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def run(kernel: Any, x: Tensor, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 1) -> None:
    """Launches on x's device and its current stream. A kernel's constexpr parameters come last."""
    if INTERPRETED:
        kernel[grid](*arguments)
    elif x.device.index == torch.cuda.current_device():
        _launch(kernel, x.device.index, grid, arguments, num_warps, num_stages)
    else:
        with torch.cuda.device(x.device):
            _launch(kernel, x.device.index, grid, arguments, num_warps, num_stages)


_compiled: dict[Any, Any] = {}
_run_time_parameters: dict[Any, int] = {}
_hooks: tuple[Any, ...] = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook) if _REUSES else ()


def _launch(
    kernel: Any, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...], num_warps: int, num_stages: int
) -> None:
    """`kernel[grid](*arguments)`, by what triton compiled at the first call with such arguments.

    Triton's own way to find that took 30 us of a call on the host where torch's whole layer_norm took 10.
    """
    function = kernel.fn  # the kernel itself takes a microsecond to hash
    number = _run_time_parameters.get(function)
    if number is None:
        number = _run_time_parameters[function] = sum(not parameter.is_constexpr for parameter in kernel.params)
    key: list[Any] = [function, device, num_warps, num_stages, arguments[number:]]
    values = list(arguments)
    for i in range(number):
        argument = values[i]
        if argument is None:
            key.append(None)
        elif argument.__class__ is int:
            # what triton specializes on: 1, multiples of 16, and numbers of 64 bits
            key.append((argument == 1) + 2 * (argument & 15 == 0) + 4 * (argument > 0x7FFFFFFF))
        elif argument.__class__ is float:
            key.append(float)
        else:
            address = values[i] = argument.data_ptr()
            key.append(argument.dtype)
            key.append(address & 15 == 0)
    known = tuple(key)
    compiled = _compiled.get(known)
    if compiled is None:
        compiled = kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages)
        if _REUSES:
            _compiled[known] = compiled
    elif any(hook.calls for hook in _hooks):  # a profiler wants to see the launch
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages)
    else:
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
