"""The methods that a spec can name, and what is known of each beside what it computes: `register`, `from_spec`."""

import copyreg
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import PartitionSpec

from lora_jax.core.selection import Selection, strings
from lora_jax.core.transforms.transform import ParamTransform, Spec, chain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What other parts of the library ask about a method. The defaults are those of a method with factors as LoRA's.

    Globs match a factor's `path/factor` in the delta, such as `h_0/attn/query/kernel/a`.

    Attributes:
      not_additive: why the changes of two adapters of this method do not add up; "" where they do
        (`lora_jax.arithmetic` then adds what has low rank, bias deltas and tuned leaves).
      at_rank: `(spec, rank) -> spec` of a larger rank, under which the factors padded with zeros change the base as
        before, and the gradient of the padding is zero. None: a sweep cannot vary the rank.
      decays: globs of the factors that decay where vectors do not (`optimizer.decay = ("matrices",)`).
      fast: names of the factors that LoRA+ gives a higher learning rate.
      inserts: `spec -> (prefix, infix)`, how many placeholder tokens the data insert before a context and after it.
      sharding: `{glob: PartitionSpec}` of factors that follow no axis of their weight (`Adapted.layout`).
      aliases: other names of the method in specs and configs.

    >>> import lora_jax as lj
    >>> traits = lj.Traits(decays=("**/{a,b}", "**/magnitude"), fast=("b",))
    """

    not_additive: str = ""
    at_rank: Callable[[Spec, int], Spec] | None = None
    decays: tuple[str, ...] = ("**/{a,b}",)
    fast: tuple[str, ...] = ("b",)
    inserts: Callable[[Spec], tuple[int, int]] | None = None
    sharding: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()


_MOST_CHARACTERS = 100_000  # of the globs of a spec together

_METHODS: dict[str, Callable[..., ParamTransform]] = {}
_TRAITS: dict[str, Traits] = {}


def register(name: str, factory: Callable[..., ParamTransform], traits: Traits | None = None) -> None:
    """Makes a method known to `from_spec` and to configs, with its traits, by this name: the "method" of its specs.

    `factory(selection, **options)`, the options JSON, returns the transform; without a selection where the spec has no
    "select".

    >>> import lora_jax as lj
    >>> lj.register("lora", lj.lora, lj.traits_of({"method": "lora"})[0][1])  # as lora's own file does
    """
    traits = traits or Traits()
    for known_as in (name, *traits.aliases):
        _METHODS[known_as], _TRAITS[known_as] = factory, traits


def traits_of(spec: Mapping[str, Any]) -> list[tuple[Spec, Traits]]:
    """`[(spec, traits)]` of a method, the default traits where it is not registered; of each part of a chain or a bank.

    >>> import lora_jax as lj
    >>> [(spec["method"], traits.fast) for spec, traits in traits_of({"method": "chain", "of": [{"method": "vera"}]})]
    [('vera', ())]
    """
    if "of" in spec:
        return [part for member in spec["of"] for part in traits_of(member)]
    return [(dict(spec), _TRAITS.get(spec.get("method", ""), Traits()))]


def inserted_tokens(spec: Mapping[str, Any]) -> tuple[int, int]:
    """How many prefix and infix tokens the data insert for a method; a ValueError where two parts of a chain do.

    >>> prefix = {"method": "prefix_layer", "prefix": 3, "infix": 1}
    >>> inserted_tokens({"method": "chain", "of": [{"method": "tune"}, prefix]})
    (3, 1)
    """
    counts = [n for part, traits in traits_of(spec) if traits.inserts and (n := traits.inserts(part)) != (0, 0)]
    if len(counts) > 1:
        raise ValueError("a chain has room for one prefix: the vectors of prefix_layer hide prefix_embedding's")
    return counts[0] if counts else (0, 0)


def method_shardings() -> dict[str, PartitionSpec]:
    """`{glob: PartitionSpec}` by the traits of all registered methods."""
    return {glob: spec for traits in _TRAITS.values() for glob, spec in traits.sharding.items()}


def from_spec(spec: dict[str, Any]) -> ParamTransform:
    """The transform of a spec: `{"method": name, "select": [globs], "axes", "layers", "exclude", **options}`.

    An entry "peft", which `interop.peft` makes, is kept and changes nothing.

    >>> import lora_jax as lj
    >>> lj.from_spec({"method": "lora", "select": ["**/kernel"], "rank": 4}).spec["rank"]
    4
    """
    if (count := _characters_of_globs(spec)) > _MOST_CHARACTERS:
        raise ValueError(f"the globs of the spec have {count:,} characters together, more than {_MOST_CHARACTERS:,}")
    options = dict(spec) if isinstance(spec, Mapping) else {"method": spec}
    name, peft = options.pop("method", None), options.pop("peft", None)
    if not isinstance(name, str) or name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(_METHODS))}."
        way_out = "import the module that registers one of your own, or run its file, --code=FILE.py"
        raise ValueError(f"the spec's method {name!r} is not known: {hint} Or {way_out}")
    selection = []
    if "select" in options:
        globs, exclude = strings(options.pop("select")), strings(options.pop("exclude", ()) or ())
        layers = None if (given := options.pop("layers", None)) is None else tuple(given)
        selection = [Selection(globs, options.pop("axes", None), layers, exclude, options.pop("ndim", None))]
    try:
        method = _METHODS[name](*selection, **options)
    except TypeError as error:
        raise ValueError(f"the spec of {name!r} does not fit: {error}") from None
    return method if peft is None else method._replace(spec=method.spec | {"peft": peft})


def _characters_of_globs(spec: Any) -> int:
    """The length of all strings in JSON that have to be matched, not just compared."""
    count, unread = 0, [spec]
    while unread:
        match unread.pop():
            case str(text):
                count += len(text) if "*" in text or "{" in text else 0
            case Mapping() as part:
                unread += [*part.keys(), *part.values()]
            case list() | tuple() as parts:
                unread += parts
    return count


register("chain", lambda of: chain(*map(from_spec, of)))
# Its functions cannot be pickled: a method is made again from its spec.
copyreg.pickle(ParamTransform, lambda method: (from_spec, (method.spec,)))
