"""configs/glue.py: the rows of Table 9 and what they train."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from configs import glue
from configs.methods import METHODS
from lora_jax import training
from lora_jax.models.encoder import SIZES, Encoder
from lora_jax.runs import methods
from tests.helpers import shapes

# Table 9 by columns, in the paper's order of tasks.
ORDER = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
TABLE = {
    "base": {
        "batch": (16, 16, 16, 32, 32, 16, 32, 16),
        "epochs": (30, 60, 30, 80, 25, 25, 80, 40),
        "rate": (5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
        "length": (512,) * 8,
        "alpha": 8,
    },
    "large": {
        "batch": (4, 4, 4, 4, 4, 4, 8, 8),
        "epochs": (10, 10, 20, 20, 10, 20, 20, 30),
        "rate": (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
        "length": (128, 128, 512, 128, 512, 512, 512, 512),
        "alpha": 16,
    },
    "large_restricted": {
        "batch": (4,) * 8,
        "epochs": (10, 10, 20, 20, 10, 20, 20, 10),
        "rate": (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
        "length": (128,) * 8,
        "alpha": 16,
    },
}


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("number", range(8), ids=ORDER)
def test_the_rows_of_table_9(row: str, number: int) -> None:
    config, expected = glue.get_config(f"{row},{ORDER[number]}"), TABLE[row]
    assert config.data.batch_size == expected["batch"][number]
    assert config.epochs == expected["epochs"][number]
    assert config.optimizer.learning_rate == pytest.approx(expected["rate"][number])
    assert config.data.length == expected["length"][number]
    assert (config.lora.rank, config.lora.alpha) == (8, expected["alpha"])
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_ratio) == (None, 0.06)
    assert len(config.seeds) == 5
    assert config.best == {"cola": "matthews", "stsb": "pearson"}.get(ORDER[number], "accuracy")


def trained(name: str, size: str, **labels: Any) -> dict[str, int]:
    """Trained parameters by what trains them: the classifier's, and all others'."""
    head = {"head": "classification", "labels": 3} | labels
    model = Encoder(dataclasses.replace(SIZES[size], **head))
    rows = lj.check(lj.from_spec(methods.spec(glue.get_config(name), model)), shapes.params_of(model)).rows
    classifier = sum(row.trained for row in rows if row.path.startswith("classifier/"))
    return {"classifier": classifier, "rest": sum(row.trained for row in rows) - classifier}


def test_what_trains_is_counted_as_in_table_2() -> None:
    """The paper does not count the classifier; the file that the authors published for MNLI has 887,811 numbers."""
    lora = trained("base,mnli", "roberta-base")
    assert lora == {"rest": 294_912, "classifier": 592_899} and sum(lora.values()) == 887_811
    assert trained("large,mnli", "roberta-large")["rest"] == 786_432
    assert trained("large_restricted,mrpc", "roberta-large")["rest"] == 786_432
    assert trained("base,mnli,bitfit", "roberta-base") == {"rest": 102_144, "classifier": 592_899}
    assert trained("base,mnli,classifier", "roberta-base")["rest"] == 0
    assert trained("base,mnli,full", "roberta-base")["rest"] == 124_055_040
    assert trained("base,stsb", "roberta-base", head="regression", labels=1)["rest"] == 294_912


def test_weight_decay_leaves_out_biases_and_norms() -> None:
    config = glue.get_config("base,mrpc,full")
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm, config.optimizer.eps) == (0.1, 1.0, 1e-8)
    parts = ("lora", "tune", "dora", "ia3", "adapter")
    select = {"lora": ["**/query/kernel"], "tune": ["**/{bias,scale,embedding,out/kernel}"], "dora": ["**/key/kernel"]}
    spec = {"method": "chain", "of": [{"method": name, "select": select.get(name, [])} for name in parts]}
    tx = training.optimizer(config.optimizer, lambda step: 1.0, spec=spec)
    expected = {
        "h_0/attn/out/kernel/value": True,
        "h_0/attn/query/kernel/a": True,
        "h_0/attn/key/kernel/b": True,
        "h_0/attn/key/kernel/m": False,
        "embeddings/word/embedding/value": True,
        "classifier/out/kernel/value": True,
        "classifier/out/bias/value": False,
        "h_0/attn/query/bias/value": False,
        "h_0/ln_1/scale/value": False,
        "@shared/h_0/attn/a": True,
        "@shared/h_0/attn/key/l": False,
        "@mlp_out/adapter/up": True,
        "@mlp_out/adapter/up_bias": False,
    }
    delta = lj.Delta()
    for path in expected:
        owner, _, name = path.rpartition("/")
        delta.setdefault(owner, {})[name] = np.ones((2, 2), np.float32)
    updates = jax.jit(lambda delta: tx.update(jax.tree.map(jnp.zeros_like, delta), tx.init(delta), delta)[0])(delta)
    decays = {f"{owner}/{name}": bool(x.any()) for owner, factors in updates.items() for name, x in factors.items()}
    assert decays == expected


FORMER = (  # the globs that configs had before methods had traits
    "**/{kernel,embedding}/{value,a,b,w1,w1_a,w1_b,w2,w2_a,w2_b,rows}",
    "@shared/**/a",
    "@*/*/{down,up,down_left,down_right,up_left,up_right,values}",
)


@pytest.mark.parametrize("name", ["full", *METHODS])
def test_what_decays_is_what_decayed_before(name: str, tmp_path: Path) -> None:
    """And a workdir whose config has the former globs is one of the same run."""
    config = glue.get_config(f"base,mrpc,{name}")
    config.update_from_flattened_dict({"compacter.rank": 4, "prefix_embedding.infix": 0})
    small = {"vocab_size": 32, "hidden": 16, "heads": 2, "inner": 32, "layers": 2}
    model = Encoder(dataclasses.replace(SIZES["roberta-base"], **small, head="classification"))
    params = shapes.params_of(model)
    method = lj.from_spec(methods.spec(config, model))
    delta = jax.tree.map(lambda x: np.ones(x.shape, np.float32), jax.eval_shape(method.init, jax.random.key(0), params))

    def decay(delta: lj.Delta, globs: tuple[str, ...]) -> Any:
        options = ConfigDict({**config.optimizer, "decay": globs})
        tx = training.optimizer(options, lambda step: 1.0, spec=method.spec)
        return tx.update(jax.tree.map(jnp.zeros_like, delta), tx.init(delta), delta)[0]

    now = tuple(config.optimizer.decay)
    before = FORMER if now == ("matrices",) else now
    both = jax.jit(lambda delta: [decay(delta, globs) for globs in (now, before)])(delta)
    jax.tree.map(np.testing.assert_array_equal, *both)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with config.unlocked():
        config.optimizer.decay = before
    (tmp_path / "config.json").write_text(config.to_json())
    config.optimizer.decay = now
    training.claim(tmp_path, config)


def test_no_such_name() -> None:
    for name in ("base", "base,wnli", "huge,mrpc", "base,mrpc,adapter", "base,mrpc,lora,lora"):
        with pytest.raises(ValueError, match=r"no config '.*': give one of base, large, large_restricted, a comma"):
            glue.get_config(name)
