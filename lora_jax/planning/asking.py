"""The compiler's answer on a training step for devices that are not at hand: memory, FLOPs, collectives."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import training
from lora_jax.distributed import sharding
from lora_jax.models.family import family_of
from lora_jax.planning import collectives, flops
from lora_jax.planning.topologies import GIB, Topology
from lora_jax.training.optimizers import trained

VOCABULARY_MULTIPLE = 128  # rows of the token table are padded to a multiple, which divides over a tensor axis

Answer = dict[str, Any]  # JSON, see `ask`


class Workload(NamedTuple):
    """A model, what of it trains, and the batch of a step."""

    model: Any  # one of `lora_jax.models`; the layout decides on its `remat`
    method: lj.ParamTransform  # whose delta trains
    optimizer: Any  # the options that `training.optimizer` and `training.schedule` take
    batch_size: int  # examples of a step, of all micro-batches; 0: one for each part of the axes data and fsdp
    length: int  # tokens of each example
    label_smoothing: float = 0.0
    params: Any = None  # shapes of the base, quantized or not; None: the model's own parameters


class Layout(NamedTuple):
    """The size of each mesh axis, rematerialization, and the number of micro-batches of a step."""

    data: int
    fsdp: int
    tensor: int
    remat: bool
    accumulate: int

    def mesh(self, topology: Topology) -> Mesh:
        return Mesh(np.array(topology.devices).reshape(self[:3]), sharding.AXES)

    def examples(self, workload: Workload) -> int:
        """Examples of a step."""
        return workload.batch_size or self.data * self.fsdp

    def __str__(self) -> str:
        axes = f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"
        return f"{axes}, {'remat' if self.remat else 'no remat'}, {self.accumulate} micro-batches"


class Step(NamedTuple):
    """A jitted training step and its arguments, as ShapeDtypeStructs with shardings."""

    run: Any
    state: training.State
    params: Any
    batch: dict[str, jax.ShapeDtypeStruct]

    def trace(self) -> Any:
        return self.run.trace(self.state, self.params, self.batch)


@functools.cache
def param_shapes(model: Any) -> Any:
    """The parameters of one of our models, as ShapeDtypeStructs."""
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def padded(model: Any) -> Any:
    """The model with its token table padded to a multiple of VOCABULARY_MULTIPLE rows."""
    rows = -(-model.config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return type(model)(dataclasses.replace(model.config, vocab_size=rows))


def layout_on(topology: Topology, mesh: Sequence[str], *, remat: bool, accumulate: int) -> Layout:
    """The layout of a mesh written as data, fsdp, tensor; a ValueError unless these are three numbers whose product is
    the topology's number of devices."""
    devices, written = len(topology.devices), ",".join(mesh)
    if len(mesh) != 3 or not all(size.isdecimal() for size in mesh):
        raise ValueError(f"mesh={written}: three numbers, data,fsdp,tensor")
    data, fsdp, tensor = map(int, mesh)
    if data * fsdp * tensor != devices:
        raise ValueError(f"mesh={written} has {data * fsdp * tensor} devices, {topology.name} has {devices}")
    return Layout(data, fsdp, tensor, remat, accumulate)


def step(workload: Workload, layout: Layout, mesh: Mesh) -> Step:
    """The step that `training.prepare` would compile; a ValueError where an axis of an array, or the batch, does not
    divide over the mesh."""
    method = workload.method
    model = type(workload.model)(dataclasses.replace(workload.model.config, remat=layout.remat))
    on_mesh = sharding.on_mesh(model, mesh)
    if family_of(model).output_head:
        objective = training.language_model(on_mesh, workload.label_smoothing)
    else:
        objective = training.classifier(on_mesh)
    rate = training.schedule(workload.optimizer, 10_000)
    tx = training.optimizer(workload.optimizer, rate, spec=method.spec)
    params = param_shapes(model) if workload.params is None else workload.params
    placement = sharding.Placement.of(model, mesh)

    def start(params: Any) -> training.State:
        return training.new_state(method, tx, params, jax.random.key(0), dtype=model.config.dtype)

    state = jax.eval_shape(start, params)
    adapted = jax.eval_shape(method.apply, params, state.delta)
    params = lj.without_tuned(params, state.delta)
    of_state = training.state_shardings(state, placement, adapted)
    batch = _batch(workload, layout)
    over_rows = NamedSharding(mesh, P(None, *sharding.batch_sharding(mesh).spec))
    run = training.make_step(objective, trained(workload.optimizer, method), tx, rate)
    return Step(
        jax.jit(run, donate_argnums=0, out_shardings=of_state),
        _with_shardings(state, of_state),
        _with_shardings(params, placement.shardings(params)),
        _with_shardings(batch, dict.fromkeys(batch, over_rows)),
    )


def _batch(workload: Workload, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays (micro-batches, rows, ...); of a language model every position has a target."""
    model, shards, size = workload.model, layout.data * layout.fsdp, layout.examples(workload)
    if size % (layout.accumulate * shards):
        raise ValueError(f"a batch of {size} does not divide into {layout.accumulate} x {shards} rows")
    rows = (layout.accumulate, size // layout.accumulate)
    dtypes: dict[str, Any] = {"tokens": jnp.int32, "mask": jnp.bool_}
    of_rows: dict[str, Any] = {}  # one a row; the others are one a token
    if family_of(model).output_head:
        dtypes |= {"labelled": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}
    else:
        dtypes |= {"token_types": jnp.int32}
        target = jnp.float32 if model.config.head == "regression" else jnp.int32
        of_rows = {"labels": target, "weights": jnp.float32}
    arrays = {name: jax.ShapeDtypeStruct((*rows, workload.length), dtype) for name, dtype in dtypes.items()}
    return arrays | {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in of_rows.items()}


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """Bytes on each device of arrays, or ShapeDtypeStructs, that have a sharding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def ask(workload: Workload, topology: Topology, layout: Layout) -> Answer:
    """The compiler's answer as JSON: `fits`, bytes on each device, FLOPs of the whole step, collectives; where the step
    does not fit or cannot be laid out so, `why`.

    Bytes are those of one device: `base` (frozen), `delta`, `optimizer`, `temporary` and `peak`; `wanted` is the peak,
    or, where the compiler refuses, the bytes that its message names.
    """
    answer: Answer = {"topology": topology.name, "chips": topology.chips, **layout._asdict()}
    answer["texts"] = layout.examples(workload)
    try:
        one = step(workload, layout, layout.mesh(topology))
        traced = one.trace()
    except ValueError as error:
        return answer | {"fits": False, "why": str(error)}
    parts = {"base": one.params, "delta": one.state.delta, "optimizer": one.state.optimizer}
    answer |= {name: bytes_per_device(tree) for name, tree in parts.items()}
    answer |= {"flops": flops.of_jaxpr(traced.jaxpr.jaxpr), "limit": topology.limit}
    begin = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return answer | {"fits": False, "wanted": bytes_wanted(str(error)), "why": str(error).splitlines()[0][:300]}
    memory = compiled.memory_analysis()
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = (topology.asks and memory.peak_memory_in_bytes) or arrays + memory.temp_size_in_bytes
    fits = topology.asks or topology.limit is None or peak <= topology.limit
    answer |= {"fits": fits, "temporary": memory.temp_size_in_bytes, "peak": peak, "wanted": peak}
    sent = collectives.of_program(compiled.as_text(), dict(zip(sharding.AXES, layout[:3], strict=True)))
    return answer | {"collectives": collectives.summary(sent), "seconds": round(time.monotonic() - begin, 1)}


def step_flops(workload: Workload, layout: Layout) -> int:
    """FLOPs of a step's matrix products, counted from its jaxpr; nothing is compiled."""
    workload = workload._replace(batch_size=layout.examples(workload))
    one = step(workload, layout._replace(data=1, fsdp=1, tensor=1), sharding.make_mesh({}))
    return flops.of_jaxpr(one.trace().jaxpr.jaxpr)


def bytes_wanted(message: str) -> int | None:
    """The bytes that a program needs, from the TPU compiler's message that it does not fit."""
    needs = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", message)
    return int(float(needs[1]) * 1024 ** ("KMGT".index(needs[2]) + 1)) if needs else None


def shown(answer: Answer) -> str:
    """An answer as text."""
    layout = Layout(*(answer[name] for name in Layout._fields))
    lines = [f"{answer['topology']} ({answer['chips']} chips), {layout}, {answer['texts']} texts a step"]
    parts = [name for name in ("base", "delta", "optimizer", "temporary", "peak") if name in answer]
    lines += [f"  {name:<10} {answer[name] / GIB:10.3f} GiB on each device" for name in parts]
    if "flops" in answer:
        lines.append(f"  {'products':<10} {answer['flops']:10.3e} FLOPs a step")
    for sent in answer.get("collectives", ()):
        along, size = " and ".join(sent["axes"]), sent["bytes"] / GIB
        lines.append(f"  {sent['kind']} over {along}: {sent['times']:,} a step, {size:.3f} GiB sent by each device")
    return "\n".join([*lines, f"fits: {'yes' if answer['fits'] else 'no'}{needed(answer)}"])


def needed(answer: Answer) -> str:
    """What an answer needs of the device's memory, in parentheses, or why it does not fit; "" if neither is known."""
    limit, need = answer.get("limit"), answer.get("wanted")
    if need is None:
        return f" ({answer['why']})" if "why" in answer else ""
    return f" ({need / GIB:.2f} GiB wanted" + (f" of {limit / GIB:.2f})" if limit else ")")
