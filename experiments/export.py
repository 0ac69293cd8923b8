"""Exports a run, or imports one: as a merged model, as an adapter of PEFT, or as an adapter of lora_jax.

    python -m experiments.export --workdir=runs/mrpc/seed_0 --form=merged --out=mrpc-roberta
    python -m experiments.export --workdir=runs/e2e --form=peft --out=e2e-peft
    python -m experiments.export --workdir=runs/e2e --form=native --out=e2e-adapter

    python -m experiments.export --source=e2e-peft --config=configs/e2e.py:medium --workdir=runs/imported

The first three write a run's delta (of its best epoch, where the config says what is best): `merged` is a Hugging Face
folder that transformers loads, of the base's speed; `peft` one for PeftModel.from_pretrained; `native` one file that
lora_jax.checkpoints.load_adapter reads. Beside it stands a model card for the Hub, README.md, of what the run knows:
base, method, data, training, scores. A README.md of yours that is there already stays.

With --source, a folder in one of those forms, a new workdir begins with that delta at step 0: evaluate, generate and
predict take it as they take a trained run, and train resumes it where the config's method has the same factors.
"""

from pathlib import Path

from absl import flags

from experiments import cli, reload, train  # noqa: F401  reload defines --base
from lora_jax import runs

flags.DEFINE_enum("form", None, ["merged", "peft", "native"], "What to write.")
flags.DEFINE_string("source", None, "A folder to import; its form is detected.")
flags.declare_key_flag("code")
flags.declare_key_flag("out")
flags.declare_key_flag("workdir")
flags.declare_key_flag("base")
flags.declare_key_flag("config")
flags.mark_flag_as_required("workdir")


def main() -> None:
    values = flags.FLAGS
    workdir = Path(values.workdir)
    if values.source:
        if not train.CONFIG.value or values.form or values.out:
            raise ValueError("--source goes with --config and a new --workdir, and without --form and --out")
        source = Path(values.source)
        imported = runs.import_run(source, train.CONFIG.value, workdir)
        entries = f"taken from {source}: {len(imported.delta)} entries"
        return print(f"{entries}; {workdir} begins with them at step 0, and {imported.adapter} holds them")
    if not (values.form and values.out):
        raise ValueError("give --form and --out to write a run, or --source to take one in")
    out, step = runs.export_run(workdir, values.form, Path(values.out), base=values.base)
    print(f"written: {out}, of step {step}")


if __name__ == "__main__":
    cli.run(main)
