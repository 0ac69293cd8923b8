"""Tokens as the official scorers have them before they count anything."""

from collections.abc import Sequence

from lora_jax.metrics import java
from lora_jax.metrics.extra import extra


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Stanford's PTB tokens, lower-cased, without punctuation, one space between: the MS-COCO caption evaluation's,
    which the E2E scorer uses for METEOR, ROUGE-L and CIDEr.

    Raises:
      ImportError: without pycocoevalcap or Java.
    """
    punctuation = extra("pycocoevalcap.tokenizer.ptbtokenizer").PUNCTUATIONS
    file = java.jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    program = ["-cp", file, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = java.run([*program, "-encoding", "UTF-8"], [java.one_line(text) for text in texts])
    return [" ".join(word for word in line.split() if word not in punctuation) for line in lines]


def nltk_words(texts: Sequence[str]) -> list[str]:
    """nltk's `word_tokenize`, one space between: English Punkt sentences, split into words by nltk's rules; the WebNLG
    challenge's scorer uses it for METEOR and TER.

    Raises:
      ImportError: without nltk or punkt (which holds the Punkt model that nltk would download).
    """
    sentences = extra("punkt").sent_tokenize
    split = extra("nltk.tokenize").NLTKWordTokenizer().tokenize
    return [" ".join(word for sentence in sentences(text) for word in split(sentence)) for text in texts]
