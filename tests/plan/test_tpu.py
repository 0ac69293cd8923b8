"""GPT-3 175B by the TPU's own compiler, which needs no TPU; `.ci/run` installs it."""

import jax
import pytest

from configs import gpt3
from lora_jax.distributed import sharding
from lora_jax.planning import asking, collectives, topologies
from lora_jax.planning.asking import Layout
from lora_jax.runs import shapes

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu", reason="needs libtpu: pip install 'lora_jax[tpu]'")
topologies.prepare([])


@pytest.fixture(autouse=True)
def free_promotion():
    with jax.numpy_dtype_promotion("standard"):  # jax lowers products of mixed types so
        yield


def workload_of(name, batch):
    config = gpt3.get_config(name)
    config.data.length, config.data.batch_size = 2048, batch
    return shapes.workload(config)


def test_lora_fits_on_four_v5p_and_sends_no_gradient_of_a_frozen_weight():
    workload, layout = workload_of("lora_qv_r8", 4), Layout(1, 4, 1, True, 1)
    topology = topologies.named("v5p:2x2x1")
    step = asking.step(workload, layout, layout.mesh(topology))
    compiled = step.run.lower(step.state, step.params, step.batch).compile()
    assert compiled.memory_analysis().peak_memory_in_bytes < topology.limit
    text = compiled.as_text()
    transfers = collectives.of_program(text, dict(zip(sharding.AXES, layout[:3], strict=True)))
    summed = [one for one in transfers if one.kind in ("all-reduce", "reduce-scatter") and one.axes]
    assert summed
    factors = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.state.delta))
    # of factors and losses; one weight of the base, summed in each layer, would be 29 GB more
    assert sum(one.bytes * one.times for one in summed) <= 2 * factors + 1e6
    # sums that the compiler splits over a loop's steps, which send to the next device, have this name
    assert "body_rs" not in text


def test_what_does_not_fit_is_an_answer():
    answer = asking.ask(workload_of("full", 4), topologies.named("v5p:2x2x1"), Layout(1, 4, 1, True, 1))
    assert not answer["fits"] and answer["wanted"] > answer["limit"]
    assert "fits: no" in asking.shown(answer)
