"""`flax.serialization` of a Delta: to_bytes and from_bytes, and Flax's TrainState with a delta as its params."""

from typing import Any

from flax import serialization

from lora_jax.core.transforms import Delta


def _to_state_dict(delta: Delta) -> dict[str, Any]:
    return {path: serialization.to_state_dict(factors) for path, factors in delta.items()}


def _from_state_dict(delta: Delta, state: dict[str, Any]) -> Delta:
    return Delta(serialization.from_state_dict(dict(delta), state))


serialization.register_serialization_state(Delta, _to_state_dict, _from_state_dict, override=True)
