"""Jagged nested tensors: their rows are normalized on the packed values, by the compiled core where it takes those.

Read next: src/normkit/functional/nested.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import normkit
import normkit.functional as NF
from interop_calls import CALLS, Call, D, gradients, inputs, record_primitives, scalar

row_calls = pytest.mark.parametrize("call", [call for call in CALLS if "rows_forward" in call.forward], ids=str)
LENGTHS = (2, 0, 3, 1)  # of the samples that share the six rows of a call's inputs

# torch's own: building a nested tensor of the strided layout warns that it is a prototype
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=tolerance, atol=tolerance)


def offsets(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(values: Tensor, at: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, at)


def nest(arguments: list[Tensor]) -> list[Tensor]:
    """The call's data as nested tensors of the same offsets, its parameters as they are."""
    at = offsets()
    return [packed(a, at) if a.dim() > 1 else a for a in arguments]


@pytest.fixture
def primitives(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled core's primitives, as they are called."""
    return record_primitives(monkeypatch.setattr)


@row_calls
def test_values_and_gradients_are_those_of_the_packed_rows_on_the_core(call: Call, primitives: list[str]) -> None:
    arguments = inputs(call)
    nested = nest(arguments)
    outputs = call.ours(*nested)
    found = torch.autograd.grad(scalar([out.values() for out in outputs]), arguments)
    assert primitives == [*call.forward, *call.backward]
    close([out.values() for out in outputs], call.torchs(*arguments))
    close(found, gradients(call.torchs, arguments))


@row_calls
def test_results_have_the_inputs_ragged_size(call: Call) -> None:
    """So that they can be added to it, and to each other."""
    nested = nest(inputs(call))
    x = nested[0]
    for out in call.ours(*nested):
        assert out.is_nested
        assert out.layout is torch.jagged
        assert out.shape == x.shape
        assert out.offsets() is x.offsets()
        close([(out + x).values()], [out.values() + x.values()])
        assert [part.shape[0] for part in out.unbind()] == list(LENGTHS)


@row_calls
def test_gradients_reach_nested_leaves(call: Call) -> None:
    arguments = inputs(call, grad=False)
    nested = [a.detach().requires_grad_() for a in nest(arguments)]
    scalar([out.values() for out in call.ours(*nested)]).backward()
    expected = gradients(call.torchs, inputs(call))
    for leaf, wanted in zip(nested, expected, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        close([leaf.grad.values() if leaf.is_nested else leaf.grad], [wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_take_nested_tensors_in_every_dtype(dtype: torch.dtype, primitives: list[str]) -> None:
    values = torch.randn(6, D, dtype=dtype)
    for ours, torchs in (
        (normkit.LayerNorm(D, dtype=dtype), torch.nn.LayerNorm(D, dtype=dtype)),
        (normkit.RMSNorm(D, eps=1e-6, dtype=dtype), torch.nn.RMSNorm(D, eps=1e-6, dtype=dtype)),
    ):
        found = ours(packed(values, offsets()))
        assert found.dtype is dtype
        torch.testing.assert_close(found.values(), torchs(values))
        found.values().sum().backward()
        assert ours.weight.grad is not None
    assert primitives == ["rows_forward", "rows_backward"] * 2


def test_a_forced_backend_computes_nested_rows() -> None:
    nested = packed(torch.randn(6, D), offsets())
    for backend in ("cpu", "reference"):
        with normkit.use_backend(backend):
            close([NF.rms_norm(nested, D).values()], [NF.rms_norm(nested.values(), D)], 1e-6)


def test_heads_behind_a_transposed_ragged_axis_are_normalized(primitives: list[str]) -> None:
    """(B, ragged, heads, D) as attention turns it, (B, heads, ragged, D): a QK-norm."""
    values = torch.randn(6, 3, D, dtype=torch.float64)
    nested = packed(values, offsets()).transpose(1, 2)
    found = NF.layer_norm(nested, D)
    assert primitives == ["rows_forward"]
    assert found.shape == nested.shape
    close([found.transpose(1, 2).values()], [torch.nn.functional.layer_norm(values, (D,))])
    two = NF.rms_norm(packed(values, offsets()), (3, D), torch.ones(3, D), 1e-6)
    close([two.values()], [torch.nn.functional.rms_norm(values, (3, D), None, 1e-6)])


def test_what_lies_between_the_samples_reaches_no_gradient() -> None:
    """torch.nested.narrow leaves holes in the packed values; here they hold NaN, and so does their gradient."""
    whole = torch.randn(3, 5, D, dtype=torch.float64)
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([2, 3, 1])
    valid = (torch.arange(5) >= starts[:, None]) & (torch.arange(5) < (starts + lengths)[:, None])
    holed = torch.where(valid[..., None], whole, torch.nan)
    nested = torch.nested.narrow(holed, 1, starts, lengths, layout=torch.jagged)
    weight, bias = (torch.randn(D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out, total = NF.add_layer_norm(nested, nested, D, weight, bias)
    assert out.shape == total.shape == nested.shape
    expected = torch.nn.functional.layer_norm(2.0 * whole[valid], (D,), weight, bias)
    close([torch.cat(out.unbind())], [expected])
    close([torch.cat(total.unbind())], [2.0 * whole[valid]])
    gradient = torch.where(valid[..., None], torch.ones_like(whole), torch.nan).view(-1, D)
    found = torch.autograd.grad(out.values(), (weight, bias), gradient)
    close(found, torch.autograd.grad(expected.sum(), (weight, bias)))


def test_a_batch_without_a_row_is_normalized() -> None:
    weight = torch.ones(D, requires_grad=True)
    out = NF.rms_norm(packed(torch.empty(0, D), offsets((0, 0))), D, weight)
    assert out.values().shape == (0, D)
    out.values().sum().backward()
    assert torch.equal(weight.grad, torch.zeros(D))


def test_residual_stacks_fuse_their_adds_on_nested_tensors(primitives: list[str]) -> None:
    torch.manual_seed(0)
    blocks = [
        normkit.Residual(torch.nn.Linear(D, D), normkit.PreNorm, lambda: normkit.RMSNorm(D, eps=1e-6)) for _ in range(2)
    ]
    model = normkit.ResidualStack(blocks, normkit.RMSNorm(D, eps=1e-6))
    values = torch.randn(6, D)
    found = model(packed(values, offsets())).values()
    assert primitives == ["rows_forward"] * 3
    torch.testing.assert_close(found, model(values))


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # torch's own, both of them
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_layer_takes_nested_tensors(dynamic: bool) -> None:
    layer = normkit.LayerNorm(D)
    compiled = torch.compile(lambda x: layer(x) + x, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for rows in (LENGTHS, (3, 4)):
        values = torch.randn(sum(rows), D, requires_grad=True)
        found = compiled(packed(values, offsets(rows)))
        expected = torch.nn.functional.layer_norm(values, (D,)) + values
        torch.testing.assert_close(found.values(), expected)
        close(
            torch.autograd.grad(found.values().sin().sum(), values),
            torch.autograd.grad(expected.sin().sum(), values),
            1e-5,
        )
    torch.compiler.reset()


def test_function_modes_and_other_subclasses_are_still_asked() -> None:
    seen: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (NF.layer_norm, NF.add_rms_norm):
                seen.append(func)
            return func(*args, **(kwargs or {}))

    nested = packed(torch.randn(6, D), offsets())
    with Watch():
        out, pair = NF.layer_norm(nested, D), NF.add_rms_norm(nested, nested, D)
    assert seen == [NF.layer_norm, NF.add_rms_norm]
    close([out.values(), pair.total.values()], [NF.layer_norm(nested.values(), D), 2.0 * nested.values()], 1e-6)

    class Taker(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func

    assert NF.rms_norm(torch.ones(2, D), D, torch.ones(D).as_subclass(Taker)) is NF.rms_norm


# --------------------------------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize("normalized_shape", [(6, D), torch.Size([3, D]), None], ids=str)
def test_a_ragged_axis_is_not_normalized_over(normalized_shape: Any) -> None:
    nested = packed(torch.randn(6, D), offsets())
    with pytest.raises(ValueError, match="ragged") as caught:
        NF.layer_norm(nested, nested.shape[1:] if normalized_shape is None else normalized_shape)
    assert str(caught.value) == (
        f"layer_norm: x must not be ragged along a normalized axis, got x of shape {tuple(nested.shape)}, ragged along "
        f"axis 1, and 2 normalized axes; normalize over axes behind it, or each of x.unbind()"
    )


def test_shapes_are_compared_with_the_nested_ones() -> None:
    nested = packed(torch.randn(6, D), offsets())
    with pytest.raises(ValueError, match="must end") as caught:
        NF.rms_norm(nested, D + 1)
    assert str(caught.value) == (
        f"rms_norm: x must end with normalized_shape ({D + 1},), got x of shape {tuple(nested.shape)}; "
        f"pass normalized_shape={D} or transpose x"
    )
    with pytest.raises(ValueError, match="weight must have shape"):
        NF.rms_norm(nested, D, torch.ones(D + 1))


@pytest.mark.parametrize("residual", ["other offsets", "dense", "dense x"])
def test_a_residual_of_another_structure_is_refused(residual: str) -> None:
    """Of the same lengths too, as torch's add refuses it."""
    x, other = packed(torch.randn(6, D), offsets()), packed(torch.randn(6, D), offsets())
    if residual == "dense":
        other = torch.randn(6, D)
    elif residual == "dense x":
        x = torch.randn(6, D)
    for function in (NF.add_layer_norm, NF.add_rms_norm):
        with pytest.raises(ValueError, match="residual must have") as caught:
            function(x, other, D)
        assert str(caught.value) == (
            f"{function.__name__}: residual must have x's shape {tuple(x.shape)}, got {tuple(other.shape)}; "
            "make both of the same offsets"
        )


def test_a_residual_with_other_holes_is_refused() -> None:
    lengths = torch.tensor([2, 3, 1])
    one, other = (
        torch.nested.nested_tensor_from_jagged(torch.randn(15, D), torch.tensor(at), lengths)
        for at in ([0, 5, 10, 15], [1, 6, 11, 15])
    )
    assert one.shape == other.shape
    with pytest.raises(ValueError, match="the same offsets"):
        NF.add_rms_norm(one, other, D)


def test_the_strided_layout_is_refused() -> None:
    strided = torch.nested.nested_tensor([torch.randn(2, D), torch.randn(3, D)])
    dense = torch.randn(2, D)
    for function, arguments, name in (
        (NF.layer_norm, (strided,), "x"),
        (NF.rms_norm, (strided,), "x"),
        (NF.add_layer_norm, (strided, strided), "x"),
        (NF.add_rms_norm, (dense, strided), "residual"),
    ):
        with pytest.raises(TypeError) as caught:
            function(*arguments, D)
        assert str(caught.value) == (
            f"{function.__name__}: {name} must be a dense tensor or a nested tensor of layout torch.jagged, got a "
            "nested tensor of layout torch.strided; make it with layout=torch.jagged"
        )
