"""Weights read slice by slice onto meshes, and written in pieces: the same numbers, and the same strictness."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import lora_jax as lj
from lora_jax.distributed import sharding
from lora_jax.interop import hf
from lora_jax.models import encoder, gpt2, layouts
from lora_jax.runs import bases

GPT2 = gpt2.GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=3, eos_token_id=0)
BERT = encoder.EncoderConfig(
    "bert", vocab_size=40, max_positions=16, hidden=24, layers=2, heads=3, inner=48, token_types=2, pad_id=0,
    pooler=True, head="classification", labels=3,
)  # fmt: skip
MODELS = {
    "gpt2": gpt2.GPT2(GPT2),
    "gpt2, untied": gpt2.GPT2(dataclasses.replace(GPT2, tie=False, vocab_size=41, n_layer=2)),
    "bert": encoder.Encoder(BERT),
    "roberta": encoder.Encoder(dataclasses.replace(BERT, family="roberta", head=None, pooler=False, pad_id=1)),
}
MESHES = ({"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}, {"tensor": 2})  # and some devices left over


def random_params(model, dtype=np.float32):
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0.1, 0.3, x.shape), dtype), shapes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of each model one."""
    made = tmp_path_factory.mktemp("big")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    for name, model in MODELS.items():
        hf.save(made / name, model, random_params(model), tokenizer)
    return made


@pytest.fixture
def copy(folder, tmp_path):
    """Of GPT-2, for a test to spoil."""
    return Path(shutil.copytree(folder / "gpt2", tmp_path / "copy"))


def placer(model, shape):
    mesh = sharding.make_mesh(shape)
    rules = sharding.rules_for(model, mesh)
    return lambda path, shape: sharding.shardings({path: jax.ShapeDtypeStruct(shape, "float32")}, mesh, rules)[path]


def equal(x, y) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(y), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scanned"])
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_holds_what_one_device_holds(folder, name, scan):
    """Bit for bit what a plain load, placed afterwards, has; in both types and on every mesh."""
    plain = hf.load(folder / name)[1]
    expected = layouts.to_scanned(plain) if scan else plain
    for dtype, shape in (("float32", MESHES[scan]), ("bfloat16", MESHES[2 - scan])):
        place = placer(MODELS[name], shape)
        model, params, _ = hf.load(folder / name, scan_layers=scan, dtype=dtype, place=place)
        assert model.config.scan_layers == scan
        wanted = {
            path: leaf if path.startswith("classifier") else leaf.astype(dtype)
            for path, leaf in flatten_dict(expected, sep="/").items()
        }
        equal(params, unflatten_dict(wanted, sep="/"))
        for path, leaf in flatten_dict(params, sep="/").items():
            assert leaf.sharding == place(path, leaf.shape) and leaf.committed, path
        equal(params, hf.load(folder / name, scan_layers=scan, dtype=dtype)[1])


def test_no_more_is_read_than_a_device_holds_and_once(folder):
    """Of the elements that several devices hold too; a stack is read layer by layer."""
    model, stored, _ = hf.unread(folder / "gpt2")
    reads: dict[str, list[int]] = {}

    def counted(path, leaf):
        def fetch(index):
            part = leaf.fetch(index)
            reads.setdefault(path, []).append(part.size)
            return part

        return dataclasses.replace(leaf, fetch=fetch)

    flat = {path: counted(path, leaf) for path, leaf in flatten_dict(stored, sep="/").items()}
    hf.read(unflatten_dict(flat, sep="/"), scan_layers=True, place=placer(model, MESHES[0]))
    for path, sizes in reads.items():
        assert sum(sizes) == np.prod(flat[path].shape), path
        if path.endswith("kernel"):
            assert sizes == [flat[path].shape[0] * flat[path].shape[1] // 8] * 8
    assert reads.keys() == flat.keys()


def test_parameters_can_stay_in_the_files(folder):
    """What is not read is not looked at; what is has the numbers of a plain load."""
    _, stored, _ = hf.unread(folder / "gpt2, untied")
    plain = hf.load(folder / "gpt2, untied")[1]
    equal(jax.tree.map(np.asarray, stored), plain)
    part = stored["h_1"]["attn"]["value"]["kernel"].read((slice(3, 7), slice(20, 24)))
    assert np.array_equal(part, plain["h_1"]["attn"]["value"]["kernel"][3:7, 20:24])


def spoil(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poisoned(row: int, column: int):
    def change(tensors):
        tensors["transformer.h.1.attn.c_attn.weight"][row, column] = np.inf

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (poisoned(5, 70), "h.1.attn.c_attn.weight has entries that are not finite"),  # in value alone
        (lambda t: {n: x for n, x in t.items() if "h.0.ln_1.bias" not in n}, "h.0.ln_1.bias is missing"),
        (lambda t: t | {"wte.weight": t["transformer.wte.weight"]}, "wte.weight is there twice"),
        (lambda t: t | {"more": np.ones(2, np.float32)}, "more is not part of the model"),
        (lambda t: t | {"transformer.ln_f.bias": np.ones(24, np.int8)}, "ln_f.bias is int8"),
        (lambda t: t | {"transformer.ln_f.bias": np.ones(23, np.float32)}, r"shape \(23,\), not \(24,\)"),
    ],
)
def test_damaged_files_are_refused_on_a_mesh_too(copy, change, says):
    spoil(copy, change)
    for scan in (False, True):
        with pytest.raises(ValueError, match=says):
            hf.load(copy, scan_layers=scan, place=placer(MODELS["gpt2"], MESHES[0]))


def test_what_is_damaged_is_found_where_it_is_read(copy):
    spoil(copy, poisoned(5, 70))
    _, stored, _ = hf.unread(copy)
    attention = stored["h_1"]["attn"]
    for name, leaf in attention.items():
        if name != "value":
            np.asarray(leaf["kernel"])
    attention["value"]["kernel"].read((slice(0, 5), slice(0, 24)))
    with pytest.raises(ValueError, match=r"model.safetensors: transformer.h.1.attn.c_attn.weight has entries that"):
        attention["value"]["kernel"].read((slice(5, 6), slice(0, 24)))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors is cut off or damaged"):
        attention["query"]["kernel"].read()
    with pytest.raises(ValueError, match=r"model.safetensors is cut off or damaged"):
        hf.unread(copy)


def test_a_file_that_is_replaced_while_it_is_read(copy):
    """Half of one model and half of another would be none."""
    model, params, _ = hf.load(copy)
    _, stored, _ = hf.unread(copy)
    stored["ln_f"]["bias"].read()
    hf.save(copy, model, jax.tree.map(lambda leaf: leaf + 1, params))
    with pytest.raises(ValueError, match=r"model.safetensors was changed while it was read"):
        stored["ln_f"]["scale"].read()


def test_wishes_that_cannot_be(copy):
    with pytest.raises(ValueError, match="dtype 'float64' is none of float32, float16, bfloat16"):
        hf.load(copy, dtype="float64")
    spoil(copy, lambda t: t | {"transformer.ln_f.bias": np.full(24, 1e6, np.float32)})
    hf.load(copy, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"ln_f.bias has entries that are too large for float16"):
        hf.load(copy, dtype="float16")
    spoil(copy, poisoned(0, 0))
    with pytest.raises(ValueError, match="does not divide over the 5 devices"):  # and not: infinite entries
        hf.load(copy, place=placer(MODELS["gpt2"], {"fsdp": 5}))


def test_a_stored_head_is_compared_in_pieces(copy, folder):
    spoil(copy, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].copy()})
    place = placer(MODELS["gpt2"], MESHES[0])
    equal(hf.load(copy, place=place)[1], hf.load(folder / "gpt2")[1])
    spoil(copy, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + np.float32(1)})
    with pytest.raises(ValueError, match=r"differs from wte.weight"):
        hf.load(copy, place=place)


def test_a_new_head_is_placed_and_stays_float32(copy):
    """It is there to be trained."""
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": False}))
    wish = {"head": "lm", "key": jax.random.key(5)}
    place = placer(MODELS["gpt2"], MESHES[0])
    params = hf.load(copy, dtype="bfloat16", place=place, **wish)[1]
    kernel = params["lm_head"]["kernel"]
    assert kernel.sharding == place("lm_head/kernel", (24, 40)) and params["ln_f"]["bias"].dtype == jnp.bfloat16
    equal(kernel, hf.load(copy, **wish)[1]["lm_head"]["kernel"])


# --- bases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_base_is_the_same_wherever_it_is_read(folder, name):
    """On a mesh, in both layouts and types: its identity, and its numbers."""
    data = {"name": "e2e" if name == "gpt2" else "mnli"}
    fields = {"base": str(folder / name), "data": data, "seed": 0}

    def config(**changes):
        return ConfigDict(fields | {"model": {"dtype": "float32", "scan_layers": False, "remat": False, **changes}})

    plain = bases.load(config())
    stacked = layouts.to_scanned(plain.params)
    for shape, changes in (
        (MESHES[0], {}),
        (MESHES[1], {"scan_layers": True}),
        (None, {"scan_layers": True}),
        (None, {"param_dtype": "bfloat16"}),
        (MESHES[0], {"param_dtype": "bfloat16", "scan_layers": True}),
    ):
        mesh = None if shape is None else sharding.make_mesh(shape)
        base = bases.load(config(**changes), mesh=mesh)
        assert base.identity == plain.identity
        assert base.model.config.scan_layers == bool(changes.get("scan_layers"))
        wanted = flatten_dict(stacked if changes.get("scan_layers") else plain.params, sep="/")
        for path, leaf in flatten_dict(base.params, sep="/").items():
            kept = path.startswith("classifier") or "param_dtype" not in changes
            assert np.array_equal(leaf, wanted[path] if kept else wanted[path].astype(jnp.bfloat16)), path
            assert mesh is None or leaf.sharding.mesh == mesh
    again = bases.identity(plain.model, plain.params, str(folder / name), tokenizer=plain.tokenizer)
    assert again == plain.identity


def test_new_weights_are_made_where_they_belong():
    """`jax.jit(model.init)` with shardings: the same numbers, on no device more than its part."""
    model = gpt2.GPT2(dataclasses.replace(GPT2, scan_layers=True))
    mesh = sharding.make_mesh(MESHES[0])

    def init(key):
        return model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]

    key = jax.random.key(0)
    places = sharding.shardings(jax.eval_shape(init, key), mesh, sharding.rules_for(model, mesh))
    params = jax.jit(init, out_shardings=places)(key)
    assert jax.tree.all(jax.tree.map(lambda leaf, place: leaf.sharding == place, params, places))
    equal(params, jax.jit(init)(key))


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scan"), [("gpt2", True), ("gpt2, untied", False), ("bert", True), ("roberta", False)]
)
def test_shards_are_written_as_transformers_reads_them(folder, name, scan, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, params, _ = hf.load(folder / name, scan_layers=scan, place=placer(MODELS[name], MESHES[0]))
    hf.save(tmp_path / "one", model, params)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (folder / name / "model.safetensors").read_bytes()
    hf.save(tmp_path / "many", model, params, shard_size=20_000)
    files = sorted(path.name for path in (tmp_path / "many").iterdir())
    count = len(files) - 2
    shards = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    assert count > 2 and files == ["config.json", *shards, "model.safetensors.index.json"]
    for tensors in (load_file(tmp_path / "many" / shard) for shard in shards):
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    assert len({path.stat().st_mode for path in (tmp_path / "many").iterdir()}) == 1
    equal(hf.load(tmp_path / "many")[1], hf.load(folder / name)[1])
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * index["metadata"]["total_parameters"]
    kind = "GPT2LMHeadModel" if "gpt2" in name else json.loads((folder / name / "config.json").read_text())
    kind = kind if isinstance(kind, str) else kind["architectures"][0]
    one, many = (
        getattr(transformers, kind).from_pretrained(tmp_path / where).state_dict() for where in ("one", "many")
    )
    assert one.keys() == many.keys() and all((one[key] == many[key]).all() for key in one if "pooler" not in key)


def files_of(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_weights_replace_each_other_in_every_form(folder, tmp_path):
    """One file, more, fewer, one: what is obsolete is gone, and what is not weights stays."""
    model, params, tokenizer = hf.load(folder / "gpt2")
    hf.save(tmp_path, model, params, tokenizer)
    (tmp_path / "model-notes.safetensors").write_text("mine")
    others = {"config.json", "tokenizer.json", "model-notes.safetensors"}
    for n, size in enumerate((10_000, 20_000, 10**9)):
        params = jax.tree.map(lambda leaf: leaf + 1, params)
        hf.save(tmp_path, model, params, shard_size=size)
        equal(hf.load(tmp_path)[1], params)
        names = files_of(tmp_path) - others
        assert names == {"model.safetensors"} if n == 2 else all("-of-" in x or "index" in x for x in names)


def test_a_failed_save_leaves_the_old_shards(folder, tmp_path, monkeypatch):
    model, params, _ = hf.load(folder / "gpt2")
    hf.save(tmp_path, model, params, shard_size=20_000)
    before, written, write = files_of(tmp_path), [], save_file

    def break_off(tensors, path, metadata):
        if len(written) == 2:
            raise OSError("disk full")
        written.append(path)
        write(tensors, path, metadata)

    monkeypatch.setattr("lora_jax.interop.hf.models.save_file", break_off)
    with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path, model, jax.tree.map(lambda leaf: 2 * leaf, params), shard_size=20_000)
    equal(hf.load(tmp_path)[1], params)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scanned"])
def test_merged_one_by_one(folder, scan, tmp_path):
    """The files of the model merged whole, byte for byte; on a mesh to rounding."""
    method = lj.lora(lj.select("**/attn/{query,value}/kernel", axes=gpt2.AXES), rank=2)
    model, params, _ = hf.load(folder / "gpt2", scan_layers=scan)
    zero = method.init(jax.random.key(0), params)
    delta = jax.tree.map(lambda x: x + jnp.asarray(np.random.default_rng(0).normal(0, 0.1, x.shape), x.dtype), zero)
    hf.save(tmp_path / "whole", model, lj.merge(method.apply(params, delta)))
    hf.save(tmp_path / "lazily", model, method.apply(params, delta), merge=True)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "lazily")
    for name in files_of(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "lazily" / name).read_bytes()
    spread = hf.load(folder / "gpt2", scan_layers=scan, place=placer(model, MESHES[0]))[1]
    hf.save(tmp_path / "mesh", model, method.apply(spread, delta), merge=True, shard_size=20_000)
    one, other = (hf.load(tmp_path / name)[1] for name in ("whole", "mesh"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), one, other)


def test_what_changes_activations_is_not_merged(folder, tmp_path):
    model, params, _ = hf.load(folder / "gpt2")
    method = lj.adapter({"mlp_out": (2, 24)}, rank=2)
    adapted = method.apply(params, method.init(jax.random.key(0), params))
    with pytest.raises(ValueError, match=r"what changes activations \(mlp_out\) has no weight to go into"):
        hf.save(tmp_path / "new", model, adapted, merge=True)
    assert not (tmp_path / "new").exists()
