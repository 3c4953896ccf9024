"""torch.compile and torch.export trace our functions and layers whole: values, gradients and running statistics agree.

"aot_eager" runs the traced forward and backward without generating code, in a second each; "inductor" builds one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import normkit
import normkit.functional as NF
from interop_calls import CALLS, C, Call, D, gradients, inputs, scalar

every_call = pytest.mark.parametrize("call", CALLS, ids=str)

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: normkit.LayerNorm(D), lambda: nn.LayerNorm(D), (D,)),
    "LayerNorm-2d": (lambda: normkit.LayerNorm((4, D), bias=False), lambda: nn.LayerNorm((4, D), bias=False), (4, D)),
    "RMSNorm": (lambda: normkit.RMSNorm(D, eps=1e-6), lambda: nn.RMSNorm(D, eps=1e-6), (3, D)),
    "BatchNorm1d": (lambda: normkit.BatchNorm1d(C), lambda: nn.BatchNorm1d(C), (C,)),
    "BatchNorm2d": (lambda: normkit.BatchNorm2d(C, decay=0.99), lambda: nn.BatchNorm2d(C, momentum=0.01), (C, 4, 4)),
    "BatchNorm3d": (
        lambda: normkit.BatchNorm3d(C, track_running_stats=False, affine=False),
        lambda: nn.BatchNorm3d(C, track_running_stats=False, affine=False),
        (C, 2, 3, 4),
    ),
}
every_layer = pytest.mark.parametrize(("ours", "torchs", "shape"), LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=tolerance, atol=tolerance)


def data(shape: tuple[int, ...], batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn((batch, *shape), generator=generator, dtype=torch.float64).mul(2.0).add(1.0).to(dtype)


def same_state(ours: nn.Module, torchs: nn.Module) -> None:
    found, expected = ours.state_dict(), torchs.state_dict()
    assert list(found) == list(expected)
    close(found.values(), expected.values())


# ------------------------------------------------------------------------------------------------ compile


@every_call
def test_compiled_functions_are_one_graph_for_every_batch_size(call: Call) -> None:
    compiled = torch.compile(call.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for turn, rows in enumerate((6, 9, 13)):
        arguments = inputs(call, rows=rows)
        with torch.compiler.set_stance("default" if turn == 0 else "fail_on_recompile"):
            outputs = compiled(*arguments)
            found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
        assert type(outputs) is type(call.ours(*arguments))
        close(outputs, call.torchs(*arguments))
        close(found, gradients(call.torchs, arguments))


@every_call
def test_a_compiled_call_has_no_graph_break_and_no_kernel_in_it(call: Call) -> None:
    explained = torch._dynamo.explain(call.ours)(*inputs(call))
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1
    names = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
    assert not [name for name in names if "autograd_function" in name or "normkit" in name]
    assert any("rsqrt" in name for name in names)


def test_a_choice_of_backend_does_not_break_a_compiled_graph() -> None:
    """Tracing is use_backend's named exception, whichever side of the call the context stands on."""
    x, weight = inputs(CALLS[1])
    compiled = torch.compile(lambda x, w: NF.rms_norm(x, D, w, 1e-6), fullgraph=True, backend="aot_eager")
    with normkit.use_backend("cpu"):
        close([compiled(x, weight)], [NF.rms_norm(x, D, weight, 1e-6)])


@every_layer
def test_compiled_training_updates_parameters_and_running_statistics_as_torch_does(
    ours: Callable[[], nn.Module], torchs: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Three steps and an eval, at two batch sizes, beside torch's own layer in eager."""
    layer, expected = ours().double(), torchs().double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (6, 6, 9):
        for model, module in ((compiled, layer), (expected, expected)):
            (model(data(shape, batch).requires_grad_()).sin() * 3.0).mean().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
            module.zero_grad()
        same_state(layer, expected)
    layer.eval()
    expected.eval()
    x = data(shape, 6).requires_grad_()
    close([compiled(x)], [expected(x)])
    close(torch.autograd.grad(compiled(x).sin().sum(), x), torch.autograd.grad(expected(x).sin().sum(), x))
    same_state(layer, expected)


class Block(nn.Module):
    """Two sublayers of a transformer with normkit's residual stack, as the study builds them."""

    def __init__(self, placement: normkit.Placement, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        sublayers = [
            normkit.Residual(nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)), placement, norm)
            for _ in range(2)
        ]
        self.stack = normkit.ResidualStack(sublayers, norm() if placement.needs_final_norm else None)
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stack(x))
        return out


@pytest.mark.parametrize(
    ("placement", "norm"),
    [(normkit.PreNorm, lambda: normkit.RMSNorm(D, eps=1e-6)), (normkit.PostNorm, lambda: normkit.LayerNorm(D))],
    ids=["pre-RMSNorm", "post-LayerNorm"],
)
def test_a_residual_stack_compiles_whole_with_fused_adds(
    placement: normkit.Placement, norm: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    eager = Block(placement, norm).double()
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for turn, (batch, steps) in enumerate(((2, 7), (3, 5))):
        x = data((steps, D), batch)
        with torch.compiler.set_stance("default" if turn == 0 else "fail_on_recompile"):
            out = compiled(x)
            out.sin().sum().backward()
        expected = eager(x)
        expected.sin().sum().backward()
        close([out], [expected], 1e-11)
        close([p.grad for p in block.parameters()], [p.grad for p in eager.parameters()], 1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # torch's own, when inductor is first loaded
def test_inductor_builds_a_block_with_every_norm_that_trains_as_eager_does() -> None:
    """Generated code in float32: the three families in one graph, forward, backward and buffers."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            normkit.LayerNorm(D), nn.Linear(D, D), normkit.BatchNorm1d(D), nn.Linear(D, D), normkit.RMSNorm(D, eps=1e-6)
        )

    eager, built = model(), model()
    compiled = torch.compile(built, fullgraph=True)
    for batch in (8, 8):
        x = data((D,), batch, torch.float32)
        for module in (eager, compiled):
            module.zero_grad()
            module(x).sin().sum().backward()
    close(built.state_dict().values(), eager.state_dict().values(), 1e-5)
    close([p.grad for p in built.parameters()], [p.grad for p in eager.parameters()], 1e-4)


@every_call
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's tracer
def test_compiled_autograd_traces_the_backward_of_an_eager_forward(call: Call) -> None:
    """It runs our autograd functions' backward under a tracer, after a kernel's forward."""
    arguments = inputs(call)
    loss = scalar(call.ours(*arguments))
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    close([a.grad for a in arguments if a.grad is not None], gradients(call.torchs, inputs(call)))


def test_compiled_half_precision_keeps_the_dtypes_of_eager() -> None:
    for call in CALLS:
        arguments = inputs(call, dtype=torch.bfloat16)
        outputs = torch.compile(call.ours, fullgraph=True, backend="aot_eager")(*arguments)
        found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
        assert {t.dtype for t in (*outputs, *found)} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------- export


@every_layer
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_exported_layers_run_at_another_batch_size(
    ours: Callable[[], nn.Module], torchs: Callable[[], nn.Module], shape: tuple[int, ...], mode: str
) -> None:
    layer, expected = ours().double().train(mode == "train"), torchs().double().train(mode == "train")
    program = torch.export.export(layer, (data(shape, 6),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in", "sym_", "<function")) for target in targets), targets
    module = program.module()
    for batch in (6, 11):
        x = data(shape, batch)
        close([module(x)], [expected(x)])
    state = expected.state_dict()
    assert set(module.state_dict()) == set(state)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-12, atol=1e-12)


def test_an_exported_stack_equals_eager() -> None:
    torch.manual_seed(0)
    block = Block(normkit.PreNorm, lambda: normkit.RMSNorm(D, eps=1e-6)).double().eval()
    x = data((7, D), 2)
    close([torch.export.export(block, (x,)).module()(x)], [block(x)], 1e-11)
