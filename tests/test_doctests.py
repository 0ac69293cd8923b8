"""The examples in docstrings are run, and every public name of the core is documented."""

import doctest
import importlib
import pkgutil

import pytest

import lora_jax as lj

MODULES = sorted(m.name for m in pkgutil.walk_packages(lj.__path__, "lora_jax."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_public_names_are_documented_and_the_first_ones_by_example():
    for name in lj.__all__:
        assert getattr(lj, name).__doc__, name
    for name in ("select", "lora", "tune", "chain", "from_spec", "freeze_base", "lift"):
        assert ">>>" in getattr(lj, name).__doc__, name
