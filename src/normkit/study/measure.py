"""What the study measures on a model and a batch, as pure functions: nothing is trained, printed or left changed.

Here: gradient norms by block, the residual stream's RMS, and the weight of the identity branch.
May import: torch, placement, study.models.
Read next: train.py, which measures at initialisation and at the end; theory, which predicts the skip weight.

The **skip weight** of a sublayer says which part of its output is the unchanged stream. For out = norm(skip +
branch), with skip = skip_scale * x,

    weight = std(skip) * rstd,     rstd = the norm's own 1 / sqrt(var(skip + branch) + eps)

per token over the features for LayerNorm, with rms for std under RMSNorm, and per feature over batch and time for
BatchNorm (statistics of the batch, whatever the mode). It is 1/sqrt(1 + v) when skip and branch are uncorrelated and
v = Var(branch) / Var(skip), and exceeds 1 where the branch cancels part of the skip. Where nothing rescales the sum
it is skip_scale. Measured in units of the skip's own std, it does not see gamma.

**With gain** it is the factor that the stream meets, gamma included:

    weight = unit * skip_scale * rstd * mean|gamma|,     unit = 1 if x comes out of a norm, else std(x)

|gamma| is averaged over features for LayerNorm and RMSNorm, and kept per feature for BatchNorm. A norm's output has
std 1 before its gamma, so the unit takes the previous gamma out once and only once: down the stack the product is
the amplitude of the embedding's part in the stream, where gammas that the next norm cancels do not pile up. With all
gamma = 1 both weights agree up to eps.

The **identity weight** is the running product of skip weights down the stack, multiplied per token (per feature for
BatchNorm) and averaged afterwards; the **uncorrelated** one is the same product of 1 / sqrt(1 + v), with the v that was
measured: what is left of the difference is the correlation of branch and skip, and eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normkit.placement import Residual, ResidualStack
from normkit.study.data import Batch
from normkit.study.models import Transformer


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave modes, buffers (running statistics) and torch's random state as found, whatever happens inside.

    Gradients are not covered: nothing here writes `.grad`.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        torch.set_rng_state(random_state)


def gradient_norms(model: Transformer, batch: Batch) -> list[float]:
    """L2 norm of the loss's gradient by block, all of a block's parameters together; train mode."""
    with untouched(model), torch.enable_grad():
        model.train()
        blocks = model.block_parameters()
        # torch.autograd.grad, not backward(): .grad stays what it was
        gradients = iter(torch.autograd.grad(model.loss(*batch), [p for block in blocks for p in block]))
        squares = [sum(next(gradients).double().square().sum().item() for _ in block) for block in blocks]
    return [float(square) ** 0.5 for square in squares]


@dataclass
class StreamMeasures:
    """One number per sublayer, first to last; the module's docstring defines them."""

    residual_rms: list[float] = field(default_factory=list)
    skip_weight: list[float] = field(default_factory=list)
    skip_weight_with_gain: list[float] = field(default_factory=list)
    identity_weight: list[float] = field(default_factory=list)
    identity_weight_with_gain: list[float] = field(default_factory=list)
    uncorrelated_identity_weight: list[float] = field(default_factory=list)


def stream(model: Transformer, ids: Tensor) -> StreamMeasures:
    """The residual stream's RMS after every sublayer (after its norm, where one follows the add) and skip weights."""
    found = StreamMeasures()
    with untouched(model), torch.no_grad():
        model.train()
        identity = identity_with_gain = uncorrelated = torch.ones((), dtype=torch.float64)
        normalized = False
        for sublayer, x, branch, out in walk(model.stack, model.embed(ids)):
            weight, with_gain = skip_weights(sublayer, x, branch, normalized=normalized)
            assert identity.shape in ((), weight.shape), "norms of one stack reduce over the same axes"
            identity, identity_with_gain = identity * weight, identity_with_gain * with_gain
            uncorrelated = uncorrelated * uncorrelated_skip_weight(sublayer, x, branch)
            found.residual_rms.append(out.double().square().mean().sqrt().item())
            found.skip_weight.append(weight.mean().item())
            found.skip_weight_with_gain.append(with_gain.mean().item())
            found.identity_weight.append(identity.mean().item())
            found.identity_weight_with_gain.append(identity_with_gain.mean().item())
            found.uncorrelated_identity_weight.append(uncorrelated.mean().item())
            normalized = sublayer.norm_output is not None
    return found


def walk(stack: ResidualStack, x: Tensor) -> Iterator[tuple[Residual, Tensor, Tensor, Tensor]]:
    """(sublayer, x, branch, out) down the stack, unfused; the last `out` before the final norm."""
    for sublayer in stack.sublayers:
        assert isinstance(sublayer, Residual)
        branch = sublayer.branch(x)
        out = sublayer.combine(x, branch)
        yield sublayer, x, branch, out
        x = out


def skip_weights(sublayer: Residual, x: Tensor, branch: Tensor, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """The skip weight without and with gain: (B, T) for row norms, (D,) for BatchNorm, () where no norm follows.

    `normalized` says whether x comes out of a norm.
    """
    skip_scale, norm = sublayer.placement.skip_scale, sublayer.norm_output
    if norm is None:
        scale = torch.tensor(skip_scale, dtype=torch.float64)
        return scale, scale
    x = x.double()
    centered, dims = _statistics(norm)
    assert isinstance(norm.eps, float)
    rstd = torch.rsqrt(_variance(skip_scale * x + branch.double(), centered, dims) + norm.eps)
    std = _variance(x, centered, dims).sqrt()
    factor = skip_scale * rstd
    return std * factor, (factor if normalized else std * factor) * _gain(norm)


def uncorrelated_skip_weight(sublayer: Residual, x: Tensor, branch: Tensor) -> Tensor:
    """1 / sqrt(1 + v), v = Var(branch) / Var(skip) as measured: the skip weight if the two were uncorrelated."""
    norm, skip_scale = sublayer.norm_output, sublayer.placement.skip_scale
    if norm is None:
        return torch.tensor(skip_scale, dtype=torch.float64)
    skip = _variance(skip_scale * x.double(), *_statistics(norm))
    return (skip / (skip + _variance(branch.double(), *_statistics(norm)))).sqrt()


def _statistics(norm: nn.Module) -> tuple[bool, tuple[int, ...]]:
    """Whether the norm subtracts a mean, and the axes of (B, T, D) that share its statistics."""
    if isinstance(norm, nn.RMSNorm):
        return False, (-1,)
    if isinstance(norm, nn.LayerNorm):
        return True, (-1,)
    assert isinstance(norm, nn.BatchNorm1d), f"no skip weight is defined for {type(norm).__name__}"
    return True, (0, 1)


def _variance(x: Tensor, centered: bool, dims: tuple[int, ...]) -> Tensor:
    deviation = x - x.mean(dims, keepdim=True) if centered else x
    return deviation.square().mean(dims)


def _gain(norm: nn.Module) -> Tensor:
    """mean|gamma| for row norms, |gamma| by feature for BatchNorm."""
    weight = norm.weight
    if weight is None:
        return torch.ones((), dtype=torch.float64)
    assert isinstance(weight, Tensor)
    gamma = (weight.detach().double() + getattr(norm, "weight_offset", 0.0)).abs()
    return gamma if isinstance(norm, nn.BatchNorm1d) else gamma.mean()
