"""One process of tests/interop/test_big_memory.py: loads a folder onto a mesh, and writes it.

    python -m tests.helpers.big_process FOLDER OUT LAYOUT DTYPE [PROCESS PORT]

With PROCESS and PORT it is one of two, each with half of the mesh's four devices. Into OUT/PROCESS.json go
the bytes of resident memory that loading and saving needed at their peaks, those of its own shards, and of two
processes the base's identity.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from safetensors import safe_open

from lora_jax.distributed import sharding
from lora_jax.interop import hf
from lora_jax.runs import bases

LAYERS = "h/mlp/up/kernel", "h_0/mlp/up/kernel"


def resident(what: str) -> int:
    """VmRSS, or its peak VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise ValueError(f"no {what}")


def forget_peak() -> int:
    """Begins a new peak; what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def main(folder: str, out: str, layout: str, dtype: str, process: str = "0", port: str = "") -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2 if port else 4)
    if port:
        jax.distributed.initialize(f"localhost:{port}", 2, int(process), initialization_timeout=60)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
    model = hf.unread(folder)[0]
    rules = sharding.rules_for(model, mesh)

    def place(path, shape):
        return sharding.shardings({path: jax.ShapeDtypeStruct(shape, np.float32)}, mesh, rules)[path]

    jax.block_until_ready(jax.device_put(np.ones(4), place("wpe/embedding", (4, 4)).mesh.local_devices[0]))  # warm
    before = forget_peak()
    scan = layout == "scanned"
    model, params, _ = hf.load(folder, scan_layers=scan, dtype=dtype, place=place)
    report = {"loading": resident("VmHWM") - before}
    leaves = jax.tree.leaves(params)
    report["own"] = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)

    kernel = flatten_dict(params, sep="/")[LAYERS[0] if scan else LAYERS[1]]
    with safe_open(Path(folder) / "model.safetensors", "np") as file:
        stored = file.get_tensor("transformer.h.0.mlp.c_fc.weight")
    for shard in kernel.addressable_shards:
        index, part = (shard.index[1:], shard.data[0]) if scan else (shard.index, shard.data)
        assert np.array_equal(np.asarray(part), stored[index].astype(kernel.dtype))
    del stored, part, shard

    before = forget_peak()
    hf.save(Path(out) / "saved", model, params, shard_size=150_000_000)
    report["saving"] = resident("VmHWM") - before
    if port:
        del params, leaves, kernel
        fields = {"dtype": "float32", "scan_layers": scan, "remat": False}
        config = ConfigDict({"base": folder, "data": {"name": "e2e"}, "seed": 0, "model": fields})
        report["identity"] = bases.load(config, mesh=mesh).identity
    (Path(out) / f"{process}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
