"""Collectives on small vectors: what norms send between the ranks of a process group.

Here: the sum over ranks and one vector of each rank, both differentiable, and the agreement on what must be equal
everywhere. Works on every backend that torch.distributed has. May import: torch.
Read next: statistics.py, which merges what ranks counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any  # dist.ProcessGroup is missing where torch was built without distributed


def world() -> ProcessGroup | None:
    """The group of all ranks; None where torch.distributed is not in use."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def size(group: ProcessGroup | None) -> int:
    """The number of ranks; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


class Held:
    """A process group as an attribute of a layer: copies of the layer share it, and pickling says what to do."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> Held:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "normkit: a layer's process group lives in its process and cannot be pickled; "
            "save the layer's state_dict() instead"
        )


class _Sum(torch.autograd.Function):
    """The sum over ranks. What each rank's result contributes to the loss comes back to every rank's input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        summed = values.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, ctx.group), None


def summed(values: Tensor, group: ProcessGroup) -> Tensor:
    """The elementwise sum over the group's ranks: one all-reduce, to be called by all of them; differentiable."""
    result: Tensor = _Sum.apply(values, group)  # type: ignore[no-untyped-call]
    return result


class _Gather(torch.autograd.Function):
    """Every rank's row. A rank's row gets the sum of what all ranks make of it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        values = values.contiguous()
        found = [torch.empty_like(values) for _ in range(size(group))]
        dist.all_gather(found, values, group=group)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, ctx.group)[dist.get_rank(ctx.group)], None


def gathered(values: Tensor, group: ProcessGroup) -> Tensor:
    """`values` (n,) of every rank as (ranks, n), in the order of ranks: one all-gather, differentiable."""
    result: Tensor = _Gather.apply(values, group)  # type: ignore[no-untyped-call]
    return result


def agree(
    op: str, name: str, value: int, group: ProcessGroup, device: torch.device, words: Sequence[object] = ()
) -> None:
    """ValueError on every rank unless all have the same `value`; `words[value]`, if given, is how it reads."""
    found = gathered(torch.tensor([value], dtype=torch.int64, device=device), group)[:, 0].tolist()
    if len(set(found)) == 1:
        return
    shown = [str(words[number]) if words else str(number) for number in found]
    other = next(rank for rank, number in enumerate(found) if number != found[0])
    raise ValueError(
        f"{op}: {name} must be the same on all ranks of the process group, got {shown[0]} on rank 0 and {shown[other]} "
        f"on rank {other}; build the same model everywhere"
    )


Fact = tuple[str, float, Sequence[object]]  # a name, a number that float64 holds, and how it reads or () for digits


def agree_on(op: str, facts: Sequence[Fact], group: ProcessGroup, device: torch.device, advice: str) -> None:
    """`agree` on several numbers by one all-gather; the sentence names the first that differs and ends in `advice`."""
    values = torch.tensor([value for _, value, _ in facts], dtype=torch.float64, device=device)
    for (name, _, words), found in zip(facts, gathered(values, group).T.tolist(), strict=True):
        if len(set(found)) > 1:
            other = next(rank for rank, value in enumerate(found) if value != found[0])
            here, there = (str(words[int(value)]) if words else f"{value:.12g}" for value in (found[0], found[other]))
            raise ValueError(
                f"{op}: {name} must be the same on all ranks of the process group, got {here} on rank 0 and {there} "
                f"on rank {other}; {advice}"
            )
