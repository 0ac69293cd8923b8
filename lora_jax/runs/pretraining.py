"""A small GPT-2 from plain text, as a base for what is adapted where no pretrained one can be had."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.data import text
from lora_jax.data.batches import packed
from lora_jax.distributed import processes, sharding
from lora_jax.interop import hf
from lora_jax.models import gpt2
from lora_jax.runs import bases
from lora_jax.runs.config import check
from lora_jax.runs.run import Prepared, ignore
from lora_jax.training import locks, stopping


class Pretrained(NamedTuple):
    """What `pretrain` returns. An example is in `pretrain`."""

    finished: bool  # False where SIGINT, SIGTERM or SIGHUP ended it; all is saved, and the same call resumes it
    step: int  # the steps done
    total: int  # the steps of the run
    model: Path | None = None  # the Hugging Face folder; None where not all is done
    loss: float = math.nan  # of validation, nats per token

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@stopping.noted()
@locks.holding(check=check)
def pretrain(config: ConfigDict, workdir: str | Path, *, started: Callable[[Prepared], None] = ignore) -> Pretrained:
    """Trains a GPT-2 as a config of configs/pretrain.py says, or resumes it.

    The workdir gets what a run of `train` leaves, and `model/`, a Hugging Face folder.

    Args:
      config: with `model`, `tokenizer`, `vocab_size`, `data` and what training reads.
      workdir: made where there is none.
      started: called with the run before it trains.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from lora_jax import runs
    >>> from ml_collections import ConfigDict
    >>> from lora_jax.training.config import TrainConfig, as_config_dict
    >>> config = as_config_dict(TrainConfig(steps=2))
    >>> config.tokenizer, config.vocab_size = "", 270
    >>> config.model = ConfigDict({"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16})
    >>> config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("train.txt", "valid.txt"):
    ...         _ = Path(folder, name).write_text("Alba is a pub in the old town. " * 8)
    ...     paths = {"path": (f"{folder}/train.txt",), "validation": (f"{folder}/valid.txt",)}
    ...     config.data = ConfigDict({**paths, "batch_size": 2, "length": 16})
    ...     result = runs.pretrain(config, f"{folder}/base")  # doctest: +ELLIPSIS
    ...     result.step, result.model.name
    step 2: validation loss 5...
    (2, 'model')
    """
    workdir = Path(workdir).expanduser()
    training.claim(workdir, config)
    held_out = text.files(config.data.validation)
    train = [path for path in text.files(config.data.path) if path not in held_out]
    tokenizer, eos = _tokenizer(config, workdir, train)
    texts = {name: text.encode(files, tokenizer, eos=eos) for name, files in (("train", train), ("valid", held_out))}
    rows = 1 + max(tokenizer.get_vocab().values())  # of the embedding: some ids below may have no token
    shape = gpt2.GPT2Config(vocab_size=rows, eos_token_id=eos, **config.model.to_dict())
    run = _prepare(config, workdir, gpt2.GPT2(shape), texts)
    started(run)
    job = run.job
    result = training.train(job)
    if not result.finished:
        return Pretrained(False, result.step, job.total)
    folder = workdir / "model"
    hf.save(folder, gpt2.GPT2(shape), job.method.apply(job.params, result.delta), tokenizer, merge=True)
    entries = processes.on_primary(lambda: training.read_metrics(workdir))
    losses = (entry["validation_loss"] for entry in reversed(entries) if "validation_loss" in entry)
    loss = next(losses, math.nan)  # where metrics.jsonl was deleted
    return Pretrained(True, result.step, job.total, folder, loss)


def _tokenizer(config: ConfigDict, workdir: Path, texts: Sequence[Path]) -> tuple[Tokenizer, int]:
    """The tokenizer, given or learnt, and its end of text."""
    kept = workdir / "tokenizer.json"
    if config.tokenizer and not Path(config.tokenizer).is_file():
        raise FileNotFoundError(f"{config.tokenizer}: no such file; GPT-2's is in the hub's gpt2")

    def make() -> None:
        if checkpoints.latest_step(workdir) is None:
            given = hf.read_tokenizer(config.tokenizer) if config.tokenizer else None
            made = given or text.train_tokenizer(texts, config.vocab_size)
            checkpoints.write_atomically(kept, made.to_str().encode())

    processes.on_primary(make)
    tokenizer = hf.read_tokenizer(kept)
    eos = tokenizer.token_to_id(text.END)
    if eos is None:
        raise ValueError(f"{config.tokenizer} has no token {text.END!r}, which parts documents")
    return tokenizer, eos


def _prepare(config: ConfigDict, workdir: Path, model: gpt2.GPT2, texts: Mapping[str, np.ndarray]) -> Prepared:
    """The run, ready to train: the base is random weights, all of which are tuned."""
    sizes, eos = (config.data.batch_size, config.data.length, config.seed), model.config.eos_token_id
    batches = {name: packed(tokens, *sizes, eos=eos) for name, tokens in texts.items()}
    mesh = bases.mesh_of(config)
    model = sharding.on_mesh(model, mesh)
    placement = sharding.Placement.of(model, mesh)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]

    key = jax.random.key(config.seed)
    params = jax.jit(init, out_shardings=placement.shardings(jax.eval_shape(init, key)))(key)
    method, base = lj.tune(lj.select("**")), checkpoints.identity(params, f"random weights of seed {config.seed}")
    parts: dict[str, Any] = {"method": method, "model": model, "params": params, "base": base, "placement": placement}
    job = training.prepare(config, workdir, **parts, batches=batches["train"], validation=batches["valid"])
    return Prepared(workdir, job, lj.check(method, params))
