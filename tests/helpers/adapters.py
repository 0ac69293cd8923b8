"""Adapters of few weights, their sums and merged params, each computed in one program."""

import math

import jax
import numpy as np
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.methods.arithmetic import add
from tests.helpers.reference import in_one_program, leaves, normal, random_delta


def given_delta(method, seed, params):
    return method, random_delta(method, params, seed)


def added(pairs, weights, **options):
    """`add` as one program."""
    methods, deltas = zip(*pairs, strict=True)
    return in_one_program(lambda *deltas: add([*zip(methods, deltas, strict=True)], weights, **options), *deltas)


def all_merged(pairs, params):
    """The merged params of every pair, by path, computed in one program."""
    methods, deltas = zip(*pairs, strict=True)
    merge = jax.jit(
        lambda params, *deltas: [lj.merge(m.apply(params, d)) for m, d in zip(methods, deltas, strict=True)]
    )
    return [leaves(weights) for weights in merge(params, *deltas)]


AXES = ["io", "oi", "vo", "sio", "soi", "iso", "ioo", "iio", "sioo", "kkio", "ssio"]


def low_rank(axes, rank, alpha=None):
    return lj.lora(lj.select("w", axes=axes), rank=rank, alpha=alpha, strict=False)


@st.composite
def weights_and_ranks(draw):
    axes = draw(st.sampled_from(AXES))
    params = {"w": normal(*draw(st.tuples(*[st.integers(1, 5)] * len(axes))), seed=draw(st.integers(0, 99)))}
    return axes, params, draw(st.integers(1, 6)), draw(st.integers(1, 6))


def dense(delta, stacked):
    """A B of the leaf as matrices `(stack, in, out)`, float64."""
    a, b = (np.asarray(delta["w"][name], np.float64) for name in "ab")
    count, rank = math.prod(a.shape[:stacked]), a.shape[-1]
    return a.reshape(count, -1, rank) @ b.reshape(count, rank, -1)
