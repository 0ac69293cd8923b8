"""A save that is broken off at any moment leaves the old weights, the new ones or an error, never some of each."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.interop import hf
from lora_jax.models import gpt2

MODEL = gpt2.GPT2(gpt2.GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=2, eos_token_id=0))
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
ONE, FEW = 10**9, 3_000  # bytes of a file


def filled(value: float) -> Any:
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), SHAPES)


def values(folder: Path) -> set[float]:
    """All numbers of the weights that are read from there; none where reading fails."""
    try:
        params = hf.load(folder)[1]
    except (FileNotFoundError, ValueError):
        return set()
    return {number for leaf in jax.tree.leaves(params) for number in np.unique(leaf).tolist()}


@pytest.mark.parametrize(("before", "after"), [(FEW, FEW), (ONE, FEW), (FEW, ONE)])
def test_a_save_that_is_broken_off_mixes_no_weights(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = os.replace, [0]

    def replace_some(old: Any, new: Any) -> None:
        if not left[0]:
            raise OSError("killed")
        left[0] -= 1
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_some)
    seen = []
    for moves in range(20):
        folder, left[0] = tmp_path / str(moves), 100
        hf.save(folder, MODEL, filled(1), shard_size=before)
        left[0] = moves
        try:
            hf.save(folder, MODEL, filled(2), shard_size=after)
        except OSError:
            seen.append(values(folder))
        else:
            break
    assert moves == (2 if after == ONE else 6), "config.json, and the weights: one file, or four and their index"
    assert values(folder) == {2}
    assert all(numbers in (set(), {1}, {2}) for numbers in seen), seen
