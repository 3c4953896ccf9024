"""What a claim is: a sentence, its source, the number that tests it.

Here: Claim, Measured, slope.
May import: torch.
Read next: claims.py, the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Measured = tuple[float, dict[str, float]]  # the number, and what it was made of


@dataclass(frozen=True)
class Claim:
    """A sentence, who said it, what number tests it, and when the number's median says that it holds."""

    text: str
    source: str
    number: str
    measure: Callable[[int], Measured]  # a seed -> the number and its parts
    holds: Callable[[float], bool]
    criterion: str
    on_text: bool = False  # then the text's digest belongs to a cell's settings


def slope(by_depth: dict[str, float]) -> float:
    """Of log value against log depth."""
    x = torch.tensor([float(depth) for depth in by_depth], dtype=torch.float64).log()
    y = torch.tensor(list(by_depth.values()), dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
