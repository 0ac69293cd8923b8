"""What model families publish, and a family from outside that is registered."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.core.selection import flatten
from lora_jax.distributed import sharding
from lora_jax.models import encoder, family, gpt2
from lora_jax.models.family import Dimensions, Family, family_of, register_family
from lora_jax.runs import default_config, methods

SMALL = gpt2.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
ROBERTA = encoder.EncoderConfig(vocab_size=64, max_positions=34, hidden=16, layers=3, heads=4, inner=24)
BERT = encoder.EncoderConfig("bert", vocab_size=64, max_positions=32, hidden=16, layers=1, heads=2, inner=24)
MODELS = [
    gpt2.GPT2(SMALL),
    gpt2.GPT2(dataclasses.replace(SMALL, scan_layers=True, tie=False)),
    encoder.Encoder(dataclasses.replace(ROBERTA, head="classification")),
    encoder.Encoder(dataclasses.replace(BERT, head="regression", labels=1, pooler=True, scan_layers=True)),
]


def shapes_of(model: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@dataclasses.dataclass(frozen=True)
class BagConfig:
    family: ClassVar[str] = "bag"
    vocab_size: int = 8
    width: int = 4


class Bag(nn.Module):
    config: BagConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Embed(self.config.vocab_size, self.config.width, name="table")(tokens).sum(1)


BAG = Family(
    "bag",
    Bag,
    {"table/embedding": "vo"},
    lambda config: {},
    lambda config, mesh: {"**/table/embedding": P("tensor", "fsdp")},
    lambda config: Dimensions(0, config.width, 1, 0, 100),
)


@pytest.mark.parametrize("model", MODELS)
def test_a_family_names_its_token_embedding_or_a_config_does(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty `prefix_embedding.select`, and what the default once was, are the family's glob."""
    params, glob = shapes_of(model), family_of(model).token_embedding
    config = default_config("generation")
    config.method = "prefix_embedding"
    table = lj.select(glob, axes=family_of(model).axes)
    assert list(table(params).values()) == ["vo"]
    assert [leaf.shape[0] for leaf in table.leaves(params).values()] == [model.config.vocab_size]
    for given in ((), ("**/{wte,word}/embedding",)):
        config.prefix_embedding.select = given
        assert methods.spec(config, model)["select"] == [glob]
    monkeypatch.setitem(family._FAMILIES, "bag", BAG)
    with pytest.raises(ValueError, match=r"prefix_embedding\.select: a bag names no token embedding"):
        methods.spec(config, Bag(BagConfig()))


@pytest.mark.parametrize("model", MODELS)
def test_a_family_names_the_axes_of_every_parameter(model: Any) -> None:
    params = shapes_of(model)
    for path, leaf in flatten(params)[0]:
        axes = lj.select("**", axes=family_of(model).axes)(params)[path]
        assert len(axes) == leaf.ndim, path


@pytest.mark.parametrize("model", MODELS)
def test_the_sites_and_dimensions_of_a_family_are_the_models(model: Any) -> None:
    family, tokens = family_of(model), jnp.zeros((2, 5), jnp.int32)
    traced = lj.sites(model.apply, {"params": shapes_of(model)}, tokens)
    published = family.sites(model.config)
    assert {name: (count, shape[2:], str(dtype)) for name, (count, shape, dtype) in traced.items()} == published
    depth, width, heads, inner, most, _ = family.dimensions(model.config)
    assert published["block_out"] == (depth, (width,), "float32")
    assert heads in (2, 4) and most == 32
    up = next(leaf for path, leaf in flatten(shapes_of(model))[0] if path.endswith("mlp/up/kernel"))
    assert up.shape[-2:] == (width, inner)
    with pytest.raises(ValueError, match=str(most + 1)):
        jax.eval_shape(model.apply, {"params": shapes_of(model)}, jnp.zeros((1, most + 1), jnp.int32))


def test_what_a_family_can_do() -> None:
    assert family_of("gpt2").init_cache and family_of("gpt2").output_head and not family_of("gpt2").with_head
    for config in (ROBERTA, BERT):
        family = family_of(config)
        assert family.name == config.family and not (family.init_cache or family.output_head)
        headed = family.with_head(config, "classification", 3)
        params = shapes_of(family.model(headed))
        assert headed.labels == 3 and headed.pooler == (config.family == "bert")
        assert set(family.head_params) == ({"classifier"} if config.family == "bert" else {"classifier", "pooler"})
        assert {*params} >= {"classifier"}


def test_a_family_from_outside_is_asked_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_jax.models.family._FAMILIES", {})
    model, mesh = Bag(BagConfig()), Mesh([[[jax.devices()[0]]]], sharding.AXES)
    with pytest.raises(ValueError, match="the model family 'bag' is none of"):
        family_of(model)
    register_family(BAG)
    assert family_of(model) is family_of(model.config) is family_of("bag") is BAG
    params = shapes_of(model)
    method = lj.lora(lj.select("**", axes=family_of(model).axes), rank=2)
    adapted = jax.eval_shape(method.apply, params, jax.eval_shape(method.init, jax.random.key(0), params))
    places = sharding.shardings(adapted, mesh, sharding.rules_for(model, mesh))
    assert places["table"]["embedding"].base.spec == P("tensor", "fsdp")


def test_what_names_no_family_is_refused() -> None:
    with pytest.raises(TypeError, match="a Dense is not a model of lora_jax"):
        family_of(nn.Dense(3))
