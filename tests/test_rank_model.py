"""The cost model of synchronised statistics: exact small cases, the fit, and the committed measurement.

Read next: benchmarks/rank_model.py; benchmarks/ranks.py, which measured.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import astuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from normkit import statistics

ROOT = Path(__file__).parents[1]


def _load(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


model = _load("rank_model")
Work, Link = model.Work, model.Link
ALGORITHMS = (model.RING, model.MIXED, model.DOUBLING)


@pytest.fixture(scope="module")
def cells() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "ranks.json").read_text())["cells"]


# --------------------------------------------------------------------------------------------------- counted by hand


@pytest.mark.parametrize(
    ("collective", "ranks", "calls_steps_bytes"),
    [
        ("ring_all_gather", 2, (1, 1, 100)),
        ("ring_all_gather", 4, (1, 3, 300)),
        ("ring_all_reduce", 2, (1, 2, 100)),
        ("ring_all_reduce", 4, (1, 6, 150)),
        ("doubling_all_gather", 2, (1, 1, 100)),
        ("doubling_all_gather", 8, (1, 3, 700)),
        ("doubling_all_reduce", 8, (1, 3, 300)),
        ("doubling_all_reduce", 5, (1, 3, 300)),  # no power of two: as the next one
    ],
)
def test_a_collective_sends_what_one_counts_by_hand(
    collective: str, ranks: int, calls_steps_bytes: tuple[int, int, int]
) -> None:
    assert getattr(model, collective)(ranks, 100) == Work(*calls_steps_bytes)


def test_forward_sends_count_mean_and_m2_and_backward_two_sums() -> None:
    """3 channels on 2 ranks: 7 numbers gathered, or 4 and 3 reduced; backward 6; float64."""
    assert model.gather(model.RING, 2, 3) == Work(1, 1, 56)
    assert model.reduces(model.RING, 2, 3) == Work(2, 4, 32 + 24)
    assert model.backward(model.RING, 2, 3) == Work(1, 2, 48)
    assert model.by_gather(model.RING, 2, 3) == Work(1, 1, 56, 1, 112)  # both ranks' numbers are merged
    assert model.by_reduces(model.RING, 2, 3) == Work(2, 4, 56, 1, 56)


def test_a_training_step_is_all_layers_forward_and_backward() -> None:
    network = model.Network("two layers", 2, 3)
    assert model.training_step(network, model.RING, 2) == Work(4, 6, 208, 2, 224)


def test_time_is_each_cost_times_its_amount() -> None:
    link = Link(call_us=1, step_us=10, sent_us=0.5, merge_us=100, merged_us=0.25)
    assert link.time_us(Work(2, 3, 4, 1, 8)) == 2 + 30 + 2 + 100 + 2


# -------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("how", ALGORITHMS, ids=lambda how: how.name)
@pytest.mark.parametrize("variant", model.VARIANTS)
def test_more_ranks_and_more_channels_never_cost_less(how: Any, variant: str) -> None:
    def times(pairs: list[tuple[int, int]]) -> list[float]:
        return [model.ASSUMED.time_us(model.VARIANTS[variant](how, *pair)) for pair in pairs]

    for found in (
        times([(ranks, 512) for ranks in range(2, 300)]),
        times([(64, channels) for channels in range(1, 3000, 7)]),
    ):
        assert found == sorted(found)
        assert found[-1] > found[0]


@pytest.mark.parametrize("ranks", [4, 8, 64, 1024])
def test_the_crossing_in_rings_is_where_the_formula_puts_it(ranks: int) -> None:
    """call + 3 (P - 1) step = (P - 1)(1 - 2 / P) n sent, with n = 8 (2 C + 1) bytes: solved for C."""
    link = Link(call_us=20, step_us=50, sent_us=0.001)
    size = (20 + 3 * (ranks - 1) * 50) / ((ranks - 1) * (1 - 2 / ranks) * 0.001)
    channels = (size / 8 - 1) / 2
    found = model.crossing(link, model.RING, ranks)
    assert found <= channels < 2 * found


def test_two_ranks_in_a_ring_always_gather() -> None:
    """Both ways send the same bytes there, and the gather needs fewer messages."""
    assert model.crossing(Link(20, 50, 0.001), model.RING, 2) == 1 << 20


def test_many_ranks_never_gather_where_a_ring_competes_with_a_tree() -> None:
    assert model.crossing(model.ASSUMED, model.MIXED, 1024) == 0


def test_the_rule_looks_at_bytes_and_ranks() -> None:
    fits = model.GATHER_BYTES // (2 * 16) - 1  # 2 ranks: 2 (2 C + 1) 8 bytes
    assert model.gathers(2, fits)
    assert not model.gathers(2, fits + 1)
    assert model.gathers(model.GATHER_RANKS, 64)
    assert not model.gathers(model.GATHER_RANKS + 1, 64)


def test_regret_is_what_the_wrong_way_costs_at_worst() -> None:
    """Only messages cost: in rings two all-reduces take four times as many as one gather."""
    link = Link(0, 1, 0)
    assert model.regret(model.below(1 << 60), link, model.RING) == 1
    assert model.regret(model.below(0), link, model.RING) == 4


# --------------------------------------------------------------------------------------------------------- the fit


def _points(link: Any, ranks: tuple[int, ...]) -> list[tuple[Any, float]]:
    works = [
        variant(model.RING, number, channels)
        for variant in model.VARIANTS.values()
        for number in ranks
        for channels in (16, 256, 4096, 65536)
    ]
    return [(work, link.time_us(work)) for work in works]


@pytest.mark.parametrize(
    "costs", [(30.0, 80.0, 0.002, 40.0, 0.0005), (0.0, 650.0, 0.0018, 250.0, 0.0), (10.0, 0.0, 0.001, 0.0, 0.0)]
)
@pytest.mark.parametrize("ranks", [(2,), (4,), (2, 4)])
def test_the_fit_finds_the_costs_that_made_the_points(costs: tuple[float, ...], ranks: tuple[int, ...]) -> None:
    assert astuple(model.fit(_points(Link(*costs), ranks))) == pytest.approx(costs, rel=1e-6, abs=1e-6)


def test_no_fitted_cost_is_negative() -> None:
    """A second message that makes a call faster would need a negative cost; the best without one is their mean."""
    points = [(Work(steps=1, sent=100), 10.0), (Work(steps=2, sent=100), 8.0)]
    found = model.fit(points)
    assert min(astuple(found)) >= 0
    assert found.step_us == 0
    assert 0.08 < found.sent_us < 0.1


# ------------------------------------------------------------------------------------------- the committed measurement


def test_the_committed_points_are_reproduced_within_the_stated_error(cells: Any) -> None:
    for ranks, (typical, worst) in model.STATED_ERRORS.items():
        found = [abs(error) for error in model.errors(cells, [ranks], model.fitted(cells, [ranks])).values()]
        assert len(found) >= 35
        assert sorted(found)[len(found) // 2] <= typical
        assert max(found) <= worst


def test_the_rule_is_the_librarys() -> None:
    assert (model.GATHER_BYTES, model.GATHER_RANKS) == (statistics.GATHER_BYTES, statistics.GATHER_RANKS)


def test_the_rule_is_never_far_from_the_faster_way_where_it_was_measured(cells: Any) -> None:
    """Up to 4,096 channels it is the faster way; on the way to the crossing it costs some twice as much at worst."""
    for cell in cells:
        if cell["kind"] == "collectives":
            gather, reduces = (cell["time_us"][way]["median"] for way in ("by gather", "by reduces"))
            taken = gather if model.gathers(cell["ranks"], cell["channels"]) else reduces
            most = 1.0 if cell["channels"] <= 4096 else 2.2
            assert taken <= most * min(gather, reduces), cell


def _tables(lines: list[str]) -> list[list[str]]:
    """Runs of lines that begin with a bar."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_the_pages_tables_of_numbers_are_those_that_the_script_prints(cells: Any) -> None:
    printed = _tables([*model.measured(cells), *model.checked(cells), *model.predicted(cells)])
    page = _tables((ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines())
    numbers = [table for table in page if "---:" in table[1]]  # words stand on the left
    assert len(numbers) >= 5
    for table in numbers:
        assert table in printed
