"""Tensor subclasses: what has no memory of its own is never read by address, and who overrides functions is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
import normkit.functional as NF
from interop_calls import CALLS, Call, D, gradients, inputs, record_primitives, scalar

every_call = pytest.mark.parametrize("call", CALLS, ids=str)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-12)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled core's primitives, as they are called."""
    return record_primitives(monkeypatch.setattr)


class Plain(Tensor):
    """A subclass with torch's default behaviour: results are of the subclass too."""


class Wrapper(Tensor):
    """A wrapper without memory of its own, as DTensor, NestedTensor and quantized tensors are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = torch.utils._pytree.tree_map(
            lambda a: a.inner if isinstance(a, Wrapper) else a, (args, kwargs or {})
        )
        result = func(*unwrapped[0], **unwrapped[1])
        return torch.utils._pytree.tree_map(lambda a: Wrapper(a) if isinstance(a, Tensor) else a, result)


@every_call
def test_a_plain_subclass_comes_back_as_itself(call: Call, kernels: list[str]) -> None:
    arguments = inputs(call)
    wrapped = [arguments[0].as_subclass(Plain), *arguments[1:]]
    outputs = call.ours(*wrapped)
    assert {type(out) for out in outputs} == {Plain}
    found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
    assert kernels == []
    close([out.as_subclass(Tensor) for out in outputs], call.torchs(*arguments))
    close([g.as_subclass(Tensor) for g in found], gradients(call.torchs, arguments))


@every_call
def test_a_wrapper_without_memory_goes_through_its_own_dispatch(call: Call, kernels: list[str]) -> None:
    arguments = inputs(call, grad=False)
    outputs = call.ours(*(Wrapper(a) for a in arguments))
    assert kernels == []
    assert all(isinstance(out, Wrapper) for out in outputs)
    close([out.inner for out in outputs], call.torchs(*arguments))


def test_a_subclass_among_the_parameters_alone_takes_the_composite(kernels: list[str]) -> None:
    x, weight = inputs(CALLS[1], grad=False)
    out = NF.rms_norm(x, D, Wrapper(weight), 1e-6)
    assert kernels == []
    assert isinstance(out, Wrapper)


class Quantity(Tensor):
    """A subclass that takes functions into its own hands."""

    taken: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []  # noqa: RUF012 - the protocol is a class method

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.taken.append((func, args, kwargs or {}))
        return "taken"


def test_a_subclass_is_handed_the_function_with_its_arguments() -> None:
    x = torch.ones(2, 4)
    special = x.as_subclass(Quantity)
    calls = (
        (NF.layer_norm, (special, 4, None, None, 1e-5), {}),
        (NF.rms_norm, (special, 4, None, 1e-6), {"weight_offset": 1.0}),
        (NF.add_layer_norm, (x, special, 4, None, None, 1e-5), {}),
        (NF.add_rms_norm, (special, x, 4, None, 1e-6), {"weight_offset": 1.0}),
        (NF.batch_norm, (x, None, None, None, torch.ones(4).as_subclass(Quantity), True, 0.1, 1e-5), {}),
    )
    for function, args, kwargs in calls:
        Quantity.taken.clear()
        assert function(*args, **kwargs) == "taken"
        ((taken, taken_args, taken_kwargs),) = Quantity.taken
        assert taken is function
        assert all(a is b or a == b for a, b in zip(taken_args, args, strict=True))
        assert taken_kwargs == kwargs


def test_nested_tensors_take_our_row_norms_as_they_take_torchs() -> None:
    """Jagged tensors look functions up by name and bind torch's signature."""
    parts = [torch.randn(2, D), torch.randn(3, D)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for ours, torchs in (
        (normkit.LayerNorm(D), torch.nn.LayerNorm(D)),
        (normkit.RMSNorm(D, eps=1e-6), torch.nn.RMSNorm(D, eps=1e-6)),
    ):
        out = ours(nested)
        out.sum().backward()
        assert ours.weight.grad is not None
        for found, part in zip(out.unbind(), parts, strict=True):
            torch.testing.assert_close(found, torchs(part))
