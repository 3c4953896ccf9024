"""The variants of a cell: calls without arguments on one input, by name.

Here: what `kernel`, `layer`, `torch`, `compile`, `onnx`, `copy`, `canary`, `passes`, `empty_function` and
`saving_function` are.
Read next: timing.py, which calls them in turn; kernels.py, our compiled core on existing memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import kernels
import onnx_peer
import torch
from cells import LINE, MIDDLE, ONE, QKV, SMALL, Cell
from torch import Tensor

import normkit
from normkit import functional

Call = Callable[[], object]
Function = Callable[..., object]
EPS = kernels.EPS
TORCH_NORMS = {"layer_norm": torch.nn.LayerNorm, "rms_norm": torch.nn.RMSNorm}
OUR_NORMS = {"layer_norm": normkit.LayerNorm, "rms_norm": normkit.RMSNorm}
BATCH_NORMS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d"}


def variants(cell: Cell) -> dict[str, Call]:
    """Every variant of the cell. `copy` and `canary` are equal: their ratio says how far equal things came apart."""
    torch.manual_seed(0)
    torch.compiler.reset()
    calls = _rows(cell) if cell.family == "rows" else _channels(cell)
    return {name: call for name, call in calls.items() if call is not None}


def _copies(x: Tensor) -> dict[str, Call]:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    target = torch.empty(x.shape, dtype=x.dtype)
    if channels_last:
        target = target.to(memory_format=torch.channels_last)
    return {"copy": lambda: target.copy_(x), "canary": lambda: target.copy_(x)}


def _task(cell: Cell, function: Function, inputs: Sequence[Tensor], module: torch.nn.Module, douts: object) -> Call:
    """`function(*inputs)`, and with gradients the backward of it to inputs and parameters."""
    if cell.direction == "forward":
        return lambda: function(*inputs)
    leaves = [values.detach().requires_grad_() for values in inputs]
    wanted = [*leaves, *module.parameters()]
    return lambda: torch.autograd.grad(function(*leaves), wanted, douts)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- rows


@dataclass
class Rows:
    """The tensors of a row cell."""

    x: Tensor
    residual: Tensor | None
    dout: Tensor
    dtotal: Tensor | None
    parameter_dtype: torch.dtype


def _row_tensors(cell: Cell) -> Rows:
    name, _, parameters = cell.dtype.partition("+")
    dtype = getattr(torch, name)

    def tensor() -> Tensor:
        if cell.shape == QKV:  # q of a fused qkv: rows of 128 in place, at strides of the whole
            batch, length, heads, size = cell.shape
            return torch.randn(batch, length, 3, heads, size, dtype=dtype)[:, :, 0]
        return torch.randn(cell.shape, dtype=dtype)

    added = cell.norm.startswith("add_")
    x, residual = tensor(), tensor() if added else None
    dout = dtotal = torch.empty(0)
    if cell.direction != "forward":
        dout = torch.randn(cell.shape, dtype=dtype)
        dtotal = torch.randn(cell.shape, dtype=dtype) if added else dtotal
    return Rows(x, residual, dout, dtotal if added else None, getattr(torch, parameters or name))


def _rows(cell: Cell) -> dict[str, Call | None]:
    rows = _row_tensors(cell)
    name = cell.norm.removeprefix("add_")
    ours, theirs = (
        norms[name](cell.shape[-1], eps=EPS, dtype=rows.parameter_dtype) for norms in (OUR_NORMS, TORCH_NORMS)
    )
    calls: dict[str, Call | None] = {"kernel": _row_kernel(cell, rows, ours)}
    if cell.direction != "backward" and not cell.threads:
        calls |= _row_peers(cell, rows, ours, theirs)
    if cell.shape == LINE and cell.direction == "forward":
        calls["passes"] = _forward_passes(rows, list(ours.parameters()))
    if cell.shape == LINE and cell.direction == "backward":
        calls["passes"] = _backward_passes(rows, list(ours.parameters()))
    return calls | _copies(rows.x)


def _row_kernel(cell: Cell, rows: Rows, module: torch.nn.Module) -> Call | None:
    threads = torch.get_num_threads()
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    centered = bias is not None
    if cell.direction == "forward":
        return kernels.rows_forward(rows.x, rows.residual, weight, bias, centered, threads)
    if cell.direction == "backward":
        return kernels.rows_backward(rows.dout, rows.dtotal, rows.x, weight, centered, centered, threads)
    return None


def _row_peers(cell: Cell, rows: Rows, ours: torch.nn.Module, theirs: torch.nn.Module) -> dict[str, Call | None]:
    if rows.residual is None:
        inputs, douts = [rows.x], rows.dout
        our_function, their_function = ours, theirs
    else:
        inputs, douts = [rows.x, rows.residual], (rows.dout, rows.dtotal)
        our_function, their_function = _our_add(cell.norm, ours), _their_add(theirs)
    calls: dict[str, Call | None] = {
        "layer": _task(cell, our_function, inputs, ours, douts),
        "torch": _task(cell, their_function, inputs, theirs, douts),
        "compile": _task(cell, torch.compile(their_function, dynamic=False), inputs, theirs, douts),
    }
    if cell.direction == "forward" and onnx_peer.supported(cell.norm, rows.x, ours.weight):
        bias = getattr(theirs, "bias", None)
        calls["onnx"] = onnx_peer.forward(cell.norm, rows.x, rows.residual, theirs.weight, bias, EPS)
    if cell.direction == "forward+backward" and cell.shape in (ONE, SMALL, MIDDLE):
        calls |= _machinery(cell, inputs, theirs, douts)
    return calls


def _our_add(norm: str, module: torch.nn.Module) -> Function:
    shape = module.normalized_shape
    if norm == "add_layer_norm":
        return lambda x, residual: functional.add_layer_norm(x, residual, shape, module.weight, module.bias, EPS)
    return lambda x, residual: functional.add_rms_norm(x, residual, shape, module.weight, EPS)


def _their_add(module: torch.nn.Module) -> Function:
    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return module(total), total

    return add_norm


def _reads(*tensors: Tensor) -> list[Call]:
    """One sum each; half types two elements at a time as a float32, so that memory is what takes the time."""
    flat = [values.detach().view(-1) for values in tensors]
    views = [values.view(torch.float32) if values.itemsize == 2 else values for values in flat]
    totals = [torch.empty((), dtype=view.dtype) for view in views]
    return [partial(torch.sum, view, dim=0, out=total) for view, total in zip(views, totals, strict=True)]


def _in_turn(calls: Sequence[Call]) -> Call:
    def call() -> None:
        for one in calls:
            one()

    return call


def _forward_passes(rows: Rows, parameters: Sequence[Tensor]) -> Call:
    """The memory that a forward of one row beyond the cache must pass over, by torch's own kernels and without a norm.

    x is read for its statistics (with a residual, the total is written); then it is read again beside gain and bias,
    and the result is written.
    """
    out, total = torch.empty_like(rows.x), torch.empty_like(rows.x)
    if rows.residual is None:
        statistics, total = _reads(rows.x), rows.x
    else:
        statistics = [partial(torch.add, rows.x, rows.residual, out=total)]
    return _in_turn([*statistics, *_reads(*parameters), partial(out.copy_, total)])


def _backward_passes(rows: Rows, parameters: Sequence[Tensor]) -> Call:
    """The same for backward: dout, the total and the gain are read and the parameters' gradients written; then all
    three are read again, with a residual dtotal too, and dx is written.
    """
    dtype = kernels.accumulation(rows.x.dtype)  # as the kernel writes them
    gradients = [torch.empty(parameter.shape, dtype=dtype) for parameter in parameters]
    dx = torch.empty_like(rows.x)
    once = [*_reads(rows.dout, rows.x, parameters[0]), *(gradient.zero_ for gradient in gradients)]
    again = _reads(rows.dout, parameters[0], *([] if rows.dtotal is None else [rows.dtotal]))
    return _in_turn([*once, *again, partial(dx.copy_, rows.x)])


def _machinery(cell: Cell, inputs: Sequence[Tensor], module: torch.nn.Module, douts: object) -> dict[str, Call]:
    """Forward and backward of Python autograd functions that compute nothing: the machinery's own time.

    `empty_function` returns what lies ready; `saving_function` saves x, the weight and the statistics and allocates all
    results, as our layer does, but out of torch's memory.
    """
    parameters = list(module.parameters())
    outs = tuple(torch.empty_like(values) for values in inputs)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    if cell.family == "channels":
        statistics = [torch.zeros(cell.shape[1], dtype=torch.float64) for _ in range(2)]
    else:
        statistics = [torch.zeros(cell.shape[:-1]) for _ in range(len(parameters))]  # with a bias, mean and rstd

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, *given: Tensor) -> tuple[Tensor, ...]:
            return outs

        @staticmethod
        def backward(ctx: object, *douts: Tensor) -> tuple[Tensor, ...]:
            return *douts, *gradients

    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
            ctx.save_for_backward(given[0], parameters[0], *map(torch.empty_like, statistics))
            return tuple(map(torch.empty_like, outs))

        @staticmethod
        def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor, ...]:
            assert len(ctx.saved_tensors) == 2 + len(statistics)
            dx = torch.empty_like(inputs[0])
            return *(dx for _ in inputs), *map(torch.empty_like, gradients)

    def task(function: type[torch.autograd.Function]) -> Call:
        apply = super(torch.autograd.Function, function).apply  # as autograd.py: without what torch.func needs

        def call(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
            made: tuple[Tensor, ...] = apply(*leaves, *parameters)
            return made if len(made) > 1 else made[0]

        return _task(cell, call, inputs, module, douts)

    return {"empty_function": task(Empty), "saving_function": task(Saving)}


# ------------------------------------------------------------------------------------------ channels


def _channels(cell: Cell) -> dict[str, Call | None]:
    dtype = getattr(torch, cell.dtype)
    memory_format = torch.channels_last if cell.layout == "channels_last" else torch.contiguous_format
    x, dout = (torch.randn(cell.shape, dtype=dtype).to(memory_format=memory_format) for _ in range(2))
    ours, theirs = (
        getattr(module, BATCH_NORMS[x.dim()])(cell.shape[1], eps=EPS, dtype=dtype).train(cell.mode == "train")
        for module in (normkit, torch.nn)
    )
    weight, bias = ours.weight.detach(), ours.bias.detach()
    threads = torch.get_num_threads()
    calls: dict[str, Call | None] = {}
    if cell.direction == "forward":
        calls["kernel"] = kernels.channels_forward(x, weight, bias, cell.mode == "train", threads)
    if cell.direction == "backward":
        calls["kernel"] = kernels.channels_backward(dout, x, weight, threads)
    else:
        calls["layer"] = _task(cell, ours, [x], ours, dout)
        calls["torch"] = _task(cell, theirs, [x], theirs, dout)
        calls["compile"] = _task(cell, torch.compile(theirs, dynamic=False), [x], theirs, dout)
        if cell.direction == "forward+backward":
            calls |= _machinery(cell, [x], theirs, dout)
    return calls | _copies(x)
