"""What every transform rests on: selections, adapted arrays, `lift`, transforms; jax, numpy and optax alone."""
