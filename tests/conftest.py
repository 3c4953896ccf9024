"""What every test shares: the compiled core to test, backends, seeds, threads.

Here: the option --renew-golden, the variable NORMKIT_TEST_CORE, fixtures.
Read next: cases.py, the table that the numerical tests run through.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # before any core: it brings the OpenMP runtime that the core shares
from hypothesis import HealthCheck, settings


def _load_core(place: Path) -> None:
    """Another build of the core (serial, with sanitizers) takes the place of the installed one."""
    found = [place] if place.is_file() else sorted(place.rglob("_core*.so"))
    if len(found) != 1:
        raise pytest.UsageError(f"NORMKIT_TEST_CORE={place} must name a _core*.so or a folder with one, got {found}")
    loader = importlib.machinery.ExtensionFileLoader("normkit._core", str(found[0]))
    spec = importlib.util.spec_from_file_location("normkit._core", found[0], loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["normkit._core"] = module
    loader.exec_module(module)


if "NORMKIT_TEST_CORE" in os.environ:
    _load_core(Path(os.environ["NORMKIT_TEST_CORE"]))

import normkit  # noqa: E402
import test_triton_interpreted  # noqa: E402
from normkit.kernels import cpu  # noqa: E402

settings.register_profile(
    "normkit",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("normkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write the golden files of tests/golden anew")


def pytest_report_header() -> str:
    return "normkit: " + "; ".join(str(reason) for reason in normkit.reasons())


def pytest_collection_finish(session: pytest.Session) -> None:
    """The longest test has a core to itself meanwhile; a worker of xdist begins it when its turn comes."""
    config = session.config
    if config.option.collectonly or hasattr(config, "workerinput") or importlib.util.find_spec("triton") is None:
        return
    if any(item.path.name == "test_triton_interpreted.py" for item in session.items):
        config.stash[test_triton_interpreted.BEGUN] = test_triton_interpreted.begin()


def pytest_sessionfinish(session: pytest.Session) -> None:
    begun = session.config.stash.get(test_triton_interpreted.BEGUN, None)
    if begun is not None and begun.process.poll() is None:
        begun.process.kill()
        begun.process.wait()
        begun.output.close()


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, forced: no call inside can fall back."""
    name: str = request.param
    if name == "cpu" and (why := cpu.unavailable()) is not None:
        pytest.skip(why)
    with normkit.use_backend(name):
        yield name


@pytest.fixture
def core() -> Iterator[None]:
    """The compiled core, forced."""
    if (why := cpu.unavailable()) is not None:
        pytest.skip(why)
    with normkit.use_backend("cpu"):
        yield


@pytest.fixture(params=cpu._core.isas() if cpu.unavailable() is None else ["absent"])
def core_by_isa(request: pytest.FixtureRequest, core: None) -> Iterator[str]:
    """The compiled core, forced, by every instruction set that this machine has: each has bits of its own."""
    before = cpu.isa()
    cpu._core.set_isa(request.param)
    yield request.param
    cpu._core.set_isa(before)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """A fixed seed before each test, and torch's settings restored after it."""
    torch.manual_seed(0)
    count, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(count)
    torch.set_default_dtype(dtype)
