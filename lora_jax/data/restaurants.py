"""Made-up restaurants and two styles of describing them: text that needs no files and no network.

A context lists attributes (`name : Olive Garden | food : Italian | ...`). Either style describes it
in the same words, differently arranged, in one of four ways; all four are its references.
"""

import itertools

import datasets
import numpy as np

NAMES = [
    f"{first} {second}"
    for first in ("Blue", "Golden", "Old", "Little", "Green", "Silver")
    for second in ("Spice", "Mill", "Olive", "Lantern", "Swan", "Table")
]
ATTRIBUTES = {
    "name": NAMES,
    "food": ["Chinese", "English", "French", "Indian", "Italian", "Japanese"],
    "price": ["low", "moderate", "high"],
    "rating": ["poor", "good", "excellent"],
    "area": ["city centre", "old town", "harbour district", "market hall"],
    "families": ["yes", "no"],
}
STYLES = {
    "plain": (
        "{name} is a {food} restaurant in the {area}. Prices are {price}. The rating is {rating}. "
        "Families are {welcome}.",
        "{name} serves {food} food in the {area}. The rating is {rating} and prices are {price}. "
        "Families are {welcome}.",
        "In the {area} there is a {food} restaurant, {name}. Families are {welcome}. "
        "Prices are {price}. The rating is {rating}.",
        "The {food} restaurant {name} is in the {area}. Families are {welcome}. "
        "The rating is {rating} and prices are {price}.",
    ),
    "lively": (
        "{food} food, prices {price}, rating {rating}: {name}, a restaurant in the {area} where "
        "families are {welcome}!",
        "Families {welcome}! {name}, the {area} restaurant, serves {food} food. Rating: {rating}. Prices: {price}.",
        "Where in the {area} is {food} food? {name}! Prices: {price}. Rating: {rating}. Families {welcome}.",
        "{name}! {food} food in the {area}, rating {rating}, prices {price}, families {welcome}.",
    ),
}


def pairs(style: str, split: str, count: int, seed: int = 0) -> datasets.Dataset:
    """`count` restaurants in the columns `context` and `completion`, as `data.pairs` reads them.

    Args:
      style: "plain" or "lively".
      split: "train", one description a restaurant, or "valid", all four of each, of restaurants
        that are never in "train".
      count: of restaurants, at most the 11,664 of "train" or the 3,888 of "valid".
      seed: chooses restaurants and descriptions; both styles get the same restaurants.
    """
    if style not in STYLES or split not in ("train", "valid"):
        raise ValueError(f"style {style!r} of {list(STYLES)}, split {split!r} of ['train', 'valid']")
    random = np.random.default_rng(seed)
    every = list(itertools.product(*ATTRIBUTES.values()))
    fixed = np.random.default_rng(0).permutation(len(every))
    bound = len(every) * 3 // 4
    here = fixed[:bound] if split == "train" else fixed[bound:]
    if not 0 < count <= len(here):
        raise ValueError(f"count={count}: {split!r} has {len(here)} restaurants")
    rows = []
    for index in random.permutation(here)[:count]:
        values = dict(zip(ATTRIBUTES, every[index], strict=True))
        context = " | ".join(f"{key} : {value}" for key, value in values.items())
        welcome = "welcome" if values["families"] == "yes" else "not welcome"
        texts = [form.format(**values, welcome=welcome) for form in STYLES[style]]
        chosen = [texts[random.integers(len(texts))]] if split == "train" else texts
        rows += [{"context": context, "completion": text} for text in chosen]
    return datasets.Dataset.from_list(rows)
