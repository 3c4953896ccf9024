"""LayerNorm over channels: values, gradients and promises in both memory formats, and the layer beside torch's.

Read next: checks.py, whose checks run here on one more norm; src/normkit/csrc/columns.h for what is tested.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as checkpointing

import normkit
import normkit.functional as NF
from cases import DTYPES, HALF, LAYOUTS, Norm, normal
from checks import (
    check_deterministic,
    check_gradients,
    check_not_finite_as_torch,
    check_second_derivatives,
    check_values,
)
from normkit.kernels import columns, cpu
from tolerance import FLOOR, assert_exact_enough, assert_same_bits, threads

CHANNELS = (1, 2, 3, 17, 64, 513)
SPACES = (0, 1, 5, 16, 17, 49, 300)
FORMATS = ("contiguous", "channels-last")  # names of cases.LAYOUTS
MANY = (3, 17, 300)  # three strips a sample, a tail, two runs of lines with C = 65 and more

# torch's own: jvp and inductor use torch.jit when they are first called
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_format = pytest.mark.parametrize("layout", FORMATS)


def over_channels(norms: Any) -> Callable[..., Tensor]:
    """normkit's own, or the layer_norm of the oracle or of torch on the permuted x: what it stands for."""
    if hasattr(norms, "layer_norm_channels"):
        own: Callable[..., Tensor] = norms.layer_norm_channels
        return own

    def permuted(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        out: Tensor = norms.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps)
        return out.movedim(-1, 1)

    return permuted


def parameters(*names: str) -> Callable[[tuple[int, ...]], dict[str, tuple[int, ...]]]:
    return lambda shape: {"x": shape, **dict.fromkeys(names, shape[1:2])}


NORM = Norm(
    "layer_norm over channels",
    lambda norms, x, weight, bias: over_channels(norms)(x, weight, bias),
    ((17, 5), (4, 5, 11), (3, 5, 4, 6), (2, 6, 2, 3, 4)),
    parameters("weight", "bias"),
    lambda shape: (1,),
    rows=False,
)
PLAIN = Norm(
    "layer_norm over channels without parameters, eps 0.1",
    lambda norms, x: over_channels(norms)(x, eps=0.1),
    NORM.shapes,
    parameters(),
    lambda shape: (1,),
    rows=False,
)
WEIGHT = Norm(
    "layer_norm over channels without bias",
    lambda norms, x, weight: over_channels(norms)(x, weight),
    NORM.shapes,
    parameters("weight"),
    lambda shape: (1,),
    rows=False,
)
every_norm = pytest.mark.parametrize("norm", [NORM, PLAIN, WEIGHT], ids=str)


def laid(x: Tensor, layout: str) -> Tensor:
    return LAYOUTS[layout](x)


def torchs(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)


def results(x: Tensor, dout: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> list[Tensor]:
    """out, dx and the gradients of what parameters there are."""
    leaves = [v.detach().requires_grad_() for v in (x, weight, bias) if v is not None]
    given = iter(leaves)
    arguments = [None if v is None else next(given) for v in (x, weight, bias)]
    out = NF.layer_norm_channels(*arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.fixture(params=cpu._core.isas() if cpu.unavailable() is None else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu._core.set_isa(request.param)
    yield request.param
    cpu._core.set_isa(before)


# ----------------------------------------------------------------------------------------------- values, gradients


def gradient_floor(channels: int) -> float:
    """Units of rounding that dx may be off where torch, in float64 the oracle itself, gives no measure.

    dx of a few channels is what cancellation leaves of terms that are up to rstd = 1e3 times larger.
    """
    return 4096.0 if channels <= 3 else FLOOR


@every_dtype
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_size_agrees_with_float64_and_is_as_exact_as_torch(channels: int, dtype: torch.dtype, core: None) -> None:
    floor = gradient_floor(channels)
    for space, batch, layout in itertools.product(SPACES, (0, 1, 3), FORMATS):
        check_values(NF, NORM, (batch, channels, space), dtype, layout)
        check_gradients(NF, NORM, (batch, channels, space), dtype, layout, floor=floor)


@every_norm
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_set_of_parameters_agrees_with_float64(norm: Norm, layout: str, backend: str) -> None:
    for shape, dtype in itertools.product(norm.shapes, (torch.float32, torch.bfloat16)):
        check_values(NF, norm, shape, dtype, layout)
        check_gradients(NF, norm, shape, dtype, layout)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_format
def test_float32_parameters_serve_half_images(layout: str, dtype: torch.dtype, backend: str) -> None:
    for shape in (NORM.shapes[2], MANY):
        check_values(NF, NORM, shape, dtype, layout, torch.float32)
        check_gradients(NF, NORM, shape, dtype, layout, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_instruction_set_agrees_with_float64(dtype: torch.dtype, isa: str) -> None:
    for channels, space in ((65, 300), (200, 49), (17, 128), (30, 31), (2, 2), (96, 257)):
        check_values(NF, NORM, (2, channels, space), dtype)
        check_gradients(NF, NORM, (2, channels, space), dtype, floor=gradient_floor(channels))


@every_norm
@every_format
def test_first_and_second_derivatives_are_the_numerical_ones(norm: Norm, layout: str) -> None:
    for shape in ((2, 3, 4), (2, 4, 2, 2)):
        check_second_derivatives(NF, norm, shape)
    x = laid(normal((2, 3, 2, 2), 1), layout).requires_grad_()
    assert torch.autograd.gradgradcheck(NF.layer_norm_channels, (x, normal((3,), 2).requires_grad_()))


@every_format
def test_what_needs_no_gradient_changes_no_other(layout: str) -> None:
    x, dout = laid(normal(MANY, 1, torch.float32), layout), laid(normal(MANY, 2, torch.float32), layout)
    weight, bias = normal(MANY[1:2], 3, torch.float32), normal(MANY[1:2], 4, torch.float32)
    everything = dict(zip("xwb", results(x, dout, weight, bias)[1:], strict=True))
    for wanted in ("x", "w", "b", "xw", "xb", "wb"):
        leaves = {n: v.clone().requires_grad_(n in wanted) for n, v in zip("xwb", (x, weight, bias), strict=True)}
        out = NF.layer_norm_channels(*leaves.values())
        for name, found in zip(wanted, torch.autograd.grad(out, [leaves[n] for n in wanted], dout), strict=True):
            assert_same_bits(found, everything[name], f"d{name} where {wanted} are wanted")


# ---------------------------------------------------------------------------------------------------- memory format


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1)])
@every_format
def test_outputs_and_gradients_keep_the_memory_format(shape: tuple[int, ...], layout: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = laid(normal(shape, 1, dtype), layout)
        out, dx = results(x, laid(normal(shape, 2, dtype), layout))
        for found in (out, dx):
            apart = [i for i, length in enumerate(shape) if length > 1]
            assert [found.stride(i) for i in apart] == [x.stride(i) for i in apart]


def test_an_image_of_one_pixel_stays_as_it_was() -> None:
    """It is channels-first and channels-last at once; which it counts as, its strides say."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(2, 3, 1, 1).to(memory_format=memory_format)
        assert NF.layer_norm_channels(x).stride() == x.stride()


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """What the compiled core is asked for: the function and its arguments."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def spy(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls.append((name, arguments))
            function(*arguments)

        return call

    for name in ("columns_forward", "columns_backward"):
        monkeypatch.setattr(columns._core, name, spy(name, getattr(columns._core, name)))
    return calls


def strided(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """The same values where samples, or channels, lie further apart than they would."""
    x = normal(shape, seed, torch.float32)
    junk = torch.full_like(x, float("nan"))
    return {
        "dense": x,
        "every other sample": torch.stack([x, junk], 1)[:, 0],
        "every other channel": torch.stack([x, junk], 2)[:, :, 0],
        "a slice of the channels": torch.cat([junk, x, junk], 1)[:, shape[1] : 2 * shape[1]],
        "samples backwards in memory": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


def test_channels_first_memory_is_read_and_written_in_place(passed: list[tuple[str, tuple[Any, ...]]]) -> None:
    expected = None
    for name, x in strided((3, 5, 4, 6), 1).items():
        dout = strided((3, 5, 4, 6), 2)[name]
        leaf = x.detach().requires_grad_()
        out = NF.layer_norm_channels(leaf)
        (dx,) = torch.autograd.grad(out, leaf, dout)
        (forward, given), (backward, given_back) = passed
        assert (forward, backward) == ("columns_forward", "columns_backward"), name
        assert (given[4], given[12]) == (x.data_ptr(), out.data_ptr()), name
        assert (given_back[4], given_back[7], given_back[14]) == (dout.data_ptr(), x.data_ptr(), dx.data_ptr()), name
        expected = expected or (out.detach(), dx)
        assert_same_bits(out, expected[0], name)
        assert_same_bits(dx, expected[1], name)
        passed.clear()


def test_channels_last_memory_goes_to_the_rows(passed: list[tuple[str, tuple[Any, ...]]]) -> None:
    x = normal((3, 5, 4, 6), 1, torch.float32).to(memory_format=torch.channels_last)
    rows = NF.layer_norm(x.permute(0, 2, 3, 1), 5).permute(0, 3, 1, 2)
    assert_same_bits(NF.layer_norm_channels(x), rows, "channels-last")
    assert passed == []


def saved_by(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a call keeps for its backward, as they are handed to the saved-tensor hooks."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return packed


@every_format
def test_backward_keeps_x_itself_and_two_numbers_a_position(layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = laid(normal((3, 5, 4, 6), 1, dtype), layout).requires_grad_()
        weight, bias = (normal((5,), seed, dtype).requires_grad_() for seed in (2, 3))
        packed = saved_by(lambda x=x, weight=weight, bias=bias: NF.layer_norm_channels(x, weight, bias))
        known = {v.untyped_storage().data_ptr() for v in (x, weight)}
        new = [t for t in packed if t.untyped_storage().data_ptr() not in known]
        assert sum(t.numel() * t.element_size() for t in new) == 3 * 4 * 6 * 2 * 4
        assert [t.numel() for t in packed if t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()] == [360]


def test_results_are_the_same_where_the_core_has_no_memory_to_lend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.8, which has no exchange API."""
    x, dout = normal(MANY, 1, torch.float32), normal(MANY, 2, torch.float32)
    expected = results(x, dout)
    monkeypatch.setattr(columns._core, "empty_like", lambda x: None)
    for found, before in zip(results(x, dout), expected, strict=True):
        assert_same_bits(found, before, "memory of torch's")
        assert found.is_contiguous()


def test_large_results_lie_in_kept_memory_and_in_the_right_order() -> None:
    x = torch.randn(4, 64, 80, 80)  # 6.5 MB
    for _ in range(3):
        out, dx = results(x, x)
        assert out.is_contiguous()
        assert dx.is_contiguous()
        torch.testing.assert_close(out, torchs(x))


# --------------------------------------------------------------------------------------------------------- promises


@every_dtype
def test_a_position_has_the_same_bits_whatever_stands_beside_it(dtype: torch.dtype, isa: str) -> None:
    """In any batch, in any lane of a vector, in a tail, with 1 or 2 threads; out and dx."""
    for channels in (5, 70, 300):
        shape = (3, channels, 300)
        x, dout = ((normal(shape, seed) * 2 + 0.5).to(dtype) for seed in (1, 2))
        weight = normal((channels,), 3, dtype)
        whole = results(x, dout, weight)[:2]
        pieces = [slice(0, n) for n in (2, 5, 16, 17, 49, 129, 299)] + [slice(7, 40), slice(131, 300), slice(298, 300)]
        for piece, count in itertools.product(pieces, (1, 2)):
            with threads(count):
                found = results(x[:, :, piece], dout[:, :, piece], weight)
            for name, ours, expected in zip(("out", "dx"), found, whole, strict=False):
                assert_same_bits(ours, expected[:, :, piece], f"{name} of positions {piece}, {count} threads")
        for sample in range(3):
            found = results(x[sample : sample + 1], dout[sample : sample + 1], weight)
            for name, ours, expected in zip(("out", "dx"), found, whole, strict=False):
                assert_same_bits(ours, expected[sample : sample + 1], f"{name} of sample {sample} alone")


@every_dtype
@every_format
def test_every_result_has_the_same_bits_from_run_to_run_and_for_any_number_of_threads(
    layout: str, dtype: torch.dtype, core_by_isa: str
) -> None:
    for shape in ((9, 70, 150), (1, 20, 5000), (64, 33, 17)):
        check_deterministic(NF, NORM, shape, dtype)
        x, dout = (laid(normal(shape, seed, dtype), layout) for seed in (1, 2))
        weight, bias = (normal(shape[1:2], seed, dtype) for seed in (3, 4))
        expected = results(x, dout, weight, bias)
        for count in (1, 2, 3, 5):
            with threads(count):
                for found, before in zip(results(x, dout, weight, bias), expected, strict=True):
                    assert_same_bits(found, before, f"{shape} with {count} threads")


# ------------------------------------------------------------------------------------------------------ hard values


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_mean_costs_no_digits(layout: str, dtype: torch.dtype, backend: str) -> None:
    """E[x^2] - E[x]^2 would lose all of them in float32."""
    x = laid((normal((2, 70, 40), 1) + 1e4).to(dtype), layout)
    exact = torchs(x.double() - 1e4)  # the difference is exact, and the norm does not see it
    # what rounding takes from the mean in float32, and torch loses, the core makes good
    theirs = None if backend == "cpu" and dtype == torch.float32 else torchs(x)
    assert_exact_enough(NF.layer_norm_channels(x), exact, theirs, f"mean 1e4 in {dtype}")


@every_format
def test_channels_unlike_the_rest_are_no_harm(layout: str) -> None:
    """Where the sampled channels lie far from the mean, deviations are taken again from the mean itself."""
    for far in ([0], [69], list(range(0, 70, 4)), [i * 70 // 16 for i in range(16)]):
        x = normal((2, 70, 40), 1, torch.float32)
        x[:, far, 3::2] += 1e4  # every other position of a vector, so that the others keep what they have
        x = laid(x, layout)
        exact = torchs(x.double())
        found = NF.layer_norm_channels(x)
        assert_exact_enough(found, exact, torchs(x), f"channels {far} far off")
        alone = NF.layer_norm_channels(laid(x[:, :, 20:22].contiguous(), layout))
        assert_same_bits(found[:, :, 20:22], alone, f"channels {far} far off, two positions alone")


@every_format
@every_dtype
def test_equal_channels_become_the_bias(layout: str, dtype: torch.dtype) -> None:
    bias = normal((70,), 1, dtype)
    values = torch.tensor([7.25, -0.3, 1e4, 0.0, 1e-3, 12345.678], dtype=dtype)
    x = laid(values.expand(2, 70, 6).contiguous(), layout)
    out = NF.layer_norm_channels(x, None, bias)
    expected = bias.view(1, 70, 1).expand(2, 70, 6)
    if layout == "contiguous":
        assert_same_bits(out, expected.contiguous(), "equal channels")
    else:
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_position(layout: str, bad: float) -> None:
    check_not_finite_as_torch(NF, NORM, bad)
    for dtype in DTYPES:
        x, dout = (laid(normal(MANY, seed, dtype), layout) for seed in (1, 2))
        clean = results(x, dout)
        x[1, 4, 130] = bad
        for name, found, before in zip(("out", "dx"), results(x, dout), clean, strict=True):
            spoiled = torch.zeros(MANY, dtype=torch.bool)
            spoiled[1, :, 130] = True
            assert bool(found[spoiled].isnan().all()), f"{name} of the position with {bad}"
            assert_same_bits(found[~spoiled], before[~spoiled], f"{name} of the others")


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e20),
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 6e4),
        (torch.float64, 1e160),
        (torch.float64, 1e308),
        (torch.float32, 1e-38),
        (torch.float32, 1e-44),
        (torch.float16, 1e-7),
        (torch.float64, 1e-310),
    ],
    ids=str,
)
@every_format
def test_finite_positions_never_overflow_and_denormals_count(layout: str, dtype: torch.dtype, scale: float) -> None:
    """Every fifth position is scaled, so that those beside it are computed as ever."""
    values = normal((2, 70, 40), 1).clamp(-3, 3) / 3.1
    plain = NF.layer_norm_channels(laid(values.to(dtype), layout))
    scaled = values.clone()
    scaled[:, :, ::5] *= scale
    x = laid(scaled.to(dtype), layout)
    power = 2.0 ** -math.frexp(scale)[1] if scale > 1 else 1.0
    exact = torchs(x.double()[:, :, ::5] * power, eps=1e-5 * power**2)  # the same, and squares fit
    out = NF.layer_norm_channels(x)
    assert_exact_enough(out[:, :, ::5], exact, None, f"{dtype} about {scale:g}")
    beside = [i for i in range(40) if i % 5]
    assert_same_bits(out[:, :, beside], plain[:, :, beside], "the others")


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e18),
        (torch.float32, 1e36),
        (torch.float32, 8e37),
        (torch.float64, 1e200),
        (torch.float64, 4e307),
    ],
)
def test_gradients_of_very_large_positions_are_those_of_small_ones_scaled(dtype: torch.dtype, scale: float) -> None:
    """The norm does not see a scale, beside which eps is nothing: dx(scale x) = dx(x) / scale, dweight is the same.

    The largest elements fit their dtype, their differences do not.
    """
    values, dout = normal((2, 70, 40), 1).abs().clamp(max=1) + 2, normal((2, 70, 40), 2)
    values[:, 5] = -3.0
    weight = normal((70,), 3)
    power = 2.0 ** round(math.log2(scale))
    exact_in = [v.requires_grad_() for v in (values.to(dtype).double(), weight.to(dtype).double())]
    exact = torch.autograd.grad(torchs(*exact_in, eps=1e-30), exact_in, dout.to(dtype).double())
    scaled = values.clone()
    scaled[:, :, ::3] *= power
    _, dx, dweight = results(scaled.to(dtype), dout.to(dtype), weight.to(dtype))
    found = (dx[:, :, ::3].double() * power).to(dtype)
    # rstd and dx are denormal from 8e37 on
    assert_exact_enough(found, exact[0][:, :, ::3], None, "dx", 4 * FLOOR)
    assert bool(torch.isfinite(dweight).all())
    small = 1e-5 * abs(float(exact[1].abs().max()))
    torch.testing.assert_close(dweight.double(), exact[1], rtol=1e-4, atol=small)


def test_a_variance_of_zero_without_eps_is_nan_there_alone() -> None:
    x = normal(MANY, 1, torch.float32)
    clean = NF.layer_norm_channels(x, eps=0.0)
    x[:, :, 7] = 2.0
    out = NF.layer_norm_channels(x, eps=0.0)
    assert bool(out[:, :, 7].isnan().all())
    assert_same_bits(out[:, :, 8:], clean[:, :, 8:], "the others")


# ------------------------------------------------------------------------------------------------------- PyTorch


def image(layout: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = laid(normal((3, 5, 4, 6), 1, dtype), layout).requires_grad_()
    return x, normal((5,), 2, dtype).requires_grad_(), normal((5,), 3, dtype).requires_grad_()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_format
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_one_graph_and_keeps_the_memory_format(layout: str, dynamic: bool) -> None:
    torch.compiler.reset()
    layer = normkit.LayerNorm2d(5, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (6, 7):
        x = laid(normal((3, 5, 4, size), 1), layout).requires_grad_()
        out = compiled(x)
        close(out, torchs(x, layer.weight, layer.bias))
        close(torch.autograd.grad(out.sin().sum(), x), torch.autograd.grad(torchs(x).sin().sum(), x))
        assert out.stride() == x.stride()
    torch.compiler.reset()


@every_format
def test_inductor_compiles_forward_and_backward(layout: str) -> None:
    torch.compiler.reset()
    arguments = image(layout)
    out = torch.compile(NF.layer_norm_channels, fullgraph=True)(*arguments)
    close(out, torchs(*arguments))
    assert out.stride() == arguments[0].stride()
    found = torch.autograd.grad(out.sin().sum(), arguments)
    close(found, torch.autograd.grad(torchs(*arguments).sin().sum(), arguments))
    torch.compiler.reset()


@every_format
def test_exported_and_traced_layers_give_the_values_of_eager(layout: str) -> None:
    layer = normkit.LayerNorm2d(5, dtype=torch.float64)
    x = image(layout)[0].detach()
    close(torch.export.export(layer, (x,)).module()(x), layer(x))


@every_format
def test_transforms_agree_with_torchs(layout: str) -> None:
    x, weight, bias = (v.detach() for v in image(layout))
    tangents = tuple(torch.ones_like(v) for v in (x, weight, bias))
    ours = NF.layer_norm_channels
    close(torch.func.vmap(ours, (0, None, None))(x.unsqueeze(1), weight, bias).squeeze(1), torchs(x, weight, bias))
    close(torch.func.jvp(ours, (x, weight, bias), tangents), torch.func.jvp(torchs, (x, weight, bias), tangents))

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: function(*arguments).sin().sum()

    found = torch.func.grad(loss(ours), (0, 1, 2))(x, weight, bias)
    close(found, torch.func.grad(loss(torchs), (0, 1, 2))(x, weight, bias))


@every_format
def test_a_batched_gradient_is_the_gradients_one_by_one(layout: str) -> None:
    x, weight, _ = image(layout)
    out = NF.layer_norm_channels(x, weight)
    douts = torch.stack([torch.ones_like(out), out.detach()])
    batched = torch.autograd.grad(out, (x, weight), douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        close(tuple(g[i] for g in batched), torch.autograd.grad(out, (x, weight), dout, retain_graph=True))


class Plain(Tensor):
    """A subclass with torch's default behaviour."""


def test_a_subclass_comes_back_as_itself_and_takes_no_kernel(passed: list[tuple[str, tuple[Any, ...]]]) -> None:
    x = image("contiguous")[0].detach()
    out = NF.layer_norm_channels(x.as_subclass(Plain))
    assert type(out) is Plain
    assert passed == []
    close(out.as_subclass(Tensor), torchs(x))


def test_the_reference_backend_computes_what_the_core_does(passed: list[tuple[str, tuple[Any, ...]]]) -> None:
    arguments = [v.detach() for v in image("contiguous")]
    with normkit.use_backend("reference"):
        found = NF.layer_norm_channels(*arguments)
    assert passed == []
    close(found, NF.layer_norm_channels(*arguments))
    assert [name for name, _ in passed] == ["columns_forward"]


def test_a_profiler_shows_the_call_by_its_name() -> None:
    with torch.profiler.profile() as profile:
        NF.layer_norm_channels(torch.ones(2, 3, 4))
    assert "normkit::layer_norm_channels" in {event.key for event in profile.key_averages()}


@every_format
def test_saved_tensors_may_be_packed_away_recomputed_and_not_changed(layout: str) -> None:
    arguments = image(layout)
    expected = torch.autograd.grad(NF.layer_norm_channels(*arguments).sin().sum(), arguments)
    with saved_tensors_hooks(lambda t: t.detach().numpy().copy(), lambda array: torch.from_numpy(array)):
        out = NF.layer_norm_channels(*arguments)
    for found, before in zip(torch.autograd.grad(out.sin().sum(), arguments), expected, strict=True):
        assert_same_bits(found, before, "packed away")
    out = checkpointing.checkpoint(NF.layer_norm_channels, *arguments, use_reentrant=False)
    for found, before in zip(torch.autograd.grad(out.sin().sum(), arguments), expected, strict=True):
        assert_same_bits(found, before, "recomputed")
    x = arguments[0] * 1.0
    out = NF.layer_norm_channels(x)
    with torch.no_grad():
        x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_weight_replaced_before_backward_is_refused() -> None:
    layer = normkit.LayerNorm2d(5)
    out = layer(torch.randn(2, 5, 3, requires_grad=True))
    layer.weight.data = torch.ones(6)
    with pytest.raises(ValueError, match="backward needs what forward had, weight of 5 elements, got 6"):
        out.sum().backward()


# --------------------------------------------------------------------------------------------------------- the layer


def test_the_layer_is_a_torch_layer_norm_with_its_state_dict() -> None:
    for keywords in ({}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-3}):
        ours, theirs = normkit.LayerNorm2d(5, **keywords), nn.LayerNorm(5, **keywords)
        assert isinstance(ours, nn.LayerNorm)
        assert repr(ours) == repr(theirs).replace("LayerNorm", "LayerNorm2d")
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
        theirs.load_state_dict(ours.state_dict())
        x = normal((2, 5, 3, 4), 1, torch.float32)
        expected = theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(x), expected)
        again = normkit.LayerNorm2d(5, **keywords)
        again.load_state_dict(theirs.state_dict())
        for twin in (again, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert_same_bits(twin(x), ours(x), "a twin")


def test_the_layer_takes_a_dtype_and_trains() -> None:
    assert normkit.LayerNorm2d(3, dtype=torch.bfloat16, device="cpu").weight.dtype == torch.bfloat16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), normkit.LayerNorm2d(8), nn.GELU(), nn.Conv2d(8, 2, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x = torch.randn(16, 1, 8, 8)
    losses = []
    for _ in range(20):
        loss = (model(x).mean((2, 3)) - torch.stack([x.amax((1, 2, 3)), x.amin((1, 2, 3))], 1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


IMAGE = torch.ones(2, 3, 4, 4)
WRONG = (
    (
        lambda: NF.layer_norm_channels(IMAGE, torch.ones(4)),
        ValueError,
        "layer_norm_channels: weight must have one value per channel, shape (3,), got shape (4,); "
        "pass a weight of that shape, or None",
    ),
    (
        lambda: NF.layer_norm_channels(IMAGE, None, torch.ones(3, 1)),
        ValueError,
        "layer_norm_channels: bias must have one value per channel, shape (3,), got shape (3, 1); "
        "pass a bias of that shape, or None",
    ),
    (
        lambda: NF.layer_norm_channels(torch.ones(3)),
        ValueError,
        "layer_norm_channels: x must have at least 2 dimensions (batch, channels, ...), got x of shape (3,); "
        "add a batch dimension with x.unsqueeze(0)",
    ),
    (
        lambda: NF.layer_norm_channels(IMAGE, eps=-1.0),
        ValueError,
        "layer_norm_channels: eps must be zero or positive, got -1.0; 1e-5 is torch's default",
    ),
    (
        lambda: NF.layer_norm_channels(IMAGE.long()),
        TypeError,
        "layer_norm_channels: x must have a floating-point dtype, got torch.int64; convert it with x.float()",
    ),
    (
        lambda: NF.layer_norm_channels([1.0]),
        TypeError,
        "layer_norm_channels: x must be a torch.Tensor, got list; pass a tensor",
    ),
    (
        lambda: normkit.LayerNorm2d(4)(IMAGE),
        ValueError,
        "LayerNorm2d: x must have num_channels=4 channels in dimension 1, got x of shape (2, 3, 4, 4); "
        "pass num_channels=3 or transpose x",
    ),
    (
        lambda: normkit.LayerNorm2d(4, elementwise_affine=False)(IMAGE),
        ValueError,
        "LayerNorm2d: x must have num_channels=4 channels in dimension 1, got x of shape (2, 3, 4, 4); "
        "pass num_channels=3 or transpose x",
    ),
)


@pytest.mark.parametrize(("call", "error", "sentence"), WRONG, ids=[sentence[:60] for _, _, sentence in WRONG])
def test_a_wrong_call_is_told_in_one_sentence(
    call: Callable[[], object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == sentence


def test_two_dimensions_and_empty_images_are_taken() -> None:
    x, weight = normal((4, 5), 1, torch.float32), normal((5,), 2, torch.float32)
    assert_same_bits(NF.layer_norm_channels(x, weight), NF.layer_norm(x, 5, weight), "(B, C)")
    for shape in ((0, 5), (0, 5, 3, 3), (2, 5, 0), (2, 0, 3)):
        out, dx, dweight = results(torch.ones(shape), torch.ones(shape), torch.ones(shape[1]))
        assert out.shape == dx.shape == shape
        assert_same_bits(dweight, torch.zeros(shape[1]), f"dweight of {shape}")
