"""observe measures what hand computation, the study and autograd find.

Here: numbers, residual blocks, saturation, norms, models of transformers.
Read next: test_observe_shows.py.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
from normkit.placement import PostNorm, PreNorm
from normkit.study import measure, observe
from normkit.study.models import Transformer
from normkit.study.observation import numbers
from normkit.study.observation.restore import as_found
from observed import Block, Net, everything, rms

# ---------------------------------------------------------------------------------------------- numbers


def test_a_tiny_residual_net_gets_the_numbers_of_hand_computation() -> None:
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    seen = observe(model, x, lambda out: out.square().mean())

    stream = [model.inward(x)]
    for block in model.blocks:
        stream.append(block(stream[-1]))
    for each in stream:
        each.retain_grad()
    loss = model.outward(stream[-1]).square().mean()
    loss.backward()
    assert seen.loss == pytest.approx(loss.item(), rel=1e-12)
    assert [(b.path, b.call, b.type, b.chain, b.position) for b in seen.blocks] == [
        (f"blocks.{i}", 1, "Block", "blocks", i + 1) for i in range(3)
    ]
    for i, block in enumerate(seen.blocks):
        a, b = stream[i].detach().numpy().ravel(), stream[i + 1].detach().numpy().ravel()
        by_hand = {
            "input_rms": np.sqrt(np.mean(a**2)),
            "output_rms": np.sqrt(np.mean(b**2)),
            "growth": np.sqrt(np.mean(b**2) / np.mean(a**2)),
            "identity": np.sum(a * b) / np.sum(a * a),
            "cosine": np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)),
            "gradient": math.sqrt(sum(float((p.grad**2).sum()) for p in model.blocks[i].parameters())),
            "output_gradient": float(stream[i + 1].grad.norm()),
        }
        for name, value in by_hand.items():
            assert getattr(block, name) == pytest.approx(float(value), rel=1e-12), (i, name)
    own = {module.path: module for module in seen.gradients}
    weight, bias = model.inward.weight.grad, model.inward.bias.grad
    assert own["inward"].gradient == pytest.approx(math.sqrt(float((weight**2).sum() + (bias**2).sum())), rel=1e-12)
    assert (own["inward"].parameters, own["inward"].trainable) == (30, 30)
    assert [module.path for module in seen.gradients][:3] == ["inward", "blocks.0.norm", "blocks.0.up"]


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("placement", [PreNorm, PostNorm], ids=["pre", "post"])
def test_the_studys_own_model_gets_the_studys_own_measurements(norm: str, placement: Any) -> None:
    model = Transformer(depth=2, width=16, heads=2, seq=12, norm=norm, placement=placement)
    ids = torch.randint(0, 256, (3, 12))
    targets = torch.randint(0, 256, (3, 12))
    seen = observe(model, ids, lambda out: nn.functional.cross_entropy(out.flatten(0, 1), targets.flatten()))
    stream = measure.stream(model, ids)
    assert [b.chain for b in seen.blocks] == ["stack.sublayers"] * 4
    assert [b.output_rms for b in seen.blocks] == pytest.approx(stream.residual_rms, rel=1e-5)
    assert [b.skip_weight for b in seen.blocks] == pytest.approx(stream.skip_weight, rel=1e-5)
    assert [b.identity_weight for b in seen.blocks] == pytest.approx(stream.identity_weight, rel=1e-5)
    found = [b.gradient for b in seen.blocks]
    by_block = [math.hypot(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
    assert by_block == pytest.approx(measure.gradient_norms(model, (ids, targets)), rel=1e-4)


def test_an_uncorrelated_branch_of_equal_size_gives_cosine_one_over_root_two_before_and_after_a_norm() -> None:
    class Adds(nn.Module):
        def __init__(self, post: bool) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4096, elementwise_affine=False) if post else nn.Identity()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.gain * torch.randn_like(x))

    for post in (False, True):
        seen = observe(nn.Sequential(Adds(post), Adds(post)), torch.randn(64, 4096), lambda out: out.mean())
        first = seen.blocks[0]
        assert first.cosine == pytest.approx(0.5**0.5, abs=5e-3)
        assert first.identity == pytest.approx(0.5**0.5 if post else 1.0, abs=5e-3)
        assert first.growth == pytest.approx(1.0 if post else 2**0.5, abs=5e-3)


def test_blocks_and_activations_that_write_into_their_input_are_measured_on_what_it_was() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x.mul_(3.0))

    x = torch.randn(50, 8).double()
    model = nn.Sequential(nn.Linear(8, 8), InPlace()).double()
    seen = observe(model, x, lambda out: out.mean(), blocks=["1"])
    before = model[0](x).detach()
    out = (3 * before).clamp(min=0)
    assert seen.blocks[0].identity == pytest.approx(float((out * before).sum() / before.square().sum()), rel=1e-12)
    assert seen.activations[0].share == pytest.approx(float((before <= 0).double().mean()), rel=1e-12)


def test_half_precision_is_summed_in_float64() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1)).half()
    x = torch.full((2**12, 3), 300.0).half()  # the sum of squares is beyond float16 by far
    seen = observe(model, x, lambda out: out.float().mean())
    assert seen.calls[1].output_rms == 300.0


def test_nothing_is_read_from_the_device_while_the_model_runs() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Reads.count += "_local_scalar_dense" in str(func) or "equal.default" in str(func)
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())
    with Reads():
        observe(model, torch.randn(6, 4), lambda out: out.mean())
        assert Reads.count == 0
        observe(model, torch.randn(6, 4), lambda out: out.mean() * out.max().item())
        assert Reads.count == 1  # a read would be seen


# ---------------------------------------------------------------------------------------------- residual blocks


def test_blocks_are_found_where_two_of_a_container_keep_their_inputs_shape() -> None:
    class Stage(nn.Module):
        """Like a residual net's: the first block of a stage has another shape than its input."""

        def __init__(self, into: int, out: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(into, out, 1)
            self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) + self.conv(x)

    model = nn.Sequential(
        nn.Sequential(Stage(3, 4), Stage(4, 4), Stage(4, 4)),
        nn.Sequential(Stage(4, 5), Stage(5, 5)),  # one alone is no chain
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),  # leaves and activations are no blocks
        nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))),  # neither are containers
    )
    seen = observe(model, torch.randn(2, 3, 2, 2), lambda out: out.mean())
    assert [(block.path, block.position) for block in seen.blocks] == [("0.1", 1), ("0.2", 2)]


def test_named_blocks_are_taken_by_path_or_by_a_function_and_alone() -> None:
    model, x = Net(), torch.randn(5, 4)
    by_path = observe(model, x, lambda out: out.mean(), blocks=["blocks.1"])
    by_function = observe(model, x, lambda out: out.mean(), blocks=lambda path, module: path == "blocks.1")
    assert [block.path for block in by_path.blocks] == ["blocks.1"]
    assert by_path == by_function
    found = observe(model, x, lambda out: out.mean()).blocks[1]
    assert by_path.blocks[0].identity == found.identity
    assert (by_path.blocks[0].position, found.position) == (1, 2)


def test_one_block_called_many_times_is_a_chain_of_calls() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = self.alias = Block(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x)
            return x

    seen = observe(Recurrent(), torch.randn(5, 4), lambda out: out.mean(), blocks=["alias"])
    assert [(block.path, block.call, block.position) for block in seen.blocks] == [("block", i, i) for i in (1, 2, 3)]
    assert len({block.gradient for block in seen.blocks}) == 1
    assert len({block.output_gradient for block in seen.blocks}) == 3
    assert "block#3" in str(seen)


def test_without_blocks_a_note_says_how_to_name_them() -> None:
    seen = observe(nn.Linear(2, 1), torch.ones(3, 2), lambda out: out.mean())
    assert seen.notes == ("No residual blocks were found: name them with blocks=.",)


def test_modules_whose_weights_are_used_without_a_call_are_said() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight

    seen = observe(Reaches(), torch.ones(3, 2), lambda out: out.mean())
    assert seen.notes[:2] == (
        "The loss does not depend on 1 of the parameter tensors that train.",
        "Holds parameters and was never called as a module, so no output is known: inner.",
    )
    assert seen.gradients[0].gradient > 0


# ---------------------------------------------------------------------------------------------- saturation


class NewGELUActivation(nn.Module):
    """By its name, as transformers has it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("module", "largest"),
    [(nn.Sigmoid(), 0.25), (nn.Tanh(), 1.0), (nn.ReLU(), 1.0), (nn.ReLU6(), 1.0), (nn.GELU(), 1.0), (nn.SiLU(), 1.0)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_saturated_means_a_derivative_near_zero_as_autograd_sees_it(module: nn.Module, largest: float) -> None:
    x = (4 * torch.randn(20_000, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    by_autograd = float((slope.abs() < 0.05 * largest).double().mean())
    seen = observe(nn.Sequential(module), x.detach().view(100, 200), lambda out: out.mean())
    assert seen.activations[0].share == by_autograd
    assert 0.02 < by_autograd < 0.98


def test_the_rules_say_where_sigmoid_and_tanh_saturate() -> None:
    outputs = [float(word) for word in re.findall(r"0\.\d{3,}", numbers.RULES["sigmoid"] + numbers.RULES["tanh"])]
    assert outputs == [0.0127, 0.9873, 0.975]
    for output in outputs[:2]:
        assert 4 * output * (1 - output) == pytest.approx(0.05, abs=5e-4)
    assert 1 - outputs[2] ** 2 == pytest.approx(0.05, abs=1e-3)


def test_dead_units_are_features_or_image_channels_that_nothing_activates() -> None:
    rows = torch.tensor([[1.0, -1, -1, 2], [-1, -1, -1, 3], [-1, -1, 0, -1]])
    images = rows.t()[None, :, :, None]  # (1, 4, 3, 1): the same features as channels
    for x in (rows, images, rows[None]):
        (activation,) = observe(nn.Sequential(nn.ReLU()), x, lambda out: out.mean()).activations
        assert activation.share == pytest.approx(9 / 12)
        assert activation.dead_units == 0.5
    assert observe(nn.Sequential(nn.ReLU()), rows[0], lambda out: out.mean()).activations[0].dead_units is None


def test_activations_of_other_libraries_are_known_by_their_names() -> None:
    names = {"NewGELUActivation": "gelu", "GELUTanh": "gelu", "QuickGELUActivation": "gelu", "SiLUActivation": "silu"}
    names |= {"GELUFeedForward": None, "SwiGLU": None, "LogSigmoid": None, "Block": None}
    found = {name: numbers.activation_kind(type(name, (nn.Module,), {})()) for name in names}
    assert found == names
    x = torch.randn(5, 5) - 3
    one, two = (
        observe(nn.Sequential(module), x, lambda out: out.mean()) for module in (NewGELUActivation(), nn.GELU())
    )
    assert one.activations[0].share == two.activations[0].share > 0


# ---------------------------------------------------------------------------------------------- norms


class LlamaRMSNorm(nn.Module):
    """By its name and weight, as transformers has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


NORMS: list[nn.Module] = [
    nn.LayerNorm(6),
    nn.RMSNorm(6),
    nn.BatchNorm1d(6),
    nn.InstanceNorm1d(6, affine=True),
    nn.GroupNorm(2, 6),
    nn.SyncBatchNorm(6).eval(),
    normkit.LayerNorm(6),
    normkit.RMSNorm(6, eps=1e-6),
    normkit.BatchNorm1d(6),
    normkit.GroupNorm(3, 6),
    LlamaRMSNorm(6),
    nn.LayerNorm(6, elementwise_affine=False),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{type(norm).__module__.split('.')[0]}-{norm}")
def test_every_norm_has_its_statistics(norm: nn.Module) -> None:
    x = torch.randn(4, 6, 6) * 2 + 1
    model = nn.Sequential(copy.deepcopy(norm), nn.Linear(6, 1))
    model[0].train(norm.training)
    seen = observe(model, x, lambda out: out.mean())
    (found,) = seen.norms
    with as_found(model):
        out = model[0](x).detach().double()
    assert (found.path, found.type) == ("0", type(norm).__name__)
    assert found.input_rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-6)
    assert found.input_mean == pytest.approx(float(x.double().mean()), rel=1e-6)
    assert found.output_rms == pytest.approx(float(out.square().mean().sqrt()), rel=1e-5)
    assert found.output_mean == pytest.approx(float(out.mean()), abs=1e-6)
    weight = None if norm.weight is None else norm.weight.detach().double()
    if weight is None:
        assert (found.gamma_mean, found.gamma_max) == (None, None)
    else:
        assert found.gamma_mean == pytest.approx(float(weight.abs().mean()), rel=1e-6)
        assert found.gamma_max == pytest.approx(float(weight.abs().max()), rel=1e-6)
    assert (found.mean_distance is None) == ("BatchNorm" not in type(norm).__name__)


def test_the_gain_of_a_weight_offset_norm_is_offset_plus_weight() -> None:
    norm = normkit.RMSNorm(4, eps=1e-6, weight_offset=1.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 0.5, -3.0, 0.5]))
    (found,) = observe(nn.Sequential(norm), torch.randn(3, 4), lambda out: out.mean()).norms
    assert (found.gamma_mean, found.gamma_max) == (1.5, 2.0)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, normkit.BatchNorm1d])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_batch_is_compared_with_running_statistics_in_their_std(kind: Any, training: bool) -> None:
    norm = kind(3).double()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0, -1.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    x = torch.randn(5, 3, 7, dtype=torch.float64)
    (found,) = observe(nn.Sequential(norm).train(training), x, lambda out: out.mean()).norms
    values = x.numpy().transpose(1, 0, 2).reshape(3, -1)
    running_std = np.sqrt(np.array([4.0, 1.0, 0.25]) + norm.eps)
    means = np.abs(values.mean(1) - np.array([1.0, 0.0, -1.0])) / running_std
    stds = np.abs(np.sqrt(values.var(1, ddof=1) + norm.eps) - running_std) / running_std
    measured = (found.mean_distance, found.mean_distance_max, found.std_distance, found.std_distance_max)
    assert measured == pytest.approx((means.mean(), means.max(), stds.mean(), stds.max()), rel=1e-12)


def test_masked_positions_do_not_count_in_batch_norms_distance() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normkit.BatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)[:, :, :2]

    x, mask = torch.randn(5, 3, 7), torch.arange(7) < 4
    padded = torch.where(mask, x, math.nan)
    masked = observe(Masked(), (padded, mask.expand(5, 7)), lambda out: out.mean()).norms[0]
    plain = observe(nn.Sequential(normkit.BatchNorm1d(3)), x[:, :, :4], lambda out: out.mean()).norms[0]
    assert masked.mean_distance == pytest.approx(plain.mean_distance, rel=1e-12)
    assert masked.std_distance == pytest.approx(plain.std_distance, rel=1e-12)


# ---------------------------------------------------------------------------------------------- transformers


def _ids() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 16))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@pytest.fixture
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


@pytest.mark.parametrize("training", [True, False])
def test_a_gpt2_of_transformers_is_observed(gpt2: nn.Module, training: bool, tmp_path: Path) -> None:
    batch = _ids()
    before = everything(gpt2.train(training))
    seen = observe(gpt2, batch)
    after = everything(gpt2)
    assert all(after[name] == before[name] for name in before)
    assert [(b.path, b.type, b.chain) for b in seen.blocks] == [
        (f"transformer.h.{i}", "GPT2Block", "transformer.h") for i in range(3)
    ]
    assert [a.type for a in seen.activations] == ["NewGELUActivation"] * 3
    assert len(seen.norms) == 7
    loss = gpt2(**batch).loss
    loss.backward()
    if not training:  # in train mode dropout draws anew
        assert seen.loss == pytest.approx(loss.item(), rel=1e-6)
        for block, module in zip(seen.blocks, gpt2.transformer.h, strict=True):
            squares = sum(float(p.grad.double().square().sum()) for p in module.parameters())
            assert block.gradient == pytest.approx(math.sqrt(squares), rel=1e-5)
        states = gpt2(**batch, output_hidden_states=True).hidden_states
        assert [b.input_rms for b in seen.blocks] == pytest.approx([rms(state) for state in states[:3]], rel=1e-5)
    by_path = {module.path: module for module in seen.gradients}
    assert by_path["lm_head"].gradient == by_path["transformer.wte"].gradient  # one weight, two modules
    assert seen.save(tmp_path / "gpt2.html").stat().st_size > 20_000


def test_a_llama_of_transformers_is_observed(llama: nn.Module) -> None:
    llama.eval()
    batch = _ids()
    seen = observe(llama, batch)
    assert [b.path for b in seen.blocks] == [f"model.layers.{i}" for i in range(3)]
    assert {norm.type for norm in seen.norms} == {"LlamaRMSNorm"}
    assert len(seen.norms) == 7
    assert [norm.output_rms for norm in seen.norms] == pytest.approx([1.0] * 7, abs=0.02)
    assert [a.path for a in seen.activations] == [f"model.layers.{i}.mlp.act_fn" for i in range(3)]
    states = llama(**batch, output_hidden_states=True).hidden_states
    first, second = (state.detach().double().flatten() for state in states[:2])
    assert seen.blocks[0].identity == pytest.approx(float(first @ second / (first @ first)), rel=1e-5)
    assert seen.blocks[0].growth == pytest.approx(float(second.norm() / first.norm()), rel=1e-5)
    assert seen.notes == ()


def test_a_loss_of_ones_own_replaces_the_one_of_transformers(llama: nn.Module) -> None:
    ids = _ids()["input_ids"]
    seen = observe(llama, {"input_ids": ids}, lambda out: out.logits.square().mean())
    assert seen.loss == pytest.approx(rms(llama(input_ids=ids).logits) ** 2, rel=1e-5)
