"""Modules that the extra `scores` brings."""

import importlib
from typing import Any

from lora_jax.core import extras


def extra(module: str) -> Any:
    """The module of that name.

    Raises:
      ModuleNotFoundError: it is not installed; names the extra.
    """
    with extras.extra("scores"):
        return importlib.import_module(module)
