"""Prefixes: what always holds, chains, generation, gradients, look-ups, counts, what the data need."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import sharding
from lora_jax.core.transforms import inserted_tokens
from lora_jax.models import gpt2
from tests.helpers.gpt2 import CONFIG, EMBED, LAYER, LORA, PREFIXES, D, V, continued_without_a_cache
from tests.helpers.gpt2 import PREFIXED as IDS
from tests.helpers.gpt2 import PREFIXED_MASK as MASK
from tests.helpers.networks import started
from tests.helpers.reference import close, filled, ints, merged_params, normal, random_delta, same
from tests.helpers.sites import LAYERS, PARAMS, TOWERS, VOCABULARY, WIDTH, invariants

KEY = jax.random.key(0)

BLOCKS = {"block_out": (LAYERS, WIDTH)}
ON_THE_TOWER = {
    "PE": lj.prefix_embedding(lj.select("wte", axes="vo"), prefix=2, infix=1),
    "PL": lj.prefix_layer(BLOCKS, vocabulary=VOCABULARY, prefix=2, infix=1),
}
LOW = lj.lora(lj.select("w", axes="sio"), rank=2)
ON_THE_TOWER |= {f"LoRA + {name}": lj.chain(LOW, method) for name, method in ON_THE_TOWER.items()}


@pytest.mark.parametrize("name", ON_THE_TOWER)
def test_what_is_always_true(name):
    n = VOCABULARY
    invariants(ON_THE_TOWER[name], tokens=ints([[n, n + 1, 3, n + 2, 5], [n, n + 1, 0, 1, n + 2]]))


@functools.cache
def params_of(tie: bool = True, scan: bool = False) -> Any:
    """Weights far apart, so that texts vary."""
    params = started(gpt2.GPT2(dataclasses.replace(CONFIG, tie=tie)), IDS)
    params = jax.tree.map(lambda x: jax.device_put(np.asarray(x) + np.float32(0.1 * (x.ndim == 1))), params)
    return gpt2.to_scanned(params) if scan else params


@functools.cache
def model_of(**options: Any) -> Any:
    """The model lifted, compiled once for each method and shape."""
    return jax.jit(lj.lift(gpt2.GPT2(dataclasses.replace(CONFIG, **options)).apply, on_dense="error"))


@pytest.mark.parametrize(
    "name", ["PE", "LoRA + PL", *(pytest.param(n, marks=pytest.mark.slow) for n in ("PL", "LoRA + PE"))]
)
def test_a_text_without_placeholders_meets_the_base(name):
    """Bit for bit, whatever the trained rows; in `LoRA + ..` at its start."""
    method, params = PREFIXES[name], params_of()
    fresh = jax.jit(method.init)(KEY, params)
    delta = filled(fresh, size=1.0)
    if "LoRA" in name:
        delta = lj.Delta(delta | {path: fresh[path] for path in fresh if "attn" in path})
    plain = np.minimum(IDS, V - 1)
    run = model_of()
    adapted = {"params": method.apply(params, delta)}
    same(run(adapted, plain, MASK), jax.jit(gpt2.GPT2(CONFIG).apply)({"params": params}, plain, MASK))
    with_placeholders, without = (np.asarray(run(adapted, ids, MASK)) for ids in (IDS, plain))
    assert not np.allclose(with_placeholders[MASK], without[MASK], atol=0.1)


def test_chains_are_lora_and_a_prefix():
    params, run = params_of(), model_of()
    for name, alone in (("LoRA + PE", EMBED), ("LoRA + PL", LAYER)):
        delta = random_delta(PREFIXES[name], params, size=0.5)
        low = lj.Delta({path: delta[path] for path in delta if "attn" in path})
        prefix_delta = lj.Delta({path: delta[path] for path in delta if path not in low})
        merged = merged_params(LORA, params, low)
        got = run({"params": PREFIXES[name].apply(params, delta)}, IDS, MASK)
        close(got, run({"params": alone.apply(merged, prefix_delta)}, IDS, MASK), 2e-5)


@pytest.mark.parametrize("name", ["PE", pytest.param("PL", marks=pytest.mark.slow)])
def test_scanned_and_rematerialized_as_the_loop(name):
    method = PREFIXES[name]
    delta = random_delta(method, params_of(), size=0.5)
    scanned, looped = model_of(scan_layers=True, remat=True), model_of()
    run = lambda model, params: model({"params": method.apply(params, delta)}, IDS, MASK)  # noqa: E731
    close(run(scanned, params_of(scan=True)), run(looped, params_of()), 2e-5)


@pytest.mark.parametrize("name", ["PE", pytest.param("LoRA + PL", marks=pytest.mark.slow)])
def test_generation_with_a_cache_equals_the_loop_without(name):
    """Padded on the left; the steps meet no placeholder; a beam of one finds the same text."""
    from lora_jax.generation import generate

    method, model, params = PREFIXES[name], gpt2.GPT2(CONFIG), params_of()
    adapted = method.apply(params, random_delta(method, params, size=0.7))
    new = np.asarray(generate(model, adapted, IDS, MASK, max_new_tokens=5, eos=0))
    continued_without_a_cache(model, adapted, IDS, MASK, new)
    assert new.max() < V


@pytest.mark.slow
def test_beam_search_with_prefixes():
    """The search over a prompt with placeholders is that over the same prompt written as plain tokens, where the
    trained rows are those tokens' own."""
    from lora_jax.generation import generate

    model, params = gpt2.GPT2(CONFIG), params_of()
    plain = np.where(IDS >= V, IDS - V + 15, IDS)
    delta = lj.Delta({"wte/embedding": {"rows": params["wte"]["embedding"][15:18]}})
    how = {"max_new_tokens": 4, "eos": 0, "num_beams": 3, "no_repeat_ngram_size": 4}
    got = generate(model, EMBED.apply(params, delta), IDS, MASK, **how)
    assert np.asarray(got).tolist() == np.asarray(generate(model, params, plain, MASK, **how)).tolist()


def test_a_prefix_of_known_rows_is_the_known_tokens():
    """Bit for bit: a placeholder whose row is a token's is that token."""
    params = params_of()
    delta = jax.jit(EMBED.init)(KEY, params)
    start = delta["wte/embedding"]["rows"]
    table = np.asarray(params["wte"]["embedding"])
    drawn = [int(np.flatnonzero((table == row).all(1))[0]) for row in np.asarray(start)]  # it begins as rows of it
    adapted = {"params": EMBED.apply(params, delta)}
    plain = IDS.copy()
    for n, token in enumerate(drawn):
        plain[IDS == V + n] = token
    run = model_of()
    same(run(adapted, IDS, MASK), run({"params": params}, plain, MASK))


@pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_reach_the_trained_rows_alone(tie):
    """Rows that no token asks for have none; nor has the table, even in the gradient of the whole tree."""
    params, model = params_of(tie), gpt2.GPT2(dataclasses.replace(CONFIG, tie=tie))
    delta = random_delta(EMBED, params)

    @jax.jit
    def grads(params, delta, ids):
        def loss(params, delta):
            return jnp.sum(jnp.sin(lj.lift(model.apply)({"params": EMBED.apply(params, delta)}, ids)))

        return jax.grad(loss, (0, 1))(params, delta)

    of_base, of_delta = grads(params, delta, IDS[1:, :5])
    rows = np.asarray(of_delta["wte/embedding"]["rows"])
    assert rows[:2].any(1).all() and not rows[2].any()
    assert not np.any(of_base["wte"]["embedding"])
    assert np.any(of_base["h_0"]["attn"]["query"]["kernel"])
    adapted = EMBED.apply(params, delta)
    labels = lj.labels(adapted)["wte"]["embedding"]
    assert (labels.base, labels.rows) == ("frozen", "trainable")
    assert sum(x.size for x in jax.tree.leaves(lj.partition(adapted)[0])) == 3 * D


@pytest.mark.parametrize("name", ["PE", "PL"])
def test_strength(name):
    """0: every placeholder as the vocabulary's last token; 1: the trained vectors; in between a mean."""
    method, params = PREFIXES[name], params_of()
    delta = random_delta(method, params, size=0.7)
    model = gpt2.GPT2(CONFIG)
    run = jax.jit(lambda d, s: lj.lift(model.apply)({"params": method.apply(params, d, strength=s)}, IDS, MASK))
    close(run(delta, 0.0), model_of()({"params": params}, np.minimum(IDS, V - 1), MASK), 1e-6)
    close(run(delta, 1.0), model_of()({"params": method.apply(params, delta)}, IDS, MASK), 1e-6)
    assert run._cache_size() == 1
    if name == "PE":
        last = np.asarray(params["wte"]["embedding"])[-1]
        half = jax.tree.map(lambda x: (np.asarray(x) + last[None]) / 2, delta)
        close(run(delta, 0.5), run(half, 1.0))


def test_counted_by_the_papers_formulas():
    """d (l_p + l_i) and L d (l_p + l_i), from shapes alone (Hu et al. 2021, section 5.1)."""
    config = gpt2.SIZES["medium"]
    shapes = jax.eval_shape(gpt2.GPT2(config).init, KEY, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    embed = lj.prefix_embedding(lj.select("wte/embedding"), prefix=32, infix=8)
    layer = lj.prefix_layer({"block_out": gpt2.sites(config)["block_out"]}, vocabulary=50257, prefix=32, infix=8)
    assert lj.check(embed, shapes).trained == 1024 * 40
    assert lj.check(layer, shapes).trained == 24 * 1024 * 40
    chained = lj.chain(lj.lora(lj.select("**/attn/query/kernel", axes=gpt2.AXES), rank=4), layer)
    assert lj.check(chained, shapes).trained == 24 * 1024 * (40 + 2 * 4)


def test_first_values():
    """N(0, 0.02^2), within 4 standard errors of 8,000 draws; or rows of the vocabulary, not one alone."""
    delta = lj.prefix_layer({"block_out": (2, 2000)}, vocabulary=9, prefix=2).init(KEY, {})
    values = np.asarray(delta["@block_out/prefix_layer"]["values"])
    np.testing.assert_allclose([values.mean(), values.std()], [0, 0.02], atol=1e-3)
    table = {"embedding": np.arange(1000.0, dtype=np.float32)[:, None]}
    delta = lj.prefix_embedding(lj.select("embedding"), prefix=40).init(KEY, table)
    rows = np.asarray(delta["embedding"]["rows"])
    assert len(set(rows[:, 0].tolist())) > 30 and rows.min() < 300 and rows.max() > 700


def test_on_eight_devices():
    """The rows follow the features of the table."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = sharding.gpt2_rules(V, mesh)
    params, model = params_of(scan=True), gpt2.GPT2(dataclasses.replace(CONFIG, scan_layers=True))
    ids = np.tile(IDS, (2, 1))
    method = EMBED
    delta = random_delta(method, params, size=0.5)
    run = jax.jit(lambda p, d, ids: lj.lift(model.apply)({"params": method.apply(p, d)}, ids))
    want = run(params, delta, ids)
    adapted = jax.eval_shape(method.apply, params, delta)
    placed = jax.device_put(params, sharding.shardings(params, mesh, rules))
    spread = jax.device_put(delta, sharding.shardings(delta, mesh, rules, adapted))
    assert spread["wte/embedding"]["rows"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    close(run(placed, spread, jax.device_put(ids, sharding.batch_sharding(mesh))), want)


def test_look_ups_of_many_kinds():
    """What a look-up does with ids beyond the vocabulary is the base's own, but for the prefix's."""
    table, ids = normal(7, 4), ints([[0, 6, 7], [8, 9, 3]])
    method = lj.prefix_embedding(lj.select("embedding"), prefix=3)
    delta = random_delta(method, {"embedding": table})
    rows = delta["embedding"]["rows"]
    want = np.concatenate([table, rows])[np.asarray(ids)]
    look_ups = (
        lambda p, ids: p["embedding"][ids],
        lambda p, ids: jnp.take(p["embedding"], ids, axis=0),
        lambda p, ids: jnp.take(p["embedding"], ids, axis=0, mode="clip"),
        lambda p, ids: p["embedding"].at[ids].get(mode="fill", fill_value=0.0),
        lambda p, ids: jax.vmap(lambda n: p["embedding"][n])(ids),
        lambda p, ids: jax.lax.map(lambda n: p["embedding"][n], ids),
        lambda p, ids: jax.jit(lambda w: w[ids])(p["embedding"]),
    )

    @jax.jit
    def run(ids):
        adapted = method.apply({"embedding": table}, delta)
        return [lj.lift(look_up, on_dense="error")(adapted, ids) for look_up in look_ups]

    for got in run(ids):
        same(got, want)
    short = {"embedding": np.asarray(table).astype(jnp.bfloat16)}
    got = jax.jit(lambda ids: lj.lift(lambda p: p["embedding"][ids])(method.apply(short, delta)))(ids)
    same(got, np.concatenate([short["embedding"], np.asarray(rows).astype(jnp.bfloat16)])[np.asarray(ids)])
    start = np.asarray(jax.jit(method.init)(KEY, short)["embedding"]["rows"])
    vocabulary = short["embedding"].astype(np.float32)
    assert start.dtype == np.float32 and bool((start[:, None] == vocabulary[None]).all(-1).any(-1).all())


@pytest.mark.parametrize("name", ["PE", "PL"])
def test_ids_beyond_the_prefix_are_not_numbers(name):
    """As ids beyond the vocabulary are in the base: data with a longer prefix than the method's are noticed."""
    method, params = PREFIXES[name], params_of()
    run = model_of()
    adapted = {"params": method.apply(params, random_delta(method, params))}
    wrong = IDS.copy()
    wrong[0, 6] = V + 3
    logits = np.asarray(run(adapted, wrong, MASK))
    assert np.isnan(logits[0, 6]).all() and not np.isnan(logits[1]).any()


def test_what_the_data_need():
    chained = lj.chain(LORA, LAYER)
    for method, want in ((EMBED, (2, 1)), (LAYER, (2, 1)), (chained, (2, 1)), (LORA, (0, 0))):
        assert inserted_tokens(method.spec) == want
    assert inserted_tokens(lj.chain(chained, lj.tune(lj.select("**/bias"))).spec) == (2, 1)
    assert inserted_tokens({"method": "of one's own", "prefix": "enc/"}) == (0, 0)
    with pytest.raises(ValueError, match="a chain has room for one prefix"):
        inserted_tokens(lj.chain(LAYER, EMBED).spec)


def test_what_cannot_be_is_said():
    params = params_of()
    for prefix, infix in itertools.chain([(0, 0), (-1, 2), (2.0, 0), (1, -1)]):
        for make in (
            functools.partial(lj.prefix_embedding, lj.select("wte/embedding")),
            functools.partial(lj.prefix_layer, {"block_out": (2, D)}, vocabulary=V),
        ):
            with pytest.raises(ValueError, match=r"together at least one token|must be a whole number from 0"):
                make(prefix=prefix, infix=infix)
    with pytest.raises(ValueError, match=r"h_0/attn/query/kernel with axes 'io': a prefix extends an embedding"):
        lj.prefix_embedding(lj.select("h_0/attn/query/kernel"), prefix=1).init(KEY, params)
    delta = random_delta(EMBED, params)
    absent = lj.without_tuned(params, random_delta(lj.tune(lj.select("wte/embedding")), params))
    with pytest.raises(ValueError, match="wte/embedding"):
        EMBED.apply(absent, delta)
    with pytest.raises(ValueError, match=r"wte/embedding: the delta's factors are .*\(3, 8\).* need .*\(4, 8\)"):
        lj.prefix_embedding(lj.select("wte/embedding"), prefix=4).apply(params, delta)
    with pytest.raises(ValueError, match="wte/embedding: the rows of a prefix are none of the vocabulary's"):
        lj.merge(EMBED.apply(params, delta))
    with pytest.raises(ValueError, match="wte/embedding: Extended cannot be unmerged; keep the base"):
        lj.unmerge(params, EMBED, delta)
    for cut in (lambda p: p["wte"]["embedding"][:5][IDS], lambda p: p["wte"]["embedding"] * 2.0):
        with pytest.raises(ValueError, match="cuts or changes it: look up in the full one"):
            lj.lift(cut, on_dense="allow")(EMBED.apply(params, delta))
    layers = random_delta(LAYER, params)
    with pytest.raises(ValueError, match=r"what changes activations \(block_out, tokens\) has no weight to go into"):
        lj.merge(LAYER.apply(params, layers))
    with pytest.raises(ValueError, match="the delta is not this method's"):
        LAYER.apply(params, delta)
    with pytest.raises(ValueError, match="wte/embedding is the target of two transforms of the chain"):
        lj.chain(lj.lora(lj.select("wte/embedding"), rank=1), EMBED).init(KEY, params)
    nameless = lambda p, ids: p["wte"]["embedding"][ids]  # noqa: E731
    with pytest.raises(ValueError, match="the function has 0 activations named 'tokens'"):
        lj.lift(nameless)(LAYER.apply(params, layers), IDS)
    with pytest.raises(TypeError, match=r"wrap the function with lora_jax\.lift"):
        nameless(EMBED.apply(params, delta), IDS)


def test_prefix_layers_need_the_tokens_name():
    """A model whose blocks are named, but not its tokens, is refused by name."""
    method = ON_THE_TOWER["PL"]
    run = lj.lift(lambda p, x: TOWERS["scan"](p, x))
    with pytest.raises(ValueError, match="the tap at 'block_out' needs the activation 'tokens'"):
        run(method.apply(PARAMS, random_delta(method, PARAMS)), normal(2, 5, WIDTH))
