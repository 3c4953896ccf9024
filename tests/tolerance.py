"""When a result is near enough, and when two are the same: the one place of tolerances.

Here: assert_exact_enough, assert_same_bits, the number of threads.
Read next: checks.py, which applies them.

Both numbers are in units of the largest exact value times the machine epsilon of the dtype in which sums
accumulate (float32 for halves):

- TORCH_MULTIPLE: an error may be this many times torch's own, measured in the same test on the same input. Both do
  the same operations in another order; a factor of 2 covers the order.
- FLOOR: where torch's error is below a few units by luck, this many are allowed: one rounding each of the mean, the
  root, the product with the gain, and the sum with the bias. Twice as many in float64, where the oracle rounds as
  often as what it judges.

- SUM_FLOOR: the same for the gradients of parameters, which are sums over rows or a channel of terms of either sign.
  What is left of n terms is about sqrt(n) times smaller than what was added up; 6.1 units were seen at n = 48.

Halves must moreover be rounded once: no element may be further from the exact value than half a unit in its last place
plus what the float32 arithmetic costs (the same FLOOR).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cases import HALF, accumulation_dtype

TORCH_MULTIPLE = 2.0
FLOOR = 4.0
SUM_FLOOR = 8.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    """For bitwise comparison: integers of the same size, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, expected {expected.dtype}"
    same = bits(found.detach()) == bits(expected.detach())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ in their bits"


def assert_exact_enough(found: Tensor, exact: Tensor, theirs: Tensor | None, what: str, floor: float = FLOOR) -> None:
    """`found` is as near to `exact` as the module docstring demands; `theirs` is torch's result, or None."""
    assert found.shape == exact.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    assert bool(torch.isfinite(found).all()), f"{what}: not finite"
    if found.numel() == 0:
        return
    found, exact = found.detach(), exact.detach()
    floor = 2.0 * floor if found.dtype == torch.float64 else floor
    unit = torch.finfo(accumulation_dtype(found.dtype)).eps * max(float(exact.abs().max()), 1.0)
    errors = (found.double() - exact).abs()
    half_step = torch.finfo(found.dtype).eps / 2 * exact.abs().max() if found.dtype in HALF else 0.0
    allowed = floor * unit + half_step
    if theirs is not None:
        allowed = max(allowed, TORCH_MULTIPLE * (theirs.double() - exact).abs().max())
    worst = float(errors.max())
    assert worst <= allowed, f"{what}: error {worst:.3g}, {worst / unit:.1f} units, allowed {float(allowed):.3g}"
    if found.dtype in HALF:
        smallest = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
        once = torch.finfo(found.dtype).eps / 2 * exact.abs() + smallest / 2 + floor * unit
        excess = float((errors - once).max())
        assert excess <= 0, f"{what}: {excess:.3g} beyond one rounding to {found.dtype}"
