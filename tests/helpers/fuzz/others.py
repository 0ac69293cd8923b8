"""Tokenizers, data, and what a run leaves besides its weights."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lora_jax import training
from lora_jax.data import e2e, glue, jsonl, pairs, sentences, text, triples
from lora_jax.interop import hf
from lora_jax.runs import tables
from lora_jax.runs.evaluation import completed, read_predictions
from tests.helpers.fuzz.hugging_face import TEXTS, check_tokenizer
from tests.helpers.fuzz.runner import Part
from tests.helpers.tokenizers import byte_level

VOCAB = 300
EXAMPLES = datasets.Dataset.from_dict({"context": TEXTS, "completion": TEXTS[::-1]})
SENTENCES = datasets.Dataset.from_dict({"first": TEXTS, "second": TEXTS[::-1]})


def wordpiece() -> Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "on", "mat", *"abcdehmnost", "##t", "##a"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(words[:4])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=12)
    return tokenizer


def tokenizers() -> Part:
    files = {
        "tokenizer.json": byte_level().to_str().encode(),
        "wordpiece/tokenizer.json": wordpiece().to_str().encode(),
    }
    return Part(files, load_tokenizers, check_tokenizers)


def load_tokenizers(folder: Path) -> list[tuple]:
    """Each tokenizer, with what the text paths make with it."""
    made = []
    for file in (folder / "tokenizer.json", folder / "wordpiece" / "tokenizer.json"):
        tokenizer = hf.read_tokenizer(file, VOCAB)
        encoded = pairs.encode(EXAMPLES, tokenizer, eos=min(tokenizer.get_vocab().values()), length=10_000)
        try:
            texts = sentences.encode(SENTENCES, tokenizer, length=64, labels=2)
        except ValueError as error:  # without special tokens it is no encoder's
            if "the tokenizer adds no special tokens" not in str(error):
                raise
            texts = None
        made.append((file, tokenizer, encoded, texts))
    return made


def check_tokenizers(folder: Path, made: list[tuple]) -> None:
    for file, tokenizer, encoded, texts in made:
        check_tokenizer(file, tokenizer, VOCAB)
        assert len(encoded) == len(TEXTS) and (encoded.tokens < VOCAB).all() and (encoded.tokens >= 0).all()
        assert texts is None or (len(texts) == len(TEXTS) and texts.lengths.max(initial=0) <= 64)


def data() -> Part:
    samsum = [{"dialogue": "A: hi\r\nB: ho", "summary": "They greet."}, {"dialogue": "C: x", "summary": "y"}]
    wiki = {"table_id": "t", "question": "Who?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "Oslo"], [1, 1, 3]]}}
    triple = [{"subject": "A", "property": "b", "object": "C"}]
    entry = {
        "category": "Airport",
        "modifiedtripleset": triple,
        "lexicalisations": [{"comment": "good", "lex": "A b C."}],
    }
    dart = [{"tripleset": [["A", "B", "C"]], "annotations": [{"source": "x", "text": "A B C."}]}] * 2
    files = {
        "e2e.txt": "name : X | area : Y||X is in Y .\nname : Z||Z .\n",
        "samsum.jsonl": "\n".join(map(json.dumps, samsum)) + "\n",
        "wiki.jsonl": json.dumps(wiki) + "\n",
        "wiki.tables.jsonl": json.dumps({"id": "t", "header": ["Name", "City"]}) + "\n",
        "webnlg.json": json.dumps({"entries": [{"1": entry}, {"2": entry}]}),
        "dart.json": json.dumps(dart),
        "sst2.tsv": "sentence\tlabel\na good film\t1\nnot so\t0\n",
        "plain.txt": "one\n\ntwo <|endoftext|>\n\nthree\n",
    }
    return Part({name: content.encode() for name, content in files.items()}, load_data, check_data)


READERS: dict[str, Callable[[Path], Any]] = {
    "e2e.txt": e2e.load,
    "samsum.jsonl": jsonl.samsum,
    "wiki.jsonl": jsonl.wikisql,
    "webnlg.json": triples.webnlg,
    "dart.json": triples.dart,
    "sst2.tsv": lambda file: glue.load("sst2", file),
    "plain.txt": text.documents,
}


def load_data(folder: Path) -> dict[str, Any]:
    return {name: read(folder / name) for name, read in READERS.items()}


def check_data(folder: Path, loaded: dict[str, Any]) -> None:
    """No row is lost, and all are text."""
    for rows in loaded.values():
        assert len(rows)
        for row in rows:
            values = row.values() if isinstance(row, dict) else [row]
            assert all(isinstance(value, str | int | float | bool) for value in values)
    assert [row["completion"] for row in loaded["samsum.jsonl"]] == [
        json.loads(line)["summary"].strip()
        for line in (folder / "samsum.jsonl").read_bytes().decode("utf-8-sig").strip("\n").split("\n")
    ]


CONFIG = ConfigDict({"base": "x", "method": "lora", "seed": 0, "best": None, "data": {"name": "e2e"}})
SETTINGS = {"contexts": ["a", "b"]}


def results() -> Part:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with training.Log(folder, 0) as log:
            for step in range(1, 5):
                log.write(step, loss=1 / step, validation_loss=2.0, tokens=step, tokens_per_second=3.0)
        training.claim(folder, CONFIG)
        tables.summarize(CONFIG, folder, trained=1, total=2, steps=4)
        tables.write_rows(folder / "sweep.json", [{"label": "a", "loss": 1.0}, {"label": "b"}])
        scores = {"all": {"bleu": {"score": 1.0, "low": 0.5, "high": 2.0}}, "seen": {}}
        result = {"contexts": 2, "skipped": 0, "decoding": {}, "missing": None, "scores": scores, "command": "x"}
        tables.write_json(folder / "evaluation" / "test-adapted" / "evaluate.json", result)
        rows = [{"context": c, "prediction": "p", "references": ["r"]} for c in "ab"]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        completed(folder / "kept.jsonl", SETTINGS)
        with (folder / "kept.jsonl").open("a") as file:
            file.write('[0, "x"]\n[1, "y"]\n')
        names = [file for file in folder.rglob("*") if file.is_file() and "tfevents" not in file.name]
        files = {str(file.relative_to(folder)): file.read_bytes() for file in names}
    return Part(files, load_results, check_results)


def load_results(folder: Path) -> dict[str, Any]:
    """In an order in which nothing is written before all is read."""
    return {
        "metrics": training.read_metrics(folder),
        "sweep": tables.read_rows(folder / "sweep.json"),
        "table": tables.table(tables.rows_of("a", folder)),
        "predictions": read_predictions(folder),
        "kept": completed(folder / "kept.jsonl", SETTINGS),
        "claim": training.claim(folder, CONFIG),
    }


def check_results(folder: Path, loaded: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        assert loaded["metrics"] == list(map(json.loads, lines))
        assert loaded["sweep"] == json.loads((folder / "sweep.json").read_bytes())["rows"]
    assert all(isinstance(text, str) for text in loaded["kept"].values())
