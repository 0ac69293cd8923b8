"""DoRA, rsLoRA's scale and PiSSA beside PEFT's own implementation: outputs, merged weights, gradients."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("peft")

import peft
import torch
from jax import lax
from transformers.pytorch_utils import Conv1D

import lora_jax as lj
from tests.helpers.reference import close, normal, same

KEY = jax.random.key(0)


def of_torch(array):
    return array.detach().numpy().T.copy()  # torch goes on writing into its own


FACTORS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b", "lora_magnitude_vector": "m"}


def factors_of(made, paths, what=lambda parameter: parameter):
    """What trains in a PEFT model, or its gradients, as `{our path: {factor: array}}`."""
    factors = {}
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            module, kind = name.removeprefix("base_model.model.").split(".")[:2]
            factors.setdefault(paths[module], {})[FACTORS[kind]] = of_torch(what(parameter))
    return factors


def moved(made):
    """The PEFT model with its factors away from their first values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                step = 0.3 * torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + step) if "magnitude" in name else parameter + step)
    return made


PATHS = {"table": "table/embedding", "fc": "fc/weight", "proj": "proj/kernel"}
PEFT = [
    # vocabulary, three widths, rank, alpha, fields
    ((11, 6, 5, 7), 2, 3.0, {"use_dora": True}),
    ((3, 2, 4, 1), 1, 5.0, {"use_dora": True}),
    ((17, 8, 3, 9), 3, 0.5, {"use_dora": True, "use_rslora": True}),
    ((9, 5, 7, 4), 4, 3.0, {"use_rslora": True}),
]


@pytest.mark.parametrize("sizes, rank, alpha, fields", PEFT)
def test_forward_merge_and_gradients_are_peft_s(sizes, rank, alpha, fields):
    """A look-up, a Linear and a Conv1D, with DoRA, with rsLoRA's scale, and with both; float32 throughout."""
    vocab, *widths = sizes

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(vocab, widths[0])
            self.fc = torch.nn.Linear(widths[0], widths[1])
            self.proj = Conv1D(widths[2], widths[1])
            torch.nn.init.normal_(self.proj.weight)

        def forward(self, ids):
            return self.proj(torch.tanh(self.fc(self.table(ids))))

    torch.manual_seed(0)
    net = Net()
    params = {
        "table": {"embedding": of_torch(net.table.weight.T)},
        "fc": {"weight": of_torch(net.fc.weight.T), "bias": of_torch(net.fc.bias)},
        "proj": {"kernel": of_torch(net.proj.weight.T), "bias": of_torch(net.proj.bias)},
    }
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(PATHS), fan_in_fan_out=False, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is true for one of the modules only
        made = moved(peft.get_peft_model(net, config))
    factory = lj.dora if "use_dora" in fields else lj.lora
    rule = "alpha/sqrt(r)" if "use_rslora" in fields else "alpha/r"
    method = factory(lj.select(*PATHS.values()), rank=rank, alpha=alpha, scale_rule=rule)
    delta = jax.jit(method.init)(KEY, params)
    delta = lj.Delta({path: delta[path] | factors for path, factors in factors_of(made, PATHS).items()})
    ids = np.random.default_rng(0).integers(0, vocab, (4, 3)).astype(np.int32)

    def run(params, delta):
        hidden = params["table"]["embedding"][ids] @ params["fc"]["weight"].T + params["fc"]["bias"][None, None]
        return jnp.tanh(hidden) @ params["proj"]["kernel"] + params["proj"]["bias"][None, None]

    def loss(delta):
        out = lj.lift(run, on_dense="error")(method.apply(params, delta), delta)
        return jnp.sum(jnp.sin(out)), out

    @jax.jit
    def measured(delta):
        return jax.value_and_grad(loss, has_aux=True)(delta), lj.merge(method.apply(params, delta))

    ((_, out), grads), merged = measured(delta)
    want = made(torch.tensor(ids).long())
    torch.sin(want).sum().backward()
    close(out, want.detach().numpy())
    got = {path: {name: g for name, g in f.items() if name != "fixed_norm"} for path, f in grads.items()}
    close(got, factors_of(made, PATHS, lambda parameter: parameter.grad), 2e-5)
    theirs = made.merge_and_unload()
    close(merged["table"]["embedding"], of_torch(theirs.table.weight.T))
    close(merged["fc"]["weight"], of_torch(theirs.fc.weight.T))
    close(merged["proj"]["kernel"], of_torch(theirs.proj.weight.T))


def test_a_convolution_is_peft_s():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, (3, 2), stride=(2, 1)))
    kernel = jax.device_put(net[0].weight.detach().numpy().transpose(2, 3, 1, 0).copy())
    made = moved(peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True)))
    method = lj.dora(lj.select("w", axes="kkio"), rank=2, alpha=3)
    x = np.random.default_rng(0).normal(size=(2, 3, 9, 7)).astype(np.float32)

    def ours(of):
        """(r, in, k, k), (out, r, 1, 1) and (1, out, 1, 1) in our layouts."""
        arrays = {n.split(".")[3]: of(p).detach().numpy() for n, p in made.named_parameters() if p.requires_grad}
        a, b = arrays["lora_A"].transpose(2, 3, 1, 0), arrays["lora_B"][:, :, 0, 0].T
        return {"a": a, "b": b, "m": arrays["lora_magnitude_vector"].reshape(-1)}

    first = jax.jit(method.init)(KEY, {"w": kernel})
    delta = lj.Delta({"w": first["w"] | ours(lambda p: p)})

    def loss(delta):
        def convolve(p):
            return lax.conv_general_dilated(x, p["w"], (2, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW"))

        out = lj.lift(convolve, on_dense="error")(method.apply({"w": kernel}, delta))
        out = out + jax.device_put(net[0].bias.detach().numpy().copy()).reshape(1, -1, 1, 1)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(delta)
    want = made(torch.tensor(x))
    torch.sin(want).sum().backward()
    close(out, want.detach().numpy())
    del grads["w"]["fixed_norm"]
    close(dict(grads["w"]), jax.tree.map(jnp.asarray, ours(lambda p: p.grad)), 2e-5)


def test_dropout_under_a_fixed_mask_is_peft_s():
    """x W + (m/n - 1) drop(x) W + m/n s drop(x) A B: output, and gradients of factors and input."""
    width, rate, key = 8, 0.25, jax.random.key(3)
    # an identity adapter on a base of zeros shows the mask, which depends on key and path alone
    seen = lj.lora(lj.select("w"), rank=width, dropout=rate)
    identity = np.eye(width, dtype=np.float32)
    eye = lj.Delta({"w": {"a": identity, "b": identity}})
    x = normal(5, width)
    product = lj.lift(lambda p, x: x @ p["w"], on_dense="error")
    mask = jax.jit(product)(seen.apply({"w": 0 * identity}, eye, key=key), np.ones(x.shape, np.float32))
    assert len(np.unique(mask)) == 2

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(width, 6, bias=False))
    params = {"w": of_torch(net[0].weight)}
    fields = {"r": 2, "lora_alpha": 3, "lora_dropout": rate, "use_dora": True}
    made = moved(peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], **fields))).train()

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(np.asarray(mask))

    net[0].lora_dropout["default"] = Masked()
    method = lj.dora(lj.select("w"), rank=2, alpha=3, dropout=rate)
    delta = lj.Delta({"w": jax.jit(method.init)(KEY, params)["w"] | factors_of(made, {"0": "w"})["w"]})

    def loss(delta, x):
        out = product(method.apply(params, delta, key=key), x)
        return jnp.sum(jnp.sin(out)), out

    (_, out), (grads, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(delta, x)
    there = torch.tensor(np.asarray(x), requires_grad=True)
    want = made(there)
    torch.sin(want).sum().backward()
    close(out, want.detach().numpy())
    del grads["w"]["fixed_norm"]
    close(dict(grads["w"]), factors_of(made, {"0": "w"}, lambda p: p.grad)["w"], 2e-5)
    close(of_x, jax.device_put(there.grad.numpy().copy()), 2e-5)
    undropped = jax.jit(lambda d: [product(method.apply(params, d, **no_key), x) for no_key in ({}, {"key": None})])
    same(*undropped(delta))
    assert np.any(np.asarray(out) != np.asarray(undropped(delta)[0]))


def test_a_fused_layer_of_peft_s_is_kernels_that_share_their_a():
    """GPT-2's c_attn, rank 2: one A; B, m and the norm of each kernel are columns of the fused ones."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(Conv1D(18, 6))
    torch.nn.init.normal_(net[0].weight)
    parts = np.split(of_torch(net[0].weight.T), 3, 1)
    names = ("query", "key", "value")
    params = {"attn": {name: {"kernel": part} for name, part in zip(names, parts, strict=True)}}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True, fan_in_fan_out=True)
    made = moved(peft.get_peft_model(net, config))
    method = lj.dora(lj.select("**/kernel"), rank=2, alpha=3, shared="**/kernel")

    def split(fused):
        """One module's factors as ours."""
        b, m = np.split(fused["b"], 3, 1), np.split(fused["m"], 3)
        each = {f"attn/{name}/kernel": {"b": b[n], "m": m[n]} for n, name in enumerate(names)}
        return {"@shared/attn": {"a": fused["a"]}} | each

    first = jax.jit(method.init)(KEY, params)
    assert sorted(first) == ["@shared/attn", *sorted(f"attn/{name}/kernel" for name in names)]
    delta = split(factors_of(made, {"0": "w"})["w"])
    delta = lj.Delta({path: first[path] | factors for path, factors in delta.items()})
    x = normal(4, 6)

    def loss(delta):
        def run(p):
            return jnp.concatenate([x @ p["attn"][name]["kernel"] for name in names], -1)

        out = lj.lift(run, on_dense="error")(method.apply(params, delta))
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(delta)
    want = made(torch.tensor(np.asarray(x))) - net[0].bias
    torch.sin(want).sum().backward()
    close(out, want.detach().numpy())
    got = {path: {name: g for name, g in f.items() if name != "fixed_norm"} for path, f in grads.items()}
    close(got, split(factors_of(made, {"0": "w"}, lambda p: p.grad)["w"]), 2e-5)


def initialized(module, rank, alpha):
    """PEFT's PiSSA on one module (whose weight it rewrites)."""
    fields = {"r": rank, "lora_alpha": alpha, "init_lora_weights": "pissa", "target_modules": ["0"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is what the module needs
        return peft.get_peft_model(torch.nn.Sequential(module), peft.LoraConfig(**fields))


@pytest.mark.parametrize(
    "make, axes, sizes, rank, alpha",
    [
        (torch.nn.Linear, "oi", (7, 5), 2, 3.0),
        (torch.nn.Linear, "oi", (3, 9), 3, 0.5),
        (lambda i, o: Conv1D(o, i), "io", (6, 4), 1, 5.0),
    ],
)
def test_pissa_begins_and_moves_as_peft_s(make, axes, sizes, rank, alpha):
    """PEFT keeps W - s A0 B0 and adds s A B, here W stays and the change is s (A B - A0 B0); the same steps of A and B
    give the same function. Signs of singular vectors are free: theirs are turned to ours, with the steps."""
    torch.manual_seed(0)
    module = make(*sizes)
    torch.nn.init.normal_(module.weight)
    w = module.weight.detach().numpy().copy()
    params, x = {"w": jnp.asarray(w)}, normal(4, sizes[0])
    plain = module(torch.tensor(np.asarray(x))).detach().numpy()
    made = initialized(module, rank, alpha)
    assert np.max(np.abs(w - module.weight.detach().numpy())) > 0.1
    method = lj.pissa(lj.select("w", axes=axes), rank=rank, alpha=alpha)
    delta = jax.jit(method.init)(KEY, params)
    start = factors_of(made, {"0": "w"})["w"]
    signs = np.sign(np.sum(np.asarray(start["a"] * delta["w"]["a"]), 0))
    turned = {"a": start["a"] * signs[None], "b": start["b"] * signs[:, None]}
    close({name: delta["w"][name] for name in "ab"}, turned)

    moved(made)
    now = factors_of(made, {"0": "w"})["w"]
    step = {"a": (now["a"] - start["a"]) * signs[None], "b": (now["b"] - start["b"]) * signs[:, None]}
    delta["w"] |= {name: np.asarray(delta["w"][name]) + step[name] for name in "ab"}

    def loss(delta):
        run = lj.lift(lambda p: x @ (p["w"] if axes == "io" else p["w"].T), on_dense="error")
        out = run(method.apply(params, delta)) + jax.device_put(module.bias.detach().numpy().copy())[None]
        return jnp.sum(jnp.sin(out)), out

    @jax.jit
    def measured(delta):
        return jax.value_and_grad(loss, has_aux=True)(delta), lj.merge(method.apply(params, delta))["w"]

    ((_, out), grads), merged = measured(delta)
    want = made(torch.tensor(np.asarray(x)))
    torch.sin(want).sum().backward()
    close(out, want.detach().numpy())
    assert np.max(np.abs(plain - np.asarray(out))) > 0.1
    theirs = factors_of(made, {"0": "w"}, lambda p: p.grad)["w"]
    theirs = {"a": theirs["a"] * signs[None], "b": theirs["b"] * signs[:, None]}
    close({name: grads["w"][name] for name in "ab"}, theirs, 2e-5)
    close(merged, jax.device_put(made.merge_and_unload()[0].weight.detach().numpy().copy()))
