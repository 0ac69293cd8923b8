"""A small tokenizer of RoBERTa's kind."""

import functools

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers


@functools.cache
def byte_level(post: bool = True) -> Tokenizer:
    """Byte-level BPE with RoBERTa's special tokens, and its post-processor that sets them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat"] * 5, trainer)
    if post:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer
