"""What the sharding rules of our models have in common: layers named `h_0`, `h_1`, ... or stacked as `h`.

Kernels shard one axis over the mesh's `fsdp` and the other over `tensor`: query, key, value and up end in `tensor`, out
and down begin with it (Shoeybi et al. 2019, Megatron-LM, section 3).
"""

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

FEATURES = P(None, ("fsdp", "tensor"))  # of a table (rows, features)

_BLOCK = {
    "attn/{query,key,value}/kernel": P("fsdp", "tensor"),
    "attn/{query,key,value}/bias": P("tensor"),
    "attn/out/kernel": P("tensor", "fsdp"),
    "mlp/up/kernel": P("fsdp", "tensor"),
    "mlp/up/bias": P("tensor"),
    "mlp/down/kernel": P("tensor", "fsdp"),
}
# The layers' rules; biases and norms after a row-parallel product are replicated.
LAYERS = (
    {f"**/h_*/{glob}": spec for glob, spec in _BLOCK.items()}
    | {f"**/h/{glob}": P(None, *spec) for glob, spec in _BLOCK.items()}
    | dict.fromkeys(("**/{ln_*,norm}/{scale,bias}", "**/{out,down}/bias"), P())
)


def table(rows: int, mesh: Mesh) -> P:
    """The spec of an embedding (rows, features): rows over `tensor` where they divide (a padded vocabulary; GPT-2's
    50,257 does not), else its features."""
    return P("tensor", "fsdp") if rows % mesh.shape["tensor"] == 0 else FEATURES
