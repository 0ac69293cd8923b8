"""Arguments in the wrong place or with another library's name: errors in the user's terms, with a short traceback."""

import difflib
import functools
import inspect
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.core.selection import Selection
from lora_jax.core.transforms import Delta, Params, ParamTransform
from lora_jax.methods.flax_state import register_delta

P = ParamSpec("P")
T = TypeVar("T")

# What PEFT, loralib and transformers call an option, and what it is here.
FOREIGN = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "a_init",
    "rank_pattern": "rank={glob: number}",
    "alpha_pattern": "alpha={glob: number}",
    "use_rslora": "scale_rule='alpha/sqrt(r)'",
    "use_dora": "the method 'dora'",
    "target_modules": "a selection, select('**/{query,value}/kernel')",
    "layers_to_transform": "select(..., layers=[10, 11])",
    "modules_to_save": "chain(..., tune(select('classifier/**')))",
    "num_virtual_tokens": "prefix",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
}

_OF_SELECT = ("axes", "layers", "exclude", "ndim")


def called_here(name: str, options: Collection[str]) -> str:
    """What an option of this name, which is none of the options, is called here: the end of a message."""
    ours = FOREIGN.get(name, "")
    if ours in options or (ours and not ours.isidentifier()):
        return f"it is {ours} here"
    near = difflib.get_close_matches(name, options, 1)
    return f"did you mean {near[0]}?" if near else f"there {'are ' + ', '.join(options) if options else 'is none'}"


def brief(fn: Callable[P, T]) -> Callable[P, T]:
    """`fn`, with the traceback of this library's own errors (ValueError, TypeError, FileNotFoundError with a message)
    ending here. What JAX or the user's own code raises keeps its traceback, and JAX_TRACEBACK_FILTERING=off keeps all.
    """

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return fn(*args, **kwargs)
        except (ValueError, TypeError, FileNotFoundError) as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            is_ours = frame.f_globals.get("__name__", "").startswith("lora_jax.") and len(error.args) == 1
            keeps_all = jax.config.values.get("jax_traceback_filtering") == "off"
            if keeps_all or not is_ours or type(error) not in (ValueError, TypeError, FileNotFoundError):
                raise
            raise type(error)(*error.args) from None  # a new one, without the notes that JAX adds on the way

    return call


def of_methods(fn: Callable[P, T], count: int | None = None) -> Callable[P, T]:
    """`fn` with a short traceback; its first arguments, `count` of them or all, must be methods."""

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for given in args[:count]:
            if not isinstance(given, ParamTransform):
                what = "methods, one after the other" if count is None else "(method, params)"
                raise TypeError(f"{fn.__name__} takes {what}, a method as lora_jax.lora(...); got {_kind(given)}")
        return fn(*args, **kwargs)

    return brief(call)


def checked(factory: Callable[P, ParamTransform]) -> Callable[P, ParamTransform]:
    """The factory of a method, which checks what it is given, as `init` and `apply` of its transform do then."""
    name, options = factory.__name__, list(inspect.signature(factory).parameters)
    first = options.pop(0)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> ParamTransform:
        if args or first in kwargs:
            _check_first(name, first, args[0] if args else kwargs[first])
        if unknown := [option for option in kwargs if option not in (first, *options)]:
            of_select = first == "selection" and unknown[0] in _OF_SELECT
            here = f"select(..., {unknown[0]}=...) has it" if of_select else called_here(unknown[0], options)
            raise TypeError(f"{name} has no option {unknown[0]!r}: {here}")
        if len(args) > 1:
            named = f"options by their names: {options[0]}={args[1]!r:.40}" if options else "has no options"
            raise TypeError(f"{name} takes one argument by position, and {named}")
        if "dtype" in kwargs:
            _check_dtype(kwargs["dtype"])
        method = factory(*args, **kwargs)
        return method._replace(init=brief(_init(method)), apply=brief(_apply(method)))

    return brief(make)


def _check_first(name: str, first: str, given: Any) -> None:
    """A TypeError for a method's first argument that is no selection, or a selection in the place of sites."""
    if first == "selection" and not isinstance(given, Selection):
        hint = f"lora_jax.{name}(lora_jax.select({given!r:.60}), ...)" if isinstance(given, str) else "lora_jax.select"
        raise TypeError(f"{name} takes a selection of weights, {hint}; got {_kind(given)}")
    if first == "methods" and not (isinstance(given, Sequence) and all(isinstance(x, ParamTransform) for x in given)):
        raise TypeError(f"{name} takes a list of methods, [lora_jax.lora(...), ...]; got {_kind(given)}")
    if first == "sites" and not isinstance(given, Mapping):
        sites = "{'mlp_out': (occurrences, width)}, as lora_jax.sites finds them"
        got = "a selection of weights" if isinstance(given, Selection) else _kind(given)
        raise TypeError(f"{name} changes activations and takes their sites, {sites}; got {got}")


def _check_dtype(given: Any) -> None:
    """A ValueError for what is no dtype of floating-point arrays."""
    try:
        is_float = jnp.issubdtype(jnp.dtype(given), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(f"dtype={given!r} must be of floating point: float32, bfloat16 or float16")


def _init(method: ParamTransform) -> Any:
    @functools.wraps(method.init)
    def init(key: Array, params: Params) -> Delta:
        register_delta()
        if not _is_key(key):
            swapped = "; the two are swapped" if _is_key(params) else ""
            raise TypeError(f"init takes (key, params), a key as jax.random.key(0) first, not {_kind(key)}{swapped}")
        try:
            return method.init(key, params)
        except ValueError as error:
            raise _of_variables(error, params) from None

    init.__qualname__ = "init"  # what Python calls it where arguments are missing
    return init


def _apply(method: ParamTransform) -> Any:
    @functools.wraps(method.apply)
    def apply(params: Params, delta: Delta, *, key: Array | None = None, strength: Any = 1.0) -> Params:
        register_delta()
        if key is not None and not _is_key(key):
            raise TypeError(f"apply takes key=jax.random.key(0), for dropout, or None; got {_kind(key)}")
        if strength is None or isinstance(strength, str):
            raise TypeError(f"strength={strength!r} must be a number or an array, 0 for the base alone, 1 as trained")
        return method.apply(params, delta, key=key, strength=strength)

    apply.__qualname__ = "apply"
    return apply


def _is_key(key: Any) -> bool:
    """Whether this is a key of `jax.random.key`, or a raw one of `jax.random.PRNGKey`."""
    dtype = getattr(key, "dtype", None)
    if dtype is None:
        return False
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key)) or (dtype == jnp.dtype("uint32") and key.ndim > 0)


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Array):
        return f"an array of {value.dtype}"
    return repr(value)[:60] if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"


def _of_variables(error: ValueError, params: Params) -> ValueError:
    """The error, with a hint where params are all variables of a Flax model."""
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        return ValueError(f"{error}; these are Flax variables: give variables['params']")
    return error
