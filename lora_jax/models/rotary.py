"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), with the scalings for longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.core.extras import extra

with extra("train"):
    from jaxtyping import Float, Int

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
Angles = tuple[Float[Array, "batch 1 length half"], Float[Array, "batch 1 length half"]]


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Which frequencies turn the pairs of features of a head; fields are named as in Hugging Face's `rope_parameters`.

    Attributes:
      rope_theta: the base of the wavelengths.
      rope_type: "default"; "linear" (all frequencies over `factor`); "dynamic" (a larger base for longer inputs, NTK);
        "llama3" (Llama 3.1: low frequencies over `factor`); "yarn" (Peng et al. 2023, arXiv 2309.00071).
      original_max_position_embeddings: the context before it was extended; None: the model's.
      attention_factor: of yarn, what cosines and sines are multiplied with; None: 0.1 ln(factor) + 1.
      mscale, mscale_all_dim: of yarn, another way to say the same.
      truncate: of yarn, whether the range of the ramp is rounded to whole features.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(f"rope_type {self.rope_type!r} is none of {', '.join(KINDS)}")
        numbers = {name: value for name, value in dataclasses.asdict(self).items() if type(value) in (int, float)}
        if wrong := [f"{name}={value}" for name, value in numbers.items() if not 0 < value < math.inf]:
            raise ValueError(f"rotary embedding: {', '.join(wrong)}: more than 0, and finite")
        if self.rope_theta == 1 or self.low_freq_factor == self.high_freq_factor or self.beta_fast == self.beta_slow:
            raise ValueError(f"rotary embedding: {self} has no range of frequencies")

    def angles(self, positions: Int[Array, "batch length"], size: int, most: int) -> Angles:
        """Cosines and sines, float32 (batch, 1, length, size / 2), for heads of `size` features of a model with `most`
        positions."""
        if self.rope_type == "dynamic":
            length = jnp.maximum(positions.max() + 1, most).astype(jnp.float32)
            theta = self.rope_theta * (self.factor * length / most - (self.factor - 1)) ** (size / (size - 2))
            frequencies = 1 / theta ** jnp.asarray(np.arange(0, size, 2) / size, jnp.float32)
        else:
            frequencies = jnp.asarray(self._frequencies(size, most), jnp.float32)
        phases = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None]
        cos, sin = jnp.cos(phases), jnp.sin(phases)
        # XLA's CPU compiler computes cosines, cheap in its eyes, anew in every layer and head; a division it keeps.
        length = jnp.sqrt(cos * cos + sin * sin) / self._attention_factor()
        return cos / length, sin / length

    def _frequencies(self, size: int, most: int) -> np.ndarray:
        """(size / 2,) float64, in radians a token."""
        frequencies = 1 / self.rope_theta ** (np.arange(0, size, 2) / size)
        if self.rope_type == "linear":
            return frequencies / self.factor
        if self.rope_type == "llama3":
            cycles = self._original(most) * frequencies / (2 * np.pi)  # within the original context
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((cycles - low) / (high - low), 0, 1)  # 0: slow ones, divided; 1: fast ones, as they are
            return frequencies * (kept + (1 - kept) / self.factor)
        if self.rope_type == "yarn":
            low, high = (self._feature_of(beta, size, most) for beta in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, size - 1)
            divided = np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
            return frequencies * (1 - divided + divided / self.factor)
        return frequencies

    def _original(self, most: int) -> int:
        return self.original_max_position_embeddings or most

    def _feature_of(self, rotations: float, size: int, most: int) -> float:
        """The pair of features that turns so often within the original context."""
        return size * math.log(self._original(most) / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))

    def _attention_factor(self) -> float:
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


def rotated(x: Float[Array, "batch heads length size"], angles: Angles) -> Float[Array, "batch heads length size"]:
    """Each pair of features i and i + size / 2 turned by its angle; computed in float32 or wider."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    cos, sin = (part.astype(wide) for part in angles)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
