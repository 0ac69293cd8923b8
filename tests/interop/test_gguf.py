"""GGUF files: the model that is in them, equal to that of a Hugging Face folder and to transformers' reading."""

import logging
from pathlib import Path

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.selection import flatten
from lora_jax.interop import gguf as ours
from lora_jax.interop import hf
from lora_jax.runs import bases
from tests.helpers.llamas import VARIANTS, torch_model

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax.traverse_util import flatten_dict  # noqa: E402

from tests.helpers import gguf_files  # noqa: E402
from tests.helpers.marks import slow_but  # noqa: E402

# What GGUF has no words for: dynamic scaling, other scales of yarn, windows of Qwen 2 (which no converter writes).
NO_FORM = ("llama, dynamic", "llama, yarn, scales", "llama, yarn, ramp", "qwen2, windows", "gemma2, no caps")
NAMES = [name for name in VARIANTS if name not in NO_FORM]
QUICK = ("llama, biases", "llama 3", "llama, yarn", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
SMALL = {"vocab_size": 40, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 8}


def written(path: Path, model, kind: str = "F32", **metadata) -> Path:
    keys, tensors = gguf_files.of_torch(model, kind)
    return gguf_files.write(path, keys | metadata, tensors)


def changes_of(name: str) -> dict:
    """Gemma 2's queries have the scale of their heads' size, but for the one of 46 layers."""
    return {"query_pre_attn_scalar": 12} if name == "gemma2" else {}


@pytest.mark.parametrize("name", slow_but(NAMES, *QUICK))
def test_a_file_gives_the_model_of_the_folder(name, tmp_path):
    """Config and every parameter; to the bit but for Gemma's norms, which the file holds as 1 + w in float32."""
    theirs = torch_model(name, **changes_of(name))
    if name.startswith("gemma3"):
        theirs.config.query_pre_attn_scalar = theirs.config.head_dim
    theirs.save_pretrained(tmp_path / "folder")
    file = written(tmp_path / "model.gguf", theirs)
    model, params, tokenizer = hf.load(file)
    expected, of_folder, _ = hf.load(tmp_path / "folder")
    assert tokenizer is None
    config, in_folder = (vars(m.config) | {"head_size": m.config.size} for m in (model, expected))
    assert config.pop("eps") == pytest.approx(in_folder.pop("eps"), rel=1e-7)  # float32 in the file
    if name == "mistral, no window":  # a llama then, which computes the same
        assert (config.pop("family"), in_folder.pop("family")) == ("llama", "mistral")
    assert config == in_folder
    flat, flat_of_folder = flatten_dict(params, sep="/"), flatten_dict(of_folder, sep="/")
    assert set(flat) == set(flat_of_folder)
    for path, leaf in flat.items():
        norm = name.startswith("gemma") and path.endswith("scale")
        np.testing.assert_allclose(leaf, flat_of_folder[path], rtol=0, atol=2e-7 if norm else 0, err_msg=path)


@pytest.mark.parametrize("name", slow_but(["llama", "qwen2", "gemma3, defaults"], "qwen2"))
def test_logits_are_those_of_transformers_reading(name, tmp_path):
    """Of the same file; sums in float32: 1e-4 of the largest. transformers knows nothing of the scalings there."""
    theirs = torch_model(name, **({"head_dim": 256} if name.startswith("gemma") else {}))
    file = written(tmp_path / "model.gguf", theirs)
    tokens = np.random.default_rng(0).integers(3, 101, (2, 17))
    reading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype="float32").eval()
    with torch.no_grad():
        expected = reading(torch.tensor(tokens)).logits.numpy()
    model, params, _ = hf.load(str(file))
    got = np.asarray(model.apply({"params": params}, tokens))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def small():
    return torch_model("llama", **SMALL)


@pytest.mark.parametrize("kind", ours.TYPES)
def test_every_type_is_dequantized_as_gguf_does(kind, small, tmp_path):
    """To the bit, whole and in parts, by rows and by columns; its blocks as they lie in the file."""
    file = ours.open_file(written(tmp_path / "model.gguf", small, kind))
    references = {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors}
    for theirs, name in (
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj"),
        ("blk.0.attn_q", "model.layers.0.self_attn.q_proj"),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj"),
        ("token_embd", "model.embed_tokens"),
    ):
        reference, tensor = references[f"{theirs}.weight"], file.tensors[f"{name}.weight"]
        expected = gguf.quants.dequantize(reference.data, reference.tensor_type)
        rows = np.arange(len(expected))
        if "attn" in theirs:
            heads = small.config.num_attention_heads if theirs.endswith("q") else small.config.num_key_value_heads
            rows = rows.reshape(heads, -1, 2).swapaxes(1, 2).ravel()
        expected = expected[rows]
        np.testing.assert_array_equal(np.asarray(tensor), expected)
        for part in ((slice(3, 30), slice(0, 256)), (slice(0, 40), slice(33, 255)), (slice(39, 40), slice(128, 129))):
            np.testing.assert_array_equal(tensor.read(part), expected[part])
        np.testing.assert_array_equal(tensor.T.read((slice(1, 256), slice(0, 5))), expected.T[1:, :5])
        raw_kind, blocks = file.raw(f"{name}.weight")
        assert raw_kind == kind
        stored = reference.data.reshape(len(rows), -1).view(np.uint8)
        np.testing.assert_array_equal(blocks, stored[rows])


def test_a_large_tensor_is_dequantized_in_pieces(small, tmp_path, monkeypatch):
    file = ours.open_file(written(tmp_path / "model.gguf", small, "Q4_0"))
    expected = {name: np.asarray(tensor) for name, tensor in file.tensors.items()}
    monkeypatch.setattr("lora_jax.interop.gguf.tensors._AT_ONCE", 700)
    for name, tensor in file.tensors.items():
        np.testing.assert_array_equal(np.asarray(tensor), expected[name])


def test_a_folder_saved_from_a_file(tmp_path):
    """With what config.json says besides; the file serves wherever a folder does."""
    theirs = torch_model("llama, no groups")
    extra = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.padding_token_id": 0}
    file = written(tmp_path / "model.gguf", theirs, **extra)
    model, params, _ = hf.load(file)
    hf.save(tmp_path / "out", model, params, like=file)
    again, same, _ = hf.load(tmp_path / "out")
    assert again.config == model.config == hf.without_weights(file).config
    assert hf.untrained(model, file) == ()
    np.testing.assert_array_equal(same["wte"]["embedding"], params["wte"]["embedding"])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.bos_token_id, config.pad_token_id) == ("llama", 1, 0)


def test_a_classifier_is_made_of_a_file(tmp_path, caplog):
    file = written(tmp_path / "model.gguf", torch_model("qwen3"))
    with caplog.at_level(logging.WARNING):
        model, params, _ = hf.load(file, head="classification", labels=3)
    assert model.config.labels == 3 and params["score"]["kernel"].shape[1] == 3
    assert "has no score.weight" in caplog.text


def test_layers_in_one_stack_and_half_precision(tmp_path):
    file = written(tmp_path / "model.gguf", torch_model("gemma3"), "F16")
    loop, stack = hf.load(file)[1], hf.load(file, scan_layers=True, dtype="bfloat16")[1]
    expected = np.stack([loop[f"h_{n}"]["attn"]["query"]["kernel"] for n in range(7)])
    np.testing.assert_array_equal(
        stack["h"]["attn"]["query"]["kernel"], expected.astype(stack["wte"]["embedding"].dtype)
    )


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_27_billion_models_scale_queries_by_their_width(name, layers, tmp_path):
    config = torch_model(name, num_hidden_layers=1).config
    config.num_hidden_layers = layers
    shapes = {f"blk.{n}.attn_norm.weight": (np.zeros(48, np.float32), "F32") for n in range(layers)}
    shapes["token_embd.weight"] = (np.zeros((101, 48), np.float32), "F32")
    file = gguf_files.write(tmp_path / "model.gguf", gguf_files.metadata_of(config), shapes)
    assert ours.open_file(file).fields["query_pre_attn_scalar"] == 8  # 48 / 6, and not the heads' 12


def test_windows_by_layer(tmp_path):
    """An array of the file says which layers have the window, and a base of their own."""
    pattern = [False, True, False, True, True, False, True]
    extra = {"gemma3.attention.sliding_window_pattern": pattern, "gemma3.rope.freq_base_swa": 77.0}
    model, _, _ = hf.load(written(tmp_path / "model.gguf", torch_model("gemma3"), **extra))
    assert model.config.local == tuple(pattern)
    assert model.config.local_rotary.rope_theta == 77.0 and model.config.rotary.factor == 8.0


def test_the_context_of_llama_3_need_not_be_in_the_file(tmp_path):
    rope = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    theirs = torch_model(
        "llama 3", head_dim=64, rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    )
    file = written(tmp_path / "model.gguf", theirs)
    rotary = hf.load(file)[0].config.rotary
    assert (rotary.rope_type, rotary.factor, rotary.original_max_position_embeddings) == ("llama3", 32.0, 8192)


@pytest.mark.parametrize(("kind", "scan"), [("Q4_1", False), ("Q8_0", True)])
def test_a_base_keeps_the_blocks_of_its_file(kind, scan, tmp_path):
    """`base_bits="file"`: tables and matrices, q and k with their rows in Hugging Face's order, looped and stacked."""
    file = written(tmp_path / "model.gguf", torch_model("llama", **SMALL | {"num_hidden_layers": 2}), kind)
    model, params, _ = hf.load(file, scan_layers=scan)
    kept = bases.quantized(model, params, "file", str(file))
    leaves = {path: leaf for path, leaf in flatten(kept)[0] if isinstance(leaf, lj.Quantized)}
    assert set(leaves) == {path for path, _ in flatten(params)[0] if path.endswith(("kernel", "embedding"))}
    assert {leaf.kind for leaf in leaves.values()} == {kind}
    dense = dict(flatten(params)[0])
    for path, leaf in flatten(lj.merge(kept))[0]:
        np.testing.assert_array_equal(leaf, dense[path], err_msg=path)
    tokens = np.arange(3, 19, dtype=np.int32)[None]
    expected = model.apply({"params": params}, tokens)
    logits = lj.lift(model.apply)({"params": kept}, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_file_without_such_blocks_keeps_none(tmp_path):
    file = written(tmp_path / "model.gguf", torch_model("llama", **SMALL), "Q5_0")
    model, params, _ = hf.load(file)
    with pytest.raises(ValueError, match="has no matrix in blocks of Q4_0, Q4_1, Q8_0"):
        bases.quantized(model, params, "file", str(file))
