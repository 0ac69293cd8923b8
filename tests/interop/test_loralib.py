"""Checkpoints made by loralib itself, through torch.save and experiments.convert: the same model (check 20)."""

import copy
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import checkpoints
from lora_jax.interop import hf, loralib
from lora_jax.models import gpt2
from lora_jax.runs import bases
from tests.helpers.cli import run_entry

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("loralib")
transformers = pytest.importorskip("transformers")

from lora_jax.interop import torch_files  # noqa: E402  (imports torch)

ROOT = Path(__file__).resolve().parents[2]
D, ALPHA = 12, 7.0
SIZES = {"vocab_size": 31, "n_positions": 12, "n_embd": D, "n_layer": 2, "n_head": 3}
TOKENS = np.random.default_rng(1).integers(2, 31, (3, 11), dtype=np.int32)  # 1 is RoBERTa's padding


def randomize(module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)


@pytest.fixture(scope="module")
def reference():
    """A GPT-2 of transformers; every parameter is random."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()
    randomize(model, 0)
    return model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    model, params, _ = hf.load(folder)
    return model, params


def swap(parent, name: str, make, **kwargs):
    """Puts a layer of loralib, with random A and B, in the place of one of torch or transformers."""
    old = getattr(parent, name)
    new = make(**kwargs, lora_alpha=ALPHA)
    with torch.no_grad():
        new.weight.copy_(old.weight)
        if getattr(old, "bias", None) is not None:
            new.bias.copy_(old.bias)
        for factor in (new.lora_A, new.lora_B):
            factor.normal_(0, 0.4, generator=torch.Generator().manual_seed(new.lora_A.numel()))
    setattr(parent, name, new)


def fused(reference, enabled, rank: int = 3, **kwargs):
    """The authors' GPT-2: MergedLinear in every block."""
    model = copy.deepcopy(reference).train()
    shape = {"in_features": D, "out_features": 3 * D, "r": rank, "fan_in_fan_out": True}
    for block in model.transformer.h:
        swap(block.attn, "c_attn", theirs.MergedLinear, enable_lora=list(enabled), **shape, **kwargs)
    return model


def converted(state, tmp_path: Path) -> Path:
    """A state dict on the way that a user's file goes."""
    torch.save(state, tmp_path / "model.pt")
    torch_files.convert(tmp_path / "model.pt", tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def logits(model) -> np.ndarray:
    """In torch; as the model is: training mode leaves the adapter beside the weights, and nothing drops out here."""
    rates = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in rates:
        module.p = 0.0
    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.numpy()


def close(got, expected, tolerance: float) -> None:
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=tolerance * scale)


@functools.cache
def lifted(model):
    return jax.jit(lj.lift(model.apply))


def assert_same(model, params, method, delta, their_model, tolerance: float = 1e-5) -> None:
    """Lifted and merged; both differ from the base, or nothing would be compared. Sums in float32: 1e-5."""
    expected = logits(their_model)
    apply = lifted(model)
    adapted = method.apply(params, delta)
    close(apply({"params": adapted}, TOKENS), expected, tolerance)
    close(apply({"params": lj.merge(adapted)}, TOKENS), expected, tolerance)
    assert np.abs(np.asarray(apply({"params": params}, TOKENS)) - expected).max() > 0.01


@pytest.mark.parametrize(
    ("enabled", "ddp"),
    [
        ((True, False, True), False),
        ((True, False, True), True),
        ((True, True, True), True),
        ((False, False, True), False),
    ],
)
def test_fused_query_key_value(reference, base, tmp_path, enabled, ddp):
    their_model = fused(reference, enabled)
    state = theirs.lora_state_dict(their_model)
    if ddp:
        state = {"model_state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "step": 3}
    method, delta = loralib.load(converted(state, tmp_path), base[1], alpha=ALPHA, enabled=enabled)
    parts = [part for part, on in zip(("query", "key", "value"), enabled, strict=True) if on]
    assert set(delta) == {f"h_{n}/attn/{part}/kernel" for n in range(2) for part in parts}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(delta)} == {"float32"}
    assert lj.check(method, base[1]).trained == 2 * len(parts) * 3 * 2 * D
    assert_same(*base, method, delta, their_model)

    merged = lj.merge(method.apply(base[1], delta))
    their_model.eval()  # merges
    for n, block in enumerate(their_model.transformer.h):
        ours = [merged[f"h_{n}"]["attn"][part]["kernel"] for part in ("query", "key", "value")]
        close(np.concatenate(ours, axis=-1), block.attn.c_attn.weight.detach().numpy(), 1e-6)


def test_linear_of_several_ranks(reference, base, tmp_path, caplog):
    """One is above the full rank, which loralib allows."""
    their_model = copy.deepcopy(reference).train()
    for n, block in enumerate(their_model.transformer.h):
        swap(block.attn, "c_proj", theirs.Linear, in_features=D, out_features=D, r=[1, 13][n], fan_in_fan_out=True)
        swap(block.mlp, "c_fc", theirs.Linear, in_features=D, out_features=4 * D, r=4, fan_in_fan_out=True)
        swap(block.mlp, "c_proj", theirs.Linear, in_features=4 * D, out_features=D, r=5, fan_in_fan_out=True)
    method, delta = loralib.load(converted(theirs.lora_state_dict(their_model), tmp_path), base[1], alpha=ALPHA)
    assert_same(*base, method, delta, their_model)
    assert "h_1/attn/out/kernel has a rank above its full one, 12" in caplog.text
    again = lj.from_spec(checkpoints.load_adapter(checkpoints.save_adapter(tmp_path, method, delta, {}))[0].spec)
    jax.tree.map(np.testing.assert_array_equal, again.apply(base[1], delta), method.apply(base[1], delta))


def test_embeddings_adapt_the_look_up_alone(reference, folder, base, tmp_path):
    """loralib's head goes on reading the untouched matrix, so that ours must be one of its own."""
    their_model = copy.deepcopy(reference).train()
    swap(their_model.transformer, "wte", theirs.Embedding, num_embeddings=31, embedding_dim=D, r=4)
    swap(their_model.transformer, "wpe", theirs.Embedding, num_embeddings=12, embedding_dim=D, r=2)
    file = converted(theirs.lora_state_dict(their_model), tmp_path)
    model, params, _ = hf.load(folder, tie=False)
    method, delta = loralib.load(file, params, alpha=ALPHA)
    assert set(delta) == {"wte/embedding", "wpe/embedding"}
    assert_same(model, params, method, delta, their_model)
    merged = lj.merge(method.apply(params, delta))
    their_model.eval()
    for name in ("wte", "wpe"):
        close(merged[name]["embedding"], getattr(their_model.transformer, name).weight.detach().numpy(), 1e-6)
    with pytest.raises(ValueError, match=r"adapts transformer.wte alone.*are one: .*hf.load\(folder, tie=False\)"):
        loralib.load(file, base[1], alpha=ALPHA)


def test_an_adapted_head(reference, folder, base, tmp_path):
    their_model = copy.deepcopy(reference).train()
    swap(their_model, "lm_head", theirs.Linear, in_features=D, out_features=31, r=2, bias=False)
    file = converted(theirs.lora_state_dict(their_model), tmp_path)
    model, params, _ = hf.load(folder, tie=False)
    method, delta = loralib.load(file, params, alpha=ALPHA)
    assert_same(model, params, method, delta, their_model)
    with pytest.raises(ValueError, match=r"tie=False"):
        loralib.load(file, base[1], alpha=ALPHA)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_trained_biases_and_causal_masks(reference, base, tmp_path, mode):
    """Older GPT-2s call the masks of attention `bias`, and loralib saves them with the biases."""
    their_model = fused(reference, (True, False, True))
    for block in their_model.transformer.h:
        block.attn.register_buffer("bias", torch.ones(1, 1, 12, 12, dtype=torch.bool).tril())
        block.attn.register_buffer("masked_bias", torch.tensor(-1e4))
        with torch.no_grad():
            block.attn.c_attn.bias += 0.5
    state = theirs.lora_state_dict(their_model, bias=mode)
    assert ("transformer.h.0.attn.bias" in state) == (mode == "all")
    torch.save(state, tmp_path / "model.pt")
    written, left_out = torch_files.convert(tmp_path / "model.pt", tmp_path / "model.safetensors")
    masks = {f"transformer.h.{n}.attn.{kind}" for n in range(2) for kind in ("bias", "masked_bias")}
    assert set(left_out) == masks & set(state) and set(written) == set(state) - masks
    # A file that someone else made may hold them as well.
    save_file(load_file(tmp_path / "model.safetensors") | dict.fromkeys(masks, np.ones((1, 1, 12, 12), np.uint8)),
              tmp_path / "model.safetensors")  # fmt: skip
    method, delta = loralib.load(tmp_path / "model.safetensors", base[1], alpha=ALPHA)
    trained = {path for path, factors in delta.items() if set(factors) == {"value"}}
    expected = {f"h_{n}/attn/{part}/bias" for n in range(2) for part in ("query", "key", "value")}
    assert expected == trained if mode == "lora_only" else expected < trained
    assert_same(*base, method, delta, their_model)


def test_whole_models_say_in_which_state_they_are(reference, base, folder, tmp_path):
    their_model = fused(reference, (True, False, True))
    with torch.no_grad():
        their_model.transformer.ln_f.bias += 0.5
    file = converted(their_model.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"has weights .* beside the adapter.*say unmerged=True"):
        loralib.load(file, base[1], alpha=ALPHA)
    method, delta = loralib.load(file, base[1], alpha=ALPHA, unmerged=True)
    assert {path for path in delta if "value" in delta[path]} == {"ln_f/bias"}
    assert_same(*base, method, delta, their_model)
    untied, params, _ = hf.load(folder, tie=False)
    assert_same(untied, params, *loralib.load(file, params, alpha=ALPHA, unmerged=True), their_model)

    their_model.eval()  # the weights in the file hold the adapter now
    file = converted(their_model.state_dict(), tmp_path)
    for unmerged, says in ((False, "beside the adapter"), (True, r"h\.0\.attn\.c_attn\.weight is not the base's")):
        with pytest.raises(ValueError, match=says):
            loralib.load(file, base[1], alpha=ALPHA, unmerged=unmerged)
    their_model.train()  # taken back, but for rounding
    file = converted(their_model.state_dict(), tmp_path)
    assert set(loralib.load(file, base[1], alpha=ALPHA, unmerged=True)[1]) == set(delta)


def roberta(tmp_path: Path, labels: int = 3):
    """The authors' RoBERTa: Linear at query and value, and a classifier that trained. Base folder, model."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=31, hidden_size=D, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=14, type_vocab_size=1, num_labels=labels,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    randomize(model, 3)
    model.roberta.save_pretrained(tmp_path / "roberta")
    for layer in model.roberta.encoder.layer:
        for name in ("query", "value"):
            swap(layer.attention.self, name, theirs.Linear, in_features=D, out_features=D, r=4)
    return tmp_path / "roberta", model.train()


def nlu_state(model) -> dict:
    """What the authors' NLU scripts save: LoRA and the classifier."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if "lora_" in name or name.startswith("classifier")}


@pytest.mark.parametrize("labels", [3, 1])
def test_roberta_with_its_classifier(base, tmp_path, labels):
    folder, their_model = roberta(tmp_path, labels)
    file = converted(nlu_state(their_model), tmp_path)
    head = "regression" if labels == 1 else "classification"
    model, params, _ = hf.load(folder, head=head, labels=labels, key=jax.random.key(5))
    method, delta = loralib.load(file, params, alpha=ALPHA)
    assert {path for path in delta if "a" in delta[path]} == {
        f"h_{n}/attn/{part}/kernel" for n in range(2) for part in ("query", "value")
    }
    assert {path for path in delta if "value" in delta[path]} == {
        f"classifier/{part}/{leaf}" for part in ("dense", "out") for leaf in ("kernel", "bias")
    }
    assert_same(model, params, method, delta, their_model)
    two = hf.load(folder, head="classification", labels=2, key=jax.random.key(5))[1]
    with pytest.raises(ValueError, match=rf"classifier.out_proj.bias has shape \({labels},\), not \(2,\)"):
        loralib.load(file, two, alpha=ALPHA)

    with pytest.raises(ValueError, match=r"names begin with 'roberta.'"):
        loralib.load(file, base[1], alpha=ALPHA)

    full_file = converted(their_model.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"has weights .* beside the adapter"):
        loralib.load(full_file, params, alpha=ALPHA)
    jax.tree.map(np.testing.assert_array_equal, loralib.load(full_file, params, alpha=ALPHA, unmerged=True)[1], delta)


@pytest.fixture(scope="module")
def good(reference, tmp_path_factory) -> dict[str, np.ndarray]:
    """The tensors of a sound file, q and v of rank 3."""
    state = theirs.lora_state_dict(fused(reference, (True, False, True)))
    return load_file(converted(state, tmp_path_factory.mktemp("good")))


A, B = "transformer.h.1.attn.c_attn.lora_A", "transformer.h.1.attn.c_attn.lora_B"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if k != A}, r"h\.1\.attn\.c_attn\.lora_A is missing, while its partner"),
        (lambda t: {k: v for k, v in t.items() if k != B}, r"h\.1\.attn\.c_attn\.lora_B is missing, while its partner"),
        (lambda t: t | {A: t[A][:, :-1].copy()}, r"lora_A has shape \(6, 11\), not \(6, 12\) \(of rank 3, with"),
        (lambda t: t | {A: t[A][:-3].copy()}, r"lora_A has shape \(3, 12\), not \(6, 12\)"),
        (lambda t: t | {B: t[B][:-1].copy()}, r"lora_B has shape \(23, 3\), not \(24, 3\)"),
        (lambda t: t | {B: t[B][None]}, r"lora_B has shape \(1, 24, 3\)"),
        (lambda t: t | {B: np.array(1, np.float32)}, r"lora_A has shape \(6, 12\), not \(0, 12\)"),
        (lambda t: t | {A: np.zeros((0, D), np.float32), B: np.zeros((2 * D, 0), np.float32)}, "of rank 0"),
        (lambda t: t | {A: t[A] * np.float32(np.nan)}, "lora_A has entries that are not finite"),
        (lambda t: t | {A: t[A].astype(np.int32)}, "lora_A is int32"),
        (lambda t: t | {A: t[A].astype(np.float64)}, "lora_A is float64"),
        (lambda t: t | {f"{A}.weight": t[A]}, "the base has no place for transformer.h.1.attn.c_attn.lora_A.weight"),
        (lambda t: t | {A.replace("h.1", "h.2"): t[A]}, r"no place for transformer\.h\.2\.attn\.c_attn\.lora_A"),
        (lambda t: t | {A.replace("attn.c_attn", "ln_1"): t[A]}, r"no place for transformer\.h\.1\.ln_1\.lora_A"),
        (lambda t: t | {"x": t[A]}, "no place for x"),
        (lambda t: t | {"lm_head.bias": t[A]}, "no place for lm_head.bias"),
        (lambda t: t | {f"module.{A}": t[A]}, r"names begin with 'module.transformer.' and"),
        (lambda t: t | {"transformer.h.0.mlp.c_fc.bias": t[A]}, r"c_fc.bias has shape \(6, 12\), not \(48,\)"),
        (lambda t: {"h.0.mlp.c_fc.bias": np.ones(48, np.float32)}, "has no tensors of LoRA"),
        (lambda t: {}, "has no tensors of LoRA"),
    ],
)  # fmt: skip
def test_wrong_tensors(good, base, tmp_path, change, says):
    loralib.load(save(good, tmp_path), base[1], alpha=ALPHA)
    with pytest.raises(ValueError, match=says):
        loralib.load(save(change(good), tmp_path), base[1], alpha=ALPHA)


def save(tensors, folder: Path) -> Path:
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


def test_wrong_arguments(good, base, tmp_path):
    file, (_, params) = save(good, tmp_path), base
    for alpha in (float("nan"), float("inf"), "32", True, None):
        with pytest.raises(ValueError, match="alpha="):
            loralib.load(file, params, alpha=alpha)
    for enabled in ((True,), (False, False, False)):
        with pytest.raises(ValueError, match="enabled="):
            loralib.load(file, params, alpha=1, enabled=enabled)
    for enabled in ((True, True, True), (True, False, False)):
        with pytest.raises(ValueError, match=r"c_attn\.lora_A has shape .* with enabled="):
            loralib.load(file, params, alpha=1, enabled=enabled)
    with pytest.raises(ValueError, match=r"scanned layout"):
        loralib.load(file, gpt2.to_scanned(params), alpha=1)
    with pytest.raises(ValueError, match=r"none of the families encoder, gpt2"):
        loralib.load(file, {"kernel": np.ones((2, 2), np.float32)}, alpha=1)
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors is missing"):
        loralib.load(tmp_path / "nowhere.safetensors", params, alpha=1)


def test_the_command(tmp_path):
    folder, their_model = roberta(tmp_path)
    torch.save({"model_state_dict": nlu_state(their_model), "step": 7}, tmp_path / "model.pt")
    flags = [f"--checkpoint={tmp_path}/model.pt", f"--out={tmp_path}/x.safetensors"]
    done = run_entry("convert", *flags, f"--base={folder}", f"--alpha={ALPHA}", f"--adapter={tmp_path}/adapter")
    assert done.returncode == 0, done.stderr
    assert "left out: step" in done.stdout and "classifier/out/kernel" in done.stdout
    model, params, _ = hf.load(folder, head="classification", labels=3)
    method, delta, info = checkpoints.load_adapter(tmp_path / "adapter")
    checkpoints.check_base(info["base"], bases.identity(model, params, folder), "adapter")
    assert_same(model, params, method, delta, their_model)

    refused = run_entry("convert", *flags, f"--adapter={tmp_path}/adapter")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "error: --adapter, --base and --alpha go together: all three, or none"


@pytest.mark.slow
def test_the_command_unties_a_head_and_takes_enabled(reference, folder, tmp_path):
    their_model = fused(reference, (False, True, True))
    swap(their_model.transformer, "wte", theirs.Embedding, num_embeddings=31, embedding_dim=D, r=4)
    torch.save(their_model.state_dict(), tmp_path / "model.pt")
    done = run_entry(
        "convert",
        f"--checkpoint={tmp_path}/model.pt", f"--out={tmp_path}/x.safetensors", f"--base={folder}", "--unmerged",
        f"--alpha={ALPHA}", "--enabled=0,1,1", f"--adapter={tmp_path}/adapter.safetensors",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, params, _ = hf.load(folder, tie=False)
    method, delta, _ = checkpoints.load_adapter(tmp_path / "adapter.safetensors")
    assert "wte/embedding" in delta and "h_0/attn/query/kernel" not in delta
    assert_same(model, params, method, delta, their_model)
