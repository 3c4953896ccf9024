"""normkit's functions on a CUDA device for tests that make CPU tensors; under Triton's interpreter on the CPU itself.

Here: INTERPRETED, DEVICE, `moved`, `Triton`: arguments go to the device with their strides, results come back,
gradients go through, running statistics are changed in place; every call is forced to the Triton backend.
Read next: test_triton.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import normkit
import normkit.functional as NF

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x
        size = sum((length - 1) * abs(stride) for length, stride in zip(x.shape, x.stride(), strict=True)) + 1
        if x.numel() == 0:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
        offset = x.storage_offset() % 16  # how the memory is aligned stays too
        memory = torch.full((size + offset,), float("nan"), dtype=torch.float64, device=DEVICE).to(x.dtype)
        memory[offset:] = torch.as_strided(x, (size,), (1,)).to(DEVICE)
        return memory.as_strided(x.shape, x.stride(), offset)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout.to(ctx.like.device)


def moved(x: Any) -> Any:
    return _Moved.apply(x) if isinstance(x, Tensor) and x.device.type != DEVICE else x


class Triton:
    """normkit.functional, its arguments moved to the device and its results back."""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with normkit.use_backend("triton"):
                result = getattr(NF, name)(
                    *map(moved, arguments), **{key: moved(value) for key, value in keywords.items()}
                )
            return result.cpu() if isinstance(result, Tensor) else type(result)(*(part.cpu() for part in result))

        return call

    def batch_norm(
        self,
        x: Tensor,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        *rest: Any,
        **keywords: Any,
    ) -> Tensor:
        means, variances = moved(running_mean), moved(running_var)
        with normkit.use_backend("triton"):
            out = NF.batch_norm(moved(x), means, variances, moved(weight), moved(bias), *rest, **keywords)
        if DEVICE != "cpu":
            for buffer, changed in ((running_mean, means), (running_var, variances)):
                if buffer is not None:
                    buffer.copy_(changed.cpu())
        return out.cpu()
