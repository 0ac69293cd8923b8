"""Whether a config's training fits on devices that are not at hand: their compiler is asked, no weights are made.

    python -m experiments.plan --config=configs/gpt3.py:lora_qv_r8 --topology=v5e:4x8 --mesh=1,4,8
    python -m experiments.plan --config=configs/gpt3.py:full --topology=v5p --search --minutes=20
    python -m experiments.plan --config=configs/e2e.py:medium --topology=gpu:1x16GB

The first compiles the step of `lora_jax.training` for that slice of a TPU (which wants libtpu: pip install
"lora_jax[tpu]", but no TPU) and prints, for each device, the bytes of the frozen base, of what trains, of the
optimizer, of what a step needs besides, and its peak; the FLOPs of a step's matrix products, from its jaxpr; and what
devices send each other, by kind and axis of the mesh (on a ring; a program's loops are counted). Every text is as long
as the config takes (--config.data.length), and the token table is filled up to a multiple of 128 rows.

The layout is the config's: its mesh (config.mesh), or --mesh=data,fsdp,tensor in its place, with its remat and
micro-batches (--config.model.remat, --config.accumulate). The batch is the config's (--config.data.batch_size; 0: one
text for each part of data and fsdp). The first line printed says whose layout it is.

--search tries meshes, remat and micro-batches, those with the least memory by a closed form first, and on a family
without a size ("v5e") its slices from the smallest on: what fits first is the smallest slice, and of its layouts that
are asked in --minutes the one that sends least is printed. Answers are kept in --cache.

Topologies: v4, v5e, v5p, v6e, tpu7x with a size ("v5e:16x16"); cpu:8, so many devices without a limit, and gpu:1x16GB,
of so many bytes (10^9 each), both compiled for a CPU.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, train
from lora_jax.distributed import sharding
from lora_jax.planning import asking, search, topologies
from lora_jax.runs import shapes, tables

flags.DEFINE_string("topology", None, "What to compile for: v5e:4x8, cpu:8, gpu:1x16GB, or with --search v5e.")
flags.DEFINE_list("mesh", [], "data,fsdp,tensor: their product is the number of devices.")
flags.DEFINE_bool("search", False, "Tries meshes, remat, micro-batches, and slices.")
flags.DEFINE_float("minutes", 20, "How long to search.", lower_bound=0)
flags.DEFINE_string("cache", None, "A JSON file that keeps answers.")
flags.DEFINE_bool("shardings", False, "Prints where each array lies.")
flags.declare_key_flag("config")
flags.declare_key_flag("out")


def main() -> None:
    values, config = flags.FLAGS, train.CONFIG.value
    names = topologies.slices(values.topology)
    if len(names) > 1 and not values.search:
        raise ValueError(f"--topology={values.topology} is a family: give a size ({names[0]}), or --search")
    if values.search and values.mesh:
        raise ValueError("--search tries meshes: leave --mesh out")
    topologies.prepare(names)
    workload = shapes.workload(config)
    cache = search.Cache(Path(values.cache) if values.cache else None)
    if values.search:
        print("layout: found by --search")
        answer = search.smallest(workload, names, 60 * values.minutes, cache, lambda line: print(line, file=sys.stderr))
        if answer is None:
            return print(f"fits: no (no layout of {', '.join(names)} could hold it, or was asked in the time)")
    else:
        topology = topologies.named(names[0])
        layout = layout_of(config, topology, values.mesh)
        print(f"layout: {'of --mesh' if values.mesh else 'the mesh of the config'}, remat and accumulate of the config")
        if values.shardings:
            step = asking.step(workload, layout, layout.mesh(topology))
            tree = {"base": step.params, "delta": step.state.delta, "optimizer": step.state.optimizer}
            print(sharding.table(tree, jax.tree.map(lambda x: x.sharding, tree)))
        answer = cache.ask(workload, topology, layout)
    print(asking.shown(answer))
    if values.out:
        tables.write_json(values.out, answer)


def layout_of(config: ConfigDict, topology: topologies.Topology, mesh: Sequence[str]) -> asking.Layout:
    """The layout of a config, with that mesh in the place of its own where one is given."""
    options = {"remat": config.model.remat, "accumulate": config.accumulate}
    if mesh:
        return asking.layout_on(topology, mesh, **options)
    try:
        return asking.layout_on(topology, [str(config.mesh[axis]) for axis in sharding.AXES], **options)
    except ValueError as error:
        raise ValueError(f"the config's {error}: give --mesh=data,fsdp,tensor, or --search") from None


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)
