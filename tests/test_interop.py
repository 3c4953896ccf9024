"""Inside autograd's machinery: autocast, checkpoints, hooks, grad modes, what is kept for backward, profiler labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
import normkit.functional as NF
from interop_calls import CALLS, C, Call, D, gradients, inputs, scalar

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
row_calls = pytest.mark.parametrize("call", CALLS[:4], ids=str)


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=tolerance, atol=tolerance)


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    close(actual, expected, 0.0)


# ----------------------------------------------------------------------------------------------- autocast

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _with_dtypes(call: Call, data: torch.dtype, parameters: torch.dtype) -> list[Tensor]:
    return [a.detach().to(data if a.dim() > 1 else parameters) for a in inputs(call)]


@every_call
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's rms_norm
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradient_dtypes_are_torchs_under_autocast_and_with_mixed_dtypes(
    call: Call, autocast: torch.dtype | None
) -> None:
    """Where torch takes the combination: its table, for every dtype of data and parameters."""
    compared = 0
    for data, parameters in itertools.product(DTYPES, DTYPES):
        found: list[Any] = []
        for function in (call.torchs, call.ours):
            arguments = _with_dtypes(call, data, parameters)
            for argument in arguments[: call.differentiable]:
                argument.requires_grad_()
            try:
                with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                    outputs = function(*arguments)
                scalar([out.float() for out in outputs]).backward()
            except RuntimeError:
                if function is call.ours:
                    raise
                break
            grads = [a.grad.dtype for a in arguments if a.grad is not None]
            found.append(([out.dtype for out in outputs], grads))
        if len(found) == 2:
            assert found[0] == found[1], (data, parameters)
            compared += 1
    assert compared >= 6  # equal dtypes, and half data with float32 parameters


def test_autocast_around_a_block_gives_torchs_dtypes_and_values() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(D, D), normkit.LayerNorm(D), torch.nn.Linear(D, D), normkit.RMSNorm(D))
    torchs = torch.nn.Sequential(ours[0], torch.nn.LayerNorm(D), ours[2], torch.nn.RMSNorm(D))
    x = torch.randn(5, D)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x), torchs(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


# --------------------------------------------------------------------------------------- graphs and modes


@every_call
def test_any_subset_of_arguments_may_require_gradients(call: Call) -> None:
    everything = dict(enumerate(gradients(call.torchs, inputs(call))))
    for size in range(call.differentiable + 1):
        for subset in itertools.combinations(range(call.differentiable), size):
            arguments = inputs(call, grad=False)
            for index in subset:
                arguments[index].requires_grad_()
            outputs = call.ours(*arguments)
            assert [out.requires_grad for out in outputs] == [out.requires_grad for out in call.torchs(*arguments)], (
                subset
            )
            if subset:
                close(gradients(call.ours, arguments), [everything[index] for index in subset])


@row_calls
def test_unused_outputs_have_no_gradient_to_give(call: Call) -> None:
    """Of (out, total), either alone: a missing gradient is not a tensor of zeros."""
    for used in range(len(call.ours(*inputs(call)))):
        found, expected = (
            torch.autograd.grad(
                function(*arguments)[used].sin().sum(), arguments[: call.differentiable], allow_unused=True
            )
            for function, arguments in ((call.ours, inputs(call)), (call.torchs, inputs(call)))
        )
        assert [g is None for g in found] == [g is None for g in expected]
        close([g for g in found if g is not None], [g for g in expected if g is not None])


@every_call
def test_grad_modes_decide_what_is_recorded(call: Call) -> None:
    expected = [out.detach() for out in call.ours(*inputs(call))]
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)):
        with mode():
            outputs = call.ours(*inputs(call))
        assert not any(out.requires_grad for out in outputs)
        same_bits(outputs, expected)
    with torch.inference_mode():
        outputs = call.ours(*inputs(call, grad=False))
        assert all(out.is_inference() for out in outputs)
    with torch.no_grad(), torch.enable_grad():
        assert all(out.requires_grad for out in call.ours(*inputs(call)))


def test_training_in_inference_mode_updates_the_buffers() -> None:
    layer, expected = normkit.BatchNorm1d(C), torch.nn.BatchNorm1d(C)
    x = torch.randn(6, C)
    with torch.inference_mode():
        layer(x), expected(x)
    torch.testing.assert_close(dict(layer.state_dict()), dict(expected.state_dict()))
    layer(x).sum().backward()
    assert not layer.running_mean.requires_grad


@every_call
def test_backward_runs_again_and_accumulates(call: Call) -> None:
    arguments = inputs(call)
    loss = scalar(call.ours(*arguments))
    loss.backward(retain_graph=True)
    once = [a.grad.clone() for a in arguments[: call.differentiable] if a.grad is not None]
    loss.backward()
    same_bits([a.grad for a in arguments[: call.differentiable] if a.grad is not None], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_call
def test_the_incoming_gradient_is_not_overwritten(call: Call) -> None:
    arguments = inputs(call)
    outputs = call.ours(*arguments)
    incoming = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
    before = [g.clone() for g in incoming]
    torch.autograd.backward(outputs, incoming)
    same_bits(incoming, before)


def test_hooks_on_modules_tensors_and_nodes_see_the_gradients() -> None:
    layer = normkit.LayerNorm(D)
    seen: dict[str, tuple[int, ...]] = {}
    layer.register_forward_pre_hook(lambda module, args: seen.update(pre=args[0].shape))
    layer.register_forward_hook(lambda module, args, out: seen.update(forward=out.shape))
    layer.register_full_backward_pre_hook(lambda module, grads: seen.update(backward_pre=grads[0].shape))
    layer.register_full_backward_hook(lambda module, ins, outs: seen.update(backward=ins[0].shape))
    layer.weight.register_hook(lambda grad: seen.update(weight=grad.shape))
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.update(accumulated=parameter.grad.shape))
    x = torch.randn(5, D, requires_grad=True)
    out = layer(x)
    out.register_hook(lambda grad: grad * 2.0)
    out.sum().backward()
    rows = torch.Size((5, D))
    assert seen == {
        "pre": rows,
        "forward": rows,
        "backward_pre": rows,
        "backward": rows,
        "weight": torch.Size((D,)),
        "accumulated": torch.Size((D,)),
    }
    assert torch.equal(layer.bias.grad, torch.full((D,), 10.0))


def stack(placement: normkit.Placement) -> normkit.ResidualStack:
    torch.manual_seed(0)
    sublayers = [normkit.Residual(torch.nn.Linear(D, D), placement, lambda: normkit.RMSNorm(D)) for _ in range(2)]
    return normkit.ResidualStack(sublayers, normkit.RMSNorm(D) if placement.needs_final_norm else None)


@pytest.mark.parametrize("placement", [normkit.PreNorm, normkit.PostNorm], ids=lambda placement: placement.name)
@torch.no_grad()
def test_fused_adds_stand_back_for_hooks_and_for_a_forward_of_ones_own(placement: normkit.Placement) -> None:
    """Hooks of all modules (profilers), a replaced forward (offloading), and module.compile() are not bypassed."""
    model = stack(placement)
    norms = [module for module in model.modules() if isinstance(module, normkit.RMSNorm)]
    x = torch.randn(3, D)
    expected = model(x)
    seen: list[torch.nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        torch.testing.assert_close(model(x), expected)
    finally:
        handle.remove()
    assert [module for module in seen if module in norms] == norms
    seen.clear()
    for norm in norms:
        norm.forward = lambda x, norm=norm: seen.append(norm) or type(norm).forward(norm, x)
    torch.testing.assert_close(model(x), expected)
    assert seen == norms
    model = stack(placement)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for module in model.modules():
        if isinstance(module, normkit.RMSNorm):
            module.compile(backend=backend)
    torch.testing.assert_close(model(x), expected)
    assert graphs
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_anomaly_mode_names_our_node() -> None:
    with torch.autograd.detect_anomaly():
        out = NF.rms_norm(torch.ones(3, D, requires_grad=True), D, eps=1e-6)
        with pytest.raises(RuntimeError, match="'RowNormBackward' returned nan values"):
            out.backward(torch.full_like(out, float("inf")))


# ------------------------------------------------------------------------------------------------ profiler

LABELS = {
    "layer_norm": "normkit::layer_norm",
    "rms_norm": "normkit::rms_norm",
    "add_layer_norm": "normkit::add_layer_norm",
    "add_rms_norm": "normkit::add_rms_norm",
    "batch_norm-train": "normkit::batch_norm",
    "batch_norm-eval": "normkit::batch_norm",
    "group_norm": "normkit::group_norm",
    "instance_norm": "normkit::instance_norm",
}


def _autograd_profiler() -> Any:
    return torch.autograd.profiler.profile()


def _torch_profiler() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.mark.parametrize("make", [_autograd_profiler, _torch_profiler])
def test_profilers_show_a_label_for_every_call(make: Callable[[], Any]) -> None:
    with make() as profile:
        for call in CALLS:
            scalar(call.ours(*inputs(call))).backward()
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("normkit::")}
    assert counts == {label: list(LABELS.values()).count(label) for label in LABELS.values()}


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    made: list[str] = []
    real = torch.autograd.profiler.record_function

    def recording(name: str, *args: Any) -> Any:
        made.append(name)
        return real(name, *args)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", recording)
    return made


def test_labels_cost_nothing_while_no_profiler_runs(labelled: list[str]) -> None:
    for call in CALLS:
        scalar(call.ours(*inputs(call))).backward()
    assert labelled == []
    with _torch_profiler():
        NF.rms_norm(torch.ones(2, D), D)
    assert labelled == ["normkit::rms_norm"]
