"""Whether a config fits on devices that are not at hand, asked of their compiler: `python -m experiments.plan`."""
