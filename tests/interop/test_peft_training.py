"""Arithmetic beside PEFT's: gradients and optimizer steps, bfloat16 (conformance 18, 19, 25)."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("peft")

import peft as theirs
import torch
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.interop import peft
from tests.helpers.peft_models import TOKENS, adapter, base, ours, quietly, written

WEIGHTS = "adapter_model.safetensors"


def loss_here(kind, method, delta):
    model, params = base(kind).model, base(kind).params
    adapted = method.apply(params, delta)
    out = lj.lift(model.apply, on_dense="error")({"params": adapted}, TOKENS)
    if kind == "gpt2":
        out, labels = out[:, :-1], jnp.asarray(TOKENS[:, 1:])
    else:
        labels = jnp.asarray([0, 2, 1])
    return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()


def loss_there(kind, made):
    tokens = torch.tensor(TOKENS).long()
    labels = tokens if kind == "gpt2" else torch.tensor([0, 2, 1])
    return made(tokens, labels=labels).loss


FIELDS = {
    "gpt2": {
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["c_attn", "c_fc"],
        "lora_bias": True,
    },
    "roberta": {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 7, "bias": "lora_only"},
}


def as_arrays(made):
    """What trains, and its gradients, by the names of the file."""
    state = {name: parameter for name, parameter in made.named_parameters() if parameter.requires_grad}
    short = {name: name.replace(".modules_to_save.default", "").replace(".default", "") for name in state}
    return {short[name]: (parameter, parameter.grad) for name, parameter in state.items()}


def read(kind, folder, arrays):
    """Arrays by the file's names as a delta: through the file."""
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    return peft.load(folder, base(kind).params)[1]


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_conformance_25_gradients_and_an_adamw_step_are_torch_s(kind, tmp_path):
    made = adapter(kind, **FIELDS[kind])
    folder = written(made, tmp_path)
    method, delta = peft.load(folder, base(kind).params)
    names = list(load_file(folder / WEIGHTS))
    loss, grads = jax.jit(jax.value_and_grad(lambda d: loss_here(kind, method, d)))(delta)
    want = loss_there(kind, made)
    want.backward()
    np.testing.assert_allclose(float(loss), float(want.detach()), rtol=1e-6)
    arrays = as_arrays(made)
    assert sorted(arrays) == sorted(names)
    torch_grads = read(kind, folder, {name: arrays[name][1].numpy() for name in names})
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(torch_grads))
    assert largest > 0.01
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * largest), grads, torch_grads)

    # eps is far from the smallest gradients: Adam's first step is otherwise their sign
    rate, decay, eps = 0.01, 0.1, 1e-3
    torch.optim.AdamW([p for p, _ in arrays.values()], lr=rate, weight_decay=decay, eps=eps).step()
    tx = lj.freeze_base(optax.adamw(rate, weight_decay=decay, eps=eps))
    updates, _ = tx.update(grads, tx.init(delta), delta)
    stepped = optax.apply_updates(delta, updates)
    after = read(kind, folder, {name: arrays[name][0].detach().numpy() for name in names})
    jax.tree.map(lambda x, w: np.testing.assert_allclose(x, w, rtol=0, atol=1e-5), stepped, after)
    assert max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (stepped, delta)), strict=True)) > 5e-3


def test_conformance_25_a_new_adapter_leaves_the_base_s_outputs_bit_for_bit(tmp_path):
    fresh = quietly(
        theirs.get_peft_model, copy.deepcopy(base("gpt2").torch), theirs.LoraConfig(r=2, target_modules=["c_attn"])
    )
    method, delta = peft.load(written(fresh, tmp_path), base("gpt2").params)
    assert np.any(delta["@shared/h_0/attn"]["a"]) and not np.any(delta["h_0/attn/key/kernel"]["b"])
    np.testing.assert_array_equal(
        ours("gpt2", method.apply(base("gpt2").params, delta)), ours("gpt2", base("gpt2").params)
    )


# --- bfloat16 -----------------------------------------------------------------------------------------------------


def layer_of_peft(rank, alpha, exactly):
    """A PEFT layer of random numbers on a bfloat16 base, and the same here; `exactly`: sums of products are exact."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False)).to(torch.bfloat16)
    made = quietly(theirs.get_peft_model, net, theirs.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"]))
    layer = made.base_model.model[0]
    with torch.no_grad():
        for parameter in (layer.lora_A.default.weight, layer.lora_B.default.weight):
            assert parameter.dtype == torch.float32
            parameter.copy_(torch.randint(-40, 40, parameter.shape) / 64) if exactly else parameter.normal_(0, 0.1)
    weight, a, b = (
        jnp.asarray(x.detach().float().numpy().T)
        for x in (layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight)
    )
    params, delta = {"kernel": weight.astype(jnp.bfloat16)}, lj.Delta({"kernel": {"a": a, "b": b}})
    return layer.eval(), params, lj.lora(lj.select("kernel"), rank=rank, alpha=alpha), delta


def bits(x):
    return np.asarray(x).view(np.uint16)


def torch_bits(x):
    return x.detach().contiguous().view(torch.uint16).numpy()


@pytest.mark.parametrize("alpha", [4, -1, 2])
def test_conformance_18_merging_rounds_once_as_peft_s_merge_does(alpha):
    layer, params, method, delta = layer_of_peft(4, alpha, exactly=True)
    adapted = method.apply(params, delta)
    merged = lj.merge(adapted)["kernel"]
    safe, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    plain.merge()
    safe.merge(safe_merge=True)
    np.testing.assert_array_equal(bits(merged.T), torch_bits(plain.get_base_layer().weight))
    # PEFT's safe_merge rounds the change before it adds it, which is another sum
    change = adapted["kernel"].delta().astype(jnp.bfloat16)
    np.testing.assert_array_equal(bits((params["kernel"] + change).T), torch_bits(safe.get_base_layer().weight))
    assert np.any(torch_bits(safe.get_base_layer().weight) != torch_bits(plain.get_base_layer().weight))


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_conformance_19_a_layer_in_bfloat16_is_peft_s_to_one_last_place(alpha):
    """PEFT's low-rank branch is float32, ours in the layer's type: they differ by roundings of that branch's terms."""
    layer, params, method, delta = layer_of_peft(4, alpha, exactly=False)
    x = torch.randn(200, 32).to(torch.bfloat16)
    want, plain = layer(x), layer.base_layer(x).detach().float().numpy()
    assert want.dtype == torch.bfloat16
    dense = nn.Dense(24, use_bias=False, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    run = lj.lift(dense.apply, on_dense="error")
    got = run({"params": method.apply(params, delta)}, jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    want = want.detach().float().numpy()
    error = np.abs(np.asarray(got, np.float32) - want)
    factors = delta["kernel"]
    terms = np.abs(plain) + alpha / 4 * np.abs(x.float().numpy() @ factors["a"]) @ np.abs(factors["b"])
    assert error.max() <= last_place(np.abs(want).max())  # of the layer's largest output
    assert np.all(error <= 2 * last_place(terms))  # of what is summed in each output
    assert np.abs(want - plain).max() > 4 * last_place(np.abs(want).max())


def last_place(x):
    """The spacing of bfloat16 numbers, of 8 binary digits, at x."""
    return np.exp2(np.floor(np.log2(x)) - 7)
