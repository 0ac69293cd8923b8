"""What a base in 8 and 4 bits costs and saves: bytes, error, the time of a step of LoRA (docs/how_to/quantized.md).

python -m experiments.quantized [--layers=4] [--width=768] [--tokens=512]
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import lora_jax as lj

_LAYERS = flags.DEFINE_integer("layers", 4, "MLPs with residuals, one after the other.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 768, "Features between them; inside them are four times as many.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens of a step.", lower_bound=1)
KERNELS = lj.select("**/kernel", axes="sio")
KINDS = {"float32": (jnp.float32, None), "bfloat16": (jnp.bfloat16, None), "int8": (None, 8), "nf4": (None, 4)}


def tower(params: Any, x: jax.Array) -> jax.Array:
    """MLPs with residuals, by a scan over stacked layers; computed in float32."""

    def layer(x: jax.Array, kernels: Any) -> tuple[jax.Array, None]:
        up, down = (kernels[name]["kernel"].astype(jnp.float32) for name in ("up", "down"))
        return x + jax.nn.gelu(x @ up) @ down, None

    return jax.lax.scan(layer, x, params)[0]


def measured(params: Any, x: jax.Array) -> tuple[float, Any]:
    """Seconds of a step, the median of nine, and the tower's output on the base."""
    method = lj.lora(KERNELS, rank=8)
    delta = method.init(jax.random.key(1), params)
    forward = lj.lift(tower)
    step = jax.jit(jax.value_and_grad(lambda d, p: jnp.mean(forward(method.apply(p, d), x) ** 2)))
    jax.block_until_ready(step(delta, params))
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(step(delta, params))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), jax.jit(forward)(params, x)


def main(_: Any) -> None:
    layers, width = _LAYERS.value, _WIDTH.value
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}
    params = {
        name: {"kernel": jax.random.normal(key, shape) / math.sqrt(shape[1])}
        for (name, shape), key in zip(shapes.items(), keys, strict=False)
    }
    x = jax.random.normal(keys[2], (_TOKENS.value, width))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    print("base        bytes a number  of bfloat16  error of a weight  error of the output  step, ms")
    want = None
    for name, (dtype, bits) in KINDS.items():
        kept = lj.quantize(params, KERNELS, bits=bits) if bits else jax.tree.map(lambda w, d=dtype: w.astype(d), params)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) / numbers
        seconds, out = measured(kept, x)
        want = out if want is None else want
        up = lj.merge(kept, jnp.float32)["up"]["kernel"].astype(jnp.float32)
        of_weight, of_output = (
            float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))
            for got, exact in ((up.ravel(), params["up"]["kernel"].ravel()), (out.ravel(), want.ravel()))
        )
        print(f"{name:10}  {size:14.3f}  {size / 2:11.3f}  {of_weight:17.4%}  {of_output:19.4%}  {seconds * 1e3:8.1f}")


if __name__ == "__main__":
    app.run(main)
