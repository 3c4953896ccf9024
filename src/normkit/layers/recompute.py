"""Exact population statistics for every BatchNorm of a model, computed anew from data.

Here: `recompute_statistics`, and what it returns.
May import: torch, ranks, layers.watching; rich, only where a progress bar is drawn.
Read next: watching.py, what is measured at one layer.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from normkit import ranks
from normkit.layers.watching import FROZEN, OP, Recomputed, Watched, shown
from normkit.ranks import ProcessGroup

Forward = Callable[[torch.nn.Module, Any], object]

_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


class Recomputation(dict[str, Recomputed]):
    """What `recompute_statistics` returns: by name a `Recomputed` for each layer that was measured; printed readably.

    Attributes:
        left_alone: the layers whose running statistics were not changed, by name, and why not.
        batches: how many batches a pass took, of all ranks.
        passes: how many passes were made.
        settled: whether the last pass found, bit for bit, the statistics that it normalized with: those eval sees.
    """

    def __init__(
        self, found: Mapping[str, Recomputed], left_alone: dict[str, str], batches: int, passes: int, settled: bool
    ) -> None:
        super().__init__(found)
        self.left_alone, self.batches, self.passes, self.settled = left_alone, batches, passes, settled

    def __repr__(self) -> str:
        lines = [f"{OP}: batches {self.batches}, passes {self.passes}{', settled' if self.settled else ''}"]
        for name, one in self.items():
            said = f"{one.count} values, mean off by {one.mean_shift:.3g} std, variance by {one.variance_ratio:.3g} x"
            said += f", {one.skipped} calls with NaN or infinity skipped" if one.skipped else ""
            said += f" ({self.left_alone[name]})" if name in self.left_alone else ""
            lines.append(f"  {shown(name)}: {said}")
        lines += [f"  {shown(name)}: {why}" for name, why in self.left_alone.items() if name not in self]
        return "\n".join(lines)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module itself: DistributedDataParallel's forward would wait for every rank in each batch."""
    while True:
        inner = model.module if isinstance(model, _WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def _layers(model: torch.nn.Module) -> list[Watched]:
    found = []
    for name, module in model.named_modules():  # a module in two places is found once
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            if isinstance(module.running_mean, torch.nn.parameter.UninitializedBuffer):
                raise ValueError(
                    f"{OP}: every BatchNorm must know its channels, got {shown(name)} not yet initialized; "
                    f"run the model on a batch first"
                )
            found.append(Watched(name, module))
    if not found:
        raise ValueError(
            f"{OP}: the model must hold a BatchNorm with running statistics, got {type(model).__name__} with none"
        )
    return found


def _eager() -> AbstractContextManager[Any]:
    """Compiled code runs eagerly: it may have been traced without hooks. dynamo takes seconds to load, and where it is
    not loaded nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _measuring(model: torch.nn.Module, watched: Sequence[Watched]) -> Iterator[None]:
    """Hooks, eval mode, no gradients; all as before afterwards. `train()` is not called, since models override it."""
    modes = [(module, module.training) for module in model.modules()]
    hooks: list[Any] = []
    try:
        for module, _ in modes:
            module.training = False
        hooks += [one.layer.register_forward_pre_hook(one.before_call, with_kwargs=True) for one in watched]
        with _eager(), torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for one in watched:
            one.normalize_with(one.before)
        for module, training in modes:
            module.training = training


def _same_random_state(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Puts torch's generators back afterwards, those of the devices of `model` too."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type in ("cuda", "xpu")}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng([device for device in devices if device.type == kind], device_type=kind)


def _with_bar(batches: Iterable[Any], total: int | None, label: str) -> Generator[Any]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(batches, total, description=label)


def _first_of(model: torch.nn.Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


class _Data(NamedTuple):
    """The batches of one pass, and how a model takes them."""

    loader: Iterable[Any]
    batches: int | None
    forward: Forward
    progress: bool

    def total(self) -> int | None:
        try:
            length = len(self.loader)  # type: ignore[arg-type]  # of what has one
        except TypeError:
            return self.batches
        return length if self.batches is None else min(length, self.batches)

    def run(self, model: torch.nn.Module, label: str) -> int:
        """One pass; how many batches there were."""
        number = 0
        with _same_random_state(model):  # so that every pass has the same shuffle and augmentation
            taken: Generator[Any] = (batch for batch in itertools.islice(self.loader, self.batches))
            if self.progress and sys.stderr.isatty():
                taken = _with_bar(taken, self.total(), label)
            with closing(taken):
                for batch in taken:
                    self.forward(model, batch)
                    number += 1
        return number


def _checked(loader: Iterable[Any], batches: int | None, passes: int) -> None:
    for name, value in (("batches", batches), ("passes", passes)):
        if value is not None and value < 1:
            raise ValueError(f"{OP}: {name} must be at least 1, got {value}")
    if passes > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"{OP}: {passes} passes need a loader that can be iterated again, got {type(loader).__name__}, which ends "
            f"after one; pass a DataLoader or a list"
        )


def _agree(watched: Sequence[Watched], passes: int, group: ProcessGroup) -> None:
    """An error on every rank where ranks would not make the same calls; two all-gathers."""
    device = watched[0].before[0].device
    ranks.agree(OP, "the number of BatchNorm layers", len(watched), group, device)
    facts: list[ranks.Fact] = [("passes", passes, ())]
    for one in watched:
        facts.append((f"num_features of {shown(one.name)}", one.before[0].numel(), ()))
        facts.append((f"the state of {shown(one.name)}", int(one.frozen), ("not frozen", "frozen")))
    ranks.agree_on(OP, facts, group, device, "make the same call everywhere")


def _pass(model: torch.nn.Module, watched: Sequence[Watched], data: _Data, label: str, group: ProcessGroup) -> int:
    """One pass over the data, pooled over ranks; how many batches there were in all. Nothing waits between batches."""
    for one in watched:
        one.start_pass()
    error, number = None, -1
    try:
        number = data.run(model, label)
    except Exception as raised:
        if group is None:
            raise
        error = raised  # the others are told first, so that they do not wait in vain
    if group is not None:
        number = _over_ranks(watched, number, error, group)
    if number == 0:
        raise ValueError(
            f"{OP}: the loader must give at least one batch, got none; a generator that was used up gives none"
        )
    return number


def _over_ranks(watched: Sequence[Watched], number: int, error: Exception | None, group: ProcessGroup) -> int:
    """Pools what all ranks found, layer after layer in the model's order, whatever ran where; the sum of batches."""
    device = watched[0].before[0].device
    numbers = ranks.gathered(torch.tensor([number], dtype=torch.int64, device=device), group)[:, 0].tolist()
    if error is not None:
        raise error
    if -1 in numbers:
        raise RuntimeError(f"{OP}: rank {numbers.index(-1)} raised in its batches, see there; nothing was changed")
    for one in watched:
        one.over_ranks(group)
    own = torch.tensor([[one.calls, one.skipped] for one in watched], dtype=torch.float64, device=device)
    for one, (calls, skipped) in zip(watched, ranks.summed(own, group).tolist(), strict=True):
        one.calls, one.skipped = int(calls), int(skipped)
    return sum(numbers)


def _warn(result: Recomputation) -> None:
    said = [f"{shown(name)} ({why})" for name, why in result.left_alone.items() if why != FROZEN]
    if said:
        warnings.warn(f"{OP}: running statistics left alone of {', '.join(said)}", stacklevel=3)
    said = [f"{shown(name)} ({one.skipped})" for name, one in result.items() if one.skipped]
    if said:
        warnings.warn(f"{OP}: calls with NaN or infinity left out of {', '.join(said)}", stacklevel=3)


def recompute_statistics(
    model: torch.nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    batches: int | None = None,
    passes: int = 1,
    progress: bool = True,
    process_group: ProcessGroup | None = None,
) -> Recomputation:
    """Sets the running statistics of every BatchNorm, normkit's and torch.nn's, to those of the data of `loader`.

        count, mean, m2 of all batches pooled by Chan's formula
        running_mean = mean;     running_var = m2 / (count - 1)

    Not an average of batch variances, which leaves out how far the batches' means lie apart. Every other layer is in
    eval mode (dropout is off, as eval sees it). What a BatchNorm hands on to deeper layers is normalized

        in the first pass:  with the batch's own statistics, as in training; the old running statistics do not count
        in later passes:    with the statistics of the pass before, as in eval

    One pass is the usual practice: exact for a BatchNorm that follows no other, near for the rest, the nearer the
    larger the batches. Pass k is exact for the k-th of a chain, whose numbers then repeat. Passes end early when all
    do, so that a large `passes` means: exactly the statistics of what eval sees.

    Args:
        model: DistributedDataParallel and compiled models are entered and run without both.
        loader: an iterable of batches; with several passes, one that can be iterated again.
        forward: `forward(model, batch)` runs a batch, device transfer included; default `model(batch)`, of a tuple or
            list `model(batch[0])`. `mask=` and `lengths=` that a layer gets count.
        batches: stop a pass after as many; default all.
        passes: see above; default 1.
        progress: whether a bar is drawn on stderr where that is a terminal, by the first rank; default True.
        process_group: whose ranks' data are pooled, the same result for all. Every rank makes the call, with as many
            batches as it has: ranks meet at the end of a pass only, SyncBatchNorm too takes its own rank's batch. (The
            forward of FSDP meets in every batch, and so needs equally many.) None: this process alone.

    Returns:
        a Recomputation: for each layer's name how far the moving averages were off, `left_alone` for the others.
        Layers that never ran are left alone, with a warning; frozen ones are measured only, so that the call within
        `frozen_statistics` changes nothing; those that do not track are no part of it.

    Raises:
        ValueError: no BatchNorm with running statistics, no batch, one value per channel in the first pass (policy
            one_value), NaN or infinity in a layer with nonfinite="raise"; models that differ between ranks.
        RuntimeError: another rank raised. After any error the running statistics are the old ones.

    Numerics: pooled in float64. A call with NaN or infinity is left out, counted and warned of; nonfinite="allow" pools
        it. Only running_mean and running_var change, in place, at the end: num_batches_tracked, modes, gradients and
        torch's random state are untouched.

    Example:
        >>> import torch, normkit
        >>> norm = normkit.BatchNorm1d(1)
        >>> normkit.recompute_statistics(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0], [6.0]])])
        recompute_statistics: batches 2, passes 1
          (the model): 5 values, mean off by 1.18 std, variance by 26 x
        >>> norm.running_mean, norm.running_var
        (tensor([6.]), tensor([26.]))

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3 (PreciseBN); differs in that dropout is
        off, batches may be uneven or masked, and further passes are offered.
    """
    _checked(loader, batches, passes)
    model = _unwrapped(model)
    watched = _layers(model)
    first = process_group is None or torch.distributed.get_rank(process_group) == 0
    if process_group is not None:
        _agree(watched, passes, process_group)
    data = _Data(loader, batches, _first_of if forward is None else forward, progress and first)
    with _measuring(model, watched):
        for number in range(1, passes + 1):
            label = OP if passes == 1 else f"{OP}, pass {number} of at most {passes}"
            taken = _pass(model, watched, data, label, process_group)
            settled = sum(one.end_pass() for one in watched) == len(watched)  # each ends its pass
            if settled:
                break
    left_alone = {one.name: why for one in watched if (why := one.why_alone()) is not None}
    found = {one.name: one.summary() for one in watched if one.pooled.count > 1}
    result = Recomputation(found, left_alone, taken, number, settled)
    _warn(result)
    with torch.no_grad():
        for one in watched:
            if one.name not in left_alone and one.found is not None:
                for running, new in zip(one.before, one.found, strict=True):
                    running.copy_(new)
    return result
