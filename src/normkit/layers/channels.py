"""Layers whose statistics run along the channels: BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm.

Here: torch.nn's classes, constructors, buffers and state dicts, with normkit's forward and policies.
May import: torch, functional, ranks, _checks.
Read next: running.py, when running statistics move; functional/channels.py, where the call is checked and computed.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from normkit import _checks, functional, ranks
from normkit.functional import handover
from normkit.functional.calls import apart
from normkit.functional.channel_steps import Given, at_once, known, whole
from normkit.functional.masks import Lengths
from normkit.layers.running import NONFINITE, ONE_VALUE, RunningStatistics, recomputed
from normkit.ranks import ProcessGroup

# An object of its own, not the literal: identity tells an omitted momentum from a given 0.1.
_MOMENTUM_DEFAULT = float("0.1")


class _BatchNorm(RunningStatistics):
    """What BatchNorm1d, 2d, 3d and SyncBatchNorm share; their docstrings describe it."""

    stated_as_decay: bool = False
    one_value: str = "raise"
    dimensions: tuple[int, ...]  # how many x may have, and their names for the error
    dimension_names: str
    _held: ranks.Held | None = None
    _agreed: bool = False  # that all ranks have the same layer

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM_DEFAULT,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        decay: float | None = None,
        debiased: bool = False,
        nonfinite: str = "skip",
        one_value: str = "raise",
        process_group: ProcessGroup | None = None,
    ) -> None:
        name = type(self).__name__
        _checks.momentum_or_decay(name, momentum is not _MOMENTUM_DEFAULT, momentum, decay)
        _checks.choice(name, "nonfinite", nonfinite, NONFINITE)
        _checks.choice(name, "one_value", one_value, ONE_VALUE)
        if one_value == "running" and not track_running_stats:
            raise ValueError(
                f"{name}: one_value='running' needs running statistics, got track_running_stats=False; "
                f"pass one_value='skip' or track them"
            )
        if decay is not None:
            momentum = 1.0 - decay
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.stated_as_decay = decay is not None
        self.debiased, self.nonfinite, self.one_value = debiased, nonfinite, one_value
        self._hold(process_group)
        if affine and not bias:  # torch.nn's own argument only since 2.13
            self.register_parameter("bias", None)

    def _hold(self, group: ProcessGroup | None) -> None:
        if group is not None:
            _checks.process_group(type(self).__name__, "process_group", group)
        self._held = None if group is None else ranks.Held(group)
        self._agreed = False

    @property
    def decay(self) -> float | None:
        """The weight of the old average, 1 - momentum; None for the cumulative average."""
        return None if self.momentum is None else 1.0 - self.momentum

    @property
    def process_group(self) -> ProcessGroup | None:
        """Whose ranks' batches share the statistics in training; None for this process alone."""
        return None if self._held is None else self._held.group

    def forward(self, input: Tensor, mask: Tensor | None = None, lengths: Lengths | None = None) -> Tensor:
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: x must have num_features={self.num_features} channels in dimension 1, "
                f"got x of shape {_checks.shape_text(input.shape)}; pass num_features={input.shape[1]} or transpose x"
            )
        # eval of a layer that tracked uses the buffers; training of one that no longer tracks leaves them alone
        own = (self.training and not self.frozen) or self.running_mean is None
        tracking = self.training and not self.frozen and self.track_running_stats and not recomputed()
        group = self.process_group if own and self.training else None
        if group is not None and ranks.size(group) == 1:
            group = None
        if mask is None and lengths is None and group is None and not (tracking and self.deferred):
            plain = self._at_once(input, own, tracking)
            if plain is not None:
                return plain
        if not own:
            return self._with_running(input, mask, lengths)
        if group is None:
            return self._with_own(input, mask, lengths, None, tracking)
        arguments = (input, mask, lengths, group, tracking)
        return apart(self._over_ranks, *arguments) if torch.compiler.is_compiling() else self._over_ranks(*arguments)

    def _at_once(self, x: Tensor, own: bool, tracking: bool) -> Tensor | None:
        """The plain call in one step, None where that cannot be."""
        weight = self.weight_of_new() if tracking else 0.0
        if type(weight) is not float:
            return None
        means, variances = (self.running_mean, self.running_var) if tracking or not own else (None, None)
        given = Given(x, self.weight, self.bias, None)
        out = at_once(x, means, variances, given.weight, given.bias, own, weight, self.eps)
        if out is None:
            return self._whole(given, means, variances, own, tracking, weight)
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)  # after the call: a refused batch is not counted
        return out

    def _whole(
        self, given: Given, means: Tensor | None, variances: Tensor | None, own: bool, tracking: bool, weight: float
    ) -> Tensor | None:
        """The plain call in a GPU's few launches, which look after NaN and count by themselves."""
        if tracking and self.nonfinite == "raise":
            return None  # it waits for the device
        guarded = tracking and self.nonfinite == "skip"
        device = given.x.device
        refused = self.refused_on(device) if guarded and device.type != "cpu" else None
        tracked = self.num_batches_tracked if tracking else None
        rest = (own, weight, self.eps, guarded, tracked, refused)
        handed = None
        if not torch.compiler.is_compiling():
            handed = handover.batch_norm_now(given.x, means, variances, given.weight, given.bias, *rest)
        return whole(given, means, variances, *rest) if handed is None else handed

    def _with_running(self, x: Tensor, mask: Tensor | None, lengths: Lengths | None) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps, mask=mask, lengths=lengths
        )

    def _over_ranks(
        self, x: Tensor, mask: Tensor | None, lengths: Lengths | None, group: ProcessGroup, tracking: bool
    ) -> Tensor:
        if not self._agreed:
            self._agree(x, group)
        return self._with_own(x, mask, lengths, group, tracking)

    def _with_own(
        self, x: Tensor, mask: Tensor | None, lengths: Lengths | None, group: ProcessGroup | None, tracking: bool
    ) -> Tensor:
        if mask is None and lengths is None and group is None and x.shape[0] * x.shape[2:].numel() == 1:
            if self.one_value == "running":
                return self._with_running(x, mask, lengths)
            if self.one_value == "raise":
                _checks.two_values("batch_norm", x, 1)
        out, moments = functional.batch_norm_with_moments(
            x, self.weight, self.bias, self.eps, mask=mask, lengths=lengths, process_group=group
        )
        number = known(moments.count)
        if number == 1 and self.one_value == "raise":
            _checks.two_values("batch_norm", x, 1)
        if self.one_value == "running" and number in (None, 1):
            stored = self._with_running(x, mask, lengths)
            if number is None:
                assert isinstance(moments.count, Tensor)
                stored = torch.where(moments.count == 1, stored, out)
            out = stored
        if tracking:
            self.take_statistics(moments)
        return out

    def _agree(self, x: Tensor, group: ProcessGroup) -> None:
        """Ranks that built different layers get an error at the first use, before any sum of theirs is mixed."""
        name = type(self).__name__
        ranks.agree(name, "num_features", self.num_features, group, x.device)
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        code = dtypes.index(x.dtype) if x.dtype in dtypes else len(dtypes)
        ranks.agree(name, "the dtype of x", code, group, x.device, (*dtypes, "another dtype"))
        self._agreed = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.dimensions:
            counts = " or ".join(str(dimension) for dimension in self.dimensions)
            raise ValueError(
                f"{type(self).__name__}: x must have {counts} dimensions {self.dimension_names}, "
                f"got x of shape {_checks.shape_text(input.shape)}; reshape x or use the BatchNorm of its dimension"
            )

    def extra_repr(self) -> str:
        printed: str = super().extra_repr()  # type: ignore[no-untyped-call]  # torch's words in every version
        if self.stated_as_decay and self.decay is not None:
            printed = printed.replace(f"momentum={self.momentum}", f"decay={self.decay:.12g}")
        said = [f"{name}=True" for name in ("debiased", "frozen", "deferred") if getattr(self, name)]
        said += [f"nonfinite={self.nonfinite}"] if self.nonfinite != "skip" else []
        said += [f"one_value={self.one_value}"] if self.one_value != "raise" else []
        return ", ".join([printed, *said])


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Normalizes each channel of (B, C) or (B, C, L) over batch and length; a drop-in for torch.nn.BatchNorm1d.

        training: mean and var of the batch;  eval: running_mean and running_var
        out = (x - mean) / sqrt(var + eps) * weight + bias
        running = decay * running + (1 - decay) * batch,     decay = 1 - momentum

    Args:
        num_features: C.
        eps: added to the variance under the root; default 1e-5.
        momentum: the weight of the *new* batch in the running averages, torch's convention; default 0.1. None
            averages all batches with equal weight.
        affine: whether gamma (`weight`, ones) and beta (`bias`, zeros) are learned; default True.
        track_running_stats: whether running averages are kept; without them eval uses the batch's statistics too.
        device, dtype: of parameters and buffers.
        bias: whether beta is learned; default True.
        decay: the weight of the *old* average, the textbook's and Keras's convention (0.9, 0.99, 0.999), instead
            of momentum.
        debiased: whether the averages forget their start values 0 and 1 at once: update t weighs its batch by
            momentum / (1 - decay^t), so the first replaces them (Adam's bias correction); t counts in
            num_batches_tracked, so statistics loaded with a count of 0 are replaced too. Default False, as torch.
        nonfinite: what a training batch with NaN or infinity does to the running statistics: "skip" (default) leaves
            them, counts it in `nonfinite_batches` and warns once; "raise" refuses it (on CUDA it waits for the
            device in every step); "allow" is torch's, which averages it in.
        one_value: what a single value per channel does in training: "raise" (default, torch's), "running" normalizes
            with the running statistics, "skip" gives bias, the formula at variance 0; neither moves the averages.
            "raise" looks at shapes, and at what masks and ranks count where that is known without waiting for a device
            (CPU, eager); elsewhere it is "skip".
        process_group: whose ranks' batches share the statistics in training, see `SyncBatchNorm`; default None, this
            process alone.

    Shape: `forward(input, mask=None, lengths=None)`; the input's shape, dtype and memory format are kept. `mask` (B, L)
        bool or `lengths` (B,) say which positions are valid, as in `normkit.functional.batch_norm`.

    A forward inside a backward pass is activation checkpointing's second computation of the same batch, and moves
    nothing (not seen where torch.compile lies inside the checkpoint; put it around). `freeze()` and `unfreeze()` hold
    the running statistics through `.train()`; `normkit.accumulate_statistics` moves them once per optimizer step.

    Raises:
        ValueError: momentum and decay are both given, or lie outside [0, 1]; x has another number of dimensions or
            channels; one value per channel in training. Running statistics and the batch counter are then untouched.

    Numerics: as `normkit.functional.batch_norm`; the running variance averages the unbiased batch variance and so is
        larger than what normalizes in training by n / (n - 1).

    Example:
        >>> import torch, normkit
        >>> norm = normkit.BatchNorm1d(3, decay=0.9)
        >>> _ = norm(torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]]))
        >>> norm.running_mean
        tensor([7.5000, 6.5000, 5.5000])

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2; the running average is the usual
        replacement of the paper's averages over training batches.
    """

    dimensions = (2, 3)
    dimension_names = "(B, C) or (B, C, L)"


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Normalizes each channel of (B, C, H, W) over batch and space; a drop-in for torch.nn.BatchNorm2d.

    Arguments, formula, errors and numerics are those of `BatchNorm1d`.

    Example:
        >>> import torch, normkit
        >>> normkit.BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    dimensions = (4,)
    dimension_names = "(B, C, H, W)"


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Normalizes each channel of (B, C, D, H, W) over batch and space; a drop-in for torch.nn.BatchNorm3d.

    Arguments, formula, errors and numerics are those of `BatchNorm1d`.

    Example:
        >>> import torch, normkit
        >>> normkit.BatchNorm3d(3)(torch.ones(2, 3, 2, 4, 4)).shape
        torch.Size([2, 3, 2, 4, 4])
    """

    dimensions = (5,)
    dimension_names = "(B, C, D, H, W)"


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of all ranks' batches together, on any backend, CPU included.

        count, mean, m2 of all ranks' values, merged by Chan's formula
        out = (x - mean) / sqrt(m2 / count + eps) * weight + bias

    Uneven, masked and empty batches count by their valid values. Backward adds two sums per channel over the ranks; the
    gradients of weight and bias are this rank's part, as DDP expects.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, decay, debiased, nonfinite,
            one_value: as in `BatchNorm1d`.
        process_group: the ranks; None, the default, means all of them. Without an initialized torch.distributed, or
            with one rank, it is a plain BatchNorm.

    Shape: x (B, C, ...) of any number of dimensions from 2; `forward(input, mask=None, lengths=None)`. Every rank must
        make each forward and backward, in the same mode: training, frozen, and whether x takes a gradient.
        torch.compile breaks its graph there (not with fullgraph=True).

    Raises:
        ValueError: as `BatchNorm1d`; at first use on every rank, when num_features or dtypes differ between ranks. A
            rank that does not come ends the others' wait with torch.distributed's error after the group's timeout.

    Numerics: every rank gets the same bits of mean and variance, so that running statistics stay equal everywhere.
        Differs from torch.nn.SyncBatchNorm, which takes CUDA tensors only. It is no subclass of that class, since DDP
        refuses those on CPU.

    Example:
        >>> import torch, normkit
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> type(normkit.SyncBatchNorm.convert_sync_batchnorm(model)[1]).__name__
        'SyncBatchNorm'

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    dimension_names = "(B, C, ...)"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM_DEFAULT,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,  # torch's order
        device: Any = None,
        dtype: Any = None,
        **policies: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            process_group=process_group,
            **policies,
        )

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the statistics; None where torch.distributed is not in use."""
        return ranks.world() if self._held is None else self._held.group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"SyncBatchNorm: x must have at least 2 dimensions (B, C, ...), got x of shape "
                f"{_checks.shape_text(input.shape)}; add a batch dimension with x.unsqueeze(0)"
            )

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: ProcessGroup | None = None
    ) -> torch.nn.Module:
        """`module` with every BatchNorm in it, torch's or normkit's, as a SyncBatchNorm of the same numbers.

        Parameters and buffers are the very same tensors; modes, policies and, unless `process_group` names another,
        process groups are kept; what was shared stays shared. InstanceNorm is left alone. As torch's method of this
        name, it changes `module` in place unless it is itself a BatchNorm: use what it returns. ValueError for a lazy
        BatchNorm that has seen no batch.
        """
        return cls._converted(module, process_group, {})

    @classmethod
    def _converted(
        cls, module: torch.nn.Module, group: ProcessGroup | None, made: dict[torch.nn.Module, torch.nn.Module]
    ) -> torch.nn.Module:
        if module not in made:
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                made[module] = cls._of(module, group)
            else:
                made[module] = module
                for name, child in module._modules.items():  # named_children names a shared module once
                    if child is not None:
                        module._modules[name] = cls._converted(child, group, made)
        return made[module]

    @classmethod
    def _of(cls, norm: torch.nn.modules.batchnorm._BatchNorm, group: ProcessGroup | None) -> SyncBatchNorm:
        if isinstance(norm, torch.nn.modules.lazy.LazyModuleMixin):
            raise ValueError(
                f"SyncBatchNorm: convert_sync_batchnorm needs a BatchNorm that knows its num_features, got a fresh "
                f"{type(norm).__name__}; call the model on a batch first"
            )
        made = cls(norm.num_features, device="meta")
        kept: dict[str, Any] = {
            name: copy(value) if isinstance(value, dict) else value for name, value in norm.__dict__.items()
        }
        before = kept.pop("process_group", None)  # torch.nn.SyncBatchNorm's
        held: ranks.Held | None = kept.pop("_held", None)
        kept.pop("_compiled_call_impl", None)  # it calls the old module
        made.__dict__.update(kept)  # numbers, modes, hooks and, of normkit's own, policies
        made._hold(group if group is not None else before if held is None else held.group)
        return made
