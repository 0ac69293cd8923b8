"""The quickstart, in small and (slow) as `make quickstart` runs it, and its grammar."""

import jax
import pytest

from experiments import quickstart
from lora_jax import checkpoints
from lora_jax.data import pairs, restaurants
from lora_jax.runs.example import Size

TINY = Size(width=32, layers=1, base_steps=20, steps=10, batch_size=8, restaurants=100, contexts=8)


def test_the_quickstart_in_small(tmp_path, capsys):
    frozen, lora, full = quickstart.run(tmp_path, TINY)
    assert frozen.trained == frozen.bytes == 0
    assert 0 < lora.trained < full.trained and 4 * lora.trained < lora.bytes < full.bytes
    assert lora.score.loss < frozen.score.loss and full.score.loss < frozen.score.loss
    assert all(len(row.score.texts) == 8 for row in (frozen, lora, full))
    output = capsys.readouterr().out
    before, after = (line.split()[-1] for line in output.splitlines() if line.startswith("base "))
    assert before == after and len(before) == 32
    assert f"{lora.trained:,} of" in output
    assert (tmp_path / "quickstart.png").stat().st_size > 5_000
    method, delta, info = checkpoints.load_adapter(tmp_path / "lora" / "adapter")
    assert method.spec["rank"] == 8 and info["base"]["content"] == before
    assert sum(leaf.size for leaf in jax.tree.leaves(delta)) == lora.trained


@pytest.mark.slow
def test_the_quickstart_as_users_run_it(tmp_path):
    frozen, lora, full = quickstart.run(tmp_path, Size())
    assert lora.score.bleu > frozen.score.bleu + 30
    assert full.score.bleu > frozen.score.bleu + 30
    assert lora.bytes < full.bytes / 10


@pytest.mark.parametrize("style", restaurants.STYLES)
def test_descriptions_say_all_that_their_contexts_do(style):
    examples = restaurants.pairs(style, "train", 50)
    for context, completion in zip(examples["context"], examples["completion"], strict=True):
        values = [part.split(" : ")[1] for part in context.split(" | ")]
        assert len(values) == len(restaurants.ATTRIBUTES)
        assert all(value in completion for value in values)


def test_validation_restaurants_are_new_and_have_several_descriptions():
    train = restaurants.pairs("plain", "train", 3000)
    groups = pairs.contexts(restaurants.pairs("lively", "valid", 40))
    assert len(groups) == 40 and not set(groups) & set(train["context"])
    assert {len(texts) for texts in groups.values()} == {restaurants.REFERENCES}
    assert train[:5] == restaurants.pairs("plain", "train", 3000)[:5]
    with pytest.raises(ValueError, match="'sad'"):
        restaurants.pairs("sad", "train", 1)
    with pytest.raises(ValueError, match="count=100000"):
        restaurants.pairs("plain", "valid", 100_000)
