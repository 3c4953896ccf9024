"""Transforms, tracers, modes and subclasses take the composite formulas: no kernel runs, values are eager's.

Each test runs the table of interop_calls.py through one of them, in float64, and compares values and
gradients with torch's own functions to 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import normkit
import normkit.functional as NF
from interop_calls import CALLS, Call, D, gradients, inputs, record_primitives, scalar

# torch's own: jvp calls torch.jit.script on first use, and torch.jit.trace is what one test is about
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
every_call = pytest.mark.parametrize("call", CALLS, ids=str)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-12)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled core's primitives, as they are called."""
    return record_primitives(monkeypatch.setattr)


@every_call
def test_eager_asks_the_compiled_core_once_for_each_primitive(call: Call, kernels: list[str]) -> None:
    arguments = inputs(call)
    outputs = call.ours(*arguments)
    assert kernels == list(call.forward)
    found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
    assert kernels == [*call.forward, *call.backward]
    close(outputs, call.torchs(*arguments))
    close(found, gradients(call.torchs, arguments))


# ------------------------------------------------------------------------------------------- torch.func


def mapped_dims(call: Call) -> tuple[int | None, ...]:
    return tuple(0 if len(shape) > 1 else None for shape in call.shapes)


@every_call
def test_vmap_over_the_data_takes_the_composite(call: Call, kernels: list[str]) -> None:
    samples = [inputs(call, grad=False) for _ in range(3)]
    for index, sample in enumerate(samples):
        sample[0] += index
    stacked = [
        torch.stack(given) if dim == 0 else given[0]
        for given, dim in zip(zip(*samples, strict=True), mapped_dims(call), strict=True)
    ]
    outputs = torch.func.vmap(call.ours, in_dims=mapped_dims(call))(*stacked)
    assert kernels == []
    expected = zip(
        *(
            call.ours(
                *(s if d == 0 else stacked[i] for i, (s, d) in enumerate(zip(sample, mapped_dims(call), strict=True)))
            )
            for sample in samples
        ),
        strict=True,
    )
    close(outputs, [torch.stack(parts) for parts in expected])


@every_call
def test_per_sample_gradients_take_the_composite(call: Call, kernels: list[str]) -> None:
    """vmap over grad: the usual way to per-sample gradients. Each sample is a batch of its own for batch_norm."""
    arguments = inputs(call, grad=False)
    dims = tuple(0 if len(shape) > 1 else None for shape in call.shapes)
    stacked = [torch.stack([a, a * 2.0]) if dim == 0 else a for a, dim in zip(arguments, dims, strict=True)]
    wanted = tuple(range(call.differentiable))

    def loss(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
        return torch.func.vmap(torch.func.grad(lambda *args: scalar(function(*args)), argnums=wanted), in_dims=dims)

    found = loss(call.ours)(*stacked)
    assert kernels == []
    for sample in range(2):
        leaves = [
            (a[sample] if dim == 0 else a).clone().requires_grad_(i < call.differentiable)
            for i, (a, dim) in enumerate(zip(stacked, dims, strict=True))
        ]
        close([f[sample] for f in found], gradients(call.torchs, leaves))


@every_call
def test_func_grad_takes_the_composite(call: Call, kernels: list[str]) -> None:
    arguments = inputs(call, grad=False)
    wanted = tuple(range(call.differentiable))
    found = torch.func.grad(lambda *args: scalar(call.ours(*args)), argnums=wanted)(*arguments)
    assert kernels == []
    close(found, gradients(call.torchs, inputs(call)))


@every_call
def test_func_jvp_takes_the_composite_and_agrees_with_a_finite_difference(call: Call, kernels: list[str]) -> None:
    arguments = tuple(inputs(call, grad=False))
    tangents = tuple(
        torch.ones_like(a) if i < call.differentiable else torch.zeros_like(a) for i, a in enumerate(arguments)
    )
    tangents = tuple(t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in tangents)
    outputs, derivative = torch.func.jvp(lambda *args: tuple(call.ours(*args)), arguments, tangents)
    assert kernels == []
    close(outputs, call.torchs(*arguments))
    step = 1e-6
    ahead = call.torchs(*(a + step * t for a, t in zip(arguments, tangents, strict=True)))
    behind = call.torchs(*(a - step * t for a, t in zip(arguments, tangents, strict=True)))
    difference = [(p - m) / (2 * step) for p, m in zip(ahead, behind, strict=True)]
    torch.testing.assert_close(tuple(derivative), tuple(difference), rtol=1e-7, atol=1e-7)


@every_call
def test_dual_numbers_keep_their_tangents(call: Call, kernels: list[str]) -> None:
    """A kernel would lose the tangent without a word: forward_ad duals are plain Tensor objects."""
    arguments = inputs(call, grad=False)
    tangent = torch.linspace(-1, 1, arguments[0].numel(), dtype=torch.float64).view(arguments[0].shape)
    with forward_ad.dual_level():
        assert (
            str(normkit.reasons(arguments[0])[0]) == "cpu (not chosen): a forward-mode differentiation level is active"
        )
        dual = forward_ad.make_dual(arguments[0], tangent)
        found = [forward_ad.unpack_dual(out).tangent for out in call.ours(dual, *arguments[1:])]
    assert kernels == []
    zeros = tuple(torch.zeros_like(a) for a in arguments[1:])
    close(found, torch.func.jvp(lambda *args: tuple(call.ours(*args)), tuple(arguments), (tangent, *zeros))[1])
    assert all(tangent is not None for tangent in found)


@every_call
def test_hessian_vector_products_equal_torchs(call: Call, kernels: list[str]) -> None:
    """Forward over reverse, the cheapest way to curvature."""
    arguments = tuple(inputs(call, grad=False))

    def product(function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return scalar(function(x, *arguments[1:]))

        found: Tensor = torch.func.jvp(torch.func.grad(loss), (arguments[0],), (torch.ones_like(arguments[0]),))[1]
        return found

    ours = product(call.ours)
    assert kernels == []
    leaf = arguments[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(call.torchs(leaf, *arguments[1:])), leaf, create_graph=True)
    close([ours], torch.autograd.grad(first.sum(), leaf))


# --------------------------------------------------------------------------------------------- autograd


@every_call
def test_double_backward_takes_the_composite_for_the_backward_that_is_differentiated(
    call: Call, kernels: list[str]
) -> None:
    def second(function: Callable[..., tuple[Tensor, ...]], watched: list[str]) -> tuple[Tensor, ...]:
        arguments = inputs(call)
        leaves = arguments[: call.differentiable]
        first = torch.autograd.grad(scalar(function(*arguments)), leaves, create_graph=True)
        assert watched == list(call.forward)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    found = second(call.ours, kernels)
    assert kernels == [*call.forward, *call.backward]  # the last backward is not differentiated: a kernel again
    close(found, second(call.torchs, list(call.forward)))


@every_call
def test_batched_gradients_take_the_composite_backward(call: Call, kernels: list[str]) -> None:
    def jacobian_rows(function: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        arguments = inputs(call)
        out = function(*arguments)[0]
        probes = torch.stack(
            [torch.cos(torch.arange(out.numel(), dtype=out.dtype) * k).view(out.shape) for k in (1, 2, 3)]
        )
        return torch.autograd.grad(
            out, arguments[: call.differentiable], probes, is_grads_batched=True, materialize_grads=True
        )

    found = jacobian_rows(call.ours)
    assert kernels == list(call.forward)
    close(found, jacobian_rows(call.torchs))


@every_call
def test_vectorized_hessian_equals_torchs(call: Call) -> None:
    """Double backward under vmap: both exceptions at once. torch's own group_norm has no vectorized one."""
    arguments = inputs(call, grad=False)

    def hessian(function: Callable[..., tuple[Tensor, ...]], vectorize: bool) -> Tensor:
        found: Tensor = torch.autograd.functional.hessian(
            lambda x: scalar(function(x, *arguments[1:])), arguments[0], vectorize=vectorize
        )
        return found

    close([hessian(call.ours, True)], [hessian(call.torchs, False)])


# ---------------------------------------------------------------------------------- tracers and modes


class Recorder(TorchDispatchMode):
    """The names of the aten operations that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every_call
def test_a_dispatch_mode_sees_every_operation(call: Call, kernels: list[str]) -> None:
    arguments = inputs(call)
    with Recorder() as recorder:
        outputs = call.ours(*arguments)
        found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
    assert kernels == []
    assert "aten.rsqrt.default" in recorder.seen
    close(outputs, call.torchs(*arguments))
    close(found, gradients(call.torchs, arguments))


@every_call
def test_a_mode_around_backward_alone_takes_the_composite_backward(call: Call, kernels: list[str]) -> None:
    arguments = inputs(call)
    loss = scalar(call.ours(*arguments))
    with Recorder():
        found = torch.autograd.grad(loss, arguments[: call.differentiable])
    assert kernels == list(call.forward)
    close(found, gradients(call.torchs, arguments))


def test_the_flop_counter_counts_a_block_with_norms(kernels: list[str]) -> None:
    block = torch.nn.Sequential(normkit.LayerNorm(D), torch.nn.Linear(D, D), normkit.RMSNorm(D))
    with FlopCounterMode(display=False) as counter:
        block(torch.ones(4, D)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * D * D  # the product, and two in its backward
    assert kernels == []


@every_call
def test_make_fx_records_aten_operations_only(call: Call, kernels: list[str]) -> None:
    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_(i < call.differentiable) for i, a in enumerate(arguments)]
        outputs = call.ours(*leaves)
        return *outputs, *torch.autograd.grad(scalar(outputs), leaves[: call.differentiable])

    arguments = inputs(call, grad=False)
    graph = make_fx(step)(*arguments)
    assert kernels == []
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in targets), targets
    others = [a + 0.25 for a in arguments]
    leaves = [a.requires_grad_(i < call.differentiable) for i, a in enumerate(others)]
    close(graph(*others), (*call.torchs(*leaves), *gradients(call.torchs, leaves)))


@every_call
def test_symbolic_make_fx_serves_another_batch_size(call: Call) -> None:
    graph = make_fx(call.ours, tracing_mode="symbolic")(*inputs(call, grad=False))
    arguments = inputs(call, rows=9, grad=False)
    close(graph(*arguments), call.torchs(*arguments))


@every_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_get_shapes_and_dtypes_without_memory(call: Call, dtype: torch.dtype, kernels: list[str]) -> None:
    real = call.torchs(*inputs(call, dtype=dtype))
    with FakeTensorMode() as mode:
        arguments = [mode.from_tensor(a) for a in inputs(call, dtype=dtype)]
    # in the mode and outside of it: a fake tensor may be met anywhere
    for active in (True, False):
        kernels.clear()
        if active:
            with mode:
                outputs = call.ours(*arguments)
                found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
        else:
            outputs = call.ours(*arguments)
            found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
        assert kernels == []
        assert [(o.shape, o.dtype) for o in outputs] == [(o.shape, o.dtype) for o in real]
        assert [(g.shape, g.dtype) for g in found] == [(a.shape, dtype) for a in arguments[: call.differentiable]]


@every_call
def test_meta_tensors_get_shapes_without_memory(call: Call, kernels: list[str]) -> None:
    arguments = [a.detach().to("meta").requires_grad_(a.requires_grad) for a in inputs(call)]
    outputs = call.ours(*arguments)
    found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
    assert kernels == []
    assert [o.shape for o in outputs] == [o.shape for o in call.torchs(*arguments)]
    assert [g.shape for g in found] == [a.shape for a in arguments[: call.differentiable]]


@every_call
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # our checks of shapes read sizes
def test_jit_trace_records_the_formulas(call: Call, kernels: list[str]) -> None:
    def ours(*args: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.ours(*args))

    traced = torch.jit.trace(ours, tuple(inputs(call, grad=False)), check_trace=False)
    assert kernels == []
    others = [a + 0.25 for a in inputs(call, grad=False, rows=4 if call.name == "batch_norm-train" else 9)]
    close(traced(*others), call.torchs(*others))


@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_trains_its_running_statistics_under_vmap(training: bool) -> None:
    """torch.func.stack_module_state with batched buffers: counters and averages of each member advance."""

    def run(make: Callable[[int], torch.nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
        members = [make(4).double().train(training) for _ in range(2)]
        parameters, buffers = torch.func.stack_module_state(members)

        def one(p: Any, b: Any, x: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(members[0], (p, b), (x,))
            return out

        x = torch.linspace(-1.0, 3.0, 40, dtype=torch.float64).sin().view(2, 5, 4)
        return torch.func.vmap(one)(parameters, buffers, x), buffers

    found, found_state = run(normkit.BatchNorm1d)
    expected, expected_state = run(torch.nn.BatchNorm1d)
    close([found, *found_state.values()], [expected, *expected_state.values()])


def test_fx_records_row_norms_as_one_call() -> None:
    """torch.nn's own layers are leaves for torch.fx; ours are recorded as a call of the public function."""
    model = torch.nn.Sequential(normkit.LayerNorm(D), normkit.RMSNorm(D, eps=1e-6))
    traced = torch.fx.symbolic_trace(model)
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert functions == [NF.layer_norm, NF.rms_norm]
    x = torch.randn(3, D)
    close([traced(x)], [model(x)])
