"""The largest learning rate that works, by placement and depth, with a warm-up and without.

Here: WARMUP.
May import: torch, study (its transformer and text), placement, protocol.
Read next: batch_size.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch

from normkit.placement import placements
from normkit.report.table import csv_rows
from normkit.studies.protocol import Chart, Figure, Record, Settings, Study, each, line, median, panel, where
from normkit.study import data
from normkit.study.models import Transformer
from normkit.study.train import learning_rate

PLACEMENTS = ("pre", "post", "deepnorm", "sandwich")
LOWEST, HIGHEST, STEP = -14, 0, 2  # powers of two that are tried: factors of 4, for time (each is a training)
PRECISION = 0.25  # of the answer, in powers of two: 19 %
# Nats a byte below guessing by the frequency of bytes. Not a distance from the cell's own best: PostNorm at 6 blocks
# ended at 2.97 at best, and by that measure "worked" at 0.42, where it ended at 3.13 beside 3.16 for guessing.
MARGIN = 0.2
_LOOKS: dict[str, tuple[str, str | None]] = {
    "pre": ("layer", "pre"),
    "post": ("batch", "post"),
    "deepnorm": ("rms", "pre"),
    "sandwich": ("none", "pre"),
}


@cache
def text() -> data.Corpus:
    """The first million bytes of the Python library's sources."""
    return data.standard_library(1_000_000)


def _cells(thorough: bool) -> list[Settings]:
    return [
        {
            "placement": placement,
            "depth": depth,
            "warmup": warmup,
            "norm": "layer",
            "steps": 100,
            "width": 32,
            "batch": 8,
            "seq": 64,
            "seed": seed,
            "text": text().digest,
        }
        for placement in PLACEMENTS
        for depth in ((2, 4, 8, 16) if thorough else (2, 6))
        for warmup in (0, 25)
        for seed in (range(3) if thorough else range(1))
    ]


def guessing(cell: Settings) -> float:
    """The loss of guessing, on bytes spread over the text that is trained on."""
    corpus = text()
    return data.guess_loss(corpus.train, data.spaced_batches(corpus.train, cell["batch"], cell["seq"], 8))


def _end_loss(cell: Settings, lr: float) -> float:
    return trained(cell, lr)[1]


def trained(cell: Settings, lr: float) -> tuple[Transformer, float]:
    """The cell's model after its steps, and the mean loss of the last ten; infinite once a loss is not finite."""
    corpus = text()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell["seed"])
        model = Transformer(
            depth=cell["depth"],
            width=cell["width"],
            heads=4,
            seq=cell["seq"],
            norm=cell["norm"],
            placement=placements(cell["placement"], 2 * cell["depth"]),
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    last = []
    taken = islice(data.batches(corpus.train, cell["batch"], cell["seq"], cell["seed"]), cell["steps"])
    for step, (inputs, targets) in enumerate(taken, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, cell["warmup"])
        optimizer.zero_grad()
        loss = model.loss(inputs, targets)
        if not math.isfinite(value := float(loss.detach())):
            return model, math.inf
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step > cell["steps"] - 10:
            last.append(value)
    return model, sum(last) / len(last)


def _run(cell: Settings) -> dict[str, Any]:
    guess = guessing(cell)
    tried: dict[float, float] = {}  # by the rate's power of two

    def works(power: float) -> bool:
        if power not in tried:
            tried[power] = _end_loss(cell, 2.0**power)
        return tried[power] <= guess - MARGIN

    working = [float(power) for power in range(LOWEST, HIGHEST + 1, STEP) if works(power)]
    if not working:  # DeepNorm at 6 blocks works between 2^-9.5 and 2^-8.25 only
        best_power = min(tried, key=lambda power: tried[power])
        working = [power for power in (best_power - STEP / 2, best_power + STEP / 2) if works(power)]
    low = max(working, default=math.nan)
    high = min((power for power in tried if power > low), default=low)
    while high - low > PRECISION:  # never where none works: NaN
        middle = (low + high) / 2
        low, high = (middle, high) if works(middle) else (low, middle)
    best = min(tried.values())
    losses = [[2.0**power, loss if math.isfinite(loss) else None] for power, loss in sorted(tried.items())]
    return {
        "largest_lr": 2.0**low if working else None,
        "best_loss": best if math.isfinite(best) else None,
        "guess_loss": guess,
        "tried": losses,
    }


def _figures(records: Sequence[Record]) -> list[Figure]:
    labels = ("transformer blocks", "largest learning rate that works")
    panels = []
    for warmup in each(records, "warmup"):
        title = "without warm-up" if warmup == 0 else f"{warmup} steps of warm-up"
        lines = [
            line(name, where(records, placement=name, warmup=warmup), "depth", "largest_lr", _LOOKS[name])
            for name in each(records, "placement")
        ]
        panels.append(panel(title, labels, lines, log=True))
    fields = ("placement", "depth", "warmup", "seed", "largest_lr")
    chart = Chart(
        "warmup-rates", "The largest learning rate that works", "curves", tuple(panels), fields,
        csv_rows(records, fields), log=True,
    )  # fmt: skip
    measured = (
        f"AdamW, {records[0]['steps']} steps; a rate works if the mean loss of its last ten steps lies {MARGIN:g} nats "
        f"per byte or more below guessing by the frequency of bytes. Rates from 2^{LOWEST} to 2^{HIGHEST} by factors "
        f"of {2**STEP}, and where none works half a step beside the best; above the largest that works bisected to "
        f"a factor of 2^{PRECISION}."
    )
    return [Figure(chart, tuple(_findings(records)), measured)]


def _rate(records: Sequence[Record], **settings: Any) -> str:
    some = where(records, **settings)
    if not some:
        return "not measured"
    value, best = median(some, "largest_lr", missing=0.0), median(some, "best_loss", missing=math.inf)
    loss = "every one diverges" if math.isinf(best) else f"best loss {best:.2f}"
    return f"{value:.2g} ({loss})" if value else f"none ({loss})"


def _findings(records: Sequence[Record]) -> list[str]:
    deepest = max(record["depth"] for record in records)
    warm = max(record["warmup"] for record in records)
    parts = [
        f"{name} {_rate(records, placement=name, depth=deepest, warmup=0)} without and "
        f"{_rate(records, placement=name, depth=deepest, warmup=warm)} with {warm} steps of warm-up"
        for name in each(records, "placement")
    ]
    guessing = median(records, "guess_loss")
    return [
        f"At {deepest} blocks the largest learning rate that works is: {'; '.join(parts)}. Guessing has {guessing:.2f}."
    ]


WARMUP = Study(
    name="warmup",
    question="How large may the learning rate be, by placement and depth, and what does a warm-up change?",
    data="the Python standard library's sources, byte by byte",
    cells=_cells,
    run=_run,
    columns=(
        ("placement", "placement", "of LayerNorm"),
        ("depth", "blocks", "transformer blocks"),
        ("warmup", "warm-up", "steps of linear warm-up"),
        ("seed", "seed", "of weights and batches"),
        ("largest_lr", "largest rate", "that ends the margin below guessing; a dash: none does"),
        ("best_loss", "best loss", "nats per byte, of the best rate"),
    ),
    figures=_figures,
    findings=_findings,
)
