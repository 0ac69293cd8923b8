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
from tests.helpers.reference import close, filled, ints, merged_params, random_delta, same

KEY = jax.random.key(0)
IDS = ints([[1, 4, 10], [4, 4, 0]])
MODEL = Tied()
PARAMS = started(MODEL, IDS)
METHOD = token_rows(lj.select("wte/embedding"), indices=[4, 10, 7])
lifted = lj.lift(lambda params: MODEL.apply({"params": params}, IDS), on_dense="error")


def replaced(params, delta):
    """The table with the rows put in, by numpy."""
    table = np.array(params["wte"]["embedding"])
    table[[4, 10, 7]] = np.asarray(delta["wte/embedding"]["rows"]).astype(table.dtype)
    return {**params, "wte": {"embedding": jax.device_put(table)}}


def rows_of(params):
    """The rows that train, of a tree like the params."""
    return np.asarray(params["wte"]["embedding"])[[4, 10, 7]]


@jax.jit
def base(params):
    return MODEL.apply({"params": params}, IDS)


@jax.jit
def adapted_output(params, delta):
    return lifted(METHOD.apply(params, delta))


def test_it_begins_as_the_base_and_replaces_rows_exactly():
    start = METHOD.init(KEY, PARAMS)
    same(start["wte/embedding"]["rows"], rows_of(PARAMS))
    close(adapted_output(PARAMS, start), base(PARAMS), 0.0)
    delta = filled(start, size=2.0)
    same(merged_params(METHOD, PARAMS, delta), replaced(PARAMS, delta))


def test_look_up_and_tied_head_follow():
    delta = random_delta(METHOD, PARAMS, size=2.0)
    got = adapted_output(PARAMS, delta)
    close(got, base(replaced(PARAMS, delta)))
    changed = np.max(np.abs(np.asarray(got) - np.asarray(base(PARAMS))), axis=(0, 1))
    assert np.all(changed[[4, 7, 10]] > 0.1)  # the columns of the new rows, the never looked-up 7 among them


def test_gradients_are_those_of_the_rows():
    delta = random_delta(METHOD, PARAMS)

    def loss(params, delta):
        return jnp.sum(jnp.sin(lifted(METHOD.apply(params, delta))))

    of_base, got = jax.jit(jax.grad(loss, (0, 1)))(PARAMS, delta)
    dense = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(base(p)))))(replaced(PARAMS, delta))
    close(got["wte/embedding"]["rows"], rows_of(dense), 2e-5)
    assert not np.any(of_base["wte"]["embedding"])


def test_training_leaves_the_other_rows():
    delta = METHOD.init(KEY, PARAMS)
    tx = lj.freeze_base(optax.sgd(0.1))

    @jax.jit
    def step(delta):
        grads = jax.grad(lambda d: jnp.sum(lifted(METHOD.apply(PARAMS, d)) ** 2))(delta)
        delta = optax.apply_updates(delta, tx.update(grads, tx.init(delta), delta)[0])
        return lj.merge(METHOD.apply(PARAMS, delta))

    merged = step(delta)["wte"]["embedding"]
    differs = np.any(np.asarray(merged) != np.asarray(PARAMS["wte"]["embedding"]), axis=1)
    assert set(np.flatnonzero(differs)) == {4, 7, 10}


def test_strength_goes_from_the_base_to_the_rows():
    delta = random_delta(METHOD, PARAMS)
    run = jax.jit(lambda s: lj.merge(METHOD.apply(PARAMS, delta, strength=s)))
    same(run(jnp.float32(0)), PARAMS)
    same(run(jnp.float32(1)), replaced(PARAMS, delta))
    half = rows_of(run(jnp.float32(0.5)))[0]
    close(half, np.float32(0.5) * (rows_of(PARAMS)[0] + np.asarray(delta["wte/embedding"]["rows"])[0]))


def test_vmap_over_deltas():
    each = [random_delta(METHOD, PARAMS, seed=n) for n in range(3)]
    together = jax.tree.map(lambda *leaf: np.stack(leaf), *each)
    got = jax.jit(jax.vmap(lambda d: lifted(METHOD.apply(PARAMS, d))))(together)
    close(got, np.stack([adapted_output(PARAMS, d) for d in each]))


def test_a_table_that_holds_rows_is_no_tuned_leaf():
    delta = METHOD.init(KEY, PARAMS)
    same(lj.without_tuned(PARAMS, delta), PARAMS)
    assert jax.tree.leaves(lj.labels(delta)) == ["trainable"]
    labelled = lj.labels(METHOD.apply(PARAMS, delta))["wte"]["embedding"]
    assert (labelled.base, labelled.rows) == ("frozen", "trainable")


LOW = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf).astype(jnp.bfloat16)), PARAMS)


def test_rows_of_a_bfloat16_table_are_float32_and_begin_as_the_base():
    delta = METHOD.init(KEY, LOW)
    same(delta["wte/embedding"]["rows"], rows_of(LOW).astype(np.float32))
    want = MODEL.apply({"params": LOW}, IDS)
    assert want.dtype == jnp.bfloat16
    same(merged_params(METHOD, LOW, delta), LOW)
    same(merged_params(METHOD, LOW, delta, strength=0.3), LOW)
    same(lifted(METHOD.apply(LOW, delta)), want)
    same(adapted_output(LOW, delta), base(LOW))


def test_rows_of_a_bfloat16_table_gather_steps_below_its_spacing():
    """110 steps of a hundredth of the spacing move the table; in bfloat16 each would round to nothing."""
    delta = METHOD.init(KEY, LOW)
    start = np.asarray(delta["wte/embedding"]["rows"])
    tx = lj.freeze_base(optax.sgd(1.0))
    step = np.float32(0.01) * np.float32(2.0) ** (np.floor(np.log2(np.abs(start))) - 7)

    @jax.jit
    def stepped(carry, _):
        delta, state = carry
        updates, state = tx.update(lj.Delta({"wte/embedding": {"rows": -step}}), state, delta)
        return (optax.apply_updates(delta, updates), state), None

    (delta, _), _ = jax.lax.scan(stepped, (delta, tx.init(delta)), None, length=110)
    assert delta["wte/embedding"]["rows"].dtype == jnp.float32
    close(delta["wte/embedding"]["rows"], start + 110 * step)
    merged = merged_params(METHOD, LOW, delta)["wte"]["embedding"]
    same(merged, replaced(LOW, delta)["wte"]["embedding"])
    assert np.all(np.asarray(merged != LOW["wte"]["embedding"])[[4, 10, 7]])


def test_look_up_in_a_bfloat16_table_is_within_a_rounding_of_the_merged():
    look = lj.lift(lambda params: params["wte"]["embedding"][jnp.asarray([4, 7, 0, 10])], on_dense="error")
    delta = random_delta(METHOD, LOW)
    got, want = (np.asarray(x, np.float64) for x in (look(METHOD.apply(LOW, delta)), look(replaced(LOW, delta))))
    base = np.asarray(look(LOW), np.float64)
    # the difference is rounded, the sum, and the merged row: half a spacing (2**-8 of a number) each
    allowed = 2.0**-8 * (np.abs(want - base) + np.abs(got) + np.abs(want))
    assert np.all(np.abs(got - want) <= 1.01 * allowed) and np.any(np.abs(want - base) > 0.1)


def test_rows_of_low_precision_do_not_round_a_wider_base():
    delta = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), random_delta(METHOD, PARAMS))
    same(merged_params(METHOD, PARAMS, delta, strength=0.0), PARAMS)
    close(adapted_output(PARAMS, delta), base(replaced(PARAMS, delta)))


def test_its_spec_is_json():
    again = lj.from_spec(json.loads(json.dumps(METHOD.spec)))
    delta = random_delta(METHOD, PARAMS)
    same(again.apply(PARAMS, delta), METHOD.apply(PARAMS, delta))


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
