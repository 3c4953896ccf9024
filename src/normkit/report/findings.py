"""Findings: cells -> the sentences that open the report, with their numbers.

Here: each function looks at one question and answers in one sentence, or in none where the records cannot answer.
    What they say is what these records show; nothing is concluded from fewer than five seeds. Pure.
May import: report.cells, report.charts, report.load, report.view, report.wording.
Read next: captions.py, the two sentences under each figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from normkit.report.cells import (
    SEEDS_FOR_A_MEDIAN,
    Cell,
    Spread,
    best_by_depth,
    most_seeds,
    paired,
    range_coverage,
    ranked,
    spread,
)
from normkit.report.charts import blocks
from normkit.report.load import NAN
from normkit.report.view import View, place, with_range
from normkit.report.wording import (
    INIT_NAMES,
    MINUS,
    PLACEMENT_NAMES,
    capital,
    factor,
    listing,
    loss,
    milliseconds,
    norm_name,
    norm_order,
    placement_order,
    plural,
    signed,
    significant,
    whole,
)

HARDLY = 0.2  # within this share of the best cell's gain over guessing, a loss is called close to guessing


@dataclass(frozen=True)
class Finding:
    topic: str
    text: str


def opening(view: View) -> str:
    """What was run, in one sentence."""
    settings, data = view.run.study.settings, view.run.study.data
    if not view.cells:
        return "No cell of this study has finished yet."
    norms = sorted({cell.norm for cell in view.cells}, key=norm_order)
    placements = sorted({c.placement for c in view.cells if c.placement is not None}, key=placement_order)
    clauses = [listing([norm_name(norm) for norm in norms])]
    if placements:
        clauses.append("in " + listing([PLACEMENT_NAMES.get(name, name) for name in placements]) + " blocks")
    depths = listing([str(depth) for depth in view.depths])
    clauses.append(f"{depths} {'block' if view.depths == (1,) else 'blocks'} deep")
    if "steps" in settings:
        size = f" of {settings['batch']} × {settings['seq']} bytes" if {"batch", "seq"} <= settings.keys() else ""
        clauses.append(f"{settings['steps']} steps{size} each")
    source = f" on {data['name']}" if data.get("name") else ""
    models = plural(len(view.run.records), "byte-level language model")
    return f"This run trained {models}{source}: {', '.join(clauses)}."


def scope(view: View) -> str:
    """How far the numbers carry."""
    seeds = most_seeds(view.cells)
    if seeds == 0:
        return ""
    if seeds == 1:
        return (
            "One seed per setting: every number here is one observation in this run, not a verdict; "
            "another seed may order close cells differently."
        )
    if seeds < SEEDS_FOR_A_MEDIAN:
        return (
            f"Up to {seeds} seeds per setting: numbers are medians with the range over seeds, observations in this "
            f"run; {SEEDS_FOR_A_MEDIAN} seeds are the least for a judgement."
        )
    return (
        f"Up to {seeds} seeds per setting: numbers are medians, and [low, high] is the range over seeds, which for "
        f"{SEEDS_FOR_A_MEDIAN} seeds holds the median over all possible seeds with probability "
        f"{100 * range_coverage(SEEDS_FOR_A_MEDIAN):.0f}%; it speaks of these settings and this data only."
    )


def coverage(view: View) -> str:
    """How many cells ended how."""
    if not view.cells:
        return ""
    total = len(view.run.records)
    ended = {status: [c for c in view.cells if c.count(status)] for status in ("ok", "diverged", "failed")}
    counts = {status: sum(cell.count(status) for cell in ended[status]) for status in ended}
    if counts["ok"] == total:
        return f"{'All' if total > 1 else 'The'} {plural(total, 'cell')} ended below the loss of guessing."
    parts = [f"{counts['ok'] or 'none'} ended below the loss of guessing"]
    parts += [
        f"{counts[status]} {status} ({listing([place(cell) for cell in ended[status]])})"
        for status in ("diverged", "failed")
        if counts[status]
    ]
    return f"Of {plural(total, 'cell')}, {listing(parts)}."


def lowest_loss(view: View) -> list[str]:
    """Per depth: the lowest loss, its distance from guessing, the runner-up and the highest."""
    sentences = []
    for depth, best in best_by_depth(view.shown).items():
        rest = [cell for cell in ranked(view.at(depth)) if cell.on_scale and cell is not best]
        text = f"At {blocks(depth)} the lowest validation loss in this run is that of {best.label}, "
        text += f"{with_range(best.val_loss)} nats per byte"
        if math.isfinite(best.guess_loss):
            text += f", {loss(best.guess_loss - best.val_loss.median)} below guessing by byte frequency"
        if rest:
            text += f"; next is {rest[0].label}, {signed(rest[0].val_loss.median - best.val_loss.median)}"
        if len(rest) > 1:
            text += f", and the highest is {rest[-1].label} at {with_range(rest[-1].val_loss)}"
        if others := [cell.label for cell in view.at(depth) if not cell.on_scale]:
            text += f"; without a comparable loss: {listing(others)}"
        sentences.append(text + ".")
    return sentences


def placement_effect(view: View) -> list[str]:
    """Per depth: PostNorm minus PreNorm for every norm that has both."""
    sentences = []
    for depth in view.depths:
        above: list[str] = []
        below: list[str] = []
        for norm in dict.fromkeys(cell.norm for cell in view.at(depth)):
            pre, post = view.cell(norm, "pre", depth), view.cell(norm, "post", depth)
            difference = paired(post, pre) if pre and post else spread(())
            if difference:
                one = f"{norm_name(norm)} {with_range(difference, signed)}"
                (above if difference.median > 0 else below).append(one)
        sides = (("higher", above), ("lower", below))
        parts = [f"{side} than PreNorm with {listing(names)}" for side, names in sides if names]
        if parts:
            sentences.append(f"At {blocks(depth)} PostNorm ended {', and '.join(parts)} (nats per byte).")
    return sentences


def hardly_learned(view: View) -> str:
    """Cells that ended close to guessing, by depth, beside the best cell there."""
    parts = []
    for depth, leader in best_by_depth(view.shown).items():
        gain = leader.guess_loss - leader.val_loss.median
        near = [cell for cell in view.at(depth) if abs(cell.guess_loss - cell.val_loss.median) < HARDLY * gain]
        if near:
            names = listing([f"{cell.label} at {with_range(cell.val_loss)}" for cell in near])
            parts.append(f"at {blocks(depth)} {names}, where {leader.label} got to {with_range(leader.val_loss)}")
    return f"Close to guessing ({loss(view.guess_loss)}) ended {listing(parts)}." if parts else ""


def without_norm(view: View) -> str:
    """The cell without a norm at the deepest stack beside the best one."""
    cell = view.cell("none", None, view.deepest)
    best = best_by_depth(view.shown).get(view.deepest)
    if cell is None or best is None or best is cell:
        return ""
    if not cell.ok:
        reasons = " ".join(capital(reason).removesuffix(".") + "." for reason in cell.reasons)
        return f"Without a norm the stack of {blocks(cell.depth)} {cell.status}. {reasons}".strip()
    end, gap = with_range(cell.val_loss), signed(cell.val_loss.median - best.val_loss.median)
    return f"Without a norm the stack of {blocks(cell.depth)} ended at {end}, {gap} from the best."


def gradient_at_init(view: View) -> str:
    """First block's gradient over the last's at init, over the cells of the deepest stack."""
    ratios: dict[str, list[float]] = {}
    for cell in view.at(view.deepest):
        ratio = cell.gradient_ratio("init").median
        if ratio > 0:
            ratios.setdefault(where(cell), []).append(ratio)
    if not ratios or view.deepest < 2:
        return ""
    parts = [f"{between(values, factor)} {name}" for name, values in ratios.items()]
    return (
        f"At init, {blocks(view.deepest)} deep, the gradient norm of the first block over that of the last is "
        f"{listing(parts)}."
    )


def where(cell: Cell) -> str:
    """ "in PreNorm", "without a norm"."""
    if cell.placement is None:
        return "without a norm" if cell.norm == "none" else f"with {norm_name(cell.norm)}"
    return f"in {PLACEMENT_NAMES.get(cell.placement, cell.placement)}"


def between(values: list[float], write: Callable[[float], str]) -> str:
    """ "0.24 to 0.30", or the one number."""
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def identity_at_init(view: View) -> str:
    """The measured product down the stack against the unit-variance line."""
    products = {cell.label: cell.last("identity_weight_by_sublayer", "init") for cell in view.rescaling}
    parts = [f"{significant(value.median)} ({label})" for label, value in products.items() if value]
    if not parts:
        return ""
    sublayers = 2 * view.deepest
    line = significant(view.run.study.unit_variance_skip_weight**sublayers)
    init = view.run.study.settings.get("init")
    return (
        f"The share of the input that is left on the identity branch after {sublayers} sublayers at init"
        f"{f' ({init})' if init else ''} was measured at {listing(parts)}; the unit-variance line gives {line}."
    )


def batchnorm_at_eval(view: View) -> str:
    """What running statistics did to BatchNorm's validation loss."""
    parts = []
    for cell in view.at(view.deepest):
        gap = eval_gap(cell)
        if gap:
            parts.append(f"{with_range(gap, signed)} in {cell.label}")
    if not parts:
        return ""
    return (
        f"BatchNorm scored with its running statistics instead of those of the evaluated batch changes the validation "
        f"loss at {blocks(view.deepest)} by {listing(parts)} nats per byte."
    )


def eval_gap(cell: Cell) -> Spread:
    """Validation loss with running statistics minus with batch statistics, seed by seed."""
    return spread(record.val_loss - record.val_loss_batch_statistics for record in cell.counted)


def layer_against_rms(view: View) -> str:
    """Time per step of LayerNorm over RMSNorm."""
    parts = []
    for placement in ("pre", "post"):
        layer, rms = (view.cell(norm, placement, view.deepest) for norm in ("layer", "rms"))
        if layer and rms and layer.seconds_per_step.median > 0 and rms.seconds_per_step:
            ours, theirs = rms.seconds_per_step.median, layer.seconds_per_step.median
            times = f"{milliseconds(ours)} against {milliseconds(theirs)}"
            parts.append(f"{times} in {PLACEMENT_NAMES[placement]} ({percent(ours / theirs - 1)})")
    return f"A training step at {blocks(view.deepest)}, RMSNorm against LayerNorm: {listing(parts)}." if parts else ""


def percent(change: float) -> str:
    return "0%" if abs(change) < 0.005 else f"{100 * change:+.0f}%".replace("-", MINUS)


def findings(view: View) -> tuple[Finding, ...]:
    """The opening's sentences by topic; of many depths the deepest two."""
    topics: dict[str, Iterable[str]] = {
        "Outcome": [coverage(view)],
        "Loss": lowest_loss(view)[:-3:-1],
        "Placement": placement_effect(view)[:-3:-1],
        "Guessing": [hardly_learned(view)],
        "No norm": [without_norm(view)],
        "Identity branch": [identity_at_init(view)],
        "Gradients": [gradient_at_init(view)],
        "BatchNorm": [batchnorm_at_eval(view)],
        "Cost": [layer_against_rms(view)],
    }
    joined = {topic: " ".join(filter(None, sentences)) for topic, sentences in topics.items()}
    return tuple(Finding(topic, capital(text)) for topic, text in joined.items() if text)


def notes(view: View) -> tuple[str, ...]:
    """What the reader must know about the records themselves."""
    run = view.run
    sentences = []
    if run.cells_to_come:
        sentences.append(
            f"{plural(run.cells_to_come, 'cell')} of the grid {'has' if run.cells_to_come == 1 else 'have'} no record "
            "yet; the same command goes on from here."
        )
    if run.skipped_lines:
        sentences.append(
            f"{plural(run.skipped_lines, 'line')} of records.jsonl {'was' if run.skipped_lines == 1 else 'were'} "
            "unreadable (a torn write, or edited) and left out."
        )
    if run.other_records:
        verb = "is" if run.other_records == 1 else "are"
        sentences.append(f"{plural(run.other_records, 'record')} of other settings in the same folder {verb} left out.")
    if view.several_rates:
        sentences.append(
            "Sentences and figures show each setting at the learning rate with its lowest validation loss in this run; "
            "the table has all of them."
        )
    return tuple(sentences)


def init_paragraph(view: View) -> str:
    """What the chosen initialisation does to the identity branch, in these numbers."""
    init = str(view.run.study.settings.get("init", ""))
    if not init:
        return ""
    name = f"{init} ({INIT_NAMES[init]})" if init in INIT_NAMES else init
    sublayers = 2 * view.deepest
    line = view.run.study.unit_variance_skip_weight**sublayers
    parts = []
    for cell in view.rescaling:
        product = cell.last("identity_weight_by_sublayer", "init").median
        if product > 0:
            step = product ** (1 / sublayers)
            alone = cell.last("uncorrelated_identity_weight_by_sublayer", "init").median
            beside = f", where 1/√(1 + v) with the measured v makes {significant(alone)}" if alone > 0 else ""
            implied = f"v = {significant(1 / step**2 - 1, 2)}" if step < 1 else "no loss"
            parts.append(
                f"{cell.label} {significant(product)}, {significant(step)} per sublayer ({implied}), "
                f"{factor(product / line)} times the line{beside}"
            )
    if not parts:
        return f"Initialisation: {name}. No cell here has a norm after the add, so the identity branch keeps weight 1."
    return (
        f"Initialisation: {name}. It sets v = Var(branch) / Var(skip), and with it the weight 1/√(1 + v) that a norm "
        f"after the add leaves to the skip. The product over the {sublayers} sublayers of the deepest stack, against "
        f"{significant(line)} on the unit-variance line, was: {'; '.join(parts)}."
    )


def batch_paragraph(view: View) -> str:
    """What eval did to the BatchNorm cells, in these numbers."""
    parts = []
    for cell in view.shown:
        gap = eval_gap(cell)
        if gap:
            running, batch = with_range(cell.val_loss), with_range(cell.val_loss_batch_statistics)
            parts.append(f"{place(cell)}: {running} running, {batch} batch ({with_range(gap, signed)})")
    return f"Validation loss in nats per byte, {'; '.join(parts)}." if parts else ""


def parameters_phrase(cells: Iterable[Cell]) -> str:
    counts = [cell.parameters for cell in cells if math.isfinite(cell.parameters)]
    low, high = min(counts, default=NAN), max(counts, default=NAN)
    return whole(low) if low == high else f"{whole(low)} to {whole(high)}"
