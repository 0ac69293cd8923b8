"""PEFT's side of experiments.parity: training steps on the batches, and with the start, of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from ml_collections import ConfigDict
from peft import PeftModel

Batch = dict[str, np.ndarray]


def step(config: ConfigDict, folder: Path, rate: Any) -> tuple[Callable[[Batch], float], Callable[[str], None]]:
    """`step(batch) -> loss` with PEFT, of folder/base with folder/adapter, and the function that saves the adapter."""
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

    def one(batch: Batch) -> float:
        nonlocal done
        for group in tx.param_groups:
            group["lr"] = float(rate(done))
        loss = loss_of(model, batch, config.get("label_smoothing", 0.0))
        tx.zero_grad()
        loss.backward()
        if options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, options.clip_norm)
        tx.step()
        done += 1
        return loss.item()

    return one, model.save_pretrained


def loss_of(model: Any, batch: Batch, smoothing: float) -> Any:
    """The mean loss of a batch, as `training.objectives` has it."""
    tensors = {name: torch.from_numpy(x).to(torch.int64) for name, x in batch.items() if x.dtype.kind in "ib"}
    weights = torch.from_numpy(batch["weights"])
    inputs = {"input_ids": tensors["tokens"], "attention_mask": tensors["mask"]}
    if "token_types" in tensors:
        logits = model(**inputs, token_type_ids=tensors["token_types"]).logits
    else:
        rows = torch.arange(len(weights))[:, None]
        hidden = model.get_base_model().transformer(**inputs).last_hidden_state
        logits = model.get_base_model().lm_head(hidden[rows, tensors["labelled"]])
    if "labels" not in tensors:
        losses = (logits[..., 0] - torch.from_numpy(batch["labels"])) ** 2
    else:
        flat, labels = logits.flatten(0, -2), tensors["labels"].flatten()
        losses = torch.nn.functional.cross_entropy(flat, labels, label_smoothing=smoothing, reduction="none")
    return (losses.reshape(weights.shape) * weights).sum() / weights.sum()
