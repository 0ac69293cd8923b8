"""What a newcomer gives in the wrong place, and what they see: messages, tracebacks, reprs, pickles."""

import copy
import pickle
import traceback

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import lora_jax as lj
from lora_jax.core.transforms import per_target
from tests.helpers.reference import normal

KEY = jax.random.key(0)
PARAMS = {"dense": {"kernel": normal(8, 6), "bias": normal(6)}, "norm": {"scale": normal(8)}}
QV = lj.select("dense/kernel")
LORA = lj.lora(QV, rank=2)
DELTA = LORA.init(KEY, PARAMS)

WRONG = [
    (lambda: lj.lora("**/kernel", rank=4), TypeError, r"lora_jax\.lora\(lora_jax\.select\('\*\*/kernel'\), \.\.\.\)"),
    (lambda: lj.tune(["**"]), TypeError, "tune takes a selection of weights, lora_jax.select; got a list"),
    (lambda: lj.lora(QV, r=4), TypeError, "lora has no option 'r': it is rank here"),
    (lambda: lj.dora(QV, rank=4, lora_alpha=8), TypeError, "dora has no option 'lora_alpha': it is alpha here"),
    (
        lambda: lj.vera(QV, rank=4, lora_alpha=8),
        TypeError,
        "no option 'lora_alpha': there are rank, d_initial",
    ),
    (lambda: lj.lora(QV, rank=4, target_modules=["q"]), TypeError, r"it is a selection, select\("),
    (lambda: lj.lora(QV, rnk=4), TypeError, "lora has no option 'rnk': did you mean rank?"),
    (
        lambda: lj.lora(QV, rank=4, exclude="x"),
        TypeError,
        r"no option 'exclude': select\(.*exclude=.*has it",
    ),
    (lambda: lj.lora(QV, 4), TypeError, "lora takes one argument by position, and options by their names: rank=4"),
    (lambda: lj.lora(None, rank=4), TypeError, "lora takes a selection of weights.*got None"),
    (lambda: lj.tune(QV, rank=4), TypeError, "tune has no option 'rank': there is none"),
    (lambda: lj.lora(QV, rank=4, dtype="int8"), ValueError, "dtype='int8' must be of floating point"),
    (lambda: lj.lora(QV, rank=4, dtype="float31"), ValueError, "dtype='float31' must be of floating point"),
    (lambda: lj.adapter("mlp_out", rank=4), TypeError, "adapter changes activations.*got 'mlp_out'"),
    (lambda: lj.adapter({"mlp_out": 2}, rank=4), TypeError, r"'mlp_out' needs \(occurrences, width\).*got 2"),
    (lambda: lj.chain([LORA, LORA]), TypeError, "chain takes methods, one after the other.*got a list"),
    (lambda: lj.bank(LORA), TypeError, "bank takes a list of methods.*got a ParamTransform"),
    (lambda: lj.check(PARAMS, LORA), TypeError, r"check takes \(method, params\).*got a dict"),
    (lambda: lj.from_spec("lora"), ValueError, "the spec of 'lora' does not fit: .* missing .*'selection'"),
    (lambda: LORA.init(KEY), TypeError, r"^init\(\) missing 1 required positional argument: 'params'"),
    (lambda: LORA.apply(PARAMS, DELTA, KEY), TypeError, r"^apply\(\) takes 2 positional arguments"),
    (lambda: lj.merge(PARAMS, DELTA), TypeError, "merge takes adapted params alone"),
    (lambda: lj.quantize(PARAMS, "**/kernel"), TypeError, r"quantize takes a selection, .*got '\*\*/kernel'"),
    (lambda: lj.select("kernel")(PARAMS), ValueError, "the nearest paths are dense/kernel"),
    (lambda: lj.select("**/kernel", layers=3)(PARAMS), ValueError, r"layers=\[3\]\) leaves no parameter"),
    (lambda: lj.adapter(QV, rank=4), TypeError, "adapter changes activations and takes their sites, .*mlp_out"),
    (lambda: LORA.init(PARAMS, KEY), TypeError, r"init takes \(key, params\).*not a dict; the two are swapped"),
    (lambda: LORA.init(0, PARAMS), TypeError, r"a key as jax\.random\.key\(0\) first, not 0$"),
    (lambda: lj.bank([LORA]).init(PARAMS, KEY), TypeError, "the two are swapped"),
    (lambda: lj.chain(LORA).init(0, PARAMS), TypeError, "first, not 0$"),
    (lambda: LORA.init(KEY, {"params": PARAMS}), ValueError, r"these are Flax variables: give variables\['params'\]"),
    (lambda: LORA.apply(PARAMS, DELTA, strength="0.5"), TypeError, "strength='0.5' must be a number"),
    (lambda: LORA.apply(PARAMS, DELTA, key=3), TypeError, r"apply takes key=jax\.random\.key\(0\), for dropout"),
    (lambda: lj.from_spec({"method": "lora", "select": ["**"], "r": 4}), ValueError, "no option 'r': it is rank here"),
    (lambda: lj.check(lj.lora(lj.select("**/kernl"), rank=2), PARAMS), ValueError, "'[*][*]/kernl' matches no param"),
    (lambda: lj.select("**/kernl")(PARAMS), ValueError, "'[*][*]/kernl' matches no parameter; the nearest"),
    (lambda: lj.lora(QV, rank=7).init(KEY, PARAMS), ValueError, "rank=7 must be a whole number from 1"),
    (
        lambda: lj.lora(lj.select("**"), rank=2).init(KEY, PARAMS),
        ValueError,
        r"select\(\.\.\., ndim=2\) takes",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_a_wrong_argument_is_told_in_the_users_terms_and_briefly(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert caught.value.__cause__ is None
    below = caught.value.__traceback__.tb_next  # from the user's line on
    lines = "".join(traceback.format_exception(caught.type, caught.value, below)).splitlines()
    assert len(lines) <= 12, "\n".join(lines)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0), np.array([0, 1], np.uint32)])
def test_both_kinds_of_keys_are_taken(key):
    assert LORA.init(key, PARAMS)["dense/kernel"]["a"].shape == (8, 2)


def test_the_whole_traceback_is_to_be_had_and_the_users_own_is_never_cut():
    def frames(call):
        with pytest.raises(ValueError) as caught:
            call()
        return [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    wrong = lambda: lj.check(lj.lora(lj.select("**/kernl"), rank=2), PARAMS)  # noqa: E731
    assert "_matching" not in frames(wrong)
    jax.config.update("jax_traceback_filtering", "off")
    try:
        assert "_matching" in frames(wrong)
    finally:
        jax.config.update("jax_traceback_filtering", "auto")

    def the_users_init(key, target):
        raise ValueError("mine")

    user_method = per_target({"method": "own"}, QV, the_users_init, lambda *_: None)
    assert "the_users_init" in frames(lambda: lj.check(user_method, PARAMS))


def test_a_method_is_printed_as_its_spec_and_pickled_through_it():
    chain = lj.chain(LORA, lj.tune(lj.select("**/bias")))
    for method in (LORA, chain, lj.bank([LORA, LORA]), lj.adapter({"mlp_out": (2, 4)}, rank=2)):
        assert repr(method) == f"ParamTransform({method.spec})" and "\n" not in repr(method)
        for again in (pickle.loads(pickle.dumps(method)), copy.copy(method), copy.deepcopy(method)):
            assert again.spec == method.spec
            jax.tree.map(np.testing.assert_array_equal, again.init(KEY, PARAMS), method.init(KEY, PARAMS))
    unregistered = per_target({"method": "of my own"}, QV, lambda key, target: {}, lambda *_: None)
    assert copy.copy(unregistered).spec == copy.deepcopy(unregistered).spec == unregistered.spec
    with pytest.raises(ValueError, match="'of my own' is not known"):
        pickle.loads(pickle.dumps(unregistered))


def test_what_is_public_prints_briefly():
    params = {f"h_{n}": {"kernel": jnp.ones((64, 64))} for n in range(100)}
    method = lj.lora(lj.select("**"), rank=2)
    delta = method.init(KEY, params)
    adapter = lj.adapter({"mlp_out": (2, 64)}, rank=2)
    tapped = adapter.apply(params, adapter.init(KEY, params))
    target = lj.Target("kernel", np.ones((64, 64)), "io")
    adapted = method.apply(params, delta)["h_0"]["kernel"]
    quantized = lj.quantize({"kernel": jnp.ones((64, 2))}, lj.select("kernel"))["kernel"]
    report = lj.check(method, params)
    assert repr(report).startswith("Report(100 leaves, trained: 25,600 of")
    for thing in (lj.select("**"), method, report, tapped, target, adapted, quantized, lj.Absent((3,), "float32")):
        assert "\n" not in repr(thing) and len(repr(thing)) < 300, repr(thing)[:300]
    assert len(repr(delta).splitlines()) == 21 and "... 81 more" in repr(delta)
    assert len(str(report).splitlines()) == 102


LAYOUTS = [
    ("Flax", nn.Conv(5, (3, 2)).init(KEY, jnp.ones((1, 4, 4, 4)))["params"], "kernel", "kkio"),
    ("Flax, one dimension", nn.Conv(5, (3,)).init(KEY, jnp.ones((1, 4, 4)))["params"], "kernel", "kio"),
    ("Equinox", eqx.filter(eqx.nn.Conv2d(4, 5, (3, 2), key=KEY), eqx.is_array), "weight", "oikk"),
    ("Haiku", {"net/conv2_d": {"w": jnp.ones((3, 2, 4, 5))}}, "net/conv2_d/w", "kkio"),
    ("Keras", [jnp.ones((3, 2, 4, 5)), jnp.ones(5)], "0", "kkio"),  # trainable_variables
]


@pytest.mark.parametrize(("params", "path", "axes"), [layout[1:] for layout in LAYOUTS], ids=[x[0] for x in LAYOUTS])
def test_the_axes_of_a_convolution_are_proposed(params, path, axes):
    with pytest.raises(ValueError, match=r"for a convolution.*; i input, o output, k window") as caught:
        lj.lora(lj.select(path), rank=2).init(KEY, params)
    assert f"select(..., axes={{{path!r}: {axes!r}}})" in str(caught.value)
    proposed = lj.select(path, axes={path: axes})
    (factors,) = lj.lora(proposed, rank=2).init(KEY, params).values()
    assert 4 in factors["a"].shape[:-1] and factors["b"].shape == (2, 5)


def test_all_matrices_of_a_model_with_norms():
    stacked = {"h": {"kernel": normal(3, 8, 6), "scale": normal(3, 8)}, "wte": {"embedding": normal(9, 8)}}
    axes = {"h/kernel": "sio", "h/scale": "so"}
    assert lj.select("**", ndim=2)(PARAMS) == {"dense/kernel": "io"}
    assert lj.select("**", ndim=2, axes=axes)(stacked) == {"h/kernel": "sio", "wte/embedding": "vo"}
    method = lj.lora(lj.select("**", ndim=2), rank=2)
    assert method.spec["ndim"] == 2 and set(method.init(KEY, PARAMS)) == {"dense/kernel"}
    assert set(lj.from_spec(method.spec).init(KEY, PARAMS)) == {"dense/kernel"}
    with pytest.raises(ValueError, match=r"select\('\*\*', ndim=4\) leaves no parameter"):
        lj.select("**", ndim=4)(PARAMS)


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
def test_numbers_that_do_not_train_are_named(dtype):
    params = PARAMS | {"frozen": {"kernel": jnp.ones((8, 6), dtype), "scale": jnp.ones(6)}}
    with pytest.raises(ValueError, match=f"'frozen/kernel' matches no parameter: frozen/kernel is {dtype}, and only"):
        lj.lora(lj.select("frozen/kernel"), rank=2).init(KEY, params)
    report = lj.check(lj.lora(lj.select("**/kernel"), rank=2), params)
    assert f"none: {dtype} does not train" in str(report) and report.trained == 28
    for exclude in ("frozen/**", "frozen/kernel"):  # an exclude may match numbers that do not train alone
        selection = lj.select("**", ndim=2, exclude=exclude)
        assert selection(params) == {"dense/kernel": "io"}
        for method in (lj.lora(selection, rank=2), lj.tune(selection)):
            assert "frozen" not in str(lj.check(method, params))
        assert lj.quantize(params, selection)["frozen"]["kernel"] is params["frozen"]["kernel"]


def test_a_train_state_with_a_delta_goes_through_flax_serialization(monkeypatch):
    monkeypatch.delitem(serialization._STATE_DICT_REGISTRY, lj.Delta, raising=False)  # of lora_jax.checkpoints
    delta = LORA.init(KEY, PARAMS)
    state = TrainState.create(apply_fn=None, params=delta, tx=lj.freeze_base(optax.adam(1e-3)))
    again = serialization.from_bytes(state, serialization.to_bytes(state))
    assert isinstance(again.params, lj.Delta)
    jax.tree.map(np.testing.assert_array_equal, again.params, delta)
