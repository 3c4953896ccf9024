"""What the public functions share around a computation: overriding tensors, profiler labels, autocast, recording.

May import: torch.
Read next: rows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.overrides import handle_torch_function

Returned = TypeVar("Returned")


def profiled() -> bool:
    """Whether a profiler wants labels. Asked before the flag is read, since torch.compile would guard on it."""
    return not torch.compiler.is_compiling() and profiler._is_profiler_enabled


def overridden(
    function: Callable[..., Returned], relevant: tuple[Tensor | None, ...], *args: Any, **kwargs: Any
) -> Returned:
    """Hand the call to a tensor subclass or function mode, as torch's own functions do."""
    result: Returned = handle_torch_function(function, relevant, *args, **kwargs)
    return result


def apart(function: Callable[..., Returned], *args: Any, **kwargs: Any) -> Returned:
    """The call between two graphs of torch.compile: collectives do not belong into one."""
    result: Returned = torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]
    return result


def autocast_widens(dtype: torch.dtype) -> bool:
    """Whether torch's autocast runs row norms of `dtype` on CUDA in float32; it leaves them alone on CPU."""
    return dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cuda")


def requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
