"""The packages of the extra `scores`."""

import importlib
from typing import Any


def extra(module: str) -> Any:
    """A module of the extra.

    Raises:
      ImportError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{module} is not installed: pip install "lora_jax[scores]" brings it') from error
