"""What a run leaves behind: checkpoints that resume it, adapters as files, the identity of its base."""

from lora_jax.core.extras import extra

with extra("train"):
    from lora_jax.checkpoints import serialization  # noqa: F401  (registers Delta)
    from lora_jax.checkpoints.adapters import load_adapter, save_adapter
    from lora_jax.checkpoints.file_sets import finish_replacing, replaced_together
    from lora_jax.checkpoints.files import check_base, checksums, identity, naming, write_atomically
    from lora_jax.checkpoints.runs import (
        Run,
        forget_after,
        has_data,
        latest_step,
        load,
        manager,
        meta_of,
        opened,
        restore,
        save,
    )

__all__ = ["Run", "check_base", "checksums", "finish_replacing", "forget_after", "has_data", "identity", "latest_step"]
__all__ += ["load", "load_adapter", "manager", "meta_of", "naming", "opened", "replaced_together", "restore", "save"]
__all__ += ["save_adapter", "write_atomically"]
