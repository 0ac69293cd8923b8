"""Training some rows of an embedding: look-ups, a tied head, gradients, merging, messages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.methods.token_rows import token_rows
from tests.helpers.networks import Tied, started
from tests.helpers.reference import close, filled, same

KEY = jax.random.key(0)
IDS = jnp.asarray([[1, 4, 10], [4, 4, 0]], jnp.int32)
MODEL = Tied()
PARAMS = started(MODEL, IDS)
METHOD = token_rows(lj.select("wte/embedding"), indices=[4, 10, 7])
lifted = lj.lift(lambda params: MODEL.apply({"params": params}, IDS), on_dense="error")


def replaced(params, delta):
    """The table with the rows put in, by numpy."""
    table = np.array(params["wte"]["embedding"])
    table[[4, 10, 7]] = np.asarray(delta["wte/embedding"]["rows"]).astype(table.dtype)
    return {**params, "wte": {"embedding": jnp.asarray(table)}}


def test_it_begins_as_the_base_and_replaces_rows_exactly():
    start = METHOD.init(KEY, PARAMS)
    same(start["wte/embedding"]["rows"], PARAMS["wte"]["embedding"][jnp.array([4, 10, 7])])
    close(lifted(METHOD.apply(PARAMS, start)), MODEL.apply({"params": PARAMS}, IDS), 0.0)
    delta = filled(start, size=2.0)
    same(lj.merge(METHOD.apply(PARAMS, delta)), replaced(PARAMS, delta))


def test_look_up_and_tied_head_follow():
    delta = filled(METHOD.init(KEY, PARAMS), size=2.0)
    got, want = lifted(METHOD.apply(PARAMS, delta)), MODEL.apply({"params": replaced(PARAMS, delta)}, IDS)
    close(got, want)
    base = MODEL.apply({"params": PARAMS}, IDS)
    changed = np.max(np.abs(np.asarray(got - base)), axis=(0, 1))
    assert np.all(changed[[4, 7, 10]] > 0.1)  # the columns of the new rows, the never looked-up 7 among them


def test_gradients_are_those_of_the_rows():
    delta = filled(METHOD.init(KEY, PARAMS))

    def loss(params, delta):
        return jnp.sum(jnp.sin(lifted(METHOD.apply(params, delta))))

    of_base, got = jax.grad(loss, (0, 1))(PARAMS, delta)
    dense = jax.grad(lambda p: jnp.sum(jnp.sin(MODEL.apply({"params": p}, IDS))))(replaced(PARAMS, delta))
    close(got["wte/embedding"]["rows"], dense["wte"]["embedding"][jnp.array([4, 10, 7])], 2e-5)
    assert not np.any(of_base["wte"]["embedding"])


def test_training_leaves_the_other_rows():
    delta = METHOD.init(KEY, PARAMS)
    tx = lj.freeze_base(optax.sgd(0.1))
    grads = jax.grad(lambda d: jnp.sum(lifted(METHOD.apply(PARAMS, d)) ** 2))(delta)
    updates, _ = tx.update(grads, tx.init(delta), delta)
    delta = optax.apply_updates(delta, updates)
    merged = lj.merge(METHOD.apply(PARAMS, delta))["wte"]["embedding"]
    differs = np.any(np.asarray(merged) != np.asarray(PARAMS["wte"]["embedding"]), axis=1)
    assert set(np.flatnonzero(differs)) == {4, 7, 10}


def test_strength_goes_from_the_base_to_the_rows():
    delta = filled(METHOD.init(KEY, PARAMS))
    run = jax.jit(lambda s: lj.merge(METHOD.apply(PARAMS, delta, strength=s)))
    same(run(jnp.float32(0)), PARAMS)
    same(run(jnp.float32(1)), replaced(PARAMS, delta))
    half = run(jnp.float32(0.5))["wte"]["embedding"][4]
    close(half, 0.5 * (PARAMS["wte"]["embedding"][4] + delta["wte/embedding"]["rows"][0]))


def test_vmap_over_deltas():
    each = [filled(METHOD.init(KEY, PARAMS), seed=n) for n in range(3)]
    together = jax.tree.map(lambda *leaf: jnp.stack(leaf), *each)
    got = jax.vmap(lambda d: lifted(METHOD.apply(PARAMS, d)))(together)
    close(got, jnp.stack([lifted(METHOD.apply(PARAMS, d)) for d in each]))


def test_a_table_that_holds_rows_is_no_tuned_leaf():
    delta = METHOD.init(KEY, PARAMS)
    same(lj.without_tuned(PARAMS, delta), PARAMS)
    assert jax.tree.leaves(lj.labels(delta)) == ["trainable"]
    labelled = lj.labels(METHOD.apply(PARAMS, delta))["wte"]["embedding"]
    assert (labelled.base, labelled.rows) == ("frozen", "trainable")


LOW = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)


def test_rows_of_a_bfloat16_table_are_float32_and_begin_as_the_base():
    delta = METHOD.init(KEY, LOW)
    same(delta["wte/embedding"]["rows"], LOW["wte"]["embedding"][jnp.array([4, 10, 7])].astype(jnp.float32))
    want = MODEL.apply({"params": LOW}, IDS)
    assert want.dtype == jnp.bfloat16
    for adapted in (METHOD.apply(LOW, delta), METHOD.apply(LOW, delta, strength=0.3)):
        same(lj.merge(adapted), LOW)
    same(lifted(METHOD.apply(LOW, delta)), want)
    same(jax.jit(lifted)(METHOD.apply(LOW, delta)), jax.jit(MODEL.apply)({"params": LOW}, IDS))


def test_rows_of_a_bfloat16_table_gather_steps_below_its_spacing():
    """110 steps of a hundredth of the spacing move the table; in bfloat16 each would round to nothing."""
    delta = METHOD.init(KEY, LOW)
    start = delta["wte/embedding"]["rows"]
    tx = lj.freeze_base(optax.sgd(1.0))
    state = tx.init(delta)
    step = 0.01 * 2.0 ** (jnp.floor(jnp.log2(jnp.abs(start))) - 7)
    for _ in range(110):
        updates, state = tx.update(lj.Delta({"wte/embedding": {"rows": -step}}), state, delta)
        delta = optax.apply_updates(delta, updates)
    assert delta["wte/embedding"]["rows"].dtype == jnp.float32
    close(delta["wte/embedding"]["rows"], start + 110 * step)
    merged = lj.merge(METHOD.apply(LOW, delta))["wte"]["embedding"]
    same(merged, replaced(LOW, delta)["wte"]["embedding"])
    assert np.all(np.asarray(merged != LOW["wte"]["embedding"])[[4, 10, 7]])


def test_look_up_in_a_bfloat16_table_is_within_a_rounding_of_the_merged():
    look = lj.lift(lambda params: params["wte"]["embedding"][jnp.asarray([4, 7, 0, 10])], on_dense="error")
    delta = filled(METHOD.init(KEY, LOW))
    got, want = (np.asarray(x, np.float64) for x in (look(METHOD.apply(LOW, delta)), look(replaced(LOW, delta))))
    base = np.asarray(look(LOW), np.float64)
    # the difference is rounded, the sum, and the merged row: half a spacing (2**-8 of a number) each
    allowed = 2.0**-8 * (np.abs(want - base) + np.abs(got) + np.abs(want))
    assert np.all(np.abs(got - want) <= 1.01 * allowed) and np.any(np.abs(want - base) > 0.1)


def test_rows_of_low_precision_do_not_round_a_wider_base():
    delta = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), filled(METHOD.init(KEY, PARAMS)))
    same(lj.merge(METHOD.apply(PARAMS, delta, strength=0.0)), PARAMS)
    close(lifted(METHOD.apply(PARAMS, delta)), MODEL.apply({"params": replaced(PARAMS, delta)}, IDS))


def test_its_spec_is_json():
    again = lj.from_spec(json.loads(json.dumps(METHOD.spec)))
    delta = filled(METHOD.init(KEY, PARAMS))
    same(lj.merge(again.apply(PARAMS, delta)), lj.merge(METHOD.apply(PARAMS, delta)))


@pytest.mark.parametrize("indices", [[], [1, 1], [-1], [True], [1.0]])
def test_rows_that_are_none_are_refused(indices):
    with pytest.raises(ValueError, match="indices"):
        token_rows(lj.select("wte/embedding"), indices=indices)


def test_what_has_no_rows_is_refused():
    with pytest.raises(ValueError, match=r"wte/embedding has 11 rows, but indices=\(4, 11\)"):
        token_rows(lj.select("wte/embedding"), indices=[4, 11]).init(KEY, PARAMS)
    with pytest.raises(ValueError, match="mix/kernel with axes 'io'"):
        token_rows(lj.select("mix/kernel"), indices=[0]).init(KEY, PARAMS)
    with pytest.raises(ValueError, match="TokenRows cannot be unmerged"):
        lj.unmerge(PARAMS, METHOD, METHOD.init(KEY, PARAMS))
    with pytest.raises(ValueError, match="the delta's factors"):
        METHOD.apply(PARAMS, lj.Delta({"wte/embedding": {"rows": jnp.ones((2, 6))}}))
