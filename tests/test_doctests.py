"""The examples in docstrings are run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest

import lora_jax as lj
from tests.helpers.public import PUBLIC

MODULES = sorted(m.name for m in pkgutil.walk_packages(lj.__path__, "lora_jax."))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def named(name: str, package: str) -> Any:
    """What a docstring of a public package calls by that name: `save` of its own, or `hf.save`, `lora_jax.lora`."""
    owner, _, last = name.rpartition(".")
    packages = [other for other in PUBLIC if f".{other}".endswith(f".{owner}")] if owner else [package]
    candidates = [getattr(importlib.import_module(other), last, None) for other in packages]
    return next((value for value in candidates if value is not None), None)


def has_example(value: Any) -> bool:
    """Whether an example that runs is in the docstring."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    return any(not example.options.get(doctest.SKIP) for example in examples)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_example(package: str) -> None:
    """In its docstring, or in that of another public name to which a sentence there points."""
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)) or not value.__module__.startswith("lora_jax"):
            continue
        pointed = re.findall(r"example\s+is\s+in\s+`([\w.]+)`", value.__doc__ or "")
        others = [other for other in (named(target, package) for target in pointed) if other is not None]
        assert has_example(value) or any(map(has_example, others)), f"{package}.{name}"
