"""Hooks that measure every call of every module, and keep the sums on the device until the end.

Here: Sums (numbers on their devices, one transfer), Call (what was measured of one call), Recorder (the hooks).
May import: torch, placement, study.measure, study.observation.numbers.
Read next: ../observe.py, which runs a model under a Recorder and turns its calls into records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normkit.layers import LayerNorm, RMSNorm
from normkit.placement import Residual
from normkit.study.measure import skip_weights
from normkit.study.models import TokenBatchNorm
from normkit.study.observation import numbers

Index = dict[str, int]  # name of a number -> its place in Sums


class Sums:
    """Numbers of no dimensions, left where they were computed; `values` brings each device's over in one transfer."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def add(self, value: Tensor) -> int:
        self._kept.append(value.detach())
        return len(self._kept) - 1

    def add_all(self, found: numbers.Numbers) -> Index:
        return {name: self.add(value) for name, value in found.items()}

    def values(self) -> list[float]:
        out = [0.0] * len(self._kept)
        devices: dict[torch.device, list[int]] = {}
        for place, value in enumerate(self._kept):
            devices.setdefault(value.device, []).append(place)
        for device, places in devices.items():
            dtype = numbers.wide(self._kept[places[0]])
            together = torch.stack([self._kept[place].to(dtype) for place in places])
            assert together.device == device
            for place, value in zip(places, together.tolist(), strict=True):
                out[place] = value
        return out


@dataclass
class Call:
    """One call of one module; numbers are places in Sums."""

    module: nn.Module
    path: str
    number: int
    output: Index = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dtype: str = ""
    block: Index | None = None
    activation: Index | None = None
    norm: Index | None = None
    mismatch: str = ""  # why a block's identity branch has no weight
    # only while the call runs
    held: Tensor | None = None  # a block's input, a copy: the block may write into it
    total: Tensor | None = None  # what a Residual's output norm was given


class Recorder:
    """Measure the calls of a model's modules.

    Args:
        model: hooks are put on it and on all its modules, and removed on leaving `watching`.
        chains: path of a module that may be a residual block -> the chain it belongs to.
    """

    def __init__(self, model: nn.Module, chains: Mapping[str, str]) -> None:
        self.sums = Sums()
        self.calls: list[Call] = []
        self.chains = chains
        self._paths = {module: path for path, module in model.named_modules()}  # each once, by its first path
        self._counts: Counter[str] = Counter()
        self._open: list[Call] = []
        self._handles: list[RemovableHandle] = []
        self._identity: dict[str, Tensor] = {}  # chain -> running product of the study's skip weights
        self._recording = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module, and on outputs for their gradients; all removed at the end, also after an error."""
        try:
            for module in self._paths:
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
            self._recording = True
            yield
        finally:
            self._recording = False
            for handle in self._handles:
                handle.remove()
            self._open.clear()

    def forward_done(self) -> None:
        """From here on calls are recomputations of activation checkpointing in the backward: they do not count."""
        self._recording = False

    # ------------------------------------------------------------------------------------------ hooks

    @torch.no_grad()
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._recording:
            return
        path = self._paths[module]
        self._counts[path] += 1
        call = Call(module, path, self._counts[path])
        self.calls.append(call)
        x = first_tensor((args, kwargs))
        if x is not None and x.numel():
            if path in self.chains:
                call.held = x.detach().clone()
            if (kind := numbers.activation_kind(module)) is not None:
                call.activation = self.sums.add_all(numbers.saturation(kind, x))
            elif numbers.is_norm(module):
                call.norm = self.sums.add_all(numbers.norm_input(module, x, args, kwargs))
                outer = self._open[-1] if self._open else None
                if outer is not None and isinstance(outer.module, Residual) and outer.module.norm_output is module:
                    outer.total = x.detach()
        self._open.append(call)

    @torch.no_grad()
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._recording:
            return
        call = self._close(module)
        out = first_tensor(output)
        if out is not None and out.numel():
            call.shape, call.dtype = tuple(out.shape), str(out.dtype).removeprefix("torch.")
            call.output = {"rms": self.sums.add(numbers.rms(out))}
            if call.norm is not None:
                call.norm |= {"output_rms": call.output["rms"], "output_mean": self.sums.add(numbers.mean(out))}
            if out.requires_grad:
                self._handles.append(out.register_hook(self._gradient_of(call)))  # type: ignore[no-untyped-call]
        if call.path in self.chains:
            self._block(call, out)
        call.held = call.total = None

    def _close(self, module: nn.Module) -> Call:
        """The open call of this module; those above it ended in an exception that somebody caught."""
        while self._open:
            call = self._open.pop()
            if call.module is module:
                return call
            call.held = call.total = None
        raise AssertionError("a forward hook ran without its pre-hook")

    def _gradient_of(self, call: Call) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            with torch.no_grad():
                call.output["gradient"] = self.sums.add(numbers.norm(gradient))

        return keep

    # ------------------------------------------------------------------------------------------ blocks

    def _block(self, call: Call, out: Tensor | None) -> None:
        x = call.held
        if x is None or out is None:
            call.mismatch = "has no floating-point tensor as input and output"
        elif x.shape != out.shape or x.dtype != out.dtype:
            call.mismatch = f"maps {tuple(x.shape)} {x.dtype} to {tuple(out.shape)} {out.dtype}"
        else:
            call.block = self.sums.add_all(numbers.kept(x, out))
            if isinstance(call.module, Residual) and x.device.type != "mps":
                call.block |= self._study_weights(call, x)

    def _study_weights(self, call: Call, x: Tensor) -> Index:
        """The skip weight of measure.py, for the blocks of which the study defines one, and its running product."""
        block = call.module
        assert isinstance(block, Residual)
        last = block.norm_output
        if last is not None and (call.total is None or not _study_norm(last)):
            return {}
        wide, scale = x.double(), block.placement.skip_scale
        if call.total is None:  # nothing rescales the sum
            weight = torch.full((), scale, dtype=wide.dtype, device=x.device)
        else:
            weight, _ = skip_weights(block, wide, call.total.double() - scale * wide, normalized=False)
        chain = self.chains[call.path]
        before = self._identity.get(chain)
        if before is not None and before.shape not in ((), weight.shape) and weight.shape != ():
            return {"skip_weight": self.sums.add(weight.mean())}  # norms of one chain reduce over different axes
        self._identity[chain] = weight if before is None else before * weight
        return {
            "skip_weight": self.sums.add(weight.mean()),
            "identity_weight": self.sums.add(self._identity[chain].mean()),
        }


def _study_norm(last: nn.Module) -> bool:
    """Whether measure.py's skip weight is defined for this norm: over the last axis, or BatchNorm of tokens."""
    if type(last) in (nn.LayerNorm, nn.RMSNorm, LayerNorm, RMSNorm):
        assert isinstance(last, nn.LayerNorm | nn.RMSNorm)
        return len(last.normalized_shape) == 1 and last.eps is not None
    return isinstance(last, TokenBatchNorm)


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in nested tuples, lists, dicts and dataclasses, in their order."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    parts: Iterator[Any]
    if isinstance(value, Mapping):
        parts = iter(value.values())
    elif isinstance(value, tuple | list):
        parts = iter(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, part.name) for part in fields(value))
    else:
        return None
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)
