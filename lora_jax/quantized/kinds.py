"""The kinds of codes: how a row of numbers becomes codes and scales, and the codes numbers again.

`int8` has one scale a row (Dettmers et al. 2022, arXiv 2208.07339, without its outliers). `nf4` has blocks of 64 along
the row, with the levels of QLoRA and scales that are quantized themselves (Dettmers et al. 2023, arXiv 2305.14314,
section 3; bitsandbytes' `quantize_4bit`). `Q4_0`, `Q4_1` and `Q8_0` are the blocks of 32 of GGUF files, as ggml has
them. Two codes of 4 bits share a byte, as they do there: in nf4 two that follow one another, the first one in the high
bits; in GGUF one of a block's first half, in the low bits, and one of the second.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Codes = dict[str, Array]

# The levels of nf4: quantiles of a normal distribution, as bitsandbytes has them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_SCALES = 256  # scales of nf4 that have one scale of their own


def dynamic_map() -> np.ndarray:
    """(256,) float32: the levels of nf4's scales, bitsandbytes' signed `create_dynamic_map`: in each decade from 1e-6
    to 1 twice as many as in the one below, and 0 and 1."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        levels += [*means, *-means]
    return np.sort(np.array(levels, np.float32))


class Kind(NamedTuple):
    """A kind of codes.

    Attributes:
      block: numbers along a row with one scale; 0: all of them.
      layout: of the arrays: R the axes of the rows, B blocks along a row (or numbers, where there are none), other
        letters their own; s stacked.
      decode: arrays -> (s.., R.., numbers) float32.
      encode: the inverse, nearest codes; None: from files alone.
    """

    block: int
    layout: dict[str, str]
    decode: Callable[[Codes], Array]
    encode: Callable[[Array, int], Codes] | None = None  # (rows of whole blocks, how many axes are stacked)


def _pairs(codes: Array, levels: Sequence[float], shifts: tuple[int, int]) -> Array:
    """(.., bytes) of two codes each -> (.., bytes, 2) of their levels, float32; `shifts` are the codes' places."""

    def looked_up(codes: Array) -> Array:  # no constant of the size of the weight, which a loop's compiler would keep
        table = [[levels[byte >> shift & 15] for shift in shifts] for byte in range(256)]
        return jnp.asarray(np.array(table, np.float32)).at[codes].get(mode="promise_in_bounds")

    def selected(codes: Array) -> Array:
        return jnp.stack([_selected(codes >> shift, levels) for shift in shifts], -1)

    return lax.platform_dependent(codes, tpu=selected, default=looked_up)


def _selected(codes: Array, levels: Sequence[float]) -> Array:
    """The levels of codes' last 4 bits by selections, as TPUs have it faster."""
    left = [jnp.float32(level) for level in levels]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        left = [jnp.where(is_set, high, low) for low, high in zip(left[::2], left[1::2], strict=True)]
    return left[0]


def _joined(blocks: Array) -> Array:
    """(.., blocks, numbers of a block) -> (.., numbers)."""
    return blocks.reshape(*blocks.shape[:-2], -1)


def _wide(scale: Array) -> Array:
    return scale.astype(jnp.float32)[..., None]


def _int8(codes: Codes) -> Array:
    return codes["codes"].astype(jnp.float32) * _wide(codes["scale"])


def _to_int8(x: Array, stacked: int) -> Codes:
    scale = jnp.max(jnp.abs(x), -1) * np.float32(1 / 127)
    codes = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return {"codes": codes.astype(jnp.int8), "scale": scale}


def _nf4(codes: Codes) -> Array:
    small, nested = codes["scale"], codes["nested"]
    lead = nested.shape[:-1]
    levels = jnp.asarray(dynamic_map())[small.reshape(*lead, -1)]
    if -(-levels.shape[-1] // _SCALES) != nested.shape[-1]:
        raise ValueError(f"a part of an nf4 weight, {small.shape} of its scales: theirs are of the whole; use int8")
    each = jnp.repeat(nested, _SCALES, -1, total_repeat_length=nested.shape[-1] * _SCALES)[..., : levels.shape[-1]]
    scale = (levels * each + codes["offset"][..., None]).reshape(small.shape)
    return _joined(_pairs(codes["codes"], NF4, (4, 0)).reshape(*scale.shape, -1) * scale[..., None])


def _to_nf4(x: Array, stacked: int) -> Codes:
    blocks = x.reshape(*x.shape[:-1], -1, 64)
    largest = jnp.max(jnp.abs(blocks), -1)
    normal = blocks / jnp.where(largest == 0, 1, largest)[..., None]
    codes = sum((normal > middle).astype(jnp.uint8) for middle in _middles(np.array(NF4, np.float32)))
    flat = largest.reshape(*x.shape[:stacked], -1)
    offset = jnp.mean(flat, -1)
    rest = flat - offset[..., None]
    short = -rest.shape[-1] % _SCALES
    groups = jnp.pad(rest, [(0, 0)] * stacked + [(0, short)]).reshape(*rest.shape[:-1], -1, _SCALES)
    nested = jnp.max(jnp.abs(groups), -1)
    normal = groups / jnp.where(nested == 0, 1, nested)[..., None]
    small = jnp.searchsorted(jnp.asarray(_middles(dynamic_map())), normal).astype(jnp.uint8)
    small = small.reshape(*rest.shape[:-1], -1)[..., : rest.shape[-1]].reshape(largest.shape)
    return {"codes": codes[..., ::2] << 4 | codes[..., 1::2], "scale": small, "nested": nested, "offset": offset}


def _middles(levels: np.ndarray) -> np.ndarray:
    return (levels[:-1] + levels[1:]) / 2


def _by_halves(codes: Array, levels: Sequence[float]) -> Array:
    """The levels of blocks in which each byte has a code of the first half, its last bits, and one of the second."""
    levels_of_bytes = _pairs(codes, levels, (0, 4)).swapaxes(-1, -2)
    return levels_of_bytes.reshape(*codes.shape[:-1], -1)


def _q4_0(codes: Codes) -> Array:
    return _joined(_by_halves(codes["codes"], range(-8, 8)) * _wide(codes["scale"]))


def _q4_1(codes: Codes) -> Array:
    return _joined(_by_halves(codes["codes"], range(16)) * _wide(codes["scale"]) + _wide(codes["minimum"]))


def _q8_0(codes: Codes) -> Array:
    return _joined(codes["codes"].astype(jnp.float32) * _wide(codes["scale"]))


_BLOCKS = {"codes": "sRBb", "scale": "sRB"}
KINDS = {
    "int8": Kind(0, {"codes": "sRB", "scale": "sR"}, _int8, _to_int8),
    "nf4": Kind(64, _BLOCKS | {"nested": "sn", "offset": "s"}, _nf4, _to_nf4),
    "Q4_0": Kind(32, _BLOCKS, _q4_0),
    "Q4_1": Kind(32, _BLOCKS | {"minimum": "sRB"}, _q4_1),
    "Q8_0": Kind(32, _BLOCKS, _q8_0),
}
# GGUF's types that are kept as they are -> the float16 numbers at the head of a block.
GGUF = {"Q4_0": ("scale",), "Q4_1": ("scale", "minimum"), "Q8_0": ("scale",)}


def gguf_blocks(name: str, raw: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a matrix of a GGUF file: `raw` (rows, bytes of a row) uint8, of the type of that name. No bit is
    lost.

    Raises:
      ValueError: a type that is not kept as it is, or rows that are not whole blocks.
    """
    if name not in GGUF:
        raise ValueError(f"GGUF's {name} is not kept as it is; {', '.join(GGUF)} are: dequantize it")
    size = 2 * len(GGUF[name]) + (32 if name == "Q8_0" else 16)
    if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] % size:
        raise ValueError(f"rows of {raw.shape} {raw.dtype} are not whole {name} blocks of {size} bytes")
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, size)
    parts = {
        field: blocks[..., 2 * n : 2 * n + 2].copy().view(np.float16)[..., 0] for n, field in enumerate(GGUF[name])
    }
    codes = np.ascontiguousarray(blocks[..., 2 * len(GGUF[name]) :])
    return {"codes": codes.view(np.int8) if name == "Q8_0" else codes, **parts}
