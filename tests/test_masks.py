"""Masks and lengths: only valid positions count, and nothing that stands in the padding reaches any result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import normkit
from cases import DTYPES, HALF, accumulation_dtype, normal
from masked_oracle import Found, normalize
from normkit import functional as NF
from tolerance import assert_same_bits, threads

C = 6
Call = Callable[..., Tensor]
# name: the call, and how many groups of channels a sample has (None: statistics over the batch)
NORMS: dict[str, tuple[Call, int | None]] = {
    "batch_norm": (lambda x, w, b, **valid: NF.batch_norm(x, None, None, w, b, True, **valid), None),
    "group_norm": (lambda x, w, b, **valid: NF.group_norm(x, 3, w, b, **valid), 3),
    "instance_norm": (lambda x, w, b, **valid: NF.instance_norm(x, None, None, w, b, **valid), C),
}
every_norm = pytest.mark.parametrize("name", NORMS)
SPACES = ((), (7,), (17,), (5, 7), (300,))


def space_of(name: str) -> tuple[tuple[int, ...], ...]:
    return SPACES if name == "batch_norm" else SPACES[1:]


def some_mask(batch: int, space: tuple[int, ...], seed: int = 0, share: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, *space), generator=generator) < share


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, last: bool = False) -> list[Tensor]:
    """x, dout, weight, bias; `last`: x with channels innermost."""
    x, dout = normal(shape, 1, dtype) * 2 + 3, normal(shape, 2, dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return [x, dout, normal((shape[1],), 3, dtype) + 1, normal((shape[1],), 4, dtype)]


def step(name: str, x: Tensor, dout: Tensor, weight: Tensor, bias: Tensor, **valid: Any) -> list[Tensor]:
    """out, dx, dweight, dbias."""
    made = [values.detach().requires_grad_() for values in (x, weight, bias)]
    out = NORMS[name][0](*made, **valid)
    return [out.detach(), *torch.autograd.grad(out, made, dout)]


def exact(name: str, x: Tensor, dout: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> list[Tensor]:
    """The same by the NumPy oracle."""
    wide = [values.double().numpy() for values in (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), weight, bias)]
    valid = mask.reshape(x.shape[0], -1).numpy()
    found: Found = normalize(
        wide[0], valid, wide[1], wide[2], dout.double().reshape(wide[0].shape).numpy(), NORMS[name][1]
    )
    results = (found.out.reshape(x.shape), found.dx.reshape(x.shape), found.dweight, found.dbias)
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in results]


def poisoned(values: Tensor, mask: Tensor, poison: float | None) -> Tensor:
    """`values` with something else at invalid positions."""
    other = torch.randn_like(values) * 100 if poison is None else torch.full_like(values, poison)
    return torch.where(mask.unsqueeze(1), values, other)


def near(found: list[Tensor], right: list[Tensor], dtype: torch.dtype, what: str, least: float = 1.0) -> None:
    """64 units of the largest exact value, and half a unit in the last place of a half type. `least`: for the unit."""
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    for which, ours, expected in zip(("out", "dx", "dweight", "dbias"), found, right, strict=True):
        assert ours.dtype == dtype
        scale = max(least, float(expected.abs().max()))
        allowed = 64 * eps * scale
        if dtype in HALF:
            allowed += torch.finfo(dtype).eps / 2 * expected.abs()
        assert bool(((ours.double() - expected).abs() <= allowed).all()), f"{what}: {which}"


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_norm
def test_masked_norms_equal_the_formulas(name: str, dtype: torch.dtype, last: bool, backend: str) -> None:
    for space in space_of(name):
        tensors = inputs((4, C, *space), dtype, last)
        mask = some_mask(4, space)
        near(step(name, *tensors, mask=mask), exact(name, *tensors, mask), dtype, f"{name} {space}")


@given(data=st.data())
@every_norm
def test_any_shape_and_mask_equals_the_formulas(name: str, data: st.DataObject) -> None:
    batch, space = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    flat = data.draw(st.lists(st.booleans(), min_size=batch * space, max_size=batch * space))
    mask = torch.tensor(flat).view(batch, space)
    if space == 1 and name != "batch_norm":
        space, mask = 2, mask.expand(batch, 2)
    if name == "batch_norm" and (batch * space == 1 or int(mask.sum()) == 1):
        return
    tensors = inputs((batch, C, space), torch.float64, data.draw(st.booleans()))
    # what cancels in the dx of few equal values was up to 1 / sqrt(eps) = 316 times dout
    near(step(name, *tensors, mask=mask), exact(name, *tensors, mask), torch.float64, name, least=316.0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30, None], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@every_norm
def test_padding_changes_no_bit(name: str, last: bool, poison: float | None, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for space in space_of(name):
            x, dout, weight, bias = inputs((4, C, *space), dtype, last)
            mask = some_mask(4, space)
            plain = step(name, x, dout, weight, bias, mask=mask)
            dirty = [poisoned(values, mask, poison) for values in (x, dout)]
            found = step(name, *dirty, weight, bias, mask=mask)
            for which, one, other in zip(("out", "dx", "dweight", "dbias"), plain, found, strict=True):
                assert_same_bits(other, one, f"{name} {space} {dtype}: {which}")


@every_norm
def test_padding_changes_no_bit_of_compiled_calls(name: str) -> None:
    x, dout, weight, bias = inputs((4, C, 9), torch.float32)
    mask = some_mask(4, (9,))
    torch.compiler.reset()
    compiled = torch.compile(NORMS[name][0], backend="aot_eager", fullgraph=True)

    def results(x: Tensor, dout: Tensor) -> list[Tensor]:
        made = [values.detach().requires_grad_() for values in (x, weight, bias)]
        out = compiled(*made, mask=mask)
        return [out.detach(), *torch.autograd.grad(out, made, dout)]

    nan = float("nan")
    for one, other in zip(results(x, dout), results(poisoned(x, mask, nan), poisoned(dout, mask, nan)), strict=True):
        assert_same_bits(other, one, name)
    near(results(x, dout), exact(name, x, dout, weight, bias, mask), torch.float32, name)


def test_a_mask_applied_once_in_a_composite_is_refused() -> None:
    """The mistake that makes every valid dx NaN: normalize everything, then put zeros where the mask says so."""
    x, dout, *_ = inputs((4, C, 9))
    mask = some_mask(4, (9,))

    def once(x: Tensor) -> Tensor:
        wide, n = torch.where(mask.unsqueeze(1), x, 0.0), mask.sum()
        mean = wide.sum((0, 2), keepdim=True) / n
        var = torch.where(mask.unsqueeze(1), (x - mean) ** 2, 0.0).sum((0, 2), keepdim=True) / n
        return torch.where(mask.unsqueeze(1), (x - mean) * torch.rsqrt(var + 1e-5), 0.0)

    def dx(call: Callable[[Tensor], Tensor]) -> Tensor:
        made = poisoned(x, mask, float("nan")).requires_grad_()
        return torch.autograd.grad(call(made), made, dout)[0]

    def check(call: Callable[[Tensor], Tensor]) -> None:
        assert bool(torch.isfinite(dx(call)).all())

    check(lambda x: NF.batch_norm(x, None, None, None, None, True, mask=mask))
    with pytest.raises(AssertionError):
        check(once)


@every_norm
def test_another_amount_of_padding_agrees_to_rounding(name: str, backend: str) -> None:
    lengths = torch.tensor([9, 4, 1, 7])
    x, dout, weight, bias = inputs((4, C, 9))
    short = step(name, x, dout, weight, bias, lengths=lengths)
    pad = torch.full((4, C, 24), float("nan"), dtype=x.dtype)
    long = step(name, torch.cat([x, pad], 2), torch.cat([dout, pad], 2), weight, bias, lengths=lengths)
    assert bool((long[0][:, :, 9:] == 0).all())
    assert bool((long[1][:, :, 9:] == 0).all())
    for one, other in zip(short, (long[0][:, :, :9], long[1][:, :, :9], *long[2:]), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-13)


@every_norm
def test_a_mask_of_ones_is_no_mask(name: str, backend: str) -> None:
    tensors = inputs((4, C, 9))
    for one, other in zip(
        step(name, *tensors, mask=torch.ones(4, 9, dtype=torch.bool)), step(name, *tensors), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@every_norm
def test_lengths_and_broadcast_masks_say_the_same(name: str, backend: str) -> None:
    tensors = inputs((3, C, 5, 8))
    columns = torch.arange(8) < 6
    whole = columns.expand(3, 5, 8)
    expected = step(name, *tensors, mask=whole)
    for mask in (columns.view(1, 1, 8), columns.view(1, 1, 1, 8), whole.unsqueeze(1), columns.expand(3, 1, 8)):
        for one, other in zip(step(name, *tensors, mask=mask), expected, strict=True):
            assert_same_bits(one, other, name)
    tensors = inputs((3, C, 8))
    lengths = torch.tensor([8, 3, 5])
    expected = step(name, *tensors, mask=torch.arange(8) < lengths.unsqueeze(1))
    for given_lengths in (lengths, lengths.int(), [8, 3, 5]):
        for one, other in zip(step(name, *tensors, lengths=given_lengths), expected, strict=True):
            assert_same_bits(one, other, name)


@every_norm
def test_a_sample_or_batch_without_a_valid_position_is_zero_and_sends_no_gradient(name: str, backend: str) -> None:
    x, dout, weight, bias = inputs((4, C, 9))
    mask = some_mask(4, (9,))
    mask[2] = False
    found = step(name, x, dout, weight, bias, mask=mask)
    near(found, exact(name, x, dout, weight, bias, mask), torch.float64, name)
    for results in step(name, x, dout, weight, bias, mask=torch.zeros_like(mask)):
        assert bool((results == 0).all())


def test_eps_zero_of_an_empty_sample_gives_no_nan(backend: str) -> None:
    x, dout, weight, bias = inputs((2, C, 9))
    mask = torch.tensor([[True] * 9, [False] * 9])
    made = [values.requires_grad_() for values in (x, weight, bias)]
    out = NF.group_norm(x, 3, weight, bias, 0.0, mask=mask)
    for values in (out, *torch.autograd.grad(out, made, dout)):
        assert bool(torch.isfinite(values).all())


def running(value: float = 0.25) -> tuple[Tensor, Tensor]:
    return torch.full((C,), value, dtype=torch.float64), torch.full((C,), 1 + value, dtype=torch.float64)


def test_running_statistics_count_valid_positions_only(backend: str) -> None:
    x, dout, *_ = inputs((4, C, 9))
    mask = some_mask(4, (9,))
    zeros = np.zeros(C)
    found = normalize(x.numpy(), mask.numpy(), zeros, zeros, dout.numpy(), None)
    mean, var = running()
    NF.batch_norm(poisoned(x, mask, float("nan")), mean, var, training=True, momentum=0.3, mask=mask)
    torch.testing.assert_close(
        mean, torch.tensor(found.means, dtype=torch.float64) * 0.3 + 0.7 * 0.25, rtol=1e-13, atol=0
    )
    torch.testing.assert_close(
        var, torch.tensor(found.variances, dtype=torch.float64) * 0.3 + 0.7 * 1.25, rtol=1e-13, atol=0
    )


def test_instance_norms_running_statistics_average_samples_with_two_valid_positions(backend: str) -> None:
    x, dout, *_ = inputs((5, C, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 0, 6]).unsqueeze(1)
    zeros = np.zeros(C)
    found = normalize(x.numpy(), mask.numpy(), zeros, zeros, dout.numpy(), C)
    means, variances = (np.array(values).reshape(5, C)[[0, 1, 4]].mean(0) for values in (found.means, found.variances))
    mean, var = running()
    NF.instance_norm(x, mean, var, momentum=1.0, mask=mask)
    torch.testing.assert_close(mean, torch.from_numpy(means), rtol=1e-13, atol=0)
    torch.testing.assert_close(var, torch.from_numpy(variances), rtol=1e-13, atol=0)


def test_a_batch_without_a_valid_position_leaves_running_statistics(backend: str) -> None:
    nothing = torch.zeros(4, 9, dtype=torch.bool)
    layer = normkit.BatchNorm1d(C).double()
    for call in (
        lambda mean, var: NF.batch_norm(inputs((4, C, 9))[0], mean, var, training=True, mask=nothing),
        lambda mean, var: NF.instance_norm(inputs((4, C, 9))[0], mean, var, mask=nothing),
    ):
        mean, var = running()
        call(mean, var)
        for found, before in zip((mean, var), running(), strict=True):
            assert_same_bits(found, before, "running")
    layer(inputs((4, C, 9))[0], mask=nothing)
    assert int(layer.num_batches_tracked) == 0
    assert bool((layer.running_mean == 0).all())


def test_one_valid_value_in_all_is_refused_and_nothing_moves(backend: str) -> None:
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[1, 2] = True
    mean, var = running()
    with pytest.raises(ValueError, match=re.escape("got x of shape (4, 6, 9) with 1 valid value per channel in all")):
        NF.batch_norm(inputs((4, C, 9))[0], mean, var, training=True, mask=mask)
    for found, before in zip((mean, var), running(), strict=True):
        assert_same_bits(found, before, "running")


def test_stored_statistics_with_a_mask_give_zeros_and_zero_gradients_in_the_padding(backend: str) -> None:
    x, dout, weight, bias = inputs((4, C, 9))
    mask = some_mask(4, (9,))
    mean, var = running()
    x = poisoned(x, mask, float("nan")).requires_grad_()
    made = [x, weight.requires_grad_(), bias.requires_grad_()]
    out = NF.batch_norm(x, mean, var, weight, bias, mask=mask)
    dx, dweight, dbias = torch.autograd.grad(out, made, poisoned(dout, mask, float("nan")))
    view = (1, C, 1)
    xhat = (x.detach() - mean.view(view)) / torch.sqrt(var.view(view) + 1e-5)
    kept = mask.unsqueeze(1)
    for found, right in (
        (out, torch.where(kept, xhat * weight.view(view) + bias.view(view), 0.0)),
        (dx, torch.where(kept, dout * (weight / torch.sqrt(var + 1e-5)).view(view), 0.0)),
        (dweight, torch.where(kept, dout * xhat, 0.0).sum((0, 2))),
        (dbias, torch.where(kept, dout, 0.0).sum((0, 2))),
    ):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@every_norm
def test_second_derivatives_of_masked_norms_are_exact(name: str) -> None:
    x, _, weight, bias = inputs((2, C, 4))
    mask = torch.tensor([[True, True, False, True], [True, False, True, False]])
    made = [values.requires_grad_() for values in (x, weight, bias)]

    def call(*values: Tensor) -> Tensor:
        return NORMS[name][0](*values, mask=mask)

    assert torch.autograd.gradcheck(call, made)
    assert torch.autograd.gradgradcheck(call, made)


@every_norm
def test_masked_results_do_not_depend_on_the_number_of_threads(name: str, core: None) -> None:
    tensors = inputs((8, C, 4099), torch.float32)
    mask = some_mask(8, (4099,))
    with threads(1):
        alone = step(name, *tensors, mask=mask)
    with threads(2):
        for one, other in zip(step(name, *tensors, mask=mask), alone, strict=True):
            assert_same_bits(one, other, name)


@every_norm
def test_masked_norms_keep_x_itself_and_make_no_copy_of_it(name: str, core: None) -> None:
    x, _, weight, bias = inputs((4, C, 65), torch.float32)
    saved: list[Tensor] = []

    def keep(values: Tensor) -> Tensor:
        saved.append(values)
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        NORMS[name][0](x.requires_grad_(), weight, bias, mask=some_mask(4, (65,)))
    assert [values.data_ptr() for values in saved if values.numel() >= x.numel()] == [x.data_ptr()]


LAYERS: tuple[tuple[torch.nn.Module, tuple[int, ...]], ...] = (
    (normkit.BatchNorm1d(C), (4, C, 9)),
    (normkit.BatchNorm2d(C), (4, C, 3, 5)),
    (normkit.BatchNorm3d(C), (4, C, 2, 3, 2)),
    (normkit.SyncBatchNorm(C), (4, C, 9)),
    (normkit.GroupNorm(3, C), (4, C, 9)),
    (normkit.InstanceNorm1d(C), (4, C, 9)),
    (normkit.InstanceNorm2d(C), (4, C, 3, 5)),
)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_layers_hand_masks_on(layer: torch.nn.Module, shape: tuple[int, ...]) -> None:
    x = normal(shape, 1, torch.float32)
    mask = some_mask(4, shape[2:])
    out = layer(x, mask=mask)
    assert bool((out.movedim(1, -1)[~mask] == 0).all())
    assert_same_bits(layer(poisoned(x, mask, float("nan")), mask), out, "layer")
    if len(shape) == 3:
        assert bool((layer(x, lengths=[9, 4, 2, 7])[1, :, 4:] == 0).all())


def test_a_single_sample_of_instance_norm_takes_a_mask_of_its_space() -> None:
    x, mask = normal((C, 9), 1, torch.float32), some_mask(1, (9,))[0]
    assert bool((normkit.InstanceNorm1d(C)(x, mask)[:, ~mask] == 0).all())


X = torch.zeros(4, C, 9)
SHAPE = "mask must have x's shape without channels, (4, 9), got {}; a position is valid for all channels or for none"
HOW_MANY = "pass how many positions of each sample are valid"
ONES = torch.ones(4, 9, dtype=torch.bool)
BAD: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    (
        {"mask": ONES.float()},
        TypeError,
        "mask must be boolean, True where x is valid, got torch.float32; pass mask.bool()",
    ),
    ({"mask": [True]}, TypeError, "mask must be a torch.Tensor, got list; pass a tensor"),
    ({"mask": ONES.unsqueeze(1).repeat(1, C, 1)}, ValueError, SHAPE.format((4, 6, 9))),
    ({"mask": ONES[0]}, ValueError, SHAPE.format((9,))),
    (
        {"mask": ONES.to("meta")},
        ValueError,
        "mask must be on x's device cpu, got meta; move it with mask.to(x.device)",
    ),
    ({"mask": ONES, "lengths": [9] * 4}, ValueError, "mask and lengths say the same, got both; pass one of them"),
    (
        {"lengths": [1, 2]},
        ValueError,
        f"lengths must have one number per sample, shape (4,), got shape (2,); {HOW_MANY}",
    ),
    ({"lengths": [1, 2, 10, 3]}, ValueError, f"lengths must lie between 0 and L = 9, got 10; {HOW_MANY}"),
    ({"lengths": [1, -2, 1, 3]}, ValueError, f"lengths must lie between 0 and L = 9, got -2; {HOW_MANY}"),
    (
        {"lengths": torch.ones(4)},
        TypeError,
        "lengths must be integers, got torch.float32; pass the number of valid positions",
    ),
)


@pytest.mark.parametrize(("valid", "kind", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_mask_is_told_what_is_wrong(valid: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        NF.batch_norm(X, None, None, training=True, **valid)
    assert str(caught.value) == f"batch_norm: {message}"


def test_lengths_need_one_axis_of_space() -> None:
    with pytest.raises(ValueError, match=re.escape("group_norm: lengths need x of shape (B, C, L), got (4, 6, 3, 5)")):
        NF.group_norm(torch.zeros(4, C, 3, 5), 3, lengths=[1, 2, 3, 3])
