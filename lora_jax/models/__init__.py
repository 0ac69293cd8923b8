"""Models in plain Flax linen. They know nothing of the methods that adapt them."""
