"""A whole BatchNorm in Triton: three launches forward, four where parts are many or of planes, and three backward.

Here: `batch_norm_forward`, `batch_norm_with_running`, `batch_norm_backward`; `commit_running`, for a batch that torch
normalized. By the primitives alone a dozen operations
of torch on vectors of C numbers would stand between two passes over x, and take longer than these.
May import: torch, reference (for the name of a count), launch, channel_lines, the kernels, triton_channels, triton_run.
Read next: batch_norm_kernels.py, what happens between the passes.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from normkit.kernels import launch
from normkit.kernels.batch_norm_kernels import (
    commit_kernel,
    finish_backward_kernel,
    finish_forward_kernel,
    stored_kernel,
)
from normkit.kernels.channel_lines import empty, in_layout, in_lines
from normkit.kernels.triton_channels import affine, merged_first, partial_moments, partial_sums
from normkit.kernels.triton_run import ACCUMULATION, Launcher, contiguous, triton_dtype
from normkit.reference import Count

_BLOCK_C = 128  # channels of the kernels that work on vectors


@lru_cache(maxsize=64)
def _forward_launcher(eps: float, guarded: bool, block_p: int, block_c: int) -> Launcher:
    return Launcher(finish_forward_kernel, (eps, guarded, block_p, block_c), 16)


_commit_launcher = Launcher(commit_kernel, (1024,), 4)


@lru_cache(maxsize=64)
def _stored_launcher(eps: float) -> Launcher:
    return Launcher(stored_kernel, (eps, _BLOCK_C), 4)


@lru_cache(maxsize=64)
def _backward_launcher(dtype: torch.dtype, block_p: int, block_c: int) -> Launcher:
    return Launcher(finish_backward_kernel, (triton_dtype(dtype), block_p, block_c), 4)


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
    batch, channels, space = x.shape
    partial = merged_first(partial_moments(x, channels_last, mask, False))
    center, scale, shift = torch.empty((3, channels), dtype=ACCUMULATION[x.dtype], device=x.device).unbind()
    mean, rstd = torch.empty((2, channels), dtype=torch.float64, device=x.device).unbind()
    count: Count = batch * space
    counted = None
    if mask is not None:
        count = counted = torch.empty((), dtype=torch.int64, device=x.device)
    splits = partial.shape[1]
    launcher = _forward_launcher(float(eps), guarded, *launch.merging(splits, alone=True))
    pointers = (
        partial, contiguous(weight), contiguous(bias), running_mean, running_var, mean, rstd, center, scale, shift,
        counted, tracked, refused,
    )  # fmt: skip
    launcher.launch(x.get_device(), (1,), pointers, (splits, channels, *_split_float(momentum)))
    out = empty(x, channels_last)
    affine(x, None, mask, (center, scale, shift, None), 0, out, channels_last)
    return out, count, mean, rstd


def commit_running(
    moved_mean: Tensor,
    moved_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    refused: Tensor | None,
) -> None:
    """The moved statistics (C,) into the running ones if all are finite; counted as `batch_norm_forward` does."""
    pointers = (moved_mean, moved_var, running_mean, running_var, tracked, refused)
    _commit_launcher.launch(running_mean.get_device(), (1,), pointers, (running_mean.numel(),))


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
    vectors = torch.empty((5, channels), dtype=ACCUMULATION[x.dtype], device=x.device).unbind()
    mean, rstd, center, scale, shift = vectors
    pointers = (contiguous(running_mean), contiguous(running_var), contiguous(weight), contiguous(bias), *vectors)
    _stored_launcher(float(eps)).launch(x.get_device(), (-(-channels // _BLOCK_C),), pointers, (channels,))
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
    weight, mean, rstd = contiguous(weight), mean.contiguous(), rstd.contiguous()
    a, b, c = torch.empty((3, channels), dtype=acc, device=x.device).unbind()
    gradients: list[Tensor | None] = [None, None]
    if needs[1]:
        gradients = [torch.empty(channels, dtype=narrow or torch.float64, device=x.device) for _ in range(2)]
    center = mean.to(acc)
    if needs[1] or count is not None:
        partial = partial_sums(dout, x, center, channels_last, mask, False)
    else:
        partial = torch.zeros((2, 1, channels, 1), dtype=torch.float64, device=x.device)
    _, splits, _, planes = partial.shape
    block_p, block_c = launch.merging(splits * planes)
    counted = count if isinstance(count, Tensor) else None
    fixed = count is None
    pointers = (
        partial, mean, rstd, weight, counted, a, None if fixed else b, None if fixed else c, *gradients
    )  # fmt: skip
    numbers = (splits, channels, planes, count if isinstance(count, int) else 1)
    _backward_launcher(x.dtype, block_p, block_c).launch(x.get_device(), (-(-channels // block_c),), pointers, numbers)
    dx = None
    if needs[0]:
        dx = empty(x, channels_last)
        vectors = (None, a, None, None) if fixed else (center, a, b, c)
        affine(dout, None if fixed else x, mask, vectors, 0, dx, channels_last, backward=True)
    return dx, gradients[0], gradients[1]
