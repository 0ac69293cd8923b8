"""Makes a small GPT-2 from plain text: see configs/pretrain.py.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=runs/base \\
      --config.data.path=TEXTS --config.data.validation=HELD_OUT.txt

The workdir gets what a run of experiments.train leaves, and `model/`, a Hugging Face folder. The
same command goes on where a run was stopped.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags
from tokenizers import Tokenizer

import lora_jax as lj
from experiments import cli
from lora_jax import checkpoints, training
from lora_jax.data import text
from lora_jax.data.batches import Schedule, packed
from lora_jax.distributed import processes, sharding
from lora_jax.interop import hf
from lora_jax.models import gpt2
from lora_jax.runs import bases

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:NAME; see above.")
flags.declare_key_flag("workdir")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    config, workdir = CONFIG.value, Path(flags.FLAGS.workdir)
    training.claim(workdir, config)
    tokenizer, eos, batches = load(config, workdir)
    model = gpt2.GPT2(
        gpt2.GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            eos_token_id=eos,
            **config.model.to_dict(),
        )
    )
    job = ready(config, workdir, model, batches)
    result = training.train(job)
    if not result.finished:
        return print(f"saved at step {result.step} of {job.total}: the same command goes on")
    hf.save(workdir / "model", model, job.method.apply(job.params, result.delta), tokenizer, merge=True)
    if not processes.first():
        return None
    loss = next(e["validation_loss"] for e in reversed(training.read_metrics(workdir)) if "validation_loss" in e)
    print(f"validation: {loss:.4f} nats, perplexity {math.exp(loss):.1f} a token")
    print(f"model: {workdir / 'model'}")


def load(config: ConfigDict, workdir: Path) -> tuple[Tokenizer, int, dict[str, Schedule]]:
    """The tokenizer, given or learnt, its end of text, and the schedules of "train" and "valid"."""
    held_out = text.files(config.data.validation)
    paths = [path for path in text.files(config.data.path) if path not in held_out]
    kept = workdir / "tokenizer.json"
    if config.tokenizer and not Path(config.tokenizer).is_file():
        raise FileNotFoundError(f"{config.tokenizer}: no such file; GPT-2's is in the hub's gpt2")

    def make() -> None:
        if checkpoints.latest_step(workdir) is None:
            given = Tokenizer.from_file(config.tokenizer) if config.tokenizer else None
            made = given or text.train_tokenizer(paths, config.vocab_size)
            checkpoints.write_atomically(kept, made.to_str().encode())

    processes.by_first(make)
    tokenizer = Tokenizer.from_file(str(kept))
    eos = tokenizer.token_to_id(text.END)
    if eos is None:
        raise ValueError(f"{config.tokenizer} has no token {text.END!r}, which parts documents")
    sizes = config.data.batch_size, config.data.length, config.seed
    schedules = {
        name: packed(text.encode(files, tokenizer, eos=eos), *sizes, eos=eos)
        for name, files in (("train", paths), ("valid", held_out))
    }
    return tokenizer, eos, schedules


def ready(config: ConfigDict, workdir: Path, model: gpt2.GPT2, batches: dict[str, Schedule]) -> training.Job:
    """The run, ready to train: the base is random weights, all of which are tuned."""
    mesh = bases.mesh_of(config)
    model = sharding.on_mesh(model, mesh)
    rules = sharding.rules_for(model, mesh)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]

    key = jax.random.key(config.seed)
    params = jax.jit(init, out_shardings=sharding.shardings(jax.eval_shape(init, key), mesh, rules))(key)
    method = lj.tune(lj.select("**"))
    print(lj.check(method, params))
    return training.prepare(
        config,
        workdir,
        method=method,
        model=model,
        params=params,
        base=checkpoints.identity(params, f"random weights of seed {config.seed}"),
        batches=batches["train"],
        validation=batches["valid"],
        mesh=mesh,
        rules=rules,
    )


if __name__ == "__main__":
    cli.run(main)
