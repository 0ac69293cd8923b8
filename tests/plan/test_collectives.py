"""What compiled programs send between eight devices, and that no gradient of a frozen weight is among it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.distributed import sharding
from lora_jax.planning import asking, collectives, topologies
from lora_jax.planning.asking import Layout
from tests.helpers.plan_config import tiny

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


WHOLE = P()


def compiled(fn, *specs, out=WHOLE, shape=(8, 8)):
    mesh = sharding.make_mesh(MESH)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    return jax.jit(fn, out_shardings=NamedSharding(mesh, out)).lower(*args).compile().as_text()


@pytest.mark.parametrize("axis", MESH)
def test_kind_axis_and_bytes_of_a_gather(axis):
    (row,) = collectives.summary(collectives.of_program(compiled(lambda x: x, P(axis)), MESH))
    # all 256 bytes arrive, half of them from the device itself
    assert row == {"kind": "all-gather", "axes": [axis], "times": 1, "bytes": 128}


@pytest.mark.parametrize("axes", [("data",), ("fsdp", "tensor"), ("data", "fsdp", "tensor"), ("data", "tensor")])
def test_kind_axes_and_bytes_of_a_sum(axes):
    (row,) = collectives.summary(collectives.of_program(compiled(lambda x: x.sum(0), P(axes)), MESH))
    n = math.prod(MESH[axis] for axis in axes)
    assert row == {"kind": "all-reduce", "axes": list(axes), "times": 1, "bytes": int(2 * (n - 1) / n * 32)}


def test_what_stands_in_a_loop_counts_each_time():
    def fn(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    text = compiled(fn, P("data", "tensor"), P("tensor", None), out=P("data", "tensor"))
    rows = collectives.summary(collectives.of_program(text, MESH))
    assert any(each["axes"] == ["tensor"] and each["times"] % 5 == 0 for each in rows)


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "fsdp")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1)", ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([8]) {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
    ],
)
def test_groups_of_devices_in_every_spelling(written, axes):
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %r = f32[4]{{0}} all-reduce(%p), {written}, to_apply=%add\n}}"
    (collective,) = collectives.of_program(text, MESH)
    assert collective.axes == axes


def test_pairs_of_devices():
    text = "ENTRY %main (p: f32[4]) -> f32[4] {\n  %r = f32[4]{0} collective-permute(%p), channel_id=1, PAIRS\n}"
    pairs = "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    (collective,) = collectives.of_program(text.replace("PAIRS", pairs), MESH)
    assert (collective.axes, collective.sent) == (("tensor",), 16)


def reduced(workload, axes=("data", "fsdp")):
    """The bytes that are summed over data and fsdp in a step, and the shapes of what is."""
    layout = Layout(2, 2, 2, True, 1)
    topology = topologies.Topology("cpu:8", jax.devices()[:8], 8, None, False)
    step = asking.step(workload, layout, layout.mesh(topology))
    text = step.run.lower(step.state, step.params, step.batch).compile().as_text()
    reductions = [
        one
        for one in collectives.of_program(text, MESH)
        if one.kind in ("all-reduce", "reduce-scatter") and set(one.axes) & set(axes)
    ]
    return sum(one.bytes * one.times for one in reductions), {shape for one in reductions for shape in one.shapes}


def test_no_gradient_of_a_frozen_weight_is_sent(tmp_path):
    workload = tiny(tmp_path)
    sent, shapes = reduced(workload)
    factors = 2 * 2 * (64 * 4 + 4 * 64) * 4  # two layers, q and v
    losses = 64
    # what is summed over data and then over fsdp is counted twice
    assert 0 < sent <= 2 * factors + losses
    assert not any(min(shape, default=0) >= 16 and len(shape) > 1 for shape in shapes)

    full, shapes = reduced(workload._replace(method=lj.tune(lj.select("**"))))
    assert full > 4 * sent and any(min(shape, default=0) >= 16 and len(shape) > 1 for shape in shapes)


def test_bytes_held_are_those_of_the_shards(tmp_path):
    workload = tiny(tmp_path)
    layout = Layout(1, 2, 4, True, 1)
    step = asking.step(workload, layout, layout.mesh(topologies.Topology("cpu:8", jax.devices()[:8], 8, None, False)))
    real = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), step.params))()
    placed = jax.device_put(real, jax.tree.map(lambda x: x.sharding, step.params))
    held = [np.sum([s.data.nbytes for s in x.addressable_shards]) / 8 for x in jax.tree.leaves(placed)]
    assert asking.bytes_per_device(step.params) == sum(held)
