"""From a config's `method` and its options to a transform."""

import difflib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax.core.transforms import inserted_tokens
from lora_jax.models.family import family_of
from lora_jax.training.config import OLD_TOKEN_EMBEDDING


def filled(method: lj.ParamTransform, params: Any, seed: int = 1) -> lj.Delta:
    """A delta that is nowhere zero, for what is timed and not trained."""
    return jax.tree.map(lambda x: x + 0.01, jax.jit(method.init)(jax.random.key(seed), params))


def spec(config: ConfigDict, model: Any, new: Sequence[str] = ()) -> dict[str, Any]:
    """The spec of the config's method on one of our models, and of what trains besides: the config's head, and what is
    `new` in the base.

    Raises:
      ValueError: the config has no such method.
      FileNotFoundError: its file is not there.
    """
    parts = [_part(name, config, model) for name in config.method.split("+")]
    besides = [*config.get("head", ()), *new]
    if tuned := [part for part in parts if part["method"] == "tune"]:
        tuned[0]["select"] = list(dict.fromkeys([*tuned[0]["select"], *besides]))
    elif besides:
        parts.append({"method": "tune", "select": besides})
    return parts[0] if len(parts) == 1 else {"method": "chain", "of": parts}


def _part(name: str, config: ConfigDict, model: Any) -> dict[str, Any]:
    """The spec of one method."""
    if ".py:" in name:
        return _function(name)(model).spec
    _need_options(name, config)
    options = _options(name, config)
    family = family_of(model)
    if "sites" in options:
        sites = family.sites(model.config)
        if missing := sorted(set(options["sites"]) - set(sites)):
            raise ValueError(f"{name}.sites: the model names {sorted(sites)}, not {missing[0]!r}")
        options["sites"] = {site: [sites[site][0], (sites[site][1] or (0,))[-1]] for site in options["sites"]}
    elif name != "tune":
        options["axes"] = dict(family.axes)
    if name == "prefix_embedding" and options["select"] in ([], OLD_TOKEN_EMBEDDING):
        if not family.token_embedding:
            raise ValueError(f"prefix_embedding.select: a {family.name} names no token embedding, name it there")
        options["select"] = [family.token_embedding]
    if name == "prefix_layer":
        options["vocabulary"] = model.config.vocab_size
    return options


def _need_options(name: str, config: ConfigDict) -> None:
    """A ValueError for a method that a config has no options for."""
    if name not in config:
        names = [key for key, part in config.items() if isinstance(part, ConfigDict) and {"select", "sites"} & {*part}]
        near = difflib.get_close_matches(name.strip().lower(), names, 1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        problem = f"method={config.method!r}: the config has no method {name!r}"
        others = "several are joined as 'lora+tune'. Or 'none', or FILE.py:FUNCTION"
        raise ValueError(f"{problem}. {hint}It has {', '.join(names)}; {others}")


def _options(name: str, config: ConfigDict) -> dict[str, Any]:
    """The spec of one method, without what depends on the model."""
    # By way of JSON: to_dict sorts keys, and of a mapping from globs the first match wins.
    options = {"method": name, **json.loads(config[name].to_json())}
    if "layers" in options:
        options["layers"] = options["layers"] or None  # all
    return options


def check(config: ConfigDict) -> None:
    """What the factories of a config's methods refuse of their options, whatever the model; a ValueError."""
    for name in config.get("method", "none").split("+"):
        if ".py:" in name or name == "none":
            continue
        _need_options(name, config)
        options = _options(name, config)
        if "sites" in options:  # of a width that a compacter's `n` divides
            options["sites"] = {site: [1, options.get("n") or 1] for site in options["sites"]}
        if name == "prefix_layer":
            options["vocabulary"] = 1
        if name == "prefix_embedding":
            options["select"] = options["select"] or ["**"]  # the model's token embedding
        try:
            lj.from_spec(options)
        except ValueError as error:
            problem = str(error).removeprefix(f"the spec of {options['method']!r} does not fit: ")
            raise ValueError(f"{name}: {problem}") from None


# The Python files that the user has named, on a command line or in a config of his own, and that have run.
_MODULES: dict[Path, ModuleType] = {}


def run_file(path: str | Path) -> ModuleType:
    """Runs a Python file, once in a process: it registers its methods, and `task_in` knows its tasks.

    Only for a file that the user names. What is read (a workdir, an adapter) never has a file run.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from lora_jax import runs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "reviews.py")
    ...     _ = file.write_text("LABELS = ('bad', 'good')")
    ...     runs.run_file(file).LABELS
    ('bad', 'good')
    """
    file = Path(path).resolve()
    if file not in _MODULES:
        if not file.is_file():
            raise FileNotFoundError(f"{path} does not exist: FILE.py:NAME names an object in a Python file")
        location: Any = importlib.util.spec_from_file_location(f"own_file_{file}", file)
        module = importlib.util.module_from_spec(location)
        sys.modules[module.__name__] = module  # dataclasses and pickles look there
        try:
            location.loader.exec_module(module)
        except BaseException:
            del sys.modules[module.__name__]
            raise
        _MODULES[file] = module
    return _MODULES[file]


def from_file(name: str) -> Any:
    """The object of "FILE.py:OBJECT", or None; runs the file."""
    path, _, attribute = name.rpartition(":")
    return getattr(run_file(path), attribute, None)


def already_run(name: str, what: str) -> Any:
    """The object of "FILE.py:OBJECT", or None, of a file that has run; of that name, if it has moved.

    Raises:
      ValueError: it has not run.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path).resolve()
    module = _MODULES.get(file) or next((module for ran, module in _MODULES.items() if ran.name == file.name), None)
    if module is None:
        how = f"--code={path} of an entry point; in Python runs.run_file({path!r}), or task="
        raise ValueError(f"{what} is {name!r}, and reading a run runs no file that it names. If you trust it: {how}")
    return getattr(module, attribute, None)


def _function(name: str) -> Callable[[Any], lj.ParamTransform]:
    """The function of "FILE.py:FUNCTION", from a model to a method."""
    function = from_file(name)
    if not callable(function):
        file, _, attribute = name.rpartition(":")
        raise ValueError(f"method is {name!r}, but {file} has no function {attribute!r}")
    return function


def register_own(config: ConfigDict) -> None:
    """Registers the methods that a config names by FILE.py:FUNCTION, so that `from_spec` can make them."""
    for name in config.method.split("+"):
        if ".py:" in name:
            _function(name)


def placeholders(spec: Mapping[str, Any], model: Any) -> dict[str, Sequence[int]]:
    """The ids, behind the vocabulary, that the data insert for a method: {"before": prefix, "after": infix}."""
    prefix, infix = inserted_tokens(spec)
    first = model.config.vocab_size
    return {"before": range(first, first + prefix), "after": range(first + prefix, first + prefix + infix)}
