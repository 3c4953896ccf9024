"""Deep sigmoid and tanh networks: saturated units and gradients by layer, with BatchNorm and without.

Here: SATURATION.
May import: torch, layers, theory, protocol, digits.
Read next: padding.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normkit import theory
from normkit.layers import BatchNorm1d
from normkit.report.shapes import Reference, Series
from normkit.report.table import csv_rows
from normkit.studies import digits
from normkit.studies.protocol import (
    Chart,
    Figure,
    Record,
    Settings,
    Study,
    each,
    line,
    median,
    panel,
    percent,
    where,
)

WIDTH, LAYERS, SHARE = 128, 6, 0.1
STDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_LOOKS: dict[bool, tuple[str, str | None]] = {False: ("none", None), True: ("batch", "pre")}
_NAMES = {False: "without", True: "with BatchNorm"}


class Net(nn.Module):
    """Linear maps of 128, each followed by a BatchNorm or none and by the activation; a linear map to ten classes."""

    def __init__(self, activation: str, std: float, batchnorm: bool) -> None:
        super().__init__()
        sizes = [64, *[WIDTH] * LAYERS]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(BatchNorm1d(WIDTH) if batchnorm else nn.Identity() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 10)
        self.activation = torch.sigmoid if activation == "sigmoid" else torch.tanh
        for linear in self.linear:
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and what enters every activation."""
        entered = []
        for linear, norm in zip(self.linear, self.norms, strict=True):
            entered.append(norm(linear(x)))
            x = self.activation(entered[-1])
        return self.head(x), entered


def _cells(thorough: bool) -> list[Settings]:
    return [
        {
            "activation": activation,
            "std": std,
            "batchnorm": batchnorm,
            "steps": 1000 if thorough else 200,
            "batch": 64,
            "lr": 0.05,
            "seed": seed,
        }
        for activation in ("sigmoid", "tanh")
        for std in STDS
        for batchnorm in (False, True)
        for seed in (range(5) if thorough else range(1))
    ]


def _run(cell: Settings) -> dict[str, Any]:
    images, labels, test_images, test_labels = (part.flatten(1) if part.dim() > 1 else part for part in digits.digits())
    torch.manual_seed(cell["seed"])
    model = Net(cell["activation"], cell["std"], cell["batchnorm"])
    threshold = theory.saturation_threshold(cell["activation"], SHARE)
    logits, entered = model(images)
    weights = [linear.weight for linear in model.linear if isinstance(linear, nn.Linear)]
    gradients = torch.autograd.grad(cross_entropy(logits, labels), weights)
    shares = [float((z.abs() > threshold).double().mean()) for z in entered]
    lengths = [float(gradient.double().norm()) for gradient in gradients]
    spread = theory.preactivation_std(cell["std"], 64, float(images.double().square().mean()))
    optimizer = torch.optim.SGD(model.parameters(), lr=cell["lr"], momentum=0.9)
    losses = []
    for taken in islice(digits.batches(len(labels), cell["batch"], cell["seed"]), cell["steps"]):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[taken])[0], labels[taken])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        wrong = model(test_images)[0].argmax(1) != test_labels
    return {
        "saturated": shares,
        "gradients": lengths,
        "first_saturated": shares[0],
        "last_saturated": shares[-1],
        "predicted": theory.saturation_probability(cell["activation"], 1.0 if cell["batchnorm"] else spread, SHARE),
        "gradient_ratio": lengths[0] / lengths[-1] if lengths[-1] else None,
        "losses": losses[::10],
        "end_loss": sum(losses[-20:]) / len(losses[-20:]),
        "test_error": float(wrong.double().mean()),
    }


def _series(records: Sequence[Record], field: str, activation: str) -> list[Series]:
    return [
        line(f"{_NAMES[flag]}", where(records, activation=activation, batchnorm=flag), "log_std", field, _LOOKS[flag])
        for flag in (False, True)
    ]


def _figures(records: Sequence[Record]) -> list[Figure]:
    records = [{**record, "log_std": math.log10(record["std"])} for record in records]
    activations = each(records, "activation")
    label = "standard deviation of initial weights, log10"
    fields: tuple[str, ...] = (
        "activation", "std", "batchnorm", "seed", "first_saturated", "last_saturated", "predicted"
    )  # fmt: skip
    predicted = Reference(
        "first layer without, predicted",
        tuple(
            (record["log_std"], record["predicted"])
            for record in sorted(where(records, activation=activations[0], batchnorm=False), key=lambda r: r["log_std"])
            if record["seed"] == 0
        ),
    )
    saturated = Chart(
        "saturation-units",
        "Saturated units of the first layer, at initialisation",
        "curves",
        tuple(
            panel(
                activation,
                (label, "share of saturated units"),
                _series(records, "first_saturated", activation),
                (predicted,) if activation == activations[0] else (),
            )
            for activation in activations
        ),
        fields,
        csv_rows(records, fields),
    )
    fields = ("activation", "std", "batchnorm", "seed", "gradient_ratio")
    gradients = Chart(
        "saturation-gradients",
        "Gradient of the first layer over that of the last, at initialisation",
        "curves",
        tuple(
            panel(
                activation, (label, "ratio of gradient norms"), _series(records, "gradient_ratio", activation), log=True
            )
            for activation in activations
        ),
        fields,
        csv_rows(records, fields),
        log=True,
    )
    fields = ("activation", "std", "batchnorm", "seed", "end_loss", "test_error")
    errors = Chart(
        "saturation-error",
        "Test error after training",
        "curves",
        tuple(
            panel(activation, (label, "test error"), _series(records, "test_error", activation))
            for activation in activations
        ),
        fields,
        csv_rows(records, fields),
    )
    return [
        Figure(saturated, tuple(_of_units(records)), f"share of units and training images whose derivative is below "
               f"{SHARE:g} of its largest value; the prediction is normkit.theory's for Gaussian z."),
        Figure(gradients, (), "L2 norms of the loss's gradient with respect to the first and the last matrix of six."),
        Figure(errors, tuple(_of_errors(records)), "share of wrong answers on 450 test images, eval mode."),
    ]  # fmt: skip


def _of_units(records: Sequence[Record]) -> list[str]:
    largest = max(record["std"] for record in records)
    said = []
    for activation in each(records, "activation"):
        some = where(records, activation=activation, std=largest)
        without, with_norm = (median(where(some, batchnorm=flag), "first_saturated") for flag in (False, True))
        said.append(
            f"{activation}, weights of standard deviation {largest:g}: {percent(without)} of the first layer's units "
            f"are saturated without and {percent(with_norm)} with BatchNorm; predicted "
            f"{percent(median(where(some, batchnorm=False), 'predicted'))} and "
            f"{percent(median(where(some, batchnorm=True), 'predicted'))}."
        )
    return said


def _of_errors(records: Sequence[Record]) -> list[str]:
    said = []
    for activation in each(records, "activation"):
        learned = {
            flag: sum(
                median(where(records, activation=activation, batchnorm=flag, std=std), "test_error") < 0.5
                for std in each(records, "std")
            )
            for flag in (False, True)
        }
        count = len(each(records, "std"))
        said.append(
            f"{activation}: of {count} initial standard deviations {learned[False]} end below 50 % test error without "
            f"and {learned[True]} with BatchNorm."
        )
    return said


def _findings(records: Sequence[Record]) -> list[str]:
    return [*_of_units(records), *_of_errors(records)]


SATURATION = Study(
    name="saturation",
    question="When do sigmoid and tanh networks saturate, what becomes of their gradients, and what does BatchNorm do?",
    data="scikit-learn's digits, six layers of 128 units",
    cells=_cells,
    run=_run,
    columns=(
        ("activation", "activation", "after each layer"),
        ("std", "std", "of the initial weights"),
        ("batchnorm", "BatchNorm", "before the activation"),
        ("seed", "seed", "of weights and batches"),
        ("first_saturated", "saturated, first", "share of the first layer's units at initialisation"),
        ("last_saturated", "saturated, last", "the same of the last layer"),
        ("gradient_ratio", "gradient ratio", "first layer's over last layer's at initialisation"),
        ("end_loss", "end loss", "training loss, mean of the last 20 steps"),
        ("test_error", "test error", "share of wrong answers"),
    ),
    figures=_figures,
    findings=_findings,
)
