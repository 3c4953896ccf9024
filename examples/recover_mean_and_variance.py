"""gamma and beta can undo the normalization: trained by the plain rule, they bring mean 5 and variance 10 back.

A batch with mean 5 and variance 10 goes into BatchNorm, whose gamma = 1 and beta = 0 give it mean 0 and variance 1.
The loss asks for the batch itself, 1/2 mean((out - x)^2), and each step is

    gamma -= lr * dgamma,     beta -= lr * dbeta

until gamma = sqrt(variance + eps) and beta = mean. Run it: python examples/recover_mean_and_variance.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import normkit

MEAN, VARIANCE = 5.0, 10.0
LEARNING_RATE = 0.2
STEPS = 100


def batch() -> Tensor:
    """64 values with mean 5 and variance 10, to rounding."""
    values = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    standard = (values - values.mean()) / values.std(correction=0)
    return MEAN + math.sqrt(VARIANCE) * standard


def main() -> dict[str, float]:
    x = batch()
    norm = normkit.BatchNorm1d(1, dtype=torch.float64)
    gamma, beta = norm.weight, norm.bias
    print(f"{'step':>4}  {'gamma':>8}  {'beta':>8}  {'mean':>8}  {'variance':>8}  {'loss':>9}")
    for step in range(STEPS + 1):
        out = norm(x)
        loss = 0.5 * (out - x).square().mean()
        if step in (0, 1, 2, 5, 10, 20, 50, STEPS):
            mean, variance = out.mean().item(), out.var(correction=0).item()
            print(
                f"{step:4}  {gamma.item():8.4f}  {beta.item():8.4f}  {mean:8.4f}  {variance:8.4f}  {loss.item():9.2e}"
            )
        if step == STEPS:
            break
        dgamma, dbeta = torch.autograd.grad(loss, (gamma, beta))
        with torch.no_grad():
            gamma -= LEARNING_RATE * dgamma
            beta -= LEARNING_RATE * dbeta
    print(f"gamma is sqrt({VARIANCE:g}) = {math.sqrt(VARIANCE):.4f} and beta is {MEAN:g}: the normalization is undone.")
    return {
        "gamma": gamma.item(),
        "beta": beta.item(),
        "mean": out.mean().item(),
        "variance": out.var(correction=0).item(),
        "loss": loss.item(),
    }


if __name__ == "__main__":
    main()
