"""lora_jax.planning and its command: answers, searches, their cache, and what a user may get wrong."""

import json

import jax
import pytest

from configs import llama
from lora_jax.planning import asking, search, topologies
from lora_jax.planning.asking import Layout
from lora_jax.runs import shapes
from tests.helpers.cli import run_entry
from tests.helpers.plan_config import tiny


def cpu(count, limit=None):
    return topologies.Topology(f"cpu:{count}", jax.devices()[:count], count, limit, False)


def test_an_answer_has_bytes_flops_and_collectives(tmp_path):
    workload = tiny(tmp_path)
    answer = asking.ask(workload, cpu(8), Layout(1, 4, 2, True, 1))
    assert answer["fits"] and answer["peak"] > answer["base"] + answer["delta"] + answer["optimizer"]
    assert answer["optimizer"] == pytest.approx(2 * answer["delta"], abs=64)  # Adam's moments, and counters
    assert {each["kind"] for each in answer["collectives"]} >= {"all-gather", "all-reduce"}
    assert "fits: yes" in asking.shown(answer)
    # the same products on one device
    assert asking.ask(workload, cpu(1), Layout(1, 1, 1, True, 1))["flops"] == answer["flops"]


def test_too_small_a_device_is_an_answer(tmp_path):
    answer = asking.ask(tiny(tmp_path), cpu(1, 1e5), Layout(1, 1, 1, True, 1))
    assert not answer["fits"] and answer["wanted"] > 1e5
    assert "fits: no" in asking.shown(answer)


def test_what_does_not_divide_is_an_answer(tmp_path):
    answer = asking.ask(tiny(tmp_path), cpu(3), Layout(1, 1, 3, True, 1))
    assert not answer["fits"] and "does not divide" in answer["why"] and "fits: no" in asking.shown(answer)


def test_what_a_compiler_says_it_wants():
    message = "RESOURCE_EXHAUSTED: the total memory required (107.17G) exceeds available HBM (95.74G)."
    assert asking.bytes_wanted(message) == int(107.17 * 2**30)
    assert asking.bytes_wanted("INTERNAL: else") is None


def test_a_search_finds_the_smallest_and_asks_no_answer_twice(tmp_path, monkeypatch):
    workload, layouts, messages = tiny(tmp_path), [], []
    limit = search.ordered(workload, cpu(2))[0].estimate
    assert search.ordered(workload, cpu(1))[0].estimate > limit  # by the closed form two devices hold it, one does not

    def compiler(workload, topology, layout):
        layouts.append(layout)
        need = search.size_of(workload, topology, layout).estimate
        sent = [{"kind": "all-gather", "axes": ["tensor"], "times": 1, "bytes": 1000 // layout.tensor}]
        answer = {"topology": topology.name, "chips": topology.chips, "texts": 8, "collectives": sent}
        return answer | layout._asdict() | {"fits": need <= 2 * limit and topology.chips > 1, "wanted": need}

    monkeypatch.setattr(asking, "ask", compiler)
    monkeypatch.setattr(topologies, "named", lambda name: cpu(int(name[4:]), 2 * limit))
    cache = search.Cache(tmp_path / "answers.json")
    answer = search.smallest(workload, ["cpu:1", "cpu:2"], 60, cache, messages.append)
    assert answer["chips"] == 2 and answer["fits"]
    assert answer["tensor"] == 2  # which sends less, though it does not hold least
    before = len(layouts)
    assert search.smallest(workload, ["cpu:1", "cpu:2"], 60, search.Cache(cache.file), messages.append) == answer
    assert len(layouts) == before == len(set(messages))
    assert search.smallest(workload, ["cpu:1", "cpu:2"], 0, search.Cache(None), messages.append) is None
    assert "the time was up" in messages[-1]


def test_layouts_come_in_the_order_of_their_memory(tmp_path):
    workload = tiny(tmp_path)
    ordered = search.ordered(workload, cpu(8))
    assert [one.estimate for one in ordered] == sorted(one.estimate for one in ordered)
    for _, held, layout in ordered:
        assert 0 < held < ordered[-1].estimate
        assert layout.data * layout.fsdp * layout.tensor == 8
        assert 8 % (layout.accumulate * layout.data * layout.fsdp) == 0


def plan(*args):
    return run_entry("plan", *args)


def test_the_command(tmp_path):
    tiny(tmp_path)
    config = ["--config=configs/e2e.py:small", f"--config.base={tmp_path}", "--config.model.scan_layers=true"]
    config += ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    done = plan(*config, "--topology=cpu:4", "--shardings", f"--out={tmp_path / 'answer.json'}")
    assert done.returncode == 0, done.stderr
    assert "layout: the mesh of the config" in done.stdout and "fsdp 2 x tensor 2, no remat" in done.stdout
    assert "fits: yes" in done.stdout and "bytes per device" in done.stdout
    assert "delta/h/attn/query/kernel/a" in done.stdout
    assert json.loads((tmp_path / "answer.json").read_text())["chips"] == 4


def test_without_a_mesh_the_layout_that_holds_least(tmp_path):
    workload, topology = tiny(tmp_path), cpu(8)
    layout = search.least(workload, topology)
    assert layout == search.ordered(workload, topology)[0].layout and layout.remat
    with pytest.raises(ValueError, match="no layout of 8 devices divides a batch of 9"):
        search.least(workload._replace(batch_size=9), topology)


def test_a_mesh_as_it_is_written():
    layout = asking.layout_on(cpu(8), ["2", "2", "2"], remat=True, accumulate=3)
    assert layout == Layout(2, 2, 2, True, 3)


@pytest.mark.parametrize(("mesh", "text"), [("1,2", "three numbers"), ("1,2,x", "three numbers"), ("1,2,2", "has 4")])
def test_a_bad_mesh(mesh, text):
    with pytest.raises(ValueError, match=text):
        asking.layout_on(cpu(8), mesh.split(","), remat=True, accumulate=1)


@pytest.mark.parametrize("name", ["v9:2x2", "gpu:16GB", "cpu:x", "v5e:2", "v5e:axb"])
def test_a_bad_topology(name):
    with pytest.raises(ValueError, match=f"no topology '{name}'"):
        topologies.named(name)


def test_bad_input_is_one_error():
    done = plan("--config=configs/gpt3.py", "--topology=v5e")
    assert done.returncode == 1 and done.stderr.startswith("error: --topology=v5e is a family")
    done = plan("--config=configs/e2e.py:small", "--topology=cpu:4")
    problem = "the config's mesh=1,1,1 has 1 devices, cpu:4 has 4: give --mesh=data,fsdp,tensor, or --search"
    assert done.returncode == 1 and done.stderr == f"error: {problem}\n"


@pytest.mark.parametrize(("size", "parameters"), [("8b", 8_030_261_248), ("70b", 70_553_706_496)])
def test_a_llama_by_its_sizes_and_a_base_in_4_bits(size, parameters):
    """As many parameters as the models on the Hub; layers of nf4 have 4.13 bits a number, table and head stay."""
    config, layout = llama.get_config(size), Layout(1, 1, 8, True, 1)
    assert shapes.count(config).report.total == parameters
    held = {}
    for bits in (None, "4"):
        config.model.base_bits = bits
        workload = shapes.workload(config)
        step = asking.step(workload, layout, layout.mesh(cpu(8)))
        held[bits] = asking.bytes_per_device(step.params)
    outside = 2 * 2 * 128_256 * workload.model.config.hidden / 8
    assert held[None] == pytest.approx(2 * parameters / 8, rel=1e-3)
    assert held["4"] == pytest.approx(outside + (held[None] - outside) * 4.13 / 16, rel=0.01)
