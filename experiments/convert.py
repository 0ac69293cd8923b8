"""Makes safetensors, and an adapter, of a checkpoint of loralib (github.com/microsoft/LoRA).

    python -m experiments.convert --checkpoint=model.26289.pt --out=e2e.safetensors
    python -m experiments.convert --checkpoint=model.26289.pt --out=e2e.safetensors \\
      --base=gpt2-medium --alpha=32 --adapter=adapters/e2e

Needs torch (pip install torch), which reads tensors alone: a checkpoint that would run code is refused. What is
left out (causal masks, what stands beside model_state_dict) is printed. With --adapter, the LoRA tensors, a trained
classifier and trained biases become an adapter of lora_jax for --base, which checkpoints.load_adapter reads. The
authors' alpha is not in their files: 32 for GPT-2 (NLG), 16 for RoBERTa-base (NLU).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import lora_jax as lj
from experiments import cli
from lora_jax import checkpoints
from lora_jax.interop import hf, loralib, torch_files
from lora_jax.interop.tensor_files import read_file
from lora_jax.runs import bases

flags.DEFINE_string("checkpoint", None, "The torch file: a state dict, or {'model_state_dict': ...}.")
flags.declare_key_flag("out")
flags.DEFINE_string("adapter", None, "Writes an adapter too: its folder, or a file that ends in .safetensors.")
flags.DEFINE_string("base", None, "For --adapter: the pretrained model, a Hugging Face folder or a name on the Hub.")
flags.DEFINE_float("alpha", None, "For --adapter: the authors' lora_alpha (scale = alpha / r).")
flags.DEFINE_list("enabled", ["1", "0", "1"], "For --adapter: their enable_lora of a fused query, key, value.")
flags.DEFINE_bool("unmerged", False, "For --adapter: the file's full weights are without the adapter; checked.")
flags.mark_flags_as_required(["checkpoint", "out"])


def main() -> None:
    values = flags.FLAGS
    if len({bool(values.adapter), bool(values.base), values.alpha is not None}) > 1:
        raise ValueError("--adapter, --base and --alpha go together: all three, or none")
    if not set(values.enabled) <= {"0", "1"}:
        raise ValueError(f"--enabled={','.join(values.enabled)}: a 1 or 0 each, as in 1,0,1")
    names, left_out = torch_files.convert(values.checkpoint, values.out)
    print(f"written: {values.out} ({len(names)} tensors)")
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    if values.adapter:
        print(f"adapter: {write_adapter(Path(values.out))}")


def write_adapter(file: Path) -> Path:
    """Writes the adapter in a converted file, as the flags say."""
    values = flags.FLAGS
    tensors = read_file(file, ignored=loralib.IGNORED)
    model, params, tokenizer = hf.load(values.base, **_wishes(tensors))
    enabled = [text == "1" for text in values.enabled]
    method, delta = loralib.load(file, params, alpha=values.alpha, enabled=enabled, unmerged=values.unmerged)
    print(lj.check(method, params))
    base_id = bases.identity(model, params, values.base, tokenizer=tokenizer)
    return checkpoints.save_adapter(values.adapter, method, delta, base_id)


def _wishes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the file needs of the base: a classifier of as many labels, or a head apart from an adapted look-up."""
    for name, tensor in tensors.items():
        if re.search(r"\b(wte|lm_head)\.lora_", name):
            return {"tie": False}
        if re.search(r"\bclassifier(\.out_proj)?\.weight$", name):
            labels = len(tensor) if tensor.ndim else 0
            return {"head": "regression" if labels == 1 else "classification", "labels": labels}
    return {}


if __name__ == "__main__":
    cli.run(main)
