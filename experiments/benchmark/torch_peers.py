"""The sides of torch, transformers and PEFT. Nothing of jax is loaded here."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from experiments.benchmark import shapes

Parts = dict[str, Callable[[], float | None]]
# PEFT has no query and value of GPT-2: c_attn, query, key and value in one matrix, stands for them.
TARGETS = {
    ("gpt2", "qv"): ["c_attn"],
    ("gpt2", "all"): ["c_attn", "c_proj", "c_fc"],
    ("roberta", "qv"): ["query", "value"],
    ("roberta", "all"): ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    ("llama", "qv"): ["q_proj", "v_proj"],
    ("llama", "all"): "all-linear",
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of(work: dict[str, Any]) -> Any:
    """The model of a work's shape, with random weights or its folder's, and no dropout of its own."""
    shape, dtype = shapes.MODELS[work["model"]], getattr(torch, work.get("dtype", "float32"))
    if "weights" in work:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(work["weights"], dtype=dtype, use_cache=False)
        return model.to(DEVICE)
    vocab, width, layers, heads = (shape[name] for name in ("vocab", "width", "layers", "heads"))
    if shape["kind"] == "gpt2":
        still: dict[str, Any] = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        sizes: dict[str, Any] = {"vocab_size": vocab, "n_embd": width, "n_layer": layers, "n_head": heads}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still, use_cache=False))
    else:
        still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        sizes = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        sizes |= {"intermediate_size": 4 * width, "max_position_embeddings": 514, "type_vocab_size": 1}
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes, **still))
    return model.to(DEVICE, dtype)


def lora_of(work: dict[str, Any]) -> Any:
    import peft

    kind = shapes.MODELS[work["model"]]["kind"]
    return peft.LoraConfig(
        task_type="SEQ_CLS" if kind == "roberta" else "CAUSAL_LM",
        r=shapes.RANK,
        lora_alpha=shapes.ALPHA,
        lora_dropout=work.get("dropout", 0.0),
        target_modules=TARGETS[kind, work["targets"]],
        fan_in_fan_out=kind == "gpt2",
    )


def step(work: dict[str, Any]) -> Parts:
    """A training step of PEFT; with work["compile"] through torch.compile."""
    import peft

    model = peft.get_peft_model(model_of(work), lora_of(work)).train()
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    assert sum(p.numel() for p in factors) == shapes.trained(work, fused=True)
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=shapes.RATE)
    tokens = torch.from_numpy(shapes.texts(work)).to(DEVICE)
    inputs = {"input_ids": tokens[:, :-1].contiguous(), "attention_mask": torch.ones_like(tokens[:, :-1])}
    if shapes.MODELS[work["model"]]["kind"] != "roberta":
        inputs["labels"] = inputs["input_ids"].clone()  # transformers shifts them itself
        inputs["labels"][:, : shapes.labelled(work)[0] + 1] = -100
    else:
        inputs["labels"] = tokens[:, -1] % 2
    call = torch.compile(model) if work.get("compile") else model

    def one() -> float:
        loss = call(**inputs).loss
        tx.zero_grad()
        loss.backward()
        tx.step()
        return loss.item()

    def unit() -> None:
        one()

    return {"unit": unit, "floor": lambda: floor(work), "loss": one}


def floor(work: dict[str, Any]) -> float:
    """Seconds of the work's products alone, as linear layers do them."""
    total = 0.0
    dtype = getattr(torch, work.get("dtype", "float32"))
    for (m, k, n), count in shapes.products(work).items():
        x, w = torch.ones(m, k, dtype=dtype, device=DEVICE), torch.ones(n, k, dtype=dtype, device=DEVICE)
        for _ in range(2):
            begin = time.perf_counter()
            y = torch.nn.functional.linear(x, w)
            y[0, 0].item()
        total += count * (time.perf_counter() - begin)
    return total


def scoring(work: dict[str, Any]) -> Parts:
    """The loss of a batch whose rows have adapters of their own: PEFT's adapter_names."""
    import peft

    model = peft.get_peft_model(model_of(work), lora_of(work), adapter_name="a0").eval()
    for number in range(1, work["adapters"]):
        model.add_adapter(f"a{number}", lora_of(work))
    tokens = torch.from_numpy(shapes.texts(work)).to(DEVICE)[:, :-1].contiguous()
    names = [f"a{row % work['adapters']}" for row in range(work["batch"])]

    def unit() -> None:
        with torch.inference_mode():
            model(input_ids=tokens, labels=tokens, adapter_names=names).loss.item()

    def single() -> None:
        with torch.inference_mode():
            model(input_ids=tokens, labels=tokens).loss.item()

    return {"unit": unit, "single": single}


def switching(work: dict[str, Any]) -> Parts:
    """Loading an adapter's folder, merging it, taking it out again, and going over to another for a forward."""
    import peft

    model = peft.get_peft_model(model_of(work), lora_of(work)).eval()
    folder = tempfile.TemporaryDirectory()  # as long as `load` is there
    model.save_pretrained(folder.name)
    model.load_adapter(folder.name, "other")
    tokens = torch.from_numpy(shapes.texts(work)).to(DEVICE)[:, :-1]
    turn = 0

    def load() -> float:
        begin = time.perf_counter()
        model.load_adapter(folder.name, "new")
        taken = time.perf_counter() - begin
        model.delete_adapter("new")
        return taken

    def merge() -> float:
        model.set_adapter("default")
        begin = time.perf_counter()
        model.merge_adapter()
        _wait()
        taken = time.perf_counter() - begin
        model.unmerge_adapter()
        return taken

    def unmerge() -> float:
        model.merge_adapter()
        begin = time.perf_counter()
        model.unmerge_adapter()
        _wait()
        return time.perf_counter() - begin

    def switch() -> None:
        nonlocal turn
        turn = 1 - turn
        model.set_adapter(("default", "other")[turn])
        with torch.inference_mode():
            model(input_ids=tokens).logits[0, 0, 0].item()

    return {"load": load, "merge": merge, "unmerge": unmerge, "switch": switch}


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
