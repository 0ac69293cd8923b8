"""Prefixes against transformers' models, whose embeddings or blocks' outputs are replaced by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.helpers.gpt2 import EMBED, LAYER, SIZES, D, V
from tests.helpers.gpt2 import PREFIXED as IDS
from tests.helpers.gpt2 import PREFIXED_MASK as MASK
from tests.helpers.reference import close, random_delta

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(model of transformers, ours, its parameters) by `tie`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lora_jax.interop import hf

    @functools.cache
    def make(tie):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            **SIZES, bos_token_id=0, eos_token_id=0, initializer_range=0.3, tie_word_embeddings=tie
        )
        model = transformers.GPT2LMHeadModel(config).eval()
        folder = tmp_path_factory.mktemp(f"tie-{tie}")
        model.save_pretrained(folder)
        return model, *hf.load(folder)[:2]

    return make


def run_theirs(torch: Any, model: Any, embeds: Any, **kwargs: Any) -> Any:
    """Logits, 0 at padding; positions count from the first real token."""
    real = torch.tensor(MASK)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = model(inputs_embeds=embeds, attention_mask=real.long(), position_ids=positions, **kwargs).logits
    return torch.where(real[..., None], logits, 0.0)


def value_and_grad(model: Any, method: lj.ParamTransform, params: Any, delta: Any) -> Any:
    def loss(delta):
        out = lj.lift(model.apply, on_dense="error")({"params": method.apply(params, delta)}, IDS, MASK)
        out = jnp.where(MASK[..., None], out, 0.0)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(delta)


@pytest.mark.parametrize("tie", [True, False])
def test_prefix_embeddings_as_rows_placed_by_hand(theirs, tie):
    """1e-5 of the largest logit, gradients of the rows 2e-5 of their largest. The head has no row of the prefix."""
    torch = pytest.importorskip("torch")
    hf_model, model, params = theirs(tie)
    delta = random_delta(EMBED, params, size=0.5)
    (_, out), grads = value_and_grad(model, EMBED, params, delta)
    rows = torch.tensor(np.asarray(delta["wte/embedding"]["rows"]), requires_grad=True)
    embeds = hf_model.transformer.wte(torch.tensor(np.minimum(IDS, V - 1)).long()).detach()
    which = torch.tensor(IDS - V).long()
    embeds = torch.where((which >= 0)[..., None], rows[which.clamp(min=0)], embeds)
    logits = run_theirs(torch, hf_model, embeds)
    logits.sin().sum().backward()
    assert out.shape == (2, 9, V)
    close(out, logits.detach().numpy())
    close(grads["wte/embedding"]["rows"], rows.grad.numpy(), 2e-5)


def test_prefix_layers_as_outputs_replaced_by_hand(theirs):
    torch = pytest.importorskip("torch")
    hf_model, model, params = theirs(True)
    delta = random_delta(LAYER, params, size=0.5)
    (_, out), grads = value_and_grad(model, LAYER, params, delta)
    values = torch.tensor(np.asarray(delta["@block_out/prefix_layer"]["values"]), requires_grad=True)
    which = torch.tensor(IDS - V).long()

    def hook(_, __, out, n):
        x = out[0] if isinstance(out, tuple) else out
        x = torch.where((which >= 0)[..., None], values[n][which.clamp(min=0)], x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    hooks = [
        block.register_forward_hook(functools.partial(hook, n=n)) for n, block in enumerate(hf_model.transformer.h)
    ]
    embeds = hf_model.transformer.wte(torch.tensor(np.minimum(IDS, V - 1)).long()).detach()
    logits = run_theirs(torch, hf_model, embeds)
    logits.sin().sum().backward()
    for hook in hooks:
        hook.remove()
    close(out, logits.detach().numpy())
    close(grads["@block_out/prefix_layer"]["values"], values.grad.numpy(), 2e-5)


def test_prefixes_of_an_encoder(tmp_path):
    """Behind the first token of a RoBERTa, which the head reads: rows and layers at once, each by hand."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lora_jax.interop import hf

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        type_vocab_size=1,
        num_labels=3,
        initializer_range=0.3,
    )
    hf_model = transformers.RobertaForSequenceClassification(config).eval()
    hf_model.save_pretrained(tmp_path)
    model, params, _ = hf.load(tmp_path)
    ids = np.array([[0, V, V + 1, 3, 4, 2, 1, 1], [0, V, V + 1, 8, 9, 10, 11, 2]], np.int32)
    mask = ids != 1
    which, real = torch.tensor(ids - V).long(), torch.tensor(mask)
    plain_ids = torch.tensor(np.minimum(ids, V - 1)).long()
    embeds = hf_model.roberta.embeddings.word_embeddings(plain_ids).detach()
    positions = torch.where(real, real.cumsum(1) + 1, 1)
    embed = lj.prefix_embedding(lj.select("embeddings/word/embedding"), prefix=2)
    sites = {"block_out": (2, D)}
    layers = lj.prefix_layer(sites, vocabulary=V, prefix=2)
    for method, by_layer in ((embed, False), (layers, True)):
        delta = random_delta(method, params, size=0.5)
        (trained,) = (torch.tensor(np.asarray(x)) for x in jax.tree.leaves(delta))

        def put(x, vectors):
            return torch.where((which >= 0)[..., None], vectors[which.clamp(min=0)], x)

        hooks = []
        for n, block in enumerate(hf_model.roberta.encoder.layer if by_layer else ()):
            hook = lambda _, __, out, n=n, vectors=trained: put(out, vectors[n])  # noqa: E731
            hooks.append(block.register_forward_hook(hook))
        inputs = embeds if by_layer else put(embeds, trained)
        with torch.no_grad():
            logits = hf_model(inputs_embeds=inputs, attention_mask=real.long(), position_ids=positions).logits
        for hook in hooks:
            hook.remove()
        got = jax.jit(lj.lift(model.apply, on_dense="error"))({"params": method.apply(params, delta)}, ids, mask)
        close(got, logits.numpy())
