"""The examples in docstrings are run, and every public name of the core has one."""

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


def test_every_public_name_of_the_core_has_an_example():
    for name in lj.__all__:
        if callable(value := getattr(lj, name)) and getattr(value, "__module__", "").startswith("lora_jax"):
            assert ">>>" in (value.__doc__ or ""), name
