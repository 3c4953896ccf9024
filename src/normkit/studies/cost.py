"""What norms cost: time, memory and parameters of a training step, and RMSNorm's saving over LayerNorm alone.

Here: COST.
May import: torch, functional, study (its transformer), placement, protocol.
Read next: run.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normkit import functional
from normkit.placement import placements
from normkit.report.shapes import Series
from normkit.report.table import csv_rows
from normkit.report.wording import norm_name
from normkit.studies.protocol import Chart, Figure, Record, Settings, Study, panel, where
from normkit.study.models import Transformer

NORMS = ("none", "layer", "rms", "batch", "group")
SHAPES = ((16, 256), (256, 256), (256, 1024), (2048, 1024), (4096, 4096))


def _cells(thorough: bool) -> list[Settings]:
    rounds = 41 if thorough else 15
    step = {"what": "step", "depth": 4, "width": 128, "batch": 16, "seq": 64, "rounds": rounds, "seed": 0}
    return [step, *({"what": "alone", "rows": n, "size": d, "rounds": rounds, "seed": 0} for n, d in SHAPES)]


def _interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds; the calls in turn, round after round, short ones repeated up to a millisecond."""
    repeats = {}
    for name, call in calls.items():
        call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, round(1e-3 / max(time.perf_counter() - begin, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append(1e3 * (time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def _step(cell: Settings) -> dict[str, Any]:
    torch.manual_seed(cell["seed"])
    ids = torch.randint(0, 256, (cell["batch"], cell["seq"]))
    models: dict[str, Transformer] = {}
    for norm in NORMS:
        where_norms = None if norm == "none" else placements("pre", 2 * cell["depth"])
        models[norm] = Transformer(
            depth=cell["depth"], width=cell["width"], heads=4, seq=cell["seq"], norm=norm, placement=where_norms
        )
    saved = {norm: _saved_bytes(model, ids) for norm, model in models.items()}
    optimizers = {norm: torch.optim.AdamW(model.parameters(), lr=1e-4) for norm, model in models.items()}

    def train(norm: str) -> None:
        optimizers[norm].zero_grad()
        models[norm].loss(ids, ids).backward()  # type: ignore[no-untyped-call]
        optimizers[norm].step()

    times = _interleaved({norm: partial(train, norm) for norm in NORMS}, cell["rounds"])
    return {
        "step_ms": times,
        "saved_bytes": saved,
        "parameters": {norm: sum(p.numel() for p in model.parameters()) for norm, model in models.items()},
    }


def _saved_bytes(model: Transformer, ids: Tensor) -> int:
    """What a forward keeps for its backward, parameters and each memory once."""
    kept: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model.loss(ids, ids)
    del loss
    return sum(kept.values())


def _alone(cell: Settings) -> dict[str, Any]:
    torch.manual_seed(cell["seed"])
    x = torch.randn(cell["rows"], cell["size"])
    leaf, dout = x.clone().requires_grad_(), torch.randn_like(x)
    weight, bias = torch.ones(cell["size"], requires_grad=True), torch.zeros(cell["size"], requires_grad=True)

    def forward(norm: str) -> Tensor:
        with torch.no_grad():
            return _norm(norm, x, weight, bias)

    def both(norm: str) -> object:
        inputs = [leaf, weight, bias] if norm == "layer" else [leaf, weight]
        return torch.autograd.grad(_norm(norm, leaf, weight, bias), inputs, dout)

    calls: dict[str, Callable[[], object]] = {}
    for norm in ("layer", "rms"):
        calls[f"{norm} forward"] = partial(forward, norm)
        calls[f"{norm} both"] = partial(both, norm)
    target = torch.empty_like(x)
    calls["copy"] = lambda: target.copy_(x)
    return {"alone_ms": _interleaved(calls, cell["rounds"])}


def _norm(norm: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if norm == "layer":
        return functional.layer_norm(x, x.shape[-1], weight, bias)
    return functional.rms_norm(x, x.shape[-1], weight, 1e-5)


def _run(cell: Settings) -> dict[str, Any]:
    return _step(cell) if cell["what"] == "step" else _alone(cell)


def _flat(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each norm of the step, and for each shape."""
    found: list[dict[str, Any]] = []
    for record in where(records, what="step"):
        for norm, ms in record["step_ms"].items():
            found.append(
                {"what": f"training step, {norm_name(norm)}", "norm": norm, "ms": ms,
                 "over_none": ms / record["step_ms"]["none"], "saved_mb": record["saved_bytes"][norm] / 1e6,
                 "parameters": record["parameters"][norm]}
            )  # fmt: skip
    for record in where(records, what="alone"):
        times = record["alone_ms"]
        for norm in ("layer", "rms"):
            for part, said in (("forward", "forward"), ("both", "forward and backward")):
                found.append(
                    {"what": f"{norm_name(norm)} ({record['rows']}, {record['size']}), {said}", "norm": norm,
                     "ms": times[f"{norm} {part}"], "over_copy": times[f"{norm} {part}"] / times["copy"]}
                )  # fmt: skip
    return found


def _ratios(records: Sequence[Record]) -> list[dict[str, Any]]:
    """RMSNorm's time over LayerNorm's, by size of x."""
    return [
        {
            "elements": record["rows"] * record["size"],
            "log_elements": math.log2(record["rows"] * record["size"]),
            **{
                part: record["alone_ms"][f"rms {part}"] / record["alone_ms"][f"layer {part}"]
                for part in ("forward", "both")
            },
        }
        for record in where(records, what="alone")
    ]


def _figures(records: Sequence[Record]) -> list[Figure]:
    ratios = sorted(_ratios(records), key=lambda ratio: ratio["elements"])
    lines = [
        Series(label, *look, tuple((ratio["log_elements"], ratio[part]) for ratio in ratios))
        for label, part, look in (
            ("forward", "forward", ("rms", "pre")),
            ("forward and backward", "both", ("rms", "post")),
        )
    ]
    fields = ("what", "ms", "over_none", "over_copy", "saved_mb", "parameters")
    chart = Chart(
        "cost-rms-over-layer",
        "RMSNorm's time over LayerNorm's, alone",
        "curves",
        (panel("float32, one thread", ("elements of x, log2", "time over LayerNorm's"), lines),),
        fields,
        csv_rows(_flat(records), fields),
    )
    return [
        Figure(chart, tuple(_findings(records)), "normkit's functions, medians of interleaved rounds on one thread.")
    ]


def _findings(records: Sequence[Record]) -> list[str]:
    said = []
    for record in where(records, what="step"):
        times, saved = record["step_ms"], record["saved_bytes"]
        said.append(
            f"A training step of {record['depth']} blocks takes {times['layer']:.1f} ms with LayerNorm, "
            f"{times['rms']:.1f} with RMSNorm ({100 * (times['rms'] / times['layer'] - 1):+.1f} %) and "
            f"{times['none']:.1f} without a norm; it keeps {saved['layer'] / 1e6:.1f}, {saved['rms'] / 1e6:.1f} and "
            f"{saved['none'] / 1e6:.1f} MB for backward."
        )
    ratios = _ratios(records)
    if ratios:
        low, high = (choose(ratio["both"] for ratio in ratios) for choose in (min, max))
        said.append(
            f"Alone, forward and backward, RMSNorm takes {low:.2f} to {high:.2f} of LayerNorm's time over "
            f"{len(ratios)} sizes; both are bound by memory where x is large."
        )
    return said


COST = Study(
    name="cost",
    question="What does a norm cost in a training step, and how much does RMSNorm save over LayerNorm?",
    data="random bytes and numbers: the time does not depend on them",
    cells=_cells,
    run=_run,
    columns=(
        ("what", "what", "a training step, or a norm alone"),
        ("ms", "ms", "median"),
        ("over_none", "over no norm", "the step's time over that without a norm"),
        ("over_copy", "over a copy", "time over that of copying x"),
        ("saved_mb", "saved MB", "what forward keeps for backward"),
        ("parameters", "parameters", "of the model"),
    ),
    figures=_figures,
    findings=_findings,
    table_rows=_flat,
    table_about="A row for each norm in the training step, and for each norm, size and direction alone.",
)
