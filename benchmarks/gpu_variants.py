"""The calls that are compared in a cell of the GPU benchmark: ours, torch's, torch.compile's, Liger's, a copy.

Here: `Inputs` of a cell, `variants`, `reference`, `errors`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_cells import Cell
from torch import Tensor

import normkit
import normkit.functional as NF

EPS = 1e-5
Norm = Callable[..., Any]  # of the inputs of a cell: out, or out and total


class Inputs:
    """Of a cell, as many times as it takes to find none of them in the cache, and gradients of its results."""

    def __init__(self, cell: Cell, device: str, cache_bytes: int) -> None:
        dtype = getattr(torch, cell.dtype)
        size = cell.shape[1] if cell.norm == "batch_norm" else cell.shape[-1]
        width = torch.float32 if cell.norm == "batch_norm" else getattr(torch, cell.gamma or cell.dtype)
        layout = torch.channels_last if cell.layout == "channels-last" else torch.contiguous_format
        times = min(8, 1 + -(-2 * cache_bytes // cell.x_bytes)) if cell.kind == "large" else 1

        def tensor() -> Tensor:
            x = torch.randn(cell.shape, device=device, dtype=torch.float32).to(dtype)
            return x.contiguous(memory_format=layout)

        grad = cell.task != "forward"
        self.x = [tensor().requires_grad_(grad) for _ in range(times)]
        self.residual = [tensor().requires_grad_(grad) for _ in range(times)] if cell.added else None
        self.dout = [tensor() for _ in range(times)] if grad else None
        self.dtotal = [tensor() for _ in range(times)] if grad and cell.added else None

        def parameter() -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(size, device=device, dtype=width), requires_grad=grad)

        self.weight = parameter()
        self.bias = parameter() if cell.norm.endswith("layer_norm") or cell.norm == "batch_norm" else None
        self.running = (torch.zeros(size, device=device), torch.ones(size, device=device))

    def of(self, i: int) -> tuple[Tensor, ...]:
        """x, residual where there is one, weight, bias where there is one."""
        i %= len(self.x)
        residual = () if self.residual is None else (self.residual[i],)
        return (self.x[i], *residual, self.weight, *(() if self.bias is None else (self.bias,)))

    def gradients(self, i: int) -> tuple[Tensor, ...]:
        assert self.dout is not None
        i %= len(self.x)
        return (self.dout[i],) if self.dtotal is None else (self.dout[i], self.dtotal[i])


def ours(cell: Cell, inputs: Inputs) -> Norm:
    size = cell.shape[-1:]
    if cell.norm == "batch_norm":
        if cell.kind != "large":
            layer = (normkit.BatchNorm1d if len(cell.shape) < 4 else normkit.BatchNorm2d)(cell.shape[1])
            return _layer(layer, inputs)
        return lambda x, weight, bias: NF.batch_norm(x, *inputs.running, weight, bias, True, 0.1, EPS)
    return {
        "layer_norm": lambda x, weight, bias: NF.layer_norm(x, size, weight, bias, EPS),
        "rms_norm": lambda x, weight: NF.rms_norm(x, size, weight, EPS),
        "add_layer_norm": lambda x, residual, weight, bias: NF.add_layer_norm(x, residual, size, weight, bias, EPS),
        "add_rms_norm": lambda x, residual, weight: NF.add_rms_norm(x, residual, size, weight, EPS),
    }[cell.norm]


def _layer(layer: Any, inputs: Inputs) -> Norm:
    """The layer with the cell's parameters, on their device."""
    layer = layer.to(inputs.weight.device)
    layer.weight, layer.bias = inputs.weight, inputs.bias
    return lambda x, weight, bias: layer(x)


def torchs(cell: Cell, inputs: Inputs) -> Norm:
    F, size = torch.nn.functional, cell.shape[-1:]
    if cell.norm == "batch_norm":
        if cell.kind != "large":
            layer = (torch.nn.BatchNorm1d if len(cell.shape) < 4 else torch.nn.BatchNorm2d)(cell.shape[1])
            return _layer(layer, inputs)
        return lambda x, weight, bias: F.batch_norm(x, *inputs.running, weight, bias, True, 0.1, EPS)

    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, size, weight, bias, EPS), total

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, size, weight, EPS), total

    return {
        "layer_norm": lambda x, weight, bias: F.layer_norm(x, size, weight, bias, EPS),
        "rms_norm": lambda x, weight: F.rms_norm(x, size, weight, EPS),
        "add_layer_norm": add_layer_norm,
        "add_rms_norm": add_rms_norm,
    }[cell.norm]


def ligers(cell: Cell) -> Norm | None:
    """Liger's kernel for the cell; None where it has none."""
    if cell.norm == "layer_norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)
    if cell.norm == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # not in place: backward would overwrite the gradient that the next call needs
        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False, None)
    if cell.norm == "add_rms_norm":
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, EPS, 0.0, "llama", False
        )
    return None


def task(cell: Cell, norm: Norm, inputs: Inputs) -> Callable[[int], Any]:
    """call(i) on the i-th inputs."""
    if cell.task == "forward":
        return lambda i: norm(*inputs.of(i))
    if cell.task == "forward+backward":
        return lambda i: torch.autograd.grad(norm(*inputs.of(i)), inputs.of(i), inputs.gradients(i))
    results = [norm(*inputs.of(i)) for i in range(len(inputs.x))]
    return lambda i: torch.autograd.grad(
        results[i % len(results)], inputs.of(i), inputs.gradients(i), retain_graph=True
    )


def makers(cell: Cell, inputs: Inputs, compiled: bool) -> dict[str, Callable[[], Norm | None]]:
    found: dict[str, Callable[[], Norm | None]] = {
        "normkit": partial(ours, cell, inputs),
        "torch": partial(torchs, cell, inputs),
    }
    if cell.kind == "large" and cell.norm != "batch_norm":
        found["liger"] = partial(ligers, cell)
    if cell.compiles() and compiled:
        found["compile"] = lambda: torch.compile(torchs(cell, inputs), dynamic=False)
    return found


def variants(
    cell: Cell, inputs: Inputs, compiled: bool = True
) -> tuple[dict[str, Callable[[int], Any]], dict[str, str], dict[str, float]]:
    """The calls by name, why others are absent, and the seconds until each had its first result."""
    # all sizes share the code of one function, which torch.compile gives up on after eight of them
    torch.compiler.reset()
    calls, absent, first_s = {}, {}, {}
    for name, make in makers(cell, inputs, compiled).items():
        begin = time.perf_counter()
        try:
            norm = make()
            if norm is None:
                absent[name] = "has no such kernel"
                continue
            call = task(cell, norm, inputs)
            call(0)
            if inputs.x[0].is_cuda:
                torch.cuda.synchronize()
        except Exception as error:  # one that cannot do a cell is no reason to lose the others
            absent[name] = reason(error)
        else:
            calls[name], first_s[name] = call, time.perf_counter() - begin
    return calls, absent, first_s


def reason(error: Exception) -> str:
    """The exception and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def reference(cell: Cell, inputs: Inputs) -> list[Tensor]:
    """In float64, what the first call returns: rows from the first on, all of a BatchNorm and of parameters' gradients.

    A total is taken as it is stored, rounded to its dtype: the norm is of that.
    """
    F, rows = torch.nn.functional, slice(0, sampled_rows(cell))
    exact = [value.detach().double() for value in inputs.of(0)]
    if cell.norm == "batch_norm":
        leaves = [value.requires_grad_() for value in exact]
        out = F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.1, EPS)
        if cell.task == "forward":
            return [out.detach()]
        return list(torch.autograd.grad(out, leaves, inputs.gradients(0)[0].double()))
    parameters = exact[2 if cell.added else 1 :]
    stored = inputs.of(0)[0].detach()
    if cell.added:
        stored = stored + inputs.of(0)[1].detach()
    total = stored[rows].double().requires_grad_()
    results = [_normalized(cell, total, parameters), *([total * 1.0] if cell.added else [])]
    if cell.task == "forward":
        return [result.detach() for result in results]
    dout = inputs.gradients(0)[0].double()
    (dx,) = torch.autograd.grad(results, total, [gradient[rows].double() for gradient in inputs.gradients(0)])
    dweight = (dout * _normalized(cell, stored.double(), [])).sum(0)
    dbias = [] if inputs.bias is None else [dout.sum(0)]
    return [dx] * (2 if cell.added else 1) + [dweight, *dbias]


def _normalized(cell: Cell, total: Tensor, parameters: list[Tensor]) -> Tensor:
    F, size = torch.nn.functional, cell.shape[-1:]
    if "layer" in cell.norm:
        return F.layer_norm(total, size, *parameters, eps=EPS)
    return F.rms_norm(total, size, *parameters, eps=EPS)


def sampled_rows(cell: Cell) -> int:
    return max(1, min(cell.shape[0], 2**20 // cell.shape[-1]))


def errors(result: Any, exact: list[Tensor]) -> tuple[float, float]:
    """The largest error of what has x's shape and that of parameters' gradients, inf where anything is not finite.

    In units of 1 + |exact|; of a parameter's gradient, a sum over all rows, in units of its largest element.
    """
    worst = [0.0, 0.0]
    for found, wanted in zip(flat(result), exact, strict=True):
        found = found.detach().double()
        is_sum = wanted.dim() == 1
        unit = wanted.abs().max() if is_sum else 1 + wanted.abs()
        off = float(((found[: wanted.shape[0]] - wanted).abs() / unit).max())
        worst[is_sum] = max(worst[is_sum], off if bool(torch.isfinite(found).all()) else float("inf"))
    return worst[0], worst[1]
