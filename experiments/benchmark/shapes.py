"""What all sides are given: the shapes of the models, the texts, and the products that no side can do without."""

from typing import Any

import numpy as np

MODELS: dict[str, dict[str, Any]] = {
    "small_base": {"kind": "gpt2", "vocab": 8192, "width": 256, "layers": 6, "heads": 8},
    "gpt2_small": {"kind": "gpt2", "vocab": 50257, "width": 768, "layers": 12, "heads": 12},
    "gpt2_medium": {"kind": "gpt2", "vocab": 50257, "width": 1024, "layers": 24, "heads": 16},
    "roberta_base": {"kind": "roberta", "vocab": 50265, "width": 768, "layers": 12, "heads": 12},
    "smollm2": {"kind": "llama", "vocab": 49152, "width": 576, "layers": 30, "heads": 9, "key_heads": 3, "inner": 1536},
}
RANK, ALPHA = 4, 32  # nnx.LoRA has no alpha
RATE = 1e-4


def texts(work: dict[str, Any]) -> np.ndarray:
    """Random tokens (batch, length + 1), the same on all sides."""
    vocab = MODELS[work["model"]]["vocab"]
    return np.random.default_rng(0).integers(2, vocab, (work["batch"], work["length"] + 1), dtype=np.int64)


def labelled(work: dict[str, Any]) -> range:
    """The places whose next token is a label: all of a GPT-2's, of a Llama's those before the second half's tokens."""
    length = work["length"]
    return range(length // 2 - 1, length - 1) if MODELS[work["model"]]["kind"] == "llama" else range(length)


def products(work: dict[str, Any]) -> dict[tuple[int, int, int], int]:
    """How often a step multiplies (m, k) by (k, n): each frozen weight once forward and once for its input's gradient
    (not that of the lowest layer's query, key and value, whose input has none), and the head of a language model."""
    shape = MODELS[work["model"]]
    tokens, width, layers = work["batch"] * work["length"], shape["width"], shape["layers"]
    if shape["kind"] == "llama":
        thin, inner, scored = width // shape["heads"] * shape["key_heads"], shape["inner"], tokens // 2
        counts = {(tokens, width, width): 4 * layers - 1, (tokens, width, inner): 3 * layers}
        counts |= {(tokens, width, thin): 2 * layers, (tokens, thin, width): 2 * layers - 2}
        counts |= {(tokens, inner, width): 3 * layers}
        return counts | {(scored, width, shape["vocab"]): 1, (scored, shape["vocab"], width): 1}
    counts = {
        (tokens, width, width): 8 * layers - 3,
        (tokens, width, 4 * width): 2 * layers,
        (tokens, 4 * width, width): 2 * layers,
    }
    if shape["kind"] == "gpt2":
        counts |= {(tokens, width, shape["vocab"]): 1, (tokens, shape["vocab"], width): 1}
    return counts


def trained(work: dict[str, Any], *, fused: bool = False) -> int:
    """LoRA's entries; `fused`: of PEFT, for which a GPT-2's query, key and value are one matrix."""
    shape = MODELS[work["model"]]
    width, fused = shape["width"], fused and shape["kind"] == "gpt2"
    if shape["kind"] == "llama":
        thin, inner = width // shape["heads"] * shape["key_heads"], shape["inner"]
        sides = [(width, width), (width, thin)]
        sides += [*sides, *[(width, inner)] * 3] if work["targets"] == "all" else []
        return shape["layers"] * RANK * sum(map(sum, sides))
    if work["targets"] == "qv":
        sides = [(width, 3 * width)] if fused else [(width, width)] * 2
    else:
        sides = [(width, 3 * width), (width, width)] if fused else [(width, width)] * 4
        sides += [(width, 4 * width), (4 * width, width)]
    return shape["layers"] * RANK * sum(map(sum, sides))
