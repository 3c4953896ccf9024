"""Closed forms: what the formulas of normalization imply exactly, and theory/identity.py against simulation.

Read next: test_theory_simulated.py, the rest of theory; shared facts with their sources stand in its docstrings.
"""

from __future__ import annotations

import math

import pytest
import torch

import normkit
from cases import normal
from normkit import functional, theory

D = 12


def jacobian(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda v: getattr(functional, name)(v, (D,), eps=eps), x)


# ------------------------------------------------------------------------------------------------ exact properties


def test_layer_norms_jacobian_is_a_projection_over_sigma(backend: str) -> None:
    """(1/sigma) (I - 11'/d - xh xh'/d): two singular values are 0, the mean's and the scale's, the rest 1/sigma."""
    x = normal((D,), 1)
    sigma = x.var(correction=0).sqrt()
    xh = (x - x.mean()) / sigma
    found = jacobian("layer_norm", x, 0.0)
    expected = (torch.eye(D, dtype=torch.float64) - 1.0 / D - torch.outer(xh, xh) / D) / sigma
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values[:-2], (1 / sigma).expand(D - 2), rtol=1e-12, atol=0)
    assert float(values[-2:].max()) < 1e-14


def test_rms_norms_jacobian_loses_one_direction(backend: str) -> None:
    x = normal((D,), 1)
    rms = x.square().mean().sqrt()
    values = torch.linalg.svdvals(jacobian("rms_norm", x, 0.0))
    torch.testing.assert_close(values[:-1], (1 / rms).expand(D - 1), rtol=1e-12, atol=0)
    assert float(values[-1]) < 1e-14


def test_layer_norm_is_rms_norm_of_the_centered_row(backend: str) -> None:
    x = normal((5, D), 1)
    centered = x - x.mean(-1, keepdim=True)
    for eps in (1e-5, 0.5):
        torch.testing.assert_close(
            functional.layer_norm(x, D, eps=eps), functional.rms_norm(centered, D, eps=eps), rtol=1e-13, atol=1e-13
        )


def test_rms_norm_turns_with_its_input_and_layer_norm_does_not(backend: str) -> None:
    q, _ = torch.linalg.qr(normal((D, D), 2))
    x = normal((5, D), 1)
    torch.testing.assert_close(functional.rms_norm(x @ q, D), functional.rms_norm(x, D) @ q, rtol=1e-12, atol=1e-12)
    assert (functional.layer_norm(x @ q, D) - functional.layer_norm(x, D) @ q).abs().max() > 0.1


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "batch_norm"])
def test_a_weight_before_a_norm_has_a_gradient_across_it(name: str, backend: str) -> None:
    """<W, dL/dW> = 0 and dL/d(cW) = (1/c) dL/dW: the norm undoes any scaling of W. eps is made nothing."""

    def gradient(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = (normal((D, D), 3) * scale).requires_grad_()
        hidden = normal((16, D), 1) @ weight
        if name == "batch_norm":
            out = functional.batch_norm(hidden, None, None, training=True, eps=1e-30)
        else:
            out = getattr(functional, name)(hidden, D, eps=1e-30)
        loss = (out.tanh() * normal((16, D), 4)).sum()
        return weight.detach(), torch.autograd.grad(loss, weight)[0]

    weight, dweight = gradient(1.0)
    assert abs(float((weight * dweight).sum())) < 1e-12 * float(weight.norm() * dweight.norm())
    torch.testing.assert_close(gradient(3.0)[1], dweight / 3.0, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 17, 1000])
def test_batch_norms_largest_value_is_the_root_of_one_less_than_the_count(count: int, backend: str) -> None:
    """One value apart from n - 1 equal ones: (n - 1) / sqrt(n - 1)."""
    x = torch.zeros(count, 1, dtype=torch.float64)
    x[0] = 1.0
    out = functional.batch_norm(x, None, None, training=True, eps=1e-30)
    torch.testing.assert_close(out[0, 0], torch.tensor(math.sqrt(count - 1.0), dtype=torch.float64))
    anything = functional.batch_norm(normal((count, 50), 1).exp() ** 3, None, None, training=True)
    assert float(anything.abs().max()) <= math.sqrt(count - 1.0)


def test_batch_norm_of_two_values_is_a_sign_function(backend: str) -> None:
    x = normal((2, 50), 1) * 100
    out = functional.batch_norm(x, None, None, training=True, eps=1e-30)
    torch.testing.assert_close(out, torch.sign(x - x.mean(0)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("decay", "steps"), [(0.9, 44), (0.99, 459), (0.999, 4603)])
def test_the_start_value_weighs_below_one_percent_after_so_many_steps(decay: float, steps: int) -> None:
    """The running variance starts at 1; batches of variance 0 and mean 0 leave of it decay^t."""
    norm = normkit.BatchNorm1d(1, decay=decay, affine=False, dtype=torch.float64)
    silence = torch.zeros(2, 1, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(steps - 1):
            norm(silence)
        assert float(norm.running_var) > 0.01
        norm(silence)
    assert float(norm.running_var) < 0.01
    assert float(norm.running_var) == pytest.approx(decay**steps, rel=1e-9)


def test_the_noise_of_the_running_mean_is_that_of_an_exponential_average() -> None:
    """Var(running mean) = m / (2 - m) x Var(batch mean), exactly the sum of the squared weights; 5.3% at decay 0.9.

    Measured as the answer to one impulse: batches of mean 0, one of mean 1, batches of mean 0.
    """
    momentum, total = 0.1, 0.0
    norm = normkit.BatchNorm1d(1, momentum=momentum, affine=False, dtype=torch.float64)
    with torch.no_grad():
        for step in range(400):
            norm(torch.full((2, 1), float(step == 0), dtype=torch.float64))
            total += float(norm.running_mean) ** 2
    assert total == pytest.approx(momentum / (2 - momentum), rel=1e-12)
    assert total == pytest.approx(0.053, abs=5e-4)


def test_two_updates_a_step_act_as_one_of_a_larger_momentum() -> None:
    m = 0.1
    twice = normkit.BatchNorm1d(3, momentum=m, dtype=torch.float64)
    once = normkit.BatchNorm1d(3, momentum=1 - (1 - m) ** 2, dtype=torch.float64)
    remedied = normkit.BatchNorm1d(3, momentum=1 - math.sqrt(1 - m), dtype=torch.float64)
    plain = normkit.BatchNorm1d(3, momentum=m, dtype=torch.float64)
    for step in range(5):
        x = normal((6, 3), step)
        twice(x), twice(x), once(x), remedied(x), remedied(x), plain(x)
    for ours, expected in ((twice, once), (remedied, plain)):
        torch.testing.assert_close(ours.running_mean, expected.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, expected.running_var, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------- theory/identity.py by simulation


def test_equal_variances_give_one_over_the_root_of_two() -> None:
    assert theory.post_skip_weight() == 1 / math.sqrt(2)
    assert theory.post_identity_weight(24) == pytest.approx(2.0**-12, rel=1e-12)
    assert theory.post_identity_weight(0) == 1.0
    assert theory.post_skip_weight(0.0) == 1.0


@pytest.mark.parametrize("ratio", [0.07, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_the_skip_weight_is_what_a_postnorm_block_does_to_its_input(name: str, ratio: float) -> None:
    """The slope of the output on the input over many tokens, with an independent branch of variance ratio v.

    The slope's standard error is sqrt(v / (1 + v) / n); n = 64 x 4096 values, five of them are allowed.
    """
    n = 64 * 4096
    x, noise = normal((64, 4096), 1), normal((64, 4096), 2) * math.sqrt(ratio)
    size = 4096
    norm = getattr(normkit, name)(size, dtype=torch.float64)
    if name == "BatchNorm1d":  # one channel over the batch: 64 x 64 tokens of 64 channels
        x, noise, norm = x.view(-1, 64), noise.view(-1, 64), normkit.BatchNorm1d(64, dtype=torch.float64)

    class Branch(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return noise

    block = normkit.Residual(Branch(), normkit.PostNorm, lambda: norm)
    with torch.no_grad():
        slope = float((block(x) * x).sum() / (x * x).sum())
    assert slope == pytest.approx(theory.post_skip_weight(ratio), abs=5 * math.sqrt(ratio / (1 + ratio) / n) + 1e-3)


def test_the_identity_weight_decays_with_every_postnorm_sublayer() -> None:
    """Six sublayers with independent branches of the stream's own variance: 2^-3 of the input is left."""
    n = 32 * 8192
    x = normal((32, 8192), 1)
    stream = x
    for layer in range(6):
        stream = functional.layer_norm(stream + normal((32, 8192), 10 + layer), 8192)
    slope = float((stream * x).sum() / (x * x).sum())
    assert slope == pytest.approx(theory.post_identity_weight(6), abs=5 / math.sqrt(n))
