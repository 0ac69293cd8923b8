"""The methods that a spec can name: `register` makes one known, `from_spec` makes it."""

import difflib
from collections.abc import Callable
from typing import Any

from lora_jax.core.selection import Selection
from lora_jax.core.transforms.transform import ParamTransform, chain

_METHODS: dict[str, Callable[..., ParamTransform]] = {}


def register(name: str, factory: Callable[..., ParamTransform]) -> None:
    """Makes a method known to `from_spec` and to configs: `factory(selection, **options)`, options JSON."""
    _METHODS[name] = factory


def from_spec(spec: dict[str, Any]) -> ParamTransform:
    """The transform of a spec: `{"method": name, "select": [globs], "axes", "layers", "exclude", **options}`. What is
    under "peft" (`interop.peft`) stays in the spec and changes nothing.

    >>> import lora_jax as lj
    >>> lj.from_spec({"method": "lora", "select": ["**/kernel"], "rank": 4}).spec["rank"]
    4
    """
    options = dict(spec)
    name, peft = options.pop("method", None), options.pop("peft", None)
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {sorted(_METHODS)}"
        raise ValueError(f"the spec's method {name!r} is not known; {hint}")
    first = []
    if "select" in options:
        globs = options.pop("select")
        globs = [globs] if isinstance(globs, str) else globs
        layers, exclude = options.pop("layers", None), options.pop("exclude", ())
        layers = None if layers is None else tuple(layers)
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
        first = [Selection(tuple(globs), options.pop("axes", None), layers, exclude)]
    try:
        method = _METHODS[name](*first, **options)
    except TypeError as error:
        raise ValueError(f"the spec of {name!r} does not fit: {error}") from error
    return method if peft is None else method._replace(spec=method.spec | {"peft": peft})


register("chain", lambda of: chain(*map(from_spec, of)))
