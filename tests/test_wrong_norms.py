"""The suite's checks reject deliberately wrong norms and pass right ones. Read next: wrong_norms.py."""

from __future__ import annotations

import pytest

from checks import CHECKS
from normkit import functional
from plain_norms import PlainNorms
from wrong_norms import WRONG


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_norm_is_rejected(wrong: type[PlainNorms]) -> None:
    with pytest.raises(AssertionError):
        CHECKS[wrong.rejected_by](wrong())


@pytest.mark.parametrize("name", CHECKS)
def test_a_right_norm_passes(name: str) -> None:
    CHECKS[name](PlainNorms())


@pytest.mark.parametrize("name", CHECKS)
def test_normkit_passes_the_same_check(name: str, core: None) -> None:
    CHECKS[name](functional)


def test_every_check_rejects_something() -> None:
    """A check that no wrong norm fails proves nothing."""
    assert {wrong.rejected_by for wrong in WRONG} == set(CHECKS)
