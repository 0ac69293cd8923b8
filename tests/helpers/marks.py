"""Which cases of a test run in `make test`, and which in `make test-all` alone."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """The names as parameters, all slow but the quick ones."""
    names = list(names)
    assert set(quick) <= set(names), set(quick) - set(names)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def diagonal(*axes: Collection[Any]) -> list[Any]:
    """All combinations of the axes' values as parameters. Quick are as many as the longest axis has values, so that
    every value of every axis is among them; the other combinations are slow."""
    quick = {tuple(n % len(axis) for axis in axes) for n in range(max(map(len, axes)))}

    def case(combination: tuple[tuple[int, Any], ...]) -> Any:
        places, values = zip(*combination, strict=True)
        return pytest.param(*values, marks=() if places in quick else pytest.mark.slow)

    return [case(combination) for combination in itertools.product(*map(enumerate, axes))]
