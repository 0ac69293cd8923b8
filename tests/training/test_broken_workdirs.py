"""What was done to a workdir is an error that names its file, or costs no more than what is gone."""

import contextlib
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lora_jax import checkpoints, runs, training
from lora_jax.data.files import read_json as read_data
from lora_jax.data.jsonl import samsum
from lora_jax.interop import hf
from lora_jax.planning.search import Cache
from lora_jax.runs import tables
from lora_jax.runs.evaluation import completed, read_predictions
from tests.helpers.runs import equal_bits, model_and_params, prepare, run_config, with_programs_of

CONFIG = {"best": "validation_loss", "save_every": 2}
DEEP = b"[" * 100_000
NO_OBJECT = {
    "empty": b"",
    "cut off": b'{"base": "x", "da',
    "no UTF-8": b'{"base": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "deep": b'{"a": ' + DEEP + b"]" * 100_000 + b"}",
}


def config(**changes: object) -> ConfigDict:
    made = run_config(epochs=1)
    made.best = None
    made.update(changes)
    return made


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, training.Job]:
    """A run of one epoch, 5 steps, of which the last two are taken back."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    job = prepare(workdir, config(save_every=3))
    training.train(job)
    return workdir, job


@pytest.fixture
def half(done: tuple[Path, training.Job], tmp_path: Path) -> Path:
    shutil.copytree(done[0], workdir := tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "5")
    return workdir


@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT)
def test_config(half: Path, content: bytes) -> None:
    (half / "config.json").write_bytes(content)
    for read in (
        lambda: checkpoints.load(half),
        lambda: runs.load(half),
        lambda: training.claim(half, config()),
        lambda: runs.export_run(half, "native", half / "out"),
    ):
        with pytest.raises(ValueError, match=r"run/config.json (is no JSON|holds no JSON object)"):
            read()
    assert (half / "config.json").read_bytes() == content


def test_a_config_of_something_else(half: Path) -> None:
    for content in ("{}", '{"base": "x", "data": {}}', '{"model_type": "gpt2"}'):
        (half / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json has no '\w+': it is not the config of a run"):
            runs.load(half)


ROWS = {
    "no UTF-8": b'{"step": 1, "\xff": 2}',
    "no step": b'{"loss": 1.0}',
    "a list": b"[1]",
    "a number": b"3",
    "null": b"null",
    "a step that is a string": b'{"step": "1"}',
    "a loss that is null": b'{"step": 1, "loss": null}',
    "a loss that is a string": b'{"step": 1, "loss": "2.5"}',
    "cut off": b'{"step": 1, "lo',
    "deep": b'{"step": ' + DEEP,
    "empty": b"",
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_metrics(half: Path, row: bytes) -> None:
    lines = (half / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    content = b"".join([lines[0], row + b"\n", *lines[1:]])
    (half / "metrics.jsonl").write_bytes(content)
    where = r"run/metrics.jsonl:2: no entry of metrics \(.*mend the line or delete it"
    with pytest.raises(ValueError, match=where):
        training.read_metrics(half)
    with pytest.raises(ValueError, match=where):
        training.Log(half, 3)
    assert (half / "metrics.jsonl").read_bytes() == content
    training.plot_loss(half)  # a warning


def test_metrics_of_what_is_not_finite(tmp_path: Path) -> None:
    with training.Log(tmp_path, 0) as log:
        log.write(1, loss=1.0, accuracy=float("nan"))
    assert training.read_metrics(tmp_path)[0]["loss"] == 1.0


def test_metrics_that_were_deleted(
    done: tuple[Path, training.Job], half: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on to the same delta, with a warning; but not where they hold what is the best so far."""
    expected = checkpoints.load(done[0]).delta
    (half / "metrics.jsonl").unlink()
    job = prepare(half, config(save_every=3))
    assert job.start == 3
    best = job._replace(members=(job.members[0]._replace(config=config(best="validation_loss")),))
    with pytest.raises(
        ValueError, match=r"metrics.jsonl is missing, though 3 steps are done: which validation_loss is"
    ):
        training.train(best)
    assert not (half / "metrics.jsonl").exists() and checkpoints.latest_step(half) == 3
    result = training.train(with_programs_of(done[1], prepare(half, config(save_every=3))))
    assert equal_bits(result.delta, expected) and "metrics.jsonl is missing, though 3 steps" in caplog.text
    assert next(entry["step"] for entry in training.read_metrics(half)) > 3

    (half / "metrics.jsonl").unlink()
    settings = ConfigDict({"method": "lora", "base": "x", "seed": 0, "best": None})
    with pytest.raises(ValueError, match=r"metrics.jsonl has no validation_loss, which summary.json is made of"):
        tables.summarize(settings, half)


@pytest.mark.parametrize("how", ["a folder", "no space", "no matplotlib"])
def test_a_plot_that_cannot_be_written(
    how: str, done: tuple[Path, training.Job], half: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    (half / "loss.png").unlink()
    if how == "a folder":
        (half / "loss.png").mkdir()
    else:
        import matplotlib.figure

        def fails(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device") if how == "no space" else RuntimeError("no fonts")

        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails)
    result = training.train(with_programs_of(done[1], prepare(half, config(save_every=3))))
    assert result.finished and equal_bits(result.delta, checkpoints.load(done[0]).delta)
    assert "loss.png could not be drawn: " in caplog.text


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff", b"ok/\xfe/run"])
def test_a_name_that_is_no_utf8(tmp_path: Path, name: bytes) -> None:
    workdir = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    with pytest.raises(ValueError, match=r"the workdir '.*\\udc.*' is not UTF-8") as caught:
        training.claim(workdir, config())
    str(caught.value).encode()  # it can be printed
    with pytest.raises(ValueError, match="is not UTF-8"):
        prepare(workdir, config())
    assert not list(tmp_path.iterdir())
    training.claim(tmp_path / "café 猫", config())  # UTF-8 it may be


@contextlib.contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file becomes larger than so many bytes: EFBIG stands for ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 300])
@pytest.mark.parametrize("path", ["claim", "adapter", "model", "completions", "results"])
def test_a_full_disk(tmp_path: Path, half: Path, path: str, most: int) -> None:
    run, (model, params) = checkpoints.load(half), model_and_params()
    contexts = [f"a context {n}" for n in range(30)]
    write: dict[str, tuple[Callable, str]] = {
        "claim": (lambda: training.claim(tmp_path / "new", config()), "new/config.json"),
        "adapter": (
            lambda: checkpoints.save_adapter(tmp_path / "new", run.method, run.delta, {}),
            "adapter.safetensors",
        ),
        "model": (lambda: hf.save(tmp_path / "new", model, params), "new"),
        "completions": (lambda: completed(tmp_path / "texts.part", {"contexts": contexts}), "texts.part"),
        "results": (lambda: tables.write_rows(tmp_path / "rows.json", [{"label": "x" * 400}]), "rows.json"),
    }
    function, name = write[path]
    with full_disk(most), pytest.raises(OSError, match=name) as caught:
        function()
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    left = [file for file in tmp_path.rglob("*") if file.is_file() and half not in file.parents]
    assert {file.name for file in left} <= {".lock"}


@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT)
def test_results(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "summary.json"
    file.write_bytes(content)
    for read in (tables.read_rows, lambda _: tables.rows_of("a", tmp_path), Cache):
        with pytest.raises(ValueError, match=r"summary.json (is no JSON|holds no JSON object)"):
            read(file)
    (tmp_path / "predictions.jsonl").write_bytes(b'{"context": "", "prediction": "", "references": []}\n' + content)
    if content:
        with pytest.raises(ValueError, match=r"predictions.jsonl:2: no row"):
            read_predictions(tmp_path)
        head = json.dumps({"a": 1}) + "\n"
        (tmp_path / "kept").write_bytes(head.encode() + b'[0, "x"]\n' + content + b"\n")
        with pytest.raises(ValueError, match=r"kept:3: not \[number, text\]: delete the line"):
            completed(tmp_path / "kept", {"a": 1})


def test_rows_without_labels(tmp_path: Path) -> None:
    for content in ('{"rows": 3}', "{}", '{"rows": [{}]}', '{"rows": [3]}'):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(ValueError, match=r"sweep.json has no list of rows with labels"):
            tables.read_rows(tmp_path / "sweep.json")


@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT)
def test_data(tmp_path: Path, content: bytes) -> None:
    for name, read in (("train.jsonl", lambda file: samsum(file)), ("train.json", read_data)):
        file = tmp_path / name
        file.write_bytes(content)
        if name == "train.jsonl" or content not in (b"[]", b"null"):
            with pytest.raises(ValueError, match=rf"{name}"):
                read(file)
