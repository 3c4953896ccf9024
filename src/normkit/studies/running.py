"""Running statistics while a network learns: how far off, and from when evaluation can be trusted.

Here: RUNNING.
May import: torch, layers, protocol, digits.
Read next: saturation.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normkit.layers import BatchNorm2d, recompute_statistics
from normkit.report.shapes import Series
from normkit.studies import digits
from normkit.studies.protocol import Chart, Figure, Record, Settings, Study, median, panel, percent, where
from normkit.theory import updates_until

DECAYS = (0.9, 0.99, 0.999)
_LOOKS: dict[float, tuple[str, str | None]] = {0.9: ("layer", "pre"), 0.99: ("batch", "pre"), 0.999: ("rms", "post")}
TRUST = 0.01  # evaluation is trusted once its error stays within one point of that with exact statistics


def _cells(thorough: bool) -> list[Settings]:
    return [
        {"decay": decay, "steps": 6000 if thorough else 1200, "batch": 64, "lr": 0.02, "seed": seed}
        for decay in DECAYS
        for seed in (range(5) if thorough else range(1))
    ]


def _looked_at(steps: int) -> list[int]:
    """Steps at even distances on a logarithmic scale."""
    return sorted({round(10 ** (i / 5)) for i in range(5 * math.ceil(math.log10(steps)) + 1)} & set(range(steps + 1)))


def _norms(model: nn.Module) -> list[BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, BatchNorm2d)]


def _distance(running: nn.Module, exact: nn.Module) -> float:
    """Mean over channels of |running mean - mean| / std, all norms together."""
    parts: list[Tensor] = []
    for ours, true in zip(_norms(running), _norms(exact), strict=True):
        assert ours.running_mean is not None
        assert true.running_mean is not None
        assert true.running_var is not None
        parts.append((ours.running_mean - true.running_mean).abs() / (true.running_var + digits.EPS).sqrt())
    return float(torch.cat(parts).mean())


def _run(cell: Settings) -> dict[str, Any]:
    images, labels, test_images, test_labels = digits.digits()
    torch.manual_seed(cell["seed"])
    model = digits.ConvNet(lambda channels: BatchNorm2d(channels, eps=digits.EPS, decay=cell["decay"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=cell["lr"], momentum=0.9)
    looked_at = _looked_at(cell["steps"])
    curve = []
    for step, taken in enumerate(islice(digits.batches(len(labels), cell["batch"], cell["seed"]), cell["steps"]), 1):
        optimizer.zero_grad()
        cross_entropy(model(images[taken]), labels[taken]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step in looked_at:
            exact = deepcopy(model)
            recompute_statistics(exact, torch.split(images, 449))
            curve.append(
                {
                    "step": step,
                    "distance": _distance(model, exact),
                    "error": digits.error(deepcopy(model).eval(), test_images, test_labels),
                    "exact_error": digits.error(exact.eval(), test_images, test_labels),
                }
            )
    wrong = [point["step"] for point in curve if point["error"] > point["exact_error"] + TRUST]
    after = [point["step"] for point in curve if point["step"] > max(wrong, default=0)]
    return {
        "curve": curve,
        "trusted_from": after[0] if after else None,
        "end_distance": curve[-1]["distance"],
        "end_error": curve[-1]["error"],
        "end_exact_error": curve[-1]["exact_error"],
    }


def _curve(records: Sequence[Record], field: str, label: str, look: tuple[str, str | None]) -> Series:
    """By step, log10; of the first seed."""
    first = min(records, key=lambda record: record["seed"])
    points = tuple((math.log10(point["step"]), point[field]) for point in first["curve"])
    return Series(label, *look, points)


def _figures(records: Sequence[Record]) -> list[Figure]:
    by_decay = {decay: where(records, decay=decay) for decay in DECAYS if where(records, decay=decay)}
    distances = [_curve(some, "distance", f"decay {decay}", _LOOKS[decay]) for decay, some in by_decay.items()]
    errors = [_curve(some, "error", f"decay {decay}", _LOOKS[decay]) for decay, some in by_decay.items()]
    some = next(iter(by_decay.values()))
    errors.append(_curve(some, "exact_error", f"exact statistics (decay {next(iter(by_decay))})", ("none", None)))
    table = tuple(
        (record["decay"], record["seed"], *(point[name] for name in ("step", "distance", "error", "exact_error")))
        for record in records
        for point in record["curve"]
    )
    fields = ("decay", "seed", "step", "distance", "error", "exact_error")
    label = "training step, log10"
    chart = Chart(
        "running-statistics",
        "Running statistics against exact ones",
        "curves",
        (
            panel("distance of the means", (label, "standard deviations off"), distances),
            panel("evaluation", (label, "test error"), errors),
        ),
        fields,
        table,
    )
    said = []
    for decay, some in by_decay.items():
        trusted = median(some, "trusted_from", missing=math.inf)
        since = "not within the run" if math.isinf(trusted) else f"from step {trusted:.0f} on"
        said.append(
            f"Decay {decay}: evaluation is within {percent(TRUST, 0)} of that with exact statistics {since}; at the "
            f"end the means are {median(some, 'end_distance'):.3f} standard deviations off."
        )
    measured = (
        "one training run for each decay, the same weights in all, since training uses batch statistics; at each "
        "marked step the population statistics of the training images were computed exactly "
        "(normkit.recompute_statistics). Distance: mean over channels of |running mean - mean| / std. The first seed."
    )
    return [Figure(chart, tuple(said), measured)]


def _findings(records: Sequence[Record]) -> list[str]:
    said = []
    for decay in DECAYS:
        some = where(records, decay=decay)
        if not some:
            continue
        trusted = median(some, "trusted_from", missing=math.inf)
        steps = some[0]["steps"]
        since = f"later than step {steps}" if math.isinf(trusted) else f"step {trusted:.0f}"
        said.append(
            f"With decay {decay} evaluation can be trusted from {since} on; the start value weighs less than 1 % "
            f"after {updates_until(decay)} updates."
        )
    return said


RUNNING = Study(
    name="running",
    question="How far are running statistics from exact ones while a network learns, and when can eval be trusted?",
    data="scikit-learn's digits, a network of three convolutions with BatchNorm",
    cells=_cells,
    run=_run,
    columns=(
        ("decay", "decay", "weight of the old average in an update"),
        ("seed", "seed", "of weights and batches"),
        ("trusted_from", "trusted from", "first step from which the error stays within one point of the exact one"),
        ("end_distance", "distance", "of the running means at the end, in standard deviations"),
        ("end_error", "test error", "at the end, with running statistics"),
        ("end_exact_error", "exact", "the same with exact statistics"),
    ),
    figures=_figures,
    findings=_findings,
)
