"""The short way of plain tensors (csrc/calls.cpp) gives the bits of the general way, and large results' memory is safe.

Here: norm_now, what backward does after it, BatchNorm in one call, kept memory.
Read next: test_core.py, the kernels that both ways run on.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
import normkit.functional as NF
from cases import DTYPES, HALF
from normkit import backends
from normkit.kernels import cpu
from tolerance import assert_same_bits, threads

if cpu.unavailable() is not None or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("torch here has no DLPack exchange API, or the core is off", allow_module_level=True)

core = cpu._core
WHOLE = ("norm_recorded", "norm_backward")  # of the core; of backends:
NOW = ("norm_now", "norm_backward_now", "batch_norm_now", "batch_norm_backward_now", "sample_norm_now")
LARGE = (1024, 2048)  # float32: 8 MiB, a block of kept memory


class GeneralOnly:
    """The compiled core whose whole calls answer None, as for tensors that are not plain."""

    def __getattr__(self, name: str) -> Any:
        return cpu._never if name in WHOLE else getattr(core, name)


@pytest.fixture
def generally(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function on the general way alone."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_core", GeneralOnly())
            for name in NOW:
                patch.setattr(backends, name, cpu._never)
            return function()

    return run


@pytest.fixture
def kept() -> Iterator[Callable[[], int]]:
    """Kept bytes, from none on and with the default limit."""
    before = normkit.set_kept_bytes(0)
    normkit.set_kept_bytes(before)
    yield core.kept_bytes
    normkit.set_kept_bytes(0)
    normkit.set_kept_bytes(before)


def same(found: Any, expected: Any, what: str) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(one, other, f"{what}: result {i}")


def steps(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs without a record, outputs with one, and all gradients."""
    with torch.no_grad():
        plain = call(*tensors)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = call(*leaves)
    plain, outputs = [(one,) if isinstance(one, Tensor) else tuple(one) for one in (plain, outputs)]
    douts = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) for out in outputs]
    return [*plain, *(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, douts)]


SAMPLES = ((3, 4, 7), (2, 6, 5, 3), (5, 4), (4, 300, 17), (2, 4, 9000), (1, 4, 3), (3, 8, 64, 64))


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_in_one_call_is_the_general_way_to_rounding(
    dtype: torch.dtype, last: bool, generally: Callable[[Callable[[], Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over a group's channels are added in another order, in float64.

    A last bit of the mean, 50, times the sum of dout makes dweight's error: over 20 seeds up to 1572 eps of its largest
    for one call and 3133 for the general way of (2, 4, 9000) in float64 (torch: 32678). In float32 without AVX-512 the
    two ways differ by up to 9.7 eps over 12 seeds, each up to 21 off (torch: 22911).
    """
    slack = {torch.float64: 4096, torch.float32: 8}.get(dtype, 1)
    taken = []

    def counted(*arguments: Any) -> Any:
        out = cpu.sample_norm_now(*arguments)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(backends, "sample_norm_now", counted)
    for shape in SAMPLES:
        x = torch.randn(shape) * 2 + 50
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        tensors = [x.to(dtype), torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)]
        calls: list[Callable[..., Tensor]] = [lambda x, w, b: NF.group_norm(x, 2, w, b)]
        if len(shape) > 2:
            calls.append(lambda x, w, b: NF.instance_norm(x, None, None, w, b))
        for call in calls:
            found, expected = steps(call, tensors), generally(lambda: steps(call, tensors))  # noqa: B023
            for one, other in zip(found, expected, strict=True):
                eps = torch.finfo(dtype).eps * slack
                scale = float(other.abs().max())
                torch.testing.assert_close(one, other, rtol=2 * eps, atol=2 * eps * scale, msg=f"{shape} {dtype}")
                assert one.stride() == other.stride() or 1 in shape
    assert taken.count(True) >= 20


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_group_norm_has_the_same_bits_for_any_threads_and_any_batch(dtype: torch.dtype, last: bool) -> None:
    for shape, groups in (((1, 32, 64, 64), 4), ((3, 8, 5, 7), 8), ((2, 6, 9000), 2)):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 7
        x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).to(dtype)
        tensors = [x, torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)]
        with threads(1):
            alone = steps(lambda x, w, b: NF.group_norm(x, groups, w, b), tensors)  # noqa: B023
        with threads(2):
            same(steps(lambda x, w, b: NF.group_norm(x, groups, w, b), tensors), alone, f"{shape}: 2 threads")  # noqa: B023
        same([NF.group_norm(x[:1], groups)], [NF.group_norm(x, groups)[:1]], f"{shape}: one sample")


# ------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70_001), (3, 17), (2, 5, 130), (9, 4099)], ids=str)
def test_row_norms_have_the_bits_of_the_general_way(shape: Any, dtype: torch.dtype, generally: Any) -> None:
    torch.manual_seed(1)
    size = shape[-1]
    for wide, with_bias, with_residual in itertools.product((False, True), repeat=3):
        parameters = torch.float32 if wide and dtype in HALF else dtype
        tensors = [torch.randn(shape).to(dtype), torch.randn(size).to(parameters)]
        if with_residual:
            tensors.insert(1, torch.randn(shape).to(dtype))
        if with_bias:
            tensors.append(torch.randn(size).to(parameters))

        def call(*given: Tensor, biased: bool = with_bias, added: bool = with_residual) -> Any:
            if added:
                return (NF.add_layer_norm if biased else NF.add_rms_norm)(*given[:2], given[0].shape[-1:], *given[2:])
            return (NF.layer_norm if biased else NF.rms_norm)(given[0], given[0].shape[-1:], *given[1:])

        what = f"{shape} {dtype}, wide {wide}, bias {with_bias}, residual {with_residual}"
        same(steps(call, tensors), generally(lambda: steps(call, tensors)), what)  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 1), (7, 5), (3, 6, 4, 5), (2, 3, 9001), (40, 4, 300)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_batch_norm_has_the_bits_of_the_general_way(shape: Any, last: bool, dtype: torch.dtype, generally: Any) -> None:
    torch.manual_seed(2)
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    channels = shape[1]
    tensors = [x, torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)]
    results = []
    kept_in = torch.float32 if dtype == torch.float64 else dtype  # torch.lerp in float64 is fused, ours is not
    for way in (lambda run: run(), generally):
        running = [torch.zeros(channels, dtype=kept_in), torch.ones(channels, dtype=kept_in)]

        def step(running: list[Tensor] = running) -> list[Tensor]:
            train = steps(lambda x, w, b: NF.batch_norm(x, *running, w, b, training=True), tensors)
            return [*train, *steps(lambda x, w, b: NF.batch_norm(x, *running, w, b), tensors), *running]

        results.append(way(step))
    same(*results, f"{shape} {dtype}")


def test_a_normalized_shape_of_several_axes_and_lists_give_what_a_tuple_gives() -> None:
    x = torch.randn(3, 4, 8)
    weight = torch.randn(4, 8)
    expected = NF.rms_norm(x.flatten(1), 32, weight.flatten(), 1e-6).view(3, 4, 8)
    for shape in ((4, 8), [4, 8], torch.Size((4, 8))):
        torch.testing.assert_close(NF.rms_norm(x, shape, weight, 1e-6), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_running_statistics_of_any_momentum_are_those_of_the_formula(
    momentum: float, dtype: torch.dtype, generally: Any
) -> None:
    """Also where an old value would swallow the batch's: at momentum 1 nothing of it is left."""
    x = torch.randn(64, 3) * 1e-6 + 1e-3
    updated = []
    for way in (lambda run: run(), generally):
        running = [torch.full((3,), 3e4, dtype=dtype), torch.ones(3, dtype=dtype)]
        way(lambda running=running: NF.batch_norm(x, *running, training=True, momentum=momentum))
        updated.append(running)
    torch.testing.assert_close(updated[0], updated[1], rtol=1e-14, atol=0)
    if momentum == 1.0:
        torch.testing.assert_close(updated[0][1], x.var(0).to(dtype), rtol=1e-2 if dtype in HALF else 1e-4, atol=0)


def test_a_normalized_shape_beyond_64_bits_is_a_wrong_one() -> None:
    with pytest.raises(ValueError, match="rms_norm: x must end with normalized_shape"):
        NF.rms_norm(torch.ones(2, 3), 2**70)


def test_saved_tensors_that_come_back_in_another_dtype_are_not_read_past_their_end() -> None:
    x = torch.randn(300, 17).bfloat16().requires_grad_()
    expected = torch.autograd.grad(NF.layer_norm(x, 17).float().sum(), x)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
        out = NF.layer_norm(x, 17)
    found = torch.autograd.grad(out.float().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_a_weight_replaced_between_forward_and_backward_is_refused() -> None:
    norm = normkit.LayerNorm(17)
    out = norm(torch.randn(5, 17, requires_grad=True))
    norm.weight.data = torch.ones(3)
    with pytest.raises(ValueError, match="backward needs what forward had, weight of 17 elements, got 3"):
        out.sum().backward()


def test_running_statistics_updated_in_place_are_seen_by_autograd() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    versions = mean._version, var._version
    NF.batch_norm(torch.randn(4, 3), mean, var, training=True)
    assert (mean._version, var._version) == (versions[0] + 1, versions[1] + 1)


# ------------------------------------------------------------------------------------------------- kept memory


def large_norm() -> Tensor:
    return NF.rms_norm(torch.ones(LARGE), LARGE[-1], eps=1e-6)


def test_memory_of_a_large_result_is_kept_and_taken_again(kept: Callable[[], int]) -> None:
    out = large_norm()
    assert kept() == 0
    place = out.data_ptr()
    del out
    assert kept() == LARGE[0] * LARGE[1] * 4
    again = large_norm()
    assert again.data_ptr() == place
    assert kept() == 0


def test_memory_is_not_taken_from_under_a_view(kept: Callable[[], int]) -> None:
    view = large_norm()[5]
    expected = view.clone()
    others = [large_norm() * 0 for _ in range(3)]
    assert kept() > 0
    assert_same_bits(view, expected, "a view of a result that is gone")
    assert len(others) == 3


def test_a_limit_of_zero_keeps_nothing_and_a_lower_one_gives_back(kept: Callable[[], int]) -> None:
    results = [large_norm() for _ in range(3)]
    results.clear()
    size = LARGE[0] * LARGE[1] * 4
    assert kept() == 3 * size
    limit = normkit.set_kept_bytes(size)
    assert kept() == size
    normkit.set_kept_bytes(0)
    assert kept() == 0
    large_norm()
    assert kept() == 0
    normkit.set_kept_bytes(limit)


def test_what_is_kept_makes_room_for_another_size(kept: Callable[[], int]) -> None:
    del [large_norm()][:]
    held = NF.rms_norm(torch.ones(3 * LARGE[0], LARGE[1]), LARGE[1], eps=1e-6)
    assert kept() == 0
    assert held.shape[0] == 3 * LARGE[0]


def test_results_of_every_memory_format_keep_it(kept: Callable[[], int]) -> None:
    x = torch.randn(8, 64, 64, 64).to(memory_format=torch.channels_last)
    norm = normkit.BatchNorm2d(64)
    with torch.no_grad():
        first, again = norm(x), norm(x)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(first, again, "the same batch twice")
    x = x.contiguous()
    assert norm(x).is_contiguous()


def test_threads_that_take_and_give_memory_at_once_do_not_share_it(kept: Callable[[], int]) -> None:
    wrong: list[int] = []

    def work(value: int) -> None:
        x = torch.full(LARGE, float(value))
        weight = torch.full(LARGE[-1:], float(value))
        right = all(bool((NF.rms_norm(x, LARGE[-1], weight, 0.0) == value).all()) for _ in range(20))
        if not right:
            wrong.append(value)

    workers = [threading.Thread(target=work, args=(value,)) for value in (1, 2, 3, 4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert wrong == []


def test_a_large_result_goes_where_tensors_go(kept: Callable[[], int], tmp_path: Any) -> None:
    out = large_norm()
    torch.save(out, tmp_path / "out.pt")
    assert_same_bits(torch.load(tmp_path / "out.pt"), out, "saved and loaded")
    assert_same_bits(torch.from_numpy(out.numpy().copy()), out, "through numpy")
    shared = out.clone().share_memory_()
    assert_same_bits(shared, out, "shared")
    expected = out.clone().relu_()
    assert_same_bits(out.relu_(), expected, "changed in place")


def test_a_bad_limit_says_what_is_expected() -> None:
    with pytest.raises(ValueError, match=r"^set_kept_bytes: limit must be zero or positive, got -1; 0 keeps nothing$"):
        normkit.set_kept_bytes(-1)


@pytest.mark.parametrize(
    ("given", "limit", "warning"), [("0", 0, ""), ("12345678", 12345678, ""), ("1GB", None, "1GB")]
)
def test_the_environment_names_the_limit(given: str, limit: int | None, warning: str) -> None:
    script = "import normkit; print(normkit.set_kept_bytes(0))"
    environment = {**os.environ, "NORMKIT_KEPT_BYTES": given}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    if limit is not None:
        assert int(done.stdout) == limit
    assert (warning in done.stderr) if warning else not done.stderr
