"""Who computes a call: the backends, the automatic choice, its reasons, and how to force one.

Here: the Backend protocol, `select`, `reasons`, `use_backend`.
May import: torch, reference, kernels.
Read next: autograd.py, which keeps the chosen backend from forward to backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit import reference
from normkit.kernels import columns, cpu, gpu, launch, memory
from normkit.reference import Count


class Backend(Protocol):
    """The six primitives; `reference` documents each of them."""

    def rows_forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centered: bool,
        weight_offset: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]: ...

    def rows_backward(
        self,
        dout: Tensor,
        dtotal: Tensor | None,
        total: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        weight: Tensor | None,
        weight_offset: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...

    def channels_moments(self, x: Tensor, mask: Tensor | None, per_sample: bool) -> tuple[Count, Tensor, Tensor]: ...

    def channels_affine(
        self, x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, mask: Tensor | None
    ) -> Tensor: ...

    def channels_backward_moments(
        self, dout: Tensor, x: Tensor, center: Tensor, mask: Tensor | None, per_sample: bool
    ) -> tuple[Tensor, Tensor]: ...

    def channels_backward_affine(
        self,
        dout: Tensor,
        x: Tensor | None,
        center: Tensor | None,
        a: Tensor,
        b: Tensor | None,
        c: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor: ...


NAMES = ("cpu", "triton", "reference")

EXACT_TYPES = (Tensor, torch.nn.Parameter)
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_forced = cpu.forced

CPU: Backend = cpu
TRITON = gpu.TRITON
interpreted, has_kernels = gpu.interpreted, gpu.has_kernels
COLUMNS = cast(Backend, columns)  # its row primitives for the channels of channels-first memory; it has no others
suits_columns = columns.suits
norm_now, norm_backward_now = cpu.norm_now, cpu.norm_backward_now
batch_norm_now, batch_norm_backward_now = cpu.batch_norm_now, cpu.batch_norm_backward_now
sample_norm_now = cpu.sample_norm_now
recorders, set_kept_bytes = cpu.recorders, memory.set_kept_bytes
# up to so many bytes of x a CUDA tensor is torch's own to norm
TORCH_ROW_BYTES, TORCH_BATCH_NORM_BYTES = launch.TORCH_ROW_BYTES, launch.TORCH_BATCH_NORM_BYTES


class BackendUnavailable(RuntimeError):
    """`use_backend(name)` was asked for and cannot take the call; the message carries the reasons."""


@dataclass(frozen=True)
class Reason:
    """One backend, whether it takes the call, and why (not), in a sentence."""

    name: str
    chosen: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({'chosen' if self.chosen else 'not chosen'}): {self.why}"


def select(*tensors: Tensor | None) -> Backend | None:
    """The backend for one call on these tensors, or None for the differentiable composite of the formulas.

    Raises:
        BackendUnavailable: `use_backend(name)` is in force and that backend cannot take the tensors.
    """
    if transformed() is not None:
        return None
    forced = _forced.get()
    if forced is None:
        x = tensors[0]
        if x is not None and x.is_cuda:
            if _off_triton(tensors) is None:
                return _TAKERS["triton"]
        elif _off_cpu(tensors) is None:
            return cpu
        return reference if _off_reference(tensors) is None else None
    off = _OFF[forced](tensors)
    if off is not None:
        table = "; ".join(f"{name}: {_OFF[name](tensors) or 'available'}" for name in NAMES)
        raise BackendUnavailable(
            f'use_backend("{forced}") cannot take this call: {off}; leave use_backend or name another ({table})'
        )
    return _TAKERS[forced]


def reasons(x: Tensor | None = None) -> list[Reason]:
    """Which backend takes x (without x: a plain float32 CPU tensor), and for every other one why not.

    Example:
        >>> import normkit
        >>> for reason in normkit.reasons(torch.ones(2, 3, device="meta")):
        ...     print(reason)
        cpu (not chosen): x is on meta, the compiled core takes CPU tensors
        triton (not chosen): torch finds no CUDA device
        reference (chosen): the formulas in plain torch take what no kernel takes
    """
    tensors = (torch.empty(0) if x is None else x,)
    transform = transformed()
    off = {name: transform or _OFF[name](tensors) for name in NAMES}
    forced = _forced.get()
    if transform is not None:
        off["reference"] = None
    elif forced is not None:
        off = {name: why if name == forced else f'use_backend("{forced}") is in force' for name, why in off.items()}
    taker = next((name for name in NAMES if off[name] is None), None if forced else "reference")
    rows = []
    for name in NAMES:
        if name == taker:
            rows.append(Reason(name, True, transform_text(transform) if transform else _CHOSEN[name]))
        else:
            rows.append(Reason(name, False, off[name] or f"{taker} comes first"))
    return rows


def is_forced() -> bool:
    """Whether `use_backend` is in force."""
    return _forced.get() is not None


def transform_text(transform: str) -> str:
    """Why the composite runs: the sentence that `reasons` prints for it."""
    return f"its formulas as differentiable torch operations, since {transform}"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend ("cpu", "triton" or "reference") for the calls inside; never falls back.

    Calls that it cannot take raise BackendUnavailable with the reasons. Tracing, transforms (`torch.compile`,
    `torch.export`, `torch.func`) and double backward are the one exception: they take the composite formulas.
    The choice is made in forward; a backward outside the context uses the same backend.

    Raises:
        ValueError: the name is not that of a backend.
        BackendUnavailable: the backend is off on this machine, whatever the tensors.

    Example:
        >>> import torch, normkit
        >>> with normkit.use_backend("reference"):
        ...     out = normkit.functional.rms_norm(torch.ones(2, 4), 4)
    """
    if name not in NAMES:
        raise ValueError(f"use_backend: name must be one of {', '.join(NAMES)}, got {name!r}; see normkit.reasons()")
    off = cpu.unavailable() if name == "cpu" else gpu.unavailable() if name == "triton" else None
    if off is not None:
        raise BackendUnavailable(f'use_backend("{name}"): {off}')
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def transformed() -> str | None:
    """Why no kernel may run now, whatever the tensors: a tracer, a transform or a mode is active; or None.

    A kernel reads memory by address. Under these, the tensor in hand stands for something else (a graph node, a
    batch, a pair of value and tangent) and its memory holds nothing or not everything. Function modes are no reason:
    the public functions are handed to them, and what a mode hands on is computed as ever (`torch.device("cpu")` as a
    context and `torch.set_default_device` are such modes).
    """
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "a forward-mode differentiation level is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a torch dispatch mode is active"
    return None


def exact(tensor: Tensor) -> bool:
    """Whether the tensor is torch's own strided tensor, whose memory is what it shows."""
    return (
        type(tensor) in EXACT_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def _off_cpu(tensors: Sequence[Tensor | None]) -> str | None:
    if (why := cpu.unavailable()) is not None:
        return why
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"x is on {tensor.device}, the compiled core takes CPU tensors"
        if not exact(tensor):
            return _inexact_text(tensor)
        if tensor.dtype not in KERNEL_DTYPES:
            return f"x has dtype {tensor.dtype}, the compiled core takes float32, float64, bfloat16 and float16"
    return None


def _off_triton(tensors: Sequence[Tensor | None]) -> str | None:
    for tensor in tensors:
        if tensor is not None and not exact(tensor):
            return gpu.unavailable() or _inexact_text(tensor)
    return gpu.off(tensors, KERNEL_DTYPES)


def _off_reference(tensors: Sequence[Tensor | None]) -> str | None:
    """The reference as a backend differentiates by its own formula, which holds for real, exact tensors."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not exact(tensor):
            return _inexact_text(tensor)
        if not tensor.is_floating_point():
            return f"x has dtype {tensor.dtype}, whose gradient is left to torch"
    return None


def _inexact_text(tensor: Tensor) -> str:
    if type(tensor) not in EXACT_TYPES:
        return f"x is a {type(tensor).__name__}, kernels take exact torch.Tensor objects"
    return "x is nested, sparse, or a lazily negated or zero view, kernels take plain strided memory"


_TAKERS: dict[str, Backend] = {"cpu": cpu, "triton": TRITON, "reference": reference}
_OFF = {"cpu": _off_cpu, "triton": _off_triton, "reference": _off_reference}
_CHOSEN = {
    "cpu": "the compiled core takes plain CPU tensors",
    "triton": f"Triton kernels take CUDA tensors; up to {TORCH_ROW_BYTES // 2**20} MiB of x "
    f"({TORCH_BATCH_NORM_BYTES // 2**20} in BatchNorm) torch's own are called, which return sooner",
    "reference": "the formulas in plain torch take what no kernel takes",
}
