"""Placement: the block equation for every choice of slots and scales, and fusion that changes nothing.

The expected values come from torch.nn's norms in float64, written out step by step.
Read next: placement/block.py; test_named_placements.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import normkit
from cases import normal
from normkit import Placement, PostNorm, PreNorm, Residual, ResidualStack, functional
from tolerance import assert_same_bits

D = 8
SLOTS = tuple(product([False, True], repeat=3))
SCALES = ((1.0, 1.0), (2.213, 1.0), (1.0, 0.25), (0.5, 2.0))
NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {  # ours, torch's
    "LayerNorm": (lambda: normkit.LayerNorm(D), lambda: nn.LayerNorm(D)),
    "RMSNorm": (lambda: normkit.RMSNorm(D, eps=1e-6), lambda: nn.RMSNorm(D, eps=1e-6)),
    "BatchNorm1d": (lambda: normkit.BatchNorm1d(D), lambda: nn.BatchNorm1d(D)),
}
every_norm = pytest.mark.parametrize("norm", NORMS)
every_slot = pytest.mark.parametrize(
    "slots",
    SLOTS,
    ids=lambda s: "+".join(n for n, on in zip(("before", "after", "output"), s, strict=True) if on) or "none",
)


def shaken(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter moved from its start, so that gains and biases are seen; the same for the same names."""
    module.to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(normal(tuple(parameter.shape), 300 + i, dtype) * 0.2)
    return module


def sublayer() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh())


def build(placement: Placement, norm: Callable[[], nn.Module], depth: int, dtype: torch.dtype) -> ResidualStack:
    torch.manual_seed(0)
    final = norm() if placement.needs_final_norm else None
    return shaken(ResidualStack([Residual(sublayer(), placement, norm) for _ in range(depth)], final), dtype)


def written_out(stack: ResidualStack, torchs: Callable[[], nn.Module], x: Tensor) -> Tensor:
    """The block equation with torch's norms, which read the same parameters."""

    def apply(norm: nn.Module | None, value: Tensor) -> Tensor:
        if norm is None:
            return value
        other = torchs().to(value.dtype)
        return torch.func.functional_call(other, dict(norm.named_parameters()), (value,))

    for block in stack.sublayers:
        p = block.placement
        branch = apply(block.norm_after, block.sublayer(apply(block.norm_before, x)))
        x = apply(block.norm_output, p.skip_scale * x + p.branch_scale * branch)
    return apply(stack.final_norm, x)


def result(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor) -> list[Tensor]:
    """The output, dx and every parameter's gradient."""
    leaf = x.clone().requires_grad_()
    out = call(leaf)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], dout)]


def one_by_one(stack: ResidualStack) -> Callable[[Tensor], Tensor]:
    """Unfused: every block and every norm called as a module, the add as torch's."""

    def call(x: Tensor) -> Tensor:
        for block in stack.sublayers:
            total = block._skip(x) + block.branch(x)
            x = total if block.norm_output is None else block.norm_output(total)
        return x if stack.final_norm is None else stack.final_norm(x)

    return call


@every_norm
@every_slot
def test_a_block_is_its_equation(norm: str, slots: tuple[bool, ...], backend: str) -> None:
    ours, torchs = NORMS[norm]
    x, dout = normal((6, D), 1), normal((6, D), 2)
    for skip, branch in SCALES:
        placement = Placement("tried", *slots, skip_scale=skip, branch_scale=branch)
        stack = build(placement, ours, 1, torch.float64)
        found = result(stack.sublayers[0], stack.sublayers[0], x, dout)
        plain = ResidualStack(stack.sublayers)
        expected = result(plain, lambda v, plain=plain: written_out(plain, torchs, v), x, dout)
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-11, atol=1e-11)


@every_norm
@every_slot
def test_a_stack_is_its_blocks_in_sequence(norm: str, slots: tuple[bool, ...], backend: str) -> None:
    """Three blocks and the final norm, fused, against the equation written out with torch's norms."""
    ours, torchs = NORMS[norm]
    x, dout = normal((6, D), 1), normal((6, D), 2)
    for skip, branch in SCALES:
        placement = Placement("tried", *slots, skip_scale=skip, branch_scale=branch)
        stack = build(placement, ours, 3, torch.float64)
        for value, right in zip(
            result(stack, stack, x, dout),
            result(stack, lambda v, stack=stack: written_out(stack, torchs, v), x, dout),
            strict=True,
        ):
            torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-10)


@every_norm
@every_slot
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fused_and_unfused_agree(norm: str, slots: tuple[bool, ...], dtype: torch.dtype, backend: str) -> None:
    """Outputs bit for bit, since the fused total is stored and normalized as the sum is. A gradient takes one rounding
    less where it joins the one that comes past the norm: equal to within a few of the dtype's roundings."""
    ours, _ = NORMS[norm]
    x, dout = normal((6, D), 1, dtype), normal((6, D), 2, dtype)
    placement = Placement("tried", *slots, branch_scale=0.5)
    stack = build(placement, ours, 3, dtype)
    separate = copy.deepcopy(stack)
    fused, unfused = result(stack, stack, x, dout), result(separate, one_by_one(separate), x, dout)
    assert_same_bits(fused[0], unfused[0], "out")
    roundings = 16 * torch.finfo(dtype).eps  # three blocks, each a linear map of width 8 and a join: measured 2 to 6
    for value, right in zip(fused[1:], unfused[1:], strict=True):
        off = (value.double() - right.double()).abs().max()
        assert off <= roundings * max(float(right.double().abs().max()), 1.0)


def test_the_fused_call_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests of fusion would compare a thing with itself."""
    calls: list[str] = []
    for name in ("add_layer_norm", "add_rms_norm"):
        original = getattr(functional, name)

        def counted(
            *args: object, name: str = name, original: Callable[..., object] = original, **kw: object
        ) -> object:
            calls.append(name)
            return original(*args, **kw)

        monkeypatch.setattr(functional, name, counted)
    x = normal((6, D), 1)
    for placement, count in ((PreNorm, 3), (PostNorm, 3)):  # pre: two adds between blocks, one before the final norm
        for norm, name in (("LayerNorm", "add_layer_norm"), ("RMSNorm", "add_rms_norm")):
            calls.clear()
            build(placement, NORMS[norm][0], 3, torch.float64)(x)
            assert calls == [name] * count, f"{placement.name} {norm}"
        calls.clear()
        build(placement, NORMS["BatchNorm1d"][0], 3, torch.float64)(x)
        assert calls == []


def _norm_of(block: Residual) -> nn.Module:
    norm = block.norm_before or block.norm_output
    assert norm is not None
    return norm


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("on", ["norm", "block", "final norm"])
@pytest.mark.parametrize("placement", [PreNorm, PostNorm], ids=["pre", "post"])
def test_hooks_fire_and_change_nothing(placement: Placement, on: str, hook: str) -> None:
    x, dout = normal((6, D), 1), normal((6, D), 2)
    stack = build(placement, NORMS["LayerNorm"][0], 3, torch.float64)
    if on == "final norm" and stack.final_norm is None:
        stack = ResidualStack(stack.sublayers, shaken(normkit.LayerNorm(D)))
    expected = result(stack, stack, x, dout)
    target = {"norm": _norm_of(stack.sublayers[1]), "block": stack.sublayers[1], "final norm": stack.final_norm}[on]
    fired = []
    getattr(target, hook)(lambda *_: fired.append(1))
    for value, right in zip(result(stack, stack, x, dout), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)
    assert fired == [1]


def test_a_forward_hook_on_the_norm_sees_and_may_change_its_output() -> None:
    stack = build(PreNorm, NORMS["RMSNorm"][0], 2, torch.float64)
    x = normal((6, D), 1)
    plain = stack(x)
    handle = stack.sublayers[1].norm_before.register_forward_hook(lambda module, given, out: out * 2)
    assert not torch.allclose(stack(x), plain)
    handle.remove()
    assert_same_bits(stack(x).detach(), plain.detach(), "after the hook was removed")


def test_an_extended_norm_is_called_as_it_is() -> None:
    class Doubled(normkit.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    x = normal((6, D), 1)
    single = build(PostNorm, NORMS["LayerNorm"][0], 1, torch.float64)
    double = build(PostNorm, lambda: Doubled(D), 1, torch.float64)
    torch.testing.assert_close(double(x), 2.0 * single(x))


@every_norm
@pytest.mark.parametrize("placement", [PreNorm, PostNorm], ids=["pre", "post"])
def test_copies_and_pickles_compute_the_same(norm: str, placement: Placement) -> None:
    stack = build(placement, NORMS[norm][0], 3, torch.float64).eval()
    x = normal((6, D), 1)
    expected = stack(x)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert_same_bits(other(x).detach(), expected.detach(), "copy")
        assert [block.placement for block in other.sublayers] == [placement] * 3
        assert not set(map(id, other.parameters())) & set(map(id, stack.parameters()))


def test_batch_norm_in_a_stack_keeps_its_statistics_in_training_only(backend: str) -> None:
    stack = build(PreNorm, NORMS["BatchNorm1d"][0], 2, torch.float64)
    norms = [module for module in stack.modules() if isinstance(module, normkit.BatchNorm1d)]
    assert len(norms) == 3
    stack(normal((6, D), 1))
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1, 1]
    stack.eval()
    whole = stack(normal((6, D), 2))
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1, 1]
    torch.testing.assert_close(stack(normal((6, D), 2)[2:3]), whole[2:3], rtol=1e-12, atol=1e-12)


def test_a_stack_of_nothing_is_the_identity_and_its_final_norm() -> None:
    x = normal((6, D), 1)
    assert ResidualStack([])(x) is x
    norm = normkit.LayerNorm(D, dtype=torch.float64)
    assert_same_bits(ResidualStack([], norm)(x).detach(), norm(x).detach(), "final norm alone")


def test_the_named_placements_are_their_equations() -> None:
    assert Placement("pre", before=True) == PreNorm
    assert Placement("post", output=True) == PostNorm
    assert normkit.placements("pre", 2) == (PreNorm, PreNorm)
    assert normkit.placements("post", 1) == (PostNorm,)
    assert PreNorm.needs_final_norm
    assert not PostNorm.needs_final_norm
    with pytest.raises(AttributeError):
        PreNorm.before = False  # type: ignore[misc]


def test_each_slot_gets_a_norm_of_its_own() -> None:
    block = Residual(sublayer(), Placement("all", True, True, True), lambda: normkit.LayerNorm(D))
    assert len({id(norm) for norm in (block.norm_before, block.norm_after, block.norm_output)}) == 3
