"""Made-up restaurants and two styles of describing them: text that needs no files and no network.

A context lists attributes (`name : Old Mill | food : Italian | ...`). A description opens with the name, then says the
other attributes in any order, each in one of a few ways.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.extras import extra

with extra("data"):
    import datasets

_FIRST = ("Blue", "Golden", "Old", "Little", "Green", "Silver")
_SECOND = ("Spice", "Mill", "Olive", "Lantern", "Swan", "Table")
ATTRIBUTES = {
    "name": [f"{first} {second}" for first in _FIRST for second in _SECOND],
    "food": ["Chinese", "English", "French", "Indian", "Italian", "Japanese"],
    "price": ["low", "moderate", "high"],
    "rating": ["poor", "good", "excellent"],
    "area": ["city centre", "old town", "harbour", "market hall"],
    "families": ["welcome", "not welcome"],
}
STYLES = {
    "plain": {
        "name": (
            "{name} is a restaurant that serves {food} food.",
            "{name} is a {food} restaurant.",
            "There is a {food} restaurant called {name}.",
        ),
        "price": ("Its prices are {price}.", "You pay {price} prices."),
        "rating": ("Guests say it is {rating}.", "The rating is {rating}."),
        "area": ("It is in the {area}.", "You find it in the {area}."),
        "families": ("Families are {families}.", "It is a place where families are {families}."),
    },
    "lively": {
        "name": (
            "You say {food} food? Find {name}!",
            "{food} food is what {name} serves!",
            "{name}! It is called the place that is {food}!",
        ),
        "price": ("And prices? They are {price}!", "All that, and you pay {price} prices!"),
        "rating": ("How is it? Guests say {rating}!", "They say it is {rating}!"),
        "area": ("Where? In the {area}!", "The {area} is where it is!"),
        "families": ("Families? They are {families}!", "And families are {families}!"),
    },
}
REFERENCES = 8  # descriptions of each restaurant of "valid"


def describe(style: str, values: Mapping[str, str], random: np.random.Generator) -> str:
    """One description of a restaurant, in "plain" or "lively" style."""
    forms = STYLES[style]
    order = ["name", *random.permutation([key for key in forms if key != "name"])]
    return " ".join(random.choice(forms[key]).format(**values) for key in order)


def pairs(style: str, split: str, count: int, seed: int = 0) -> datasets.Dataset:
    """`count` restaurants in the columns `context` and `completion`, as `data.pairs` reads them, in "plain" or "lively"
    style; `seed` chooses restaurants, the same ones for both styles, and descriptions.

    "train" has one description a restaurant and at most three quarters of all, "valid" several of each of the others.
    """
    if style not in STYLES or split not in ("train", "valid"):
        raise ValueError(f"style {style!r} of {[*STYLES]}, split {split!r} of ['train', 'valid']")
    combinations = list(itertools.product(*ATTRIBUTES.values()))
    order = np.random.default_rng(0).permutation(len(combinations))
    train, valid = np.split(order, [len(order) * 3 // 4])
    of_split = train if split == "train" else valid
    if not 0 < count <= len(of_split):
        raise ValueError(f"count={count}: {split!r} has {len(of_split)} restaurants")
    random = np.random.default_rng(seed)
    rows = []
    for index in random.permutation(of_split)[:count]:
        values = dict(zip(ATTRIBUTES, combinations[index], strict=True))
        context = " | ".join(f"{key} : {value}" for key, value in values.items())
        for _ in range(1 if split == "train" else REFERENCES):
            rows.append({"context": context, "completion": describe(style, values, random)})
    return datasets.Dataset.from_list(rows)


def write_conversations(file: str | Path, style: str = "lively", count: int = 400, seed: int = 0) -> None:
    """Writes JSON lines of conversations, as `data.chat` reads them: a user names the attributes of a restaurant, and
    the assistant describes it. The arguments are those of `pairs`, whose "train" restaurants these are."""
    rows = []
    for row in pairs(style, "train", count, seed):
        asked = {"role": "user", "content": f"Describe the restaurant: {row['context'].replace(' : ', ' ')}"}
        rows.append({"messages": [asked, {"role": "assistant", "content": row["completion"]}]})
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
