"""Chat templates of well-known models, and a tokenizer that has their special tokens."""

import functools
from pathlib import Path

from tokenizers import Tokenizer, decoders

from tests.helpers.tokenizers import byte_level

_FOLDER = Path(__file__).resolve().parents[1] / "fixtures/chat_templates"
# "marked" has {% generation %} blocks, as TRL writes them; "forgetful" writes the last answer otherwise than those
# before it, as Qwen 3's does.
TEMPLATES = {file.stem: file.read_bytes().decode() for file in sorted(_FOLDER.glob("*.jinja"))}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]


@functools.cache
def chat_tokenizer(post: bool = False) -> Tokenizer:
    """Byte-level BPE with the special tokens of all of the templates."""
    tokenizer = Tokenizer.from_str(byte_level(post).to_str())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer
