"""Small CUDA inputs, which torch's own kernels norm before a Triton launch has left the host.

Here: `row_norm` and `batch_norm` by torch, or None where Triton is faster, asked for, or alone in what it can do.
May import: torch, backends.
Read next: kernels/launch.py, which holds the measured limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit import backends


def _small(x: Tensor, limit: int) -> bool:
    """Whether x has up to `limit` bytes, and the backend is not asked for by name.

    Under a CUDA graph too, where the host's time does not matter: what a warm-up did not call must not be called first
    while a graph is captured.
    """
    return x.numel() * x.element_size() <= limit and not backends.is_forced()


def _of_one_dtype(x: Tensor, *parameters: Tensor | None) -> bool:
    return all(parameter is None or parameter.dtype == x.dtype for parameter in parameters)


def row_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor] | None:
    """(out, total) of a call that Triton would take."""
    if weight_offset or x.numel() == 0 or not _small(x, backends.TORCH_ROW_BYTES) or not _of_one_dtype(x, weight, bias):
        return None
    total = x if residual is None else x + residual
    if centered:
        return torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps), total
    return torch.nn.functional.rms_norm(total, x.shape[-1:], weight, eps), total


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

    torch moves copies of the statistics of a guarded batch, which one launch more takes over if they are finite.
    """
    if x.numel() == 0 or not _small(x, backends.TORCH_BATCH_NORM_BYTES):
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
