"""Whether the Triton kernels can run here, and the kernels themselves, loaded when the first call needs them.

Here: `unavailable`, `off`, `has_kernels`, `interpreted`, and TRITON, the primitives of the Backend protocol.
May import: torch; triton_primitives, at the first use.
Read next: triton_rows.py and triton_channels.py, from tensors to launches.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

OLDEST_TRITON = (3, 2)  # kernels are compiled and interpreted with it in the tests of a release
OLDEST_CAPABILITY = (8, 0)  # bfloat16 arithmetic and asynchronous copies; the oldest that the tests compile for


class _Primitives:
    """The functions of triton_primitives.py; importing triton takes most of a second."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(importlib.import_module("normkit.kernels.triton_primitives"), name)
        setattr(self, name, found)
        return found


TRITON: Any = _Primitives()


def interpreted() -> bool:
    """Whether triton runs kernels on CPU tensors, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def unavailable() -> str | None:
    """Why no Triton kernel runs in this process, in a sentence; None if they do."""
    if not interpreted():
        if torch.version.hip is not None:
            return "this torch is built for ROCm, the Triton kernels have been made for CUDA"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install normkit[gpu]"
    version = importlib.metadata.version("triton")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < OLDEST_TRITON:
        return f"triton {version} is too old, the kernels need 3.2 or newer; pip install --upgrade triton"
    return None


def off(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> str | None:
    """Why the kernels do not take these plain tensors; None if they do."""
    if (why := unavailable()) is not None:
        return why
    first = None
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cuda and not (tensor.is_cpu and interpreted()):
            return f"x is on {tensor.device}, Triton kernels take CUDA tensors"
        if tensor.dtype not in dtypes:
            return f"x has dtype {tensor.dtype}, Triton kernels take float32, float64, bfloat16 and float16"
        if first is None:
            first = tensor
        elif tensor.device != first.device:
            return f"x is on {first.device}, another tensor of the call on {tensor.device}"
    if first is not None and first.is_cuda and (capability := _capability(first.device.index)) < OLDEST_CAPABILITY:
        return f"x is on a device of compute capability {capability[0]}.{capability[1]}, Triton kernels need 8.0"
    return None


@cache
def has_kernels(device: int) -> bool:
    """Whether they take tensors of the CUDA device with that number; -1, no CUDA device, has none."""
    return device >= 0 and unavailable() is None and _capability(device) >= OLDEST_CAPABILITY


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
