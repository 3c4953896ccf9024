"""The Triton kernels through the table of cases: on a CUDA device where one is present, else by Triton's interpreter.

The interpreter must be chosen before triton is imported, so test_triton_interpreted.py runs this file in a process of
its own; in any other process without a device these tests skip. The interpreter truncates to bfloat16 where hardware
rounds, takes a second for what a GPU does in a microsecond, and so gets the smaller half of the cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import checks
import normkit
from cases import BY_NAME, CHANNELS, DTYPES, LAYOUTS, NORMS, ROWS, Norm, make_inputs, normal
from normkit.kernels import gpu, launch
from on_device import DEVICE, INTERPRETED, Triton, moved
from tolerance import assert_same_bits

pytestmark = pytest.mark.skipif(gpu.unavailable() is not None, reason=f"no Triton here: {gpu.unavailable()}")

ours = Triton()
dtypes = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16, torch.float64) if INTERPRETED else DTYPES, ids=lambda d: str(d)[6:]
)
norms = pytest.mark.parametrize("norm", NORMS, ids=str)
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs the device itself")


@pytest.fixture
def new_plans() -> Iterator[None]:
    """Launches are planned anew before and after a test that chooses tiles of its own."""
    from normkit.kernels import triton_rows

    triton_rows.forget_plans()
    yield
    triton_rows.forget_plans()


def shapes(norm: Norm) -> tuple[tuple[int, ...], ...]:
    return norm.shapes[:1] if INTERPRETED else norm.shapes


@dtypes
@norms
def test_values_and_gradients_are_as_exact_as_torchs(norm: Norm, dtype: torch.dtype) -> None:
    for shape in shapes(norm):
        checks.check_values(ours, norm, shape, dtype)
        checks.check_gradients(ours, norm, shape, dtype)


@norms
def test_every_memory_layout_gives_the_values(norm: Norm) -> None:
    for layout in ("qkv slice", "channels-last", "misaligned", "expanded") if INTERPRETED else LAYOUTS:
        checks.check_values(ours, norm, norm.shapes[-1], torch.float32, layout)
        checks.check_gradients(ours, norm, norm.shapes[-1], torch.float32, layout)


@norms
def test_parameters_may_be_wider_than_x(norm: Norm) -> None:
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    checks.check_values(ours, norm, norm.shapes[0], dtype, parameter_dtype=torch.float32)


@on_gpu
@pytest.mark.parametrize("norm", ROWS, ids=str)
def test_sizes_around_every_block_are_right(norm: Norm) -> None:
    if norm.axes((5, 37)) == (-1,):
        checks.check_row_sizes(ours, norm)


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch, new_plans: None) -> None:
    """The interpreter takes rows of more than 64 elements for long, and keeps 4 blocks of them."""
    if INTERPRETED:
        for choose in ("rows_forward", "rows_backward"):
            monkeypatch.setattr(launch, choose, lambda *_: launch.RowTile(1, 64, 1, stages=1, programs=1))
        monkeypatch.setattr(launch.RowTile, "kept", lambda tile, size, _: min(-(-size // tile.block), 4))


LONG = [100, 300] if INTERPRETED else [12000, 16384, 32768, 40000, 65536, 131072 + 8]


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("size", LONG)
@pytest.mark.parametrize("backward", ["in registers", "by columns"])
def test_rows_too_long_for_the_chip_are_right(
    name: str, size: int, backward: str, monkeypatch: pytest.MonkeyPatch, long_rows: None
) -> None:
    if backward == "by columns":
        if INTERPRETED and name in ("rms_norm", "add_layer_norm"):
            pytest.skip("the interpreter is slow, and the other two are the halves of this one")
        tile = launch.RowTile(1, 64, 1, stages=1, programs=2) if INTERPRETED else launch.RowTile(1, 1024, 4, 3, 8)
        monkeypatch.setattr(launch, "long_columns", lambda *_: tile)
        monkeypatch.setattr(launch, "rows_backward", lambda *_: replace(tile, stages=1, programs=0))
    rows = 5 if INTERPRETED else 300  # more than programs, and no multiple of them
    checks.check_values(ours, BY_NAME[name], (rows, size), torch.float32)
    checks.check_gradients(ours, BY_NAME[name], (rows, size), torch.float32)


def exactly(name: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, with the eps that a call with x has."""
    eps = 1e-5 if name == "layer_norm" else torch.finfo(x.dtype).eps
    result: torch.Tensor = getattr(torch.nn.functional, name)(x.double(), x.shape[-1:], eps=eps)
    return result


@pytest.mark.parametrize("size", [LONG[0], LONG[-1]])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_long_rows_keep_their_digits_and_never_overflow(name: str, size: int, long_rows: None) -> None:
    x = normal((7, size), 12)
    x[1] += 1e4
    x[2] = 7.25
    x[3, 0] += 1e4  # what the others are measured from
    x[4] *= 1e30
    x[5, : size // 3] += 1e3
    x = x.float()
    found = getattr(ours, name)(x, (size,))
    added, total = getattr(ours, f"add_{name}")(x, torch.zeros_like(x), (size,))
    assert_same_bits(total, x, "total")
    assert_same_bits(added, found, "with a residual of zeros")
    assert_same_bits(getattr(ours, name)(x[3:4], (size,)), found[3:4], "a row alone")
    exact = exactly(name, x)
    if name == "layer_norm":
        assert float(found[2].abs().max()) == 0.0
    off = (found.double() - exact).abs()
    relative = off.amax(1) / exact.abs().amax(1).clamp_min(1.0)
    assert float(relative.max()) <= 1e-6, f"{name}: {relative.tolist()}"
    assert float(off[3, 1:].max()) <= 2e-7, f"{name} beside one large value"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_long_row(name: str, bad: float, long_rows: None) -> None:
    size = LONG[-1]
    x = normal((5, size), 7).float()
    x[1, 2], x[3, size - 1] = bad, -bad
    found, theirs = getattr(ours, name)(x, (size,)), getattr(torch.nn.functional, name)(x, (size,))
    assert torch.equal(torch.isnan(found), torch.isnan(theirs))
    off = (found.double() - exactly(name, x))[0::2].abs().max()
    assert float(off) <= 1e-6


@pytest.mark.parametrize("size", [37, LONG[0]])
def test_a_large_first_element_costs_the_others_no_digits(size: int, long_rows: None) -> None:
    x = normal((5, size), 13)
    x[:, 0] = 1e4
    off = (ours.layer_norm(x.float(), (size,)).double() - exactly("layer_norm", x.float())).abs()
    assert float(off[:, 1:].max()) <= 2e-7


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("size", [37, LONG[0]])
def test_no_gradient_is_nan_where_the_mean_in_deviations_overflows(size: int, long_rows: None) -> None:
    x = torch.full((3, size), 2e36, requires_grad=True)
    weight = torch.ones(size, requires_grad=True)
    out = ours.layer_norm(x, (size,), weight, torch.zeros(size), 1e-5)
    for gradient in torch.autograd.grad(out, (x, weight), normal((3, size), 1).float()):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("norm", ROWS, ids=str)
def test_programs_that_take_tiles_in_turn_give_the_values(
    norm: Norm, monkeypatch: pytest.MonkeyPatch, new_plans: None
) -> None:
    monkeypatch.setattr(launch, "rows_forward", lambda size, *_: launch.RowTile(2, launch.power_of_two(size), 1, 2, 1))
    shape = (13, 37) if norm.axes((5, 37)) == (-1,) else norm.shapes[0]
    checks.check_values(ours, norm, shape, torch.float32)


@on_gpu
@pytest.mark.parametrize("norm", ROWS, ids=str)
def test_a_row_is_the_same_whatever_the_others(norm: Norm) -> None:
    if norm.axes((5, 37)) == (-1,):
        for dtype in (torch.float32, torch.bfloat16):
            checks.check_rows_alone(ours, norm, dtype)


@norms
def test_every_run_gives_the_same_bits(norm: Norm) -> None:
    checks.check_deterministic(ours, norm, norm.shapes[0], torch.float32)


CHECKS = [
    "total as stored",
    "large mean",
    "large mean costs nothing",
    "a start unlike the rest",
    "large values",
    "not finite",
    "running statistics",
    "running statistics outside backpropagation",
    "eval alone",
    "empty batch",
]
# values of bfloat16, or 2^17 elements: not for the interpreter
NOT_INTERPRETED = {"large mean", "total as stored", "large values", "a start unlike the rest", "not finite"}


@pytest.mark.parametrize("name", CHECKS)
def test_hard_values(name: str) -> None:
    if INTERPRETED and name in NOT_INTERPRETED:
        pytest.skip("its sizes or its bfloat16 are not for the interpreter")
    checks.CHECKS[name](ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_finite_rows_never_overflow_and_constant_rows_become_bias(dtype: torch.dtype) -> None:
    scale = 1e30 if dtype == torch.float32 else 1e4
    x = (normal((5, 37), 6) * scale).to(dtype)
    x[2] = scale
    for name in ("layer_norm", "rms_norm"):
        found = getattr(ours, name)(x, (37,), eps=1e-5).double()
        exact = getattr(torch.nn.functional, name)(x.double(), (37,), eps=1e-5)
        assert float((found - exact).abs().max()) < 4e-7 if dtype == torch.float32 else 2e-3
    assert ours.layer_norm(x, (37,))[2].abs().max() == 0.0


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x = normal((5, 37), 7).float()
    x[1, 2] = bad
    for name in ("layer_norm", "rms_norm"):
        found, theirs = getattr(ours, name)(x, (37,)), getattr(torch.nn.functional, name)(x, (37,))
        assert torch.equal(torch.isnan(found), torch.isnan(theirs)), name


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("mode", ["training", "eval"])
def test_masked_batch_norm_reads_no_invalid_position(layout: str, mode: str) -> None:
    shape = (3, 5, 11)
    values = normal(shape, 31).float()
    mask = torch.rand((3, 11), generator=torch.Generator().manual_seed(1)) > 0.4
    mask[1] = False
    x = LAYOUTS[layout](torch.where(mask.unsqueeze(1), values, torch.nan)).requires_grad_()
    dout = torch.where(mask.unsqueeze(1), normal(shape, 32).float(), torch.nan)
    mean, var = torch.zeros(5), torch.ones(5)
    out = ours.batch_norm(x, mean, var, training=mode == "training", mask=moved(mask))
    (dx,) = torch.autograd.grad(out, x, dout)
    out = out.detach()
    flat = x.detach().movedim(1, -1)[mask].double().requires_grad_()
    zeros, ones = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    exact = torch.nn.functional.batch_norm(flat, zeros, ones, training=mode == "training")
    (exact_dx,) = torch.autograd.grad(exact, flat, dout.movedim(1, -1)[mask].double())
    exact = exact.detach()
    assert float((out.movedim(1, -1)[mask].double() - exact).abs().max()) < 1e-6
    assert float((dx.movedim(1, -1)[mask].double() - exact_dx).abs().max()) < 2e-6
    assert float(out.movedim(1, -1)[~mask].abs().max()) == 0.0
    assert float(dx.movedim(1, -1)[~mask].abs().max()) == 0.0
    assert float((mean.double() - zeros).abs().max()) < 1e-6
    assert float((var.double() - ones).abs().max()) < 1e-6


SMALL_MAPS = (40, 8, 3, 3) if INTERPRETED else (256, 512, 7, 7)  # more planes than a tile has, and samples


@pytest.fixture
def planes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter goes through small tensors by planes too."""
    from normkit.kernels import triton_channels

    triton_channels.forget_plans()
    if INTERPRETED:
        monkeypatch.setattr(launch, "planes", lambda batch, channels, space, itemsize: space > 1)
        monkeypatch.setattr(launch, "plane_blocks", lambda *_: 2)
    yield
    triton_channels.forget_plans()


def by_sample_only(values: torch.Tensor) -> torch.Tensor:
    """Samples with something between them: dense within each."""
    return torch.cat([values, torch.full_like(values, torch.nan)], 1)[:, : values.shape[1]]


@dtypes
@pytest.mark.parametrize("norm", CHANNELS[:3], ids=str)
def test_small_maps_by_planes_are_as_exact_as_torchs(norm: Norm, dtype: torch.dtype, planes: None) -> None:
    if INTERPRETED and dtype != torch.float32 and norm is not CHANNELS[0]:
        pytest.skip("the interpreter is slow, and the first norm does all that the others do")
    checks.check_values(ours, norm, SMALL_MAPS, dtype)
    checks.check_gradients(ours, norm, SMALL_MAPS, dtype)


def test_samples_of_small_maps_may_lie_apart_and_move_running_statistics(planes: None) -> None:
    from normkit.kernels import triton_channels

    x = by_sample_only(moved((normal(SMALL_MAPS, 5) * 3 + 1).float()))
    assert not x.is_contiguous()
    channels, space = SMALL_MAPS[1], SMALL_MAPS[2] * SMALL_MAPS[3]
    found = triton_channels.partial_moments(x.flatten(2), False, None, False)
    assert found.shape[2:] == (channels, space)
    statistics = {"ours": [torch.zeros(channels), torch.ones(channels)]}
    statistics["exact"] = [each.double() for each in statistics["ours"]]
    out = ours.batch_norm(x, *statistics["ours"], training=True)
    exact = torch.nn.functional.batch_norm(x.cpu().double(), *statistics["exact"], training=True)
    assert float((out.double() - exact).abs().max()) < 1e-6
    for mine, theirs in zip(*statistics.values(), strict=True):
        assert float((mine.double() - theirs).abs().max()) < 1e-6
    mask = torch.rand((SMALL_MAPS[0], *SMALL_MAPS[2:])) > 0.5  # has a byte for each position: not by planes
    masked = ours.batch_norm(x, None, None, training=True, mask=moved(mask)).movedim(1, -1)[mask].double()
    exact = torch.nn.functional.batch_norm(x.cpu().movedim(1, -1)[mask].double(), None, None, training=True)
    assert float((masked - exact).abs().max()) < 1e-6


@pytest.mark.parametrize("cut", [(slice(None), slice(8), slice(1, 10)), (slice(1, None, 2),)])
def test_small_maps_cut_from_larger_ones(cut: tuple[slice, ...], planes: None) -> None:
    x = normal((40, 16, 11), 3).float()[cut]
    out = ours.batch_norm(moved(x), None, None, training=True)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    assert float((out.double() - exact).abs().max()) < 1e-6


@pytest.mark.parametrize("layout", ["misaligned"] if INTERPRETED else LAYOUTS)
def test_small_maps_in_every_layout(layout: str, planes: None) -> None:
    checks.check_values(ours, CHANNELS[0], SMALL_MAPS, torch.float32, layout)
    checks.check_gradients(ours, CHANNELS[0], SMALL_MAPS, torch.float32, layout)


def test_many_parts_are_merged_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from normkit.kernels import triton_batch_norm, triton_channels

    merged = []

    def first(partial: torch.Tensor) -> torch.Tensor:
        merged.append(triton_channels.merged_first(partial))
        return merged[-1]

    monkeypatch.setattr(launch, "merged_first", lambda *_: True)
    monkeypatch.setattr(triton_batch_norm, "merged_first", first)
    checks.check_values(ours, CHANNELS[0], (20, 37, 80), torch.float32)
    assert [tuple(parts.shape) for parts in merged] == [(3, 1, 37, 1)]


def layer(**policies: Any) -> normkit.BatchNorm1d:
    return normkit.BatchNorm1d(5, **policies).to(DEVICE)


def test_layers_count_their_batches_and_keep_nan_out() -> None:
    norm, plain = layer(), torch.nn.BatchNorm1d(5)
    with normkit.use_backend("triton"):
        for seed in range(3):
            x = normal((7, 5), seed).float()
            norm(moved(x))
            plain(x)
        bad = normal((7, 5), 9).float()
        bad[0, 3] = torch.nan
        assert bool(torch.isnan(norm(moved(bad))).any())
    assert int(norm.num_batches_tracked) == 3
    if not INTERPRETED:  # on a CPU, where waiting costs nothing, a refused batch is told at once
        assert norm.nonfinite_batches == 1
    torch.testing.assert_close(norm.running_mean.cpu(), plain.running_mean)
    torch.testing.assert_close(norm.running_var.cpu(), plain.running_var)


@on_gpu
@pytest.mark.parametrize("training", [True, False])
def test_a_small_input_is_torchs_own_and_a_small_bad_batch_still_refused(training: bool) -> None:
    x = moved(normal((7, 5), 1).float())
    assert_same_bits(normkit.functional.layer_norm(x, 5), torch.nn.functional.layer_norm(x, (5,)), "layer_norm")
    assert_same_bits(normkit.functional.rms_norm(x, 5), torch.nn.functional.rms_norm(x, (5,)), "rms_norm")
    assert gpu.has_kernels(x.get_device())
    for name in ("layer_norm", "rms_norm"):  # torch finds it out, and the way that follows says it
        with pytest.raises(RuntimeError, match="same device"):
            getattr(normkit.functional, name)(x, 5, torch.ones(5))
    norm, plain = layer().train(training), torch.nn.BatchNorm1d(5).to(DEVICE).train(training)
    for seed in range(3):
        x = moved(normal((7, 5), seed).float())
        assert_same_bits(norm(x), plain(x), "batch_norm")
    assert_same_bits(norm.running_mean, plain.running_mean, "running_mean")
    assert_same_bits(norm.running_var, plain.running_var, "running_var")
    assert int(norm.num_batches_tracked) == int(plain.num_batches_tracked)
    if training:
        before, version = norm.running_var.clone(), norm.running_var._version
        x[0, 3] = torch.nan
        assert bool(torch.isnan(norm(x)).any())
        assert_same_bits(norm.running_var, before, "running_var after NaN")
        assert norm.running_var._version > version
        assert norm.nonfinite_batches == 1
        assert int(norm.num_batches_tracked) == int(plain.num_batches_tracked)


def test_a_momentum_that_changes_with_every_batch_is_followed() -> None:
    norm, plain = layer(momentum=None), torch.nn.BatchNorm1d(5, momentum=None)
    with normkit.use_backend("triton"):
        for seed in range(4):
            x = normal((7, 5), seed).float()
            norm(moved(x))
            plain(x)
    torch.testing.assert_close(norm.running_var.cpu(), plain.running_var)


def test_running_statistics_know_that_they_were_changed() -> None:
    norm = layer()
    before = norm.running_mean._version
    with normkit.use_backend("triton"):
        norm(moved(normal((7, 5), 1).float()))
    assert norm.running_mean._version > before


def test_grids_do_not_depend_on_what_the_rows_hold() -> None:
    norm = BY_NAME["layer_norm"]
    inputs = make_inputs(norm, (64, 37), torch.float32)
    (whole,) = (ours.layer_norm(inputs["x"], (37,), inputs["weight"], inputs["bias"]),)
    part = ours.layer_norm(inputs["x"][3:4], (37,), inputs["weight"], inputs["bias"])
    assert_same_bits(part, whole[3:4], "a row alone")


@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("norm", [BY_NAME["layer_norm"], BY_NAME["rms_norm"], *CHANNELS[:1]], ids=str)
def test_calls_are_captured_by_cuda_graphs_and_wait_for_nothing(norm: Norm) -> None:
    made = {name: moved(value) for name, value in make_inputs(norm, (64, 256), torch.float32).items()}

    def step() -> tuple[torch.Tensor, ...]:
        leaves = {name: value.detach().requires_grad_() for name, value in made.items()}  # of the stream in use
        out = norm.call(normkit.functional, **leaves)
        return (out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)))

    with normkit.use_backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = step()
            try:
                torch.cuda.set_sync_debug_mode("error")
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for value in found:
            value.detach().fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    for ours_, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours_.cpu(), theirs.cpu(), f"{norm} replayed")


@on_gpu
def test_offsets_beyond_32_bits_reach_the_last_row() -> None:
    rows, size = 2**31 // 4096 + 3, 4096
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    x = torch.ones((rows, size), dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.arange(size, device=DEVICE)
    with normkit.use_backend("triton"):
        out = normkit.functional.layer_norm(x, (size,))
    assert_same_bits(out[-1].cpu(), ours.layer_norm(x[-1:].cpu(), (size,))[0], "the last row")
    assert float(out[-2].abs().max()) == 0.0
