"""Which cases of a test run in `make test`, and which in `make test-all` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """The names as parameters, all slow but the quick ones."""
    names = list(names)
    assert set(quick) <= set(names), set(quick) - set(names)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
