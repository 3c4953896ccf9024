"""Where a norm sits around a sublayer: one description for all placements, and the modules that follow it.

Here: Placement, LearnedScale, Residual (one sublayer), ResidualStack (many, with adjacent add and norm fused).
May import: torch, functional, layers.
Read next: named.py, the field's placements; layers/rows.py, or study/models.py, which builds a transformer from these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from normkit import functional
from normkit.functional import AddNorm
from normkit.layers import LayerNorm, RMSNorm


@dataclass(frozen=True)
class LearnedScale:
    """A factor on the branch that is trained with the model.

    Args:
        start: its value before training.
        per_feature: whether each feature of the stream has its own; else it is one number.
    """

    start: float
    per_feature: bool = False


@dataclass(frozen=True)
class Placement:
    """A residual block as three optional norm slots and its scales.

        y = output_norm(skip_scale * x + branch_scale * a * after_norm(f(before_scale * before_norm(x))))

    Args:
        name: the placement's name in the field.
        before: a norm on the branch, before the sublayer f.
        after: a norm on the branch, after f.
        output: a norm after the add, on branch and skip together.
        skip_scale, branch_scale: what multiplies x and the branch before the add; 1.0.
        before_scale: what multiplies the sublayer's input; 1.0.
        learned: a, a factor on the branch that is trained; None for none.
        init_gain: what the placement wants the initial weights of feed-forwards and of attention's values and output
            multiplied by; 1.0. Who builds the sublayers applies it, as `normkit study` does.

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, figure 1, for the two named
        values; `normkit.placements` gives those of the field, which are other values of the same slots and scales.
    """

    name: str
    before: bool = False
    after: bool = False
    output: bool = False
    skip_scale: float = 1.0
    branch_scale: float = 1.0
    before_scale: float = 1.0
    learned: LearnedScale | None = None
    init_gain: float = 1.0

    @property
    def needs_final_norm(self) -> bool:
        """Whether norms leave the stream un-normalized, so that one must follow the last sublayer."""
        return not self.output and (self.before or self.after)


PreNorm = Placement("pre", before=True)  # x + f(norm(x))
PostNorm = Placement("post", output=True)  # norm(x + f(x))


class Residual(nn.Module):
    """A sublayer with its residual connection and its norms.

        y = output_norm(skip_scale * x + branch_scale * a * after_norm(f(before_scale * before_norm(x))))

    Args:
        sublayer: f, any module whose output has its input's shape.
        placement: which slots hold a norm, and the scales.
        norm: makes one norm; called once for each slot in use.
        width: features of the stream, for a placement whose learned scale (`scale`) has one for each.

    Raises:
        ValueError: the placement has a learned scale per feature and no width is given.

    Example:
        >>> import torch, normkit
        >>> block = normkit.Residual(torch.nn.Linear(8, 8), normkit.PreNorm, lambda: normkit.RMSNorm(8, eps=1e-6))
        >>> block(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    norm_before: nn.Module | None
    norm_after: nn.Module | None
    norm_output: nn.Module | None
    scale: nn.Parameter | None

    def __init__(
        self, sublayer: nn.Module, placement: Placement, norm: Callable[[], nn.Module], width: int | None = None
    ) -> None:
        super().__init__()
        learned = placement.learned
        if learned is not None and learned.per_feature and width is None:
            raise ValueError(
                f"Residual: placement {placement.name!r} has a learned scale for each feature and needs their number, "
                f"got width=None; pass width="
            )
        self.sublayer = sublayer
        self.placement = placement
        self.norm_before = norm() if placement.before else None
        self.norm_after = norm() if placement.after else None
        self.norm_output = norm() if placement.output else None
        shape = (width,) if learned is not None and learned.per_feature and width is not None else ()
        start = None if learned is None else nn.Parameter(torch.full(shape, learned.start))
        self.register_parameter("scale", start)

    def branch(self, x: Tensor) -> Tensor:
        """branch_scale * a * after_norm(f(before_scale * before_norm(x)))."""
        return self._behind_norm(x if self.norm_before is None else self.norm_before(x))

    def combine(self, x: Tensor, branch: Tensor) -> Tensor:
        """output_norm(skip_scale * x + branch)."""
        skip = self._skip(x)
        return skip + branch if self.norm_output is None else add_norm(self.norm_output, branch, skip).out

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.branch(x))

    def _behind_norm(self, inner: Tensor) -> Tensor:
        """The branch behind its first norm."""
        if self.placement.before_scale != 1.0:
            inner = inner * self.placement.before_scale
        branch: Tensor = self.sublayer(inner)
        if self.norm_after is not None:
            branch = self.norm_after(branch)
        if self.scale is not None:
            branch = branch * self.scale
        return branch if self.placement.branch_scale == 1.0 else branch * self.placement.branch_scale

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.placement.skip_scale == 1.0 else x * self.placement.skip_scale

    def _open(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One step of a stack: finish the pending add x + pending, run the branch, leave this add pending.

        The add of one sublayer and the norm before the next are thereby one fused call.
        """
        if pending is None:
            inner = x if self.norm_before is None else self.norm_before(x)
        elif self.norm_before is None:
            inner = x = x + pending
        else:
            inner, x = add_norm(self.norm_before, pending, x)
        branch = self._behind_norm(inner)
        skip = self._skip(x)
        if self.norm_output is not None:
            return add_norm(self.norm_output, branch, skip).out, None
        return skip, branch


class ResidualStack(nn.Module):
    """Residual sublayers in sequence and the final norm, with every adjacent add and norm fused.

    The result is that of calling the sublayers one after the other. Sublayers that carry hooks are called as modules,
    unfused, so that the hooks see what they expect.

    Args:
        sublayers: Residual modules, first to last.
        final_norm: a norm after the last add, for placements that leave the stream un-normalized; None for none.

    Example:
        >>> import torch, normkit
        >>> blocks = [normkit.Residual(torch.nn.Linear(8, 8), normkit.PostNorm, lambda: normkit.LayerNorm(8))
        ...           for _ in range(2)]
        >>> normkit.ResidualStack(blocks)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    final_norm: nn.Module | None

    def __init__(self, sublayers: Iterable[Residual], final_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.final_norm = final_norm

    def forward(self, x: Tensor) -> Tensor:
        pending: Tensor | None = None
        for sublayer in self.sublayers:
            assert isinstance(sublayer, Residual)
            if _hooked(sublayer):
                x, pending = sublayer(x if pending is None else x + pending), None
            else:
                x, pending = sublayer._open(x, pending)
        if self.final_norm is None:
            return x if pending is None else x + pending
        out: Tensor = self.final_norm(x) if pending is None else add_norm(self.final_norm, pending, x).out
        return out


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> AddNorm:
    """(norm(x + residual), x + residual), fused where the norm is a plain LayerNorm or RMSNorm of normkit's.

    A norm that carries hooks, or whose class was extended, is called as a module, so that nothing is bypassed.
    """
    if not _hooked(norm):
        if type(norm) is LayerNorm and norm.shard_group is None:
            return functional.add_layer_norm(x, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if type(norm) is RMSNorm and norm.shard_group is None:
            return functional.add_rms_norm(
                x, residual, norm.normalized_shape, norm.weight, norm.eps, weight_offset=norm.weight_offset
            )
    total = x + residual
    return AddNorm(norm(total), total)


def _hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: hooks of its own or of all modules, or a forward
    of its own (offloading and quantization libraries set one, `module.compile()` sets `_compiled_call_impl`).
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )
