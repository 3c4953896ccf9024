"""One BatchNorm while batches run through its model: the moments of what comes in, and what it normalizes with.

Here: Watched, the layer's side of `recompute_statistics`, and Recomputed, what becomes of it.
May import: torch, functional, statistics, ranks, layers.running.
Read next: recompute.py, which runs the batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normkit import statistics
from normkit.functional.channel_steps import Given, batch_moments
from normkit.functional.masks import valid_positions
from normkit.layers.running import RunningStatistics
from normkit.ranks import ProcessGroup
from normkit.statistics import Moments

Running = tuple[Tensor | None, Tensor | None]  # running_mean and running_var

OP = "recompute_statistics"
FROZEN = "frozen"


@dataclass(frozen=True)
class Recomputed:
    """The exact statistics of one layer, against the moving averages that stood there before.

    Attributes:
        count: the values per channel that were pooled, of all calls, batches and ranks.
        mean_shift: the largest |running_mean - mean| / sqrt(var + eps) of a channel, standard deviations; 0 is right.
        variance_ratio: the largest factor between running_var + eps and var + eps of a channel; 1 is right.
        skipped: the calls left out for NaN or infinity.
    """

    count: int
    mean_shift: float
    variance_ratio: float
    skipped: int


def shown(name: str) -> str:
    """A layer's name in a sentence; the model itself has none."""
    return name or "(the model)"


class Watched:
    """One layer while batches run: the moments of what came in, and what it normalizes with."""

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.name, self.layer = name, layer
        self.before = (layer.running_mean, layer.running_var)
        self.frozen: bool = getattr(layer, "frozen", False)
        self.found: tuple[Tensor, Tensor] | None = None  # by the pass before: what this pass normalizes with
        self.start_pass()

    def start_pass(self) -> None:
        nothing = torch.zeros(self.before[0].numel(), dtype=torch.float64)
        self.pooled = Moments(0, nothing, nothing)
        self.calls = self.skipped = 0

    def normalize_with(self, running: Running) -> None:
        self.layer.running_mean, self.layer.running_var = running

    def before_call(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook. An input that does not fit is not measured: the layer itself says what is wrong with it."""
        layer.training = False  # whatever `forward` did: nothing moves, and no rank waits for another
        x, mask, lengths = _given(layer, args, kwargs)
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        if not fits or x.shape[1] != self.before[0].numel():
            return
        new = _moments(x, valid_positions(OP, x, mask, lengths))
        self._pool(new)
        if not self.frozen:
            self.normalize_with(self._in_first_pass(new) if self.found is None else self.found)

    def _pool(self, new: Moments) -> None:
        self.calls += 1
        policy = getattr(self.layer, "nonfinite", "skip")  # torch.nn's layers have none: as normkit's default
        if policy == "allow" or bool(statistics.finite(new, new.mean.dtype, new.m2.dtype)):
            self.pooled = statistics.merged(self.pooled, new)
            return
        if policy == "raise":
            raise ValueError(
                f"{OP}: statistics need finite values, got NaN or infinity in layer {shown(self.name)}; nothing "
                f"was changed, look for where they come from or build the layer with nonfinite='skip'"
            )
        self.skipped += 1

    def _in_first_pass(self, new: Moments) -> Running:
        """No running statistics, so that the batch's are taken; a single value follows the layer's policy."""
        if new.count != 1:
            return None, None
        policy = getattr(self.layer, "one_value", "raise")
        if policy == "raise":
            raise ValueError(
                f"{OP}: a batch needs more than 1 value per channel to be normalized with its own statistics, got 1 "
                f"in layer {shown(self.name)}; nothing was changed, leave such a batch out (drop_last=True) or "
                f"build the layer with one_value='running'"
            )
        return self.before if policy == "running" else (None, None)

    def over_ranks(self, group: ProcessGroup) -> None:
        own, device = self.pooled, self.before[0].device
        both = statistics.over_ranks(Moments(own.count, own.mean.to(device), own.m2.to(device)), group)
        self.pooled = Moments(int(both.count), both.mean.cpu(), both.m2.cpu())

    def why_alone(self) -> str | None:
        """Why the running statistics must not be changed; None where they may."""
        if self.calls == 0:
            return "never ran"
        if self.frozen:
            return FROZEN
        if self.pooled.count > 1:
            return None
        if self.skipped:
            return f"NaN or infinity in {self.skipped} of {self.calls} calls"
        return "no variance of fewer than 2 values per channel"

    def end_pass(self) -> bool:
        """Hand what was found to the next pass; whether this pass ran with it already."""
        if self.frozen:
            return True
        new = self.before
        if self.why_alone() is None:
            mean, variance = self.pooled.mean, statistics.unbiased_variance(self.pooled.count, self.pooled.m2)
            new = (mean.to(self.before[0]), variance.to(self.before[1]))
        old, self.found = self.found, new
        return old is not None and all(map(torch.equal, old, new))

    def summary(self) -> Recomputed:
        variance = statistics.unbiased_variance(self.pooled.count, self.pooled.m2) + self.layer.eps
        old_mean, old_variance = (running.detach().cpu().double() for running in self.before)
        shift = (old_mean - self.pooled.mean).abs() / variance.sqrt()
        ratio = (old_variance + self.layer.eps) / variance
        factor = torch.maximum(ratio, 1.0 / ratio)
        return Recomputed(int(self.pooled.count), float(shift.max()), float(factor.max()), self.skipped)


@torch.no_grad()
def _moments(x: Tensor, valid: Tensor | None) -> Moments:
    """Those of one call in float64, on the CPU.

    A mean rounded to float32 is wrong by 5e-4 at 1e4: merged, batches 10 apart had a variance off by 6e-5 of itself.
    """
    found = batch_moments(Given(x, None, None, valid))
    if found.mean.dtype != torch.float64 and x.device.type != "mps":  # which has no float64
        found = batch_moments(Given(x.double(), None, None, valid))
    return Moments(int(found.count), found.mean.cpu().double(), found.m2.cpu().double())


def _given(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """x, mask and lengths of a call; a layer that is not normkit's is taken to know x only."""
    if isinstance(layer, RunningStatistics):
        named = dict(zip(("input", "mask", "lengths"), args, strict=False)) | kwargs
        return named.get("input"), named.get("mask"), named.get("lengths")
    return (args[0] if args else next(iter(kwargs.values()), None)), None, None
