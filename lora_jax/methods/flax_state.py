"""`flax.serialization` of a Delta: to_bytes, from_bytes, and Flax's TrainState with a delta as its params."""

import sys
from typing import Any

from lora_jax.core.transforms import Delta


def register_delta() -> None:
    """Makes Delta known to `flax.serialization` where that is imported; this imports nothing."""
    if (serialization := sys.modules.get("flax.serialization")) is None:
        return

    def to_state_dict(delta: Delta) -> dict[str, Any]:
        return {path: serialization.to_state_dict(factors) for path, factors in delta.items()}

    def from_state_dict(delta: Delta, state: dict[str, Any]) -> Delta:
        return Delta(serialization.from_state_dict(dict(delta), state))

    serialization.register_serialization_state(Delta, to_state_dict, from_state_dict, override=True)
