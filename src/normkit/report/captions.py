"""Captions: the two sentences under each figure that say what to see in these numbers.

Here: pure functions View -> sentences; a sentence whose numbers are missing is left out.
May import: report.cells, report.charts, report.findings, report.view, report.wording.
Read next: page.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from normkit.report.cells import Cell, ranked, spread
from normkit.report.charts import blocks, smoothed_curve
from normkit.report.findings import eval_gap, parameters_phrase, percent
from normkit.report.view import View, place, with_range
from normkit.report.wording import factor, listing, loss, milliseconds, plural, signed, significant

PROFILE_MOMENTS = (("init", "At init"), ("end", "After training"))


def _extremes(values: dict[str, float], write: Callable[[float], str]) -> str:
    """ "1.2 (LayerNorm pre) to 14 (LayerNorm post)", or the one value."""
    finite = {label: value for label, value in values.items() if math.isfinite(value)}
    if not finite:
        return ""
    low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    if write(finite[low]) == write(finite[high]):
        return f"{write(finite[low])} ({listing(list(finite))})"
    return f"{write(finite[low])} ({low}) to {write(finite[high])} ({high})"


def validation_loss(view: View) -> list[str]:
    sentences = []
    ok = [cell for cell in ranked(view.at(view.deepest)) if cell.on_scale]
    if ok:
        span = ok[-1].val_loss.median - ok[0].val_loss.median
        sentences.append(
            f"At {blocks(view.deepest)} the cells lie between {ok[0].label} at {with_range(ok[0].val_loss)} and "
            f"{ok[-1].label} at {with_range(ok[-1].val_loss)}, {loss(span)} apart, with guessing at "
            f"{loss(view.guess_loss)}."
        )
    moves = {}
    shallow, deep = min(view.depths, default=0), view.deepest
    for cell in view.at(deep):
        other = view.cell(cell.norm, cell.placement, shallow)
        if cell.on_scale and other is not None and other.on_scale and shallow < deep:
            moves[cell.label] = cell.val_loss.median - other.val_loss.median
    if moves:
        sentences.append(
            f"Going from {shallow} to {blocks(deep)} changed the loss by {_extremes(moves, signed)} nats per byte."
        )
    elif ok and any(not cell.on_scale for cell in view.at(deep)):
        rest = [f"{cell.label} ({cell.status})" for cell in view.at(deep) if not cell.on_scale]
        sentences.append(f"Not among them: {listing(rest)}.")
    elif len(ok) > 1:
        sentences.append(f"The two lowest are {loss(ok[1].val_loss.median - ok[0].val_loss.median)} apart.")
    return sentences


def loss_curves(view: View) -> list[str]:
    curves = {cell.label: smoothed_curve(cell) for cell in view.at(view.deepest)}
    curves = {label: curve for label, curve in curves.items() if curve}
    if not curves:
        return []
    guess, sentences = view.guess_loss, []
    below = {label: next((step for step, value in curve if value < guess), math.inf) for label, curve in curves.items()}
    reached = {label: step for label, step in below.items() if math.isfinite(step)}
    if reached:
        text = f"the smoothed training loss first passes below guessing ({loss(guess)}) at step "
        text += _extremes(reached, lambda step: f"{step:.0f}")
    else:
        text = f"no smoothed training loss gets below guessing ({loss(guess)})"
    text = f"At {blocks(view.deepest)} {text}"
    never = [label for label in below if label not in reached]
    sentences.append(text + (f"; never: {listing(never)}." if never and reached else "."))
    curves = {cell.label: curves[cell.label] for cell in view.at(view.deepest) if cell.on_scale} or curves
    ends = {label: curve[-1][1] for label, curve in curves.items()}
    moves = {label: curve[-1][1] - curve[3 * len(curve) // 4][1] for label, curve in curves.items()}
    sentences.append(
        f"The last smoothed training losses are {_extremes(ends, loss)}; over the last quarter of their steps the "
        f"curves moved by {_extremes(moves, signed)}."
    )
    return sentences


def gradients(view: View) -> list[str]:
    sentences = []
    for moment, when in PROFILE_MOMENTS:
        ratios = {cell.label: cell.gradient_ratio(moment).median for cell in view.at(view.deepest)}
        span = _extremes(ratios, factor)
        if not span or view.deepest < 2:
            continue
        fading = [label for label, ratio in ratios.items() if ratio < 0.5]
        rising = [label for label, ratio in ratios.items() if ratio > 2]
        shapes = [f"below a half (fading towards the input): {listing(fading)}"] if fading else []
        shapes += [f"above two (growing towards the input): {listing(rising)}"] if rising else []
        text = f"{when}, at {blocks(view.deepest)}, the first block's gradient is {span} times the last's"
        sentences.append(f"{text}; {'; '.join(shapes) or 'within a factor of 2 everywhere'}.")
    return sentences


def _growth(cell: Cell, moment: str) -> float:
    """Last over first RMS of the residual stream."""
    curve = cell.curve("residual_rms_by_sublayer", moment)
    return float(curve[-1] / curve[0]) if curve.size and curve[0] > 0 else math.nan


def residual(view: View) -> list[str]:
    sentences = []
    rescaling = {cell.label for cell in view.rescaling}
    for moment, when in PROFILE_MOMENTS:
        growth = {cell.label: _growth(cell, moment) for cell in view.at(view.deepest)}
        free = {label: value for label, value in growth.items() if label not in rescaling}
        tied = {label: value for label, value in growth.items() if label in rescaling}
        parts = []
        if span := _extremes(free, factor):
            parts.append(f"where nothing rescales the stream its RMS changes by a factor of {span}")
        if span := _extremes(tied, factor):
            parts.append(f"where a norm follows the add, by {span}" if parts else f"the RMS changes by {span}")
        if parts:
            sentences.append(
                f"{when}, from the first to the last of {plural(2 * view.deepest, 'sublayer')}, {', and '.join(parts)}."
            )
    return sentences


def _odd_even(cell: Cell, moment: str) -> tuple[float, float]:
    """Mean skip weight of the attention sublayers and of the feed-forward ones."""
    odd, even = ([w for w in cell.curve("skip_weight_by_sublayer", moment)[i::2] if math.isfinite(w)] for i in (0, 1))
    return sum(odd) / len(odd) if odd else math.nan, sum(even) / len(even) if even else math.nan


def skip_weight(view: View) -> list[str]:
    if not view.rescaling:
        return ["No cell here has a norm after the add: the skip keeps weight 1 in every sublayer."]
    sentences = []
    for moment, when in PROFILE_MOMENTS:
        both = {cell.label: _odd_even(cell, moment) for cell in view.rescaling}
        parts = [
            f"{significant(odd)} and {significant(even)} ({label})"
            for label, (odd, even) in both.items()
            if math.isfinite(odd) and math.isfinite(even)
        ]
        if parts:
            sentences.append(
                f"{when}, at {blocks(view.deepest)}, the mean weight after attention and after feed-forward is "
                f"{listing(parts)}, against {significant(view.run.study.unit_variance_skip_weight)} on the "
                "unit-variance line."
            )
    return sentences


def identity_weight(view: View) -> list[str]:
    if not view.rescaling:
        return ["No cell here has a norm after the add: the product is 1 all the way down."]
    sublayers = 2 * view.deepest
    line = view.run.study.unit_variance_skip_weight**sublayers
    name, gained = "identity_weight_by_sublayer", "identity_weight_with_gain_by_sublayer"
    start = {cell.label: cell.last(name, "init").median for cell in view.rescaling}
    sentences = []
    if span := _extremes(start, significant):
        sentences.append(
            f"At init the product over {sublayers} sublayers ends at {span}, against {significant(line)} on the "
            "unit-variance line."
        )
    parts = []
    for cell in view.rescaling:
        plain, gain = cell.last(name, "end").median, cell.last(gained, "end").median
        if math.isfinite(plain):
            extra = f"; {significant(gain)} with |γ|" if math.isfinite(gain) else ""
            parts.append(f"{significant(plain)} ({cell.label}{extra})")
    if parts:
        sentences.append(f"After training it ends at {listing(parts)}.")
    return sentences


def batch_statistics(view: View) -> list[str]:
    gaps = {place(cell): eval_gap(cell).median for cell in view.shown if eval_gap(cell)}
    if not gaps:
        return []
    worse = sum(gap > 0 for gap in gaps.values())
    sentences = [
        f"Running statistics change the validation loss by {_extremes(gaps, signed)} nats per byte against the "
        f"evaluated batch's own, upwards in {worse} of {plural(len(gaps), 'cell')}."
    ]
    scored = {cell.label: cell for cell in view.at(view.deepest) if cell.ok}
    others = [cell for cell in ranked(scored.values()) if cell.norm not in ("batch", "none")]
    batch = [cell for cell in ranked(scored.values()) if cell.norm == "batch"]
    if others and batch:
        gap = batch[0].val_loss.median - others[0].val_loss.median
        sentences.append(
            f"At {blocks(view.deepest)} the better BatchNorm cell in eval mode is {signed(gap)} from "
            f"{others[0].label}, which has no such difference between training and eval."
        )
    return sentences


def cost(view: View) -> list[str]:
    timed = {cell.label: cell.seconds_per_step.median for cell in view.at(view.deepest) if cell.seconds_per_step}
    if not timed:
        return []
    sentences = [
        f"At {blocks(view.deepest)} a training step takes {_extremes(timed, milliseconds)}, with "
        f"{parameters_phrase(view.at(view.deepest))} parameters."
    ]
    bare = view.cell("none", None, view.deepest)
    if bare and bare.seconds_per_step and len(timed) > 1:
        base = bare.seconds_per_step.median
        extra = {label: seconds / base - 1 for label, seconds in timed.items() if label != bare.label}
        sentences.append(f"Over the stack without a norm that is {_extremes(extra, percent)}.")
    else:
        per_block = spread(seconds / view.deepest for seconds in timed.values())
        sentences.append(f"The median over these cells is {milliseconds(per_block.median)} per block and step.")
    return sentences


CAPTIONS: dict[str, Callable[[View], list[str]]] = {
    "validation-loss": validation_loss,
    "loss-curves": loss_curves,
    "gradients": gradients,
    "residual-growth": residual,
    "skip-weight": skip_weight,
    "identity-weight": identity_weight,
    "batchnorm-at-eval": batch_statistics,
    "cost": cost,
}

MEASURED = {
    "validation-loss": "mean loss over fixed batches of the held-out files, in eval mode (BatchNorm: running "
    "statistics), one mark per seed; the dash-dot line is a model that knows only how often each byte occurs in the "
    "training files.",
    "loss-curves": "loss of each training batch (faint) and its centered moving average over about a twentieth of the "
    "steps (strong; median over seeds).",
    "gradients": "L2 norm of the loss's gradient with respect to all parameters of a block, on one held-out batch in "
    "training mode, before the first step and after the last; with several seeds median and range (band).",
    "residual-growth": "root mean square of the residual stream after each sublayer (after its norm, where one "
    "follows the add), on one held-out batch, before the first step and after the last.",
    "skip-weight": "std(skip) / std(skip + branch) where a norm follows the add, the second from the norm's own "
    "rstd: per token (root mean square for RMSNorm), for BatchNorm per channel, then the mean; above 1 where the "
    "branch cancels part of the skip, 1 where nothing rescales it. Dotted: with the gain |γ| of that norm, from a "
    "skip of unit std.",
    "identity-weight": "the weights of the figure above multiplied down the stack per token (for BatchNorm per "
    "channel), then averaged. Dotted: with |γ|, the amplitude of the input's part in the stream. Dash-dotted, at init: "
    "the product of 1/√(1 + v) with the measured v, what uncorrelated branches would leave.",
    "batchnorm-at-eval": "the same held-out batches scored twice: with running statistics (marker) and with the "
    "statistics of the evaluated batch (bar).",
    "cost": "median wall time of a training step (forward, backward, optimizer) from a short serial pass in which the "
    "cells take turns step by step and nothing else of the study runs.",
}

MEANING = {
    "batchnorm-at-eval": "In a language model BatchNorm normalizes each channel over batch and time. In training, "
    "every position is therefore normalized with statistics that contain later positions of its own sequence and "
    "other sequences: the causal mask does not hold for the norm, and a training loss may profit from what the model "
    "must predict. In eval mode the running averages are used instead: honest for prediction, but a different "
    "function from the one that was trained. The score with batch statistics is shown only to see how different; it "
    "may look ahead.",
    "skip-weight": "1/√2 per sublayer is the theory only when branch and skip have equal variance and are "
    "uncorrelated; in general an uncorrelated branch leaves 1/√(1 + v), v = Var(branch) / Var(skip).",
}
