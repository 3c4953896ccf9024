"""normkit.convert beside the update rules of Keras and Flax, replayed in numpy. Read next: docs/conventions.md."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normkit
from cases import normal
from normkit import convert
from tolerance import assert_same_bits

C = 3
FRAMEWORKS = ("torch", "keras", "flax")
NAMES = {
    "torch": ("weight", "bias", "running_mean", "running_var"),
    "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
    "flax": ("scale", "bias", "mean", "var"),
}
LAYERS = ((normkit.BatchNorm1d, (5, C)), (normkit.BatchNorm2d, (2, C, 3, 2)), (torch.nn.BatchNorm2d, (2, C, 1, 1)))
every_layer = pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["1d", "2d", "torch-two-values"])
every_other = pytest.mark.parametrize("framework", ["keras", "flax"])


# -------------------------------------------------------------------------------- the frameworks' rules, in numpy


class Keras:
    """keras.layers.BatchNormalization on channels-last arrays; `correction` 1 is Keras 2's fused kernel."""

    def __init__(self, numbers: dict[str, np.ndarray], momentum: float, epsilon: float, correction: int = 0) -> None:
        self.numbers, self.momentum, self.epsilon, self.correction = dict(numbers), momentum, epsilon, correction

    def train(self, x: np.ndarray) -> None:
        axes = tuple(range(x.ndim - 1))
        for name, batch in (("mean", x.mean(axes)), ("variance", x.var(axes, ddof=self.correction))):
            moving = self.numbers[f"moving_{name}"]
            self.numbers[f"moving_{name}"] = moving * self.momentum + batch * (1.0 - self.momentum)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        scale = self.numbers.get("gamma", 1.0) / np.sqrt(self.numbers["moving_variance"] + self.epsilon)
        return x * scale + (self.numbers.get("beta", 0.0) - self.numbers["moving_mean"] * scale)


class Flax:
    """flax.linen.BatchNorm on channels-last arrays, with its fast variance."""

    def __init__(self, numbers: dict[str, np.ndarray], momentum: float, epsilon: float) -> None:
        self.numbers, self.momentum, self.epsilon = dict(numbers), momentum, epsilon

    def train(self, x: np.ndarray) -> None:
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        var = np.maximum(0.0, (x * x).mean(axes) - mean * mean)
        for name, batch in (("mean", mean), ("var", var)):
            self.numbers[name] = self.momentum * self.numbers[name] + (1 - self.momentum) * batch

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        out = (x - self.numbers["mean"]) / np.sqrt(self.numbers["var"] + self.epsilon) * self.numbers.get("scale", 1.0)
        return out + self.numbers.get("bias", 0.0)


RULES: dict[str, type] = {"keras": Keras, "flax": Flax}


def numbers(framework: str, seed: int = 0, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Four vectors by the framework's names; the last one, the variance, is positive."""
    vectors = np.random.default_rng(seed).normal(size=(4, C))
    vectors[3] = np.exp(vectors[3])
    return dict(zip(NAMES[framework], vectors.astype(dtype), strict=True))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.movedim(1, -1).numpy()


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=1e-12)


def trained(layer: torch.nn.Module, rule: Any, shape: tuple[int, ...], steps: int = 7) -> int:
    """Both train on the same batches; n, the values per channel."""
    for i in range(steps):
        x = normal(shape, i) * (i + 1) + i
        layer(x)
        rule.train(channels_last(x))
    return shape[0] * int(np.prod(shape[2:], dtype=int))


# ------------------------------------------------------------------------------------------- the running statistics


@every_other
@every_layer
@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_converting_and_training_commute(
    layer: Callable[..., torch.nn.Module], shape: tuple[int, ...], framework: str, momentum: float
) -> None:
    """Converted and then trained by torch's rule is trained by the other's and then converted, to rounding."""
    n = shape[0] * int(np.prod(shape[2:], dtype=int))
    norm, start = layer(C, dtype=torch.float64), numbers(framework)
    convert.load_batch_norm(norm, start, framework, eps=1e-3, momentum=momentum, values_per_channel=n)
    rule = RULES[framework](start, momentum, 1e-3)
    assert trained(norm, rule, shape) == n
    there = convert.batch_norm_state(rule.numbers, framework, "torch", values_per_channel=n)
    back = convert.batch_norm_state(norm.state_dict(), "torch", framework, values_per_channel=n)
    for name in NAMES["torch"]:
        close(there[name], norm.state_dict()[name])
    for name in NAMES[framework]:
        close(back[name], rule.numbers[name])
    copied = convert.batch_norm_state(rule.numbers, framework, "torch")["running_var"]
    close(there["running_var"] / copied, np.full(C, n / (n - 1)))


@every_other
def test_fresh_layers_differ_by_what_is_left_of_the_first_variance(framework: str) -> None:
    """Both start at variance 1, which torch's rule does not scale: decay^t / (n - 1) remains."""
    momentum, steps, shape = 0.9, 7, (5, C)
    norm = torch.nn.BatchNorm1d(C, momentum=1 - momentum, dtype=torch.float64)
    fresh = convert.batch_norm_state(norm.state_dict(), "torch", framework)
    rule = RULES[framework](fresh, momentum, 1e-5)
    n = trained(norm, rule, shape, steps)
    there = convert.batch_norm_state(rule.numbers, framework, "torch", values_per_channel=n)
    close(there["running_mean"], norm.running_mean)
    close(there["running_var"] - norm.running_var, np.full(C, momentum**steps / (n - 1)))


def test_the_fused_kernel_of_keras_2_needs_no_factor() -> None:
    norm = torch.nn.BatchNorm2d(C, momentum=1 - 0.9, dtype=torch.float64)
    rule = Keras(convert.batch_norm_state(norm.state_dict(), "torch", "keras"), 0.9, 1e-3, correction=1)
    trained(norm, rule, (2, C, 1, 2))
    close(convert.batch_norm_state(rule.numbers, "keras", "torch")["running_var"], norm.running_var)


# ---------------------------------------------------------------------------------------------------- the outputs


@every_other
@pytest.mark.parametrize("absent", [(), (0,), (1,), (0, 1)], ids=["both", "no-gamma", "no-beta", "neither"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS[:2], ids=["1d", "2d"])
def test_a_filled_layer_evaluates_as_the_source_does(
    layer: Callable[..., torch.nn.Module], shape: tuple[int, ...], absent: tuple[int, ...], framework: str, backend: str
) -> None:
    stored = numbers(framework, seed=1)
    for i in absent:
        del stored[NAMES[framework][i]]
    norm = layer(C, dtype=torch.float64).eval()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)  # what the source lacks must not stay
    convert.load_batch_norm(norm, stored, framework, eps=1e-3)
    x = normal(shape, 2) * 3 + 1
    expected = RULES[framework](stored, 0.9, 1e-3).evaluate(channels_last(x))
    close(channels_last(norm(x).detach()), expected)


def test_another_eps_is_another_output() -> None:
    """Why load_batch_norm asks for it: Keras's default and torch's differ where variances are small."""
    stored = numbers("keras") | {"moving_variance": np.full(C, 1e-3)}
    x = normal((4, C), 0)
    outputs = []
    for eps in (1e-3, 1e-5):
        norm = normkit.BatchNorm1d(C, dtype=torch.float64).eval()
        convert.load_batch_norm(norm, stored, "keras", eps=eps)
        assert norm.eps == eps
        outputs.append(norm(x) - norm.bias)
    close((outputs[1] / outputs[0]).detach(), np.full((4, C), (2e-3 / 1.01e-3) ** 0.5))


def test_a_filled_layer_says_what_it_took() -> None:
    norm = normkit.BatchNorm1d(C, decay=0.5)
    norm(torch.randn(4, C))
    assert convert.load_batch_norm(norm, numbers("flax"), "flax", eps=2e-5, momentum=0.99) is None
    assert (norm.eps, norm.momentum, norm.decay) == (2e-5, 1 - 0.99, 0.99)
    assert int(norm.num_batches_tracked) == 0
    convert.load_batch_norm(norm, numbers("flax"), "flax", eps=1e-5)
    assert norm.momentum == 1 - 0.99
    counted = numbers("torch") | {"num_batches_tracked": np.int64(12)}
    norm.momentum = None
    convert.load_batch_norm(norm, counted, "torch", eps=1e-5)
    assert int(norm.num_batches_tracked) == 12
    assert norm.momentum is None
    convert.load_batch_norm(norm, normkit.BatchNorm1d(C).state_dict(), "torch", eps=1e-5)  # counted: none yet
    assert int(norm.num_batches_tracked) == 0


# --------------------------------------------------------------------------------------------- one number, one meaning


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FRAMEWORKS, 2)))
def test_a_copy_there_and_back_is_the_same_bits(source: str, target: str, dtype: type) -> None:
    before = numbers(source, dtype=dtype)
    there = convert.batch_norm_state(before, source, target)
    assert set(there) - {"num_batches_tracked"} == set(NAMES[target])
    assert all(isinstance(v, torch.Tensor if target == "torch" else np.ndarray) for v in there.values())
    back = convert.batch_norm_state(there, target, source)
    for name, value in before.items():
        assert_same_bits(torch.as_tensor(back[name]), torch.as_tensor(value), name)


@given(n=st.integers(2, 10**7), var=st.floats(1e-6, 1e6), dtype=st.sampled_from([np.float32, np.float64]))
def test_rescaling_there_and_back_is_exact_to_rounding(n: int, var: float, dtype: type) -> None:
    before = {"mean": np.zeros(1, dtype), "var": np.full(1, var, dtype)}
    there = convert.batch_norm_state(before, "flax", "torch", values_per_channel=n)
    exact = np.float64(before["var"][0]) * n / (n - 1)
    assert abs(there["running_var"].item() - exact) <= np.spacing(dtype(exact))
    back = convert.batch_norm_state(there, "torch", "flax", values_per_channel=n)["var"]
    assert back.dtype == dtype
    assert abs(back[0] - before["var"][0]) <= 2 * np.spacing(before["var"][0])


def test_a_half_variance_is_rescaled_with_one_rounding() -> None:
    """Its product with n, 192,000, is no half any more."""
    stored = {"mean": np.zeros(1, np.float16), "var": np.full(1, 3000.0, np.float16)}
    found = convert.batch_norm_state(stored, "flax", "torch", values_per_channel=64)["running_var"]
    assert_same_bits(found, torch.tensor([3000 * 64 / 63], dtype=torch.float16), "var")


def test_keras_and_flax_agree_on_the_variance() -> None:
    stored = numbers("keras")
    flax = convert.batch_norm_state(stored, "keras", "flax", values_per_channel=2)
    np.testing.assert_array_equal(flax["var"], stored["moving_variance"])


def test_the_batches_that_torch_counts_are_kept_and_the_others_count_none() -> None:
    torchs = numbers("torch") | {"num_batches_tracked": torch.tensor(9)}
    assert int(convert.batch_norm_state(torchs, "torch", "torch")["num_batches_tracked"]) == 9
    state = convert.batch_norm_state(numbers("keras"), "keras", "torch")
    assert_same_bits(state["num_batches_tracked"], torch.tensor(0), "num_batches_tracked")
    assert set(convert.batch_norm_state(torchs, "torch", "keras")) == set(NAMES["keras"])


def test_bfloat16_stays_for_torch_and_widens_for_numpy() -> None:
    stored = {name: torch.as_tensor(value).bfloat16() for name, value in numbers("keras").items()}
    kept = convert.batch_norm_state(stored, "keras", "torch")["running_mean"]
    assert_same_bits(kept, stored["moving_mean"], "mean")
    widened = convert.batch_norm_state(stored, "keras", "flax")["mean"]
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, stored["moving_mean"].float().numpy())


def test_anything_that_numpy_takes_is_taken() -> None:
    class Lazy:  # as an HDF5 data set or a framework's variable
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.array([2.0, 3.0], np.float32)

    swapped = np.array([0.5, 1.5], np.float32).astype(np.dtype(np.float32).newbyteorder())
    backwards = np.array([4.0, 3.0])[::-1]
    stored = {"gamma": Lazy(), "beta": [1.0, 2.0], "moving_mean": swapped, "moving_variance": backwards}
    found = convert.batch_norm_state(stored, "keras", "torch")
    assert_same_bits(found["weight"], torch.tensor([2.0, 3.0]), "weight")
    assert_same_bits(found["bias"], torch.tensor([1.0, 2.0], dtype=torch.float64), "bias")
    assert_same_bits(found["running_mean"], torch.tensor([0.5, 1.5]), "running_mean")
    assert_same_bits(found["running_var"], torch.tensor([3.0, 4.0], dtype=torch.float64), "running_var")


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FRAMEWORKS, FRAMEWORKS)))
@pytest.mark.parametrize("tensors", [False, True], ids=["arrays", "parameters"])
def test_results_share_no_memory_with_what_came_in(source: str, target: str, tensors: bool) -> None:
    stored: dict[str, Any] = numbers(source)
    if tensors:
        stored = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in stored.items()}
    found = convert.batch_norm_state(stored, source, target)
    before = copy.deepcopy(found)
    for value in stored.values():
        (value.detach() if tensors else value)[:] = 77.0
    for name, value in found.items():
        np.testing.assert_array_equal(value, before[name])
        assert not getattr(value, "requires_grad", False)


def test_a_converted_state_loads_strictly() -> None:
    norm = normkit.BatchNorm1d(C, dtype=torch.float64)
    norm.load_state_dict(convert.batch_norm_state(numbers("flax"), "flax", "torch"))
    np.testing.assert_array_equal(norm.running_var, numbers("flax")["var"])


# ------------------------------------------------------------------------------------------------------ whole models


def test_the_batch_norms_of_a_torch_model_are_found() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, C, 1), torch.nn.Sequential(normkit.BatchNorm2d(C), torch.nn.LayerNorm(C))
    )
    found = convert.find_batch_norms(model.state_dict(), "torch")
    assert list(found) == ["1.0"]
    assert set(found["1.0"]) == set(model[1][0].state_dict())
    alone = convert.find_batch_norms(model[1][0].state_dict(), "torch")
    assert list(alone) == [""]


def test_flax_variables_are_found_nested_or_flat() -> None:
    params = {"Dense_0": {"bias": np.zeros(C)}, "Block_0": {"norm": {"scale": np.ones(C), "bias": np.ones(C)}}}
    stats = {"Block_0": {"norm": {"mean": np.zeros(C), "var": np.full(C, 2.0)}}}
    flat = {("params", "Block_0", "norm", name): v for name, v in params["Block_0"]["norm"].items()}
    flat |= {("batch_stats", "Block_0", "norm", name): v for name, v in stats["Block_0"]["norm"].items()}
    state = params["Block_0"]["norm"] | stats["Block_0"]["norm"]  # nnx keeps both in one place
    for variables in ({"params": params, "batch_stats": stats}, flat, {"Block_0": {"norm": state}}):
        found = convert.find_batch_norms(variables, "flax")
        assert {name: set(group) for name, group in found.items()} == {"Block_0/norm": set(NAMES["flax"])}
        assert found["Block_0/norm"]["var"] is stats["Block_0"]["norm"]["var"]


@pytest.mark.parametrize("suffix", ["", ":0"], ids=["keras-3", "keras-2"])
def test_keras_variables_are_found_by_path(suffix: str) -> None:
    variables = {f"stem/bn/{name}{suffix}": value for name, value in numbers("keras").items()}
    variables |= {f"stem/conv/kernel{suffix}": np.zeros(2), f"norm/gamma{suffix}": np.ones(2)}
    found = convert.find_batch_norms(variables, "keras")
    assert {name: set(group) for name, group in found.items()} == {"stem/bn": set(NAMES["keras"])}


def test_each_layer_is_rescaled_by_its_own_n() -> None:
    layers = {name: {"mean": np.zeros(C), "var": np.ones(C)} for name in ("stem", "head")}
    found = convert.batch_norm_states(layers, "flax", "torch", values_per_channel={"stem": 3, "head": 2})
    assert [found[name]["running_var"][0].item() for name in ("stem", "head")] == [1.5, 2.0]
    same = convert.batch_norm_states(layers, "flax", "torch", values_per_channel=2)
    assert [state["running_var"][0].item() for state in same.values()] == [2.0, 2.0]
    copied = convert.batch_norm_states(layers, "flax", "torch")
    assert [state["running_var"][0].item() for state in copied.values()] == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------- momentum


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FRAMEWORKS, FRAMEWORKS)))
@pytest.mark.parametrize("value", [0.0, 0.1, 0.99, 1.0])
def test_momentum_keeps_or_changes_sides(source: str, target: str, value: float) -> None:
    found = convert.momentum(value, source, target)
    assert found == (value if (source == "torch") == (target == "torch") else 1.0 - value)
    assert convert.momentum(found, target, source) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("updates", [1, 2, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
def test_updates_at_the_remedy_act_as_one(momentum: float, updates: int) -> None:
    each = convert.momentum_per_update(momentum, updates)
    assert each == pytest.approx(1 - (1 - momentum) ** (1 / updates), rel=1e-12, abs=1e-15)
    once, several = (torch.nn.BatchNorm1d(C, momentum=m, dtype=torch.float64) for m in (momentum, each))
    x = normal((5, C), 0) * 2 + 1
    once(x)
    for _ in range(updates):
        several(x)
    close(several.running_mean, once.running_mean)
    close(several.running_var, once.running_var)


def test_a_tiny_momentum_keeps_its_digits() -> None:
    """1 - (1 - m)^(1/k), as written, has four digits left here; the limit is m / k."""
    assert convert.momentum_per_update(1e-12, 2) == pytest.approx(5e-13, rel=1e-11, abs=0)


def test_two_updates_double_what_a_small_momentum_does() -> None:
    """The rule that the remedy mends: m twice is 1 - (1 - m)^2."""
    twice, once = (torch.nn.BatchNorm1d(C, momentum=m, dtype=torch.float64) for m in (0.1, 1 - 0.9**2))
    x = normal((5, C), 0)
    twice(x), twice(x), once(x)
    close(twice.running_mean, once.running_mean)


# ------------------------------------------------------------------------------------------------------------ errors

KERAS_NAMES = (
    "keras names a BatchNorm's numbers moving_mean, moving_variance and, if it has them, gamma, beta, got {}; "
    "pass one layer's numbers by these names, which normkit.convert.find_batch_norms picks out of a whole model"
)
TWO = np.ones(2)
BAD: list[tuple[type[Exception], Any, dict[str, Any], str]] = [
    (ValueError, {"moving_mean": TWO}, {}, KERAS_NAMES.format("no moving_variance")),
    (ValueError, {}, {}, KERAS_NAMES.format("no moving_mean, no moving_variance")),
    (
        ValueError,
        {"moving_mean": TWO, "mean": TWO, "gama": TWO},
        {},
        KERAS_NAMES.format("no moving_variance and unknown 'mean', 'gama'"),
    ),
    (
        TypeError,
        [TWO, TWO],
        {},
        "arrays must map keras's names to numbers, got list; name each array, as in {'moving_mean': ...}",
    ),
    (
        ValueError,
        {"moving_mean": np.ones((1, 2)), "moving_variance": TWO},
        {},
        "moving_mean must be a vector, one value per channel, got shape (1, 2); "
        "flatten it if its other dimensions are 1",
    ),
    (
        ValueError,
        {"moving_mean": TWO, "moving_variance": TWO, "beta": np.ones(3)},
        {},
        "beta must have moving_mean's shape (2,), got (3,); pass the numbers of one layer",
    ),
    (
        TypeError,
        {"moving_mean": [0, 1], "moving_variance": TWO},
        {},
        "moving_mean must hold float16, float32 or float64 numbers, got int64; "
        "convert it by numpy.asarray(value, numpy.float32)",
    ),
    (
        TypeError,
        {"moving_mean": TWO, "moving_variance": torch.tensor([1, 1])},
        {},
        "moving_variance must hold floating-point numbers, got torch.int64; convert it by .float()",
    ),
    (
        ValueError,
        {"moving_mean": TWO, "moving_variance": TWO},
        {"values_per_channel": 1},
        "values_per_channel must be 2 or more, got 1; one value has no unbiased variance, "
        "pass None to copy the running variance",
    ),
    (
        ValueError,
        {"moving_mean": TWO, "moving_variance": TWO},
        {"source": "pytorch"},
        "source must be one of 'torch', 'keras', 'flax', got 'pytorch'; pass the framework's name",
    ),
]


def raises(error: type[Exception], sentence: str) -> Any:
    return pytest.raises(error, match="^" + re.escape(sentence) + "$")


@pytest.mark.parametrize(("error", "arrays", "options", "sentence"), BAD)
def test_a_refused_conversion_says_why(
    error: type[Exception], arrays: Any, options: dict[str, Any], sentence: str
) -> None:
    call = {"source": "keras", "target": "torch"} | options
    with raises(error, f"batch_norm_state: {sentence}"):
        convert.batch_norm_state(arrays, **call)
    call |= {"values_per_channel": options.get("values_per_channel")}
    with raises(error, f"batch_norm_states, layer 'stem': {sentence}"):
        convert.batch_norm_states({"stem": arrays}, **call)


LOADS: list[tuple[type[Exception], Callable[[], Any], str, dict[str, Any], str]] = [
    *(
        (error, lambda: normkit.BatchNorm1d(2), "keras", {"arrays": arrays, **options}, sentence)
        for error, arrays, options, sentence in BAD
    ),
    (
        ValueError,
        lambda: normkit.BatchNorm1d(4),
        "keras",
        {},
        "layer must have the source's 3 channels, got num_features=4; build it with num_features=3",
    ),
    (
        ValueError,
        lambda: torch.nn.BatchNorm1d(C, affine=False),
        "keras",
        {},
        "layer must have a weight for keras's gamma, got None; build it with affine=True",
    ),
    (
        ValueError,
        lambda: normkit.BatchNorm1d(C, bias=False),
        "flax",
        {},
        "layer must have a bias for flax's bias, got None; build it with affine=True, bias=True",
    ),
    (
        ValueError,
        lambda: torch.nn.BatchNorm1d(C, track_running_stats=False),
        "keras",
        {},
        "layer must keep running statistics, got BatchNorm1d with track_running_stats=False; "
        "build it with track_running_stats=True",
    ),
    (
        ValueError,
        lambda: torch.nn.BatchNorm1d(C, momentum=None),
        "keras",
        {},
        "a layer with momentum=None weighs its averages by the batches seen, got none counted by keras; "
        "pass the source's momentum",
    ),
    (
        ValueError,
        lambda: normkit.BatchNorm1d(C, debiased=True),
        "flax",
        {"momentum": 0.9},
        "a layer with debiased=True weighs its averages by the batches seen, got none counted by flax; "
        "build it with debiased=False",
    ),
    (
        ValueError,
        lambda: torch.nn.BatchNorm1d(C),
        "keras",
        {"momentum": 1.5},
        "momentum must lie between 0 and 1, got 1.5; usual are momentum=0.1, decay=0.9",
    ),
    (
        ValueError,
        lambda: torch.nn.BatchNorm1d(C),
        "keras",
        {"eps": -1.0},
        "eps must be zero or positive, got -1.0; 1e-5 is torch's default",
    ),
]


@pytest.mark.parametrize(("error", "build", "source", "options", "sentence"), LOADS)
def test_a_refused_load_leaves_the_layer_as_it_was(
    error: type[Exception], build: Callable[[], Any], source: str, options: dict[str, Any], sentence: str
) -> None:
    norm = build()
    norm(torch.randn(5, norm.num_features))
    before, eps, momentum = copy.deepcopy(norm.state_dict()), norm.eps, norm.momentum
    call = {"layer": norm, "arrays": numbers(source), "source": source, "eps": 1e-3} | options
    with raises(error, f"load_batch_norm: {sentence}"):
        convert.load_batch_norm(**call)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert (norm.eps, norm.momentum) == (eps, momentum)


def test_other_wrong_calls_say_why() -> None:
    with raises(TypeError, "load_batch_norm: layer must be a BatchNorm of torch or normkit, got LayerNorm; pass one"):
        convert.load_batch_norm(torch.nn.LayerNorm(C), numbers("keras"), "keras", eps=1e-3)
    with raises(
        ValueError,
        "batch_norm_state: target must be one of 'torch', 'keras', 'flax', got 'jax'; pass the framework's name",
    ):
        convert.batch_norm_state(numbers("keras"), "keras", "jax")
    with raises(
        ValueError,
        "find_batch_norms: flax keeps mean and var in a BatchNorm, got no module with both; "
        "pass the whole model's variables, statistics included",
    ):
        convert.find_batch_norms({"params": {"norm": {"scale": TWO, "bias": TWO}}}, "flax")
    with raises(
        ValueError,
        "batch_norm_states: values_per_channel must name the layers 'stem', got 'stm'; "
        "give each layer its own n, or one n for all",
    ):
        convert.batch_norm_states({"stem": numbers("flax")}, "flax", "torch", values_per_channel={"stm": 4})
    with raises(
        ValueError,
        "momentum: momentum must be a number, got None, torch's cumulative average of all batches; "
        "pass the weight that the running average is to have",
    ):
        convert.momentum(None, "torch", "keras")
    with raises(
        ValueError,
        "momentum_per_update: updates_per_step must be 1 or more, got 0; "
        "pass how often one optimizer step updates the running averages",
    ):
        convert.momentum_per_update(0.1, 0)


# ---------------------------------------------------------------------------------------------------- what text says


@pytest.mark.parametrize("name", ["batch_norm", "conventions"])
def test_docstring_examples_print_what_they_say(name: str) -> None:
    torch.set_printoptions(profile="default")
    module = importlib.import_module(f"normkit.convert.{name}")
    failures, attempted = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0
    assert attempted > 0


@pytest.mark.parametrize("name", convert.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>>" in getattr(convert, name).__doc__


def test_examples_of_the_page_on_conventions_print_what_they_say() -> None:
    torch.set_printoptions(profile="default")
    page = Path(__file__).parents[1] / "docs" / "conventions.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, page.name, None)
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0
