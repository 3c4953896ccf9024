"""Published claims about normalization that a CPU can test, each measured over five seeds and judged.

Here: CLAIMS.
May import: torch, placement, study (its transformer and measurements), protocol, saturation.
Read next: run.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.functional import batch_norm, layer_norm
from normkit.placement import placements
from normkit.report.table import csv_rows
from normkit.studies import saturation, warmup
from normkit.studies.claim import Claim, Measured, slope
from normkit.studies.protocol import Chart, Figure, Record, Settings, Study, line, panel, where
from normkit.studies.trained_claims import TRAINED
from normkit.study.models import Transformer

DEPTHS = (2, 4, 8, 16)
WIDTH, TOKENS = 96, 8


# ------------------------------------------------------------------------------------ the setting of Xiong et al. 2020


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1])


def _theory_setting(layers: int, pre: bool, seed: int) -> tuple[list[float], list[float], float]:
    """One head, all matrices d x d and Gaussian, queries and keys 0, no bias: E ||x_l||^2 / d after every layer, before
    every second norm, and the gradient of the last second matrix.
    """
    draw = torch.Generator().manual_seed(seed)

    def matrix() -> Tensor:
        return torch.randn((WIDTH, WIDTH), generator=draw, dtype=torch.float64) / math.sqrt(WIDTH)

    def size(x: Tensor) -> float:
        return float(x.detach().square().sum(1).mean()) / WIDTH

    x = torch.randn((TOKENS, WIDTH), generator=draw, dtype=torch.float64)
    after, before = [], []
    second = matrix()
    for _ in range(layers):
        value, first, second = matrix(), matrix(), matrix().requires_grad_()
        inner = _normed(x) if pre else x
        x = x + (inner.mean(0, keepdim=True) @ value).expand_as(inner)  # queries and keys 0: the tokens' average
        x = x if pre else _normed(x)
        x = x + ((_normed(x) if pre else x) @ first).relu() @ second
        before.append(size(x))
        x = x if pre else _normed(x)
        after.append(size(x))
    out = _normed(x) if pre else x
    dout = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((out * dout).sum(), second)
    return after, before, float(gradient.norm())


def _pre_bounds(seed: int) -> Measured:
    after, _, _ = _theory_setting(12, True, seed)
    found = {str(layer): value for layer, value in enumerate(after, 1)}
    margins = [min(value / (1 + layer / 2), (1 + 1.5 * layer) / value) for layer, value in enumerate(after, 1)]
    return min(margins), found


def _post_variance(seed: int) -> Measured:
    _, before, _ = _theory_setting(12, False, seed)
    return sum(before) / len(before), {str(layer): value for layer, value in enumerate(before, 1)}


def _last_gradient(pre: bool) -> Callable[[int], Measured]:
    def measure(seed: int) -> Measured:
        found = {str(layers): _theory_setting(layers, pre, seed)[2] for layers in DEPTHS}
        return slope(found), found

    return measure


# -------------------------------------------------------------------------------------------- the study's transformer


def _model(placement: str, depth: int, seed: int) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(
            depth=depth, width=64, heads=4, seq=32, norm="layer", placement=placements(placement, 2 * depth)
        )


def _ids(seed: int) -> Tensor:
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(seed))


def _gradient_profile(placement: str) -> Callable[[int], Measured]:
    """The first block's gradient norm over the last's, at initialisation, 12 blocks."""

    def measure(seed: int) -> Measured:
        model, ids = _model(placement, 12, seed), _ids(seed)
        groups = model.block_parameters()
        gradients = torch.autograd.grad(model.loss(ids, ids), [parameter for group in groups for parameter in group])
        found, taken = {}, iter(gradients)
        for block, group in enumerate(groups, 1):
            found[str(block)] = math.sqrt(sum(float(next(taken).double().square().sum()) for _ in group))
        return found["1"] / found["12"], found

    return measure


def _perturbed(placement: str) -> Callable[[int], Measured]:
    """The mean square change of the stack's output when every weight moves by 1e-4 up or down, by depth."""

    def measure(seed: int) -> Measured:
        found = {}
        for depth in DEPTHS:
            model, ids = _model(placement, depth, seed).double(), _ids(seed)
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                before = model.stack(model.embed(ids))
                for name, parameter in model.stack.named_parameters():
                    if "norm" not in name:
                        signs = torch.randint(0, 2, parameter.shape, generator=draw).double() * 2 - 1
                        parameter.add_(signs * 1e-4)
                found[str(depth)] = float((model.stack(model.embed(ids)) - before).square().mean())
        return slope(found), found

    return measure


# ---------------------------------------------------------------------------------------------------- residual branches


def _branch_growth(norm: bool) -> Callable[[int], Measured]:
    """The stream's variance by depth for x + W relu(x) with He's weights, or W relu(BatchNorm(x))."""

    def measure(seed: int) -> Measured:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn((512, 256), generator=draw, dtype=torch.float64)
        found = {"0": float(x.var())}
        for depth in range(1, 17):
            weight = torch.randn((256, 256), generator=draw, dtype=torch.float64) * math.sqrt(2 / 256)
            inner = batch_norm(x, None, None, training=True) if norm else x
            x = x + inner.relu() @ weight
            found[str(depth)] = float(x.var())
        if norm:  # by how much a block adds, in variances of the input
            return (found["16"] - found["0"]) / 16 / found["0"], found
        return (found["16"] / found["0"]) ** (1 / 16), found

    return measure


def _sigmoid_saturation(seed: int) -> Measured:
    found = {}
    for flag in (False, True):
        torch.manual_seed(seed)
        shares = saturation.at_initialisation(saturation.Net("sigmoid", 1.0, flag), "sigmoid")["saturated"]
        found[str(flag)] = sum(shares) / saturation.LAYERS
    return found["False"] - found["True"], found


_XIONG = "Xiong et al. 2020, arXiv 2002.04745"
_CLAIMS: dict[str, Claim] = {
    "pre-bounds": Claim(
        "Pre-LN at initialisation: (1 + l/2) d <= E ||x_l||^2 <= (1 + 3l/2) d",
        f"{_XIONG}, lemma 2",
        "smallest distance to a bound as a factor, 12 layers",
        _pre_bounds,
        lambda value: value >= 0.95,
        "at least 0.95: the width is finite",
    ),
    "post-variance": Claim(
        "Post-LN at initialisation: E ||x||^2 = 3d/2 before the second norm of every layer",
        f"{_XIONG}, lemma 2",
        "E ||x||^2 / d, mean of 12 layers",
        _post_variance,
        lambda value: abs(value - 1.5) < 0.1,
        "1.4 to 1.6",
    ),
    "post-gradient": Claim(
        "Post-LN: the last layer's gradient does not depend on depth",
        f"{_XIONG}, theorem 1",
        "exponent of the gradient in the number of layers",
        _last_gradient(False),
        lambda value: abs(value) < 0.15,
        "-0.15 to 0.15",
    ),
    "pre-gradient": Claim(
        "Pre-LN: the last layer's gradient falls as 1 / sqrt(L)",
        f"{_XIONG}, theorem 1",
        "exponent of the gradient in the number of layers",
        _last_gradient(True),
        lambda value: abs(value + 0.5) < 0.15,
        "-0.65 to -0.35",
    ),
    "post-profile": Claim(
        "Post-LN gradients grow towards the output at initialisation",
        f"{_XIONG}, figure 3",
        "first block's gradient over the last's, 12 blocks",
        _gradient_profile("post"),
        lambda value: value < 0.95,
        "below 0.95",
    ),
    "pre-profile": Claim(
        "Pre-LN gradients are flat over depth at initialisation",
        f"{_XIONG}, figure 3",
        "first block's gradient over the last's, 12 blocks",
        _gradient_profile("pre"),
        lambda value: 0.5 < value < 2.0,
        "0.5 to 2",
    ),
    "post-perturbed": Claim(
        "Post-LN: the output's change after a small change of all weights grows as the number of layers",
        "Liu et al. 2020 (Admin), arXiv 2004.08249, theorem 2",
        "exponent of the mean square change in the number of blocks",
        _perturbed("post"),
        lambda value: 0.7 < value < 1.3,
        "0.7 to 1.3",
    ),
    "pre-perturbed": Claim(
        "Pre-LN: the output's change after a small change of all weights grows as its logarithm only",
        "Liu et al. 2020 (Admin), arXiv 2004.08249, corollary",
        "exponent of the mean square change in the number of blocks",
        _perturbed("pre"),
        lambda value: value < 0.8,
        "below 0.8: from 2 to 16 a pure logarithm has 0.65, the number itself 1",
    ),
    "batchnorm-linear": Claim(
        "With BatchNorm on the branch the residual stream's variance grows by about its input's in every block",
        "De and Smith 2020, arXiv 2002.10444, section 3",
        "variance that a block adds over the input's, 16 blocks",
        _branch_growth(True),
        lambda value: abs(value - 1.0) < 0.15,
        "0.85 to 1.15",
    ),
    "no-norm-exponential": Claim(
        "Without a norm it doubles in every block",
        "De and Smith 2020, arXiv 2002.10444, section 3",
        "factor of a block, 16 blocks",
        _branch_growth(False),
        lambda value: abs(value - 2.0) < 0.3,
        "1.7 to 2.3",
    ),
    "sigmoid-saturation": Claim(
        "Deep sigmoid networks saturate, and BatchNorm prevents it",
        "Ioffe and Szegedy 2015, section 2",
        "share of saturated units without minus with BatchNorm, weights of standard deviation 1",
        _sigmoid_saturation,
        lambda value: value > 0.3,
        "above 0.3",
    ),
    **TRAINED,
}
# what cannot be put to a test here: claim, source, why
_UNDECIDED = (
    (
        "Largest stable learning rates differ by a factor of 30 between placements at 64 layers",
        "Chen & Wei 2026 (Keel), arXiv 2601.19895",
        "64 layers, trained once for every rate that is tried, take hours on two cores; the study warmup asks it at 2 "
        "to 16 blocks",
    ),
    (
        "RMSNorm over 6.25 % of the elements (pRMSNorm) is as accurate",
        "Zhang and Sennrich 2019, arXiv 1910.07467",
        "at the widths that two cores can train, 32 to 128, it would be the RMS of 2 to 8 elements",
    ),
)


def _cells(thorough: bool) -> list[Settings]:
    return [
        {"claim": name, "seed": seed, **({"text": warmup.text().digest} if claim.on_text else {})}
        for name, claim in _CLAIMS.items()
        for seed in range(15 if thorough else 5)
    ]


def _run(cell: Settings) -> dict[str, Any]:
    value, by_depth = _CLAIMS[cell["claim"]].measure(cell["seed"])
    return {"value": value, "parts": by_depth}


def _judged(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each claim: its number's median and range, and the verdict."""
    nothing = {"median": None, "low": None, "high": None, "seeds": 0, "agree": None}
    found = []
    for name, claim in _CLAIMS.items():
        values = [record["value"] for record in where(records, claim=name)]
        said = {"claim": claim.text, "source": claim.source, "number": claim.number, "criterion": claim.criterion}
        if values:
            middle = statistics.median(values)
            holds = claim.holds(middle)
            agree = sum(claim.holds(value) == holds for value in values)
            numbers = {"median": middle, "low": min(values), "high": max(values), "seeds": len(values)}
            verdict = "holds" if holds else "does not hold here"
            found.append({**said, **numbers, "verdict": verdict, "agree": f"{agree} of {len(values)}"})
        else:
            found.append({**said, "verdict": "not measured", **nothing})
    found += [
        {"claim": text, "source": source, "number": why, "criterion": "", "verdict": "not decidable here", **nothing}
        for text, source, why in _UNDECIDED
    ]
    return found


def _figures(records: Sequence[Record]) -> list[Figure]:
    points = [
        {"claim": record["claim"], "seed": record["seed"], "depth": int(depth), "value": value}
        for record in records
        for depth, value in record["parts"].items()
        if record["claim"] in ("post-gradient", "pre-gradient", "post-perturbed", "pre-perturbed")
    ]
    if not points:
        return []
    panels = []
    for title, y_label, names in (
        ("gradient of the last layer", "gradient norm", ("post-gradient", "pre-gradient")),
        ("change of the output", "mean square change", ("post-perturbed", "pre-perturbed")),
    ):
        lines = [
            line(label, where(points, claim=name), "depth", "value", look, log2=True)
            for label, name, look in zip(
                ("Post-LN", "Pre-LN"), names, (("batch", "post"), ("layer", "pre")), strict=True
            )
        ]
        panels.append(panel(title, ("layers, log2", y_label), lines, log=True))
    fields = ("claim", "seed", "depth", "value")
    chart = Chart(
        "claims-depth", "Two claims by depth", "curves", tuple(panels), fields, csv_rows(points, fields), log=True
    )
    measured = (
        "left in the setting of the theorem, right on the study's transformer; medians over seeds, bands their range."
    )
    return [Figure(chart, (), measured)]


def _findings(records: Sequence[Record]) -> list[str]:
    rows = _judged(records)
    judged = [row for row in rows if row["seeds"]]
    held = [row for row in judged if row["verdict"] == "holds"]
    seeds = max(row["seeds"] for row in judged)
    said = [f"{len(held)} of {len(judged)} published claims hold here, by the median over {seeds} seeds."]
    said += [
        f"Does not hold here: {row['claim']} ({row['source']}): {row['number']} is {row['median']:.3g} "
        f"[{row['low']:.3g}, {row['high']:.3g}], expected {row['criterion']}."
        for row in judged
        if row["verdict"] != "holds"
    ]
    said += [
        f"Some seeds say otherwise: {row['claim']} ({row['verdict']}; {row['agree']} seeds agree)."
        for row in judged
        if row["agree"] != f"{row['seeds']} of {row['seeds']}"
    ]
    said += [f"Not measured, its cells failed: {row['claim']}." for row in rows if row["verdict"] == "not measured"]
    said += [f"Not decidable here: {text} ({source}): {why}." for text, source, why in _UNDECIDED]
    return said


CLAIMS = Study(
    name="claims",
    question="Which published claims about normalization can be seen on this machine?",
    data="synthetic inputs, random bytes, the Python library's sources and scikit-learn's digits",
    cells=_cells,
    run=_run,
    columns=(
        ("claim", "claim", "as its source has it"),
        ("verdict", "verdict", "by the median"),
        ("agree", "seeds", "of which the verdict is that of the median"),
        ("median", "median", "over seeds"),
        ("low", "lowest", "over seeds"),
        ("high", "highest", "over seeds"),
        ("criterion", "holds if", "where the median must lie"),
        ("number", "number", "what was measured"),
        ("source", "source", "who said it"),
    ),
    figures=_figures,
    findings=_findings,
    table_rows=_judged,
    table_about="A row for each claim.",
)
