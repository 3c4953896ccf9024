"""recompute_statistics: pooled statistics of the data, on any ranks, with nothing else of the model changed."""

from __future__ import annotations

import copy
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import normkit
from cases import normal
from ranks import on_ranks, outcomes
from tolerance import assert_same_bits, bits

NAN = float("nan")
SIZES = (7, 1, 30, 2, 12)
Numbers = tuple[Any, Any]


def uneven(channels: int = 4, sizes: Sequence[int] = SIZES, space: tuple[int, ...] = (5,)) -> list[Tensor]:
    """Batches whose means lie apart, around 1e4."""
    return [
        normal((size, channels, *space), seed) * (seed + 1) + 1e4 + 10 * seed
        for seed, size in enumerate(sizes, start=1)
    ]


def exact(batches: Sequence[Tensor]) -> Numbers:
    """Mean and unbiased variance of all values of a channel, by the definition, in float64."""
    values = np.concatenate([np.moveaxis(x.double().numpy(), 1, -1).reshape(-1, x.shape[1]) for x in batches])
    mean = values.sum(0) / len(values)
    return mean, ((values - mean) ** 2).sum(0) / (len(values) - 1)


def recompute(model: nn.Module, loader: Any, **options: Any) -> normkit.Recomputation:
    return normkit.recompute_statistics(model, loader, progress=False, **options)


def assert_statistics(layer: Any, expected: Numbers, rtol: float = 1e-12) -> None:
    for found, right in zip((layer.running_mean, layer.running_var), expected, strict=True):
        np.testing.assert_allclose(found.double().numpy(), right, rtol=rtol)


def state(model: nn.Module) -> list[Any]:
    """Everything a call might leave behind, as bits or objects."""
    found: list[Any] = []
    for module in model.modules():
        found += [module.training, len(module._forward_pre_hooks), getattr(module, "momentum", None)]
        found += [getattr(module, name, None) for name in ("frozen", "deferred", "pending", "track_running_stats")]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found += [id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.grad]
                found += bits(tensor.detach()).flatten().tolist()
    return [*found, torch.get_rng_state().tolist()]


class Net(nn.Module):
    """Convolutions, dropout, and modes and numbers that differ from layer to layer."""

    def __init__(self, norms: Any = normkit) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 5, 3)
        self.norm1, self.norm2 = norms.BatchNorm2d(3, momentum=0.3), norms.BatchNorm2d(5, momentum=None)
        self.drop = nn.Dropout(0.5)
        self.double()
        self.norm1.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.second(self.drop(self.norm1(self.first(x))).relu()))


def net(norms: Any = normkit) -> Net:
    """Trained a little; a module in eval mode within one that trains."""
    torch.manual_seed(3)
    made = Net(norms)
    for seed in range(3):
        made(normal((4, 2, 8, 8), seed))
    made.train().norm1.eval()
    return made


def images(sizes: Sequence[int] = (6, 3, 9)) -> list[Tensor]:
    return [normal((size, 2, 8, 8), 10 + seed) * seed + seed for seed, size in enumerate(sizes, start=1)]


# ------------------------------------------------------------------------------------------------------- numbers


def test_uneven_batches_far_from_zero_pool_to_the_statistics_of_all_values(backend: str) -> None:
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-7)):
        batches = [x.to(dtype) for x in uneven()]
        for layer in (normkit.BatchNorm1d(4, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype)):
            found = recompute(layer, batches)
            assert_statistics(layer, exact(batches), rtol)
            assert found[""].count == 5 * sum(SIZES)
            assert found.batches == len(SIZES)


@given(cuts=st.lists(st.integers(2, 38), max_size=6, unique=True), shift=st.sampled_from([0.0, 1e4, -1e6]))
def test_no_cut_into_batches_changes_the_statistics(cuts: list[int], shift: float) -> None:
    data = normal((40, 3), 1) * 2 + torch.arange(40).unsqueeze(1) + shift
    layer = normkit.BatchNorm1d(3, dtype=torch.float64, one_value="skip")
    recompute(layer, torch.tensor_split(data, sorted(cuts)))
    assert_statistics(layer, exact([data]), 1e-11)


def test_averages_of_batch_variances_are_something_else() -> None:
    """Where batches are sorted, all of the variance lies between them."""
    batches = [torch.full((8, 1), float(value)) + torch.tensor([[0.0], [1.0]] * 4) for value in (0, 100)]
    ours, theirs = normkit.BatchNorm1d(1), nn.BatchNorm1d(1)
    recompute(ours, batches)
    update_bn(batches, theirs)
    mean, variance = exact(batches)
    assert_statistics(ours, (mean, variance), 1e-6)
    assert float(theirs.running_mean) == pytest.approx(float(mean[0]))
    assert float(theirs.running_var) < 1e-3 * float(variance[0])


@pytest.mark.parametrize("norms", [normkit, nn], ids=["normkit", "torch.nn"])
def test_one_batch_without_dropout_is_what_update_bn_finds(norms: Any) -> None:
    ours = net(norms)
    ours.drop.p = 0.0
    theirs = copy.deepcopy(ours)
    recompute(ours, images((8,)))
    update_bn(images((8,)), theirs)
    for mine, other in ((ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2)):
        torch.testing.assert_close(mine.running_mean, other.running_mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(mine.running_var, other.running_var, rtol=1e-11, atol=1e-12)


def by_hand(model: Net, batches: list[Tensor], with_found: bool) -> list[Numbers]:
    """Both layers' statistics, where the first hands on its batch's statistics or those of all batches."""

    def normalized(x: Tensor) -> Tensor:
        values = x.detach().numpy()
        mean, variance = first if with_found else (values.mean((0, 2, 3)), values.var((0, 2, 3)))
        mean, variance = mean.reshape(1, -1, 1, 1), variance.reshape(1, -1, 1, 1)
        weight, bias = (p.detach().numpy().reshape(1, -1, 1, 1) for p in (model.norm1.weight, model.norm1.bias))
        return torch.from_numpy((values - mean) / np.sqrt(variance + model.norm1.eps) * weight + bias)

    with torch.no_grad():
        inputs = [model.first(x) for x in batches]
        first = exact(inputs)
        return [first, exact([model.second(normalized(x).relu()) for x in inputs])]


@pytest.mark.parametrize("norms", [normkit, nn], ids=["normkit", "torch.nn"])
def test_one_pass_hands_on_batches_and_more_passes_what_eval_sees(norms: Any) -> None:
    model, batches = net(norms), images()
    nn.init.uniform_(model.norm1.weight, 0.5, 2.0)
    one = recompute(model, batches)
    for layer, right in zip((model.norm1, model.norm2), by_hand(model, batches, False), strict=True):
        assert_statistics(layer, right, 1e-10)
    many = recompute(model, batches, passes=100)
    final = by_hand(model, batches, True)
    for layer, right in zip((model.norm1, model.norm2), final, strict=True):
        assert_statistics(layer, right, 1e-10)
    assert np.abs(by_hand(model, batches, False)[1][0] - final[1][0]).max() > 0.01  # they do differ
    assert (one.passes, one.settled, many.passes, many.settled) == (1, False, 3, True)


def test_settled_statistics_are_those_of_the_eval_pass() -> None:
    """Measured from outside, in eval, after the call."""
    model, batches = net(), images()
    recompute(model, batches, passes=10)
    seen: dict[nn.Module, list[Tensor]] = {model.norm1: [], model.norm2: []}
    for layer in seen:
        layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0].detach()))
    model.eval()
    for x in batches:
        model(x)
    for layer, inputs in seen.items():
        assert_statistics(layer, exact(inputs), 1e-10)


def test_masks_and_lengths_given_to_the_layer_count(backend: str) -> None:
    batches = uneven(sizes=(7, 3, 12))
    masks = [torch.rand(len(x), 5, generator=torch.Generator().manual_seed(len(x))) < 0.6 for x in batches]
    masks[1][:] = False  # a batch without a valid position
    lengths = [torch.arange(len(x)) % 6 for x in batches]
    for valid, how in (
        (masks, lambda norm, pair: norm(pair[0], mask=pair[1])),
        (masks, lambda norm, pair: norm(input=pair[0], mask=pair[1])),
        (masks, lambda norm, pair: norm(pair[0], pair[1])),
        ([torch.arange(5) < each.unsqueeze(1) for each in lengths], lambda n, p: n(p[0], lengths=p[1].sum(1))),
    ):
        dirty = [x.masked_fill(~mask.unsqueeze(1), NAN) for x, mask in zip(batches, valid, strict=True)]
        layer = normkit.BatchNorm1d(4, dtype=torch.float64)
        found = recompute(layer, list(zip(dirty, valid, strict=True)), forward=how)
        values = torch.cat([x.movedim(1, -1)[mask] for x, mask in zip(batches, valid, strict=True)])
        assert_statistics(layer, exact([values]))
        assert found[""].count == len(values)
        assert found[""].skipped == 0


def test_a_layer_in_two_places_pools_all_its_calls_and_is_found_once() -> None:
    norm = normkit.BatchNorm1d(4, dtype=torch.float64)
    model = nn.ModuleDict({"a": norm, "b": norm})
    batches = uneven()
    found = recompute(model, batches, forward=lambda model, x: (model["a"](x), model["b"](3 * x)))
    assert_statistics(norm, exact([*batches, *(3 * x for x in batches)]))
    assert list(found) == ["a"]


def test_dropout_is_off_unless_forward_says_otherwise() -> None:
    model = nn.Sequential(nn.Dropout(0.5), normkit.BatchNorm1d(4, dtype=torch.float64))
    recompute(model, uneven())
    assert_statistics(model[1], exact(uneven()))
    tracked = int(model[1].num_batches_tracked)
    recompute(model, uneven(), forward=lambda model, x: model.train()(x))  # as the paper's code does
    assert float(model[1].running_var.min()) > 1e7  # half of 1e4 is 0, the other half 2e4
    assert int(model[1].num_batches_tracked) == tracked


def test_the_result_says_how_far_the_averages_were_off() -> None:
    layer = normkit.BatchNorm1d(2, eps=2.0, dtype=torch.float64)
    layer.running_mean.copy_(torch.tensor([1.0, 5.0]))
    layer.running_var.copy_(torch.tensor([10.0, 1.0]))
    data = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [2.0, 6.0]], dtype=torch.float64)  # means 0, 2; variances 4, 12
    found = recompute(layer, [data])
    assert found[""].mean_shift == pytest.approx(3 / 14**0.5)  # against 1 / sqrt(6) in the first channel
    assert found[""].variance_ratio == pytest.approx(14 / 3)  # against 12 / 6
    again = recompute(layer, [data])
    assert (again[""].mean_shift, again[""].variance_ratio) == (0.0, 1.0)


def test_the_result_reads_well() -> None:
    model = nn.ModuleDict({name: normkit.BatchNorm1d(1) for name in ("a", "cold", "unused")})
    model["cold"].freeze()
    data = [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0], [6.0]]), torch.tensor([[NAN], [1.0]])]
    with pytest.warns(UserWarning, match="recompute_statistics") as said:
        found = recompute(model, data, forward=lambda model, x: (model["a"](x), model["cold"](x)))
    assert repr(found).splitlines() == [
        "recompute_statistics: batches 3, passes 1",
        "  a: 5 values, mean off by 1.18 std, variance by 26 x, 1 calls with NaN or infinity skipped",
        "  cold: 5 values, mean off by 1.18 std, variance by 26 x, 1 calls with NaN or infinity skipped (frozen)",
        "  unused: never ran",
    ]
    assert found.left_alone == {"cold": "frozen", "unused": "never ran"}
    assert {str(warning.message).split(": ")[1] for warning in said} == {
        "running statistics left alone of unused (never ran)",
        "calls with NaN or infinity left out of a (1), cold (1)",
    }
    assert all(warning.filename == __file__ for warning in said)


# ---------------------------------------------------------------------------------------------- nothing else moves


def test_only_the_running_statistics_change_in_place() -> None:
    model = net()
    before = state(model)
    loader = torch.utils.data.DataLoader(torch.cat(images()), batch_size=4, shuffle=True)  # it draws random numbers
    recompute(model, loader, passes=2)
    after = state(model)
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    assert changed == 2 * (3 + 5)


class Stop(Exception):
    pass


def failing_loader() -> Iterator[Tensor]:
    yield from images()
    raise Stop


def failing_forward(at: int) -> Callable[[nn.Module, Tensor], None]:
    count = iter(range(at + 1))

    def forward(model: nn.Module, x: Tensor) -> None:
        model.train()
        model(x)
        torch.rand(3)
        if next(count) == at:
            raise Stop

    return forward


@pytest.mark.parametrize("norms", [normkit, nn], ids=["normkit", "torch.nn"])
def test_an_error_leaves_everything_as_it_was(norms: Any) -> None:
    model = net(norms)
    before = state(model)
    for attempt in (
        lambda: recompute(model, failing_loader()),
        lambda: recompute(model, images(), forward=failing_forward(1)),
        lambda: recompute(model, images(), forward=failing_forward(4), passes=3),
    ):
        with pytest.raises(Stop):
            attempt()
        assert state(model) == before
    with pytest.raises(ValueError, match=r"at least one batch, got none"):
        recompute(model, [])
    assert state(model) == before
    with warnings.catch_warnings():  # a warning that is an error comes before the first change
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=re.escape("left alone of norm2 (never ran)")):
            recompute(model, images(), forward=lambda model, x: model.norm1(model.first(x)))
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_buffers_keep_their_dtype_and_round_once(dtype: torch.dtype) -> None:
    batches = [(x - 1e4).to(dtype) for x in uneven()]
    layer = normkit.BatchNorm1d(4, dtype=dtype)
    recompute(layer, batches)
    for found, right in zip((layer.running_mean, layer.running_var), exact(batches), strict=True):
        assert_same_bits(found, torch.from_numpy(right).to(dtype), str(dtype))


def test_gradients_are_not_made() -> None:
    model = net()
    outs: list[Tensor] = []
    recompute(model, images(), forward=lambda model, x: outs.append(model(x)))
    assert not any(out.requires_grad for out in outs)
    with torch.enable_grad():
        recompute(model, images(), forward=torch.enable_grad()(lambda model, x: outs.append(model(x))))
    assert not model.norm1.running_mean.requires_grad


# --------------------------------------------------------------------------------------------- layers with policies


def test_a_layer_that_never_ran_is_named_and_left_alone() -> None:
    model = net()
    before = copy.deepcopy(model.norm2)
    with pytest.warns(UserWarning, match=re.escape("running statistics left alone of norm2 (never ran)")):
        found = recompute(model, images(), forward=lambda model, x: model.norm1(model.first(x)), passes=4)
    assert list(found) == ["norm1"]
    assert found.left_alone == {"norm2": "never ran"}
    assert_same_bits(model.norm2.running_var, before.running_var, "running_var")


def test_frozen_layers_are_measured_and_hand_on_their_own_statistics() -> None:
    model = net()
    model.norm1.freeze()
    before = copy.deepcopy(model)
    found = recompute(model, images())
    assert_same_bits(model.norm1.running_mean, before.norm1.running_mean, "running_mean")
    assert model.norm1.frozen
    assert found["norm1"].mean_shift > 0
    with torch.no_grad():
        first = [model.norm1(model.first(x)) for x in images()]  # frozen: as in eval
        assert_statistics(model.norm2, exact([model.second(x.relu()) for x in first]), 1e-10)
    with normkit.frozen_statistics(model):
        measured = recompute(model, images())
    assert measured["norm2"].mean_shift < 1e-6
    assert measured.settled


def test_what_accumulated_stays_pending() -> None:
    layer = normkit.BatchNorm1d(4, momentum=0.5, dtype=torch.float64)
    with normkit.accumulate_statistics(layer):
        layer(uneven()[0])
        pending = layer.pending
        recompute(layer, uneven())
        assert layer.pending is pending
        assert layer.deferred
        assert_statistics(layer, exact(uneven()))
    mean, variance = exact(uneven()[:1])
    total = exact(uneven())
    assert_statistics(layer, ((total[0] + mean) / 2, (total[1] + variance) / 2))


def poisoned() -> list[Tensor]:
    batches = uneven()
    batches[2] = batches[2].clone()
    batches[2][3, 1, 2] = NAN
    batches[4] = batches[4].clone()
    batches[4][0, 0, 0] = float("inf")
    return batches


@pytest.mark.parametrize("norms", [normkit, nn], ids=["normkit", "torch.nn"])
def test_calls_that_are_not_finite_are_left_out_counted_and_told(norms: Any, backend: str) -> None:
    model = nn.Sequential(norms.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 3), norms.BatchNorm1d(3)).double()
    fine = copy.deepcopy(model)
    batches, left = poisoned(), [uneven()[i] for i in (0, 3)]
    batches.pop(1)  # one sample is one value per channel for the second
    with pytest.warns(UserWarning, match=re.escape("calls with NaN or infinity left out of 0 (2), 3 (2)")):
        found = recompute(model, batches)
    recompute(fine, left)
    for layer, other in ((model[0], fine[0]), (model[3], fine[3])):
        assert_same_bits(layer.running_mean, other.running_mean, "running_mean")
        assert_same_bits(layer.running_var, other.running_var, "running_var")
    assert [one.skipped for one in found.values()] == [2, 2]


def test_raise_refuses_and_allow_pools_what_is_not_finite() -> None:
    model = nn.ModuleDict({"inner": normkit.BatchNorm1d(4, nonfinite="raise", dtype=torch.float64)})
    before = state(model)
    with pytest.raises(ValueError, match=r"got NaN or infinity in layer inner; nothing was changed"):
        recompute(model, poisoned(), forward=lambda model, x: model["inner"](x))
    assert state(model) == before
    layer = normkit.BatchNorm1d(4, nonfinite="allow", dtype=torch.float64)
    recompute(layer, poisoned())
    assert layer.running_mean.isnan().tolist() == [False, True, False, False]
    assert bool(layer.running_mean[0].isinf())


def test_a_layer_without_a_finite_call_is_left_alone() -> None:
    layer = normkit.BatchNorm1d(4, dtype=torch.float64)
    before = layer.running_var.clone()
    with pytest.warns(UserWarning, match=re.escape("left alone of (the model) (NaN or infinity in 2 of 2 calls)")):
        recompute(layer, [torch.full((3, 4), NAN, dtype=torch.float64)] * 2, passes=3)
    assert_same_bits(layer.running_var, before, "running_var")


@pytest.mark.parametrize("norms", [normkit, nn], ids=["normkit", "torch.nn"])
def test_one_value_per_channel_follows_its_policy_in_the_first_pass(norms: Any) -> None:
    data = [normal((5, 3), 1), normal((1, 3), 2), normal((4, 3), 3)]
    sentence = (
        "needs more than 1 value per channel to be normalized with its own statistics, got 1 in layer (the model)"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        recompute(norms.BatchNorm1d(3).double(), data)


@pytest.mark.parametrize("policy", ["running", "skip"])
def test_a_single_value_counts_in_the_pool(policy: str) -> None:
    data = [normal((5, 3), 1), normal((1, 3), 2), normal((4, 3), 3)]
    layer = normkit.BatchNorm1d(3, one_value=policy, dtype=torch.float64)
    old, outs = copy.deepcopy(layer).eval(), []
    recompute(layer, data, forward=lambda model, x: outs.append(model(x)))
    assert_statistics(layer, exact(data))
    torch.testing.assert_close(outs[1], old(data[1]).detach() if policy == "running" else torch.zeros_like(data[1]))
    with pytest.warns(UserWarning, match="no variance of fewer than 2 values per channel"):
        recompute(layer, data[1:2])
    assert_statistics(layer, exact(data))


def test_layers_that_do_not_track_are_no_part_of_it() -> None:
    model = nn.Sequential(
        normkit.BatchNorm1d(4, track_running_stats=False), normkit.BatchNorm1d(4), nn.InstanceNorm1d(4)
    )
    assert list(recompute(model, [x.float() for x in uneven()])) == ["1"]
    model[1].track_running_stats = False  # of a layer that has them: eval uses them, and nothing moves them
    with pytest.raises(ValueError, match="must hold a BatchNorm with running statistics, got Sequential with none"):
        recompute(model, uneven())
    with pytest.raises(ValueError, match=re.escape("got 0 not yet initialized; run the model on a batch first")):
        recompute(nn.Sequential(nn.LazyBatchNorm1d()), uneven())


def test_a_wrong_input_gets_the_layers_own_error() -> None:
    layer = normkit.BatchNorm1d(4)
    for bad in (torch.ones(3, 5), torch.ones(3, 4, 2, 2), torch.ones(4)):
        with pytest.raises(ValueError, match=r"^BatchNorm1d: "):
            recompute(layer, [torch.ones(3, 4), bad])
    with pytest.raises(ValueError, match=r"^recompute_statistics: mask must have x's shape without channels"):
        recompute(layer, [torch.ones(3, 4, 2)], forward=lambda layer, x: layer(x, mask=torch.ones(2, dtype=torch.bool)))


# ------------------------------------------------------------------------------------------- batches and the model


def test_batches_come_from_any_iterable_and_stop_where_told() -> None:
    data = uneven()
    for loader in (data, tuple((x, "label") for x in data), [[x, 1] for x in data], (x for x in data)):
        layer = normkit.BatchNorm1d(4, dtype=torch.float64)
        recompute(layer, loader)
        assert_statistics(layer, exact(data))
    source = iter(data)
    layer = normkit.BatchNorm1d(4, dtype=torch.float64)
    assert recompute(layer, source, batches=3).batches == 3
    assert_statistics(layer, exact(data[:3]))
    assert next(source) is data[3]  # no batch more was taken


def test_arguments_that_cannot_be_are_refused() -> None:
    layer = normkit.BatchNorm1d(4)
    with pytest.raises(ValueError, match=r"^recompute_statistics: batches must be at least 1, got 0$"):
        recompute(layer, uneven(), batches=0)
    with pytest.raises(ValueError, match=r"^recompute_statistics: passes must be at least 1, got -1$"):
        recompute(layer, uneven(), passes=-1)
    with pytest.raises(ValueError, match="2 passes need a loader that can be iterated again, got list_iterator, which"):
        recompute(layer, iter(uneven()), passes=2)


def test_every_pass_sees_the_same_shuffle_and_augmentation() -> None:
    seen: list[Tensor] = []
    loader = torch.utils.data.DataLoader(torch.arange(12.0).view(12, 1), batch_size=4, shuffle=True)

    def forward(model: nn.Module, x: Tensor) -> None:
        seen.append(x + torch.rand_like(x))
        model(seen[-1])

    found = recompute(nn.Sequential(normkit.BatchNorm1d(1)), loader, forward=forward, passes=9)
    assert found.settled
    assert found.passes == 2
    for one, other in zip(seen[:3], seen[3:], strict=True):
        assert_same_bits(one, other, "batch")


def test_compiled_models_are_measured_as_well() -> None:
    model, expected = net(), net()
    recompute(expected, images())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(images()[0])
    model.load_state_dict(net().state_dict())
    found = recompute(compiled, images())
    assert list(found) == ["norm1", "norm2"]
    assert_same_bits(model.norm2.running_var, expected.norm2.running_var, "compiled")
    inside = nn.Sequential(net())
    inside[0].compile(backend="eager")
    inside.eval()(images()[0])
    inside[0].train()
    recompute(inside, images())
    assert_same_bits(inside[0].norm2.running_var, expected.norm2.running_var, "compiled in place")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    layer, data = normkit.BatchNorm1d(4, dtype=torch.float64), uneven()
    for stream, progress, drawn in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        normkit.recompute_statistics(layer, iter(data), batches=3, progress=progress)
        assert ("recompute_statistics" in stream.getvalue()) == drawn
        assert drawn or stream.getvalue() == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(Stop) as raised:
        normkit.recompute_statistics(net(), images(), forward=failing_forward(1))
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor comes back before the error is shown"
    assert raised.tb is not None  # which holds what the bar was drawn by


# ------------------------------------------------------------------------------------------------------------ ranks


class Branches(nn.Module):
    """The second norm runs for inputs with a negative first value only, and the third never."""

    def __init__(self) -> None:
        super().__init__()
        self.first = normkit.SyncBatchNorm(4, dtype=torch.float64)
        self.second, self.third = nn.BatchNorm1d(4, dtype=torch.float64), nn.BatchNorm1d(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        return self.second(x) if float(x[0, 0, 0]) < 0 else out


def branched() -> list[Tensor]:
    """Five batches; the second norm takes the last two."""
    batches = [x.clone() for x in uneven()]
    for x in batches[3:]:
        x[0, 0, 0] = -1.0
    return batches


def _uneven_ranks(rank: int, cuts: list[int]) -> Any:
    model = nn.parallel.DistributedDataParallel(Branches())  # its forward would broadcast buffers in every batch
    own = branched()[slice(*cuts[rank : rank + 2])]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = recompute(model, own, process_group=torch.distributed.group.WORLD, passes=3)
    buffers = [buffer.numpy() for buffer in model.module.buffers()]
    return buffers, repr(found), [str(warning.message) for warning in said]


@pytest.mark.parametrize("cuts", [[0, 3, 5], [0, 5, 5], [0, 1, 2, 5]], ids=str)
def test_ranks_with_uneven_batches_equal_one_process(cuts: list[int]) -> None:
    """In the second case a rank has no batch at all; a layer runs on one rank only."""
    alone = Branches()
    with pytest.warns(UserWarning, match=re.escape("left alone of third (never ran)")):
        expected = recompute(alone, branched(), passes=3)
    results = on_ranks(_uneven_ranks, len(cuts) - 1, cuts)
    for buffers, text, said in results:
        assert text == repr(expected)
        assert said == ["recompute_statistics: running statistics left alone of third (never ran)"]
        for found, right, same in zip(buffers, alone.buffers(), results[0][0], strict=True):
            np.testing.assert_allclose(found, right.numpy(), rtol=1e-12)
            assert found.tobytes() == same.tobytes()


def _one_raises(rank: int) -> Any:
    model = Branches()
    before = state(model)
    try:
        recompute(model, failing_loader() if rank == 1 else branched(), process_group=torch.distributed.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error), state(model) == before


def test_an_error_on_one_rank_ends_all_of_them_unchanged() -> None:
    (first, told, kept), (second, own, also_kept) = on_ranks(_one_raises, 2)
    assert (first, told) == (
        "RuntimeError",
        "recompute_statistics: rank 1 raised in its batches, see there; nothing was changed",
    )
    assert (second, own.split(",")[0]) == (
        "ValueError",
        "SyncBatchNorm: x must have num_features=4 channels in dimension 1",
    )
    assert kept
    assert also_kept


def _different(rank: int, what: str) -> None:
    layers = [normkit.BatchNorm1d(4 + (what == "channels" and rank), dtype=torch.float64)]
    layers += [normkit.BatchNorm1d(4)] * (what == "layers" and rank)
    if what == "frozen" and rank:
        layers[0].freeze()
    group = torch.distributed.group.WORLD
    recompute(
        nn.Sequential(*layers),
        [] if what == "data" else uneven(),
        process_group=group,
        passes=1 + rank * (what == "passes"),
    )


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("channels", "num_features of 0 must be the same on all ranks of the process group, got 4 on rank 0 and 5"),
        ("layers", "the number of BatchNorm layers must be the same on all ranks of the process group, got 1 on"),
        ("frozen", "the state of 0 must be the same on all ranks of the process group, got not frozen on rank 0 and"),
        ("passes", "passes must be the same on all ranks of the process group, got 1 on rank 0 and 2 on rank 1"),
        ("data", "the loader must give at least one batch, got none"),
    ],
)
def test_ranks_that_differ_get_the_same_error(what: str, sentence: str) -> None:
    for fine, error in outcomes(_different, 2, what):
        assert not fine
        assert error[0] == "ValueError"
        assert sentence in error[1]
