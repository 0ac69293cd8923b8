"""Models keep what they were: the fields of config.json, heads of several numbers, tasks, finite weights, sizes."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.interop import hf, peft, torch_files
from lora_jax.models import gpt2
from tests.helpers.hf_sizes import ENCODER, GPT2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"GPT2": GPT2, "Roberta": ENCODER, "Bert": ENCODER}
OF_TRAINING = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7, "task_specific_params": {"x": {"y": 1}}}
RATES = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.4}
NAMES = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "LMHeadModel", {"attn_pdrop": 0.3, "embd_pdrop": 0.2, "resid_pdrop": 0.0}),
    "gpt2 with labels": ("GPT2", "LMHeadModel", {**NAMES, "summary_type": "mean", "use_cache": False}),
}
for _family in ("Roberta", "Bert"):
    CASES |= {
        f"{_family}, bare": (_family, "Model", {**RATES, "initializer_range": 0.5}),
        f"{_family}, classes": (_family, "ForSequenceClassification", {**RATES, **NAMES}),
        f"{_family}, classes, said": (
            _family,
            "ForSequenceClassification",
            {**NAMES, "problem_type": "single_label_classification"},
        ),
        f"{_family}, several labels": (
            _family,
            "ForSequenceClassification",
            {**RATES, **NAMES, "problem_type": "multi_label_classification"},
        ),
        f"{_family}, a number": (
            _family,
            "ForSequenceClassification",
            {"id2label": {0: "score"}, "label2id": {"score": 0}},
        ),
        f"{_family}, numbers": (
            _family,
            "ForSequenceClassification",
            {**RATES, **NAMES, "problem_type": "regression"},
        ),
    }


def make(folder: Path, family: str, kind: str, **fields: Any) -> Any:
    """A random model of transformers, saved."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES[family] | {"pad_token_id": 1} | fields)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    model.save_pretrained(folder)
    return model


def fields_of(folder: Path) -> dict[str, Any]:
    """Of the config, as transformers reads it."""
    fields = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in fields.items() if name not in ("transformers_version", "_name_or_path")}


QUICK = ("gpt2", "Roberta, classes", "Roberta, several labels", "Roberta, numbers", "Bert, a number", "Bert, numbers")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_a_config_comes_back_as_it_was(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family, kind, fields = CASES[name]
    reference = make(tmp_path / "base", family, kind, **OF_TRAINING | fields)
    model, params, tokenizer = hf.load(tmp_path / "base")
    assert "made new" not in caplog.text
    hf.save(tmp_path / "saved", model, params, tokenizer, like=tmp_path / "base")
    assert fields_of(tmp_path / "saved") == fields_of(tmp_path / "base")
    again = type(reference).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in reference.state_dict().items() if "pooler" not in name)
    same, back, _ = hf.load(tmp_path / "saved")
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if "number" in name:
        assert (model.config.head, model.config.labels) == ("regression", 3 if name.endswith("numbers") else 1)


@pytest.mark.parametrize("labels", [2, 3])
def test_a_new_head_has_labels_of_its_own(labels: int, tmp_path: Path) -> None:
    """The base's names are of another task, also where there are as many; the rates are still the base's."""
    make(tmp_path / "base", "Roberta", "ForTokenClassification", **RATES, **NAMES)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_labels": 3}))
    model, params, _ = hf.load(tmp_path / "base", head="classification", labels=labels)
    hf.save(tmp_path / "saved", model, params, like=tmp_path / "base")
    assert "num_labels" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    base, saved = fields_of(tmp_path / "base"), fields_of(tmp_path / "saved")
    differing = {name for name in base.keys() | saved.keys() if base.get(name) != saved.get(name)}
    assert differing == {"architectures", "id2label", "label2id", "problem_type"}
    assert saved["id2label"] == {i: f"LABEL_{i}" for i in range(labels)}


def test_like_is_of_the_same_family(tmp_path: Path) -> None:
    make(tmp_path / "bert", "Bert", "Model")
    make(tmp_path / "roberta", "Roberta", "Model")
    model, params, _ = hf.load(tmp_path / "bert")
    with pytest.raises(ValueError, match="roberta is a roberta, but the model is a bert"):
        hf.save(tmp_path / "saved", model, params, like=tmp_path / "roberta")
    assert not (tmp_path / "saved").exists()


def test_fields_that_the_model_has_are_the_models(tmp_path: Path) -> None:
    """An older name of a field, the number type, a head that is no longer tied."""
    make(tmp_path / "base", "GPT2", "LMHeadModel")
    file = tmp_path / "base" / "config.json"
    fields = json.loads(file.read_text())
    del fields["n_layer"], fields["dtype"], fields["bos_token_id"]
    fields |= {"num_hidden_layers": 2, "torch_dtype": "float16", "auto_map": {"AutoModel": "x.Y"}}
    file.write_text(json.dumps(fields))
    model, params, _ = hf.load(tmp_path / "base", tie=False, dtype="bfloat16")
    hf.save(tmp_path / "saved", model, params, like=tmp_path / "base")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["n_layer"] == 2 and saved["tie_word_embeddings"] is False and saved["dtype"] == "bfloat16"
    assert not {"num_hidden_layers", "torch_dtype", "auto_map", "bos_token_id"} & saved.keys()


def test_a_head_of_several_numbers_is_not_trained_on_one(tmp_path: Path) -> None:
    make(tmp_path, "Bert", "ForSequenceClassification", **NAMES, problem_type="regression")
    with pytest.raises(ValueError, match="a head of one label, not of 3: labels=1"):
        training.classifier(hf.load(tmp_path)[0])
    assert hf.load(tmp_path, head="regression", labels=1)[0].config.labels == 1


OTHERS = [
    *((family, kind) for family in ("Roberta", "Bert") for kind in ("ForTokenClassification", "ForMultipleChoice")),
    *((family, "ForQuestionAnswering") for family in ("Roberta", "Bert", "GPT2")),
    *(("GPT2", kind) for kind in ("ForTokenClassification", "ForSequenceClassification", "DoubleHeadsModel")),
]


@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_a_model_of_another_task_is_refused(
    family: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless a head is asked for: the file's is left out, with a warning, and all else is what the file has."""
    reference = make(tmp_path, family, kind)
    wanted: dict[str, Any] = {"head": "lm"} if family == "GPT2" else {"head": "classification", "labels": 3}
    with pytest.raises(ValueError, match=f"config.json says {family}{kind}, whose head is not read here.*head="):
        hf.load(tmp_path)
    model, params, _ = hf.load(tmp_path, **wanted)
    assert f"is a {family}{kind}: its head is not used" in caplog.text
    hf.save(tmp_path / "saved", model, params)
    ours = "LMHeadModel" if family == "GPT2" else "ForSequenceClassification"
    again = getattr(transformers, f"{family}{ours}").from_pretrained(tmp_path / "saved")
    backbone = {name: x for name, x in again.base_model.state_dict().items() if "pooler" not in name}
    expected = reference.base_model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in backbone.items())
    with pytest.raises(ValueError, match="architectures=3, not a list of names"):
        spoil(tmp_path, architectures=3)


def spoil(folder: Path, **fields: Any) -> None:
    """Loads the folder with other fields in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    hf.load(folder)


MODEL = gpt2.GPT2(gpt2.GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, eos_token_id=0))


def params_of(value: float, dtype: str = "float32") -> Any:
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, dtype), shapes)


def test_a_merge_beyond_the_range_of_float16_is_not_saved(tmp_path: Path) -> None:
    params, method = params_of(60_000.0, "float16"), lj.lora(lj.select("**/attn/out/kernel"), rank=1, alpha=1)
    hf.save(tmp_path, MODEL, params_of(1.0, "float16"))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    delta = jax.tree.map(lambda x: x * 0 + 100, method.init(jax.random.key(0), params))
    message = r"h\.0\.attn\.c_proj\.weight has entries that are not finite, or beyond the range of float16"
    with pytest.raises(ValueError, match=message):
        hf.save(tmp_path, MODEL, method.apply(params, delta), merge=True)
    with pytest.raises(ValueError, match=message):
        hf.save(tmp_path, MODEL, lj.merge(method.apply(params, delta)))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_params_that_are_not_finite_are_not_saved(bad: float, dtype: str, tmp_path: Path) -> None:
    params = params_of(1.0, dtype)
    params["ln_f"]["bias"] = params["ln_f"]["bias"].at[3].set(bad)
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.bias has entries that are not finite"):
        hf.save(tmp_path, MODEL, params)
    assert not list(tmp_path.iterdir())


def test_adapters_and_torch_files_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    params, method = params_of(1.0), lj.lora(lj.select("**/attn/out/kernel"), rank=1)
    delta = method.init(jax.random.key(0), params)
    delta["h_0/attn/out/kernel"]["b"] = delta["h_0/attn/out/kernel"]["b"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"c_proj\.lora_B\.weight has entries that are not finite"):
        peft.save(tmp_path / "peft", method, delta, params=params)
    torch.save({"h.0.attn.c_attn.lora_A": torch.tensor([1.0, float("inf")])}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.lora_A has entries that are not finite"):
        torch_files.convert(tmp_path / "x.pt", tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


FIELDS = {
    "GPT2": ["n_layer", "num_hidden_layers", "n_embd", "hidden_size", "n_positions", "vocab_size", "n_inner"],
    "Roberta": ["num_hidden_layers", "hidden_size", "max_position_embeddings", "vocab_size", "intermediate_size"],
    "Bert": ["num_hidden_layers", "hidden_size", "max_position_embeddings", "type_vocab_size", "intermediate_size"],
}
OLDER = {"hidden_size": "(hidden_size|n_embd)", "num_hidden_layers": "(num_hidden_layers|n_layer)"}


@pytest.mark.parametrize("size", [10**9 - 1, pytest.param(3 * 10**30, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "field"), [(family, field) for family in FIELDS for field in FIELDS[family]])
def test_sizes_are_compared_with_the_tensors(
    family: str, field: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Before names of layers and shapes are made of them."""
    folder = tmp_path_factory.getbasetemp() / f"sizes-{family}"
    if not folder.exists():
        make(folder, family, "Model")
        (folder / "config.json").rename(folder / "good.json")
    fields = json.loads((folder / "good.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {field: size}))
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        name = OLDER.get(field, field)
        differs = rf"config\.json says {name} {size}, but .*(\d+ (rows|columns|layers))$"
        with pytest.raises(ValueError, match=rf"{differs}|config\.json has {name}={size}, too large for any model"):
            hf.load(folder)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 1


def test_layers_are_counted_and_not_named_by_the_highest(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    make(tmp_path, "GPT2", "Model")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"h.999999999.ln_1.bias": np.ones(12, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="n_layer 1000000000, but the tensors are of 3 layers"):
        spoil(tmp_path, n_layer=10**9)
