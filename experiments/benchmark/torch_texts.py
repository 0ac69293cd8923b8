"""The side of torch on real texts, with transformers' and PEFT's usual handling of data. Nothing of jax is loaded."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from experiments.benchmark import shapes
from experiments.benchmark.torch_peers import DEVICE, TARGETS, Parts


def _tokenizer(folder: str, side: str) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", padding_side=side)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def epoch(work: dict[str, Any]) -> Parts:
    """From texts to updated weights: batches in random order, padded to their longest text or to work["pad"] tokens."""
    import peft

    is_e2e = work["task"] == "e2e"
    auto = transformers.AutoModelForCausalLM if is_e2e else transformers.AutoModelForSequenceClassification
    model: Any = auto.from_pretrained(work["base"], dtype=torch.float32)
    model = model.to(DEVICE)
    kind = "gpt2" if is_e2e else "roberta"
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM" if is_e2e else "SEQ_CLS",
        r=4 if is_e2e else 8,
        lora_dropout=0.1 if is_e2e else 0.0,  # as in our configs
        target_modules=TARGETS[kind, "qv"],
        fan_in_fan_out=is_e2e,
    )
    model = peft.get_peft_model(model, lora).train()
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=shapes.RATE)
    tokenizer = _tokenizer(work["base"], "right")
    examples = json.loads(Path(work["file"]).read_text())
    count = len(next(iter(examples.values())))

    def pairs(chosen: list[int]) -> dict[str, Any]:
        eos = model.config.eos_token_id
        contexts = tokenizer([examples["context"][n] for n in chosen], add_special_tokens=False)["input_ids"]
        texts = tokenizer([" " + examples["completion"][n] for n in chosen], add_special_tokens=False)["input_ids"]
        rows = [[*c, eos, *t, eos] for c, t in zip(contexts, texts, strict=True)]
        labels = [[-100] * (len(c) + 1) + [*t, eos] for c, t in zip(contexts, texts, strict=True)]
        longest = work.get("pad") or max(map(len, rows))
        fill = [longest - len(row) for row in rows]
        return {
            "input_ids": torch.tensor([row + [eos] * n for row, n in zip(rows, fill, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * n for row, n in zip(rows, fill, strict=True)]),
            "labels": torch.tensor([row + [-100] * n for row, n in zip(labels, fill, strict=True)]),
        }

    def sentences(chosen: list[int]) -> dict[str, Any]:
        first, second = ([examples[name][n] for n in chosen] for name in ("first", "second"))
        how = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return {**tokenizer(first, second, **how), "labels": torch.tensor([examples["label"][n] for n in chosen])}

    def unit() -> None:
        order = torch.randperm(count).tolist()
        for at in range(0, count, work["batch"]):
            inputs = (pairs if is_e2e else sentences)(order[at : at + work["batch"]])
            loss = model(**{name: x.to(DEVICE) for name, x in inputs.items()}).loss
            tx.zero_grad()
            loss.backward()
            tx.step()
        loss.item()

    return {"unit": unit}


def decode(work: dict[str, Any]) -> Parts:
    """Texts for contexts, greedily or with beams, in batches of about equal length."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(work["base"], dtype=torch.float32)
    model = model.to(DEVICE).eval()
    tokenizer = _tokenizer(work["base"], "left")
    eos = model.config.eos_token_id
    contexts = json.loads(Path(work["file"]).read_text())["context"]
    written = 0

    def unit() -> None:
        nonlocal written
        written = 0
        rows = sorted(([*row, eos] for row in tokenizer(contexts, add_special_tokens=False)["input_ids"]), key=len)
        for at in range(0, len(rows), work["batch"]):
            inputs = tokenizer.pad({"input_ids": rows[at : at + work["batch"]]}, return_tensors="pt").to(DEVICE)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                new = model.generate(**inputs, do_sample=False, eos_token_id=eos, pad_token_id=eos, **work["how"])
            written += int((new[:, inputs["input_ids"].shape[1] :] != eos).sum())

    return {"unit": unit, "tokens": lambda: float(written)}
