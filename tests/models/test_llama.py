"""Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3: as transformers has them, and against themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import generation, training
from lora_jax.interop import hf
from lora_jax.models.family import new_cache
from lora_jax.models.llama import FAMILIES, Llama, LlamaConfig
from tests.helpers.llamas import VARIANTS, torch_model
from tests.helpers.marks import slow_but

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 17
ALL = slow_but(VARIANTS, "llama, biases", "llama 3", "gemma3, defaults")
WINDOWED = slow_but(["llama", "mistral", "gemma2", "gemma3", "gemma3, defaults", "qwen2, windows"], "gemma2")
SOME = np.random.default_rng(0).integers(3, 101, (3, LENGTH), dtype=np.int32)
PADDED = np.arange(LENGTH) >= np.array([[4], [1], [0]])  # on the left


@functools.cache
def folder_of(name: str, tmp: str) -> str:
    torch_model(name).save_pretrained(tmp)
    return tmp


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return lambda name: folder_of(name, str(tmp_path_factory.mktemp("models", numbered=True) / "model"))


@functools.cache
def loaded(folder: str, scan_layers: bool = False):
    model, params, _ = hf.load(folder, scan_layers=scan_layers)
    return model, params, jax.jit(functools.partial(model.apply, {"params": params}))


def logits_of_torch(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = (np.cumsum(mask, 1) - 1).clip(0)
    with torch.no_grad():
        parts = (torch.tensor(part.astype(np.int64)) for part in (tokens, mask, positions))
        tokens, mask, positions = parts
        return model(tokens, attention_mask=mask, position_ids=positions).logits.numpy()


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name", ALL)
def test_logits_as_transformers_and_back(name, tmp_path):
    theirs = torch_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of_torch(theirs, SOME, PADDED)
    model, params, forward = loaded(str(tmp_path / "theirs"))
    close(np.asarray(forward(SOME, PADDED))[PADDED], expected[PADDED])
    scanned = loaded(str(tmp_path / "theirs"), scan_layers=True)[2]
    close(np.asarray(scanned(SOME, PADDED))[PADDED], expected[PADDED])
    hf.save(tmp_path / "ours", model, params)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_array_equal(logits_of_torch(back, SOME, PADDED), expected)


@pytest.mark.parametrize("name", WINDOWED)
@settings(max_examples=5)
@given(st.lists(st.integers(1, LENGTH), min_size=3, max_size=3), st.booleans())
def test_padding_does_not_matter(folders, name, lengths, left):
    forward = loaded(folders(name))[2]
    place, n = np.arange(LENGTH)[None, :], np.array(lengths)[:, None]
    mask = place >= LENGTH - n if left else place < n
    padded = np.asarray(forward(SOME, mask))
    assert np.isfinite(padded).all()
    for row in range(3):
        alone = np.asarray(forward(np.roll(SOME[row : row + 1], -int(mask[row].argmax()), 1)))
        close(padded[row, mask[row]], alone[0, : lengths[row]], 2e-5)


@pytest.mark.parametrize("name", WINDOWED)
def test_packed_sequences_are_as_alone(folders, name):
    forward = loaded(folders(name))[2]
    segments = np.array([[0] * 4 + [1] * 9 + [2] * 4] * 3, np.int32)
    packed = np.asarray(forward(SOME, segments=segments))
    for start, end in ((0, 4), (4, 13), (13, 17)):
        alone = np.asarray(forward(np.roll(SOME, -start, 1)))
        close(packed[:, start:end], alone[:, : end - start], 2e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", WINDOWED)
def test_cached_as_whole(folders, name, scan_layers):
    model, _, forward = loaded(folders(name), scan_layers)
    expected, cache, parts = np.asarray(forward(SOME, PADDED)), new_cache(model, 3, LENGTH), []
    for start, end in ((0, 8), (8, 9), (9, 10), (10, LENGTH)):
        logits, cache = forward(SOME[:, start:end], PADDED[:, start:end], cache=cache)
        parts.append(np.asarray(logits))
    close(np.concatenate(parts, axis=1)[PADDED], expected[PADDED], 2e-5)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens_are_transformers(folders, name, beams):
    theirs = torch_model(name)
    model, params, _ = loaded(folders(name))
    tokens, mask = np.where(PADDED, SOME, 0)[:, :9], PADDED[:, :9]
    options = {"max_new_tokens": 12, "num_beams": beams}
    ours = generation.generate(model, params, tokens, mask, eos=2, pad=0, **options)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens.astype(np.int64)), "attention_mask": torch.tensor(mask.astype(int))}
        expected = theirs.generate(**inputs, do_sample=False, **options)[:, 9:].numpy()
    np.testing.assert_array_equal(np.asarray(ours)[:, : expected.shape[1]], expected)
    assert not np.asarray(ours)[:, expected.shape[1] :].any()


@pytest.mark.parametrize("name", slow_but(["llama", "qwen2", "gemma3, defaults"], "llama"))
def test_classes_as_transformers_and_back(name, tmp_path):
    side = "right" if name == "llama" else "left"
    theirs = torch_model(name, "SequenceClassification", num_labels=3)
    theirs.save_pretrained(tmp_path / "theirs")
    mask = PADDED if side == "left" else PADDED[:, ::-1]
    tokens = np.where(mask, SOME, 0)
    positions = (np.cumsum(mask, 1) - 1).clip(0)
    parts = (torch.tensor(part.astype(np.int64)) for part in (tokens, mask, positions))
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        expected = theirs(**dict(zip(names, parts, strict=True))).logits.numpy()
    model, params, forward = loaded(str(tmp_path / "theirs"))
    assert (model.config.head, model.config.labels) == ("classification", 3)
    close(np.asarray(forward(tokens, mask)), expected)
    hf.save(tmp_path / "ours", model, params)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert back.config.num_labels == 3
    for path, weight in theirs.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[path].numpy(), weight.numpy())
    # the same backbone, with a new head of another size, or as a language model
    other, new, _ = hf.load(tmp_path / "theirs", head="classification", labels=5)
    assert other.config.labels == 5 and new["score"]["kernel"].shape == (48, 5)
    if model.config.tie:
        plain, _, _ = hf.load(tmp_path / "theirs", head="lm")
        assert plain.config.head is None


@pytest.mark.parametrize("family", slow_but(FAMILIES, "gemma2"))
def test_bfloat16_is_close_and_queries_in_blocks_are_all_at_once(family):
    """Grouped queries, windows, caps; bfloat16 has 8 bits: two layers stay within 3% of the largest logit."""
    sizes = {
        "vocab_size": 50,
        "hidden": 32,
        "layers": 2,
        "heads": 4,
        "key_value_heads": 2,
        "head_size": 10,
        "inner": 40,
    }
    config = LlamaConfig(
        family, **sizes, **FAMILIES[family], window=5, local=(True, False), score_cap=3.0, logit_cap=4.0
    )
    tokens, mask = jnp.asarray(SOME % 50), jnp.asarray(PADDED)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.1, x.shape), jnp.float32), shapes)

    def logits(**changes):
        model = Llama(dataclasses.replace(config, **changes))
        out = jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(params, model))(params)
        return out[0][1], out[1]

    def loss(params, model):
        out = model.apply({"params": params}, tokens, mask)
        return jnp.mean(jnp.square(out), where=mask[:, :, None]), jnp.where(mask[:, :, None], out, 0)

    expected, grads = logits()
    with jax.numpy_dtype_promotion("standard"):  # of the gradients of attention's scores
        half, _ = logits(dtype="bfloat16")
    assert half.dtype == jnp.float32
    close(half, expected, 0.03)
    blocks, of_blocks = logits(query_block=4)
    close(blocks, expected, 1e-5)
    for ours, theirs in zip(jax.tree.leaves(of_blocks), jax.tree.leaves(grads), strict=True):
        close(ours, theirs, 1e-5)


def test_a_classifier_trains(folders):
    """The objective of classification asks for no token types, and its gradient reaches the head."""
    model, params, _ = hf.load(folders("llama"), head="classification", labels=3)
    objective = training.classifier(model)
    batch = {"tokens": SOME, "mask": PADDED, "labels": jnp.array([0, 2, 1]), "weights": jnp.ones(3)}
    total, weight = objective.loss(params, batch)
    gradient = jax.grad(lambda params: objective.loss(params, batch)[0])(params)
    logits = np.asarray(objective.forward(params, batch))
    expected = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[range(3), [0, 2, 1]].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == 3 and np.abs(gradient["score"]["kernel"]).max() > 0
