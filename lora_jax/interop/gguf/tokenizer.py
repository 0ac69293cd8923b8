"""The tokenizer of a GGUF file, from its metadata alone, as transformers makes it from the same file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # some of tokenizer.ggml.token_type
# "ggml" names of ids -> the names in a tokenizer_config.json
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
# tokenizer.ggml.pre of byte-level BPE -> what a text is split at before pairs are merged: GPT-2's expression ("") as
# `tokenizers` has it, after single digits ("digits") or without, or another expression.
PRE = dict.fromkeys(("default", "gpt-2"), "")
PRE |= dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b"), "digits")
PRE |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3)
PRE |= dict.fromkeys(("smaug-bpe",), _LLAMA3) | {"tekken": _TEKKEN}
PRE |= dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2)
# Those whose tokens come whole, without merges, where a piece is one; and whose texts begin with the bos token unless
# the file says otherwise: as in llama.cpp, and in the models' own tokenizer.json.
_WHOLE = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def tokenizer_of(metadata: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The tokenizer; None where the metadata has none.

    Raises:
      ValueError: it is of another kind than byte-level BPE ("gpt2") and SentencePiece's BPE ("llama"), with a
        pre-tokenizer that is not known, or damaged.
    """
    if "tokenizer.ggml.model" not in metadata:
        return None
    kind, tokens = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' and 'llama' are supported")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{path}: the metadata has a tokenizer, but no tokenizer.ggml.tokens")
    parts = _Parts(metadata, path, tokens)
    try:
        tokenizer = parts.byte_level() if kind == "gpt2" else parts.sentence_piece()
        _add_special(tokenizer, parts)
    except ValueError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: its tokenizer cannot be made ({error})") from error
    return tokenizer


def special_tokens(metadata: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The tokens by their names in a tokenizer_config.json, of those that the file names."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    named: dict[str, str] = {}
    for name, ours in SPECIAL.items():
        key = f"tokenizer.ggml.{name}_token_id"
        if (token := metadata.get(key)) is not None:
            if type(token) is not int or not 0 <= token < len(tokens):
                raise ValueError(f"{path}: {key} is {token!r}, but the tokens are {len(tokens)}")
            named[ours] = tokens[token]
    return named


class _Parts:
    """What the metadata says of a tokenizer."""

    def __init__(self, metadata: Mapping[str, Any], path: Path, tokens: list[str]) -> None:
        self.metadata, self.path, self.tokens = metadata, path, tokens
        self.types: Sequence[int] = self.numbers("token_type", _NORMAL)
        self.special = special_tokens(metadata, path)

    def numbers(self, name: str, default: int) -> list:
        """One number for each token."""
        numbers = list(self.metadata.get(f"tokenizer.ggml.{name}", [default] * len(self.tokens)))
        if len(numbers) != len(self.tokens):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{name} has {len(numbers)} entries for {len(self.tokens)} tokens"
            )
        return numbers

    def vocabulary(self, tokens: list[str]) -> dict[str, int]:
        vocabulary: dict[str, int] = {}
        for number, token in enumerate(tokens):
            if vocabulary.setdefault(token, number) != number:
                raise ValueError(f"{self.path}: tokens {vocabulary[token]} and {number} are both {token!r}")
        return vocabulary

    def merges(self) -> list[tuple[str, str]] | None:
        """The file's own, if it has some."""
        if (given := self.metadata.get("tokenizer.ggml.merges")) is None:
            return None
        pairs = [tuple(merge.split(" ")) for merge in given]
        if wrong := [merge for merge, pair in zip(given, pairs, strict=True) if len(pair) != 2]:
            raise ValueError(f"{self.path}: tokenizer.ggml.merges has {wrong[0]!r}, not a pair of tokens")
        return pairs  # type: ignore[return-value]

    @property
    def pre(self) -> str:
        return self.metadata.get("tokenizer.ggml.pre", "default")

    def byte_level(self) -> Tokenizer:
        """GPT-2's kind."""
        if self.pre not in PRE:
            raise ValueError(f"{self.path}: tokenizer.ggml.pre is {self.pre!r}; {', '.join(PRE)} are known")
        merges = self.merges()
        if merges is None:
            raise ValueError(f"{self.path}: the metadata has a tokenizer of byte pairs, but no tokenizer.ggml.merges")
        vocabulary = self.vocabulary(self.tokens)
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=self.pre in _WHOLE))
        tokenizer.decoder = decoders.ByteLevel()
        expression = PRE[self.pre]
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression in ("", "digits"))]
        if expression == "digits":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        elif expression:
            steps.insert(0, pre_tokenizers.Split(Regex(expression), behavior="isolated"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        return tokenizer

    def sentence_piece(self) -> Tokenizer:
        """SentencePiece's kind, with bytes for what has no token. Gemma's has no space before a text, and its ranks are
        the order of its tokens, not their scores."""
        gemma = str(self.metadata["general.architecture"]).startswith("gemma")
        # Gemma's file spells runs of spaces as spaces.
        tokens = ["▁" * len(t) if gemma and " " in t and not t.strip() else t for t in self.tokens]
        vocabulary, merges = self.vocabulary(tokens), self.merges()
        if merges is None:
            ranks = [-number for number in range(len(self.tokens))] if gemma else self.numbers("scores", 0)
            merges = _merges(vocabulary, ranks, self.types)
        unknown = self.special.get("unk_token")
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if gemma:
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        else:
            prefix = self.metadata.get("tokenizer.ggml.add_space_prefix", True)
            scheme = "first" if prefix else "never"
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
            steps += [decoders.Strip(content=" ", left=1)] if prefix else []
        tokenizer.decoder = decoders.Sequence(steps)
        return tokenizer


def _merges(vocabulary: Mapping[str, int], ranks: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The pairs that a SentencePiece model merges, which are all that give a token, the best token's first. What is no
    part of a text, such as `<s>`, is not merged from its letters."""
    pairs: list[tuple[float, int, int, str, str]] = []
    for (token, number), rank in zip(vocabulary.items(), ranks, strict=True):
        if types[number] not in (_NORMAL, _USER_DEFINED):
            continue
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merged = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        merged.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(rank, len(a), len(b), a, b) for a, b in merged]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(a, b) for *_, a, b in pairs]


def _add_special(tokenizer: Tokenizer, parts: _Parts) -> None:
    """Tokens that a text spells out whole, and those before and after a text."""
    typed = list(zip(parts.tokens, parts.types, strict=True))
    special = [token for token, kind in typed if kind == _CONTROL]
    special += [token for token in dict.fromkeys(parts.special.values()) if token not in special]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    vocabulary = tokenizer.get_vocab()  # without Gemma's runs of spaces
    defined = [token for token, kind in typed if kind == _USER_DEFINED and token in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])
    if tokenizer.get_vocab_size() != len(parts.tokens):
        raise ValueError(f"{parts.path}: special tokens are not among the {len(parts.tokens)} tokens")
    by_default = {"bos": parts.metadata["tokenizer.ggml.model"] == "llama" or parts.pre in _WHOLE, "eos": False}
    added = {
        name: parts.special[f"{name}_token"]
        for name, default in by_default.items()
        if parts.metadata.get(f"tokenizer.ggml.add_{name}_token", default) and f"{name}_token" in parts.special
    }
    if added:
        single, second = (
            [f"{part}:{k}" for part in (added.get("bos"), text, added.get("eos")) if part]
            for k, text in enumerate(("$A", "$B"))
        )
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(added.values())]
        tokenizer.post_processor = processors.TemplateProcessing(single, single + second, ids)
