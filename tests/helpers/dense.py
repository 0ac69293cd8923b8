"""Changes of weights as dense matrices in float64, by NumPy."""

import math

import numpy as np

from tests.helpers.reference import leaves, merged_params

CLASSES = {"s": "s", "i": "ivk", "o": "o"}


def as_matrices(w, axes):
    """A leaf as (stack, inputs, outputs), float64."""
    order = [n for letters in CLASSES.values() for n, letter in enumerate(axes) if letter in letters]
    sizes = [math.prod(w.shape[n] for n, x in enumerate(axes) if x in letters) for letters in CLASSES.values()]
    return np.transpose(np.asarray(w, np.float64), order).reshape(sizes)


def dense_changes(method, params, delta, axes):
    """`{path: merged - base}` as matrices, for these `{path: axes}`."""
    merged, base = (leaves(tree) for tree in (merged_params(method, params, delta), params))
    return {path: as_matrices(merged[path], named) - as_matrices(base[path], named) for path, named in axes.items()}


def product(update):
    """a b of an `Update`, float64."""
    return np.asarray(update.a, np.float64) @ np.asarray(update.b, np.float64)


def near(got, want, tolerance):
    """Within `tolerance` of the largest entry that is wanted."""
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max() + 1e-30)
