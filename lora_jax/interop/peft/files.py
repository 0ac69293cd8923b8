"""The two files of a PEFT adapter."""

from pathlib import Path

from lora_jax.checkpoints import finish_replacing
from lora_jax.interop import folders

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """The two files of an adapter; an error that says what to do where one is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    finish_replacing(folder)
    config, weights = folders.inside(folder, CONFIG), folders.inside(folder, WEIGHTS)
    if not config.is_file():
        below = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))
        hint = f"; its folders {', '.join(below)} have one: name one of them" if below else ": it is no PEFT adapter"
        raise FileNotFoundError(f"{config} is missing{hint}")
    if weights.is_file():
        return config, weights
    if (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(
            f"{folder} holds adapter_model.bin but no {WEIGHTS}. Pickles can run any code and are not read here; "
            "convert it where you trust it: peft.PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{weights} is missing")
