"""A tiny BERT in Hugging Face form, and tasks of GLUE that it can learn."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lora_jax.interop import hf
from lora_jax.models.encoder import Encoder, EncoderConfig

WORDS = ("red", "blue", "cat", "dog", "sits", "runs", "here", "there")
CONFIG = EncoderConfig("bert", 16, 24, 16, 2, 2, 24, token_types=2, pad_id=0, pooler=True)


def sentence(random: np.random.Generator, good: bool) -> str:
    """Good ones are of the first half of the words, others of the second."""
    return " ".join(WORDS[i] for i in random.integers(0, 4, random.integers(3, 9)) + (0 if good else 4))


def make_inputs(folder: Path, layers: int = 2) -> None:
    """`folder/base`, a random BERT, and `folder/glue` with a CoLA and an MNLI of two and three learnable labels."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    model = Encoder(dataclasses.replace(CONFIG, layers=layers))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 4 * np.asarray(x), params)  # so that what it computes differs from text to text
    hf.save(folder / "base", model, params, tokenizer)
    random = np.random.default_rng(0)
    cola, mnli = folder / "glue" / "CoLA", folder / "glue" / "MNLI"
    cola.mkdir(parents=True)
    mnli.mkdir()
    for split, count in (("train", 40), ("dev", 24)):
        labels = random.integers(0, 2, count)
        lines = [f"x\t{label}\t\t{sentence(random, bool(label))}\n" for label in labels]
        (cola / f"{split}.tsv").write_text("".join(lines))
    (cola / "test.tsv").write_text("index\tsentence\n" + "".join(f"{i}\tred cat\n" for i in range(5)))
    names = ("entailment", "neutral", "contradiction")
    for split in ("train", "dev_matched"):
        header = ["index", "sentence1", "sentence2", "gold_label"]
        rows = [[str(i), sentence(random, True), sentence(random, False), names[i % 3]] for i in range(24)]
        (mnli / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
