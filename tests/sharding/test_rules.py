"""Every leaf of our models, of every method's state on them, has a rule; another leaf is refused."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import lora_jax as lj
from configs import e2e, glue
from configs.methods import METHODS
from lora_jax import training
from lora_jax.core import selection
from lora_jax.distributed import sharding
from lora_jax.models import gpt2
from lora_jax.models.encoder import Encoder
from lora_jax.models.gpt2 import GPT2
from lora_jax.runs import methods
from tests.helpers.meshes import BERT, CONFIG, ROBERTA, SCANNED, mesh_of

MODELS = {"gpt2": GPT2(CONFIG), "gpt2 scanned": GPT2(SCANNED), "roberta": Encoder(ROBERTA), "bert": Encoder(BERT)}
SMALL = {"lora.rank": 2, "dora.rank": 2, "pissa.rank": 2, "vera.rank": 8, "adapter.rank": 4, "compacter.rank": 8}


def shapes_of(model: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def config_of(model: Any, name: str) -> ConfigDict:
    encodes = isinstance(model, Encoder)
    config = glue.get_config(f"base,mrpc,{name}") if encodes else e2e.get_config(f"small,{name}")
    config.update_from_flattened_dict(SMALL)
    return config


@pytest.mark.parametrize(
    ("kind", "name"),
    [*itertools.product(("gpt2", "roberta"), [*METHODS, "full"]), ("gpt2 scanned", "full"), ("bert", "full")],
)
def test_every_leaf_has_a_rule(kind: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, mesh = MODELS[kind], mesh_of(2, 2, 2)
    params, rules = shapes_of(model), sharding.rules_for(model, mesh)
    config = config_of(model, name)
    method = lj.from_spec(methods.spec(config, model))
    tx = training.optimizer(config.optimizer, training.schedule(config.optimizer, 1000), spec=method.spec)
    start = jax.eval_shape(lambda params: training.new_state(method, tx, params, jax.random.key(0)), params)
    adapted = jax.eval_shape(method.apply, params, start.delta)
    for tree in (params, adapted):
        sharding.shardings(tree, mesh, rules)
    places = training.state_shardings(start, sharding.Placement(mesh, rules), adapted)
    assert jax.tree.structure(places) == jax.tree.structure(start)
    assert "stays whole" not in caplog.text


F, T = "fsdp", "tensor"
IN_LAYERS = {  # kernel, its A, its B, its bias
    "attn/query": (P(F, T), P(F, None), P(None, T), P(T)),
    "attn/key": (P(F, T), P(F, None), P(None, T), P(T)),
    "attn/value": (P(F, T), P(F, None), P(None, T), P(T)),
    "attn/out": (P(T, F), P(T, None), P(None, F), P()),
    "mlp/up": (P(F, T), P(F, None), P(None, T), P(T)),
    "mlp/down": (P(T, F), P(T, None), P(None, F), P()),
}
TABLES = {  # of 51, 52, 50 and 51 rows
    "gpt2": {"wte/embedding": P(None, (F, T)), "wpe/embedding": P(None, (F, T))},
    "gpt2 scanned": {"wte/embedding": P(T, F), "wpe/embedding": P(None, (F, T))},
    "roberta": {"embeddings/position/embedding": P(None, (F, T)), "embeddings/token_type/embedding": P()},
    "bert": {"embeddings/position/embedding": P(None, (F, T)), "embeddings/token_type/embedding": P()},
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_specs_of_every_kernel_and_its_factors(kind: str) -> None:
    model, mesh = MODELS[kind], mesh_of(2, 2, 2)
    params, rules = shapes_of(model), sharding.rules_for(model, mesh)
    method = lj.lora(lj.select("**/{attn,mlp}/*/kernel", axes=gpt2.AXES), rank=2)
    delta = jax.eval_shape(method.init, jax.random.key(0), params)
    adapted = jax.eval_shape(method.apply, params, delta)

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda place: place.spec, sharding.shardings(tree, mesh, rules, adapted))

    of_params, of_delta = selection.flatten(specs(params), is_leaf=lambda x: isinstance(x, P))[0], specs(delta)
    flat, layer, leading = dict(of_params), *(("h", (None,)) if model.config.scan_layers else ("h_0", ()))
    assert {path.removeprefix(f"{layer}/") for path in of_delta if path.startswith(f"{layer}/")} == {
        f"{name}/kernel" for name in IN_LAYERS
    }
    for name, (kernel, a, b, bias) in IN_LAYERS.items():
        assert flat[f"{layer}/{name}/kernel"] == P(*leading, *kernel), name
        assert of_delta[f"{layer}/{name}/kernel"] == {"a": P(*leading, *a), "b": P(*leading, *b)}, name
        assert flat[f"{layer}/{name}/bias"] == (P(*leading, *bias) if bias else P()), name
    assert {path: flat[path] for path in TABLES[kind]} == TABLES[kind]


@pytest.mark.parametrize("kind", MODELS)
def test_a_leaf_that_no_rule_names_is_refused(kind: str) -> None:
    mesh = mesh_of(2, 2, 2)
    params = shapes_of(MODELS[kind]) | {"gate": {"kernel": jnp.zeros((4, 4))}}
    rules = sharding.rules_for(MODELS[kind], mesh)
    with pytest.raises(ValueError, match=r"sharding rules: no glob of .* matches 'gate/kernel'; add one"):
        sharding.shardings(params, mesh, rules)


def test_what_lies_along_no_axis_of_its_weight_is_said(caplog: pytest.LogCaptureFixture) -> None:
    adapted, delta = {"h": {"kernel": jnp.zeros((8, 8))}}, {"h/kernel": {"own": jnp.zeros(3)}}
    rules = {"**/kernel": P("fsdp", "tensor")}
    assert sharding.shardings(delta, mesh_of(1, 1, 1), rules, adapted)["h/kernel"]["own"].spec == P()
    assert not caplog.text
    assert sharding.shardings(delta, mesh_of(2, 2, 2), rules, adapted)["h/kernel"]["own"].spec == P()
    assert "h/kernel/own lies along no axis of its weight" in caplog.text
