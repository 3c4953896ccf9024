"""Deep sigmoid and tanh networks: saturated units and gradients by layer, with BatchNorm and without.

Here: SATURATION.
May import: torch, layers, theory, protocol, digits.
Read next: padding.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
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
LOSS_EVERY = 10  # steps between the points of a learning curve
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


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels, test_images, test_labels = digits.digits()
    return images.flatten(1), labels, test_images.flatten(1), test_labels


def at_initialisation(model: Net, activation: str) -> dict[str, list[float]]:
    """Of each layer the share of saturated units over the training images, and its matrix's gradient norm."""
    images, labels, _, _ = _digits()
    threshold = theory.saturation_threshold(activation, SHARE)
    logits, entered = model(images)
    weights = [linear.weight for linear in model.linear if isinstance(linear, nn.Linear)]
    gradients = torch.autograd.grad(cross_entropy(logits, labels), weights)
    shares = [float((z.abs() > threshold).double().mean()) for z in entered]
    lengths = [float(gradient.double().norm()) for gradient in gradients]
    return {"saturated": shares, "gradients": lengths}


def _run(cell: Settings) -> dict[str, Any]:
    images, labels, test_images, test_labels = _digits()
    torch.manual_seed(cell["seed"])
    model = Net(cell["activation"], cell["std"], cell["batchnorm"])
    at_init = at_initialisation(model, cell["activation"])
    shares, lengths = at_init["saturated"], at_init["gradients"]
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
        **at_init,
        "first_saturated": shares[0],
        "last_saturated": shares[-1],
        "predicted": theory.saturation_probability(cell["activation"], 1.0 if cell["batchnorm"] else spread, SHARE),
        "gradient_ratio": lengths[0] / lengths[-1] if lengths[-1] else None,
        "losses": losses[::LOSS_EVERY],
        "end_loss": sum(losses[-20:]) / len(losses[-20:]),
        "test_error": float(wrong.double().mean()),
    }


def _series(records: Sequence[Record], field: str, activation: str) -> list[Series]:
    return [
        line(f"{_NAMES[flag]}", where(records, activation=activation, batchnorm=flag), "log_std", field, _LOOKS[flag])
        for flag in (False, True)
    ]


def _chart(
    records: Sequence[Record],
    name: str,
    title: str,
    field: str,
    label: str,
    *,
    log: bool = False,
    more: tuple[str, ...] = (),
    predicted: bool = False,
) -> Chart:
    """A field by the initial weights' standard deviation, a panel for each activation."""
    fields = ("activation", "std", "batchnorm", "seed", field, *more)
    panels = [
        panel(
            activation,
            ("standard deviation of initial weights, log10", label),
            _series(records, field, activation),
            _predicted(where(records, activation=activation, batchnorm=False)) if predicted else (),
            log=log,
        )
        for activation in each(records, "activation")
    ]
    return Chart(name, title, "curves", tuple(panels), fields, csv_rows(records, fields), log=log)


def _predicted(records: Sequence[Record]) -> tuple[Reference, ...]:
    points = tuple(sorted({(record["log_std"], record["predicted"]) for record in records}))
    return (Reference("first layer without, predicted", points),) if points else ()


def _curves(
    records: Sequence[Record],
    name: str,
    title: str,
    field: str,
    labels: tuple[str, str],
    *,
    every: int = 1,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> Chart:
    """A list of numbers at the smallest, the middle and the largest deviation; of the first seed.

    Its entries stand at 1, 1 + every, ... on the x axis. Without `limits` each panel has its own.
    """
    stds = sorted(each(records, "std"))
    panels, points = [], []
    for activation in each(records, "activation"):
        for std in dict.fromkeys((stds[0], stds[len(stds) // 2], stds[-1])):
            lines = []
            for flag in (False, True):
                for record in where(records, activation=activation, std=std, batchnorm=flag)[:1]:
                    curve = tuple((float(1 + every * i), value) for i, value in enumerate(record[field]))
                    lines.append(Series(_NAMES[flag], *_LOOKS[flag], curve))
                    points += [(activation, std, flag, record["seed"], *point) for point in curve]
            one = panel(f"{activation}, {std:g}", labels, lines, log=log)
            panels.append(one if limits is None else replace(one, limits=limits))
    fields = ("activation", "std", "batchnorm", "seed", labels[0], field)
    return Chart(name, title, "curves", tuple(panels), fields, tuple(points), log=log)


def _figures(records: Sequence[Record]) -> list[Figure]:
    records = [{**record, "log_std": math.log10(record["std"])} for record in records]
    saturated = _chart(
        records,
        "saturation-units",
        "Saturated units of the first layer, at initialisation",
        "first_saturated",
        "share of saturated units",
        more=("last_saturated", "predicted"),
        predicted=True,
    )
    gradients = _chart(
        records,
        "saturation-gradients",
        "Gradient of the first layer over that of the last, at initialisation",
        "gradient_ratio",
        "ratio of gradient norms",
        log=True,
    )
    by_layer = _curves(
        records,
        "saturation-layers",
        "Gradient by layer, at initialisation",
        "gradients",
        ("layer", "gradient norm (L2)"),
        log=True,
    )
    units_by_layer = _curves(
        records,
        "saturation-units-by-layer",
        "Saturated units by layer, at initialisation",
        "saturated",
        ("layer", "share of saturated units"),
        limits=(-0.05, 1.05),
    )
    learning = _curves(
        records,
        "saturation-learning",
        "Learning curves",
        "losses",
        ("step", "training loss (nats)"),
        every=LOSS_EVERY,
    )
    errors = _chart(
        records, "saturation-error", "Test error after training", "test_error", "test error", more=("end_loss",)
    )
    return [
        Figure(saturated, tuple(_of_units(records)), f"share of units and training images whose derivative is below "
               f"{SHARE:g} of its largest value; the prediction is normkit.theory's for Gaussian z."),
        Figure(units_by_layer, (), "the same share in each of the six layers; titles give the deviation."),
        Figure(gradients, (), "L2 norms of the loss's gradient with respect to the first and the last matrix of six."),
        Figure(by_layer, (), "the same norm of each of the six matrices; titles give the deviation."),
        Figure(learning, (), "loss of the training batch, every tenth step; titles give the deviation."),
        Figure(errors, tuple(_of_errors(records)), "share of wrong answers on 450 test images, eval mode."),
    ]  # fmt: skip


def _compared(records: Sequence[Record], activation: str) -> list[float]:
    """The standard deviations that were measured without BatchNorm and with it."""
    without, with_norm = (each(where(records, activation=activation, batchnorm=flag), "std") for flag in (False, True))
    return sorted(set(without) & set(with_norm))


def _of_units(records: Sequence[Record]) -> list[str]:
    said = []
    for activation in each(records, "activation"):
        if not (stds := _compared(records, activation)):
            continue
        largest = stds[-1]
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
        if not (stds := _compared(records, activation)):
            continue
        learned = {
            flag: sum(
                median(where(records, activation=activation, batchnorm=flag, std=std), "test_error") < 0.5
                for std in stds
            )
            for flag in (False, True)
        }
        said.append(
            f"{activation}: of {len(stds)} initial standard deviations {learned[False]} end below 50 % test error "
            f"without and {learned[True]} with BatchNorm."
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
