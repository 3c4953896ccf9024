"""Norms along channels: batch_norm over the batch, group_norm and instance_norm within a sample.

Here: check the arguments, differentiate, call the backend; the docstrings that quote the formulas.
May import: torch, _checks, reference, statistics, autograd, backends, calls.
Read next: autograd.py, what is saved and what backward does.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.overrides import has_torch_function_variadic

from normkit import _checks, backends, reference, statistics
from normkit.autograd import channel_moments, channel_vectors, lines, per_channel, record_channel_norm
from normkit.functional.calls import overridden, profiled, requires_grad
from normkit.reference import accumulation_dtype


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalizes each channel over batch and space, with the batch's statistics in training and stored ones in eval.

        training: mean = mean(x over B, S);  var = mean((x - mean)^2 over B, S)
        eval:     mean = running_mean;       var = running_var
        out = (x - mean) / sqrt(var + eps) * weight + bias
        running = (1 - momentum) * running + momentum * batch      (training, in place, not differentiated)

    Args:
        input: x (B, C, ...); float32, float64, bfloat16 or float16; channels-first or channels-last memory.
        running_mean, running_var: (C,), updated in place in training; both None for no running statistics.
        weight, bias: gamma and beta, (C,); None for 1 and 0.
        training: whether the batch's statistics are used.
        momentum: the weight of the *new* batch in the running average, torch's convention (Keras and Flax name the
            weight of the old average, 1 - momentum).
        eps: added to the variance under the root; positive in training.

    Returns:
        x's shape, dtype and memory format, new memory.

    Raises:
        ValueError: "batch_norm: training needs more than 1 value per channel, got x of shape (1, 3, 1, 1); ..." and
            the like for shapes and missing statistics. Running statistics are then untouched.
        TypeError: x is no tensor, or has no floating-point dtype.

    Numerics: the biased variance normalizes, running_var averages the unbiased one (n / (n - 1)), as in torch.
        Moments are sums of squared deviations, merged by Chan's formula; float64 on the compiled core. `mean` is
        subtracted before scaling, which keeps precision where |mean| >> std. An empty batch leaves the running
        statistics as they are. In eval the gradient does not read x: it is finite at x = inf, as in torch.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.batch_norm(torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]]), None, None, training=True)
        tensor([[ 1.0000,  1.0000,  1.0000],
                [-1.0000, -1.0000, -1.0000]])

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
    """
    if not torch.compiler.is_compiling():
        plain: Tensor | None = backends.batch_norm_now(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        if plain is not None:
            return plain
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return overridden(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
        )
    _checks.batch_norm("batch_norm", input, running_mean, running_var, weight, bias, training, eps)
    if profiled():
        with profiler.record_function("normkit::batch_norm"):
            return _channel_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _channel_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalizes each group of channels of each sample over its channels and space.

        mean = mean(x over C / G, S);  var = mean((x - mean)^2 over C / G, S)        per sample and group
        out = (x - mean) / sqrt(var + eps) * weight + bias                           weight and bias per channel

    Args:
        input: x (B, C, ...); float32, float64, bfloat16 or float16; channels-first or channels-last memory.
        num_groups: G, which divides C; 1 normalizes each sample as a whole, C each channel of it (`instance_norm`).
        weight, bias: gamma and beta, (C,); None for 1 and 0.
        eps: added to the variance under the root; 1e-5 as in torch.

    Returns:
        x's shape, dtype and memory format, new memory.

    Raises:
        ValueError: "group_norm: num_groups must divide the channels, got 3 groups for x of shape (2, 4, 5); ..." and
            the like for shapes, eps, and a single value in all.
        TypeError: x is no tensor, or has no floating-point dtype.

    Numerics: moments per channel are sums of squared deviations, merged over a group by Chan's formula, in float64 on
        the compiled core. No result depends on the other samples of the batch, and none on train or eval.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.group_norm(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), 1)
        tensor([[[-1.3416, -0.4472],
                 [ 0.4472,  1.3416]]])

    Source: Wu and He, "Group Normalization", 2018, eq. 1 and 7.
    """
    if has_torch_function_variadic(input, weight, bias):
        return overridden(group_norm, (input, weight, bias), input, num_groups, weight, bias, eps)
    _checks.group_norm("group_norm", input, num_groups, weight, bias, eps)
    if profiled():
        with profiler.record_function("normkit::group_norm"):
            return _sample_norm(input, num_groups, weight, bias, eps)[0]
    return _sample_norm(input, num_groups, weight, bias, eps)[0]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalizes each channel of each sample over space, with its own statistics or with stored ones.

        use_input_stats: mean = mean(x over S);  var = mean((x - mean)^2 over S)     per sample and channel
        else:            mean = running_mean;    var = running_var                   per channel
        out = (x - mean) / sqrt(var + eps) * weight + bias
        running = (1 - momentum) * running + momentum * mean over the batch of the samples' statistics

    Args:
        input: x (B, C, ...); float32, float64, bfloat16 or float16; channels-first or channels-last memory.
        running_mean, running_var: (C,), updated in place with use_input_stats; both None for no running statistics.
        weight, bias: gamma and beta, (C,); None for 1 and 0.
        use_input_stats: whether the samples' own statistics are used (torch's layers do so in training, and in eval
            too unless they track running statistics).
        momentum: the weight of the *new* batch in the running average, torch's convention.
        eps: added to the variance under the root; positive with use_input_stats.

    Returns:
        x's shape, dtype and memory format, new memory.

    Raises:
        ValueError: "instance_norm: each channel needs more than 1 value, got x of shape (2, 3, 1); ..." and the like
            for shapes and missing statistics. Running statistics are then untouched.
        TypeError: x is no tensor, or has no floating-point dtype.

    Numerics: as `batch_norm`; the running variance averages the samples' unbiased variances, as in torch.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.instance_norm(torch.tensor([[[1.0, 3.0], [5.0, 9.0]]]))
        tensor([[[-1.0000,  1.0000],
                 [-1.0000,  1.0000]]])

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization",
        2016, eq. 3.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        return overridden(instance_norm, tensors, *tensors, use_input_stats, momentum, eps)
    _checks.instance_norm("instance_norm", *tensors, use_input_stats, eps)
    arguments = (*tensors, use_input_stats, momentum, eps)
    if profiled():
        with profiler.record_function("normkit::instance_norm"):
            return _instance_norm(*arguments)
    return _instance_norm(*arguments)


def _channel_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    backend = backends.select(x, running_mean, running_var, weight, bias)
    recorded = backend is not None and torch.is_grad_enabled() and requires_grad(x, weight, bias)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        dtype = accumulation_dtype(x.dtype)
        wide = torch.float64 if backend is backends.CPU else dtype  # as batch_norm_now: the same bits with a record
        # a copy: the buffers may be updated in place between this forward and its backward
        mean, rstd = running_mean.detach().to(dtype, copy=True), torch.rsqrt(running_var.detach().to(wide) + eps)
        return _channel_compute(backend, x, weight, bias, mean, rstd, None, eps, recorded)
    count, mean, m2, rstd = _statistics(backend, x, None, eps)
    out = _channel_compute(backend, x, weight, bias, mean, rstd, count, eps, recorded)
    if running_mean is not None and running_var is not None:
        statistics.update_running(running_mean, running_var, momentum, count, mean, m2)
    return out


def _channel_compute(
    backend: backends.Backend | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: int | None,
    eps: float,
    recorded: bool,
) -> Tensor:
    """The affine half; `count` as in ChannelNorm."""
    primitives = reference if backend is None else backend
    with torch.set_grad_enabled(torch.is_grad_enabled() and not recorded):
        statistics_of_channels = (per_channel(mean, x.shape[1]), per_channel(rstd, x.shape[1]))
        vectors = channel_vectors(*statistics_of_channels, weight, bias, accumulation_dtype(x.dtype))
        out = primitives.channels_affine(lines(x), *vectors, None)
    if recorded:
        assert backend is not None
        out = record_channel_norm(backend, x, weight, bias, mean, rstd, count, eps, out)
    return out.view(x.shape)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if not use_input_stats:
        return _channel_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    out, count, mean, m2 = _sample_norm(x, x.shape[1], weight, bias, eps)
    if running_mean is not None and running_var is not None and x.shape[0] > 0:
        statistics.update_running(running_mean, running_var, momentum, count, mean.mean(0), m2.mean(0))
    return out


def _sample_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, int, Tensor, Tensor]:
    """out with statistics per sample and group; and their count, mean and m2, (B, G)."""
    backend = backends.select(x, weight, bias)
    recorded = backend is not None and torch.is_grad_enabled() and requires_grad(x, weight, bias)
    count, mean, m2, rstd = _statistics(backend, x, groups, eps)
    return _channel_compute(backend, x, weight, bias, mean, rstd, count, eps, recorded), count, mean, m2


def _statistics(
    backend: backends.Backend | None, x: Tensor, groups: int | None, eps: float
) -> tuple[int, Tensor, Tensor, Tensor]:
    """count, mean, m2 and rstd of x's own, as channel_moments; differentiable where no backend takes the call."""
    primitives = reference if backend is None else backend
    with torch.set_grad_enabled(torch.is_grad_enabled() and backend is None):
        counted, mean, m2 = channel_moments(primitives, lines(x), groups)
        count = cast(int, counted)  # without a mask; not int(counted), which would fix a symbolic batch size
        return count, mean, m2, torch.rsqrt(statistics.variance(count, m2) + eps)
