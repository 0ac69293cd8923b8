"""Adapters against modules of torch, hooked into transformers' models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.helpers.gpt2 import ADAPTERS, IDS, MASK
from tests.helpers.reference import close, random_delta

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return functools.cache(lambda family: pair(family, tmp_path_factory.mktemp(family)))


def pair(family, folder):
    """A random model of transformers, where its sites are, and the same loaded here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lora_jax.interop import hf

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "type_vocab_size": 1}
    sizes |= {"intermediate_size": 12, "max_position_embeddings": 16, "num_labels": 3}
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        theirs = transformers.GPT2LMHeadModel(config).eval()
        places = [{"attention_out": block.attn, "mlp_out": block.mlp} for block in theirs.transformer.h]
    else:
        kind = {"bert": "Bert", "roberta": "Roberta"}[family]
        config = getattr(transformers, f"{kind}Config")(**sizes)
        theirs = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
        blocks = getattr(theirs, family).encoder.layer
        # before the residual sum, which their LayerNorm takes in
        places = [{"attention_out": b.attention.output.dense, "mlp_out": b.output.dense} for b in blocks]
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    theirs.save_pretrained(folder)
    model, params, _ = hf.load(folder)
    return theirs, places, model, params


def module(torch: Any, factors: dict[str, np.ndarray], activation: str) -> Any:
    """An adapter as a function of torch, and its tensors by our names."""
    tensors = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in factors.items()}
    act = {"gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "relu": torch.relu, "tanh": torch.tanh}

    def run(x):
        h = x
        if "scale" in tensors:
            h = torch.nn.functional.layer_norm(x, x.shape[-1:], tensors["scale"], tensors["shift"], 1e-5)
        return x + act[activation](h @ tensors["down"] + tensors["down_bias"]) @ tensors["up"] + tensors["up_bias"]

    return run, tensors


def hooked(torch: Any, places: list, delta: lj.Delta, activation: str, layers: list[int]) -> tuple[list, dict]:
    """Hooks that put the delta's adapters there, and all tensors: `{(key, layer): {factor: tensor}}`."""
    hooks, tensors = [], {}
    for key, stacked in delta.items():
        site = key.removeprefix("@").split("/")[0]
        for n, at in enumerate(layers):
            run, adapter_tensors = module(torch, jax.tree.map(lambda x: x[n], stacked), activation)  # noqa: B023

            def hook(_, __, out, run=run):
                return (run(out[0]), *out[1:]) if isinstance(out, tuple) else run(out)

            hooks.append(places[at][site].register_forward_hook(hook))
            tensors[key, n] = adapter_tensors
    return hooks, tensors


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt2", "H"),
        ("gpt2", "L"),
        ("gpt2", "D"),
        ("bert", "H"),
        ("roberta", "P"),
        pytest.param("bert", "P", marks=pytest.mark.slow),
        pytest.param("roberta", "H", marks=pytest.mark.slow),
    ],
)
def test_as_modules_of_torch_in_transformers(pairs, family, kind):
    """Output within 1e-5 of the largest entry, the gradient of every factor within 1e-4 of its largest."""
    torch = pytest.importorskip("torch")
    theirs, places, model, params = pairs(family)
    causal, options = family == "gpt2", ADAPTERS[kind]
    method = lj.adapter(**options)
    if not causal:
        method = lj.chain(method, lj.tune(lj.select("classifier/**")))
    delta = random_delta(method, params, size=0.4)
    delta = lj.Delta({path: delta[path] if path[0] == "@" else {"value": dig(params, path)} for path in delta})
    adapters = lj.Delta({path: factors for path, factors in delta.items() if path[0] == "@"})
    mask = MASK if causal else MASK[:, ::-1]

    @jax.jit
    def ours(delta):
        def loss(delta):
            base = lj.without_tuned(params, delta)
            out = lj.lift(model.apply, on_dense="error")({"params": method.apply(base, delta)}, IDS, mask)
            out = jnp.where(mask[..., None], out, 0.0) if causal else out
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(delta)

    (_, out), grads = ours(delta)
    theirs.zero_grad()
    layers = options.get("layers", [0, 1])
    hooks, tensors = hooked(torch, places, adapters, options.get("activation", "gelu"), layers)
    real = torch.tensor(np.ascontiguousarray(mask))
    positions = {"position_ids": (real.cumsum(1) - 1).clamp(min=0)} if causal else {}
    logits = theirs(torch.tensor(IDS).long(), attention_mask=real.long(), **positions).logits
    logits = torch.where(real[..., None], logits, 0.0) if causal else logits
    logits.sin().sum().backward()
    for hook in hooks:
        hook.remove()
    close(out, logits.detach().numpy())
    for (key, n), adapter_tensors in tensors.items():
        for name, tensor in adapter_tensors.items():
            close(grads[key][name][n], tensor.grad.numpy(), 1e-4)
    if not causal:
        heads = [x for name, x in theirs.named_parameters() if name.startswith("classifier")]
        want = sorted(float(x.grad.abs().sum()) for x in heads)
        got = sorted(float(jnp.abs(grads[key]["value"]).sum()) for key in grads if key[0] != "@")
        np.testing.assert_allclose(got, want, rtol=1e-4)


def dig(params: Any, path: str) -> Any:
    return functools.reduce(lambda node, name: node[name], path.split("/"), params)
