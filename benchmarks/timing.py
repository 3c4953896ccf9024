"""The protocol: every variant of a cell is called in turn, round after round; medians and spread.

Whatever else the machine does then falls on all variants alike. Nothing here knows what is measured.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_BATCH_S = 1e-3  # a small call is repeated within a round up to this: far above the timer's resolution
MIN_ROUNDS = 7  # a median and deciles of fewer say little


@dataclass
class Timing:
    """Microseconds of one call: the median over rounds and the deciles; `calls` is rounds times repeats."""

    median: float
    p10: float
    p90: float
    calls: int


def measure(variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Time the variants in turn for about `seconds`, and at least MIN_ROUNDS rounds.

    The caller has called each once: what compiles or pages memory in is behind it.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    repeats = {}
    for name, call in variants.items():
        repeats[name], once = _repeats(call)
        if repeats[name] == 1:  # a long call: what told so is a round too
            samples[name].append(once)
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        rounds = 1 if set(repeats.values()) == {1} else 0
        while rounds < MIN_ROUNDS or time.perf_counter() < end:
            for name, call in variants.items():
                samples[name].append(_batch(call, repeats[name]))
            rounds += 1
    finally:
        gc.enable()
    return {name: _timing(values, repeats[name]) for name, values in samples.items()}


def _repeats(call: Callable[[], object]) -> tuple[int, float]:
    """How often to repeat a call within a round, and the seconds of one.

    From the fastest of a few where it is short: a busy moment must not make the batch of a small call tiny.
    """
    once = _batch(call, 1)
    if once < MIN_BATCH_S:
        once = min(_batch(call, 5) for _ in range(5))
    return max(1, round(MIN_BATCH_S / once)), once


def _batch(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, over `repeats` of them."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _timing(values: list[float], repeats: int) -> Timing:
    times_us = [value * 1e6 for value in values]
    deciles = statistics.quantiles(times_us, n=10, method="inclusive")  # the other method extrapolates
    return Timing(
        *(round(value, 3) for value in (statistics.median(times_us), deciles[0], deciles[-1])),
        calls=len(values) * repeats,
    )
