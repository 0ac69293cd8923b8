"""What a compiler says of a training step: FLOPs, bytes, memory, collectives; for devices that are not at hand too."""
