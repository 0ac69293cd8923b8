"""What a run leaves behind: checkpoints that resume it, adapters as files, the identity of its base."""

from lora_jax.core.extras import extra

with extra("train"):
    from lora_jax.checkpoints.adapters import load_adapter, save_adapter
    from lora_jax.checkpoints.files import check_base, checksums, identity, naming, write_atomically
    from lora_jax.checkpoints.runs import Run, forget_after, latest_step, load, manager, meta_of, opened, restore, save

__all__ = ["Run", "check_base", "checksums", "forget_after", "identity", "latest_step", "load", "load_adapter"]
__all__ += ["manager", "meta_of", "naming", "opened", "restore", "save", "save_adapter", "write_atomically"]
