"""From a config to a run, and from a workdir back to a model."""
