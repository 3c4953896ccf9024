"""BatchNorm's statistics and modes: functional.batch_norm and the layers beside torch's. Read next: checks.py."""

from __future__ import annotations

import copy

import pytest
import torch

import normkit
from cases import normal
from checks import check_empty_batch, check_eval_alone, check_running_outside_backprop, check_running_statistics
from normkit import functional
from tolerance import assert_same_bits

DECAYS = (0.9, 0.99, 0.999)
LAYERS = ((normkit.BatchNorm1d, (6, 3)), (normkit.BatchNorm2d, (4, 3, 5, 2)), (normkit.BatchNorm3d, (3, 3, 2, 2, 4)))
every_layer = pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["1d", "2d", "3d"])


def state(norm: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in norm.state_dict().items()}


def assert_same_state(norm: torch.nn.Module, before: dict[str, torch.Tensor], what: str) -> None:
    for name, value in norm.state_dict().items():
        assert_same_bits(value, before[name], f"{what}: {name}")


# ------------------------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_running_statistics_after_100_steps_are_the_formula(decay: float, dtype: torch.dtype, backend: str) -> None:
    check_running_statistics(functional, 1.0 - decay, steps=100, dtype=dtype)


@pytest.mark.parametrize("decay", DECAYS)
@every_layer
def test_decay_and_momentum_are_one_number_in_two_conventions(
    layer: type, shape: tuple[int, ...], decay: float, backend: str
) -> None:
    textbook, torchs = layer(3, decay=decay), layer(3, momentum=1.0 - decay)
    for i in range(5):
        x = normal(shape, i, torch.float32)
        textbook(x), torchs(x)
    assert_same_state(textbook, state(torchs), "decay")
    assert textbook.momentum == 1.0 - decay
    assert torchs.decay == pytest.approx(decay)


@every_layer
def test_momentum_none_averages_every_batch_alike(layer: type, shape: tuple[int, ...], backend: str) -> None:
    norm = layer(3, momentum=None, dtype=torch.float64)
    batches = [normal(shape, i) * (i + 1) + i for i in range(10)]
    for batch in batches:
        norm(batch)
    values = [batch.transpose(0, 1).flatten(1) for batch in batches]
    mean = torch.stack([v.mean(1) for v in values]).mean(0)
    var = torch.stack([v.var(1, correction=1) for v in values]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-13, atol=1e-13)
    assert int(norm.num_batches_tracked) == 10


def test_the_running_variance_is_the_unbiased_one(backend: str) -> None:
    """Two values a channel: the batch is normalized with 1, 2 is stored."""
    mean, var = torch.zeros(1), torch.ones(1)
    out = functional.batch_norm(torch.tensor([[1.0], [3.0]]), mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(out, torch.tensor([[-1.0], [1.0]]))
    assert (mean.item(), var.item()) == (2.0, 2.0)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_zero_keeps_and_one_replaces(momentum: float, backend: str) -> None:
    mean, var = torch.full((3,), 5.0), torch.full((3,), 7.0)
    x = normal((64, 3), 1, torch.float32)
    functional.batch_norm(x, mean, var, training=True, momentum=momentum)
    torch.testing.assert_close(mean, x.mean(0) if momentum else torch.full((3,), 5.0))
    torch.testing.assert_close(var, x.var(0) if momentum else torch.full((3,), 7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_buffers_lose_their_own_rounding_and_no_more(dtype: torch.dtype, backend: str) -> None:
    norm = normkit.BatchNorm2d(3).to(dtype)
    torchs = torch.nn.BatchNorm2d(3).to(dtype)
    for step in range(20):
        x = (normal((4, 3, 5, 5), step) * 2 + 1).to(dtype)
        values = x.double().transpose(0, 1).flatten(1)
        exact = (
            0.9 * norm.running_mean.double() + 0.1 * values.mean(1),
            0.9 * norm.running_var.double() + 0.1 * values.var(1, correction=1),
        )
        assert norm(x).dtype == torchs(x).dtype == dtype
        for name, expected in zip(("running_mean", "running_var"), exact, strict=True):
            found = getattr(norm, name)
            assert found.dtype == getattr(torchs, name).dtype == dtype
            half_step = torch.finfo(dtype).eps / 2 * expected.abs() * 1.001 + 1e-6
            assert bool(((found.double() - expected).abs() <= half_step).all()), f"{name} at step {step}"


def test_running_statistics_are_outside_backpropagation(backend: str) -> None:
    check_running_outside_backprop(functional)


def test_statistics_update_without_gradients_too(backend: str) -> None:
    norm = normkit.BatchNorm1d(3)
    with torch.no_grad():
        norm(normal((6, 3), 1, torch.float32))
    with torch.inference_mode():
        fresh = normkit.BatchNorm1d(3)
        fresh(normal((6, 3), 1, torch.float32))
    assert norm.running_mean.abs().sum() > 0
    assert int(norm.num_batches_tracked) == int(fresh.num_batches_tracked) == 1


# -------------------------------------------------------------------------------------------------------- modes


def test_eval_does_not_depend_on_batch_mates(backend: str) -> None:
    check_eval_alone(functional)


@every_layer
def test_eval_uses_and_keeps_the_running_statistics(layer: type, shape: tuple[int, ...], backend: str) -> None:
    norm = layer(3)
    for i in range(3):
        norm(normal(shape, i, torch.float32) + 2)
    norm.eval()
    before = state(norm)
    whole = norm(normal(shape, 9, torch.float32))
    alone = norm(normal(shape, 9, torch.float32)[1:2])
    assert_same_bits(alone.detach(), whole[1:2].detach(), "sample 1 alone")
    assert_same_state(norm, before, "eval")
    theirs = copy.deepcopy(before)
    torchs = getattr(torch.nn, layer.__name__)(3).eval()  # torch.nn's class of the same name
    torchs.load_state_dict(theirs)
    torch.testing.assert_close(whole, torchs(normal(shape, 9, torch.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_without_tracking_the_batch_normalizes_in_eval_too(training: bool, backend: str) -> None:
    norm = normkit.BatchNorm1d(3, track_running_stats=False).train(training)
    x = normal((8, 3), 1, torch.float32) * 3 + 5
    torch.testing.assert_close(norm(x).mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    assert norm.running_mean is None
    assert norm.num_batches_tracked is None
    assert not [name for name in norm.state_dict() if "running" in name]


def test_tracking_switched_off_later_freezes_the_buffers_and_still_serves_eval(backend: str) -> None:
    norm = normkit.BatchNorm1d(3)
    norm(normal((8, 3), 1, torch.float32) + 5)
    before = state(norm)
    norm.track_running_stats = False
    norm(normal((8, 3), 2, torch.float32))
    assert_same_state(norm, before, "track_running_stats = False")
    norm.eval()
    assert float(norm(before["running_mean"].expand(2, 3)).detach().abs().max()) < 1e-6


def test_an_empty_batch_leaves_the_statistics(backend: str) -> None:
    check_empty_batch(functional)


@every_layer
def test_one_value_per_channel_is_refused_and_nothing_moved(layer: type, shape: tuple[int, ...], backend: str) -> None:
    norm = layer(3)
    norm(normal(shape, 1, torch.float32))
    before = state(norm)
    single = (1, 3) + (1,) * (len(shape) - 2)
    with pytest.raises(ValueError, match="training needs more than 1 value per channel"):
        norm(torch.zeros(single))
    assert_same_state(norm, before, "one value per channel")
    assert norm.eval()(torch.zeros(single)).isfinite().all()


@every_layer
def test_the_counter_counts_training_batches_only(layer: type, shape: tuple[int, ...], backend: str) -> None:
    norm = layer(3)
    for mode in (True, False, True):
        norm.train(mode)(normal(shape, 1, torch.float32))
    assert int(norm.num_batches_tracked) == 2


# ---------------------------------------------------------------------------------------- memory and gradients


@pytest.mark.parametrize("name", ["batch_norm in training", "batch_norm in eval"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_outputs_and_gradients_keep_the_memory_format(
    name: str, memory_format: torch.memory_format, backend: str
) -> None:
    training = "training" in name
    x = normal((4, 3, 5, 6), 1, torch.float32).to(memory_format=memory_format).requires_grad_()
    running = (None, None) if training else (torch.zeros(3), torch.ones(3))
    out = functional.batch_norm(x, *running, training=training)
    (dx,) = torch.autograd.grad(out, x, normal((4, 3, 5, 6), 2, torch.float32).to(memory_format=memory_format))
    assert out.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


def test_a_gradient_of_another_memory_format_is_read_rightly(backend: str) -> None:
    x, dout = normal((4, 3, 5, 6), 1), normal((4, 3, 5, 6), 2)
    found = []
    for x_format in (torch.contiguous_format, torch.channels_last):
        for dout_format in (torch.contiguous_format, torch.channels_last):
            leaf = x.contiguous(memory_format=x_format).requires_grad_()
            out = functional.batch_norm(leaf, None, None, training=True)
            found.append(torch.autograd.grad(out, leaf, dout.contiguous(memory_format=dout_format))[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_the_gradient_in_eval_is_finite_whatever_x(bad: float, backend: str) -> None:
    x = normal((4, 3), 1, torch.float32)
    x[1, 1] = bad
    x.requires_grad_()
    out = functional.batch_norm(x, torch.zeros(3), torch.full((3,), 3.0), eps=1.0)
    (dx,) = torch.autograd.grad(out, x, torch.ones(4, 3))
    assert torch.equal(dx, torch.full((4, 3), 0.5))


def test_an_eval_forward_keeps_its_statistics_until_its_backward(backend: str) -> None:
    """Frozen forward, then a training forward that moves the buffers, then the first one's backward."""
    norm = normkit.BatchNorm1d(3, dtype=torch.float64).eval()
    x, dout = normal((6, 3), 1), normal((6, 3), 2)

    def frozen_gradient(meanwhile: bool) -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        out = norm.eval()(leaf)
        if meanwhile:
            norm.train()(normal((6, 3), 3) * 10 + 7)
        return torch.autograd.grad(out, [leaf, norm.weight], dout)

    expected = frozen_gradient(False)
    for found, right in zip(frozen_gradient(True), expected, strict=True):
        assert_same_bits(found, right, "gradient of the frozen forward")


@every_layer
def test_fifty_training_steps_are_torchs(layer: type, shape: tuple[int, ...], backend: str) -> None:
    """Weights, biases, buffers and losses of a small regression, float64: the same run to twelve digits."""
    torchs_layer = getattr(torch.nn, layer.__name__)
    assert torchs_layer.__module__.startswith("torch.nn")
    runs = []
    for made in (layer(3, momentum=0.3, dtype=torch.float64), torchs_layer(3, momentum=0.3, dtype=torch.float64)):
        mix = torch.nn.Parameter(normal((3, 3), 4))
        optimizer = torch.optim.SGD([mix, *made.parameters()], lr=0.05, momentum=0.9)
        losses = []
        for step in range(50):
            x = torch.einsum("bc...,cd->bd...", normal(shape, step), mix)
            loss = (made(x) - normal(shape, step + 1000)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append({"mix": mix.detach(), "losses": torch.stack(losses), **state(made)})
    for name, expected in runs[1].items():
        torch.testing.assert_close(runs[0][name], expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@every_layer
def test_state_dicts_go_both_ways(layer: type, shape: tuple[int, ...]) -> None:
    ours, theirs = layer(3), getattr(torch.nn, layer.__name__)(3)
    ours(normal(shape, 1, torch.float32))
    theirs.load_state_dict(ours.state_dict())
    back = layer(3)
    back.load_state_dict(theirs.state_dict())
    assert_same_state(back, state(ours), "there and back")
    assert list(ours.state_dict()) == list(theirs.state_dict())


# ------------------------------------------------------------------------------------- calls that autograd refuses


def test_a_forward_that_autograd_refuses_leaves_the_layer_as_it_was(backend: str) -> None:
    """An inference tensor cannot be saved for backward: that comes out only when the call is recorded."""
    with torch.inference_mode():
        x = normal((8, 3), 0, torch.float32)
    norm = normkit.BatchNorm1d(3)
    before = state(norm)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        norm(x)
    assert_same_state(norm, before, "refused by autograd")


def test_a_hook_that_refuses_to_save_leaves_the_layer_as_it_was(backend: str) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise LookupError("not saved")

    norm = normkit.BatchNorm1d(3)
    before = state(norm)
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda saved: saved), pytest.raises(LookupError):
        norm(normal((8, 3), 0, torch.float32))
    assert_same_state(norm, before, "refused by a hook")


def test_a_batch_norm_last_in_a_checkpoint_updates_once(backend: str) -> None:
    """The recomputation stops at the last saved tensor, before the averages move; torch's BatchNorm updates twice."""
    norm, once = normkit.BatchNorm1d(3), normkit.BatchNorm1d(3)
    x = normal((8, 3), 0, torch.float32).requires_grad_()
    torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False).sin().sum().backward()
    once(x)
    assert_same_state(norm, state(once), "checkpointed")


def test_numbers_that_are_not_quite_floats_and_bools_are_taken_as_torch_takes_them(backend: str) -> None:
    x = normal((8, 3), 0, torch.float32)
    mean, var = torch.zeros(3), torch.ones(3)
    expected = functional.batch_norm(x, mean.clone(), var.clone(), training=True, momentum=1.0)
    running = [mean.clone(), var.clone()]
    found = functional.batch_norm(x, *running, training=1, momentum=1)  # type: ignore[arg-type]
    assert_same_bits(found, expected, "training=1, momentum=1")
    torch.testing.assert_close(running[0], x.mean(0))
    assert functional.batch_norm(x, mean, var, momentum=None).shape == x.shape  # type: ignore[arg-type]
