"""BatchNorm at small batches, beside norms that do not know the batch.

Here: BATCH_SIZE.
May import: torch, protocol, digits.
Read next: running.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from normkit.report.table import csv_rows
from normkit.report.wording import norm_name
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

SIZES = (2, 4, 8, 16, 32, 64, 128)
_LOOKS: dict[str, tuple[str, str | None]] = {
    "batch": ("batch", "pre"),
    "group": ("group", "pre"),
    "layer": ("layer", "pre"),
    "rms": ("rms", "pre"),
    "none": ("none", None),
}


def _cells(thorough: bool) -> list[Settings]:
    return [
        {"norm": norm, "batch": batch, "epochs": 20 if thorough else 10, "lr_at_32": 0.05, "seed": seed}
        for norm in digits.NORMS
        for batch in SIZES
        for seed in (range(5) if thorough else range(1))
    ]


def _run(cell: Settings) -> dict[str, Any]:
    images, labels, test_images, test_labels = digits.digits()
    torch.manual_seed(cell["seed"])
    model = digits.ConvNet(digits.NORMS[cell["norm"]])
    # the learning rate grows with the batch, so that an epoch moves the weights as far (Goyal et al. 2017)
    optimizer = torch.optim.SGD(model.parameters(), lr=cell["lr_at_32"] * cell["batch"] / 32, momentum=0.9)
    steps = cell["epochs"] * (len(labels) // cell["batch"])
    for taken in islice(digits.batches(len(labels), cell["batch"], cell["seed"]), steps):
        optimizer.zero_grad()
        cross_entropy(model(images[taken]), labels[taken]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    own = digits.error(deepcopy(model).train(), test_images, test_labels, cell["batch"])
    model.eval()
    return {
        "steps": steps,
        "train_error": digits.error(model, images, labels),
        "test_error": digits.error(model, test_images, test_labels),
        "test_error_own_statistics": own,
    }


def _figures(records: Sequence[Record]) -> list[Figure]:
    labels = ("batch size, log2", "test error")
    lines = [
        line(norm_name(norm), where(records, norm=norm), "batch", "test_error", _LOOKS[norm], log2=True)
        for norm in each(records, "norm")
    ]
    batch_norm = where(records, norm="batch")
    both = [
        line("running statistics", batch_norm, "batch", "test_error", ("batch", "pre"), log2=True),
        line("the test batch's own", batch_norm, "batch", "test_error_own_statistics", ("batch", "post"), log2=True),
    ]
    fields = ("norm", "batch", "seed", "train_error", "test_error", "test_error_own_statistics")
    chart = Chart(
        "batch-size-error",
        "Test error by batch size",
        "curves",
        (panel("all norms, eval mode", labels, lines), panel("BatchNorm, by its statistics", labels, both)),
        fields,
        csv_rows(records, fields),
    )
    said = []
    for norm in each(records, "norm"):
        some = where(records, norm=norm)
        small, large = (choose(record["batch"] for record in some) for choose in (min, max))
        first, last = (percent(median(where(some, batch=size), "test_error")) for size in (small, large))
        said.append(f"{norm_name(norm)}: {first} test error at batch {small}, {last} at {large}.")
    measured = (
        "share of wrong answers on 450 test images after training with the same number of epochs and a learning rate "
        "in proportion to the batch; eval mode, and for BatchNorm also with the statistics of test batches of the "
        "training's size. Lines are medians over seeds, bands their range."
    )
    return [Figure(chart, tuple(said), measured)]


def _findings(records: Sequence[Record]) -> list[str]:
    small, large, said = SIZES[0], SIZES[-1], []
    rises = {}
    for norm in ("batch", "group", "layer", "rms"):
        first, last = (median(where(records, norm=norm, batch=size), "test_error") for size in (small, large))
        if not math.isnan(first - last):
            rises[norm_name(norm)] = f"{100 * (first - last):+.1f} points"
    if rises:
        changes = ", ".join(f"{name}'s by {rise}" for name, rise in rises.items())
        said.append(f"From batch {large} to batch {small} the test error changes: {changes}.")
    if at_small := where(records, norm="batch", batch=small):
        own, running = (percent(median(at_small, name)) for name in ("test_error_own_statistics", "test_error"))
        said.append(
            f"At batch {small} BatchNorm has {running} test error with its running statistics and {own} with those of "
            f"test batches of {small}."
        )
    return said


BATCH_SIZE = Study(
    name="batch-size",
    question="How small may a batch be for BatchNorm, and what do norms that do not know the batch do there?",
    data="scikit-learn's digits (1,797 images of 8 x 8), a network of three convolutions",
    cells=_cells,
    run=_run,
    columns=(
        ("norm", "norm", "after each convolution"),
        ("batch", "batch", "images in a training batch"),
        ("seed", "seed", "of weights and batches"),
        ("train_error", "train error", "share of wrong answers on the training images, eval mode"),
        ("test_error", "test error", "the same on the test images"),
        ("test_error_own_statistics", "own statistics", "test error in train mode, batches of the training's size"),
    ),
    figures=_figures,
    findings=_findings,
)
