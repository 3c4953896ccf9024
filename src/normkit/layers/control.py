"""Control of the running statistics of a whole model: frozen, moved once per step, computed anew from data.

May import: torch, functional, statistics, ranks, layers.running.
Read next: running.py, what one layer does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from normkit.layers.running import RunningStatistics

_TORCHS = torch.nn.modules.batchnorm._BatchNorm


def tracking_layers(op: str, model: torch.nn.Module) -> dict[str, RunningStatistics]:
    """normkit's layers in `model` that keep running statistics, by name; ValueError where there is none, or where
    some are torch.nn's, which could not be controlled."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _TORCHS) and module.running_mean is not None
    }
    foreign = [name for name, module in found.items() if not isinstance(module, RunningStatistics)]
    if foreign:
        raise ValueError(
            f"{op}: every BatchNorm must be normkit's, got torch.nn's at {', '.join(foreign) or 'the top'}; "
            f"build them with normkit.BatchNorm2d and its like"
        )
    if not found:
        raise ValueError(
            f"{op}: the model must hold a BatchNorm with running statistics, got {type(model).__name__} with none"
        )
    return {name: module for name, module in found.items() if isinstance(module, RunningStatistics)}


@contextmanager
def frozen_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Within it, every BatchNorm of `model` normalizes with its running statistics and leaves them alone.

    `.train()` inside does not thaw them; afterwards each layer is as frozen as it was before, whatever was raised.

    Args:
        model: holds normkit BatchNorm layers.

    Raises:
        ValueError: no BatchNorm with running statistics in it, or one of torch.nn's, which cannot be frozen.

    Example:
        >>> import torch, normkit
        >>> norm = normkit.BatchNorm1d(2)
        >>> with normkit.frozen_statistics(norm):
        ...     _ = norm.train()(torch.randn(4, 2))
        >>> int(norm.num_batches_tracked)
        0
    """
    layers = tracking_layers("frozen_statistics", model).values()
    before = [layer.frozen for layer in layers]
    try:
        for layer in layers:
            layer.freeze()
        yield
    finally:
        for layer, frozen in zip(layers, before, strict=True):
            layer.frozen = frozen


class Accumulation:
    """What `accumulate_statistics` returns: `remove()` undoes it; as a context manager it does so at the end."""

    def __init__(self, layers: Sequence[RunningStatistics], hook: Any) -> None:
        self._before = [(layer, layer.deferred) for layer in layers]
        self._hook = hook
        for layer in layers:
            layer.deferred = True

    def remove(self) -> None:
        """Commit what is pending, and move the running statistics as before; a second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
        for layer, deferred in self._before:
            layer.commit_statistics()
            layer.deferred = deferred
        self._before = []

    def __enter__(self) -> Accumulation:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


def accumulate_statistics(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Accumulation:
    """From now on running statistics move once per step, by the pooled statistics of all its training forwards.

        count, mean, m2 of the forwards, merged by Chan's formula; running = decay * running + (1 - decay) * pooled

    So gradient accumulation over k micro-batches gives the running statistics of the whole batch, and several
    forwards per step (a GAN, a siamese net) one update of normal weight. Each forward still normalizes with its own
    batch. Forwards that activation checkpointing repeats are not counted.

    Args:
        model: holds normkit BatchNorm layers.
        optimizer: if given, `statistics_step(model)` is called after each of its steps; otherwise call it yourself.

    Returns:
        an Accumulation: `remove()`, or the end of `with`, commits what is pending and goes back to one update per
        forward.

    Raises:
        ValueError: no BatchNorm with running statistics in the model, or one of torch.nn's.

    Numerics: pending moments are float64, as exact as one batch's. They are not part of the state dict, and loading
        one drops them: save checkpoints after a step. A copy of the model (torch.optim.swa_utils.AveragedModel) goes on
        accumulating: for its statistics use `recompute_statistics`. Not for torch.nn.DataParallel, whose replicas are
        thrown away, nor under torch.func.vmap.

    Example:
        >>> import torch, normkit
        >>> norm = normkit.BatchNorm1d(1, momentum=1.0)
        >>> with normkit.accumulate_statistics(norm):
        ...     _ = norm(torch.tensor([[0.0], [2.0]])), norm(torch.tensor([[4.0], [6.0]]))
        >>> norm.running_mean, int(norm.num_batches_tracked)
        (tensor([3.]), 1)

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    layers = tuple(tracking_layers("accumulate_statistics", model).values())

    def after_step(*_: object) -> None:
        statistics_step(model)

    return Accumulation(layers, None if optimizer is None else optimizer.register_step_post_hook(after_step))


def statistics_step(model: torch.nn.Module) -> int:
    """Moves the running statistics by what `accumulate_statistics` left pending, as one batch.

    Args:
        model: the one given to `accumulate_statistics`.

    Returns:
        how many layers had something pending.

    Example:
        >>> import torch, normkit
        >>> norm = normkit.BatchNorm1d(1)
        >>> _ = normkit.accumulate_statistics(norm), norm(torch.randn(4, 1)), norm(torch.randn(4, 1))
        >>> normkit.statistics_step(norm), int(norm.num_batches_tracked)
        (1, 1)
    """
    layers = [module for module in model.modules() if isinstance(module, RunningStatistics)]
    return sum(layer.commit_statistics() for layer in layers)
