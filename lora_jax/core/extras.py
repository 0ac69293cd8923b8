"""Imports of packages that an extra of this one brings: `pip install "lora_jax[train]"`."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports: a ModuleNotFoundError of one whose package is not installed names the extra that brings it.

    Around a module of ours whose own imports name another extra, the outer name stands.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "lora_jax":
            raise
        message = f'{error.name} is not installed: pip install "lora_jax[{name}]" brings it'
        raise ModuleNotFoundError(message, name=error.name) from error
