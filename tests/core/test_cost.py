"""Matmul FLOPs of a LoRA step on a small GPT-2 or Llama, counted from the jaxpr, against the closed form.

With t = batch * length tokens, d the width, q that of all heads (k of those of keys and values), f the inner width, L
layers, r the rank, n labelled positions an example; a GPT-2 has q = k = d, f = 4 d and no gate:

    W = 2 t L (2 d q + 2 d k + 3 d f)    forward products with weights: query, out, key, value, gate, up, down
    A = 2 t L (2 length q)               Q K^T and P V: all queries, also where several share a head of keys
    T = sum over adapted weights of 2 t (in + out) r
    H = 2 batch n d vocabulary           the head on the labelled positions

Forward W + A + T + H. Backward: no frozen weight has a gradient, so each product with one costs W' once (the
gradient of its input), each product of activations twice (2 A'), the two thin ones twice (2 T), the head once (H).
Below the lowest adapted weight nothing is needed: in layer 0 the gradients of the inputs of query, key and value
(d (q + 2 k) of W), of the keys unless they are adapted (a quarter of the layer's 2 A), and of the inputs of the adapted
ones (part of 2 T). Under scan one body serves all layers, so that W' = W, A' = A. With remat at most one more
forward without H.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax as lj
from lora_jax.core.dropout import drop
from lora_jax.models import gpt2, llama
from lora_jax.models.family import family_of
from lora_jax.planning.flops import count, equations

BATCH, LENGTH, LABELLED, RANK = 2, 12, 5, 2
CONFIG = gpt2.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
_SIZES: dict[str, Any] = {"vocab_size": 50, "max_length": 16, "hidden": 16, "layers": 2, "inner": 28, "head_size": 6}
_SIZES |= {"heads": 4, "window": 5, "local": (True, False)}
LLAMAS = {
    "llama": llama.LlamaConfig(**(_SIZES | {"window": None, "local": ()}), key_value_heads=2),
    "qwen2": llama.LlamaConfig("qwen2", **_SIZES, **llama.FAMILIES["qwen2"], key_value_heads=4),
    "gemma3": llama.LlamaConfig("gemma3_text", **_SIZES, **llama.FAMILIES["gemma3_text"], key_value_heads=1),
}
TOKENS = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
KEY = jax.random.key(0)
PLACES = jax.ShapeDtypeStruct((BATCH, LABELLED), jnp.int32)
SELECTED = {
    "query and value": ("**/attn/{query,value}/kernel", ("query", "value")),
    "attention": ("**/attn/*/kernel", ("query", "key", "value", "out")),
    "all": ("**/{attn,mlp}/*/kernel", ("query", "key", "value", "out", "gate", "up", "down")),
}


def matrices(config: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the kernels of a layer."""
    if isinstance(config, gpt2.GPT2Config):
        d = config.n_embd
        return dict.fromkeys(("query", "key", "value", "out"), (d, d)) | {"up": (d, 4 * d), "down": (4 * d, d)}
    d, size, inner = config.hidden, config.head_size, config.inner
    q, k = config.heads * size, config.key_value_heads * size
    attention = {"query": (d, q), "key": (d, k), "value": (d, k), "out": (q, d)}
    return attention | {"gate": (d, inner), "up": (d, inner), "down": (inner, d)}


def closed_form(names: tuple[str, ...], *, scan: bool, remat: bool, config: Any = CONFIG) -> float:
    t, sizes, layers = BATCH * LENGTH, matrices(config), family_of(config).dimensions(config).depth
    width, queries = sizes["query"]
    w = 2 * t * layers * sum(n * m for n, m in sizes.values())
    a = 2 * t * layers * (2 * LENGTH * queries)
    thin = layers * sum(2 * t * sum(sizes.get(name, ())) * RANK for name in names)
    head = 2 * BATCH * LABELLED * width * config.vocab_size
    w_back, a_back, thin_back = w, 2 * a, 2 * thin
    if not scan:
        first = ("query", "key", "value")
        w_back -= 2 * t * sum(math.prod(sizes[name]) for name in first)
        a_back -= 0 if "key" in names else 2 * t * LENGTH * queries
        thin_back -= sum(2 * t * width * RANK for name in names if name in first)
    again = w + a + thin if remat else 0
    return (w + a + thin + head) + (w_back + a_back + thin_back + head) + again


@functools.cache
def pieces(glob: str, bits: int = 0, config: Any = CONFIG, **options: Any) -> tuple[Any, Any, Any, Any]:
    """The lifted model, the method, and shapes of params and delta."""
    family = family_of(config)
    model = family.model(dataclasses.replace(config, **options))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    if bits:
        params = lj.quantize(params, lj.select("**/kernel", "wte/embedding", axes=family.axes), bits=bits)
    method = lj.lora(lj.select(glob, axes=family.axes), rank=RANK, alpha=8, dropout=0.1)
    return model, method, params, jax.eval_shape(method.init, jax.random.key(0), params)


def loss_of(apply: Any, params: Any, tokens: Any, places: Any) -> Any:
    logits = apply({"params": params}, tokens, labelled=places)
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])


def adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-3)


VARIANTS = {
    "plain": adamw,
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), adamw()),
    "accumulated": lambda: optax.MultiSteps(adamw(), 2).gradient_transformation(),
    "logged norm": adamw,
}


def step_flops(glob: str, variant: str = "plain", **options: Any) -> int:
    model, method, params, delta = pieces(glob, **options)
    forward = lj.lift(model.apply, on_dense="error")
    tx = lj.freeze_base(VARIANTS[variant]())

    def step(delta: Any, state: Any, params: Any, tokens: Any, places: Any) -> Any:
        key = jax.random.key(0)
        loss = lambda d: loss_of(forward, method.apply(params, d, key=key), tokens, places)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(delta)
        logged = optax.tree.norm(grads) if variant == "logged norm" else 0.0
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state, value, logged

    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps divides floats by integers
        return count(step, delta, jax.eval_shape(tx.init, delta), params, TOKENS, PLACES)


@pytest.mark.parametrize(("scan", "remat"), [(False, False), pytest.param(True, True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_quantized_base_costs_no_more_products(bits, scan, remat):
    glob, names = SELECTED["attention"]
    flops = step_flops(glob, bits=bits, scan_layers=scan, remat=remat)
    assert 0.99 <= flops / closed_form(names, scan=scan, remat=False) <= (1.01 if not remat else 1.5)
    assert flops == step_flops(glob, scan_layers=scan, remat=remat)


def quick_with(quick, cases):
    """The cases as parameters, all but the quick ones slow: the count of a selection and that of a variant add up."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("selected", "variant"),
    quick_with(
        lambda selected, variant: selected == "all" or variant == "plain", itertools.product(SELECTED, VARIANTS)
    ),
)
def test_a_loop_costs_the_closed_form(selected, variant):
    glob, names = SELECTED[selected]
    ratio = step_flops(glob, variant) / closed_form(names, scan=False, remat=False)
    assert 0.99 <= ratio <= 1.01, ratio


@pytest.mark.parametrize(
    ("selected", "variant"),
    quick_with(
        lambda selected, variant: (selected == "all") == (variant == "clipped"),
        itertools.product(SELECTED, ["plain", "clipped"]),
    ),
)
def test_a_scan_costs_the_closed_form(selected, variant):
    glob, names = SELECTED[selected]
    ratio = step_flops(glob, variant, scan_layers=True) / closed_form(names, scan=True, remat=False)
    assert 0.99 <= ratio <= 1.01, ratio


@pytest.mark.parametrize(
    ("selected", "scan"),
    quick_with(lambda selected, scan: selected == "all" or scan, itertools.product(SELECTED, [False, True])),
)
def test_remat_costs_at_most_one_more_forward(selected, scan):
    glob, names = SELECTED[selected]
    flops = step_flops(glob, "logged norm", scan_layers=scan, remat=True)
    assert closed_form(names, scan=scan, remat=False) < flops
    assert flops <= 1.01 * closed_form(names, scan=scan, remat=True)


def llama_cases():
    cases = itertools.product(LLAMAS, SELECTED, (False, True), (False, True), (0, 4))
    quick = {("llama", "query and value", False, False, 0), ("gemma3", "all", True, True, 4)}
    return quick_with(lambda *case: case in quick, cases)


@pytest.mark.parametrize(("name", "selected", "scan", "remat", "bits"), llama_cases())
def test_a_llama_costs_the_closed_form(name, selected, scan, remat, bits):
    """Grouped queries, a gate, a head of its own or the embedding, windows; a base in 4 bits too."""
    (glob, names), config = SELECTED[selected], LLAMAS[name]
    flops = step_flops(glob, "clipped", config=config, bits=bits, scan_layers=scan, remat=remat)
    form = functools.partial(closed_form, names, scan=scan, config=config)
    assert (form(remat=False) < flops) if remat else (0.99 * form(remat=False) <= flops)
    assert flops <= 1.01 * form(remat=remat)


@pytest.mark.parametrize("scan", [False, True])
def test_no_thin_product_contracts_two_axes(scan):
    """XLA would transpose whole activations for the gradient of a factor, which costs many times the product."""
    model, method, params, delta = pieces(SELECTED["all"][0], scan_layers=scan)
    forward = lj.lift(model.apply)

    def grads(delta: Any, params: Any, tokens: Any, places: Any) -> Any:
        return jax.grad(lambda d: loss_of(forward, method.apply(params, d), tokens, places))(delta)

    thin = 0
    for eqn in equations(jax.make_jaxpr(grads)(delta, params, TOKENS, PLACES).jaxpr):
        if eqn.primitive.name == "dot_general" and RANK in eqn.outvars[0].aval.shape:
            (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
            if not batched:  # else of attention, in a batch of two
                thin += 1
                assert len(contracted) == 1, eqn
    assert thin >= 6 * 3  # forward, and both gradients, of each kind of matrix


@pytest.mark.parametrize("entries", [12, 7])
def test_dropout_draws_half_a_word_an_entry(entries):
    drawn = [
        eqn.outvars[0].aval.size
        for eqn in equations(jax.make_jaxpr(lambda k, x: drop(k, x, 0.1))(KEY, jnp.ones((5, entries))).jaxpr)
        if eqn.primitive.name == "random_bits"
    ]
    assert drawn == [5 * -(-entries // 2)]


@pytest.mark.parametrize("form", ["delta", "joint"])
def test_a_train_state_costs_the_closed_form(form):
    """Flax's TrainState over the delta, or over base and delta with the trainable half differentiated."""
    glob, names = SELECTED["query and value"]
    model, method, params, delta = pieces(glob)
    forward = lj.lift(model.apply, on_dense="error")
    tx = lj.freeze_base(VARIANTS["clipped"]())
    tree = delta if form == "delta" else {"base": params, "delta": delta}
    state = jax.eval_shape(lambda tree: TrainState.create(apply_fn=forward, params=tree, tx=tx), tree)

    def step(state: Any, base: Any, tokens: Any, places: Any) -> Any:
        trainable, frozen = lj.partition(state.params)

        def loss(half: Any) -> Any:
            tree = lj.rejoin(half, frozen)
            base_, delta_ = (base, tree) if form == "delta" else (tree["base"], tree["delta"])
            return loss_of(state.apply_fn, method.apply(base_, delta_), tokens, places)

        grads = lj.rejoin(jax.grad(loss)(trainable), jax.tree.map(jnp.zeros_like, frozen))
        return state.apply_gradients(grads=grads), optax.tree.norm(grads)

    ratio = count(step, state, params, TOKENS, PLACES) / closed_form(names, scan=False, remat=False)
    assert 0.99 <= ratio <= 1.01, ratio


def test_the_joint_tree_differentiated_whole_costs_more():
    """So the count sees gradients of frozen weights."""
    glob, names = SELECTED["query and value"]
    model, method, params, delta = pieces(glob)
    forward = lj.lift(model.apply)

    def grads(tree: Any, tokens: Any, places: Any) -> Any:
        return jax.grad(lambda t: loss_of(forward, method.apply(t["base"], t["delta"]), tokens, places))(tree)

    joint = count(grads, {"base": params, "delta": delta}, TOKENS, PLACES)
    assert joint > 1.2 * closed_form(names, scan=False, remat=False)


def test_the_dense_form_costs_more():
    """W + scale * A B formed and differentiated, as a user would by hand."""
    glob, names = SELECTED["all"]
    model, method, params, delta = pieces(glob)

    def grads(delta: Any, params: Any, tokens: Any, places: Any) -> Any:
        def loss(delta: Any) -> Any:
            return loss_of(model.apply, lj.merge(method.apply(params, delta)), tokens, places)

        return jax.grad(loss)(delta)

    assert count(grads, delta, params, TOKENS, PLACES) > 1.2 * closed_form(names, scan=False, remat=False)


def test_the_base_alone_costs_the_forward():
    """The counter against a hand count, forward and full fine-tuning."""
    model, _, params, _ = pieces("**/kernel")
    t, d, layers = BATCH * LENGTH, CONFIG.n_embd, CONFIG.n_layer
    forward = 2 * t * layers * 12 * d**2 + 4 * t * layers * LENGTH * d + 2 * BATCH * LABELLED * d * CONFIG.vocab_size
    assert count(lambda p, x, n: loss_of(model.apply, p, x, n), params, TOKENS, PLACES) == forward
    full = count(jax.grad(lambda p, x, n: loss_of(model.apply, p, x, n)), params, TOKENS, PLACES)
    assert full == 3 * forward
    assert math.isclose(closed_form((), scan=True, remat=False), 2 * forward + 4 * t * layers * LENGTH * d)


def test_the_counter_multiplies_scans_and_counts_convolutions():
    x, w = jnp.ones((3, 8)), jnp.ones((8, 8))
    assert count(lambda x, w: x @ w, x, w) == 2 * 3 * 8 * 8
    scanned = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]  # noqa: E731
    assert count(scanned, x, w) == 5 * 2 * 3 * 8 * 8
    assert count(jax.jit(jax.checkpoint(scanned)), x, w) == 5 * 2 * 3 * 8 * 8
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    assert count(conv, jnp.ones((2, 7, 4)), jnp.ones((3, 4, 5))) == 2 * (2 * 5 * 5) * (3 * 4)
