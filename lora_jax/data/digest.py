"""A digest of the data behind a schedule, by which a run resumes with the data that it began with."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.data.batches import Schedule


def digest(schedule: Schedule) -> dict[str, Any]:
    """`{"examples": the rows of an epoch, "content": hex}`, of what the batches are made from, as encoded: equal for
    every seed, batch size and path. No array is copied, also where it is mapped from a file.

    The content is the arguments of `collate` where that is a `functools.partial`, as `lora_jax.data.batches` makes it.
    Of another function only rows and shapes of the buckets are known: "buckets" in place of "content".
    """
    examples, collate = sum(int(np.count_nonzero(rows >= 0)) for rows in schedule.buckets), schedule.collate
    if isinstance(collate, functools.partial):
        return {"examples": examples, "content": digest_of((collate.args, collate.keywords))}
    return {"examples": examples, "buckets": digest_of((schedule.buckets, schedule.shapes))}


def digest_of(content: Any) -> str:
    """blake2b, as hex, of arrays, numbers and strings in dataclasses, mappings and sequences; of whatever else there is
    only the type counts."""
    state = hashlib.blake2b(digest_size=16)
    _update(state, content)
    return state.hexdigest()


def _update(state: Any, x: Any) -> None:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        x = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    if hasattr(x, "__array__") and np.asarray(x).dtype != object:
        array = np.asarray(x)
        state.update(f"{array.dtype.str} {array.shape} ".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    elif isinstance(x, Mapping | list | tuple):
        state.update(f"{type(x).__name__} {len(x)} ".encode())
        for part in (part for item in x.items() for part in item) if isinstance(x, Mapping) else x:
            _update(state, part)
    else:
        plain = isinstance(x, str | bytes | int | float | None)
        state.update(f"{x!r} ".encode() if plain else f"{type(x).__name__} ".encode())
