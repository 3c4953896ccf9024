"""Norms along channels: batch_norm over the batch, group_norm and instance_norm within a sample.

Here: check the arguments, differentiate, call the backend; the docstrings that quote the formulas.
May import: torch, _checks, statistics, backends, calls, masks, channel_steps.
Read next: channel_steps.py, the two steps of every channel norm.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.overrides import has_torch_function_variadic

from normkit import _checks, backends, statistics
from normkit.functional import channel_steps, handover
from normkit.functional.calls import apart, overridden, profiled
from normkit.functional.channel_steps import Given
from normkit.functional.masks import Lengths, valid_positions
from normkit.ranks import ProcessGroup
from normkit.statistics import Moments

_OMITTED = object()  # not None, which torch.utils._pytree may put in a tensor's place


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
    process_group: ProcessGroup | None = None,
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
        mask: (B, *space) bool, True where x is valid; also broadcastable, or (B, 1, *space). Only valid positions
            count in statistics, gradients and running averages; out and dx are 0 elsewhere. None: all are valid.
        lengths: (B,) integers, for x (B, C, L): the first `lengths[b]` positions of sample b are valid.
        process_group: whose ranks' batches share the statistics in training; every rank must make the call, forward
            and backward, with the same C and dtype (the layers check that). None: this process alone. torch.compile
            breaks its graph there.

    Returns:
        x's shape, dtype and memory format, new memory.

    Raises:
        ValueError: "batch_norm: training needs more than 1 value per channel, got x of shape (1, 3, 1, 1); ..." and
            the like for shapes and missing statistics. Running statistics are then untouched.
        TypeError: x is no tensor, or has no floating-point dtype.

    Numerics: the biased variance normalizes, running_var averages the unbiased one (n / (n - 1)), as in torch.
        Moments are sums of squared deviations, merged by Chan's formula; float64 on the compiled core. `mean` is
        subtracted before scaling, which keeps precision where |mean| >> std. An empty batch leaves the running
        statistics as they are. In eval the gradient does not read x: it is finite at x = inf, as in torch. What
        stands at invalid positions of x and dout, NaN included, changes no bit of anything. A single valid value in
        all raises where the count is known without waiting for a device; elsewhere it normalizes to bias and leaves
        the running statistics. Ranks are merged by Chan's formula in float64: all get the same bits. A CUDA x of up to
        32 MiB without a mask is computed by torch, with torch's numerics, where torch's kernels know the dtypes
        (docs/gpu.md).

    Example:
        >>> import torch, normkit.functional as F
        >>> F.batch_norm(torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]]), None, None, training=True)
        tensor([[ 1.0000,  1.0000,  1.0000],
                [-1.0000, -1.0000, -1.0000]])

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
    """
    alone = mask is None and lengths is None and process_group is None
    if alone and not torch.compiler.is_compiling():
        plain: Tensor | None = backends.batch_norm_now(
            input, running_mean, running_var, weight, bias, training, momentum, eps, False
        )
        if plain is None:
            plain = handover.batch_norm_now(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if plain is not None:
            return plain
    tensors = (input, running_mean, running_var, weight, bias)
    more = {"mask": mask, "lengths": lengths, "process_group": process_group}
    more = {name: value for name, value in more.items() if value is not None}
    if process_group is not None and torch.compiler.is_compiling():
        return apart(batch_norm, *tensors, training, momentum, eps, **more)
    if has_torch_function_variadic(*tensors, mask):
        return overridden(batch_norm, (*tensors, mask), *tensors, training, momentum, eps, **more)
    _checks.batch_norm("batch_norm", *tensors, training, eps)
    if process_group is not None:
        _checks.process_group("batch_norm", "process_group", process_group)
    given = Given(input, weight, bias, valid_positions("batch_norm", input, mask, lengths))
    arguments = (given, running_mean, running_var, training, momentum, eps, process_group)
    if profiled():
        with profiler.record_function("normkit::batch_norm"):
            return _batch_norm(*arguments)
    return _batch_norm(*arguments)


def _batch_norm(
    given: Given,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: ProcessGroup | None,
) -> Tensor:
    if group is None:
        out = channel_steps.whole(given, running_mean, running_var, training, momentum, eps)
        if out is not None:
            return out
    if not training:
        assert running_mean is not None
        assert running_var is not None
        return channel_steps.normalized_by(given, running_mean, running_var, eps)
    moments = channel_steps.batch_moments(given, group)
    channel_steps.require_two("batch_norm", given.x, moments.count)
    out = channel_steps.normalized(given, moments, eps, group)
    if running_mean is not None and running_var is not None:
        variance = statistics.unbiased_variance(moments.count, moments.m2)
        keep = moments.count > 1  # an empty batch changes nothing
        statistics.update_running(running_mean, running_var, momentum, moments.mean, variance, keep)
    return out


class _Normed(NamedTuple):
    out: Tensor
    moments: Moments


class BatchNormed(_Normed):
    """What `batch_norm_with_moments` returns: out, and what it was normalized with.

    Made of one iterable too, as torch rebuilds a result for a tensor subclass.
    """

    __slots__ = ()

    def __new__(cls, out: Any, moments: Any = _OMITTED) -> Self:
        return cls._make(out) if moments is _OMITTED else super().__new__(cls, out, moments)


def batch_norm_with_moments(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
    process_group: ProcessGroup | None = None,
) -> BatchNormed:
    """`batch_norm` in training that also returns the batch's moments, for running statistics of one's own.

        out = (x - mean) / sqrt(m2 / count + eps) * weight + bias;     m2 = sum((x - mean)^2)

    Args:
        input, weight, bias, eps, mask, lengths, process_group: as in `batch_norm`.

    Returns:
        BatchNormed(out, moments), moments with the fields count, mean and m2: count is an int, or a tensor where a mask
        or other ranks decide; mean and m2 are (C,) in the accumulation dtype or wider, not differentiable on a compiled
        backend. Those of several batches merge by `normkit.statistics.merged`.

    Raises:
        ValueError, TypeError: as `batch_norm`; but a single value per channel is normalized to bias, not refused.

    Numerics: as `batch_norm`.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.batch_norm_with_moments(torch.tensor([[1.0], [3.0]])).moments.count
        2

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    more = {"mask": mask, "lengths": lengths, "process_group": process_group}
    more = {name: value for name, value in more.items() if value is not None}
    if process_group is not None and torch.compiler.is_compiling():
        return apart(batch_norm_with_moments, input, weight, bias, eps, **more)
    if has_torch_function_variadic(input, weight, bias, mask):
        return overridden(batch_norm_with_moments, (input, weight, bias, mask), input, weight, bias, eps, **more)
    _checks.batch_norm("batch_norm", input, None, None, weight, bias, True, eps)
    if process_group is not None:
        _checks.process_group("batch_norm", "process_group", process_group)
    given = Given(input, weight, bias, valid_positions("batch_norm", input, mask, lengths))
    with profiler.record_function("normkit::batch_norm") if profiled() else nullcontext():
        moments = channel_steps.batch_moments(given, process_group)
        return BatchNormed(channel_steps.normalized(given, moments, eps, process_group), moments)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
) -> Tensor:
    """Normalizes each group of channels of each sample over its channels and space.

        mean = mean(x over C / G, S);  var = mean((x - mean)^2 over C / G, S)        per sample and group
        out = (x - mean) / sqrt(var + eps) * weight + bias                           weight and bias per channel

    Args:
        input: x (B, C, ...); float32, float64, bfloat16 or float16; channels-first or channels-last memory.
        num_groups: G, which divides C; 1 normalizes each sample as a whole, C each channel of it (`instance_norm`).
        weight, bias: gamma and beta, (C,); None for 1 and 0.
        eps: added to the variance under the root; 1e-5 as in torch.
        mask, lengths: which positions of each sample are valid, as in `batch_norm`; out and dx are 0 elsewhere.

    Returns:
        x's shape, dtype and memory format, new memory.

    Raises:
        ValueError: "group_norm: num_groups must divide the channels, got 3 groups for x of shape (2, 4, 5); ..." and
            the like for shapes, eps, and a single value in all.
        TypeError: x is no tensor, or has no floating-point dtype.

    Numerics: moments of a channel, or of up to 8192 elements of a group on the compiled core, are sums of squared
        deviations, merged over a group by Chan's formula, in float64 on the compiled core. No result depends on the
        other samples of the batch, and none on train or eval.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.group_norm(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), 1)
        tensor([[[-1.3416, -0.4472],
                 [ 0.4472,  1.3416]]])

    Source: Wu and He, "Group Normalization", 2018, eq. 1 and 7.
    """
    if mask is None and lengths is None and not torch.compiler.is_compiling():
        plain: Tensor | None = backends.sample_norm_now(input, num_groups, weight, bias, eps)
        if plain is not None:
            return plain
    tensors = (input, weight, bias, mask)
    if has_torch_function_variadic(*tensors):
        more = {name: value for name, value in (("mask", mask), ("lengths", lengths)) if value is not None}
        return overridden(group_norm, tensors, input, num_groups, weight, bias, eps, **more)
    _checks.group_norm("group_norm", input, num_groups, weight, bias, eps)
    given = Given(input, weight, bias, valid_positions("group_norm", input, mask, lengths))
    if profiled():
        with profiler.record_function("normkit::group_norm"):
            return _group_norm(given, num_groups, eps)
    return _group_norm(given, num_groups, eps)


def _group_norm(given: Given, groups: int, eps: float) -> Tensor:
    return channel_steps.normalized(given, channel_steps.sample_moments(given, groups), eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
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
        mask, lengths: which positions of each sample are valid, as in `batch_norm`; out and dx are 0 elsewhere. The
            running averages take the samples with at least two valid positions.

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
    alone = mask is None and lengths is None and running_mean is None and running_var is None and use_input_stats
    if alone and type(input) is Tensor and input.dim() > 1 and not torch.compiler.is_compiling():
        plain: Tensor | None = backends.sample_norm_now(input, input.shape[1], weight, bias, eps)
        if plain is not None:
            return plain
    if has_torch_function_variadic(*tensors, mask):
        more = {name: value for name, value in (("mask", mask), ("lengths", lengths)) if value is not None}
        return overridden(instance_norm, (*tensors, mask), *tensors, use_input_stats, momentum, eps, **more)
    _checks.instance_norm("instance_norm", *tensors, use_input_stats, eps)
    given = Given(input, weight, bias, valid_positions("instance_norm", input, mask, lengths))
    arguments = (given, running_mean, running_var, use_input_stats, momentum, eps)
    if profiled():
        with profiler.record_function("normkit::instance_norm"):
            return _instance_norm(*arguments)
    return _instance_norm(*arguments)


def _instance_norm(
    given: Given,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(given, running_mean, running_var, False, momentum, eps, None)
    moments = channel_steps.sample_moments(given, given.x.shape[1])
    out = channel_steps.normalized(given, moments, eps)
    if running_mean is not None and running_var is not None:
        mean, variance, number = statistics.sample_average(moments)
        statistics.update_running(running_mean, running_var, momentum, mean, variance, number > 0)
    return out
