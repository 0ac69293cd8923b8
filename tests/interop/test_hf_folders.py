"""Folders of Hugging Face: GPT-2 in all its forms (check 21), and folders that reach outside or are ambiguous (24)."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop import folders, hf
from tests.helpers.hf_sizes import GPT2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(1).integers(0, 31, (3, 11), dtype=np.int32)
NOTHING = re.compile("(?!)")  # no name


def make(kind=transformers.GPT2LMHeadModel, **fields):
    """A random model, no parameter of which is zero or one."""
    model = kind(transformers.GPT2Config(**GPT2, **fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)
    return model


def assert_same_logits(reference, folder: Path, **wishes) -> None:
    """Of transformers' model and of ours from the folder; sums in float32: 1e-5 of the largest."""
    model, params, _ = hf.load(folder, **wishes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    with torch.no_grad():
        expected = reference.float()(torch.tensor(TOKENS).long()).logits.numpy()
    got = np.asarray(apply(model, params))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def apply(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gpt2_as_transformers_writes_it(tmp_path, tie, shards, dtype):
    """21: tied and not; whole and in shards; files of every type, to which the reference is rounded too."""
    reference = make(tie_word_embeddings=tie).to(getattr(torch, dtype))
    reference.save_pretrained(tmp_path, **({"max_shard_size": "5KB"} if shards else {}))
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == shards
    assert {str(tensor.dtype) for file in files for tensor in load_file(file).values()} == {dtype}
    assert_same_logits(reference, tmp_path)


def test_gpt2_without_prefix(tmp_path):
    """21: GPT2Model writes none; its head is the embedding."""
    reference = make()
    reference.transformer.save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(reference, tmp_path)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_with_causal_masks(tmp_path, prefix):
    """21: older files hold them, in whatever type; wrong ones change nothing."""
    reference = make()
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("transformer.", prefix): tensor for name, tensor in load_file(file).items()}
    masks = {"h.0.attn.bias": np.zeros((1, 1, 12, 12), np.uint8), "h.1.attn.masked_bias": np.array(np.nan, np.float32)}
    save_file(tensors | {prefix + name: mask for name, mask in masks.items()}, file)
    assert_same_logits(reference, tmp_path)


def test_gpt2_with_both_matrices(tmp_path):
    """21: equal ones are one; of different ones transformers makes two, and so do we when told to."""
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    wte = tensors["transformer.wte.weight"]
    save_file(tensors | {"lm_head.weight": wte.copy()}, file, {"format": "pt"})
    assert_same_logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval(), tmp_path)
    assert "lm_head" not in hf.load(tmp_path)[1]
    save_file(tensors | {"lm_head.weight": wte + np.float32(0.5)}, file, {"format": "pt"})
    reference = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_logits(reference, tmp_path, tie=False)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from wte.weight.*tie=False keeps both"):
        hf.load(tmp_path)


# --- what reaches outside -------------------------------------------------------------------------

A, B = {"a": np.array([1, 2], np.float32)}, {"b": np.array([3], np.float16)}


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder of two shards, and beside it a file that is none of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(A, folder / "x-1.safetensors")
    save_file(B, folder / "x-2.safetensors")
    save_file(B, tmp_path / "outside.safetensors")
    index(folder, a="x-1.safetensors", b="x-2.safetensors")
    return folder


def index(folder: Path, **where) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in folders.open_tensors(folder, NOTHING).items()}


def test_shards(sharded):
    tensors = read(sharded)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [1, 2], "b": [3]}
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}
    save_file(A, sharded / "model.safetensors")  # the single file wins, as in transformers
    assert set(read(sharded)) == {"a"}


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "./x-2.safetensors", "sub/x.safetensors", "..", ".", "", "a\\b", "..\\outside", "x\0y",
     "x\n", "/outside.safetensors", "/etc/passwd", "C:\\x", "\ud800"],
)  # fmt: skip
def test_names_that_are_no_plain_names(sharded, name):
    index(sharded, a="x-1.safetensors", b=name)
    with pytest.raises(ValueError, match=rf"model: {re.escape(repr(name))} is not the plain name of a file"):
        read(sharded)


def test_an_absolute_path_to_the_folder_itself(sharded):
    """transformers would follow it."""
    index(sharded, a="x-1.safetensors", b=str(sharded / "x-2.safetensors"))
    with pytest.raises(ValueError, match="is not the plain name of a file in this folder"):
        read(sharded)


@pytest.mark.parametrize("name", ["x-2.safetensors", "model.safetensors.index.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["../outside.safetensors", "/dev/zero", "../nowhere", "../model2/x"])
def test_symlinks_that_leave(sharded, name, target):
    """Also where the target is not there: it might be, one day."""
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is a symlink to .*, outside its folder"):
        read(sharded)


def test_symlinks_that_stay(sharded):
    (sharded / "x-2.safetensors").rename(sharded / "real")
    (sharded / "x-2.safetensors").symlink_to("real")
    linked = sharded.parent / "linked"  # the folder itself may be anywhere: the user named it
    linked.symlink_to(sharded)
    for folder in (sharded, linked):
        assert set(read(folder)) == {"a", "b"}
    (sharded / "real").unlink()
    (sharded / "real").symlink_to("x-2.safetensors")  # in a circle
    with pytest.raises(FileNotFoundError, match=r"x-2.safetensors is missing"):
        read(sharded)


def test_a_json_file_that_leaves(tmp_path):
    make().save_pretrained(tmp_path / "model")
    shutil.move(tmp_path / "model" / "config.json", tmp_path / "config.json")
    (tmp_path / "model" / "config.json").symlink_to("../config.json")
    with pytest.raises(ValueError, match=r"config.json is a symlink to .*, outside its folder"):
        hf.load(tmp_path / "model")


def test_the_cache_of_the_hub(tmp_path):
    """Its snapshots link to blobs of the same model, and of no other."""
    blobs = tmp_path / "models--some--gpt2" / "blobs"
    reference = make()
    reference.save_pretrained(blobs)
    snapshot = tmp_path / "models--some--gpt2" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert_same_logits(reference, snapshot)

    shutil.copytree(blobs, tmp_path / "models--other--gpt2" / "blobs")
    shutil.copytree(blobs, tmp_path / "models--some--gpt2" / "refs")
    for target in ("../../../models--other--gpt2/blobs/config.json", "../../refs/config.json"):
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        with pytest.raises(ValueError, match="outside its folder"):
            hf.load(snapshot)


# --- what is ambiguous or no index ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ("\ufeff{}", "is no JSON .*BOM"),
        ('{"weight_map": NaN}', "is no JSON .NaN is no number"),
        ('{"weight_map": {}, "x": -Infinity}', "is no JSON .-Infinity is no number"),
        ('{"weight_map": {}, "x": 1e999}', "is no JSON .1e999 is no number"),
        ('{"weight_map": {}, "x": ' + "9" * 5000 + "}", "is no JSON"),
        ('{"weight_map": ' + "[" * 200_000 + "]" * 200_000 + "}", "is no JSON .nested 200001 deep, more than 100"),
        ('{"weight_map": {"a": "x"}, "weight_map": {}}', "'weight_map' is there twice"),
        ('{"weight_map": {"a": "x-1.safetensors", "a": "x-2.safetensors"}}', "'a' is there twice"),
        ("{" + " " * (16 << 20) + "}", "is no JSON that is read here: 16777218 bytes"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": null}}', "the file of a is None, not a name"),
        ('{"weight_map": {"a": ["x-1.safetensors"]}}', r"the file of a is \['x-1.safetensors'\], not a name"),
        ('{"weight_map": {"a": "x-1.safetensors", "c": "x-1.safetensors"}}', "x-1.safetensors and .* disagree about c"),
        ('{"weight_map": {"a": "x-2.safetensors"}}', "disagree about a, b"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "index.json is cut off or damaged"),
    ],
    ids=lambda text: text[:40],
)
def test_wrong_indices(sharded, text, says):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        read(sharded)


def test_an_index_in_no_utf8_or_missing_shards(sharded):
    file = sharded / "model.safetensors.index.json"
    content = file.read_bytes()
    file.write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match=r"index.json is no JSON"):
        read(sharded)
    file.write_bytes(content)
    (sharded / "x-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"x-2.safetensors is missing"):
        read(sharded)


def test_a_config_with_a_key_twice(tmp_path):
    """Python would take the last, others the first."""
    make().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("{", '{"n_head": 1,', 1))
    with pytest.raises(ValueError, match=r"config.json is no JSON \(the key 'n_head' is there twice\)"):
        hf.load(tmp_path)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "adapter_model.bin"])
def test_pickles_are_not_read(tmp_path, name):
    """24: neither as they are called, nor where an index names them, nor under the name of the weights."""
    evil = pickle.dumps(Evil(tmp_path / "ran"))
    make().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.unlink()
    (tmp_path / "model" / name).write_bytes(evil)
    with pytest.raises(FileNotFoundError, match=rf"holds {name} but no model.safetensors. Pickles can run any code"):
        hf.load(tmp_path / "model")
    index(tmp_path / "model", a=name)
    with pytest.raises(ValueError, match=rf"{name} is cut off or damaged"):
        hf.load(tmp_path / "model")
    weights.write_bytes(evil)
    with pytest.raises(ValueError, match=r"model.safetensors is cut off or damaged"):
        hf.load(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)  # it would have worked
    assert (tmp_path / "ran").is_dir()
