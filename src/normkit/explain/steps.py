"""What the worked examples compute: for each topic the steps, each with its numbers and at most one table.

Here: `explain`, `TOPICS`, `Step`. Every number comes out of normkit.functional, normkit.statistics or normkit.theory,
or is the formula's own term, computed beside them.
May import: functional, statistics, theory.
Read next: texts.py, the sentences that the numbers stand in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit import functional, statistics, theory
from normkit.explain.tables import SCORES, Table, temperatures

EPS = 1e-5
DECAYS = (0.9, 0.99, 0.999)
DAYS = (1, 7, 30, 90, 180, 270, 365)


@dataclass(frozen=True)
class Step:
    """A sentence of texts.py by its key, the numbers in it, and a table below it."""

    key: str
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    table: Table | None = None


def _series(table: Table) -> Tensor:
    """The only row of a table, or its first column."""
    return table.values.flatten() if table.values.shape[0] == 1 else table.values[:, 0]


def _table(table: Table) -> Step:
    size = {"rows": table.values.shape[0], "columns": table.values.shape[1]}
    return Step("table" if table is SCORES else "own table", size, table)


def batchnorm(table: Table) -> list[Step]:
    """Down the columns: each subject over the students."""
    x = table.values
    if x.shape[0] < 2:
        raise ValueError(f"batchnorm: expected 2 or more rows to share a column's statistics, got {x.shape[0]}")
    mean, var = x.mean(0), x.var(0, correction=0)
    running_mean, running_var = torch.zeros_like(mean), torch.ones_like(mean)
    out = functional.batch_norm(x, running_mean, running_var, training=True, momentum=0.1, eps=EPS)
    moments = Table(("mean", "variance"), table.columns, torch.stack([mean, var]))
    running = Table(("running mean", "running variance"), table.columns, torch.stack([running_mean, running_var]))
    largest = theory.largest_normalized_value(x.shape[0])
    return [
        _table(table),
        Step("statistics", {"n": x.shape[0]}, moments),
        Step("normalize", {"eps": EPS}, Table(table.rows, table.columns, out)),
        Step("by hand", _by_hand(x[0, 0], mean[0], var[0], out[0, 0], table.rows[0], table.columns[0])),
        Step("bound", {"n": x.shape[0], "largest": largest, "seen": float(out.abs().max())}),
        Step("running", {"momentum": 0.1, "unbiased": float(x.var(0)[0]), "biased": float(var[0])}, running),
    ]


def layernorm(table: Table) -> list[Step]:
    """Along the rows: each student over the subjects."""
    x = table.values
    mean, var = x.mean(1), x.var(1, correction=0)
    out = functional.layer_norm(x, x.shape[1], eps=EPS)
    moments = Table(table.rows, ("mean", "variance"), torch.stack([mean, var], 1))
    alone = functional.layer_norm(x[:1], x.shape[1], eps=EPS)
    return [
        _table(table),
        Step("statistics", {"n": x.shape[1]}, moments),
        Step("normalize", {"eps": EPS}, Table(table.rows, table.columns, out)),
        Step("by hand", _by_hand(x[0, 0], mean[0], var[0], out[0, 0], table.rows[0], table.columns[0])),
        Step("alone", {"row": table.rows[0], "difference": float((alone - out[:1]).abs().max())}),
    ]


def _by_hand(x: Tensor, mean: Tensor, var: Tensor, out: Tensor, row: str, column: str) -> dict[str, float | int | str]:
    value = float((x - mean) / torch.sqrt(var + EPS))
    assert math.isclose(value, float(out), rel_tol=1e-9, abs_tol=1e-9)
    return {"row": row, "column": column, "x": float(x), "mean": float(mean), "var": float(var), "out": value}


def rmsnorm(table: Table) -> list[Step]:
    """Along the rows, without taking the mean off."""
    x = table.values
    square = x.square().mean(1)
    out = functional.rms_norm(x, x.shape[1], eps=EPS)
    centered = functional.rms_norm(x - x.mean(1, keepdim=True), x.shape[1], eps=EPS)
    layer = functional.layer_norm(x, x.shape[1], eps=EPS)
    roots = Table(table.rows, ("mean square", "root"), torch.stack([square, square.sqrt()], 1))
    return [
        _table(table),
        Step("statistics", {"n": x.shape[1]}, roots),
        Step("normalize", {"eps": EPS}, Table(table.rows, table.columns, out)),
        Step("sign", {"negative": int((out < 0).sum()), "negative_layer": int((layer < 0).sum())}),
        Step("same", {"difference": float((centered - layer).abs().max())}, Table(table.rows, table.columns, centered)),
    ]


def running(table: Table | None) -> list[Step]:
    """A thermometer with three memories."""
    series = temperatures() if table is None else _series(table)
    days = [day for day in DAYS if day < len(series)] + [len(series)]
    columns = ["value", *(f"decay {decay}" for decay in DECAYS), "all so far"]
    averages = torch.zeros(3, dtype=torch.float64)
    rows = []
    for day, value in enumerate(series, 1):
        for i, decay in enumerate(DECAYS):
            mean, var = averages[i : i + 1].clone(), torch.ones(1, dtype=torch.float64)
            statistics.update_running(mean, var, 1 - decay, value.reshape(1), torch.ones(1, dtype=torch.float64), True)
            averages[i] = mean
        if day in days:
            rows.append(torch.cat([value.reshape(1), averages, series[:day].mean().reshape(1)]))
    shown = Table(tuple(f"day {day}" for day in days), tuple(columns), torch.stack(rows))
    left = torch.tensor([[theory.running_residual(decay, len(series)) for decay in DECAYS]], dtype=torch.float64)
    noise = torch.tensor([[theory.running_noise(decay) for decay in DECAYS]], dtype=torch.float64)
    waits = torch.tensor([[float(theory.updates_until(decay)) for decay in DECAYS]], dtype=torch.float64)
    names = tuple(f"decay {decay}" for decay in DECAYS)
    return [
        Step(
            "series" if table is None else "own series",
            {"n": len(series), "low": float(series.min()), "high": float(series.max())},
        ),
        Step("rule", {"decay": 0.9, "first": float(series[0]), "after": float(0.1 * series[0])}),
        Step("track", {}, shown),
        Step("residual", {"n": len(series)}, Table(("left of the start",), names, left)),
        Step("wait", {"share": 0.01}, Table(("updates",), names, waits)),
        Step("noise", {}, Table(("noise",), names, noise)),
    ]


# two vectors of mean 0 and variance 1 that have nothing in common
_STREAM = Table(
    ("x", "f(x)"),
    ("1", "2", "3", "4"),
    torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]], dtype=torch.float64),
)


def placement(table: Table) -> list[Step]:
    """One residual step: x + f(x), and what is left of x after the norm."""
    if table.values.shape[0] != 2 or table.values.shape[1] < 2:
        shape = " x ".join(map(str, table.values.shape))
        raise ValueError(f"placement: expected two rows, x and f(x), of 2 or more numbers, got a table of {shape}")
    x, branch = table.values
    total = x + branch
    post = functional.layer_norm(total, total.shape[0], eps=EPS)
    v_x, v_f, v_total = (float(value.var(correction=0)) for value in (x, branch, total))
    if v_x == 0.0:
        raise ValueError("placement: expected an x whose numbers differ, got a constant row")
    ratio = v_f / v_x
    deviation = x - x.mean()
    kept = float((post * deviation).sum() / deviation.square().sum()) * math.sqrt(v_x)
    overlap = float(((branch - branch.mean()) * deviation).sum() / deviation.square().sum())
    depths = (1, 2, 6, 12, 24, 48)
    by_depth = torch.tensor(
        [
            [theory.post_identity_weight(depth, ratio) for depth in depths],
            [theory.pre_identity_weight(depth, ratio) for depth in depths],
        ],
        dtype=torch.float64,
    )
    sums = Table(("x", "f(x)", "x + f(x)", "norm(x + f(x))"), table.columns, torch.stack([x, branch, total, post]))
    return [
        Step("vectors", {"v_x": v_x, "v_f": v_f, "overlap": overlap}, table),
        Step("add", {"v_total": v_total, "sum": v_x + v_f}, sums),
        Step("kept", {"kept": kept, "v": ratio, "expected": theory.post_skip_weight(ratio)}),
        Step("depth", {"v": ratio}, Table(("post", "pre"), tuple(map(str, depths)), by_depth)),
    ]


def saturation(table: Table | None) -> list[Step]:
    """Pre-activations of a wide layer through a sigmoid, and the same behind a BatchNorm."""
    if table is None:
        std, fan_in = 0.75, 64
        spread = theory.preactivation_std(std, fan_in)
        z = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64) * spread
        first = Step("layer", {"std": std, "fan_in": fan_in, "spread": spread})
    else:
        z = _series(table)
        spread = float(z.std(correction=0))
        first = Step("own", {"n": z.numel(), "spread": spread})
    if z.numel() < 2:
        raise ValueError(f"saturation: expected 2 or more numbers, got {z.numel()}")
    threshold = theory.saturation_threshold("sigmoid")
    normed = functional.batch_norm(z.reshape(-1, 1), None, None, training=True, eps=EPS).flatten()

    def through(values: Tensor) -> Table:
        out = values.sigmoid()
        columns = torch.stack([values, out, out * (1 - out) / 0.25], 1)
        return Table(tuple(f"#{i + 1}" for i in range(len(values))), ("z", "sigmoid", "derivative"), columns)

    saturated = int((z.abs() > threshold).sum())
    again = int((normed.abs() > threshold).sum())
    return [
        first,
        Step("sigmoid", {"threshold": threshold, "saturated": saturated, "n": z.numel()}, through(z)),
        Step("batchnorm", {"saturated": again, "n": z.numel()}, through(normed)),
        Step(
            "probability",
            {
                "spread": spread,
                "before": theory.saturation_probability("sigmoid", spread),
                "after": theory.saturation_probability("sigmoid", 1.0),
            },
        ),
    ]


TOPICS: dict[str, Callable[[Table | None], list[Step]]] = {
    "batchnorm": lambda table: batchnorm(table or SCORES),
    "layernorm": lambda table: layernorm(table or SCORES),
    "rmsnorm": lambda table: rmsnorm(table or SCORES),
    "running": running,
    "placement": lambda table: placement(table or _STREAM),
    "saturation": saturation,
}


def explain(topic: str, table: Table | None = None) -> list[Step]:
    """The steps of a worked example, on the table that comes with it or on one's own.

    Args:
        topic: batchnorm, layernorm, rmsnorm, running, placement or saturation.
        table: numbers of one's own, from `read_csv`; batchnorm, layernorm and rmsnorm take any table, running and
            saturation the first column (or the only row), placement two rows, x and f(x).

    Raises:
        ValueError: another topic, or a table that the topic cannot use.

    Example:
        >>> from normkit.explain import explain
        >>> explain("batchnorm")[2].table.values[0].round().tolist()
        [1.0, 1.0, 1.0]
    """
    if topic not in TOPICS:
        raise ValueError(f"explain: topic must be one of {', '.join(TOPICS)}, got {topic!r}")
    return TOPICS[topic](table)
