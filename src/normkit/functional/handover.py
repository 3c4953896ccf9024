"""Small CUDA inputs, which torch's own kernels norm before a Triton launch has left the host.

Here: `row_norm` and `batch_norm` by torch, or None where Triton is faster, asked for, or alone in what it can do;
`row_norm_now` and `batch_norm_now`, before our own questions have taken longer than torch's whole norm.
May import: torch, backends, calls, reference.
Read next: kernels/launch.py, which holds the measured limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from normkit import backends
from normkit.functional.calls import autocast_widens
from normkit.reference import accumulation_dtype

_EPS = {dtype: torch.finfo(accumulation_dtype(dtype)).eps for dtype in backends.KERNEL_DTYPES}


def _plain(x: Any, *others: Any) -> bool:
    """Whether nothing but kernels will read x, a tensor of a device that has ours, and the others that are given."""
    if type(x) not in backends.EXACT_TYPES or torch._C._len_torch_function_stack():  # a mode would see what x is asked
        return False
    if not backends.has_kernels(x.get_device()) or profiler._is_profiler_enabled or backends.transformed() is not None:
        return False
    if x.layout is not torch.strided or x.is_nested or x.dtype not in _EPS:
        return False
    for other in others:  # no generator, which would take longer than the questions
        if other is None or type(other) in backends.EXACT_TYPES:
            continue
        return False
    return True


def row_norm_now(
    x: Any,
    residual: Any,
    normalized_shape: int | Sequence[int],
    weight: Any,
    bias: Any,
    eps: float | None,
    centered: bool,
    weight_offset: float,
) -> Any:
    """out, with a residual (out, total), where torch is to compute and nothing is in the way, else None.

    None says no more than that: the way that follows asks all questions, has what torch refused refused in our words,
    and comes to `row_norm` where it can.
    """
    if not _plain(x, residual, weight, bias) or autocast_widens(dtype := x.dtype):
        return None
    if residual is not None and (residual.dtype is not dtype or residual.shape != x.shape):
        return None
    if eps is None:
        eps = _EPS[dtype]
    elif type(eps) is not float or not eps >= 0.0:
        return None
    try:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        pair = row_norm(x, residual, shape, weight, bias, eps, centered, weight_offset)
    except (RuntimeError, TypeError):
        return None
    return pair[0] if residual is None and pair is not None else pair


def _small(x: Tensor, limit: int) -> bool:
    """Whether x has elements, of up to `limit` bytes, and the backend is not asked for by name.

    Under a CUDA graph too, where the host's time does not matter: what a warm-up did not call must not be called first
    while a graph is captured.
    """
    return 0 < x.nbytes <= limit and not backends.is_forced()


def row_norm(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor] | None:
    """(out, total) of a call that Triton would take."""
    if weight_offset or not _small(x, backends.TORCH_ROW_BYTES):
        return None
    for parameter in (weight, bias):
        if parameter is not None and parameter.dtype != x.dtype:
            return None
    total = x if residual is None else x + residual
    if centered:
        return torch.layer_norm(total, normalized_shape, weight, bias, eps), total
    return torch.rms_norm(total, normalized_shape, weight, eps), total


def batch_norm_now(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: Any,
    eps: Any,
    guarded: bool = False,
    tracked: Tensor | None = None,
    refused: Tensor | None = None,
) -> Tensor | None:
    """`batch_norm` where nothing is in the way, else None, which says no more than that of `row_norm_now`."""
    if not _plain(x, running_mean, running_var, weight, bias):
        return None
    if type(momentum) is not float or type(eps) is not float or not eps > 0.0 or x.dim() < 2:
        return None
    if running_mean is None or running_var is None:
        if not training or running_mean is not running_var:
            return None
    elif not (running_mean.is_contiguous() and running_var.is_contiguous()):
        return None
    shape = (x.shape[1],)
    for each in (running_mean, running_var, weight, bias):  # torch asks for no more than their number of elements
        if each is not None and each.shape != shape:
            return None
    if training and x.numel() <= x.shape[1]:  # a value a channel: the policies of a layer, or an error
        return None
    # What torch raises now is not caught: the statistics may have moved.
    return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, guarded, tracked, refused)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    guarded: bool,
    tracked: Tensor | None,
    refused: Tensor | None,
) -> Tensor | None:
    """out of a call that Triton would take; see `channel_steps.whole` for the last three.

    torch moves copies of the statistics of a guarded batch, which one launch more takes over if they are finite. Its
    kernels know parameters and statistics of x's dtype, or all of them of float32 beside halves.
    """
    if not _small(x, backends.TORCH_BATCH_NORM_BYTES):
        return None
    dtypes = {each.dtype for each in (running_mean, running_var, weight, bias) if each is not None}
    if dtypes and dtypes != {x.dtype} and (dtypes != {torch.float32} or x.dtype == torch.float64):
        return None
    means, variances = running_mean, running_var
    if guarded and running_mean is not None and running_var is not None:
        means, variances = running_mean.clone(), running_var.clone()
    out = torch.nn.functional.batch_norm(x, means, variances, weight, bias, training, momentum, eps)
    if guarded and running_mean is not None and running_var is not None:
        backends.TRITON.commit_running(means, variances, running_mean, running_var, tracked, refused)
        for changed in (running_mean, running_var):
            if not changed.is_inference():
                torch.autograd.graph.increment_version(changed)
    elif tracked is not None:
        tracked.add_(1)
    return out
