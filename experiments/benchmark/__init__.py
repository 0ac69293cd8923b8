"""Ours against the peers on the same work: `python -m experiments.benchmark`."""
