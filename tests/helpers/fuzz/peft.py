"""PEFT's adapter folders, spoiled in ways that PEFT's users might: each is an error, or means what it means to PEFT."""

import copy
import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft as theirs
from flax.traverse_util import flatten_dict

import lora_jax as lj
from lora_jax.interop import peft
from lora_jax.interop.hf import gpt2 as hf_gpt2
from lora_jax.interop.hf.families import layouts
from tests.helpers.fuzz.mutations import Files, spoil
from tests.helpers.fuzz.runner import Part, write
from tests.helpers.peft_models import adapter, base, quietly, written

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS = {
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["c_attn", "mlp.c_proj"],
    "rank_pattern": {"h.1.mlp.c_proj": 2},
    "alpha_pattern": {"c_attn": 7},
    "modules_to_save": ["ln_f"],
    "bias": "lora_only",
    "fan_in_fan_out": True,
}
JUNK = [
    None,
    True,
    False,
    0,
    1,
    3,
    -1,
    2.5,
    "",
    "x",
    "3",
    "false",
    "all",
    "c_fc",
    [],
    ["c_fc"],
    [1],
    {},
    {"c_attn": 4},
    [[]],
]


def parts(folder):
    """Header and data of the file."""
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def put(folder, header, data, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def in_header(change):
    """A mutation of one tensor's entry: `change(rng, header, name)`."""

    def mutate(rng, folder):
        header, data = parts(folder)
        name = rng.choice([name for name in header if name != "__metadata__"])
        put(folder, change(rng, header, name) or header, data)

    return mutate


def rename(rng, header, name):
    new = rng.choice(
        [
            name.replace("lora_A", "lora_B"),
            name.replace("base_model.", ""),
            name.replace("h.", "h.1"),
            name.replace("weight", "bias"),
            name.replace("weight", "default.weight"),
            name[:-1],
            name.upper(),
            name + "\u00e9",
            "../" + name,
            "",
        ]
    )
    return {(new if key == name else key): entry for key, entry in header.items()}


def drop(rng, header, name):
    del header[name]


def retype(rng, header, name):
    header[name]["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U8", "BOOL", "f32", "F8_E4M3", "", None, 7])


def reshape(rng, header, name):
    shape = header[name]["shape"]
    right = [shape[::-1], [*shape, 1], shape[:-1], [1, *shape], [2 * shape[0], *shape[1:]], [int(np.prod(shape))]]
    wrong = [[-n for n in shape], [float(n) for n in shape], "shape", None, [10**30], [0, *shape], []]
    header[name]["shape"] = rng.choice([*right, *wrong])


def move(rng, header, name):
    start, end = header[name]["data_offsets"]
    near = [[start + 4, end + 4], [end, start], [start, end + 4], [start, end - 4], [0, end - start], [-4, end - start]]
    wrong = [[start], [start, end, end], ["0", "4"], None, [start, 10**18], [2**63, 2**64], [1.0, 2.0]]
    header[name]["data_offsets"] = rng.choice([*near, *wrong])


def alias(rng, header, name):
    other = rng.choice([key for key in header if key not in ("__metadata__", name)])
    header[other]["data_offsets"], header[other]["shape"] = header[name]["data_offsets"], header[name]["shape"]


def swap(rng, header, name):
    other = rng.choice([key for key in header if key not in ("__metadata__", name)])
    header[other], header[name] = header[name], header[other]


def lose_field(rng, header, name):
    del header[name][rng.choice(["dtype", "shape", "data_offsets"])]


def add_tensor(rng, header, name):
    new = rng.choice(["base_model.model.x.lora_A.weight", name.replace("c_attn", "c_fc"), "lora_A", name + ".weight"])
    header[new] = {"dtype": "F32", "shape": [0], "data_offsets": [header[name]["data_offsets"][1]] * 2}


def remetadata(rng, header, name):
    header["__metadata__"] = rng.choice(
        [None, {}, {"format": "np"}, {"format": 3}, [], "pt", {"format": "pt", "x": "y"}]
    )


def twice(rng, folder):
    header, data = parts(folder)
    name = rng.choice([name for name in header if name != "__metadata__"])
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    put(folder, text.encode(), data)


def resize(rng, folder):
    header, data = parts(folder)
    put(folder, header, data, size=rng.choice([0, 1, 2**63, 2**64 - 1, 100_000_001, len(json.dumps(header)), 8]))


def cut(rng, folder):
    file = folder / rng.choice([WEIGHTS, CONFIG])
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def append(rng, folder):
    file = folder / rng.choice([WEIGHTS, CONFIG])
    file.write_bytes(file.read_bytes() + rng.choice([b"\0", b" ", b"}", b"x" * 100]))


def flip(rng, folder):
    file = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    content = bytearray(file.read_bytes())
    end = struct.unpack("<Q", content[:8])[0] + 8 if file.name == WEIGHTS and rng.random() < 0.7 else len(content)
    for _ in range(rng.randrange(1, 4)):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))


def poison(rng, folder):
    header, data = parts(folder)
    at = 4 * rng.randrange(len(data) // 4)
    bad = rng.choice([float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
    put(folder, header, data[:at] + struct.pack("<f", bad) + data[at + 4 :])


def in_config(change):
    def mutate(rng, folder):
        config = json.loads((folder / CONFIG).read_text())
        config = change(rng, config, rng.choice(sorted(config))) or config
        (folder / CONFIG).write_text(json.dumps(config))

    return mutate


def forget(rng, config, name):
    del config[name]


def set_junk(rng, config, name):
    config[name] = rng.choice(JUNK)


def set_used(rng, config, name):
    config[rng.choice([*FIELDS, "layers_to_transform", "exclude_modules", "use_rslora", "lora_bias"])] = rng.choice(
        JUNK
    )


def set_number(rng, config, name):
    config[rng.choice(["r", "lora_alpha", "lora_dropout"])] = rng.choice(
        [2, 4, -3, 0.5, 10**30, 10**400, float("nan"), float("inf"), "3", [3], True]
    )


def set_pattern(rng, config, name):
    key = rng.choice(["c_attn", "attn", "^transformer.h.0.mlp.c_proj", "c_.*", "(", "a" * 2000, "(c_attn|c_proj)", ""])
    config[rng.choice(["rank_pattern", "alpha_pattern"])] = {key: rng.choice([1, 3, 4, "3", None, 2.5])}


def set_targets(rng, config, name):
    names = [
        ["c_attn"],
        ["c_proj", "c_attn"],
        ["c_attn", "mlp.c_proj", "x"],
        ["c_attn", "c_attn", "mlp.c_proj"],
        ["attn"],
    ]
    names += [[f"transformer.h.{n}.attn.c_attn" for n in "012"], ["wte"], []]
    config["target_modules"] = rng.choice([*names, "all-linear", r".*(c_attn|mlp\.c_proj)", "c_attn", None, "*"])


def rename_field(rng, config, name):
    config[rng.choice([name.upper(), name + "_", " " + name, ""])] = config.pop(name)


def config_twice(rng, folder):
    text = (folder / CONFIG).read_text()
    name = rng.choice(sorted(json.loads(text)))
    (folder / CONFIG).write_text(text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice(JUNK))}}}")


def wrap(rng, folder):
    text = (folder / CONFIG).read_text()
    spoiled = [
        f"[{text}]",
        "\ufeff" + text,
        text.replace('"', "'"),
        "null",
        "3",
        text.replace(":", ",", 1),
        text + text,
    ]
    (folder / CONFIG).write_text(rng.choice(spoiled))


def lose_file(rng, folder):
    file = folder / rng.choice([WEIGHTS, CONFIG])
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
    elif rng.random() < 0.5:
        file.write_bytes(b"")


HEADER = [rename, drop, retype, reshape, move, alias, swap, lose_field, add_tensor, remetadata]
CONFIGS = [forget, set_junk, set_used, set_number, set_pattern, set_targets, rename_field]
MUTATIONS = [*map(in_header, HEADER), *map(in_config, CONFIGS), twice, resize, cut, append, flip, poison]
MUTATIONS += [config_twice, wrap, lose_file]


def folders() -> Part:
    with tempfile.TemporaryDirectory() as made:
        folder = written(adapter("gpt2", **FIELDS), Path(made))
        files = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    return Part(files, lambda folder: peft.load(folder, base("gpt2").params), check, spoil_folder)


def spoil_folder(rng: random.Random, files: Files) -> Files:
    if rng.random() < 0.3:
        return spoil(rng, files)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write(folder, files)
        rng.choice(MUTATIONS)(rng, folder)
        return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def check(folder: Path, loaded: Any) -> None:
    """Merged it is what PEFT makes of the folder."""
    want, got = merged_by_peft(folder), merged_here(*loaded)
    for name, tensor in got.items():
        scale = max(1.0, float(np.abs(tensor).max()))
        np.testing.assert_allclose(tensor, want[name].numpy(), rtol=0, atol=1e-5 * scale, err_msg=name)


def merged_by_peft(folder: Path) -> dict[str, Any]:
    """All weights, after PEFT read the adapter and merged it."""
    made = quietly(theirs.PeftModel.from_pretrained, copy.deepcopy(base("gpt2").torch), folder)
    return quietly(made.merge_and_unload).state_dict()


def merged_here(method: lj.ParamTransform, delta: lj.Delta) -> dict[str, np.ndarray]:
    merged = flatten_dict(lj.merge(method.apply(base("gpt2").params, delta)), sep="/")
    names = layouts(hf_gpt2.ARCHITECTURE, flatten_dict(base("gpt2").params, sep="/"), prefixed=True)
    return {name: layout.join(*(np.asarray(merged[path]) for path in layout.paths)) for name, layout in names.items()}
