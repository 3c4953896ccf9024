"""LayerNorm over the channels of images: layer_norm_channels.

Here: check the arguments, choose by memory format whether rows or columns are read, differentiate, call the backend.
May import: torch, _checks, autograd, backends, calls, rows.
Read next: kernels/columns.py, which reads the channels of channels-first memory in place; rows.py for all the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.overrides import has_torch_function_variadic

from normkit import _checks, backends
from normkit.autograd import record_row_norm
from normkit.functional.calls import overridden, profiled, requires_grad
from normkit.functional.rows import layer_norm


def layer_norm_channels(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalizes each position of each sample over its channels to mean 0 and variance 1.

        mean = mean(x over C);  var = mean((x - mean)^2 over C)        per sample and position
        out = (x - mean) / sqrt(var + eps) * weight + bias             weight and bias per channel

    It is `layer_norm` of x.movedim(1, -1), back in x's order.

    Args:
        input: x (B, C, ...); float32, float64, bfloat16 or float16; channels-first or channels-last memory, neither of
            which is copied on the compiled core. One that is neither (a crop) is copied to channels-first.
        weight: gamma, (C,), of any floating dtype; None multiplies by 1.
        bias: beta, the same; None adds 0.
        eps: added to the variance under the root; 1e-5 as in torch.nn.LayerNorm (ConvNeXt uses 1e-6).

    Returns:
        x's shape, dtype and memory format, new memory.

    Raises:
        ValueError: "layer_norm_channels: weight must have one value per channel, shape (64,), got shape (32,); ..."
            and the like for x, bias and eps.
        TypeError: x is no tensor, or has no floating-point dtype.

    Numerics: as `layer_norm`: statistics in float32 (float64 for float64), summed in double over each 64 channels;
        deviations from the mean squared; one rounding at the end. A finite position never overflows. One that holds
        inf or NaN becomes NaN, and no other does; one whose channels are equal becomes `bias`. A position's result is
        bit-identical whatever the batch, the other positions and the number of threads.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.layer_norm_channels(torch.tensor([[[90.0, 1.0], [80.0, 2.0], [70.0, 3.0]]]))
        tensor([[[ 1.2247, -1.2247],
                 [ 0.0000,  0.0000],
                 [-1.2247,  1.2247]]])

    Source: Liu et al., "A ConvNet for the 2020s", 2022, section 2.6, which takes the norm of Ba, Kiros and Hinton.
    """
    if has_torch_function_variadic(input, weight, bias):
        return overridden(layer_norm_channels, (input, weight, bias), input, weight, bias, eps)
    _checks.channels("layer_norm_channels", input, weight=weight, bias=bias)
    _checks.epsilon("layer_norm_channels", eps)
    if profiled():
        with profiler.record_function("normkit::layer_norm_channels"):
            return _over_channels(input, weight, bias, eps)
    return _over_channels(input, weight, bias, eps)


def _over_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    channels = x.shape[1]
    rows = x.movedim(1, -1)
    if backends.select(x, weight, bias) is backends.CPU and x.numel() > 0:
        if backends.suits_columns(rows):
            return _columns(rows, weight, bias, eps).movedim(-1, 1)
        # (B, C, 1, 1) is channels-first and channels-last at once: it stays what its strides say
        if x.stride(-1) == 1 and x.shape[2:].numel() == 1:
            return layer_norm(x.view(x.shape[:2]), (channels,), weight, bias, eps).view(x.shape)
    return layer_norm(rows, (channels,), weight, bias, eps).movedim(-1, 1)


def _columns(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm along the last axis of (B, ..., C) in channels-first memory, read and written there."""
    if torch.is_grad_enabled() and requires_grad(rows, weight, bias):
        return record_row_norm(backends.COLUMNS, rows, None, weight, bias, eps, True, 0.0)[0]
    return backends.COLUMNS.rows_forward(rows, None, weight, bias, eps, True, 0.0)[0]
