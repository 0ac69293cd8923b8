"""Which numbers an option takes, and the error that names what it does not take."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between bounds, never a bool, NaN or infinity; Python's or numpy's. Arrays of JAX, which may be traced,
    pass unseen."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    whole: bool = False
    optional: bool = False  # None too
    other: float = math.nan  # taken besides

    def __call__(self, name: str, value: Any) -> Any:
        """The number as an int or a float of Python; of a mapping each of its numbers.

        Raises:
          ValueError: it is none of this range.
        """
        if isinstance(value, Mapping):
            return {key: self(f"{name}[{key!r}]", number) for key, number in value.items()}
        if isinstance(value, jax.Array) or (value is None and self.optional):
            return value
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, kind) and not isinstance(value, bool):
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            inside = self.least <= number <= self.most and self.above < number < self.below
            if (isinstance(number, int) or math.isfinite(number)) and (inside or number == self.other):
                return number
        raise ValueError(f"{name}={value!r} must be {self}")

    def __str__(self) -> str:
        bounds = {"from": self.least, "above": self.above, "to": self.most, "to below": self.below}
        shown = "".join(f" {word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
        ends = [", or None"] * self.optional + [f", or {self.other}"] * math.isfinite(self.other)
        return f"a {'whole ' if self.whole else ''}number{shown}{''.join(ends)}"


COUNT = Range(least=1, whole=True)
SHARE = Range(least=0, most=1)
PROBABILITY = Range(least=0, below=1)
FINITE = Range()
