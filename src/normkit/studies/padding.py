"""BatchNorm over sequences of different lengths: with a mask and without, and what evaluation makes of it.

Here: PADDING.
May import: torch, layers, study (its text), protocol.
Read next: cost.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from normkit.layers import BatchNorm1d
from normkit.report.table import csv_rows
from normkit.studies.protocol import Chart, Figure, Record, Settings, Study, each, line, median, panel, percent, where
from normkit.study import data

LONGEST = 48  # bytes of a line that is used
LENGTHS = (48, 96, 192)  # to which batches are padded
_LOOKS: dict[bool, tuple[str, str | None]] = {False: ("batch", "post"), True: ("batch", "pre")}
_NAMES = {False: "without a mask", True: "with the mask"}


@cache
def _lines() -> tuple[list[bytes], list[bytes], str]:
    """Lines of 8 to LONGEST bytes, to train on and held out, and the digest of the text."""
    corpus = data.standard_library(1_000_000)

    def of(content: bytes) -> list[bytes]:
        return [text for text in content.splitlines() if len(text.strip()) >= 8 and len(text) <= LONGEST]

    return of(corpus.train), of(corpus.held_out), corpus.digest


def _batch(lines: Sequence[bytes], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets (B, T), the next bytes, padded with byte 0; and which positions are valid."""
    ids = torch.stack(
        [
            pad(torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), (0, length + 1 - len(text)))
            for text in lines
        ]
    )
    sizes = torch.tensor([len(text) - 1 for text in lines])
    return ids[:, :-1], ids[:, 1:], torch.arange(length) < sizes[:, None]


class Net(nn.Module):
    """Two causal convolutions with BatchNorm and ReLU over embedded bytes, then the next byte's logits."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embed = nn.Embedding(256, 32)
        self.convolutions = nn.ModuleList([nn.Conv1d(32, 64, 4), nn.Conv1d(64, 64, 4)])
        self.norms = nn.ModuleList([BatchNorm1d(64), BatchNorm1d(64)])
        self.head = nn.Conv1d(64, 256, 1)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(pad(x, (3, 0)))
            x = torch.relu(norm(x, valid) if self.masked else norm(x))
        logits: Tensor = self.head(x)
        return logits

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Nats per valid byte."""
        ids, targets, valid = batch
        logits = self(ids, valid).transpose(1, 2)
        return cross_entropy(logits[valid], targets[valid])


def _cells(thorough: bool) -> list[Settings]:
    return [
        {"masked": masked, "length": length, "steps": 600 if thorough else 150, "batch": 32, "lr": 3e-3, "seed": seed,
         "text": _lines()[2]}
        for masked in (False, True)
        for length in LENGTHS
        for seed in (range(5) if thorough else range(1))
    ]  # fmt: skip


def _run(cell: Settings) -> dict[str, Any]:
    train, held_out, _ = _lines()
    torch.manual_seed(cell["seed"])
    model = Net(cell["masked"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell["lr"])
    draw = torch.Generator().manual_seed(cell["seed"])
    shares = []
    for _ in range(cell["steps"]):
        taken = torch.randint(len(train), (cell["batch"],), generator=draw)
        batch = _batch([train[i] for i in taken.tolist()], cell["length"])
        shares.append(1.0 - float(batch[2].double().mean()))
        optimizer.zero_grad()
        model.loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    scored = held_out[:512]
    with torch.no_grad():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        own_loss = float(model.loss(_batch(scored, cell["length"])))
        model.load_state_dict(before)  # the statistics that this batch moved
        model.eval()
        stored = float(model.loss(_batch(scored, cell["length"])))
        model.train()
        # the same lines with twice the padding: with a mask nothing may change
        other = float(model.loss(_batch(scored, 2 * cell["length"])))
    return {
        "padding": sum(shares) / len(shares),
        "eval_loss": stored,
        "train_mode_loss": own_loss,
        "more_padding": other - own_loss,
    }


def _figures(records: Sequence[Record]) -> list[Figure]:
    def lines(field: str) -> list[Any]:
        return [
            line(_NAMES[flag], where(records, masked=flag), "length", field, _LOOKS[flag]) for flag in (False, True)
        ]

    label = "length to which batches are padded"
    fields = ("masked", "length", "seed", "padding", "eval_loss", "train_mode_loss", "more_padding")
    chart = Chart(
        "padding-loss",
        "Loss on valid bytes, by the length that lines are padded to",
        "curves",
        (
            panel("evaluation", (label, "nats per byte"), lines("eval_loss")),
            panel("train mode, padding doubled", (label, "change, nats per byte"), lines("more_padding")),
        ),
        fields,
        csv_rows(records, fields),
    )
    measured = (
        "512 held-out lines, loss at valid positions only, after the same training; on the right the batch's own "
        "statistics, the same lines padded to twice the length minus padded as in training."
    )
    return [Figure(chart, tuple(_findings(records)), measured)]


def _findings(records: Sequence[Record]) -> list[str]:
    lengths = [set(each(where(records, masked=flag), "length")) for flag in (False, True)]
    if not (both := lengths[0] & lengths[1]):
        return []
    longest = max(both)
    without, masked = (where(records, length=longest, masked=flag) for flag in (False, True))
    return [
        f"Padded to {longest} ({percent(median(without, 'padding'), 0)} padding), evaluation ends at "
        f"{median(without, 'eval_loss'):.3f} nats per byte without a mask and {median(masked, 'eval_loss'):.3f} with "
        "it.",
        f"Twice the padding changes the loss with the batch's own statistics by "
        f"{median(without, 'more_padding'):+.3f} without a mask and {median(masked, 'more_padding'):+.1g} with it.",
    ]


PADDING = Study(
    name="padding",
    question="What does padding do to BatchNorm's statistics, and what does a mask change?",
    data="lines of the Python standard library's sources, two causal convolutions",
    cells=_cells,
    run=_run,
    columns=(
        ("masked", "mask", "whether BatchNorm knows the valid positions"),
        ("length", "padded to", "bytes"),
        ("seed", "seed", "of weights and batches"),
        ("padding", "padding", "share of positions that are padding"),
        ("eval_loss", "eval loss", "nats per valid byte with running statistics"),
        ("train_mode_loss", "own statistics", "the same with the batch's own statistics"),
        ("more_padding", "more padding", "change of the latter with twice the padding"),
    ),
    figures=_figures,
    findings=_findings,
)
