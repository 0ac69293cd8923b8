"""Trains one adapter twice from the same start on the same batches, here and with torch and PEFT, and compares.

    python -m experiments.parity --config=configs/e2e.py:small --config.base=BASE --config.data.path=E2E
    python -m experiments.parity --config=configs/glue.py:base,mrpc --config.base=BERT --config.data.path=GLUE

Without dropout, and step by step by turns. PEFT adapts GPT-2's query, key and value as one matrix (c_attn), so here
they share their A too. Prints, and with --out=FILE puts into a row of that JSON file (docs/results/parity.json): the
largest relative difference of the losses; of the factors A and B after the last step, relative to the largest entry of
each; and the ratio of the times (ours to PEFT's, without the steps that meet a shape for the first time). Needs torch
and PEFT: pip install torch transformers peft.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import lora_jax as lj
from experiments import cli, summaries, train
from lora_jax import training
from lora_jax.interop import hf, peft
from lora_jax.runs import setups
from lora_jax.training import METRICS

flags.DEFINE_integer("steps", 50, "Steps of both.", lower_bound=1)
flags.declare_key_flag("config")
flags.DEFINE_string("label", None, "What the row of --out is called; otherwise by base and data.")
flags.declare_key_flag("out")

Batch = dict[str, np.ndarray]


def main() -> None:
    config = train.CONFIG.value
    config.update_from_flattened_dict(without_dropout(config))
    setup = setups.load(config)
    batches = setup.batches["train"](0)[: flags.FLAGS.steps]
    method = setup.method
    if method is None:
        raise ValueError("method 'none' trains nothing: there is nothing to compare")
    rate = training.schedule(config.optimizer, config.epochs * len(setup.batches["train"]))
    tx = training.optimizer(config.optimizer, rate, spec=method.spec)
    state = training.new_state(method, tx, setup.base.params, jax.random.key(config.seed))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(f"{folder}/base", setup.base.model, setup.base.params)
        peft.save(f"{folder}/adapter", method, state.delta, params=setup.base.params)
        ours, our_delta = our_step(training.make_step(setup.objective, method, tx, rate), setup.base.params, state)
        theirs, save = torch_step(config, Path(folder), rate)
        losses, seconds = by_turns({"ours": ours, "peft": theirs}, batches)
        save(f"{folder}/trained")
        their_delta = peft.load(f"{folder}/trained", setup.base.params)[1]
    report(config, losses, seconds, difference(our_delta(), their_delta))


def without_dropout(config: ConfigDict) -> dict[str, Any]:
    """What differs from the config in both runs (GPT-2: the A that query, key and value share, too)."""
    changes: dict[str, Any] = {"lora.dropout": 0.0}
    if "dropout" in config.model:
        return changes | {"model.dropout": 0.0, "model.attention_dropout": 0.0}
    fused = ("**/attn/{query,key,value}/kernel",)
    with config.unlocked():
        config.lora.shared = fused
    return changes | {"lora.select": fused}


def our_step(
    train_step: Callable[..., training.State], params: Any, state: training.State
) -> tuple[Callable[[Batch], float], Callable[[], lj.Delta]]:
    """`step(batch) -> loss`, and what gives the delta."""
    one = jax.jit(train_step, donate_argnums=0)
    params = lj.without_tuned(params, state.delta)

    def step(batch: Batch) -> float:
        nonlocal state
        zero = state._replace(metrics=jax.numpy.zeros_like(state.metrics))
        state = one(zero, params, {name: x[None] for name, x in batch.items()})
        metrics = dict(zip(METRICS, state.metrics.tolist(), strict=True))
        return metrics["loss"] / metrics["labels"]

    return step, lambda: state.delta


def torch_step(config: ConfigDict, folder: Path, rate: Any) -> tuple[Callable[[Batch], float], Callable[[str], None]]:
    """The same with PEFT, and what saves its adapter."""
    try:
        import torch
        import transformers
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{error}: pip install torch transformers peft") from error

    encoder = "dropout" in config.model
    kind = transformers.AutoModelForSequenceClassification if encoder else transformers.AutoModelForCausalLM
    base = kind.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    options = config.optimizer
    everything = tuple(options.decay) == ("**",)
    groups = [
        {"params": [p for p in weights if everything or p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in weights if not everything and p.ndim == 1], "weight_decay": 0.0},
    ]
    tx = torch.optim.AdamW(groups, lr=1.0, betas=(options.b1, options.b2), eps=options.eps)
    done = 0

    def step(batch: Batch) -> float:
        nonlocal done
        for group in tx.param_groups:
            group["lr"] = float(rate(done))
        loss = torch_loss(model, batch, config.get("label_smoothing", 0.0))
        tx.zero_grad()
        loss.backward()
        if options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, options.clip_norm)
        tx.step()
        done += 1
        return loss.item()

    return step, model.save_pretrained


def torch_loss(model: Any, batch: Batch, smoothing: float) -> Any:
    """The mean loss of a batch, as `training.objectives` has it."""
    import torch

    real = {name: torch.from_numpy(x).to(torch.int64) for name, x in batch.items() if x.dtype.kind in "ib"}
    weights = torch.from_numpy(batch["weights"])
    inputs = {"input_ids": real["tokens"], "attention_mask": real["mask"]}
    if "token_types" in real:
        logits = model(**inputs, token_type_ids=real["token_types"]).logits
    else:
        places = torch.arange(len(weights))[:, None]
        hidden = model.get_base_model().transformer(**inputs).last_hidden_state
        logits = model.get_base_model().lm_head(hidden[places, real["labelled"]])
    if "labels" not in real:
        losses = (logits[..., 0] - torch.from_numpy(batch["labels"])) ** 2
    else:
        flat, labels = logits.flatten(0, -2), real["labels"].flatten()
        losses = torch.nn.functional.cross_entropy(flat, labels, label_smoothing=smoothing, reduction="none")
    return (losses.reshape(weights.shape) * weights).sum() / weights.sum()


def by_turns(
    steps: dict[str, Callable[[Batch], float]], batches: list[Batch]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The losses of both, and the seconds of each step whose shapes both have met before."""
    losses: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    seen: set[str] = set()
    for batch in batches:
        shapes = str([x.shape for x in batch.values()])
        for name, step in steps.items():
            begin = time.perf_counter()
            losses[name].append(step(batch))
            if shapes in seen:
                seconds[name].append(time.perf_counter() - begin)
        seen.add(shapes)
    return losses, seconds


def difference(ours: lj.Delta, theirs: lj.Delta) -> float:
    """The largest difference of an entry, relative to the largest of its array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in map(jax.device_get, pairs))


def report(config: ConfigDict, losses: dict, seconds: dict, factors: float) -> None:
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["peft"], strict=True)]
    pairs = list(zip(losses["ours"], losses["peft"], strict=True))
    figures = {
        "label": flags.FLAGS.label or f"{config.base}, {config.data.name}",
        "command": cli.command("parity"),
        "seed": config.seed,
        "steps_compared": len(pairs),
        "loss_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "factor_difference": factors,
        "ratio_total": sum(seconds["ours"]) / sum(seconds["peft"]),
        "ratio_median": statistics.median(ratios),
        "timed_steps": len(ratios),
        **summaries.machine("jax", "torch", "peft"),
        "losses": losses,
    }
    if flags.FLAGS.out:
        summaries.add_rows(Path(flags.FLAGS.out), [figures])
    for name, value in figures.items():
        if name != "losses":
            print(f"{name:18}{value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
