"""normkit.theory against simulation: every closed form beside random numbers, networks or layers that it describes.

Tolerances are five standard errors of the simulation, or for networks of finite width a few percent, said where used.
Read next: theory/__init__.py; test_theory.py, the exact properties.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normkit import functional, theory

WIDTH, ROWS = 512, 64
F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64) * std


def normed(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1], eps=1e-12)


def linear(variance: float, seed: int) -> Callable[[Tensor], Tensor]:
    """A random branch whose output has `variance` times its input's, and whose derivative as well."""
    weight = gaussian(WIDTH, WIDTH, seed=seed, std=math.sqrt(variance / WIDTH))
    return lambda x: x @ weight


def slope(y: Tensor, x: Tensor) -> float:
    """What y keeps of x."""
    return float((y * x).sum() / (x * x).sum())


# -------------------------------------------------------------------------------------------------- identity branch


@pytest.mark.parametrize("ratios", [[1.0, 1.0, 1.0], [0.2, 1.0, 3.0], [0.0, 0.5]])
def test_a_postnorm_stack_keeps_the_product_of_its_skip_weights(ratios: list[float]) -> None:
    start = x = normed(gaussian(4 * ROWS, WIDTH, seed=0))
    for seed, ratio in enumerate(ratios):
        x = normed(x + linear(ratio, 10 + seed)(x))
    expected = theory.post_identity_weight(len(ratios), ratios)
    assert slope(x, start) == pytest.approx(expected, abs=5 / math.sqrt(start.numel()) + 5e-3)


@pytest.mark.parametrize("variances", [[1.0] * 8, [0.1, 2.0, 0.5]])
def test_the_final_norm_of_a_prenorm_stack_leaves_the_input_one_over_the_streams_deviation(
    variances: list[float],
) -> None:
    start = x = normed(gaussian(4 * ROWS, WIDTH, seed=0))
    for seed, variance in enumerate(variances):
        x = x + linear(variance, 20 + seed)(normed(x))
    expected = theory.pre_identity_weight(len(variances), variances)
    assert slope(normed(x), start) == pytest.approx(expected, rel=0.05)


# -------------------------------------------------------------------------------------------------- residual stream


@pytest.mark.parametrize(
    "scales",
    [{}, {"skip_scale": 1.5}, {"branch_scale": 0.5}, {"output_norm": True}, {"output_norm": True, "skip_scale": 2.0}],
)
def test_the_streams_variance_grows_as_said(scales: dict[str, float]) -> None:
    branches = [0.5, 1.0, 2.0, 1.0]
    skip, branch = scales.get("skip_scale", 1.0), scales.get("branch_scale", 1.0)
    x = gaussian(ROWS, WIDTH, seed=1)
    found = [float(x.var(correction=0))]
    for seed, variance in enumerate(branches):
        total = skip * x + branch * linear(variance, 30 + seed)(normed(x))
        found.append(float(total.var(correction=0)))
        x = normed(total) if "output_norm" in scales else total
    expected = theory.stream_variances(len(branches), branches, **scales)
    assert found == pytest.approx(expected, rel=0.06)  # sqrt(2 / (64 * 512)) and the branches' correlation of 1 / 22


def transformer(layers: int, pre: bool, width: int, tokens: int, seed: int) -> tuple[list[float], float]:
    """Xiong's setting: E ||x_l||^2 / d after every layer, and the gradient of the last second matrix."""
    draw = generator(seed)

    def matrix() -> Tensor:
        return torch.randn((width, width), generator=draw, dtype=F64) / math.sqrt(width)

    def attention(x: Tensor, value: Tensor) -> Tensor:
        return (x.mean(0, keepdim=True) @ value).expand_as(x)  # queries and keys are 0

    x = torch.randn((tokens, width), generator=draw, dtype=F64)
    sizes = []
    for _ in range(layers):
        value, first, second = matrix(), matrix(), matrix().requires_grad_()
        if pre:
            x = x + attention(normed(x), value)
            x = x + normed(x).matmul(first).relu() @ second
        else:
            x = normed(x + attention(x, value))
            x = normed(x + x.matmul(first).relu() @ second)
        sizes.append(float(x.detach().square().sum(1).mean()) / width)
    out = normed(x) if pre else x
    (gradient,) = torch.autograd.grad((out * torch.randn(out.shape, generator=draw, dtype=F64)).sum(), second)
    return sizes, float(gradient.norm())


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_prenorm_transformers_stream_lies_between_xiongs_bounds(tokens: int) -> None:
    """One token: attention gives its value, the upper bound; many: their average, near the lower one."""
    runs = [transformer(6, True, 128, tokens, seed)[0] for seed in range(12)]
    for layer in range(1, 7):
        lower, upper = theory.pre_norm_variance_bounds(layer)
        measured = sum(run[layer - 1] for run in runs) / len(runs)
        assert 0.93 * lower < measured < 1.07 * upper
        if tokens == 1:
            assert measured > 0.9 * upper


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_last_layers_gradient_depends_on_depth_as_the_bound_does(placement: str) -> None:
    depths = (2, 4, 8, 16)
    found = [sum(transformer(layers, placement == "pre", 96, 4, seed)[1] for seed in range(8)) / 8 for layers in depths]
    expected = [theory.last_layer_gradient_bound(placement, 96, layers) for layers in depths]

    def exponent(values: list[float]) -> float:
        x = torch.tensor(depths, dtype=F64).log()
        y = torch.tensor(values, dtype=F64).log()
        return slope(y - y.mean(), x - x.mean())

    assert exponent(expected) == pytest.approx(-0.5 if placement == "pre" else 0.0, abs=1e-12)
    assert exponent(found) == pytest.approx(exponent(expected), abs=0.12)  # the embedding adds a constant to V_L


def gradients(blocks: list[Callable[[Tensor], Tensor]], seed: int) -> list[float]:
    """|dL/dx_l| for l = 0..L over |dL/dx_L|, for a random gradient at the end."""
    xs = [normed(gaussian(ROWS, WIDTH, seed=seed)).requires_grad_()]
    for block in blocks:
        xs.append(block(xs[-1]))
    found = torch.autograd.grad(xs[-1], xs, gaussian(ROWS, WIDTH, seed=seed + 1))
    return [float(value.norm() / found[-1].norm()) for value in found]


@pytest.mark.parametrize("variances", [[1.0] * 5, [0.3, 2.0, 1.0]])
def test_prenorm_gradients_grow_towards_the_input_as_said(variances: list[float]) -> None:
    branches = [linear(variance, 40 + i) for i, variance in enumerate(variances)]
    found = gradients([lambda x, f=f: x + f(normed(x)) for f in branches], 5)
    assert found == pytest.approx(theory.pre_gradient_growth(len(variances), variances, variances), rel=0.05)


@pytest.mark.parametrize(
    ("variances", "gains"), [([1.0] * 5, [1.0] * 5), ([2.0, 0.5], [2.0, 0.5]), ([1.0] * 4, [0.0] * 4)]
)
def test_postnorm_gradients_shrink_where_a_branchs_derivative_is_weaker_than_its_output(
    variances: list[float], gains: list[float]
) -> None:
    """A branch without derivative: noise of its own for every row."""
    blocks: list[Callable[[Tensor], Tensor]] = []
    for i, (variance, gain) in enumerate(zip(variances, gains, strict=True)):
        noise = gaussian(ROWS, WIDTH, seed=60 + i, std=math.sqrt(variance))
        branch = linear(variance, 50 + i) if gain else (lambda x, noise=noise: noise)
        blocks.append(lambda x, f=branch: normed(x + f(x)))
    found = gradients(blocks, 6)
    assert found == pytest.approx(theory.post_gradient_growth(len(gains), variances, gains), rel=0.05)


# ------------------------------------------------------------------------------------------------------ saturation


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("weight_std", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.01])
def test_the_share_of_saturated_units_is_the_probability(activation: str, weight_std: float, share: float) -> None:
    fan_in, number = 64, 200_000
    x = gaussian(number, fan_in, seed=7) * 0.8 + 0.5
    z = (
        (x * gaussian(number, fan_in, seed=8, std=weight_std)).sum(1) + gaussian(number, seed=9, std=0.2)
    ).requires_grad_()
    out = z.sigmoid() if activation == "sigmoid" else z.tanh()
    (derivative,) = torch.autograd.grad(out.sum(), z)
    saturated = float((derivative < share * (0.25 if activation == "sigmoid" else 1.0)).double().mean())
    std = theory.preactivation_std(weight_std, fan_in, 0.8**2 + 0.5**2, 0.2)
    assert float(z.detach().std()) == pytest.approx(std, rel=5 / math.sqrt(number))
    expected = theory.saturation_probability(activation, std, share)
    # z over random weights is nearly Gaussian: products of 64 terms, an excess kurtosis of some hundredths
    assert saturated == pytest.approx(expected, abs=5 * math.sqrt(expected / number) + 0.03 * expected + 1e-4)


def test_a_shifted_preactivation_saturates_on_one_side() -> None:
    z = gaussian(200_000, seed=10) + 3.0
    threshold = theory.saturation_threshold("tanh")
    measured = float((z.abs() > threshold).double().mean())
    assert measured == pytest.approx(theory.saturation_probability("tanh", 1.0, mean=3.0), abs=5e-3)
    assert theory.saturation_probability("tanh", 0.0, mean=3.0) == 1.0
    assert theory.saturation_probability("tanh", 0.0) == 0.0


# ------------------------------------------------------------------------------------------------- running averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("updates", [1, 10, 300])
def test_the_noise_of_a_running_average_is_that_of_many_simulated_ones(decay: float, updates: int) -> None:
    chains = 4_000
    running = torch.zeros(chains, dtype=F64)
    draw = generator(11)
    for _ in range(updates):
        running = decay * running + (1 - decay) * torch.randn(chains, generator=draw, dtype=F64)
    expected = theory.running_noise(decay, updates)
    assert float(running.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * chains))
    if decay**updates < 1e-2:
        assert theory.running_noise(decay) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("residual", [0.5, 0.01, 1e-6])
def test_updates_until_is_the_first_update_at_which_the_residual_is_small_enough(decay: float, residual: float) -> None:
    updates = theory.updates_until(decay, residual)
    assert theory.running_residual(decay, updates) <= residual
    assert updates == 1 or theory.running_residual(decay, updates - 1) > residual


# ------------------------------------------------------------------------------------------------ noise of a batch


@pytest.mark.parametrize("count", [2, 3, 8, 64])
def test_a_batchs_mean_and_deviation_scatter_as_said(count: int) -> None:
    batches = 100_000
    x = gaussian(batches, count, seed=12)
    mean, std = x.mean(1), x.std(1, correction=0)
    relative = 5 / math.sqrt(2 * batches)
    assert float(mean.std()) == pytest.approx(theory.batch_mean_noise(count), rel=relative)
    assert float(std.mean()) == pytest.approx(
        theory.batch_std_mean(count), abs=5 * float(std.std()) / math.sqrt(batches)
    )
    assert float(std.std()) == pytest.approx(
        theory.batch_std_noise(count), rel=2 * relative
    )  # its tail is no Gaussian's


@pytest.mark.parametrize("count", [2, 5, 100])
def test_no_normalized_value_is_larger_than_said(count: int) -> None:
    x = torch.zeros(count, 1, dtype=F64)
    x[0] = 1.0
    out = functional.batch_norm(x, None, None, training=True, eps=1e-30)
    assert float(out.abs().max()) == pytest.approx(theory.largest_normalized_value(count), rel=1e-12)


def test_one_value_normalizes_to_nothing() -> None:
    assert theory.largest_normalized_value(1) == 0.0
    assert theory.batch_mean_noise(1) == 1.0
