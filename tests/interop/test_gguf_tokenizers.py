"""Tokenizers of GGUF files: id for id those that transformers makes of the same files, on texts of twenty scripts."""

import json

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from lora_jax.interop import gguf as ours
from lora_jax.interop import hf
from tests.helpers.gguf_texts import SPECIAL, TEXTS, byte_level, sentence_piece

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from tests.helpers import gguf_files  # noqa: E402

DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def split(expression: str):
    return pre_tokenizers.Split(Regex(expression), behavior="isolated")


def file_of(folder, tokenizer, architecture="llama"):
    """A file of one layer, with as many rows in its embedding as the tokenizer has tokens."""
    vocab = len(tokenizer["tokenizer.ggml.tokens"])
    keys = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8}
    keys |= {"attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": vocab}
    keys |= {"attention.key_length": 4, "attention.sliding_window": 4} if architecture != "llama" else {}
    matrix = np.zeros((8, 8), np.float32)
    tensors = {f"blk.0.attn_{name}.weight": (matrix, "F32") for name in ("q", "k", "v", "output")}
    tensors |= {f"blk.0.ffn_{name}.weight": (matrix, "F32") for name in ("gate", "up", "down")}
    tensors |= {f"blk.0.{name}_norm.weight": (matrix[0], "F32") for name in ("attn", "ffn")}
    tensors |= {
        "output_norm.weight": (matrix[0], "F32"),
        "token_embd.weight": (np.zeros((vocab, 8), np.float32), "F32"),
    }
    metadata = {"general.architecture": architecture, **{f"{architecture}.{key}": x for key, x in keys.items()}}
    return gguf_files.write(folder / "model.gguf", metadata | tokenizer, tensors)


def theirs_of(file):
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def merges_of(tokenizer) -> list:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def assert_same(tokenizer, theirs, names=TEXTS) -> None:
    """Ids, with special tokens and without, of single texts and of pairs, and the texts of the ids. Backwards and in
    parts too: what was not learnt as it stands, where the order of merges counts."""
    for name in names:
        text, ids = TEXTS[name], tokenizer.encode(TEXTS[name]).ids
        assert ids == theirs(text)["input_ids"], name
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        assert plain == theirs(text, add_special_tokens=False)["input_ids"], name
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids), name
        for part in (text[::-1], text[::2], text[1::3], text.swapcase(), *(text[start:] for start in range(1, 9))):
            assert tokenizer.encode(part).ids == theirs(part)["input_ids"], (name, part)
    assert merges_of(tokenizer) == merges_of(theirs.backend_tokenizer)
    assert tokenizer.encode("one", "two").ids == theirs("one", "two")["input_ids"]


@pytest.mark.parametrize(
    ("pre", "cut", "further"),
    [
        ("gpt-2", None, {}),
        ("default", None, {"add_bos_token": True}),
        ("qwen2", LLAMA3.replace("{1,3}", ""), {"add_bos_token": False}),
        ("llama-bpe", LLAMA3, {"add_bos_token": True, "add_eos_token": True}),
        ("smollm", DIGITS, {"add_bos_token": False}),
    ],
)
def test_byte_pairs(pre, cut, further, tmp_path):
    """transformers 5.24 does not know smollm and takes GPT-2's expression alone, and merges in Llama 3's whole tokens:
    both are set there as in the models' own tokenizer.json."""
    file = file_of(tmp_path, byte_level(pre, split(cut) if isinstance(cut, str) else cut, **further))
    theirs = theirs_of(file)
    if pre == "smollm":
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_of])
    theirs.backend_tokenizer.model.ignore_merges = pre == "llama-bpe"
    _, _, tokenizer = hf.load(file)
    assert_same(tokenizer, theirs)
    for name in sorted(set(TEXTS) - {"special", "control"}):  # bytes: nothing is lost
        assert tokenizer.decode(tokenizer.encode(TEXTS[name], add_special_tokens=False).ids) == TEXTS[name], name


def test_all_expressions_cut_as_transformers_has_them(tmp_path):
    """Of every name that both know; a name that transformers lacks it treats as GPT-2's."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    metadata = byte_level("gpt-2")
    for pre in ours.PRE:
        file = file_of(tmp_path, metadata | {"tokenizer.ggml.pre": pre})
        tokenizer = ours.open_file(file).tokenizer
        expression = GGUF_PRE_TOKENIZER_SPLITS.get(pre)
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
        cut = cut if expression is None else pre_tokenizers.Sequence([split(expression), cut])
        cut = pre_tokenizers.Sequence([DIGITS, cut]) if ours.PRE[pre] == "digits" else cut
        for text in TEXTS.values():
            assert tokenizer.pre_tokenizer.pre_tokenize_str(text) == cut.pre_tokenize_str(text), (pre, text)


def test_a_text_begins_with_bos_where_llama_cpp_adds_it_unasked(tmp_path):
    for pre, begins in {"llama-bpe": True, "tekken": True, "qwen2": False, "gpt-2": False}.items():
        tokenizer = ours.open_file(file_of(tmp_path, byte_level(pre))).tokenizer
        assert (tokenizer.encode("x").tokens[0] == "<|begin|>") == begins, pre


def test_whole_tokens_of_llama_3_need_no_merges(tmp_path):
    metadata = byte_level("llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqzqx"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    for pre, tokens in {"llama-bpe": ["zqzqx"], "qwen2": ["z", "q", "z", "q", "x"]}.items():
        file = file_of(tmp_path, metadata | {"tokenizer.ggml.pre": pre})
        assert ours.open_file(file).tokenizer.encode("zqzqx", add_special_tokens=False).tokens == tokens


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece(prefix, tmp_path):
    """Also id for id what SentencePiece itself gives, which transformers' reading does not: it puts a space before
    every text, as it does not read add_space_prefix. A text that begins with a space gets no second one, as in
    transformers and unlike SentencePiece."""
    metadata, model = sentence_piece(tmp_path, **({} if prefix else {"add_space_prefix": False}))
    file = file_of(tmp_path, metadata)
    _, _, tokenizer = hf.load(file)
    if prefix:
        assert_same(tokenizer, theirs_of(file), sorted(set(TEXTS) - {"special"}))
    for name in sorted(
        set(TEXTS) - {"special", "control"} - ({"space first", "spaces", "underscores"} if prefix else set())
    ):
        text = TEXTS[name]
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.Encode(text), name
        assert tokenizer.encode(text).ids == [1, *model.Encode(text)], name
        assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("▁", " "), name
    tokenizer.encode_special_tokens = True  # as texts of data are read
    assert tokenizer.encode("a<s>b<0x0A>", add_special_tokens=False).ids == model.Encode("a<s>b<0x0A>")


def test_what_is_no_part_of_a_text_is_not_merged_from_its_letters(tmp_path):
    """As SentencePiece has it: where special tokens are read as text, `<s>` is not the token that begins one."""
    metadata, _ = sentence_piece(tmp_path)
    for name, value in {"tokens": "s>", "scores": -1.0, "token_type": 1}.items():
        metadata[f"tokenizer.ggml.{name}"].append(value)
    assert {"<", "s>", "<s>"} <= set(metadata["tokenizer.ggml.tokens"])
    tokenizer = ours.open_file(file_of(tmp_path, metadata)).tokenizer
    tokenizer.encode_special_tokens = True
    assert 1 not in tokenizer.encode("a<s>b", add_special_tokens=False).ids


def test_gemma(tmp_path):
    """Without a space before the text, runs of spaces spelled as spaces, ranks by position and not by score."""
    metadata, model = sentence_piece(tmp_path, add_space_prefix=False, add_bos_token=True)
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [" " * len(t) if len(t) > 1 and not t.strip("▁") else t for t in tokens]
    metadata["tokenizer.ggml.scores"] = [0.0] * len(tokens)
    kinds = metadata["tokenizer.ggml.token_type"]
    spaces = [" " in token for token in metadata["tokenizer.ggml.tokens"]]
    assert any(spaces)
    metadata["tokenizer.ggml.token_type"] = [4 if space else kind for space, kind in zip(spaces, kinds, strict=True)]
    file = file_of(tmp_path, metadata, "gemma3")
    tokenizer = ours.open_file(file).tokenizer
    assert_same(tokenizer, theirs_of(file), sorted(set(TEXTS) - {"special"}))
    for name in sorted(set(TEXTS) - {"special", "control"}):
        assert tokenizer.encode(TEXTS[name], add_special_tokens=False).ids == model.Encode(TEXTS[name]), name


def test_special_tokens_and_template(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = ours.open_file(file_of(tmp_path, byte_level("gpt-2") | {"tokenizer.chat_template": template}))
    names = ("unk_token", "bos_token", "eos_token")
    assert file.special_tokens == dict(zip(names, SPECIAL, strict=True)) | {"pad_token": "<|end|>"}
    assert file.chat_template == template
    assert ours.open_file(file_of(tmp_path, byte_level("gpt-2"))).chat_template is None
    bad = ours.open_file(file_of(tmp_path, byte_level("gpt-2") | {"tokenizer.chat_template": 3}))
    with pytest.raises(ValueError, match="chat_template is 3, not a text"):
        bad.chat_template  # noqa: B018


WRONG = {
    "another pre-tokenizer": ({"tokenizer.ggml.pre": "zulu"}, "tokenizer.ggml.pre is 'zulu'; default, gpt-2, smollm"),
    "another kind": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'; only 'gpt2' and 'llama'"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
    "a merge of one": ({"tokenizer.ggml.merges": ["ab"]}, "has 'ab', not a pair"),
    "a merge of nothing known": ({"tokenizer.ggml.merges": ["qqqq zzzz"]}, "its tokenizer cannot be made"),
    "too few types": ({"tokenizer.ggml.token_type": [1, 2]}, "token_type has 2 entries for"),
    "no such id": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, but the tokens are"),
    "an id that is no number": ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id is '2'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tokenizer_is_refused(name, tmp_path):
    changes, message = WRONG[name]
    metadata = {key: value for key, value in (byte_level("gpt-2") | changes).items() if value is not None}
    file = file_of(tmp_path, metadata)
    with pytest.raises(ValueError, match=message) as error:
        hf.load(file)
    assert str(file) in str(error.value)


def test_two_tokens_of_one_name_are_refused(tmp_path):
    metadata = byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"][5] = metadata["tokenizer.ggml.tokens"][9]
    with pytest.raises(ValueError, match="tokens 5 and 9 are both"):
        hf.load(file_of(tmp_path, metadata))
