"""GPT-2 folders of Hugging Face: the same logits as transformers, both ways, and strict reading."""

import gzip
import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import lora_jax as lj
from lora_jax.interop import hf
from lora_jax.models import gpt2
from tests.helpers.hf_sizes import GPT2

SHAPES = [
    GPT2,
    {"vocab_size": 57, "n_positions": 9, "n_embd": 10, "n_layer": 1, "n_head": 5, "n_inner": 7},
    {**GPT2, "n_layer": 3, "n_head": 1, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    {**GPT2, "vocab_size": 101, "n_embd": 21, "n_head": 7, "activation_function": "relu"},
    {**GPT2, "n_head": 12, "tie_word_embeddings": False, "activation_function": "silu"},
    {**GPT2, "n_inner": 50, "activation_function": "tanh", "reorder_and_upcast_attn": True},
]


def make(folder: Path, fields: dict = GPT2, **kwargs) -> transformers.GPT2LMHeadModel:
    """A random model, saved by transformers; no parameter is zero or one."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    model.save_pretrained(folder, **kwargs)
    return model


def theirs(model: transformers.GPT2LMHeadModel, tokens, mask) -> np.ndarray:
    mask = torch.tensor(mask).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), attention_mask=mask, position_ids=positions).logits.numpy()


def assert_same_logits(reference, model: gpt2.GPT2, params, tolerance: float = 1e-4) -> None:
    """Without padding, padded left, padded right."""
    apply = jax.jit(model.apply)
    length = model.config.n_positions - 1
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (3, length), dtype=np.int32)
    places, n = np.arange(length)[None, :], np.array([length, 5, 2])[:, None]
    for mask in (np.ones_like(tokens, bool), places >= length - n, places < n):
        expected = theirs(reference, tokens, mask)[mask]
        got = np.asarray(apply({"params": params}, tokens, mask))[mask]
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make(folder)
    return folder


@pytest.fixture
def copy(small, tmp_path) -> Path:
    """A folder of the small model that a test may spoil."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def edit(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def spoil(folder: Path, change) -> None:
    """Applies `change` to the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def equal(x, y) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize("fields", SHAPES, ids=lambda f: f"{f['n_embd']}x{f['n_layer']}x{f['n_head']}")
def test_logits_are_transformers_and_back(fields, tmp_path):
    reference = make(tmp_path / "theirs", fields)
    model, params, tokenizer = hf.load(tmp_path / "theirs")
    assert tokenizer is None
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert type(params) is dict and type(params["h_0"]) is dict
    assert_same_logits(reference, model, params)
    hf.save(tmp_path / "ours", model, params)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    equal(reference.state_dict(), again.state_dict())


@settings(max_examples=5)
@given(
    head=st.sampled_from([1, 2, 3, 5]),
    heads=st.integers(1, 4),
    layers=st.integers(1, 3),
    inner=st.one_of(st.none(), st.integers(1, 20)),
    vocabulary=st.integers(2, 80),
    tie=st.booleans(),
    scan=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_any_shape_saved_gives_transformers_logits(
    tmp_path_factory, head, heads, layers, inner, vocabulary, tie, scan, dtype
):
    folder = tmp_path_factory.mktemp("any")
    config = gpt2.GPT2Config(
        vocab_size=vocabulary, n_positions=8, n_embd=head * heads, n_layer=layers, n_head=heads,
        n_inner=inner, tie=tie, eos_token_id=1, scan_layers=scan,
    )  # fmt: skip
    model = gpt2.GPT2(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), dtype), shapes)
    hf.save(folder, model, params)
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert str(reference.dtype) == f"torch.{dtype}"
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_same_logits(reference.float().eval(), model, wide)
    loaded, back, _ = hf.load(folder)
    assert loaded.config == gpt2.GPT2Config(**{**config.__dict__, "scan_layers": False})
    equal(gpt2.to_scanned(back) if scan else back, wide)


def test_shards_prefix_and_buffers(small, tmp_path):
    _, params, _ = hf.load(small)
    make(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    equal(hf.load(tmp_path / "shards")[1], params)

    bare = Path(shutil.copytree(small, tmp_path / "bare"))
    buffers = {"h.0.attn.bias": np.ones((1, 1, 3, 3), np.uint8), "h.1.attn.masked_bias": np.float32(-1e4)}

    def older_form(tensors):
        short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return short | {name: np.asarray(buffer, np.float32) for name, buffer in buffers.items()}

    spoil(bare, older_form)
    equal(hf.load(bare)[1], params)


def test_buffers_of_any_type_are_ignored(copy):
    _, params, _ = hf.load(copy)
    spoil(copy, lambda t: t | {"transformer.h.0.attn.bias": np.ones((1, 1, 3, 3), np.uint8)})
    equal(hf.load(copy)[1], params)


def test_tie(copy):
    model, params, _ = hf.load(copy)
    assert model.config.tie and "lm_head" not in params
    untied, copied, _ = hf.load(copy, tie=False)
    assert not untied.config.tie
    equal(copied["lm_head"]["kernel"], params["wte"]["embedding"].T)

    def add_head(scale):
        wte = "transformer.wte.weight"
        spoil(copy, lambda tensors: tensors | {"lm_head.weight": scale * tensors[wte]})

    add_head(1)
    equal(hf.load(copy, tie=True)[1], params)
    add_head(np.float32(2))
    for tie in (None, True):
        with pytest.raises(ValueError, match=r"lm_head.weight differs from wte.weight"):
            hf.load(copy, tie=tie)
    equal(hf.load(copy, tie=False)[1]["lm_head"]["kernel"], 2 * params["wte"]["embedding"].T)


def test_a_missing_head_is_made_only_when_asked_for(copy, caplog):
    edit(copy, tie_word_embeddings=False)
    key = jax.random.key(0)
    for wish in ({}, {"head": "lm"}, {"key": key}):
        with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
            hf.load(copy, **wish)
    assert not caplog.records
    model, params, _ = hf.load(copy, head="lm", key=key)
    assert not model.config.tie and params["lm_head"]["kernel"].shape == (12, 31)
    assert "a new, random head was made" in caplog.text
    assert hf.load(copy, tie=True)[0].config.tie


def a_tokenizer(size: int) -> Tokenizer:
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))


def test_saving_replaces_and_keeps(small, tmp_path):
    model, params, _ = hf.load(small)
    folder = tmp_path / "deep" / "folder"
    hf.save(folder, model, params, a_tokenizer(31))
    (folder / "README.md").write_text("mine")
    changed = jax.tree.map(lambda leaf: 2 * leaf, params)
    hf.save(folder, model, changed)
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    _, back, tokenizer = hf.load(folder)
    equal(back, changed)
    assert tokenizer is not None and tokenizer.get_vocab_size() == 31


def test_a_failed_save_leaves_the_old_folder(small, tmp_path, monkeypatch):
    model, params, _ = hf.load(small)
    hf.save(tmp_path, model, params)

    def break_off(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lora_jax.interop.hf.models.save_file", break_off)
    with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path, model, jax.tree.map(lambda leaf: 2 * leaf, params))
    equal(hf.load(tmp_path)[1], params)
    assert len(list(tmp_path.iterdir())) == 2


def drop(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


WTE, QKV = "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(QKV), "h.0.attn.c_attn.weight is missing"),
        (drop(WTE), "wte.weight is missing"),
        (lambda t: t | {"h.0.extra": np.ones(1, np.float32)}, "h.0.extra is not part of the model"),
        (lambda t: t | {QKV: t[QKV][:, :-1].copy()}, r"c_attn.weight has shape \(12, 35\), not \(12, 36\)"),
        (lambda t: t | {"lm_head.weight": t[WTE][:5].copy()}, r"lm_head.weight has shape \(5, 12\), not \(31, 12\)"),
        (lambda t: t | {WTE: t[WTE][:-1].copy()}, "vocab_size 31, but transformer.wte.weight has 30 rows"),
        (lambda t: t | {"wte.weight": t[WTE]}, "wte.weight is there twice"),
        (lambda t: t | {WTE: t[WTE] * np.float32(np.nan)}, "wte.weight has entries that are not finite"),
        (lambda t: t | {WTE: t[WTE].astype(np.int8)}, "wte.weight is int8"),
        (lambda t: {n: x[:0].copy() for n, x in t.items()}, "without entries: .*and 18 more. .* ZeRO-3.*zero_to_fp32"),
        (lambda t: t | {QKV: t[QKV][:0].copy()}, "without entries: transformer.h.0.attn.c_attn.weight. Was it saved"),
    ],
)
def test_wrong_tensors(copy, change, says):
    spoil(copy, change)
    with pytest.raises(ValueError, match=says):
        hf.load(copy)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "t5"}, "model_type 't5' is none of bert, .*gpt2"),
        ({"vocab_size": 30}, "vocab_size 30, but transformer.wte.weight has 31 rows"),
        ({"n_layer": 1}, "n_layer 1, but the tensors are of 2 layers"),
        ({"n_positions": 13}, "n_positions 13, but transformer.wpe.weight has 12 rows"),
        ({"activation_function": "mish"}, "activation 'mish' is none of"),
        ({"n_head": 5}, "n_embd 12 is not a multiple of n_head 5"),
        ({"num_attention_heads": 5}, "n_embd 12 is not a multiple of n_head 5"),
        ({"n_head": None}, "n_head=None, not a int"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False; only True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
    ],
    ids=str,
)
def test_wrong_config(copy, fields, says):
    edit(copy, **fields)
    with pytest.raises(ValueError, match=says):
        hf.load(copy)


def test_dropout_rates_are_for_training_only(small, copy):
    edit(copy, attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.3)
    equal(hf.load(copy)[1], hf.load(small)[1])


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_cut_off_files(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is cut off or damaged"):
        hf.load(copy)


def test_missing_files(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        hf.load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin but no model.safetensors.*save_pretrained"):
        hf.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        hf.load(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds no JSON object"):
        hf.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        hf.load(copy)


def test_broken_shards(tmp_path):
    make(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    where = json.loads(text)["weight_map"]
    lost = next(name for name, file in where.items() if file == shards[0].name)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in where.items() if k != lost}}))
    with pytest.raises(ValueError, match=f"disagree about {lost}"):
        hf.load(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        hf.load(tmp_path)
    index.write_text(text)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name} is missing"):
        hf.load(tmp_path)


def test_tokenizers(copy):
    path = copy / "tokenizer.json"
    a_tokenizer(31).save(str(path))
    assert hf.load(copy)[2].token_to_id("w30") == 30
    a_tokenizer(32).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer.json: 'w31' is token 31, but .* vocab_size 31"):
        hf.load(copy)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer"):
        hf.load(copy)


def test_the_hub(small, tmp_path, monkeypatch):
    names = []

    def download(name, allow_patterns):
        names.append(name)
        if name == "someone/gpt2":
            return str(small)
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    equal(hf.load("someone/gpt2")[1], hf.load(small)[1])
    assert names == ["someone/gpt2"]
    with pytest.raises(FileNotFoundError, match=r"no folder a/b, and https://huggingface.co/a/b could not"):
        hf.load("a/b")


@pytest.mark.parametrize("wish", [{"head": "classifier"}, {"labels": 2}])
def test_heads_that_gpt2_has_not(small, wish):
    with pytest.raises(ValueError, match="gpt2 has the head 'lm' only"):
        hf.load(small, **wish)


def test_saving_what_does_not_fit(small, tmp_path):
    model, params, _ = hf.load(small)
    for changed, says in (
        ({**params, "more": {"x": jnp.ones(1)}}, "params: more/x is not part"),
        ({key: value for key, value in params.items() if key != "ln_f"}, "params: ln_f/bias is missing"),
        (params | {"wpe": {"embedding": jnp.ones((3, 12))}}, r"wpe/embedding has shape \(3, 12\)"),
    ):
        with pytest.raises(ValueError, match=says):
            hf.save(tmp_path / "new", model, changed)
    method = lj.lora(lj.select("**/query/kernel"), rank=1)
    adapted = method.apply(params, method.init(jax.random.key(0), params))
    with pytest.raises(TypeError, match=r"adapted array at h_0/attn/query/kernel.*merge"):
        hf.save(tmp_path / "new", model, adapted)
    with pytest.raises(TypeError, match="a Dense is not a model of lora_jax"):
        hf.save(tmp_path / "new", nn.Dense(3), {})
    assert not (tmp_path / "new").exists()


def test_the_small_base(shared):
    """It loads, and predicts held-out text as its README says: perplexity 146 a token at length 512."""
    model, params, tokenizer = hf.load(shared / "base")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 6_967_296
    with gzip.open(shared / "data/text/wikitext2_raw_valid.txt.gz", "rt") as file:
        ids = np.array(tokenizer.encode(file.read(60_000)).ids, np.int32)
    tokens = ids[: len(ids) // 512 * 512].reshape(-1, 512)[:8]
    logits = jax.jit(model.apply)({"params": params}, tokens)[:, :-1]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens[:, 1:, None]), axis=-1)
    perplexity = float(jnp.exp(-chosen.mean()))
    assert 130 < perplexity < 160, perplexity
