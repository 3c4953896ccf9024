"""What synchronised BatchNorm statistics would cost on ranks that nobody has here: a model, its fit and its check.

    python benchmarks/rank_model.py [benchmarks/results/ranks.json]

Here: what a rank does in each collective (`Work`), what that costs on a link (`Link`), the fit of a link to the file
that ranks.py measured, and tables. Pure functions, no torch. The time of a collective is taken as linear in what is
done one after the other, Hockney's latency and inverse bandwidth with a cost for every call and for merging:

    time = calls * call_us + steps * step_us + sent * sent_us + merges * merge_us + merged * merged_us

Left out: ranks that come late (a collective waits for the slowest), cores or links that are shared, networks of several
levels, and work that could overlap with the collective. The first two make reality slower.
Read next: ranks.py, which measures; docs/scale.md, what follows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

NUMBER_BYTES = 8  # everything is sent as float64
GATHER_BYTES, GATHER_RANKS = 1 << 20, 32  # normkit.statistics has the same; RULES compares them with others
MOST_CHANNELS = 1 << 16  # fitted; beyond, times were measured to grow faster than sizes, and no layer is so wide
STATED_ERRORS = {2: (0.1, 0.25), 4: (0.1, 0.25)}  # by ranks: the median and the worst relative error of the fit
GROUPS = (8, 32, 64, 1024, 16384)  # ranks that share statistics


@dataclass(frozen=True)
class Work:
    """What one rank does, one after the other."""

    calls: float = 0.0  # collectives that are started
    steps: float = 0.0  # messages, each of which waits for the one before
    sent: float = 0.0  # bytes in them
    merges: float = 0.0  # times that moments are put together
    merged: float = 0.0  # bytes that this reads

    def __add__(self, other: Work) -> Work:
        return Work(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    def times(self, number: float) -> Work:
        return Work(*(number * amount for amount in astuple(self)))


@dataclass(frozen=True)
class Link:
    """Microseconds of each part of Work."""

    call_us: float
    step_us: float
    sent_us: float
    merge_us: float = 0.0
    merged_us: float = 0.0

    def time_us(self, work: Work) -> float:
        return float(sum(cost * amount for cost, amount in zip(astuple(self), astuple(work), strict=True)))


# ------------------------------------------------------------------------- collectives of `ranks` ranks, `size` bytes


def ring_all_gather(ranks: int, size: float) -> Work:
    """Every rank hands on what it got last, ranks - 1 times."""
    return Work(1, ranks - 1, (ranks - 1) * size)


def ring_all_reduce(ranks: int, size: float) -> Work:
    """Parts of 1 / ranks go round once to be added up and once more to be known everywhere."""
    return Work(1, 2 * (ranks - 1), 2 * (ranks - 1) / ranks * size)


def doubling_all_gather(ranks: int, size: float) -> Work:
    """Partners at distance 1, 2, 4, ... exchange all that they have."""
    return Work(1, math.ceil(math.log2(ranks)), (ranks - 1) * size)


def doubling_all_reduce(ranks: int, size: float) -> Work:
    """Partners at distance 1, 2, 4, ... exchange their sums."""
    steps = math.ceil(math.log2(ranks))
    return Work(1, steps, steps * size)


Collective = Callable[[int, float], Work]


@dataclass(frozen=True)
class Algorithms:
    """How a library does both collectives."""

    name: str
    all_gather: Collective
    all_reduce: Collective


RING = Algorithms("ring", ring_all_gather, ring_all_reduce)  # gloo, for both, at any size
MIXED = Algorithms("ring gather, doubling reduce", ring_all_gather, doubling_all_reduce)  # NCCL, small
DOUBLING = Algorithms("doubling", doubling_all_gather, doubling_all_reduce)


# ------------------------------------------------------------------------------------ what BatchNorm sends, by the name


def gather(how: Algorithms, ranks: int, channels: int) -> Work:
    """count, mean and m2 of every rank."""
    return how.all_gather(ranks, (2 * channels + 1) * NUMBER_BYTES)


def reduces(how: Algorithms, ranks: int, channels: int) -> Work:
    """The sums of count and values, then of squared deviations."""
    first, second = (channels + 1) * NUMBER_BYTES, channels * NUMBER_BYTES
    return how.all_reduce(ranks, first) + how.all_reduce(ranks, second)


def backward(how: Algorithms, ranks: int, channels: int) -> Work:
    """Two sums of a channel's gradient."""
    return how.all_reduce(ranks, 2 * channels * NUMBER_BYTES)


def by_gather(how: Algorithms, ranks: int, channels: int) -> Work:
    """Forward by one all-gather, and its merging of all ranks' numbers."""
    return gather(how, ranks, channels) + Work(merges=1, merged=ranks * (2 * channels + 1) * NUMBER_BYTES)


def by_reduces(how: Algorithms, ranks: int, channels: int) -> Work:
    """Forward by two all-reduces, with the arithmetic before and between."""
    return reduces(how, ranks, channels) + Work(merges=1, merged=(2 * channels + 1) * NUMBER_BYTES)


VARIANTS = {  # by the names in the result file
    "gather": gather,
    "reduces": reduces,
    "backward": backward,
    "by gather": by_gather,
    "by reduces": by_reduces,
}


def gathers(ranks: int, channels: int) -> bool:
    """Whether one all-gather should bring the moments together, two all-reduces otherwise.

    A gather takes one round of messages instead of two or four, and brings every rank's numbers to every rank: so few
    bytes in all. Where its messages go round a ring and sums go up a tree, that also needs few ranks.
    """
    return ranks <= GATHER_RANKS and ranks * (2 * channels + 1) * NUMBER_BYTES <= GATHER_BYTES


@dataclass(frozen=True)
class Network:
    """So many BatchNorm layers of so many channels each."""

    name: str
    layers: int
    channels: int


def training_step(network: Network, how: Algorithms, ranks: int) -> Work:
    """Forward and backward of all its layers, statistics shared by `ranks` ranks."""
    forward = by_gather if gathers(ranks, network.channels) else by_reduces
    layer = forward(how, ranks, network.channels) + backward(how, ranks, network.channels)
    return layer.times(network.layers)


# ------------------------------------------------------------------------------------------------------------ the fit


def fit(points: Sequence[tuple[Work, float]]) -> Link:
    """The costs, none below 0, with the smallest sum of squared relative errors over (work, microseconds).

    With five unknowns every choice of those that are 0 can be tried; the best that is nowhere negative is the solution.
    """
    times = np.array([time for _, time in points])
    rows = np.array([astuple(work) for work, _ in points]) / times[:, None]  # relative: small messages count as well
    scale = np.maximum(rows.max(0), np.finfo(float).tiny)
    best, least = np.zeros(rows.shape[1]), math.inf
    for number in range(1, rows.shape[1] + 1):
        for some in map(list, itertools.combinations(range(rows.shape[1]), number)):
            found = np.linalg.lstsq(rows[:, some] / scale[some], np.ones(len(times)), rcond=None)[0] / scale[some]
            error = float(((rows[:, some] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                least, best = error, np.zeros(rows.shape[1])
                best[some] = found
    return Link(*best.tolist())


# ------------------------------------------------------------------------------------------------ from the result file

Cells = list[dict[str, Any]]  # as ranks.py writes them


def collectives(cells: Cells, ranks: Iterable[int]) -> Iterable[tuple[int, int, str, float]]:
    """(ranks, channels, variant, microseconds) of what the model is compared with: no whole layers."""
    for cell in cells:
        if cell["kind"] == "collectives" and cell["ranks"] in ranks and cell["channels"] <= MOST_CHANNELS:
            for variant, times in cell["time_us"].items():
                yield cell["ranks"], cell["channels"], variant, times["median"]


def fitted(cells: Cells, ranks: Iterable[int]) -> Link:
    """The link on which the model comes closest to the cells of so many ranks; gloo sends in rings."""
    found = collectives(cells, list(ranks))
    return fit([(VARIANTS[variant](RING, number, channels), time) for number, channels, variant, time in found])


def errors(cells: Cells, ranks: Iterable[int], link: Link) -> dict[tuple[int, int, str], float]:
    """By (ranks, channels, variant), how far the model is above what was measured, as a share of it."""
    return {
        (number, channels, variant): link.time_us(VARIANTS[variant](RING, number, channels)) / time - 1
        for number, channels, variant, time in collectives(cells, list(ranks))
    }


# ------------------------------------------------------------------------------------------------------ what is assumed

# No measurement: 10 us to start a collective, 5 us a message, 25 GB/s, 40 us of kernel launches to merge, and ten
# passes over the numbers at 2 TB/s.
ASSUMED = Link(call_us=10, step_us=5, sent_us=1 / 25e3, merge_us=40, merged_us=10 / 2e6)
NETWORKS = (Network("20 layers of 64", 20, 64), Network("53 of 512, like ResNet-50", 53, 512))
NETWORKS += (Network("150 of 1,024", 150, 1024),)


def places(cells: Cells) -> dict[str, tuple[Link, Algorithms]]:
    """The links that predictions are made for, by what they are called in tables."""
    return {"gloo as here, ring": (fitted(cells, [2]), RING)} | {
        f"assumed, {how.name}": (ASSUMED, how) for how in (RING, MIXED, DOUBLING)
    }


def crossing(link: Link, how: Algorithms, ranks: int) -> int:
    """The largest power of 2 up to 2^20 channels at which the gather is not slower than two all-reduces; 0 for none."""
    good = [
        channels
        for channels in (1 << power for power in range(21))
        if link.time_us(by_gather(how, ranks, channels)) <= link.time_us(by_reduces(how, ranks, channels))
    ]
    return max(good, default=0)


def regret(rule: Callable[[int, int], bool], link: Link, how: Algorithms) -> float:
    """How many times as long as the better way the rule takes at worst, for 2 to 16,384 ranks, 16 to 4,096 channels."""
    worst = 1.0
    for ranks, channels in itertools.product((1 << power for power in range(1, 15)), (1 << p for p in range(4, 13))):
        both = [link.time_us(way(how, ranks, channels)) for way in (by_gather, by_reduces)]
        worst = max(worst, both[0 if rule(ranks, channels) else 1] / min(both))
    return worst


def below(size: int, most: float = math.inf) -> Callable[[int, int], bool]:
    """A rule: the gather up to so many bytes in all and so many ranks."""
    return lambda ranks, channels: ranks <= most and ranks * (2 * channels + 1) * NUMBER_BYTES <= size


RULES = {
    "always gather": below(1 << 60),
    "up to 256 KiB": below(1 << 18),
    "up to 1 MiB": below(1 << 20),
    "up to 4 MiB": below(1 << 22),
    "up to 1 MiB and 16 ranks": below(1 << 20, 16),
    "up to 1 MiB and 32 ranks": below(1 << 20, 32),
    "up to 2 MiB and 32 ranks": below(1 << 21, 32),
}


# -------------------------------------------------------------------------------------------------------------- tables

# What a link is fitted to, and what it is compared with.
FITS = (("2", [2], [2]), ("4", [4], [4]), ("2 and 4 together", [2, 4], [2, 4]), ("2, compared with 4", [2], [4]))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of Markdown."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return ["", *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def spread(times: dict[str, float]) -> str:
    return f"{times['median']:,.0f} [{times['p10']:,.0f}, {times['p90']:,.0f}]"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def counted(work: Work) -> str:
    return f"{work.calls:,.0f}, {work.steps:,.0f}, {work.sent / 1e6:.1f}"


def measured(cells: Cells) -> list[str]:
    """Microseconds, medians with deciles."""
    columns = ["ranks, C", "bytes gathered", *VARIANTS]
    rows = [
        [f"{cell['ranks']}, {cell['channels']:,}", f"{cell['ranks'] * (2 * cell['channels'] + 1) * NUMBER_BYTES:,}"]
        + [spread(cell["time_us"][variant]) for variant in VARIANTS]
        for cell in cells
        if cell["kind"] == "collectives"
    ]
    layers = [
        [f"{cell['ranks']}, {tuple(cell['shape'])}", *map(spread, cell["time_us"].values())]
        for cell in cells
        if cell["kind"] == "layer"
    ]
    return [
        "Measured, us, median [10 %, 90 %]:",
        *table(columns, rows),
        *table(["ranks, batch of each", "BatchNorm", "SyncBatchNorm"], layers),
    ]


def checked(cells: Cells) -> list[str]:
    """The fitted links, and how far the model is from every measured point."""
    costs, summaries, points = [], [], []
    for title, of, on in FITS:
        link = fitted(cells, of)
        found = errors(cells, on, link)
        if title in ("2", "4"):
            costs.append([title, *(f"{cost:.4g}" for cost in astuple(link))])
            for ranks, channels in sorted({key[:2] for key in found}):
                each = [found[ranks, channels, variant] for variant in VARIANTS]
                points.append([f"{ranks}, {channels:,}", *(f"{error:+.0%}" for error in each)])
        by_variant = [[error for key, error in found.items() if key[2] == variant] for variant in VARIANTS]
        summaries.append([title, *map(far, by_variant), far([*found.values()])])
    layers = [
        [f"{cell['ranks']}, {tuple(cell['shape'])}", *(f"{value:,.0f}" for value in layer(cells, cell))]
        for cell in cells
        if cell["kind"] == "layer"
    ]
    return [
        "Model: the links fitted to the ranks' points, us a call, a step, a byte sent, a merge, a byte merged:",
        *table(["ranks", "call", "step", "sent", "merge", "merged"], costs),
        "Model against measured, median size of the relative error (worst):",
        *table(["fitted to ranks", *VARIANTS, "all"], summaries),
        "Model against measured, every point on its own fit:",
        *table(["ranks, C", *VARIANTS], points),
        "SyncBatchNorm above BatchNorm, medians measured, and the model's forward by gather and backward, us:",
        *table(["ranks, batch of each", "measured", "model"], layers),
    ]


def layer(cells: Cells, cell: dict[str, Any]) -> tuple[float, float]:
    """Microseconds by which SyncBatchNorm is above BatchNorm, and what the model says of its collectives."""
    above = cell["time_us"]["SyncBatchNorm"]["median"] - cell["time_us"]["BatchNorm"]["median"]
    ranks, channels = cell["ranks"], cell["shape"][1]
    link = fitted(cells, [ranks])
    return above, link.time_us(by_gather(RING, ranks, channels) + backward(RING, ranks, channels))


def far(found: Sequence[float]) -> str:
    return f"{median(map(abs, found)):.0%} ({max(found, key=abs):+.0%})"


def predicted(cells: Cells) -> list[str]:
    """What the model says of more ranks."""
    links = places(cells)
    sides = (2, 4, *GROUPS)
    largest = [[name, *(f"{crossing(*link, ranks):,}" for ranks in sides)] for name, link in links.items()]
    rules = [[name, *(f"{regret(rule, *link):.1f}" for link in links.values())] for name, rule in RULES.items()]
    steps = [
        [f"{network.name}; {name}"]
        + [short(link.time_us(training_step(network, how, ranks)) / 1e3) for ranks in GROUPS]
        for network in NETWORKS
        for name, (link, how) in links.items()
    ]
    sent = [
        [f"{network.name}; {how.name}"] + [counted(training_step(network, how, ranks)) for ranks in GROUPS]
        for network in NETWORKS
        for how in (RING, MIXED, DOUBLING)
    ]
    return [
        "Model, no measurement: the largest C (a power of 2) at which the gather is not slower, by ranks:",
        *table(["link", *(f"{ranks:,}" for ranks in sides)], largest),
        "Model, no measurement: how many times as long as the better way a rule takes at worst:",
        *table(["rule", *links], rules),
        "Model, no measurement: ms that one training step spends in synchronisation, by ranks that share statistics:",
        *table(["BatchNorm layers; link", *(f"{ranks:,}" for ranks in GROUPS)], steps),
        "Model, no measurement: collectives, messages one after the other and MB that a rank sends in a training step:",
        *table(["BatchNorm layers; algorithms", *(f"{ranks:,}" for ranks in GROUPS)], sent),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=Path(__file__).parent / "results" / "ranks.json")
    result = json.loads(parser.parse_args().path.read_text())
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()), end="\n\n")
    print("\n".join([*measured(result["cells"]), *checked(result["cells"]), *predicted(result["cells"])]))


if __name__ == "__main__":
    main()
