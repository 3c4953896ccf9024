"""A whole BatchNorm in Triton: three launches forward, three backward.

Here: `batch_norm_forward`, `batch_norm_with_running`, `batch_norm_backward`. By the primitives alone a dozen operations
of torch on vectors of C numbers would stand between two passes over x, and take longer than these.
May import: torch, reference (for the name of a count), launch, the kernels, triton_channels, triton_run.
Read next: batch_norm_kernels.py, what happens between the passes.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from normkit.kernels import launch
from normkit.kernels.batch_norm_kernels import finish_backward_kernel, finish_forward_kernel, stored_kernel
from normkit.kernels.triton_channels import affine, empty, in_layout, in_lines, partial_moments, partial_sums
from normkit.kernels.triton_run import ACCUMULATION, run, triton_dtype
from normkit.reference import Count

_BLOCK_C = 128  # channels of the kernels that work on vectors


def _optional(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _split_float(value: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is nearer to `value` than any one is."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def batch_norm_forward(
    x: Tensor,  # (B, C, S), not empty
    running_mean: Tensor | None,  # (C,), moved in place, as running_var
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    mask: Tensor | None = None,
    guarded: bool = False,
    tracked: Tensor | None = None,
    refused: Tensor | None = None,
) -> tuple[Tensor, Count, Tensor, Tensor]:
    """out, count, mean and rstd of a training batch; mean and rstd in float64.

    Running statistics move as `statistics.update_running` has it. Where `guarded`, not by a batch with statistics that
    are not finite in their dtypes; `tracked` and `refused` (0-d, int64) count what moved them and what was kept out.
    """
    x, channels_last = in_lines(x)
    channels = x.shape[1]
    partial, _ = partial_moments(x, mask, False)
    vectors = torch.empty((3, channels), dtype=ACCUMULATION[x.dtype], device=x.device)
    center, scale, shift = vectors
    mean, rstd = torch.empty((2, channels), dtype=torch.float64, device=x.device)
    count: Count = x.shape[0] * x.shape[2]
    counted = None
    if mask is not None:
        count = counted = torch.empty((), dtype=torch.int64, device=x.device)
    splits = partial.shape[1]
    block_p, block_c = launch.merging(splits)
    pointers = (partial, _optional(weight), _optional(bias), running_mean, running_var, mean, rstd, *vectors)
    pointers = (*pointers, counted, tracked, refused)
    numbers = (splits, channels, *_split_float(momentum), float(eps), guarded, block_p, block_c)
    run(finish_forward_kernel, x, (1,), *pointers, *numbers, num_warps=8)
    out = empty(x, channels_last)
    affine(x, None, mask, (center, scale, shift, None), 0, out, channels_last)
    return out, count, mean, rstd


def batch_norm_with_running(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out of x (B, C, S), not empty, with stored statistics, and copies of mean and rstd in the accumulation dtype."""
    x, channels_last = in_lines(x)
    channels = x.shape[1]
    vectors = torch.empty((5, channels), dtype=ACCUMULATION[x.dtype], device=x.device)
    mean, rstd, center, scale, shift = vectors
    pointers = (_optional(running_mean), _optional(running_var), _optional(weight), _optional(bias), *vectors)
    run(stored_kernel, x, (-(-channels // _BLOCK_C),), *pointers, channels, float(eps), _BLOCK_C, num_warps=4)
    out = empty(x, channels_last)
    affine(x, None, mask, (center, scale, shift, None), 0, out, channels_last)
    return out, mean, rstd


def batch_norm_backward(
    dout: Tensor,  # (B, C, S)
    x: Tensor,  # (B, C, S)
    mean: Tensor,  # (C,)
    rstd: Tensor,
    weight: Tensor | None,
    count: Count | None,  # of what shares the statistics; None: they are fixed
    mask: Tensor | None,
    needs: tuple[bool, bool],  # dx; dweight and dbias
    narrow: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias; the parameters' in `narrow`, or else in float64."""
    x, channels_last = in_lines(x)
    dout = in_layout(dout, channels_last)
    channels, acc = x.shape[1], ACCUMULATION[x.dtype]
    weight, mean, rstd = _optional(weight), mean.contiguous(), rstd.contiguous()
    vectors = torch.empty((3, channels), dtype=acc, device=x.device)
    a, b, c = vectors if count is not None else (vectors[0], None, None)
    gradients: list[Tensor | None] = [None, None]
    if needs[1]:
        gradients = [torch.empty(channels, dtype=narrow or torch.float64, device=x.device) for _ in range(2)]
    center = mean.to(acc)
    if needs[1] or count is not None:
        partial, _ = partial_sums(dout, x, center, mask, False, channels_last)
    else:
        partial = torch.zeros((2, 1, channels), dtype=torch.float64, device=x.device)
    splits = partial.shape[1]
    block_p, block_c = launch.merging(splits)
    counted = count if isinstance(count, Tensor) else None
    pointers = (partial, mean, rstd, weight, counted, a, b, c, *gradients)
    numbers = (splits, channels, 1 if isinstance(count, Tensor) or count is None else count, triton_dtype(x.dtype))
    grid = (-(-channels // block_c),)
    run(finish_backward_kernel, x, grid, *pointers, *numbers, block_p, block_c, num_warps=4)
    dx = None
    if needs[0]:
        dx = empty(x, channels_last)
        second = None if b is None else x
        affine(dout, second, mask, (center, a, b, c), 0, dx, channels_last, backward=True)
    return dx, gradients[0], gradients[1]
