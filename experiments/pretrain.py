"""Makes a small GPT-2 from plain text: see configs/pretrain.py.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=runs/base \\
      --config.data.path=TEXTS --config.data.validation=HELD_OUT.txt

The workdir gets what a run of experiments.train leaves, and `model/`, a Hugging Face folder. The
same command resumes a run that was stopped.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import cli
from lora_jax import runs

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:NAME; see above.")
flags.declare_key_flag("workdir")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    made = runs.pretrain(CONFIG.value, Path(flags.FLAGS.workdir), started=lambda run: print(run.report))
    if not made.finished:
        raise InterruptedError(f"saved at step {made.step} of {made.total}: the same command resumes it")
    print(f"validation: {made.loss:.4f} nats, perplexity {made.perplexity:.1f} a token")
    print(f"model: {made.model}")


if __name__ == "__main__":
    cli.run(main)
