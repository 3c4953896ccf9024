"""When a layer's running statistics move: freezing, guards, one update for several forwards, the weight of a batch.

Here: RunningStatistics, the half of BatchNorm that is not its output.
May import: torch, functional, statistics.
Read next: channels.py, whose layers use it; control.py, the same for all layers of a model.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from normkit import statistics
from normkit.functional.channel_steps import known
from normkit.statistics import Moments

NONFINITE = ("skip", "raise", "allow")
ONE_VALUE = ("raise", "running", "skip")


def recomputed() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing computes it for the second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RunningStatistics(torch.nn.modules.batchnorm._BatchNorm):
    """Keeps running_mean and running_var; see `normkit.BatchNorm1d` for what its arguments mean."""

    frozen: bool = False
    deferred: bool = False  # updates wait in `pending` for `commit_statistics`
    pending: Moments | None = None
    debiased: bool = False
    nonfinite: str = "skip"
    _refused: int = 0  # batches; plain attributes, since a buffer would be broadcast and must be loaded
    _refused_on_device: Tensor | None = None

    def freeze(self) -> None:
        """Normalize with the running statistics and leave them alone, in training too, until `unfreeze()`.

        Survives `.train()`. gamma and beta still learn: set their `requires_grad` for that. What
        `accumulate_statistics` left pending waits until the layer is thawed. Raises ValueError without running
        statistics.
        """
        if self.running_mean is None:
            raise ValueError(
                f"{type(self).__name__}: freeze needs running statistics, got track_running_stats=False; "
                f"build the layer with track_running_stats=True"
            )
        self.frozen = True

    def unfreeze(self) -> None:
        """Back to the batch's statistics in training."""
        self.frozen = False

    @property
    def nonfinite_batches(self) -> int:
        """How many training batches this process kept out of the running statistics for NaN or infinity.

        Compiled forwards keep them out but do not count. Where they are counted on a device, reading waits for it.
        """
        return self._refused + (0 if self._refused_on_device is None else int(self._refused_on_device))

    def reset_running_stats(self) -> None:
        """Start values 0 and 1, nothing counted, nothing pending."""
        super().reset_running_stats()
        self.pending, self._refused, self._refused_on_device = None, 0, None

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.pending = None  # belongs to the statistics that were
        super()._load_from_state_dict(*arguments, **keywords)

    def weight_of_new(self) -> float | Tensor:
        """The weight of the next batch in the running averages: momentum, or what makes early averages unbiased."""
        momentum = self.momentum
        if momentum is not None and (not self.debiased or momentum == 0.0):
            return float(momentum)
        tracked = self.num_batches_tracked
        if tracked is None:
            return 0.0 if momentum is None else momentum
        number: float | Tensor
        if tracked.device.type == "cpu" and not torch.compiler.is_compiling():
            number = float(tracked) + 1.0
        else:
            number = tracked.double() + 1.0  # nobody waits for the device
        if momentum is None:
            return 1.0 / number  # cumulative: every batch weighs the same
        return momentum / (1.0 - (1.0 - momentum) ** number)

    def take_statistics(self, moments: Moments) -> None:
        """Move the running statistics by one training batch, as the policies say; an empty batch changes nothing."""
        keep: bool | Tensor = moments.count > 0
        if self.nonfinite != "allow" and self.running_mean is not None and self.running_var is not None:
            finite = statistics.finite(moments, self.running_mean.dtype, self.running_var.dtype)
            keep = self._guarded(keep, finite)
        if self.deferred:
            self._defer(moments, keep)
        else:
            self._commit(moments, keep)

    def _guarded(self, keep: bool | Tensor, finite: Tensor) -> bool | Tensor:
        """`keep` where the batch is finite; a batch that is not is counted, and told once."""
        number = known(finite.to(torch.int64))
        if number is None and self.nonfinite == "raise":
            number = int(finite)  # waits for the device: the price of raising
        if number is None:
            if not torch.compiler.is_compiling():
                self._count_on_device(~finite)
            return keep & finite
        if number == 1:
            return keep
        where = "got statistics with NaN or infinity from a training batch"
        if self.nonfinite == "raise":
            raise ValueError(
                f"{type(self).__name__}: running statistics need finite values, {where}; look for where they come "
                f"from, or pass nonfinite='skip' to leave such batches out"
            )
        if self._refused == 0:
            warnings.warn(
                f"{type(self).__name__}: {where}; running statistics leave such batches out "
                f"(counted in nonfinite_batches, told once; nonfinite='raise' or 'allow' change that)",
                stacklevel=5,
            )
        self._refused += 1
        return False

    def refused_on(self, device: torch.device) -> Tensor:
        """The count that a device keeps, so that nobody waits for it."""
        before = self._refused_on_device
        if before is None or before.device != device:
            self._refused = self.nonfinite_batches
            before = self._refused_on_device = torch.zeros((), dtype=torch.int64, device=device)
        return before

    def _count_on_device(self, refused: Tensor) -> None:
        self._refused_on_device = self.refused_on(refused.device) + refused

    def _defer(self, moments: Moments, keep: bool | Tensor) -> None:
        if keep is False:
            return
        count = moments.count
        if isinstance(keep, Tensor):
            count = torch.where(keep, statistics.on_device(count, keep.device), 0.0)
        new = Moments(count, moments.mean.detach(), moments.m2.detach())
        self.pending = new if self.pending is None else statistics.merged(self.pending, new)

    def commit_statistics(self) -> bool:
        """Move the running statistics by what was pending, as one batch; whether anything was. Not while frozen."""
        if self.pending is None or self.frozen:
            return False
        assert self.running_mean is not None
        self._commit(statistics.moved(self.pending, self.running_mean.device), True)
        self.pending = None
        return True

    def _commit(self, moments: Moments, keep: bool | Tensor) -> None:
        keep = keep & (moments.count > 1)  # a single value has no variance
        number = known(keep.to(torch.int64)) if isinstance(keep, Tensor) else int(keep)
        if number is not None:
            keep = bool(number)
        if self.running_mean is None or self.running_var is None or keep is False:
            return
        variance = statistics.unbiased_variance(moments.count, moments.m2)
        weight = self.weight_of_new()
        statistics.update_running(self.running_mean, self.running_var, weight, moments.mean, variance, keep)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1 if keep is True else keep.to(self.num_batches_tracked.dtype))
