"""GGUF files that are refused: cut off anywhere, damaged, of another kind. One ValueError with the file and the way
out, whatever is in it."""

import re
import struct

import numpy as np
import pytest

from lora_jax.interop import gguf as ours
from lora_jax.interop import hf
from tests.helpers.llamas import torch_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.helpers import gguf_files  # noqa: E402
from tests.helpers.gguf_texts import byte_level  # noqa: E402


@pytest.fixture(scope="module")
def parts():
    """Metadata and tensors of a small file that loads."""
    return gguf_files.of_torch(torch_model("llama", num_hidden_layers=1))


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """The bytes of that file, with a tokenizer of 101 tokens in it."""
    keys, tensors = parts
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*"<>ab", "ab", *(f"t{n}" for n in range(96))],
        "tokenizer.ggml.token_type": [3, 3, *[1] * 99],
        "tokenizer.ggml.merges": ["a b"],
    }
    path = gguf_files.write(tmp_path_factory.mktemp("whole") / "model.gguf", keys | tokenizer, tensors)
    hf.load(path)
    return path.read_bytes()


def refused(path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        hf.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_cut_off_anywhere(whole, tmp_path):
    path = tmp_path / "model.gguf"
    end = len(whole) - 4000  # in the middle of the last tensors
    for length in [*range(0, 300), *np.linspace(300, end, 200, dtype=int), len(whole) - 40]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut off or damaged|is no GGUF file") as error:
            ours.open_file(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_byte_of_the_header_makes_anything_but_a_value_error(count, whole, tmp_path):
    """Each of so many files has another byte that is wrong; those that can still be read are."""
    path, generator = tmp_path / "model.gguf", np.random.default_rng(0)
    header = whole.index(b"blk.0.ffn_up") + 400
    read = 0
    for place in generator.integers(0, header, count):
        data = bytearray(whole)
        data[place] ^= 1 << generator.integers(8)
        path.write_bytes(data)
        try:
            hf.unread(path)
            read += 1
        except ValueError as error:
            assert str(path) in str(error), error
    assert read > count / 8  # names, tokens and numbers that may be what they say


def test_no_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    for data in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(data)
        refused(path, "is no GGUF file: it does not begin with GGUF")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.gguf"):
        hf.load(tmp_path / "missing.gguf")


def test_big_endian_and_other_versions(whole, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    refused(path, r"big-endian GGUF file; convert it .*gguf-convert-endian")
    for version in (1, 4):
        path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        refused(path, f"GGUF version {version}; versions 2 and 3 are read")


def test_counts_that_no_file_holds(whole, tmp_path):
    """Neither memory nor time is spent on them."""
    path = tmp_path / "model.gguf"
    for counts in ((2**63, 3), (3, 2**63)):
        path.write_bytes(whole[:8] + struct.pack("<QQ", *counts) + whole[24:])
        refused(path, "cut off or damaged")


@pytest.mark.parametrize("kind", ["IQ4_NL", "Q2_K", "F64"])
def test_another_type_of_tensor(kind, parts, tmp_path):
    keys, tensors = parts
    name = "blk.0.ffn_up.weight"
    wide = np.zeros((80, 48), np.float64) if kind == "F64" else np.zeros((80, 90 * 4), np.uint8)
    if kind == "Q2_K":
        wide = np.zeros((80, 84), np.uint8)
    path = gguf_files.write(tmp_path / "model.gguf", keys, tensors | {name: (wide, kind)})
    refused(path, rf"{re.escape(name)} is of type {kind}; F32, F16, .* are read: quantize the model anew")


def test_a_tensor_there_twice(whole, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"))
    refused(path, r"blk\.0\.attn_v\.weight is there twice")
    path.write_bytes(whole.replace(b"llama.block_count", b"llama.vocab_size\x00"[:17]))
    refused(path, "is there twice|lacks llama.block_count")


def test_a_tensor_within_another(whole, tmp_path):
    path, name = tmp_path / "model.gguf", b"blk.0.attn_k.weight"
    offset = whole.index(name) + len(name) + 4 + 2 * 8 + 4  # behind the number of axes, two axes and the type
    path.write_bytes(whole[:offset] + struct.pack("<Q", 32) + whole[offset + 8 :])
    refused(path, r"attn_k\.weight begins at byte \d+, within another tensor|within another tensor")


WRONG_KEYS = {
    "another architecture": ("general.architecture", "falcon", "is 'falcon'; llama, qwen2, qwen3, gemma2, gemma3 are"),
    "no layers said": ("llama.block_count", None, "lacks llama.block_count"),
    "other layers": ("llama.block_count", 2, "block_count is 2, but the tensors are of 1 layers"),
    "another width": (
        "llama.embedding_length",
        54,
        r"embedding_length is 54, but token_embd.weight has shape \(101, 48",
    ),
    "another inner width": ("llama.feed_forward_length", 81, r"feed_forward_length is 81, but blk.0.ffn_up.weight has"),
    "other heads": ("llama.attention.head_count", 4, "head_count times the head's size is 32"),
    "other key heads": ("llama.attention.head_count_kv", 3, "head_count_kv times the head's size is 24"),
    "no heads": ("llama.attention.head_count", 0, "0 heads of"),
    "heads that differ": ("llama.attention.head_count_kv", [2, 1], "not one int for all layers"),
    "another vocabulary": ("llama.vocab_size", 100, r"vocab_size, or the number of tokens, is 100, but token_embd"),
    "a text for a number": ("llama.block_count", "1", "block_count is '1', not one int"),
    "a fraction for a number": ("llama.block_count", 1.5, "block_count is 1.5, not one int"),
    "an epsilon of nothing": ("llama.attention.layer_norm_rms_epsilon", float("nan"), "is nan, which no model has"),
    "experts": ("llama.expert_count", 8, "llama.expert_count is 8; only 0 is supported"),
    "values of another size": ("llama.attention.value_length", 4, "value_length is 4; only 8 is supported"),
    "partial rotation": ("llama.rope.dimension_count", 4, "rope.dimension_count is 4; only 8 is supported"),
    "long rope": ("llama.rope.scaling.type", "longrope", "rope.scaling.type is 'longrope'; only none, linear and yarn"),
    "a part": ("split.count", 3, r"one of 3 parts; join them with llama-gguf-split --merge"),
    "alignment": ("general.alignment", 48, "general.alignment is 48, not a power of two"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_metadata_that_is_wrong(name, parts, tmp_path):
    key, value, message = WRONG_KEYS[name]
    keys, tensors = parts
    keys = {k: v for k, v in (keys | {key: value}).items() if v is not None}
    if key == "general.alignment":  # the writer would align to it
        path = gguf_files.write(tmp_path / "model.gguf", keys | {key: 64}, tensors)
        path.write_bytes(
            path.read_bytes().replace(
                key.encode() + struct.pack("<II", 4, 64), key.encode() + struct.pack("<II", 4, 48)
            )
        )
    else:
        if key == "general.architecture":
            keys |= {k.replace("llama", "falcon"): v for k, v in keys.items()}
        path = gguf_files.write(tmp_path / "model.gguf", keys, tensors)
    refused(path, message)


def test_missing_and_strange_tensors(parts, tmp_path):
    keys, tensors = parts
    without = {name: tensor for name, tensor in tensors.items() if name != "blk.0.ffn_down.weight"}
    path = gguf_files.write(tmp_path / "model.gguf", keys, without)
    refused(path, r"layers\.0\.mlp\.down_proj\.weight is missing")
    strange = {"blk.0.ffn_exps.weight": tensors["blk.0.ffn_up.weight"], "other": tensors["output_norm.weight"]}
    path = gguf_files.write(tmp_path / "model.gguf", keys, tensors | strange)
    refused(path, r"blk\.0\.ffn_exps\.weight is not part of the model; other is not part of the model")
    odd = {"blk.0.ffn_down.weight": (np.zeros((48, 79), np.float32), "F32")}
    path = gguf_files.write(tmp_path / "model.gguf", keys, tensors | odd)
    refused(path, r"mlp\.down_proj\.weight has shape \(48, 79\), not \(48, 80\)")


def test_rope_factors_that_are_not_llama_3s(parts, tmp_path):
    keys, tensors = parts
    path = gguf_files.write(
        tmp_path / "model.gguf", keys, tensors | {"rope_freqs.weight": (np.array([1, 3, 2, 8], np.float32), "F32")}
    )
    refused(path, r"rope_freqs\.weight is not what Llama 3's rope parameters give \(factor 8, context 8192")
    scaled = keys | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    path = gguf_files.write(path, scaled, tensors | {"rope_freqs.weight": (np.ones(4, np.float32), "F32")})
    refused(path, r"rope_freqs\.weight beside rope\.scaling\.type 'linear' is not supported")


def test_numbers_that_are_not_finite(parts, tmp_path):
    keys, tensors = parts
    bad = np.full((101, 48), np.inf, np.float16)
    path = gguf_files.write(tmp_path / "model.gguf", keys, tensors | {"token_embd.weight": (bad, "F16")})
    with pytest.raises(ValueError, match=r"model\.gguf: token_embd\.weight has entries that are not finite"):
        hf.load(path)


def test_a_file_that_changes_while_it_is_read(whole, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    _, stored, _ = hf.unread(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="was changed while it was read"):
        hf.read(stored)


def test_more_tokens_than_rows(parts, tmp_path):
    keys, tensors = parts
    path = gguf_files.write(tmp_path / "model.gguf", keys | byte_level("gpt-2"), tensors)
    refused(path, "is token .* but the metadata says vocab_size 101, which is for ids below it")


def test_without_the_package(monkeypatch, whole, tmp_path):
    """The error names the extra."""
    import importlib
    import sys

    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("reader", "tensors"):
        monkeypatch.delitem(sys.modules, f"lora_jax.interop.gguf.{name}")
    monkeypatch.delitem(sys.modules, "lora_jax.interop.gguf")
    with pytest.raises(ModuleNotFoundError, match=r'gguf.* is not installed: pip install "lora_jax\[hf\]" brings it'):
        importlib.import_module("lora_jax.interop.gguf")
