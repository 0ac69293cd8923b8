"""The study `rl`: its sums, its advantages, its gradient, and its command."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import studies
from experiments.studies import rl, running
from lora_jax import training
from lora_jax.core.selection import flatten
from lora_jax.models import gpt2

SMALL = {"width": 8, "layers": 1, "heads": 2, "base_steps": 100, "base_batch": 4, "steps": 4, "every": 2}


def small() -> ConfigDict:
    config = studies.get_config("rl")
    config.update(SMALL | {"problems": 2, "group": 4, "seeds": (0,)})
    config.rates = ConfigDict({"subspace, d = 10": (1e-3, 1e-2)})
    return config


def model_of(config: ConfigDict) -> gpt2.GPT2:
    shape = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    return gpt2.GPT2(gpt2.GPT2Config(vocab_size=rl.VOCABULARY, n_positions=16, scan_layers=True, **shape))


def in_words(tokens: Any) -> str:
    return "".join("." if token == 0 else "0123456789+=;"[token - 1] for token in np.asarray(tokens).tolist())


@given(st.lists(st.integers(0, 810_000 - 1), min_size=9, max_size=9))
def test_problems_are_written_as_sums(index: list[int]) -> None:
    prompts, answers = rl.written(jnp.asarray(index))
    for prompt, answer in zip(prompts, answers, strict=True):
        first, second = in_words(prompt).removesuffix("=").split("+")
        assert 100 <= int(first) <= 999 and 100 <= int(second) <= 999
        assert in_words(answer) == f"{int(first) + int(second)};".ljust(5, ".")


def test_all_pairs_are_there_once() -> None:
    splits = rl.problems(3)
    assert (np.sort(np.concatenate([*splits.values()])) == np.arange(810_000)).all()
    assert [len(splits[name]) for name in ("valid", "test")] == [rl.HELD_OUT, rl.HELD_OUT]


def test_the_gradient_is_that_of_expected_advantage() -> None:
    """The step's change under SGD, against the gradient of the mean over tokens of -advantage log p, one answer after
    the other; 1.2e-7: the change is a difference of weights near 1."""
    model = model_of(small())
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    prompts, _ = rl.written(jnp.array([5, 5, 5, 80_000, 80_000, 80_000]))
    drawn = [[1, 2, 3, rl.EOS, 0], [4, rl.EOS, 0, 0, 0], [9, 9, 0, 3, 5]] * 2  # the last one's 0 is no padding
    rewards = jnp.array([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    weights = rl.advantages(rewards)
    assert np.allclose(weights.sum(1), 0, atol=1e-6) and (weights[1] == 0).all()
    batch = rl.batch_of(prompts, jnp.array(drawn), weights.reshape(-1))

    def by_hand(params: Any) -> Any:
        total, tokens = jnp.zeros(()), 0
        for prompt, answer, weight in zip(prompts, drawn, weights.reshape(-1), strict=True):
            length = answer.index(rl.EOS) + 1 if rl.EOS in answer else rl.ANSWER
            answer = jnp.array(answer[:length])
            text = jnp.concatenate([prompt, answer])
            logits = model.apply({"params": params}, text[None, :-1])[0, rl.PROMPT - 1 :]
            of_tokens = jnp.take_along_axis(jax.nn.log_softmax(logits), answer[:, None], axis=1)
            total, tokens = total - weight * of_tokens.sum(), tokens + length
        return total / tokens

    method = rl.method_of("full")
    state = training.new_state(method, optax.sgd(1.0), params, jax.random.key(1))
    step = jax.jit(training.make_step(rl.objective(model), method, optax.sgd(1.0), lambda _: 1.0))
    change = jax.tree.map(jnp.subtract, dict(state.delta), dict(step(state, params, batch).delta))
    expected = dict(flatten(jax.jit(jax.grad(by_hand))(params))[0])
    assert set(change) == set(expected) and max(np.abs(gradient).max() for gradient in expected.values()) > 1e-3
    for path, gradient in expected.items():
        np.testing.assert_allclose(change[path]["value"], gradient, rtol=0, atol=1.2e-7)


def test_the_study_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = small(), tmp_path / "rl.json"
    trained: list[rl.Cell] = []
    train_cell = rl.train_cell

    def stopped_once(config: ConfigDict, cell: rl.Cell, *rest: Any) -> dict[str, Any]:
        if len(trained) == 2 and not out.with_suffix(".stopped").exists():
            out.with_suffix(".stopped").touch()
            raise InterruptedError
        trained.append(cell)
        return train_cell(config, cell, *rest)

    monkeypatch.setattr(rl, "train_cell", stopped_once)
    with pytest.raises(InterruptedError):
        running.run(config, tmp_path / "runs", None, out)
    running.run(config, tmp_path / "runs", None, out)
    assert len(trained) == len(set(trained)) == len([*rl.cells(config)]) == 4
    rows = json.loads(out.read_text())
    rows = rows if isinstance(rows, list) else rows["rows"]
    labels = [f"{name}, from {way}" for name in config.rates for way in rl.WAYS]
    assert [row["label"] for row in rows] == ["the base", *labels]
    assert all(row["trained"] > 0 and 0 <= row["accuracy"]["score"] <= 1 for row in rows[1:])
    assert out.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(ValueError, match="problems"):
        config.problems = 3
        running.run(config, tmp_path / "runs", None, out)


def test_the_best_rate_is_that_of_validation() -> None:
    found = [("a", 1.0, 0.2, 0.9), ("a", 2.0, 0.3, 0.1), ("b", 1.0, 0.5, 0.5)]
    results = [
        {"method": method, "way": "rewards", "rate": rate, "valid": valid, "test": test, "trained": 1, "seed": 0}
        for method, rate, valid, test in found
    ]
    rows = rl.rows(small(), rl.Done({"test": 0.25}, results))
    assert [(row["label"], row.get("rate")) for row in rows[1:]] == [("a, from rewards", 2.0), ("b, from rewards", 1.0)]
    assert rows[0]["accuracy"] == 0.25 and rows[1]["accuracy"]["score"] == 0.1
