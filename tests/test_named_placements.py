"""The field's placements: each block equation is what its paper says, written out with torch's norms in float64.

Also what goes with them: DyT, norms on queries and keys, initial weights.
Read next: placement/named.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normkit
from cases import normal
from normkit.placement import PLACEMENT_NAMES, LearnedScale, Placement, Residual, ResidualStack, placements
from normkit.study.models import Attention, FeedForward, Transformer

D, SUBLAYERS = 8, 16
every_name = pytest.mark.parametrize("name", PLACEMENT_NAMES)
Norm = Callable[[Tensor], Tensor]


def shaken(module: nn.Module) -> nn.Module:
    module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(normal(tuple(parameter.shape), 500 + i) * 0.2)
    return module


def stack_of(name: str, sublayers: int = SUBLAYERS) -> ResidualStack:
    torch.manual_seed(0)
    blocks = [
        Residual(nn.Sequential(nn.Linear(D, D), nn.Tanh()), where, lambda: normkit.LayerNorm(D), D)
        for where in placements(name, sublayers)
    ]
    final = normkit.LayerNorm(D) if blocks[-1].placement.needs_final_norm else None
    stack = shaken(ResidualStack(blocks, final))
    assert isinstance(stack, ResidualStack)
    return stack


def torchs(norm: nn.Module | None) -> Norm:
    assert norm is not None
    return lambda x: nn.functional.layer_norm(x, (D,), norm.weight, norm.bias, norm.eps)


def equation(name: str, block: Residual, number: int, x: Tensor) -> Tensor:
    """What the papers write, sublayer `number` of SUBLAYERS from 0 on; layers have two."""
    f = block.sublayer
    layer, layers = 1 + number // 2, SUBLAYERS // 2
    if name == "pre" or (name == "mix" and layer > layers / 4):
        return x + f(torchs(block.norm_before)(x))
    if name in ("post", "mix"):
        return torchs(block.norm_output)(x + f(x))
    if name == "sandwich":
        return x + torchs(block.norm_after)(f(torchs(block.norm_before)(x)))
    if name == "reordered":
        return x + torchs(block.norm_after)(f(x))
    if name == "deepnorm":
        return torchs(block.norm_output)((2 * layers) ** 0.25 * x + f(x))
    if name == "keel":
        return torchs(block.norm_output)(SUBLAYERS * x + f(torchs(block.norm_before)(x)))
    if name == "layernorm-scaling":
        return x + f(torchs(block.norm_before)(x) / math.sqrt(layer))
    assert block.scale is not None
    if name == "layerscale":
        assert block.scale.shape == (D,)
        return x + block.scale * f(torchs(block.norm_before)(x))
    assert name == "rezero"
    assert block.scale.shape == ()
    return x + block.scale * f(x)


@every_name
def test_a_block_is_its_papers_equation(name: str) -> None:
    stack = stack_of(name)
    x = expected = normal((5, D), 1)
    for number, block in enumerate(stack.sublayers):
        assert isinstance(block, Residual)
        assert block.placement.name == name
        expected = equation(name, block, number, expected)
    if stack.final_norm is not None:
        expected = torchs(stack.final_norm)(expected)
    torch.testing.assert_close(stack(x), expected, rtol=1e-12, atol=1e-12)


@every_name
def test_a_fused_stack_has_the_gradients_of_its_blocks_one_by_one(name: str) -> None:
    stack = stack_of(name, 4)
    x = normal((5, D), 2).requires_grad_()
    inputs = [x, *stack.parameters()]
    fused = torch.autograd.grad(stack(x), inputs, normal((5, D), 3))
    one_by_one = x
    for block in stack.sublayers:
        one_by_one = block(one_by_one)
    if stack.final_norm is not None:
        one_by_one = stack.final_norm(one_by_one)
    for found, expected in zip(fused, torch.autograd.grad(one_by_one, inputs, normal((5, D), 3)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_figures_are_those_of_the_papers() -> None:
    deep = placements("deepnorm", 24)[0]
    assert (round(deep.skip_scale, 3), round(deep.init_gain, 3)) == (2.213, 0.319)
    assert {place.skip_scale for place in placements("keel", 24)} == {24.0}
    mix = placements("mix", 24)
    assert [place.output for place in mix] == [True] * 6 + [False] * 18
    scaled = placements("layernorm-scaling", 6)
    assert [round(place.before_scale**-2) for place in scaled] == [1, 1, 2, 2, 3, 3]
    starts = [placements("layerscale", 2 * layers)[0].learned for layers in (12, 18, 24, 36)]
    assert [learned and learned.start for learned in starts] == [0.1, 0.1, 1e-5, 1e-6]
    assert placements("rezero", 2)[0].learned == LearnedScale(0.0)


@pytest.mark.parametrize(
    ("name", "final"),
    [(name, name not in ("post", "deepnorm", "keel", "rezero")) for name in PLACEMENT_NAMES],
)
def test_a_norm_follows_where_the_stream_is_not_normalized(name: str, final: bool) -> None:
    assert placements(name, 8)[-1].needs_final_norm is final


def test_rezero_and_layerscale_start_near_the_identity_and_learn() -> None:
    x = normal((5, D), 4)
    block = Residual(nn.Linear(D, D).double(), placements("rezero", 1)[0], lambda: normkit.LayerNorm(D)).double()
    assert torch.equal(block(x), x)
    (gradient,) = torch.autograd.grad(block(x).sum(), block.scale)
    assert float(gradient.abs()) > 0.0
    assert "scale" in dict(block.named_parameters())


def test_a_scale_per_feature_needs_the_width() -> None:
    where = placements("layerscale", 2)[0]
    with pytest.raises(ValueError, match=r"^Residual: placement 'layerscale' has a learned scale"):
        Residual(nn.Linear(D, D), where, lambda: normkit.LayerNorm(D))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: placements("dual", 4), f"placements: name must be one of {', '.join(PLACEMENT_NAMES)}, got 'dual'"),
        (lambda: placements("pre", -1), "placements: sublayers must be zero or positive, got -1"),
    ],
)
def test_what_is_no_placement_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=r"^placements: ") as refused:
        call()
    assert str(refused.value) == said
    assert placements("keel", 0) == ()


# ------------------------------------------------------------------------------------------------------------- DyT


def test_dyt_is_its_formula_with_exact_gradients() -> None:
    layer = shaken(normkit.DyT(D))
    x = normal((3, D), 5).requires_grad_()
    expected = torch.tanh(layer.alpha * x) * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)

    def call(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"alpha": alpha, "weight": weight, "bias": bias}, (x,))

    parameters = [parameter.detach().requires_grad_() for parameter in (layer.alpha, layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_dyt_starts_as_the_paper_has_it_and_refuses_another_shape() -> None:
    layer = normkit.DyT((2, 3))
    assert float(layer.alpha.detach()) == 0.5
    assert layer.weight.shape == layer.bias.shape == (2, 3)
    assert float(normkit.DyT(3, alpha=0.8).alpha.detach()) == pytest.approx(0.8)
    assert repr(layer) == "DyT((2, 3), alpha=0.5)"
    with pytest.raises(ValueError, match=r"^DyT: x must end with normalized_shape \(2, 3\), got x of shape \(4, 3\)$"):
        layer(torch.ones(4, 3))


# -------------------------------------------------------------------------------------------- the study's transformer


def model(name: str | None, norm: str = "layer", qk_norm: bool = False, depth: int = 2) -> Transformer:
    torch.manual_seed(0)
    where = None if name is None else placements(name, 2 * depth)
    return Transformer(depth=depth, width=16, heads=2, seq=8, norm=norm, placement=where, qk_norm=qk_norm)


@every_name
@pytest.mark.parametrize("norm", ["layer", "rms", "batch", "group", "dyt"])
def test_every_norm_in_every_placement_trains(name: str, norm: str) -> None:
    transformer = model(name, norm)
    ids = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(transformer.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = transformer.loss(ids, ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(value) for value in losses)
    assert losses[-1] < losses[0]


def test_deepnorms_gain_is_on_values_output_and_feed_forward_only() -> None:
    plain, deep = model("post"), model("deepnorm")
    gain = placements("deepnorm", 4)[0].init_gain
    for before, after in zip(plain.stack.sublayers, deep.stack.sublayers, strict=True):
        one, other = before.sublayer, after.sublayer
        if isinstance(one, Attention):
            q, k, v = one.qkv.weight.chunk(3)
            torch.testing.assert_close(other.qkv.weight, torch.cat([q, k, v * gain]))
            torch.testing.assert_close(other.out.weight, one.out.weight * gain)
        else:
            assert isinstance(one, FeedForward)
            torch.testing.assert_close(other.up.weight, one.up.weight * gain)
            torch.testing.assert_close(other.down.weight, one.down.weight * gain)


def test_normed_queries_and_keys_do_not_feel_their_scale() -> None:
    attention = shaken(Attention(16, 2, qk_norm=True))
    x = normal((3, 5, 16), 6)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 1000.0
        attention.qkv.bias[:32] *= 1000.0
    torch.testing.assert_close(attention(x), before, rtol=0, atol=1e-3)  # eps beside squares near 0.1
    plain = shaken(Attention(16, 2))
    before = plain(x)
    with torch.no_grad():
        plain.qkv.weight[:32] *= 1000.0
    assert float((plain(x) - before).detach().abs().max()) > 1e-2


def test_group_norm_of_tokens_takes_each_group_of_features_alone() -> None:
    norm = model("pre", "group").stack.sublayers[0].norm_before
    assert norm is not None
    x = torch.randn((2, 3, 16), generator=torch.Generator().manual_seed(2))
    groups = x.reshape(2, 3, 4, 4)
    expected = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected.reshape(2, 3, 16), rtol=1e-5, atol=1e-5)


def test_a_placement_for_every_sublayer_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^Transformer: placement must name 4 sublayers for depth 2, got 3$"):
        Transformer(depth=2, width=16, heads=2, seq=8, norm="rms", placement=placements("mix", 3))
    with pytest.raises(ValueError, match=r"^Transformer: norm 'none' has no placement, got 'keel'$"):
        Transformer(depth=1, width=16, heads=2, seq=8, norm="none", placement=placements("keel", 2))
    assert Placement("own").needs_final_norm is False
