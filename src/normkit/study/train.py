"""One cell from its settings to its record: build, measure, train, measure, validate.

Here: run_cell, and time_steps for seconds per step.
May import: torch, placement, study.{data, models, measure, grid, records}.
Read next: run.py, which has this called in processes of their own.

Training is AdamW with torch's betas (0.9, 0.999) and weight decay (0.01) on every parameter, a linear warm-up and
then a constant learning rate. Gradients are not clipped: clipping would hide the very thing that is measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from normkit.placement import placements
from normkit.study import measure
from normkit.study.data import Batch, Corpus, batches, guess_loss, spaced_batches
from normkit.study.grid import Cell
from normkit.study.models import Transformer
from normkit.study.records import Record, new_record

VALIDATION_BATCHES = 20
_TIMED_ROUNDS = 7
_LOSSES_KEPT = 500  # points of a loss curve: more make records large and no figure better

OnStep = Callable[[int, float], None]  # steps done, loss of the last one


def run_cell(
    cell: Cell, corpus: Corpus, seconds_per_step: float | None = None, on_step: OnStep | None = None
) -> Record:
    """Train one model and return its record; a divergence is a result, not an exception.

    Deterministic: the same cell on the same bytes with the same number of threads gives the same numbers (but for
    the seconds).
    """
    scored = spaced_batches(corpus.held_out, cell.batch, cell.seq, VALIDATION_BATCHES)
    record = new_record(cell, guess_loss(corpus.train, scored), seconds_per_step)
    model = build(cell)
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    _measure_into(record, "init", model, scored[0])
    started = time.perf_counter()
    for step, loss in training(model, cell, corpus):
        if _kept(step, cell.steps) or not math.isfinite(loss):
            record["train_loss"].append([step, loss])
        if on_step is not None:
            on_step(step, loss)
        if not math.isfinite(loss):
            record.update(status="diverged", reason=f"The training loss became {loss} at step {step} of {cell.steps}.")
            break
    record["seconds"] = time.perf_counter() - started
    if record["status"] == "ok":
        _measure_into(record, "end", model, scored[0])
        _validate_into(record, model, scored)
    return record


def build(cell: Cell) -> Transformer:
    """The cell's model as it starts; torch's global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        return Transformer(
            depth=cell.depth,
            width=cell.width,
            heads=cell.heads,
            seq=cell.seq,
            norm=cell.norm,
            placement=None if cell.placement is None else placements(cell.placement, 2 * cell.depth),
            qk_norm=cell.placement == "reordered",  # its paper's blocks have both
            init=cell.init,
        )


def training(model: Transformer, cell: Cell, corpus: Corpus) -> Iterator[tuple[int, float]]:
    """Train step by step; yields (step, the loss of its batch before its update), steps counted from 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell.lr, fused=True)
    model.train()
    stream = batches(corpus.train, cell.batch, cell.seq, cell.seed)
    for step in range(1, cell.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cell.lr, cell.warmup)
        loss = model.loss(*next(stream))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield step, loss.item()


def learning_rate(step: int, lr: float, warmup: int) -> float:
    """lr * step / warmup during the warm-up, lr after it; steps count from 1."""
    return lr * min(1.0, step / warmup) if warmup else lr


def validation_loss(model: Transformer, scored: list[Batch], *, batch_statistics: bool = False) -> float:
    """Mean loss over the batches in eval mode, or with each batch's own statistics in BatchNorm."""
    with measure.untouched(model), torch.no_grad():
        model.train(batch_statistics)
        return statistics.fmean(model.loss(*batch).item() for batch in scored)


def time_steps(cells: list[Cell], corpus: Corpus, on_round: Callable[[int, int], None]) -> list[float]:
    """Seconds per training step of each cell: one step of each in turn, several rounds, medians.

    In turns, so that a slow moment of the machine falls on all cells alike; the first round warms up and is not
    counted. Whoever calls sees to it that nothing else runs.
    """
    runs = [training(build(cell), cell, corpus) for cell in cells]
    seconds: list[list[float]] = [[] for _ in cells]
    rounds = min(_TIMED_ROUNDS + 1, min((cell.steps for cell in cells), default=0))
    for turn in range(rounds):
        for run, measured in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            next(run)
            measured.append(time.perf_counter() - started)
        on_round(turn + 1, rounds)
    return [statistics.median(measured[1:] or measured) for measured in seconds]


def _kept(step: int, steps: int) -> bool:
    every = math.ceil(steps / _LOSSES_KEPT)
    return step == 1 or step == steps or step % every == 0


def _measure_into(record: Record, moment: str, model: Transformer, batch: Batch) -> None:
    stream = measure.stream(model, batch[0])
    record["grad_norm_by_layer"][moment] = measure.gradient_norms(model, batch)
    record["residual_rms_by_sublayer"][moment] = stream.residual_rms
    record["skip_weight_by_sublayer"][moment] = stream.skip_weight
    record["skip_weight_with_gain_by_sublayer"][moment] = stream.skip_weight_with_gain
    record["identity_weight_by_sublayer"][moment] = stream.identity_weight
    record["identity_weight_with_gain_by_sublayer"][moment] = stream.identity_weight_with_gain
    record["uncorrelated_identity_weight_by_sublayer"][moment] = stream.uncorrelated_identity_weight


def _validate_into(record: Record, model: Transformer, scored: list[Batch]) -> None:
    record["val_loss"] = final = validation_loss(model, scored)
    if record["norm"] == "batch":
        record["val_loss_batch_statistics"] = validation_loss(model, scored, batch_statistics=True)
    guess = record["guess_loss"]
    reason = None
    if not math.isfinite(final):
        reason = f"The loss on held-out text is {final} after the last step."
    elif not all(math.isfinite(norm) for norm in record["grad_norm_by_layer"]["end"]):
        reason = "A gradient is no finite number after the last step."
    elif final > guess:
        reason = f"The loss on held-out text, {final:.3f}, is above guessing by byte frequency, {guess:.3f}"
        own = record["val_loss_batch_statistics"]
        reason += "." if own is None else f"; with the statistics of the evaluated batches it is {own:.3f}."
    if reason is not None:
        record.update(status="diverged", reason=reason)
