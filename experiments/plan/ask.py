"""The training step of a config, compiled for devices that are not at hand: what it holds, computes and sends."""

import dataclasses
import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import lora_jax as lj
from experiments import count
from lora_jax import training
from lora_jax.distributed import sharding
from lora_jax.models import encoder
from lora_jax.planning import collectives, flops
from lora_jax.planning.topologies import GIB, Topology
from lora_jax.runs import methods

VOCABULARY = 128  # a token table is filled up to a multiple of so many rows, so that it divides over a tensor axis


class Choice(NamedTuple):
    """How to lay a step out: what a search chooses."""

    data: int
    fsdp: int
    tensor: int
    remat: bool
    accumulate: int

    def mesh(self, topology: Topology) -> Mesh:
        return Mesh(np.array(topology.devices).reshape(self.data, self.fsdp, self.tensor), sharding.AXES)

    def __str__(self) -> str:
        remat = "remat" if self.remat else "no remat"
        axes = f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"
        return f"{axes}, {remat}, {self.accumulate} micro-batches"


class Step(NamedTuple):
    """A training step, with its arguments as ShapeDtypeStructs that say where they live."""

    run: Any
    state: training.State
    params: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    model: Any


def step(config: ConfigDict, choice: Choice, mesh: Mesh) -> Step:
    """The step that `training.prepare` would compile.

    Raises:
      ValueError: something does not divide over the mesh.
    """
    model = model_of(config, choice)
    method = lj.from_spec(methods.spec(config, model))
    placed = sharding.on_mesh(model, mesh)
    encodes = isinstance(model, encoder.Encoder)
    smoothing = config.get("label_smoothing", 0.0)
    objective = training.classifier(placed) if encodes else training.language_model(placed, smoothing)
    rate = training.schedule(config.optimizer, config.steps or 10_000)
    tx = training.optimizer(config.optimizer, rate)
    params = count.shapes(model)
    rules = sharding.rules_for(model, mesh)

    def start(params: Any) -> training.State:
        return training.new_state(method, tx, params, jax.random.key(config.seed), dtype=model.config.dtype)

    state = jax.eval_shape(start, params)
    adapted = jax.eval_shape(method.apply, params, state.delta)
    params = lj.without_tuned(params, state.delta)
    places = training.state_shardings(state, mesh, rules, adapted)
    shapes = _batch(config, choice, mesh, model)
    spread = NamedSharding(mesh, P(None, *sharding.batch_sharding(mesh).spec))
    return Step(
        jax.jit(training.make_step(objective, method, tx, rate), donate_argnums=0, out_shardings=places),
        _at(state, places),
        _at(params, sharding.shardings(params, mesh, rules)),
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread) for name, x in shapes.items()},
        model,
    )


def model_of(config: ConfigDict, choice: Choice) -> Any:
    """The config's model as the choice has it."""
    model = count.of_base(config)
    changes = {"remat": choice.remat, "vocab_size": -(-model.config.vocab_size // VOCABULARY) * VOCABULARY}
    return type(model)(dataclasses.replace(model.config, **changes))


def length_of(config: ConfigDict, model: Any) -> int:
    """The tokens of a text: the longest that the config takes."""
    most = model.config.max_length if isinstance(model, encoder.Encoder) else model.config.n_positions
    return min(config.data.length, most)


def texts(config: ConfigDict, choice: Choice) -> int:
    """The texts of a step: the config's, or with a batch_size of 0 one for each part of data and fsdp."""
    return config.data.batch_size or choice.data * choice.fsdp


def _batch(config: ConfigDict, choice: Choice, mesh: Mesh, model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """(micro-batches, rows, ...), each text as long as the config takes, each place labelled."""
    micro, shards, batch = choice.accumulate, mesh.shape["data"] * mesh.shape["fsdp"], texts(config, choice)
    if batch % (micro * shards):
        raise ValueError(f"a batch of {batch} does not divide into {micro} x {shards} rows")
    rows, length = batch // micro, length_of(config, model)
    whole = {"tokens": jnp.int32, "mask": jnp.bool_}
    one = (micro, rows)
    if isinstance(model, encoder.Encoder):
        kind = jnp.float32 if model.config.head == "regression" else jnp.int32
        found: dict[str, Any] = {
            name: ((*one, length), dtype) for name, dtype in (whole | {"token_types": jnp.int32}).items()
        }
        found |= {"labels": (one, kind), "weights": (one, jnp.float32)}
    else:
        every = whole | {"labelled": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}
        found = {name: ((*one, length), dtype) for name, dtype in every.items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in found.items()}


def _at(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places)


def held(tree: Any) -> int:
    """Bytes on each device of arrays that say where they live."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def ask(config: ConfigDict, topology: Topology, choice: Choice) -> dict[str, Any]:
    """The compiler's answer as JSON: `fits`, bytes on each device, FLOPs of the whole step, what is sent; or `why` not.

    Bytes are those of one device: `base` (frozen), `delta`, `optimizer`, `temporary` and `peak`; `wanted` is the peak,
    or what the compiler says it would be.
    """
    found: dict[str, Any] = {"topology": topology.name, "chips": topology.chips, **choice._asdict()}
    found["texts"] = texts(config, choice)
    try:
        one = step(config, choice, choice.mesh(topology))
        traced = one.run.trace(one.state, one.params, one.batch)
    except ValueError as error:
        return found | {"fits": False, "why": str(error)}
    found |= {"base": held(one.params), "delta": held(one.state.delta), "optimizer": held(one.state.optimizer)}
    found |= {"flops": flops.of_jaxpr(traced.jaxpr.jaxpr), "limit": topology.limit}
    begin = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return found | {"fits": False, "wanted": wanted(str(error)), "why": str(error).splitlines()[0][:300]}
    memory = compiled.memory_analysis()
    sums = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = (topology.asks and memory.peak_memory_in_bytes) or sums + memory.temp_size_in_bytes
    sent = collectives.of_program(compiled.as_text(), dict(zip(sharding.AXES, choice[:3], strict=True)))
    return found | {
        "fits": topology.asks or topology.limit is None or peak <= topology.limit,
        "temporary": memory.temp_size_in_bytes,
        "peak": peak,
        "wanted": peak,
        "collectives": collectives.summary(sent),
        "seconds": round(time.monotonic() - begin, 1),
    }


def products(config: ConfigDict, choice: Choice) -> int:
    """FLOPs of a step's matrix products, counted from its jaxpr; nothing is compiled."""
    whole = config.copy_and_resolve_references()
    whole.data.batch_size = texts(config, choice)
    one = step(whole, choice, sharding.make_mesh({}))
    return flops.of_jaxpr(one.run.trace(one.state, one.params, one.batch).jaxpr.jaxpr)


def wanted(message: str) -> int | None:
    """The bytes that a program needs in all, of the compiler's words where they are too many."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", message)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def shown(answer: dict[str, Any]) -> str:
    """An answer for reading."""
    choice = Choice(*(answer[name] for name in Choice._fields))
    lines = [f"{answer['topology']} ({answer['chips']} chips), {choice}, {answer['texts']} texts a step"]
    for name in ("base", "delta", "optimizer", "temporary", "peak"):
        if name in answer:
            lines.append(f"  {name:<10} {answer[name] / GIB:10.3f} GiB on each device")
    if "flops" in answer:
        lines.append(f"  {'products':<10} {answer['flops']:10.3e} FLOPs a step")
    for each in answer.get("collectives", ()):
        along, size = " and ".join(each["axes"]), each["bytes"] / GIB
        lines.append(f"  {each['kind']} over {along}: {each['times']:,} a step, {size:.3f} GiB sent by each device")
    lines.append(f"fits: {'yes' if answer['fits'] else 'no'}{room(answer)}")
    return "\n".join(lines)


def room(answer: dict[str, Any]) -> str:
    limit, need = answer.get("limit"), answer.get("wanted")
    if need is None:
        return f" ({answer['why']})" if "why" in answer else ""
    return f" ({need / GIB:.2f} GiB wanted" + (f" of {limit / GIB:.2f})" if limit else ")")
