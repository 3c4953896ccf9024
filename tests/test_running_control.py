"""When running statistics move: freezing, checkpointing, accumulation, guards, single values, unbiased starts."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normkit
from cases import normal
from tolerance import assert_same_bits

NAN = float("nan")


def batch(seed: int, size: int = 8, shift: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal((size, 4, 5), seed, dtype) * 2 + shift


def state(layer: nn.Module) -> list[Tensor]:
    return [values.clone() for values in layer.buffers()]


def assert_kept(layer: nn.Module, before: list[Tensor]) -> None:
    for found, expected in zip(layer.buffers(), before, strict=True):
        assert_same_bits(found, expected, "a buffer")


def started(**keywords: Any) -> normkit.BatchNorm1d:
    """A layer that has seen a batch."""
    layer = normkit.BatchNorm1d(4, dtype=torch.float64, **keywords)
    layer(batch(0))
    return layer


def exact(*batches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance by channel of all batches together."""
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1)
    return values.mean(1), values.var(1)


# ----------------------------------------------------------------------------------------------------- freezing


def test_frozen_layers_normalize_with_running_statistics_through_train(backend: str) -> None:
    layer = started()
    layer.freeze()
    before = state(layer)
    x = batch(1)
    out = layer.train()(x)
    assert_kept(layer, before)
    assert "frozen=True" in repr(layer)
    assert_same_bits(out.detach(), layer.eval()(x).detach(), "frozen against eval")
    layer.unfreeze()
    assert not torch.equal(layer.train()(x), out)
    assert int(layer.num_batches_tracked) == 2


def test_gamma_and_beta_of_a_frozen_layer_still_learn() -> None:
    layer = started()
    layer.freeze()
    layer(batch(1)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


def test_frozen_statistics_puts_every_layer_back_whatever_is_raised() -> None:
    model = nn.Sequential(started(), nn.Sequential(started()))
    model[0].freeze()
    before = [state(layer) for layer in (model[0], model[1][0])]

    def interrupted() -> None:
        with normkit.frozen_statistics(model):
            model.train()
            model(batch(1))
            assert model[1][0].frozen
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert model[0].frozen
    assert not model[1][0].frozen
    for layer, buffers in zip((model[0], model[1][0]), before, strict=True):
        assert_kept(layer, buffers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: normkit.BatchNorm1d(2, track_running_stats=False).freeze(),
            "BatchNorm1d: freeze needs running statistics, got track_running_stats=False; build the layer with "
            "track_running_stats=True",
        ),
        (
            lambda: normkit.frozen_statistics(nn.Sequential(nn.BatchNorm1d(2))).__enter__(),
            "frozen_statistics: every BatchNorm must be normkit's, got torch.nn's at 0; build them with "
            "normkit.BatchNorm2d and its like",
        ),
        (
            lambda: normkit.accumulate_statistics(nn.Linear(2, 2)),
            "accumulate_statistics: the model must hold a BatchNorm with running statistics, got Linear with none",
        ),
        (
            lambda: normkit.BatchNorm1d(2, nonfinite="ignore"),
            "BatchNorm1d: nonfinite must be one of 'skip', 'raise', 'allow', got 'ignore'",
        ),
        (
            lambda: normkit.BatchNorm1d(2, track_running_stats=False, one_value="running"),
            "BatchNorm1d: one_value='running' needs running statistics, got track_running_stats=False; pass "
            "one_value='skip' or track them",
        ),
    ],
)
def test_what_cannot_be_controlled_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        call()


# ------------------------------------------------------------------------------------ checkpointing, accumulation


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_checkpointed_forward_counts_once(reentrant: bool, accumulated: bool, backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1), normkit.BatchNorm1d(4)).double()
    other = copy.deepcopy(model)
    x = batch(1)
    for net, call in ((model, lambda x: checkpoint(model, x, use_reentrant=reentrant)), (other, other)):
        statistics = normkit.accumulate_statistics(net) if accumulated else None
        call(x.requires_grad_()).square().sum().backward()
        if statistics is not None:
            statistics.remove()
    assert int(model[1].num_batches_tracked) == 1
    for found, expected in zip(model[1].buffers(), other[1].buffers(), strict=True):
        assert_same_bits(found, expected, "a buffer")
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-13, atol=1e-13)


def test_a_second_computation_that_counted_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own behaviour, pytorch#96136: the running average moves twice."""
    from normkit.layers import channels

    monkeypatch.setattr(channels, "recomputed", lambda: False)
    layer = started()
    checkpoint(layer, batch(1).requires_grad_(), use_reentrant=True).sum().backward()
    assert int(layer.num_batches_tracked) == 3


def test_accumulated_statistics_are_those_of_the_whole_batch(backend: str) -> None:
    sizes = (8, 1, 3, 5)
    batches = [batch(seed, size, 1e4 + seed) for seed, size in enumerate(sizes)]
    layer = normkit.BatchNorm1d(4, momentum=0.3, dtype=torch.float64)
    normkit.accumulate_statistics(layer)
    outs = [layer(x) for x in batches]
    assert int(layer.num_batches_tracked) == 0
    assert normkit.statistics_step(layer) == 1
    assert normkit.statistics_step(layer) == 0
    mean, var = exact(*batches)
    torch.testing.assert_close(layer.running_mean, 0.3 * mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.running_var, 0.7 + 0.3 * var, rtol=1e-12, atol=0)
    assert int(layer.num_batches_tracked) == 1
    for out, x in zip(outs, batches, strict=True):  # each forward is normalized with its own batch
        torch.testing.assert_close(out, normkit.BatchNorm1d(4, dtype=torch.float64)(x), rtol=1e-12, atol=1e-12)


def test_masked_micro_batches_accumulate_by_their_valid_positions() -> None:
    batches = [batch(1), batch(2), batch(3)]
    masks = [torch.rand(8, 5, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in range(3)]
    masks[1][:] = False
    layer = normkit.BatchNorm1d(4, momentum=1.0, dtype=torch.float64)
    with normkit.accumulate_statistics(layer):
        for x, mask in zip(batches, masks, strict=True):
            layer(x.masked_fill(~mask.unsqueeze(1), NAN), mask)
    values = torch.cat([x.movedim(1, -1)[mask] for x, mask in zip(batches, masks, strict=True)])
    torch.testing.assert_close(layer.running_mean, values.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.running_var, values.var(0), rtol=1e-13, atol=0)


def test_an_optimizer_step_commits_and_remove_ends_it() -> None:
    layer = normkit.BatchNorm1d(4, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    statistics = normkit.accumulate_statistics(layer, optimizer)
    assert "deferred=True" in repr(layer)
    for number in range(3):
        for micro in range(2):
            layer(batch(2 * number + micro)).square().sum().backward()
        optimizer.step()
        assert int(layer.num_batches_tracked) == number + 1
    layer(batch(9))
    statistics.remove()
    assert int(layer.num_batches_tracked) == 4  # what was pending is not lost
    layer(batch(10))
    optimizer.step()
    assert int(layer.num_batches_tracked) == 5
    assert layer.pending is None


# ------------------------------------------------------------------------------------------------------- guards


def bad(value: float = NAN) -> Tensor:
    x = batch(5)
    x[3, 1, 2] = value
    return x


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_batch_that_is_not_finite_is_kept_out_counted_and_told_once(
    value: float, accumulated: bool, backend: str
) -> None:
    layer = started()
    if accumulated:
        normkit.accumulate_statistics(layer)
    before = state(layer)
    with pytest.warns(UserWarning, match="BatchNorm1d: got statistics with NaN or infinity from a training batch"):
        out = layer(bad(value))
    assert bool(out.isnan().any())  # what came is shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(bad(value))
    assert layer.nonfinite_batches == 2
    normkit.statistics_step(layer)
    assert_kept(layer, before)


def test_raise_refuses_the_batch_before_anything_moves(backend: str) -> None:
    layer = started(nonfinite="raise")
    before = state(layer)
    with pytest.raises(ValueError, match="BatchNorm1d: running statistics need finite values, got statistics with NaN"):
        layer(bad())
    assert_kept(layer, before)
    layer(batch(1))
    assert int(layer.num_batches_tracked) == 2


def test_allow_averages_it_in_as_torch_does(backend: str) -> None:
    layer, torchs = started(nonfinite="allow"), nn.BatchNorm1d(4, dtype=torch.float64)
    torchs(batch(0))
    for norm in (layer, torchs):
        norm(bad())
    torch.testing.assert_close(layer.running_mean, torchs.running_mean, rtol=1e-13, atol=0, equal_nan=True)
    assert bool(layer.running_mean[1].isnan())
    assert int(layer.num_batches_tracked) == 2


def test_compiled_layers_guard_without_reading_a_value(backend: str) -> None:
    layer = started()
    before = state(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(bad())
    assert_kept(layer, before)
    other = copy.deepcopy(layer)
    compiled(batch(1))
    other(batch(1))
    for found, expected in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_nothing_waits_for_a_device_that_cannot_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a meta tensor every read of a value raises: as on CUDA, the guard must be arithmetic only."""
    layer = normkit.BatchNorm1d(4, device="meta")

    def waits(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("copying a number to a device waits for it")

    for name in ("as_tensor", "tensor"):
        monkeypatch.setattr(torch, name, waits)
    layer(torch.empty(8, 4, 5, device="meta"))
    layer(torch.empty(8, 4, 5, device="meta"), mask=torch.empty(8, 5, dtype=torch.bool, device="meta"))
    normkit.accumulate_statistics(layer)
    layer(torch.empty(8, 4, 5, device="meta"))
    assert normkit.statistics_step(layer) == 1


# ------------------------------------------------------------------------------------------------ single values


def single(dtype: torch.dtype = torch.float64) -> Tensor:
    return normal((1, 4, 1), 7, dtype)


def one_valid() -> dict[str, Tensor]:
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[2, 3] = True
    return {"input": batch(1), "mask": mask}


@pytest.mark.parametrize("given", [lambda: {"input": single()}, one_valid], ids=["shape", "mask"])
def test_one_value_per_channel_follows_its_policy(given: Callable[[], dict[str, Tensor]], backend: str) -> None:
    layer = started(one_value="raise")
    before = state(layer)
    with pytest.raises(ValueError, match="training needs more than 1 value per channel"):
        layer(**given())
    assert_kept(layer, before)
    layer = started(one_value="running")
    assert "one_value=running" in repr(layer)
    out = layer(**given())
    assert_kept(layer, before)
    assert_same_bits(out.detach(), layer.eval()(**given()).detach(), "running against eval")
    layer = started(one_value="skip")
    nn.init.uniform_(layer.bias)
    valid = given().get("mask", torch.ones(1, 1, dtype=torch.bool))
    out = layer(**given()).movedim(1, -1)[valid]
    assert_kept(layer, before)
    torch.testing.assert_close(out[0], layer.bias, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------ unbiased start


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.0, 1.0])
def test_debiased_averages_are_the_weighted_means_of_the_batches_alone(decay: float, backend: str) -> None:
    layer = normkit.BatchNorm1d(4, decay=decay, debiased=True, dtype=torch.float64)
    weights, means, variances = [], [], []
    for t in range(5):
        x = batch(t, shift=float(t))
        layer(x)
        weights = [w * decay for w in weights] + [1 - decay]
        mean, var = exact(x)
        means.append(mean)
        variances.append(var)
        if decay == 1.0:
            assert bool((layer.running_mean == 0).all())  # a momentum of 0 moves nothing
            continue
        for running, values in ((layer.running_mean, means), (layer.running_var, variances)):
            right = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            torch.testing.assert_close(running, right, rtol=1e-12, atol=1e-12)
    assert "debiased=True" in repr(layer)


def test_a_debiased_layer_compiles_to_the_same_numbers() -> None:
    layer = normkit.BatchNorm1d(4, debiased=True, dtype=torch.float64)
    other = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for t in range(3):
        compiled(batch(t))
        other(batch(t))
    torch.testing.assert_close(layer.running_var, other.running_var, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------- copies


def test_policies_survive_copies_and_pickles() -> None:
    layer = started(debiased=True, nonfinite="raise", one_value="running")
    layer.freeze()
    normkit.accumulate_statistics(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(copied) == repr(layer)
        assert copied.frozen
        assert copied.deferred
        assert_kept(copied, state(layer))


def test_a_layer_of_an_earlier_pickle_has_the_default_policies() -> None:
    layer = started()
    for name in ("debiased", "nonfinite", "one_value", "_held", "_agreed"):
        del layer.__dict__[name]
    with pytest.warns(UserWarning, match="NaN or infinity"):
        layer(bad())
    assert int(layer.num_batches_tracked) == 1


def test_a_layer_made_on_the_meta_device_loads_as_torchs_does() -> None:
    with torch.device("meta"):
        layer = normkit.BatchNorm1d(4, dtype=torch.float64)
    layer.load_state_dict(nn.BatchNorm1d(4, dtype=torch.float64).state_dict(), assign=True)
    layer.to("cpu")(batch(1))
    with pytest.warns(UserWarning, match="NaN or infinity"):
        layer(bad())
    assert layer.nonfinite_batches == 1
    assert [name for name, _ in layer.named_buffers()] == [name for name, _ in nn.BatchNorm1d(4).named_buffers()]


# ------------------------------------------------------------------------------------- what a fresh reader found


class Plain(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_tensor_subclass_trains_as_the_tensor_in_it(masked: bool, accumulated: bool) -> None:
    found = []
    for kind in (Tensor, Plain):
        layer = started()
        if accumulated:
            normkit.accumulate_statistics(layer)
        out = layer(batch(1).as_subclass(kind), (torch.arange(5) < 3).expand(8, 5) if masked else None)
        assert type(out) is kind
        normkit.statistics_step(layer)
        found.append([out.as_subclass(Tensor).detach(), *state(layer)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e25), (torch.float16, 400.0)], ids=str)
def test_a_variance_beyond_the_buffers_dtype_is_kept_out_too(dtype: torch.dtype, scale: float, backend: str) -> None:
    layer = normkit.BatchNorm1d(4, momentum=1.0, dtype=dtype)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        layer((batch(1) * scale).to(dtype))
    assert bool((layer.running_var == 1).all())
    layer(batch(2).to(dtype))
    assert bool(torch.isfinite(layer.running_var).all())
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.xfail(reason="a compiled forward cannot see that it is computed again", strict=True)
def test_a_layer_compiled_inside_a_checkpoint_counts_once() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv1d(4, 4, 1), normkit.BatchNorm1d(4), nn.ReLU()).double()
    compiled = torch.compile(model, backend="aot_eager")
    checkpoint(compiled, batch(1).requires_grad_(), use_reentrant=True).square().sum().backward()
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.xfail(torch.__version__.startswith("2.8."), reason="torch 2.8 computes it again unseen", strict=True)
def test_a_checkpoint_inside_a_compiled_function_counts_once() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv1d(4, 4, 1), normkit.BatchNorm1d(4), nn.ReLU()).double()

    @torch.compile(backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False).square().sum()

    step(batch(1).requires_grad_()).backward()
    assert int(model[1].num_batches_tracked) == 1


def test_instance_norm_counts_a_checkpointed_forward_once() -> None:
    layer = normkit.InstanceNorm1d(4, track_running_stats=True).double()
    other = copy.deepcopy(layer)
    checkpoint(nn.Sequential(layer, nn.Identity()), batch(1).requires_grad_(), use_reentrant=True).sum().backward()
    other(batch(1))
    torch.testing.assert_close(layer.running_mean, other.running_mean, rtol=1e-13, atol=0)


def test_what_is_pending_waits_while_a_layer_is_frozen() -> None:
    layer = started()
    before = state(layer)
    normkit.accumulate_statistics(layer)
    layer(batch(1))
    with normkit.frozen_statistics(layer):
        assert normkit.statistics_step(layer) == 0
        assert_kept(layer, before)
    assert normkit.statistics_step(layer) == 1


def test_nested_accumulation_ends_with_the_outer_one() -> None:
    layer = started()
    with normkit.accumulate_statistics(layer):
        inner = normkit.accumulate_statistics(layer)
        layer(batch(1))
        inner.remove()
        assert int(layer.num_batches_tracked) == 2
        layer(batch(2))
        inner.remove()
        assert int(layer.num_batches_tracked) == 2
    assert int(layer.num_batches_tracked) == 3
    assert not layer.deferred


def test_loading_a_state_drops_what_was_pending() -> None:
    layer, saved = started(), started().state_dict()
    normkit.accumulate_statistics(layer)
    layer(batch(1))
    layer.load_state_dict(saved)
    assert normkit.statistics_step(layer) == 0


def test_a_refused_optimizer_leaves_the_model_as_it_was() -> None:
    layer = started()
    with pytest.raises(AttributeError):
        normkit.accumulate_statistics(layer, "sgd")  # type: ignore[arg-type]
    assert not layer.deferred


def test_a_micro_batch_of_one_value_counts_in_the_accumulated_batch() -> None:
    layer = normkit.BatchNorm1d(1, momentum=1.0, one_value="skip", dtype=torch.float64)
    with normkit.accumulate_statistics(layer):
        layer(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
        layer(torch.tensor([[100.0]], dtype=torch.float64))
    torch.testing.assert_close(layer.running_mean, torch.tensor([34.0], dtype=torch.float64), rtol=1e-13, atol=0)


def test_a_single_value_takes_running_statistics_in_compiled_code_too() -> None:
    layer = started(one_value="running")
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    for given in (one_valid(), {"input": batch(1), "mask": torch.ones(8, 5, dtype=torch.bool)}):
        expected = copy.deepcopy(layer)(**given)
        torch.testing.assert_close(compiled(**given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="this torch has the long way alone")
def test_a_whole_number_of_momentum_takes_the_short_way(core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = normkit.BatchNorm1d(4, momentum=1, dtype=torch.float64)
    monkeypatch.setattr(type(layer), "take_statistics", lambda *_: pytest.fail("the long way"))
    layer(batch(1))
