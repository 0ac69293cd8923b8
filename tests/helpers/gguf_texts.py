"""Texts of many scripts and kinds, and tokenizers' metadata as llama.cpp's converter writes it."""
# ruff: noqa: RUF001  (letters that look like Latin ones)

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SCRIPTS = {
    "Latin": "Hello, world! It's a café isn't it? Xin chào thế giới. Łódź, Ærø, straße",
    "Cyrillic": "Привет, мир! Как дела? Ђорђе",
    "Greek": "Γειά σου Κόσμε, ΣΊΣΥΦΟΣ",
    "Hebrew": "שלום עולם, שָׁלוֹם",
    "Arabic": "مرحبا بالعالم ١٢٣ السَّلامُ",
    "Devanagari": "नमस्ते दुनिया १२३ क्षत्रिय",
    "Bengali": "হ্যালো বিশ্ব",
    "Tamil": "வணக்கம் உலகம்",
    "Thai": "สวัสดีชาวโลก ๑๒๓",
    "Han": "你好,世界!今天是2024年。繁體字",
    "Kana": "こんにちは世界カタカナ・ﾊﾝｶｸ",
    "Hangul": "안녕하세요 세계",
    "Georgian": "გამარჯობა მსოფლიო",
    "Armenian": "Բարեւ աշխարհ",
    "Ethiopic": "ሰላም ልዑል",
    "Tibetan": "སྐད་ཡིག",
    "Burmese": "မင်္ဂလာပါ",
    "Khmer": "ជំរាបសួរ",
    "Cherokee": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "Gothic": "𐍈𐌰 𓀀",
}
KINDS = {
    "emoji": "😀👩‍👩‍👧🇩🇪🏳️‍🌈 ok ☃",
    "digits": "12345678 apples, 3.14159 pies in 2024, 000 ½ ² Ⅷ 𝟙𝟚",
    "spaces": "  two   three    four\ttab\t\tand \u00a0\u3000\u200b\ufeffend  ",
    "lines": "a\n\nb\r\n\r\n  c \n\n\n d",
    "code": "def f(x):\n    return x**2  # ok\n\tif (a != b) { c++; }\n",
    "marks": "e\u0301 a\u0308 n\u0303 é ä ñ ﬁ Å ｆｕｌｌ q\u0323\u0307",
    "case": "don't DON'T we'll I'D camelCaseWord HTTPServer ǅ",
    "address": "https://example.org/a_b?q=1&r=%20#x <table> </table>",
    "control": "\x00\x01\x7f",
    "long": "a" * 200 + "0" * 50,
    "space first": " hello",
    "nothing": "",
    "special": "<|begin|>user\nhi<|end|> <|begin|><|unused|>x<think>y</think> <0x0A> <unk>",
    "underscores": "▁under ▁▁score a▁b",
}
TEXTS = SCRIPTS | KINDS
SPECIAL = ("<|unk|>", "<|begin|>", "<|end|>")
DEFINED = ("<think>", "</think>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def byte_level(pre: str, split: Any = None, **further: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE tokenizer that is learnt from the texts, cut by `split` first."""
    tokenizer = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = bytes_of if split is None else pre_tokenizers.Sequence([split, bytes_of])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        [text for name, text in TEXTS.items() if name != "special" for _ in range(3)], trainer
    )
    state = json.loads(tokenizer.to_str())["model"]
    tokens = [*SPECIAL, *sorted(state["vocab"], key=state["vocab"].__getitem__), *DEFINED]
    kinds = [CONTROL] * len(SPECIAL) + [NORMAL] * len(state["vocab"]) + [USER_DEFINED] * len(DEFINED)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
        **{f"tokenizer.ggml.{name}_token_id": n for n, name in enumerate(("unknown", "bos", "eos"))},
        "tokenizer.ggml.padding_token_id": 2,
        **{f"tokenizer.ggml.{name}": value for name, value in further.items()},
    }


def sentence_piece(folder: Path, **further: Any) -> tuple[dict[str, Any], Any]:
    """Metadata of a SentencePiece BPE model that is learnt from the texts, and the model itself."""
    import sentencepiece

    lines = [line for text in TEXTS.values() for line in text.replace("\x00", "").splitlines() for _ in range(3)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "learnt"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=further.get("add_space_prefix", True),
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "learnt.model"))
    kinds = [
        UNKNOWN if model.IsUnknown(n) else CONTROL if model.IsControl(n) else BYTE if model.IsByte(n) else NORMAL
        for n in range(len(model))
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.IdToPiece(n) for n in range(len(model))],
        "tokenizer.ggml.scores": [model.GetScore(n) for n in range(len(model))],
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{name}_token_id": n for n, name in enumerate(("unknown", "bos", "eos"))},
        **{f"tokenizer.ggml.{name}": value for name, value in further.items()},
    }
    return metadata, model
