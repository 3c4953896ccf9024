"""Who computes: reasons word for word, explicit choices that never fall back, and the choice that backward keeps."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
import normkit.functional as NF
from interop_calls import CALLS, PRIMITIVES, Call, D, gradients, inputs, scalar, watch_core
from normkit import backends, reference
from normkit.kernels import cpu, gpu

every_call = pytest.mark.parametrize("call", CALLS, ids=str)

NO_DEVICE = "torch finds no CUDA device"
TRITON_OFF = "triton (not chosen): torch finds no CUDA device"


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences here are those of a machine without a GPU."""
    monkeypatch.setattr(gpu, "unavailable", lambda: NO_DEVICE)


def texts(x: Tensor | None = None) -> list[str]:
    return [str(reason) for reason in normkit.reasons(x)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of each primitive that is asked for, in order."""
    called: list[str] = []

    def recording(primitive: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            called.append("reference")
            return primitive(*args, **kwargs)

        return recorded

    watch_core(monkeypatch.setattr, lambda primitive: called.append("cpu"))
    for primitive in PRIMITIVES:
        monkeypatch.setattr(reference, primitive, recording(getattr(reference, primitive)))
    return called


# ------------------------------------------------------------------------------------------------ reasons


def test_a_plain_tensor_is_for_the_compiled_core() -> None:
    expected = [
        "cpu (chosen): the compiled core takes plain CPU tensors",
        TRITON_OFF,
        "reference (not chosen): cpu comes first",
    ]
    assert texts() == expected
    for x in (torch.ones(2, 3), torch.nn.Parameter(torch.ones(3)), torch.ones(4, 6, dtype=torch.float16)[:, ::2]):
        assert texts(x) == expected
    assert [(r.name, r.chosen) for r in normkit.reasons()] == [("cpu", True), ("triton", False), ("reference", False)]


class Special(Tensor):
    pass


NOT_FOR_THE_CORE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (
        lambda: torch.ones(2, 3, device="meta"),
        "x is on meta, the compiled core takes CPU tensors",
    ),
    "complex": (
        lambda: torch.ones(2, 3, dtype=torch.complex64),
        "x has dtype torch.complex64, the compiled core takes float32, float64, bfloat16 and float16",
    ),
    "integer": (
        lambda: torch.ones(2, 3, dtype=torch.int64),
        "x has dtype torch.int64, the compiled core takes float32, float64, bfloat16 and float16",
    ),
    "float8": (
        lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
        "x has dtype torch.float8_e4m3fn, the compiled core takes float32, float64, bfloat16 and float16",
    ),
    "subclass": (
        lambda: torch.ones(2, 3).as_subclass(Special),
        "x is a Special, kernels take exact torch.Tensor objects",
    ),
    "sparse": (
        lambda: torch.eye(3).to_sparse(),
        "x is nested, sparse, or a lazily negated or zero view, kernels take plain strided memory",
    ),
    "negated view": (
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        "x is nested, sparse, or a lazily negated or zero view, kernels take plain strided memory",
    ),
}


@pytest.mark.parametrize(("make", "why"), NOT_FOR_THE_CORE.values(), ids=NOT_FOR_THE_CORE)
def test_what_the_core_does_not_take_has_its_reason_and_goes_to_the_reference(
    make: Callable[[], Tensor], why: str
) -> None:
    assert texts(make()) == [
        f"cpu (not chosen): {why}",
        TRITON_OFF,
        "reference (chosen): the formulas in plain torch take what no kernel takes",
    ]


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_reasons_name_the_active_transform() -> None:
    seen: dict[str, list[str]] = {}

    def probe(key: str) -> Callable[[Tensor], Tensor]:
        def probed(x: Tensor) -> Tensor:
            seen[key] = texts(x)
            return x * 1.0

        return probed

    x = torch.ones(2, 3)
    torch.func.vmap(probe("a torch.func transform is active"))(x)
    torch.func.jacrev(probe("a torch.func transform is active"))(x)
    with torch.autograd.forward_ad.dual_level():
        probe("a forward-mode differentiation level is active")(x)
    with Quiet():
        probe("a torch dispatch mode is active")(x)
    assert len(seen) == 3
    for why, found in seen.items():
        assert found == [
            f"cpu (not chosen): {why}",
            f"triton (not chosen): {why}",
            f"reference (chosen): its formulas as differentiable torch operations, since {why}",
        ]
    assert texts(x)[0] == "cpu (chosen): the compiled core takes plain CPU tensors"


def test_a_core_that_did_not_build_has_its_reason_and_the_reference_steps_in(
    monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "the compiled core is missing")
    monkeypatch.setattr(backends, "norm_now", cpu._never)
    monkeypatch.setattr(backends, "norm_backward_now", cpu._never)
    assert texts() == [
        "cpu (not chosen): the compiled core is missing",
        TRITON_OFF,
        "reference (chosen): the formulas in plain torch take what no kernel takes",
    ]
    NF.rms_norm(torch.ones(2, 4), 4)
    assert computed == ["reference"]
    with pytest.raises(normkit.BackendUnavailable) as caught, normkit.use_backend("cpu"):
        pytest.fail("use_backend must refuse before its body runs")
    assert str(caught.value) == 'use_backend("cpu"): the compiled core is missing'


# -------------------------------------------------------------------------------------- explicit choices


@every_call
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_named_backend_computes_forward_and_the_backward_outside_its_context(
    call: Call, name: str, computed: list[str]
) -> None:
    arguments = inputs(call)
    with normkit.use_backend(name):
        outputs = call.ours(*arguments)
    found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
    assert computed == [name] * len(call.forward + call.backward)
    torch.testing.assert_close(tuple(outputs), tuple(call.torchs(*arguments)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients(call.torchs, arguments), rtol=1e-12, atol=1e-12)


def test_a_backward_inside_another_context_keeps_the_backend_of_its_forward(computed: list[str]) -> None:
    x = torch.ones(2, 4, requires_grad=True)
    out = NF.rms_norm(x, 4)
    with normkit.use_backend("reference"):
        out.sum().backward()
    assert computed == ["cpu", "cpu"]


def test_reasons_say_that_a_choice_is_in_force() -> None:
    with normkit.use_backend("reference"):
        assert texts() == [
            'cpu (not chosen): use_backend("reference") is in force',
            'triton (not chosen): use_backend("reference") is in force',
            "reference (chosen): the formulas in plain torch take what no kernel takes",
        ]
    with normkit.use_backend("cpu"):
        assert texts(torch.ones(2, device="meta")) == [
            "cpu (not chosen): x is on meta, the compiled core takes CPU tensors",
            'triton (not chosen): use_backend("cpu") is in force',
            'reference (not chosen): use_backend("cpu") is in force',
        ]


def test_a_named_backend_never_falls_back() -> None:
    with normkit.use_backend("cpu"):
        with pytest.raises(normkit.BackendUnavailable) as caught:
            NF.layer_norm(torch.ones(2, 3, device="meta"), 3)
        assert str(caught.value) == (
            'use_backend("cpu") cannot take this call: x is on meta, the compiled core takes CPU tensors; '
            "leave use_backend or name another (cpu: x is on meta, the compiled core takes CPU tensors; "
            "triton: torch finds no CUDA device; reference: available)"
        )
        with pytest.raises(normkit.BackendUnavailable, match=r"x has dtype torch\.complex64, the compiled core takes"):
            NF.rms_norm(torch.ones(2, 3, dtype=torch.complex64), 3)
        with pytest.raises(normkit.BackendUnavailable, match="x is a Special, kernels take exact"):
            NF.add_rms_norm(torch.ones(2, 3), torch.ones(2, 3).as_subclass(Special), 3)
        with pytest.raises(normkit.BackendUnavailable, match="x is on meta"):
            NF.batch_norm(torch.ones(2, 3, device="meta"), None, None, training=True)
    with (
        normkit.use_backend("reference"),
        pytest.raises(normkit.BackendUnavailable, match="complex64, whose gradient is left to torch"),
    ):
        NF.rms_norm(torch.ones(2, 3, dtype=torch.complex64), 3)


def test_a_refused_batch_norm_leaves_its_running_statistics_alone() -> None:
    layer = normkit.BatchNorm1d(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with normkit.use_backend("cpu"), pytest.raises(normkit.BackendUnavailable):
        layer(torch.ones(4, 3).as_subclass(Special))
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_tracing_and_transforms_are_the_exception_to_a_named_backend(computed: list[str]) -> None:
    x = torch.randn(3, 4, D)
    with normkit.use_backend("cpu"):
        found = torch.func.vmap(lambda part: NF.rms_norm(part, D, eps=1e-6))(x)
    assert computed == ["reference"]
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, (D,), eps=1e-6))


def test_backends_that_are_off_or_unknown_are_refused_on_entry() -> None:
    with pytest.raises(normkit.BackendUnavailable) as off, normkit.use_backend("triton"):
        pytest.fail("use_backend must refuse before its body runs")
    assert str(off.value) == ('use_backend("triton"): torch finds no CUDA device')
    for name in ("cuda", "CPU", ""):
        with pytest.raises(ValueError, match="use_backend") as unknown, normkit.use_backend(name):
            pytest.fail("use_backend must refuse before its body runs")
        assert str(unknown.value) == (
            f"use_backend: name must be one of cpu, triton, reference, got {name!r}; see normkit.reasons()"
        )


def test_a_choice_ends_with_its_context_also_after_an_exception(computed: list[str]) -> None:
    def fail_inside() -> None:
        with normkit.use_backend("reference"):
            raise KeyError("inside")

    with normkit.use_backend("reference"):
        with normkit.use_backend("cpu"):
            NF.rms_norm(torch.ones(2, 4), 4)
        NF.rms_norm(torch.ones(2, 4), 4)
        with pytest.raises(KeyError):
            fail_inside()
        NF.rms_norm(torch.ones(2, 4), 4)
    NF.rms_norm(torch.ones(2, 4), 4)
    with pytest.raises(KeyError):
        fail_inside()
    NF.rms_norm(torch.ones(2, 4), 4)
    assert computed == ["cpu", "reference", "reference", "cpu", "cpu"]


def test_threads_and_contexts_choose_for_themselves() -> None:
    taken: dict[str, str] = {}
    met = threading.Barrier(3, timeout=30)

    def taker() -> str:
        return next(reason.name for reason in normkit.reasons() if reason.chosen)

    def choose(name: str) -> None:
        with normkit.use_backend(name):
            met.wait()  # all choices are in force at once
            taken[name] = taker()
            met.wait()

    threads = [threading.Thread(target=choose, args=(name,)) for name in ("cpu", "reference")]
    for thread in threads:
        thread.start()
    with normkit.use_backend("reference"):
        met.wait()
        assert taker() == "reference"
        assert contextvars.copy_context().run(taker) == "reference"
        assert contextvars.Context().run(taker) == "cpu"
        met.wait()
    for thread in threads:
        thread.join()
    assert taken == {"cpu": "cpu", "reference": "reference"}


# ------------------------------------------------------------------------------------------ function modes


class Watcher(TorchFunctionMode):
    """The functions that a mode is handed, and hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_function_mode_is_handed_our_functions_and_may_hand_them_on_to_the_kernels(computed: list[str]) -> None:
    x = torch.ones(2, 4)
    functions = (NF.layer_norm, NF.rms_norm, NF.add_layer_norm, NF.add_rms_norm, NF.batch_norm)
    with Watcher() as watcher:
        NF.layer_norm(x, 4)
        NF.rms_norm(x, 4)
        NF.add_layer_norm(x, x, 4)
        NF.add_rms_norm(x, x, 4)
        NF.batch_norm(x, torch.zeros(4), torch.ones(4))
    assert [function for function in watcher.seen if function in functions] == list(functions)
    # nothing of our inside is seen, as nothing of torch.nn.functional.layer_norm's is
    assert {getattr(function, "__name__", "") for function in watcher.seen if function not in functions} <= {
        "zeros",
        "ones",
    }
    assert computed == ["cpu"] * 5


@pytest.fixture(params=["context", "default"])
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.device as a context and torch.set_default_device: both are function modes."""
    if request.param == "context":
        with torch.device("cpu"):
            yield
    else:
        torch.set_default_device("cpu")
        yield
        torch.set_default_device(None)


@every_call
@pytest.mark.usefixtures("default_device")
def test_a_default_device_leaves_forward_and_backward_to_the_kernels(call: Call, computed: list[str]) -> None:
    arguments = inputs(call)
    assert texts(arguments[0])[0] == "cpu (chosen): the compiled core takes plain CPU tensors"
    scalar(call.ours(*arguments)).backward()
    assert computed == ["cpu"] * len(call.forward + call.backward)


@every_call
def test_a_default_device_does_not_place_what_the_kernels_write(call: Call, computed: list[str]) -> None:
    """Results lie where the inputs lie, in forward and in every way to call backward."""
    arguments = inputs(call)
    leaves = arguments[: call.differentiable]
    with torch.device("meta"):
        outputs = call.ours(*arguments)
        loss = scalar(outputs)
        found = torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.autograd.backward(loss, retain_graph=True)
        loss.backward()
    assert computed == ["cpu"] * (len(call.forward) + 3 * len(call.backward))
    assert {t.device.type for t in (*outputs, *found)} == {"cpu"}
    torch.testing.assert_close(found, gradients(call.torchs, inputs(call)), rtol=1e-12, atol=1e-12)


def test_parameters_of_a_subclass_are_not_read_by_address(computed: list[str]) -> None:
    norm = normkit.LayerNorm(4)
    norm.weight = torch.nn.Parameter(torch.ones(4).as_subclass(Special))
    out = norm(torch.ones(2, 4))
    assert computed == ["reference"]
    assert type(out) is Special
